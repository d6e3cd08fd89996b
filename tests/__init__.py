"""The tests mirror the rooms of `src`; files beside the folders are for what spans them."""

import contextlib
import gc
import io
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def python(*line: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """What `python <line>` says and exits with, in this process: a start of Python and its imports
    take longer than most commands. line: a file below the root, or -m and a module; arguments.

    Signal handlers are put back. A run's collection of garbage is left out: here it walks all that
    the tests have imported, which takes longer than the run.
    """
    first, *words = map(str, line)
    out, err, code = io.StringIO(), io.StringIO(), 0
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
    handlers = {number: signal.getsignal(number) for number in numbers}
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.chdir(cwd),
    ):  # fmt: skip
        patch.setattr(gc, "collect", lambda *generation: 0)
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
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return subprocess.CompletedProcess([first, *words], code, out.getvalue(), err.getvalue())
