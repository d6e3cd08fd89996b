"""The local engine: this machine's runs as child processes, `jobs` at a time.

What the bash loop of the README cannot do: it waits on each process, passes signals on, runs a
run again that exits 75, and returns a code that is not 0 when any run failed. Commands that are
`study_jobs.bound` are asked to end even when this process dies of kill -9.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from src.spec.command_line import OK, TRY_AGAIN
from src.storage.run_dir import Preemption

# A run that exits 75 is run again as long as it gets somewhere. Without progress it is given up
# after so many reruns, each after a longer pause: 1, 2, 4, ... 60 s, five minutes in all, more than
# the three that `src.storage.remote` takes to replace an owner that died.
MOST_IDLE_RERUNS = 10
LONGEST_PAUSE_S = 60.0
POLL_S = 0.1
_MANIFEST = re.compile(r"step-(\d{8,})\.json")


@dataclass(kw_only=True, slots=True)
class Job:
    """A command line to bring to its end. `progress()` changes whenever it got somewhere."""

    name: str
    command: Sequence[str]
    progress: Callable[[], object]
    process: subprocess.Popen[bytes] | None = None
    seen: object = None  # progress when it was last started
    idle: int = 0  # reruns since the last progress
    not_before: float = 0.0  # monotonic seconds
    code: int | None = None  # once it has ended for good


@dataclass(slots=True)
class Engine:
    """Runs jobs until each has ended for good or a signal has come; see `run`."""

    jobs: Sequence[Job]
    at_once: int
    pause_s: float = 1.0  # before the first rerun
    environment: Mapping[str, str] | None = None  # of every job; None: this process's
    stopped_by: int | None = field(default=None, init=False)

    def run(self) -> int:
        """The worst exit code: 0 if every run finished, 75 if any is to be run again."""
        with self._signals():
            while any(job.code is None for job in self.jobs):
                for job in self.jobs:
                    if job.process is not None:
                        self._look(job)
                self._start_waiting()
                time.sleep(POLL_S)
        codes = [job.code for job in self.jobs if job.code is not None]
        for job in self.jobs:
            if job.code not in (OK, TRY_AGAIN):
                _say(f"{job.name} failed: exit code {job.code}")
        return TRY_AGAIN if TRY_AGAIN in codes else max(codes, default=OK)

    def _start_waiting(self) -> None:
        """Fill the free places, in the order asked for; after a signal: begin nothing."""
        waiting = [job for job in self.jobs if job.code is None and job.process is None]
        if self.stopped_by is not None:
            for job in waiting:
                job.code = TRY_AGAIN
            return
        free = self.at_once - sum(job.process is not None for job in self.jobs)
        ready = [job for job in waiting if job.not_before <= time.monotonic()]
        for job in ready[: max(0, free)]:
            job.seen = job.progress()
            job.process = subprocess.Popen(
                job.command,
                env=self.environment,
                stdin=None if self.at_once == 1 else subprocess.DEVNULL,  # see src.spec.progress
            )
            if self.stopped_by is not None:  # it came between the look above and this line
                job.process.send_signal(self.stopped_by)

    def _look(self, job: Job) -> None:
        assert job.process is not None
        code = job.process.poll()
        if code is None:
            return
        job.process = None
        if self.stopped_by is not None and code == -self.stopped_by:
            code = TRY_AGAIN  # it was still starting and had no handler yet: nothing was begun
        if code != TRY_AGAIN:
            job.code = code if code >= 0 else 128 - code  # as a shell says it: 137 for kill -9
        elif self.stopped_by is not None:
            job.code = TRY_AGAIN
        else:
            self._again(job)

    def _again(self, job: Job) -> None:
        """Exit 75: come back after a pause, which grows while nothing moves."""
        job.idle = 0 if job.progress() != job.seen else job.idle + 1
        if job.idle > MOST_IDLE_RERUNS:
            _say(f"{job.name} exited {TRY_AGAIN} {job.idle} times without a step: given up")
            job.code = TRY_AGAIN
            return
        pause = min(LONGEST_PAUSE_S, self.pause_s * 2 ** max(0, job.idle - 1))
        _say(f"{job.name} exited {TRY_AGAIN}: again in {pause:g} s")
        job.not_before = time.monotonic() + pause

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Pass TERM, INT, USR1 and USR2 on to every running child; each saves and exits 75."""

        def forward(number: int, _: FrameType | None) -> None:
            self.stopped_by = number
            for job in self.jobs:
                if job.process is not None:
                    job.process.send_signal(number)

        before = {number: signal.signal(number, forward) for number in Preemption.SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)


def progress_of(run_path: Path) -> tuple[int, int]:
    """(step of the newest checkpoint, bytes of the record): what another attempt would move, also
    where the run is held by a process of somebody else that gets on with it."""
    steps = [
        int(match[1])
        for path in (run_path / "checkpoints").glob("step-*.json")
        if (match := _MANIFEST.fullmatch(path.name))
    ]
    record = run_path / "metrics.jsonl"
    return max(steps, default=-1), record.stat().st_size if record.exists() else 0


def _say(text: str) -> None:
    print(f"launch: {text}", file=sys.stderr, flush=True)
