"""Experiment files read, or refused."""

from __future__ import annotations

import pytest

from src.spec import config as cfg
from src.spec.config import load_sweep


@pytest.fixture
def load(tmp_path):
    """Text of an experiment file, overrides, phase -> Sweep."""

    def read(text: str | bytes, *overrides: str, phase: str = "full") -> cfg.Sweep:
        path = tmp_path / "sweep.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_sweep(path, overrides, phase)

    return read


@pytest.fixture
def refusal(load):
    """As `load`, for what must be refused; returns the message."""

    def read(text: str | bytes, *overrides: str) -> str:
        with pytest.raises(ValueError) as caught:
            load(text, *overrides)
        return str(caught.value)

    return read
