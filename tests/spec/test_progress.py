"""Progress: plain lines, each with its run's name, where a bar would share the terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import subprocess
import sys
import termios

import pytest

from src.spec.progress import FIRST_LINE_S, Progress, has_terminal, track
from tests.conftest import ROOT


class Clock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def run(seconds: float, steps: int, *, done: int = 0) -> None:
    clock = Clock()
    with Progress("emb35-rank", steps, "steps", done=done, clock=clock) as progress:
        for _ in range(steps - done):
            clock.now += seconds / (steps - done)
            progress.advance(1, "loss 4.2")


def test_lines_are_whole_and_begin_with_the_name(capsys: pytest.CaptureFixture[str]) -> None:
    run(60.0, 120)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and len(lines) > 3  # what a command prints for others is not disturbed
    assert all(line.startswith("emb35-rank: ") for line in lines)
    assert re.fullmatch(
        r"emb35-rank: 10 of 120 steps \(8%\) after 0:05, 0:55 left, loss 4\.2", lines[0]
    )
    assert lines[-1].startswith("emb35-rank: done, 120 of 120 steps (100%) after 1:00")


def test_a_short_stage_is_silent_and_a_long_one_does_not_flood(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(FIRST_LINE_S / 2, 50)
    assert capsys.readouterr().err == ""
    run(12 * 3600.0, 100_000)
    assert 10 < len(capsys.readouterr().err.splitlines()) < 150


def test_what_was_done_before_is_no_measure_of_the_speed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(20.0, 100, done=80)
    first = capsys.readouterr().err.splitlines()[0]
    assert "85 of 100 steps (85%) after 0:05, 0:15 left" in first


def test_a_stage_that_fails_does_not_say_done(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with pytest.raises(KeyError), Progress("run", None, "rows", clock=clock) as progress:
        clock.now = 9.0
        progress.advance(7)
        raise KeyError
    assert capsys.readouterr().err.splitlines()[-1] == "run: stopped, 7 rows after 0:09"


def test_items_pass_through() -> None:
    assert list(track(iter("abc"), "letters", "letters")) == ["a", "b", "c"]


CODE = "import sys; from src.spec.progress import has_terminal; print(int(has_terminal()), end='')"


def on_a_terminal(command: str) -> str:
    """What a shell command prints whose terminal is a new one, taken as its own."""
    controller, terminal = pty.openpty()
    try:
        done = subprocess.run(
            ["/bin/bash", "-c", command, sys.executable, CODE],
            stdin=terminal, stdout=subprocess.PIPE, stderr=terminal, cwd=ROOT, text=True,
            start_new_session=True, preexec_fn=lambda: take(terminal), timeout=60,
        )  # fmt: skip
    finally:
        os.close(controller)
        os.close(terminal)
    return done.stdout.strip()


def take(terminal: int) -> None:
    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)


def test_runs_that_a_shell_starts_beside_each_other_have_no_bar() -> None:
    assert on_a_terminal('"$0" -c "$1"') == "1"
    assert on_a_terminal('for i in 1 2; do "$0" -c "$1" & done; wait') == "00"  # a script
    assert on_a_terminal('set -m; "$0" -c "$1" & wait') == "0"  # typed
    assert not has_terminal()  # under pytest
