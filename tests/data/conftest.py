"""The runbook's first two commands on the tiny mirror, as processes; not to be written to."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data import run_alone
from tests.tiny_mirror import build_tiny_mirror


@pytest.fixture(scope="session")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_mirror(tmp_path_factory.mktemp("mirror"))


@pytest.fixture(scope="session")
def wikitext(tmp_path_factory: pytest.TempPathFactory, mirror: Path) -> Path:
    output = tmp_path_factory.mktemp("data") / "new" / "wikitext-2"
    printed = run_alone("download_wikitext.py", "--output", output, HUB_MIRROR=str(mirror))
    assert "wikitext-2-v1" in printed and "<unk>" in printed
    return output


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory, wikitext: Path) -> Path:
    output = tmp_path_factory.mktemp("data") / "new" / "lm_tokenized"
    arguments = ("--input", wikitext, "--vocab_size", 600, "--output", output)
    run_alone("preprocess_lm.py", *arguments, RAYON_NUM_THREADS="4", PYTHONHASHSEED="4")
    return output / "v600"
