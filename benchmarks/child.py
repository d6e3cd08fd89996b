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
        self.pipe, theirs = multiprocessing.Pipe()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", __file__, str(theirs.fileno()), name],
                pass_fds=[theirs.fileno()],
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
    with tempfile.TemporaryDirectory(prefix="base-") as folder:
        for line in (
            ["clone", "--quiet", "--shared", "--no-checkout", str(ROOT), folder],
            ["-C", folder, "checkout", "--quiet", "--detach", _commit(revision)],
        ):
            subprocess.run(["git", *line], check=True)
        yield Path(folder), _commit(revision)


def _commit(revision: str) -> str:
    line = ["git", "-C", str(ROOT), "rev-parse", "--verify", f"{revision}^{{commit}}"]
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"--base: found {revision!r}, expected a commit of this repository")
    return done.stdout.strip()


def main() -> None:
    """The child's side: `peers` is the one of the tree that PYTHONPATH names."""
    connection = Connection(int(sys.argv[1]))
    from benchmarks import peers

    asked = connection.recv()
    model = _known(peers.ModelConfig, asked.pop("model"))
    peers.peer(connection, sys.argv[2], peers.Work(model=model, **_fields(peers.Work, asked)))


def _known(kind: Any, values: dict[str, Any]) -> Any:
    return kind(**_fields(kind, values))


def _fields(kind: Any, values: dict[str, Any]) -> dict[str, Any]:
    """What an older build's dataclass has of `values`."""
    names = {spec.name for spec in dataclasses.fields(kind)}
    return {name: value for name, value in values.items() if name in names}


if __name__ == "__main__":
    main()
