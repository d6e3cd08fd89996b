"""Starts runs as processes of their own, and ends them.

A run costs 3 to 6 s of imports, so most of them are forks of a process that has imported
everything and computed nothing: no thread that a run needs exists yet (an allocator's sweeper is
all there is). A share are fresh processes, so that the equivalence is itself tested.
"""

from __future__ import annotations

import gc
import itertools
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.faults.bench import Bench, clean_environment

HUNG_S = 240.0
_number = itertools.count()
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


@dataclass
class Child:
    """A started process. `code` is the exit code, or minus the signal that ended it."""

    pid: int
    log: Path
    begun: float
    code: int | None = None

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def poll(self) -> int | None:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def wait(self, seconds: float = HUNG_S) -> int:
        """The exit code; a process that hangs is killed and gives -SIGKILL."""
        deadline = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        if self.code is None:
            return self.kill()
        return self.code

    def kill(self, number: int = signal.SIGKILL) -> int:
        """Send `number` and wait."""
        if self.poll() is None:
            os.kill(self.pid, number)
        return self.wait()

    def until(self, ready: Callable[[], bool], seconds: float = HUNG_S) -> bool:
        """Wait for `ready()`; False if the process ended first."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if ready():
                return True
            if self.poll() is not None:
                return False
            time.sleep(0.005)
        return False

    def handles(self, number: int) -> bool:
        """Whether the process has a handler of its own for the signal (Linux)."""
        try:
            status = Path(f"/proc/{self.pid}/status").read_text()
        except OSError:
            return False
        caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
        return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


def waited_s(pid: int) -> float:
    """Seconds that a process' main thread has spent waiting for a processor, 0 if unknown."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0


def seconds_to_end(pid: int, gone: Callable[[], bool]) -> tuple[float, float]:
    """(wall seconds until `gone()`, those of them in which the process did not wait for a
    processor that others had)."""
    watch = Watch(pid)
    while not watch.look(gone()) and watch.wall < 60:
        time.sleep(0.002)
    return watch.wall, watch.own


class Watch:
    """How long a process that was just signalled goes on."""

    def __init__(self, pid: int) -> None:
        self.pid, self.begun, self.before = pid, time.monotonic(), waited_s(pid)
        self.waited, self.wall, self.gone = self.before, 0.0, False

    def look(self, gone: bool) -> bool:
        """Update; returns whether it has ended."""
        if not self.gone:
            self.waited = max(self.waited, waited_s(self.pid))
            self.wall, self.gone = time.monotonic() - self.begun, gone
        return self.gone

    @property
    def own(self) -> float:
        """Seconds in which it had a processor, or waited for a disk."""
        return max(0.0, self.wall - (self.waited - self.before))


def preload() -> None:
    """Import what a run imports, so that forks of this process start at once."""
    import tensorboard.summary.writer.record_writer  # noqa: F401
    import tokenizers  # noqa: F401
    import torch._dynamo  # the optimizer's constructor imports it, which takes seconds
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM  # noqa: F401

    torch.set_num_threads(1)
    gc.freeze()  # so that the forks' collections leave all this alone


def fork(
    action: Callable[[], int],
    log: Path,
    arms: Sequence[Callable[[], None]] = (),
    ignored: Sequence[int] = (),
) -> Child:
    """Run `action` in a fork with its output in `log`. `arms` prepare the faults there;
    `ignored` signals are ignored at the start, as bash does to SIGINT of `command &`."""
    sys.stdout.flush()
    sys.stderr.flush()
    log.parent.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    pid = os.fork()
    if pid:
        return Child(pid, log, begun)
    code = 70
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.environ["OMP_NUM_THREADS"] = "1"
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)
        for arm in arms:
            arm()
        code = action()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 70
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def start(
    bench: Bench,
    argv: Sequence[str],
    arms: Sequence[Callable[[], None]] = (),
    ignored: Sequence[int] = (),
) -> Child:
    """run_experiment.py with `argv`, as a fork."""

    def run() -> int:
        import run_experiment

        return run_experiment.main(list(argv))

    return fork(run, _log(bench, argv), arms, ignored)


def start_fresh(bench: Bench, argv: Sequence[str]) -> Child:
    """run_experiment.py with `argv`, as the user starts it."""
    command = [sys.executable, str(bench.code / "run_experiment.py"), *argv]
    log = _log(bench, argv)
    log.parent.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    with log.open("ab") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, cwd=bench.work, env=clean_environment()
        )
    child = Child(process.pid, log, begun)
    process.returncode = 0  # the Child waits for it
    return child


def _log(bench: Bench, argv: Sequence[str]) -> Path:
    """Outside the log directory, so that a refusal can be seen to write nothing into it."""
    logs = Path(argv[list(argv).index("--log_dir") + 1])
    name = "-".join(logs.relative_to(bench.work).parts)
    return bench.work / "out" / f"{name}-{next(_number)}.out"


def finish(
    bench: Bench, argv: Sequence[str], arms: Sequence[Callable[[], None]] = (), fresh: bool = False
) -> list[str]:
    """Run to the end; returns what went wrong."""
    child = start_fresh(bench, argv) if fresh else start(bench, argv, arms)
    code = child.wait()
    return [] if code == 0 else [f"the last run ended with {code}: {child.output[-600:]}"]


def pause(draw: random.Random, longest: float, child: Child) -> None:
    """Sleep a random time, or until the child has ended."""
    deadline = time.monotonic() + draw.uniform(0, longest)
    while time.monotonic() < deadline and child.poll() is None:
        time.sleep(0.002)
