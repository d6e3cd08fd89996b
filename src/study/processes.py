"""The supervisor: a study's commands as child processes, several at a time.

Each ends with this process, however that dies; signals are passed on; exit 75, or a death by a
signal, is tried again. What becomes of a run that ended is the runner's business.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from src.compute import cores
from src.spec.command_line import TRY_AGAIN
from src.spec.progress import say
from src.storage.run_dir import Preemption

REPOSITORY = Path(__file__).resolve().parents[2]
# The kernel sends SIGTERM when the parent dies, however it dies (prctl(2) PR_SET_PDEATHSIG, which
# survives exec); in a process of its own, because a function between fork and exec may deadlock
# under threads.
_WITH_PARENT = """\
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() != int(sys.argv[1]):  # it died before the kernel was told
    sys.exit(75)
os.execv(sys.argv[2], sys.argv[2:])
"""
# A command that exits 75 is run again as long as it gets somewhere. Without progress it is given up
# after so many reruns, each after a longer pause: 1, 2, 4, ... 60 s, five minutes in all, more than
# the three that `src.storage.remote` takes to replace an owner that died.
MOST_IDLE_RERUNS = 10
LONGEST_PAUSE_S = 60.0
POLL_S = 0.05  # a run takes minutes


class Process(Protocol):
    """What is needed of a started command; `subprocess.Popen` is one."""

    def poll(self) -> int | None:
        """Its exit code, None while it runs."""

    def send_signal(self, sig: int) -> None:
        """Ask it to save and end."""


Start = Callable[[Sequence[str]], Process]


def bound(line: Sequence[str]) -> list[str]:
    """The command line that is asked to end when this process dies. Elsewhere than on Linux it
    keeps running, and the next start of its run waits for the lock."""
    if sys.platform != "linux":
        return [*line]
    return [sys.executable, "-I", "-S", "-c", _WITH_PARENT, str(os.getpid()), *line]


def starter(jobs: int, threads: int) -> Start:
    """Starts command lines as bound children with so many threads each; of several at a time none
    has the terminal (`src.spec.progress`)."""
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    # `python -m src...` works wherever the study was started.
    environment = {**cores.shared(jobs, threads), "PYTHONPATH": os.pathsep.join(paths)}
    stdin = None if jobs == 1 else subprocess.DEVNULL

    def start(line: Sequence[str]) -> Process:
        return subprocess.Popen(bound(line), env=environment, stdin=stdin)

    return start


def progress_of(run: Path) -> tuple[list[str], int]:
    """Checkpoints and bytes of metrics.jsonl: what grows while the run makes progress, here or in
    another process that holds its lock."""
    checkpoints, rows = (run / "checkpoints").glob("step-*.json"), run / "metrics.jsonl"
    return sorted(path.name for path in checkpoints), rows.stat().st_size if rows.exists() else 0


@dataclass(slots=True)
class _Child:
    line: Sequence[str]
    progress: Callable[[], object]
    process: Process | None = None
    seen: object = None  # progress when it was last started
    idle: int = 0  # reruns since the last progress
    not_before: float = 0.0  # monotonic seconds


class Supervisor:
    """Runs commands by name; a context, outside of which nothing of it runs.

        with Supervisor(start, at_once=2) as supervisor:
            supervisor.add("emb35", line, lambda: progress_of(run))
            name, code = supervisor.first_ended()

    stopped: a signal has come and was passed on; every child saves and exits, nothing is begun.
    """

    def __init__(self, start: Start, at_once: int, pause_s: float = 1.0) -> None:
        self._start, self.at_once, self.pause_s = start, at_once, pause_s
        self._children: dict[str, _Child] = {}
        self._before: dict[signal.Signals, Any] = {}
        self._signal: int | None = None

    @property
    def names(self) -> set[str]:
        """Commands that have not ended for good."""
        return set(self._children)

    @property
    def stopped(self) -> bool:
        return self._signal is not None

    @property
    def has_room(self) -> bool:
        """Whether another may begin; one that waits for its next attempt takes no place."""
        running = sum(child.process is not None for child in self._children.values())
        return running < self.at_once and not self.stopped

    def add(self, name: str, line: Sequence[str], progress: Callable[[], object]) -> None:
        """Start a command. `progress()` changes whenever it got somewhere."""
        self._children[name] = _Child(line, progress)
        self._begin(self._children[name])

    def first_ended(self) -> tuple[str, int] | None:
        """Wait until one has ended for good: its name and exit code (128 + n where signal n killed
        it too often). None once all have ended after a signal."""
        while not (self.stopped and self._all_ended()):
            for name, child in self._children.items():
                code = self._poll(name, child)
                if code is not None and not self.stopped:
                    del self._children[name]
                    return name, code
            time.sleep(POLL_S)
        return None

    def _all_ended(self) -> bool:
        started = [child.process for child in self._children.values() if child.process is not None]
        return all(process.poll() is not None for process in started)

    def _begin(self, child: _Child) -> None:
        child.seen = child.progress()
        child.process = self._start(child.line)
        if self._signal is not None:  # it came a moment ago
            child.process.send_signal(self._signal)

    def _poll(self, name: str, child: _Child) -> int | None:
        """The code of a command that has ended for good; starts one whose pause is over."""
        if child.process is None:
            if self.has_room and child.not_before <= time.monotonic():
                self._begin(child)
            return None
        code = child.process.poll()
        if code is None or (code >= 0 and code != TRY_AGAIN):
            return code
        child.process = None
        child.idle = 0 if child.progress() != child.seen else child.idle + 1
        text = f"exited {code}" if code > 0 else f"was ended by {signal.Signals(-code).name}"
        if child.idle > MOST_IDLE_RERUNS:
            say(name, f"{text} {child.idle} times without a step: given up")
            return code if code > 0 else 128 - code
        pause = min(LONGEST_PAUSE_S, self.pause_s * 2 ** max(0, child.idle - 1))
        if not self.stopped:
            say(name, f"{text}: again in {pause:g} s")
        child.not_before = time.monotonic() + pause
        return None

    # --------------------------------------------------------------------------- signals

    def _forward(self, number: int, _: FrameType | None) -> None:
        """Pass a signal on to every child; each saves and exits 75."""
        self._signal = number
        for child in self._children.values():
            if child.process is not None and child.process.poll() is None:
                child.process.send_signal(number)

    def __enter__(self) -> Supervisor:
        for number in Preemption.SIGNALS:
            self._before[number] = signal.signal(number, self._forward)
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if not self._all_ended():
                self._forward(signal.SIGTERM, None)
            self._signal = self._signal or signal.SIGTERM
            self.first_ended()
        finally:
            for number, handler in self._before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
