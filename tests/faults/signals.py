"""F2: TERM, INT, USR1 and USR2 at random instants: exit 75, no step lost, bitwise resume."""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from tests.faults import inject
from tests.faults.bench import (
    EXPERIMENT,
    Bench,
    Tally,
    broken_promises,
    clean_environment,
    differences,
    rows,
    say,
    tally,
    verified,
)
from tests.faults.processes import SIGNALS, finish, pause, start

AGAIN = 75
LIMIT_S = 5.0
LOOP_RUNS = (EXPERIMENT, "other")
# The PRD's launch loop; the process ids are printed so that the right ones get the signal.
LOOP = """
for exp in {names}; do
  {python} {code}/run_experiment.py --config {config} --exp $exp --device cpu \
    --log_dir {logs} >> {logs}.out 2>&1 &
  echo $!
done
for job in $(jobs -p); do wait $job; echo code $?; done
"""


def run(bench: Bench) -> list[Tally]:
    tallies: list[Tally] = []
    exits: list[float] = []
    each = bench.count(25, 1)
    with tally(tallies, "F2", f"TERM, INT, USR1, USR2 x {each} at random times") as line:
        for number in SIGNALS[:2] if bench.quick else SIGNALS:
            draw = bench.draw("F2", number)
            for trial in range(each):
                name = f"{signal.Signals(number).name}-{trial}"
                line.add(random_time(bench, name, number, draw, exits), trial=name)
        note_exits(line, exits)
    if bench.quick:
        return tallies
    exits = []
    with tally(tallies, "F2", "the same under the PRD's bash loop (& and wait)") as line:
        for round_number in range(2):
            for number in SIGNALS:
                name = f"loop-{signal.Signals(number).name}-{round_number}"
                for problems in bash_loop(bench, name, number, exits):
                    line.add(problems, trial=name)
        note_exits(line, exits)
    return tallies


def note_exits(line: Tally, exits: list[float]) -> None:
    if exits:
        line.notes.append(
            f"signal to exit: median {statistics.median(exits):.2f} s, longest {max(exits):.2f} s"
        )


def random_time(
    bench: Bench, name: str, number: int, draw: random.Random, exits: list[float]
) -> list[str]:
    """One signal that lands before the run is finished; half of the runs are started as bash
    starts a background job, with INT ignored."""
    for attempt in range(20):
        logs = bench.logs("F2", f"{name}-{attempt}")
        argv, path = bench.argv(logs, "noise"), logs / EXPERIMENT
        background = [signal.SIGINT] if draw.random() < 0.5 else []
        child = start(bench, argv, [inject.noise], ignored=background)
        if not child.until(lambda child=child: child.handles(number)):  # type: ignore[misc]
            return [f"ended with {child.code} before it handled the signal"]
        pause(draw, 1.3 * bench.reference_seconds("noise"), child)
        sent, done = time.monotonic(), (path / "metrics.json").exists()
        code = child.kill(number)
        if done:
            continue  # the run was finished: nothing left to interrupt
        exits.append(time.monotonic() - sent)
        problems = stopped_well(path, code, child.output)
        if bench.timed and exits[-1] > LIMIT_S:
            problems.append(f"took {exits[-1]:.1f} s to exit")
        problems += finish(bench, argv, [inject.noise])
        return problems or differences(path, bench.reference("noise"))
    return ["the run was always finished before the signal"]


def stopped_well(path: Path, code: int, output: str) -> list[str]:
    """Exit 75, and a checkpoint at the last step of the record: no step is lost."""
    problems = [] if code == AGAIN else [f"exit {code}, expected 75: {output[-500:]}"]
    problems += broken_promises(path)
    if (path / "metrics.jsonl").exists():
        steps = [row["step"] for row in rows(path) if row["kind"] == "train"]
        saved = [manifest["step"] for manifest in verified(path / "checkpoints")]
        if steps and (not saved or saved[-1] != steps[-1]):
            problems.append(f"steps were lost: recorded {steps[-1]}, saved {saved}")
    return problems


def at_a_step(bench: Bench, number: int, step: int) -> list[str]:
    """A signal during a given step (the mutants' check)."""
    logs = bench.logs("F2", f"step-{number}-{step}")
    argv, path = bench.argv(logs), logs / EXPERIMENT
    child = start(bench, argv, [inject.signalled_at(step, number)], ignored=[signal.SIGINT])
    problems = stopped_well(path, child.wait(), child.output)
    problems += finish(bench, argv)
    return problems or differences(path, bench.reference())


def bash_loop(bench: Bench, name: str, number: int, exits: list[float]) -> list[list[str]]:
    """The loop with two runs, both signalled while they train; then the same loop again.

    Returns one list of problems per run."""
    logs = bench.logs("F2", name)
    script = LOOP.format(
        names=" ".join(LOOP_RUNS), python=sys.executable, code=bench.code,
        config=bench.config, logs=logs,
    )  # fmt: skip
    problems: dict[str, list[str]] = {experiment: [] for experiment in LOOP_RUNS}
    codes, seconds = loop(script, logs, number, bench.draw("F2", name))
    exits += seconds
    for experiment, code in zip(LOOP_RUNS, codes, strict=True):
        output = logs.with_name(f"{logs.name}.out").read_text()
        problems[experiment] += stopped_well(logs / experiment, code, output)
        if bench.timed and max(seconds) > LIMIT_S:
            problems[experiment].append(f"took {max(seconds):.1f} s to exit")
    codes, _ = loop(script, logs, None, bench.draw("F2", name))
    for experiment, code in zip(LOOP_RUNS, codes, strict=True):
        if code:
            problems[experiment].append(f"the second loop ended with {code}")
    if not any(problems.values()):
        problems[EXPERIMENT] += differences(logs / EXPERIMENT, bench.reference())
        problems["other"] += differences_but_names(bench, logs / "other")
    return list(problems.values())


def differences_but_names(bench: Bench, path: Path) -> list[str]:
    """`other` has the same model, seed and data as the reference under another name; only its
    metrics.json, which says the names, is compared without them."""
    problems = differences(path, bench.reference())
    found, expected = (
        json.loads((place / "metrics.json").read_text()) for place in (path, bench.reference())
    )
    if all(found[key] == expected[key] for key in ("dev_loss", "train_loss", "steps")):
        problems = [problem for problem in problems if problem != "metrics.json differs"]
    return problems


def loop(
    script: str, logs: Path, number: int | None, draw: random.Random
) -> tuple[list[int], list[float]]:
    """(exit codes, seconds from signal to exit) of one bash loop; each run is signalled once it
    trains, at a random time."""
    shell = subprocess.Popen(
        ["bash", "-c", script], stdout=subprocess.PIPE, text=True, env=clean_environment()
    )
    assert shell.stdout is not None
    pids = [int(shell.stdout.readline()) for _ in LOOP_RUNS]
    seconds: list[float] = []
    for pid, experiment in zip(pids, LOOP_RUNS, strict=True):
        if number is None:
            break
        record = logs / experiment / "metrics.jsonl"
        deadline = time.monotonic() + 240
        while not (record.exists() and record.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.3))
        sent = time.monotonic()
        os.kill(pid, number)
        while Path(f"/proc/{pid}").exists() and time.monotonic() < sent + 60:
            time.sleep(0.005)
        seconds.append(time.monotonic() - sent)
    output, _ = shell.communicate(timeout=300)
    codes = [int(line.split()[1]) for line in output.splitlines() if line.startswith("code")]
    if len(codes) != len(LOOP_RUNS):
        say(f"bash loop said {output!r}")
    return codes, seconds
