"""F5: two processes on one run, and a holder that is killed and followed at once."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from tests.faults.bench import EXPERIMENT, Bench, Tally, differences, tally
from tests.faults.processes import Child, start

AGAIN = 75
REFUSED_WITHIN_S = 2.0
SHORT = ("--set", "training.tokens=2560")  # 20 steps


def run(bench: Bench) -> list[Tally]:
    tallies: list[Tally] = []
    pairs, kills = bench.count(50, 1), bench.count(50, 1)
    with tally(tallies, "F5", f"two processes on one run x {pairs}") as line:
        longest = 0.0
        for number in range(pairs):
            problems, seconds = pair(bench, number)
            longest = max(longest, seconds)
            line.add(problems, trial=f"pair {number}")
        line.notes.append(f"the second was refused within {longest:.2f} s")
    with tally(tallies, "F5", f"holder killed and restarted x {kills}") as line:
        for problems in killed_and_restarted(bench, kills):
            line.add(problems)
    return tallies


def pair(bench: Bench, number: int) -> tuple[list[str], float]:
    """Exactly one of two that start together runs; the other exits 75, names it, and leaves the
    run alone. Returns (problems, seconds until the second had exited)."""
    logs = bench.logs("F5", f"pair-{number}")
    argv = bench.argv(logs, extra=SHORT)
    gate = logs.with_name(f"gate-{number}")
    gate.unlink(missing_ok=True)

    def wait_for_gate() -> None:
        while not gate.exists():
            time.sleep(0.001)

    children = [start(bench, argv, [wait_for_gate]) for _ in range(2)]
    time.sleep(0.05)
    opened = time.monotonic()
    gate.touch()
    while all(child.poll() is None for child in children):
        time.sleep(0.005)
    seconds = time.monotonic() - opened
    codes = sorted(child.wait() for child in children)
    if codes == [0, 0] and any("finished before" in child.output for child in children):
        return [], 0.0  # on a busy machine the second may come after the end
    problems = [] if codes == [0, AGAIN] else [f"exits {codes}, expected [0, 75]"]
    if not problems:
        winner, loser = sorted(children, key=lambda child: child.code or 0)
        if f"process {winner.pid} on host {os.uname().nodename}" not in loser.output:
            problems.append(f"the holder is not named: {loser.output[-300:]}")
        if bench.timed and seconds > REFUSED_WITHIN_S:
            problems.append(f"refused after {seconds:.1f} s")
    path = logs / EXPERIMENT
    steps = [
        row["step"]
        for line in (path / "metrics.jsonl").read_text().splitlines()
        if (row := json.loads(line))["kind"] == "train"
    ]
    if steps != list(range(1, len(steps) + 1)) or not (path / "metrics.json").exists():
        problems.append(f"the record is not one run's: steps {steps}")
    return problems, seconds


def holds(path: Path, child: Child) -> bool:
    """Whether the lock file names this process."""
    try:
        return json.loads((path / ".lock").read_text())["pid"] == child.pid
    except (OSError, ValueError):
        return False


def killed_and_restarted(bench: Bench, kills: int) -> list[list[str]]:
    """Each kill is followed at once by a new process, which must get the run."""
    logs = bench.logs("F5", "chain")
    argv, path = bench.argv(logs), logs / EXPERIMENT
    draw = bench.draw("F5")
    outcomes = []
    child = start(bench, argv)
    for number in range(kills):
        if not child.until(lambda child=child: holds(path, child)):  # type: ignore[misc]
            outcomes.append([f"process {number} ended with {child.code}: {child.output[-300:]}"])
            child = start(bench, argv)
            continue
        time.sleep(draw.uniform(0, 0.1))
        code = child.kill()
        child = start(bench, argv)
        outcomes.append([] if code == -9 else [f"holder {number} ended with {code}"])
    problems = [] if child.wait() == 0 else [f"the last one ended with {child.code}"]
    outcomes[-1] += problems or differences(path, bench.reference())
    return outcomes
