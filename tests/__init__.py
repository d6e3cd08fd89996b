"""The tests mirror the rooms of `src`; files beside the folders are for what spans them."""

import contextlib
import gc
import io
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


@contextlib.contextmanager
def as_a_command() -> Iterator[pytest.MonkeyPatch]:
    """Signal handlers are put back. A run's collection of garbage is left out: here it walks all
    that the tests have imported, which takes longer than the run."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "collect", lambda *generation: 0)
        try:
            yield patch
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def run_main(*arguments: object) -> int:
    """The exit code of `run_experiment.main`, in this process."""
    import run_experiment

    with as_a_command():
        return run_experiment.main([*map(str, arguments)])


def python(*line: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """What `python <line>` says and exits with, in this process: a start of Python and its imports
    take longer than most commands. line: a file below the root, or -m and a module; arguments."""
    first, *words = map(str, line)
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        as_a_command() as patch,
        contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.chdir(cwd),
    ):  # fmt: skip
        patch.setattr(sys, "path", [*sys.path])
        try:
            if first == "-m":
                patch.setattr(sys, "argv", words)
                patch.delitem(sys.modules, words[0], raising=False)
                runpy.run_module(words[0], run_name="__main__", alter_sys=True)
            else:
                patch.setattr(sys, "argv", [first, *words])
                runpy.run_path(str(ROOT / first), run_name="__main__")
        except SystemExit as ended:
            code = int(ended.code or 0)
    return subprocess.CompletedProcess([first, *words], code, out.getvalue(), err.getvalue())
