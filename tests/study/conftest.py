from pathlib import Path

import pytest

from src.study import runner
from src.study.plan import Study
from tests import ROOT


@pytest.fixture
def prd(monkeypatch: pytest.MonkeyPatch) -> Study:
    """The shipped study at 10M parameters."""
    monkeypatch.chdir(ROOT)
    return runner.load(Path("configs/study.yaml"))
