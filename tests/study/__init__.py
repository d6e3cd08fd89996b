import subprocess
import time
from collections.abc import Callable
from typing import Any


def until(ready: Callable[[], object], process: subprocess.Popen[Any] | None = None) -> None:
    """Wait for `ready()`, which must come before the process ends."""
    deadline = time.monotonic() + 300
    while not ready():
        assert time.monotonic() < deadline, "it never came"
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.005)


class Ended:
    """A started command that had ended before anyone asked."""

    def __init__(self, code: int) -> None:
        self.code = code

    def poll(self) -> int:
        return self.code

    def send_signal(self, sig: int) -> None: ...
