"""A peer of `benchmarks.peers` in a process of its own, of this build or of another one's clone.

The child's modules all come from `root`, so that an older build can be timed beside this one; only
this file, plain values and a pipe are shared with it.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.peers import Work

ROOT = Path(__file__).resolve().parents[1]


class Child:
    """Takes steps whenever it is told to; ends when it is closed or this process ends.

    variables: added to its environment, such as `src.compute.cores.WAITING`.
    """

    def __init__(
        self, name: str, work: Work, root: Path = ROOT, variables: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
        self.pipe, child_end = multiprocessing.Pipe()
        with child_end:
            self.process = subprocess.Popen(
                [sys.executable, "-P", __file__, str(child_end.fileno()), name],
                pass_fds=[child_end.fileno()],
                env={**os.environ, **(variables or {}), "PYTHONPATH": path},
                cwd=root,
            )
        self.pipe.send(dataclasses.asdict(work))

    def receive(self) -> dict[str, Any]:
        """Its next message; RuntimeError where it failed."""
        try:
            message = self.pipe.recv()
        except EOFError:
            message = {"error": f"ended with {self.process.wait()}"}
        if "error" in message:
            raise RuntimeError(f"{self.name}: {message['error']}")
        return message

    def seconds(self, steps: int) -> float:
        """Wall seconds of so many optimizer steps."""
        self.pipe.send(steps)
        return self.receive()["seconds"]

    def close(self) -> float:
        """Peak MiB of its life."""
        self.pipe.send(None)
        peak = self.receive()["peak_mib"]
        self.process.wait(30)
        return peak

    def kill(self) -> None:
        """End it, whatever it does."""
        self.process.kill()
        self.process.wait()
        self.pipe.close()


@contextmanager
def clone(revision: str) -> Iterator[tuple[Path, str]]:
    """A temporary clone of this repository at a commit, and the commit's full name."""
    commit = _commit(revision)
    with tempfile.TemporaryDirectory(prefix="base-") as folder:
        for command in (
            ["clone", "--quiet", "--shared", "--no-checkout", str(ROOT), folder],
            ["-C", folder, "checkout", "--quiet", "--detach", commit],
        ):
            subprocess.run(["git", *command], check=True)
        yield Path(folder), commit


def _commit(revision: str) -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--verify", f"{revision}^{{commit}}"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise ValueError(f"--base: found {revision!r}, expected a commit of this repository")
    return result.stdout.strip()


def main() -> None:
    """The child's side: `peers` is the one of the tree that PYTHONPATH names."""
    connection = Connection(int(sys.argv[1]))
    from benchmarks import peers

    work = connection.recv()
    work["model"] = _build(peers.ModelConfig, work["model"])
    peers.peer(connection, sys.argv[2], _build(peers.Work, work))


def _build(dataclass: Any, values: dict[str, Any]) -> Any:
    """Of those `values` that it has a field for: an older build's may lack some."""
    names = {field.name for field in dataclasses.fields(dataclass)}
    return dataclass(**{name: value for name, value in values.items() if name in names})


if __name__ == "__main__":
    main()
