from pathlib import Path

import pytest

from src.study import runner as study
from src.study.plan import Study
from tests import ROOT


@pytest.fixture
def prd(monkeypatch: pytest.MonkeyPatch) -> Study:
    """The shipped study at 10M parameters."""
    monkeypatch.chdir(ROOT)
    return study.load(Path("configs/study.yaml"))
