"""F4: a full disk at each write phase: exit 74 with path and bytes, earlier checkpoints valid, and
a bitwise end once there is room."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.faults import inject
from tests.faults.bench import EXPERIMENT, Bench, Tally, broken_promises, differences, say, tally
from tests.faults.processes import finish, start

IO_FAILED = 74
TMPFS = "64m"
# A write of these files finds the disk full (half of the bytes are taken, then ENOSPC).
WRITES = {
    "config": (r"config\.yaml", (1,)),
    "environment": (r"environment\.json", (1,)),
    "a row": (r"metrics\.jsonl$", (1, 20, 40)),
    "an event": (r"tfevents", (1, 3, 150)),
    "an object": (r"step-\d+-g\d+\.pt", (1, 2, 5)),
    "a manifest": (r"step-\d+\.json", (1, 2, 5)),
    "the result": (r"metrics\.json\.", (1,)),
}
# The real file system is filled just before these calls.
CALLS = {
    "before the first save": ("src.storage.checkpoint", None, "save", (1,)),
    "before a later save": ("src.storage.checkpoint", None, "save", (2, 4)),
    "between object and manifest": ("src.storage.checkpoint", None, "manifest_bytes", (1, 3)),
    "before a step": ("src.train", "Trainer", "update", (1, 33)),
    "before the evaluation": ("src.evaluation.evaluate", None, "evaluate", (1,)),
    "before the export": ("src.models.export", None, "export", (1,)),
    "before the result": ("src.storage.run_dir", "RunDir", "finish", (1,)),
}


def run(bench: Bench) -> list[Tally]:
    tallies: list[Tally] = []
    with tally(tallies, "F4", "ENOSPC in each kind of write") as line:
        for name, (pattern, times) in WRITES.items():
            if bench.quick and name not in ("a row", "an event"):
                continue
            for nth in times[1:2] if bench.quick else times:
                line.add(refused_write(bench, name, pattern, nth), trial=f"{name} {nth}")
        once = refused_write(bench, "one object", WRITES["an object"][0], 2, lasting=False)
        line.add(once, trial="one object, then room again")
    if bench.quick:
        return tallies
    with filesystem(bench) as disk:
        if disk is not None:
            with tally(tallies, "F4", "a real file system (tmpfs), full") as line:
                for name, (module, owner, function, times) in CALLS.items():
                    for nth in times:
                        problems = filled(bench, disk, name, (module, owner, function), nth)
                        line.add(problems, trial=f"{name} {nth}")
    return tallies


def said_what(code: int, output: str) -> list[str]:
    """Exit 74, the path, the bytes, and no traceback."""
    problems = [] if code == IO_FAILED else [f"exit {code}, expected 74: {output[-500:]}"]
    last = output.strip().splitlines()[-1] if output.strip() else ""
    if "Traceback" in output:
        problems.append("showed a traceback")
    if not re.search(r"\d+ bytes", last):
        problems.append(f"did not say how many bytes: {last!r}")
    if EXPERIMENT not in last and "/" not in last:
        problems.append(f"did not name the path: {last!r}")
    return problems


def refused_write(
    bench: Bench, name: str, pattern: str, nth: int, lasting: bool = True
) -> list[str]:
    """The n-th write of a file finds the disk full, and so do all after it or none."""
    logs = bench.logs("F4", f"{name}-{nth}".replace(" ", "_"))
    argv = bench.argv(logs)
    child = start(bench, argv, [inject.disk_full(pattern, nth, lasting)])
    problems = said_what(child.wait(), child.output)
    problems += broken_promises(logs / EXPERIMENT)
    problems += finish(bench, argv)
    return problems or differences(logs / EXPERIMENT, bench.reference())


@contextmanager
def filesystem(bench: Bench) -> Iterator[Path | None]:
    """A small file system of our own, where we may mount one."""
    place = bench.work / "disk"
    place.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={TMPFS}", "tmpfs", str(place)]
    if subprocess.run(command, capture_output=True).returncode:
        say("F4: no tmpfs can be mounted here")
        yield None
        return
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def filled(
    bench: Bench, disk: Path, name: str, call: tuple[str, str | None, str], nth: int
) -> list[str]:
    """The disk is filled to its last byte just before a call."""
    logs = disk / f"{name}-{nth}".replace(" ", "_")
    logs.mkdir()
    argv = bench.argv(logs)
    place, owner, function = call
    child = start(bench, argv, [inject.when(place, owner, function, nth, inject.ballast(disk))])
    problems = said_what(child.wait(), child.output)
    (disk / "ballast").unlink(missing_ok=True)
    problems += broken_promises(logs / EXPERIMENT)
    problems += finish(bench, argv)
    return problems or differences(logs / EXPERIMENT, bench.reference())
