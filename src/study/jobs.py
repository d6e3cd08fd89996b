"""A study's processes: started so that they end with it, several at a time, waited for together."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from src.compute import cores
from src.spec.command_line import OK, TRY_AGAIN
from src.storage.run_dir import Held, locked
from src.study.phases.cells import Job

REPOSITORY = Path(__file__).resolve().parents[2]
WITH_PARENT = Path(__file__).with_name("with_parent.py")
POLL_S = 0.05  # a run takes minutes


class Process(Protocol):
    """What a study needs of a started command; `subprocess.Popen` is one."""

    def poll(self) -> int | None:
        """Its exit code, None while it runs."""

    def terminate(self) -> None:
        """Ask it to save and end."""

    def wait(self) -> int:
        """Wait for its end."""


Start = Callable[[Sequence[str]], Process]


class Holder:
    """Somebody else's hold of a run directory, as a process that ends well when it is let go."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def poll(self) -> int | None:
        return None if is_held(self.directory) else OK

    def terminate(self) -> None:
        """It is not ours to end."""

    def wait(self) -> int:
        return OK


def is_held(directory: Path) -> bool:
    """Whether another process holds a run directory at this moment."""
    if not directory.is_dir():
        return False
    try:
        with locked(directory):
            return False
    except Held:
        return True


def starter(jobs: int, threads: int) -> Start:
    """Starts command lines as children that end with this process, with so many threads each; of
    several at a time none has the terminal (`src.spec.progress`)."""
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    # `python -m src...` works wherever the study was started.
    environment = {**cores.shared(jobs, threads), "PYTHONPATH": os.pathsep.join(paths)}
    stdin = None if jobs == 1 else subprocess.DEVNULL

    def start(line: Sequence[str]) -> Process:
        return subprocess.Popen(bound(line), env=environment, stdin=stdin)

    return start


def bound(line: Sequence[str]) -> list[str]:
    """The command line that ends with this process (`src/study/with_parent.py`)."""
    return [sys.executable, "-I", "-S", str(WITH_PARENT), str(os.getpid()), *line]


class Running:
    """The jobs that run now."""

    def __init__(self) -> None:
        self._processes: dict[str, tuple[Job, Process]] = {}

    def __len__(self) -> int:
        return len(self._processes)

    @property
    def jobs(self) -> list[Job]:
        return [job for job, _ in self._processes.values()]

    @property
    def names(self) -> set[str]:
        return set(self._processes)

    def add(self, job: Job, process: Process) -> None:
        self._processes[job.name] = job, process

    def first_ended(self) -> tuple[Job, int]:
        """Wait until one has ended; it is taken off. A signal's end reads as "run me again"."""
        while True:
            for name, (job, process) in self._processes.items():
                code = process.poll()
                if code is not None:
                    del self._processes[name]
                    return job, TRY_AGAIN if code < 0 else code
            time.sleep(POLL_S)

    def stop(self) -> None:
        """Ask all to save and end, and wait for their checkpoints."""
        for _, process in self._processes.values():
            process.terminate()
        for _, process in self._processes.values():
            process.wait()
        self._processes.clear()
