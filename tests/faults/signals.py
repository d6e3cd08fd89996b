"""F2: TERM, INT, USR1 and USR2 at random instants: exit 75, no step lost, bitwise resume."""

from __future__ import annotations

import contextlib
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
    SAVE_EVERY,
    STEPS,
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
from tests.faults.processes import SIGNALS, Watch, finish, pause, seconds_to_end, start

AGAIN = 75
LIMIT_S = 5.0
SAVES = 1 + STEPS // SAVE_EVERY
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
    exits: list[tuple[float, float]] = []
    each = bench.count(25, 1)
    with tally(tallies, "F2", f"TERM, INT, USR1, USR2 x {each} at random times") as line:
        for number in (signal.SIGINT,) if bench.quick else SIGNALS:
            draw = bench.draw("F2", number)
            for trial in range(each):
                name = f"{signal.Signals(number).name}-{trial}"
                line.add(random_time(bench, name, number, draw, exits), trial=name)
        note_exits(line, exits)
    with tally(tallies, "F2", "signals at instants of their own") as line:
        line.add(in_the_last_save(bench), trial="in the last save")
        line.add(several_runs(bench), trial="--exp with two runs")
    if bench.quick:
        return tallies
    exits = []
    with tally(tallies, "F2", "the same under the PRD's bash loop (& and wait)") as line:
        for round_number in range(bench.count(1, 0)):
            for number in SIGNALS:
                name = f"loop-{signal.Signals(number).name}-{round_number}"
                for problems in bash_loop(bench, name, number, exits):
                    line.add(problems, trial=name)
        note_exits(line, exits)
    return tallies


def note_exits(line: Tally, exits: list[tuple[float, float]]) -> None:
    if exits:
        walls, owns = zip(*exits, strict=True)
        line.notes.append(
            f"signal to exit without waiting for a processor: median {statistics.median(owns):.2f} "
            f"s, longest {max(owns):.2f} s; by the clock {max(walls):.2f} s"
        )


def random_time(
    bench: Bench, name: str, number: int, draw: random.Random, exits: list[tuple[float, float]]
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
        if (path / "metrics.json").exists() or child.poll() is not None:
            child.wait()
            continue  # the run was finished: nothing left to interrupt
        sent = time.time()
        os.kill(child.pid, number)
        seconds = seconds_to_end(child.pid, lambda child=child: child.poll() is not None)  # type: ignore[misc]
        code, result = child.wait(), path / "metrics.json"
        if result.exists() and result.stat().st_mtime <= sent:
            continue  # it was finished between the look and the signal
        exits.append(seconds)
        problems = stopped_well(path, code, child.output)
        if bench.timed and seconds[1] > LIMIT_S:
            problems.append(f"took {seconds[1]:.1f} s to exit")
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


def in_the_last_save(bench: Bench) -> list[str]:
    """Too late to stop a step, too early to be forgotten: the evaluation must not begin."""
    logs = bench.logs("F2", "last-save")
    argv, path = bench.argv(logs), logs / EXPERIMENT

    def strike() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    child = start(bench, argv, [inject.when("src.storage.checkpoint", None, "save", SAVES, strike)])
    problems = stopped_well(path, child.wait(), child.output)
    problems += finish(bench, argv)
    return problems or differences(path, bench.reference())


def several_runs(bench: Bench) -> list[str]:
    """One signal ends the whole command: the next run must not begin."""
    logs = bench.logs("F2", "several")
    argv = bench.argv(logs, exp="all")
    child = start(bench, argv, [inject.signalled_at(34, signal.SIGTERM)])
    problems = stopped_well(logs / EXPERIMENT, child.wait(), child.output)
    if (logs / "other").exists():
        problems.append("the next run was begun after the signal")
    problems += finish(bench, argv)
    return problems or differences(logs / EXPERIMENT, bench.reference())


def bash_loop(
    bench: Bench, name: str, number: int, exits: list[tuple[float, float]]
) -> list[list[str]]:
    """The loop with two runs, both signalled while they train; then the same loop again.

    Returns one list of problems per run."""
    logs = bench.logs("F2", name)
    script = LOOP.format(
        names=" ".join(LOOP_RUNS), python=sys.executable, code=bench.code,
        config=bench.config, logs=logs,
    )  # fmt: skip
    problems: dict[str, list[str]] = {experiment: [] for experiment in LOOP_RUNS}
    codes, watches = loop(script, logs, number, bench.draw("F2", name))
    for experiment, code in zip(LOOP_RUNS, codes, strict=True):
        watch = watches[experiment]
        exits.append((watch.wall, watch.own))
        output = logs.with_name(f"{logs.name}.out").read_text()
        problems[experiment] += stopped_well(logs / experiment, code, output)
        if bench.timed and watch.own > LIMIT_S:
            problems[experiment].append(f"took {watch.own:.1f} s to exit")
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
    values, expected = (
        json.loads((place / "metrics.json").read_text()) for place in (path, bench.reference())
    )
    if all(values[key] == expected[key] for key in ("dev_loss", "train_loss", "steps")):
        problems = [problem for problem in problems if problem != "metrics.json differs"]
    return problems


def loop(
    script: str, logs: Path, number: int | None, draw: random.Random
) -> tuple[list[int], dict[str, Watch]]:
    """(exit codes, how long each went on after its signal) of one bash loop; each run is signalled
    a random time after it began to train."""
    shell = subprocess.Popen(
        ["bash", "-c", script], stdout=subprocess.PIPE, text=True, env=clean_environment()
    )
    assert shell.stdout is not None
    pids = {experiment: int(shell.stdout.readline()) for experiment in LOOP_RUNS}
    due: dict[str, float] = {}
    watches: dict[str, Watch] = {}
    deadline = time.monotonic() + 240
    while number is not None and time.monotonic() < deadline:
        for experiment, pid in pids.items():
            record = logs / experiment / "metrics.jsonl"
            if experiment not in due and record.exists() and record.stat().st_size:
                due[experiment] = time.monotonic() + draw.uniform(0, 0.3)
            if experiment in watches:
                watches[experiment].look(not Path(f"/proc/{pid}").exists())
            elif experiment in due and time.monotonic() >= due[experiment]:
                watches[experiment] = Watch(pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        if len(watches) == len(pids) and all(watch.gone for watch in watches.values()):
            break
        time.sleep(0.002)
    output, _ = shell.communicate(timeout=300)
    codes = [int(line.split()[1]) for line in output.splitlines() if line.startswith("code")]
    if len(codes) != len(LOOP_RUNS):
        say(f"bash loop said {output!r}")
    return codes, watches
