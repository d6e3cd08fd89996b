"""A planted study and what its analysis finds, for all that read it."""

from __future__ import annotations

import json

import pytest

from src.analysis.science import report as science
from tests import ROOT, planted_study

GRID = ("model.total_params=10_485_760", "model.vocab_size=16_384", "training.batch_size=64",
        "training.seq_len=512")  # fmt: skip
SWEEPS = ("frontier", "factorised", "depth_control", "glu_expansion")


@pytest.fixture(scope="session")
def planted(tmp_path_factory):
    """Run directories of four sweeps, three seeds, a ranking phase and a sweep of rates; not to be
    written to."""
    logs = tmp_path_factory.mktemp("planted")
    planted_study.write(logs, SWEEPS, seeds=[0, 1, 2], overrides=GRID)
    planted_study.write(logs, ["frontier"], phases=["rank"], seed=1)
    planted_study.write(logs / "rates", ["miniature_lr"], seed=2)
    return logs


@pytest.fixture(scope="session")
def analysis(planted, tmp_path_factory):
    """science.json of it; not to be changed."""
    output = tmp_path_factory.mktemp("science")
    command = ["--log_dir", str(planted), "--output", str(output)]
    predictions = ["--predictions", str(ROOT / "results" / "predictions.json")]
    assert science.main([*command, *predictions]) == 0
    return json.loads((output / "science.json").read_text())
