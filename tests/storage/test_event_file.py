"""The TensorBoard view: what readers make of cut runs, and a full disk met by the run itself."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from tensorboard.backend.event_processing import event_accumulator, plugin_event_accumulator

from src import train
from src.storage.event_file import EventFile
from src.storage.run_dir import RunDir


def attempt(folder: Path, first: int, last: int, value: float) -> None:
    """A process that begins with step `first` and is killed after `last`."""
    with EventFile(folder, first) as board:
        for step in range(first, last + 1):
            board.add_scalar("train/loss", value, step)


def accumulated(folder: Path, tag: str = "train/loss") -> list[tuple[int, float]]:
    reader = event_accumulator.EventAccumulator(str(folder)).Reload()
    return [(event.step, event.value) for event in reader.Scalars(tag)]


def slowly_loaded(folder: Path) -> list[tuple[int, float]]:
    """As `tensorboard --load_fast=false` reads."""
    reader = plugin_event_accumulator.EventAccumulator(str(folder)).Reload()
    tensors = reader.Tensors("train/loss")
    return [(event.step, event.tensor_proto.float_val[0]) for event in tensors]


@pytest.mark.parametrize("read", [accumulated, slowly_loaded])
@pytest.mark.parametrize("resumed_at", [0, 4])
def test_a_resumed_run_has_each_step_once(tmp_path: Path, monkeypatch, read, resumed_at) -> None:
    """Resumed at 0: killed before its first checkpoint."""
    clock = iter(range(1_800_000_000, 1_900_000_000))  # the files are of different seconds
    monkeypatch.setattr("time.time", lambda: next(clock))
    attempt(tmp_path, 0, 6, value=1.0)
    attempt(tmp_path, resumed_at, 8, value=2.0)
    before = [(step, 1.0) for step in range(resumed_at)]
    assert read(tmp_path) == before + [(step, 2.0) for step in range(resumed_at, 9)]


def test_a_final_evaluation_that_was_cut_is_shown_once(tmp_path: Path) -> None:
    with RunDir.open(tmp_path, "r") as directory:
        attempt(directory.path / "tensorboard", 0, 5, value=1.0)
        for accuracy in (0.25, 0.5):  # killed before metrics.json, then measured again
            train.board_final(directory, {"accuracy": accuracy, "name": "x"}, 5)
        folder = directory.path / "tensorboard"
        assert accumulated(folder, "final/accuracy") == [(5, 0.5)]
        assert len(accumulated(folder)) == 6


def test_a_full_disk_is_an_error_that_names_the_file_and_leaves_whole_events(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.write

    def full(descriptor: int, data: memoryview) -> int:
        if len(data) > 20:
            return real(descriptor, data[:20])  # what still fits
        raise OSError(errno.ENOSPC, "No space left on device")

    with EventFile(tmp_path, 0) as board:
        board.add_scalar("train/loss", 1.0, 0)
        monkeypatch.setattr("os.write", full)
        with pytest.raises(OSError, match="could not append") as caught:
            board.add_scalar("train/loss", 2.0, 1)
        monkeypatch.undo()
        assert caught.value.errno == errno.ENOSPC and "tfevents" in caught.value.filename
        board.add_scalar("train/loss", 3.0, 2)
    assert accumulated(tmp_path) == [(0, 1.0), (2, 3.0)]
