"""A planted study and what its analysis finds, for all that read it."""

from __future__ import annotations

import json

import pytest

from src.analysis.science import report as science
from tests import ROOT, planted_study


@pytest.fixture(scope="session")
def planted(tmp_path_factory):
    """The run directories of a planted study; not to be written to."""
    logs = tmp_path_factory.mktemp("planted")
    planted_study.write_study(logs, seeds=3)
    return logs


@pytest.fixture(scope="session")
def analysis(planted, tmp_path_factory):
    """science.json of it; not to be changed."""
    output = tmp_path_factory.mktemp("science")
    command = ["--log_dir", str(planted), "--output", str(output)]
    predictions = ["--predictions", str(ROOT / "results" / "predictions.json")]
    assert science.main([*command, *predictions]) == 0
    return json.loads((output / "science.json").read_text())
