"""Slurm arrays whose tasks are preempted, cancelled and timed out: python -m tests.slurm

    apt-get install slurm-wlm        # as root, once; Debian 12 has 22.05
    python -m tests.slurm --results results/slurm

Three arrays of four tiny runs are written by `run_experiment.py --study FILE --engine slurm` and
submitted. In each, at a random step, something happens to the last task and to one in the middle:

- preempted: `scontrol requeue`, what a preempting partition does. It comes back, once.
- cancelled: `scancel`. It saves, stays cancelled, and the same run started again goes on.
- timed out: the limit is set to three minutes, and Slurm says two minutes before that it is over.
  The run stands still until then, so that it cannot end first. It saves and requeues itself.

The first task is left alone, the second is bad input (78); neither may be started a second time.
Weights, optimizer, generators, rows and results are compared, bit for bit, with runs that nobody
interrupted. Exit code 1 unless all of that holds.

Slurm holds a requeued job back for two minutes; the test makes that five seconds (`scontrol update
StartTime=now+5`), nothing else of Slurm is shortened or stood in for.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import yaml

from tests.faults.bench import EXPERIMENT, ROOT, Bench, clean_environment, differences, say
from tests.slurm.cluster import Cluster, cluster, missing

STEPS = 240
SETTINGS = (f"training.tokens={STEPS * 128}", "training.checkpoint_every_steps=50")
WAYS = {
    "preempted": "`scontrol requeue`",
    "cancelled": "`scancel`",
    "timed out": "the time limit",
}
SEEDS = 4  # tasks of an array
UNTOUCHED, BAD_INPUT, INTERRUPTED = 0, 1, (2, 3)
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
# Slurm's own hold is two minutes. Started in the second of its kill, a task fails with exit code 1
# before the script begins ("Job 6 already killed, do not launch batch job").
HOLD_S = 5
HUNG_S = 3600  # a busy machine takes its time


@dataclass
class Task:
    """One task of an array, and how it went."""

    way: str  # of the array
    number: int
    run: str
    at_row: int | None  # interrupted once the record has so many rows
    interrupted_at_step: int | None = None
    attempts: int = 0  # that got as far as training
    restarts: int = 0
    state: str = ""
    problems: list[str] = field(default_factory=list)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.slurm",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, help="write the table into this directory")
    asked = parser.parse_args()
    if lacking := missing():
        print(f"found no {', '.join(lacking)}; as root: apt-get install slurm-wlm", file=sys.stderr)
        return 78
    begun = time.monotonic()
    # A blank in the path: what is written for Slurm must be quoted.
    work = Path(tempfile.mkdtemp(prefix="slurm test "))
    try:
        tasks, script, version = trial(work, asked.seed)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    invocation = (
        f"`python -m tests.slurm --seed {asked.seed}`, {time.strftime('%Y-%m-%d')}, {version}, "
        f"one node, {time.monotonic() - begun:.0f} s"
    )
    table = markdown(tasks, invocation)
    print(table)
    if asked.results:
        asked.results.mkdir(parents=True, exist_ok=True)
        rows = json.dumps([asdict(task) for task in tasks], indent=2) + "\n"
        (asked.results / "slurm.json").write_text(rows, encoding="utf-8")
        (asked.results / "slurm.md").write_text(table, encoding="utf-8")
        (asked.results / "array.sbatch").write_text(script, encoding="utf-8")
    return 1 if any(task.problems for task in tasks) else 0


def trial(work: Path, seed: int) -> tuple[list[Task], str, str]:
    """Interrupt three arrays; returns their tasks, a batch script and Slurm's version."""
    bench = Bench(work, seed, quick=True)
    bench.build()
    say("the uninterrupted runs")
    words = ["--config", str(bench.config), "--exp", EXPERIMENT, "--device", "cpu"]
    words += ["--log_dir", str(work / "references"), "--set", *SETTINGS]
    experiment([*words, "--seed", *map(str, (UNTOUCHED, *INTERRUPTED))], ROOT)
    draw = random.Random(seed)
    arrays: dict[str, list[Task]] = {}
    with cluster() as slurm:
        version = slurm.command("sbatch", "--version").strip()
        for way in WAYS:
            logs = work / way
            bad = logs / name(BAD_INPUT)  # begun with another config
            bad.mkdir(parents=True)
            (bad / "config.yaml").write_text("config_digest: of another config\n")
            written = launch(bench, logs)
            answer = slurm.command("sbatch", str(written))
            say(f"{way}: {answer.strip()}")
            arrays[answer.split()[-1]] = [
                Task(
                    way,
                    number,
                    name(number),
                    draw.randint(20, STEPS * 3 // 4) if number in INTERRUPTED else None,
                )
                for number in range(SEEDS)
            ]
        jobs = watch(slurm, arrays, work)
    for array, tasks in arrays.items():
        for task in tasks:
            judge(task, jobs[array][task.number], bench)
    script = next((work / "preempted" / "launch").glob("*.sbatch")).read_text()
    for path, stands_for in ((work, "WORK"), (sys.executable, "PYTHON"), (ROOT, "REPOSITORY")):
        script = script.replace(str(path), stands_for)
    return [task for tasks in arrays.values() for task in tasks], script, version


def name(seed: int) -> str:
    return EXPERIMENT + (f"-seed{seed}" if seed else "")


def launch(bench: Bench, logs: Path) -> Path:
    """The batch script of an array over the seeds, beside its logs."""
    block = {"name": "array", "config": str(bench.config), "experiments": [EXPERIMENT],
             "seeds": list(range(SEEDS))}  # fmt: skip
    study = {"device": "cpu", "log_dir": str(logs), "overrides": list(SETTINGS),
             "slurm": {"gpu": "none", "cpus": 1}, "blocks": [block]}  # fmt: skip
    file = logs / "array.yaml"
    file.write_text(yaml.safe_dump(study))
    experiment(["--study", str(file), "--engine", "slurm"], logs)
    return logs / "launch" / "array.sbatch"


def experiment(arguments: Sequence[str], folder: Path) -> None:
    """run_experiment.py, started in `folder`."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "run_experiment.py"), *arguments], cwd=folder,
        env=clean_environment(), capture_output=True, text=True, timeout=HUNG_S,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"run_experiment.py exited {done.returncode}: {done.stderr[-2000:]}")


def watch(
    slurm: Cluster, arrays: Mapping[str, Sequence[Task]], work: Path
) -> dict[str, dict[int, dict[str, str]]]:
    """Interrupt what is to be, bring requeued tasks forward; how Slurm says each task ended."""
    hastened: set[tuple[str, int, str]] = set()
    deadline = time.monotonic() + HUNG_S
    while time.monotonic() < deadline:
        for array, tasks in arrays.items():
            for task in tasks:
                step(slurm, f"{array}_{task.number}", task, work / task.way)
        jobs = {array: slurm.jobs(array) for array in arrays}
        for array, found in jobs.items():
            for number, job in found.items():
                start = (array, number, job["Restarts"])
                held = job["JobState"] == "PENDING" and job["Reason"] == "BeginTime"
                if held and start not in hastened:
                    hastened.add(start)
                    slurm.command(
                        "scontrol", "update", f"jobid={array}_{number}", f"StartTime=now+{HOLD_S}",
                        "TimeLimit=60",
                    )  # fmt: skip
        every = [job["JobState"] for found in jobs.values() for job in found.values()]
        if len(every) == len(arrays) * SEEDS and all(state in ENDED for state in every):
            return jobs
        time.sleep(0.2)
    raise RuntimeError(f"not ended after {HUNG_S} s: {slurm.command('squeue')}")


def step(slurm: Cluster, job: str, task: Task, logs: Path) -> None:
    """Interrupt the task, once; one that stands still goes on when Slurm has told it to end."""
    if task.at_row is None:
        return
    run = logs / task.run
    if task.interrupted_at_step is None and rows(run) >= task.at_row:
        if task.way == "preempted":
            slurm.command("scontrol", "requeue", job)
        elif task.way == "cancelled":
            slurm.command("scancel", job)
        else:
            os.kill(process_of(run), signal.SIGSTOP)
            slurm.command("scontrol", "update", f"jobid={job}", "TimeLimit=3")
        task.interrupted_at_step = newest_step(run)
        say(f"{task.run}: {task.way} at step {task.interrupted_at_step}")
    elif task.way == "timed out" and task.interrupted_at_step is not None and not task.attempts:
        if "told to save" in output(task, logs):
            os.kill(process_of(run), signal.SIGCONT)
            task.attempts = 1


def process_of(run: Path) -> int:
    return int(json.loads((run / ".lock").read_text())["pid"])


def output(task: Task, logs: Path) -> str:
    return next((logs / "launch").glob(f"*_{task.number}.out")).read_text()


def rows(run: Path) -> int:
    record = run / "metrics.jsonl"
    return record.read_bytes().count(b"\n") if record.exists() else 0


def newest_step(run: Path) -> int:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return int(json.loads(lines[-2])["step"])  # the last may be half a row


def judge(task: Task, job: Mapping[str, str], bench: Bench) -> None:
    """Fill in how the task ended, and what of it is wrong."""
    logs = bench.work / task.way
    task.state, task.restarts = job["JobState"], int(job["Restarts"])
    task.attempts = output(task, logs).count(" parameters on ")
    back = task.at_row is not None and task.way != "cancelled"
    if task.number == BAD_INPUT:
        expected = ("FAILED", 0, 0)
        if job["ExitCode"] != "78:0":
            task.problems.append(f"exit code {job['ExitCode']}")
    elif task.at_row is not None and task.way == "cancelled":
        expected = ("CANCELLED", 0, 1)
    else:
        expected = ("COMPLETED", int(back), 1 + int(back))
    found = (task.state, task.restarts, task.attempts)
    if found != expected:
        said = f"{job['Reason']}, exit code {job['ExitCode']}: {output(task, logs)}"
        task.problems.append(f"found {found}, expected {expected}; {said}")
    if task.at_row is not None and task.interrupted_at_step is None:
        task.problems.append("it was never interrupted")
    if task.number == BAD_INPUT or task.problems:
        return
    if expected[0] == "CANCELLED":
        saved = max((logs / task.run / "checkpoints").glob("step-*.json"), default=None)
        if saved is None or int(saved.stem[5:]) < (task.interrupted_at_step or 0):
            task.problems.append(f"it did not save when it was cancelled: newest is {saved}")
        words = ["--config", str(bench.config), "--exp", EXPERIMENT, "--device", "cpu"]
        words += ["--log_dir", str(logs), "--seed", str(task.number), "--set", *SETTINGS]
        experiment(words, ROOT)
    task.problems += differences(logs / task.run, bench.work / "references" / task.run)


def markdown(tasks: Sequence[Task], invocation: str) -> str:
    """The table, with what made it."""
    good = sum(not task.problems for task in tasks)
    lines = [
        f"# Slurm arrays, preempted, cancelled, timed out: {good}/{len(tasks)} as they should be",
        "",
        f"{invocation}; 95,320 parameters, {STEPS} steps, a checkpoint every 50 and at the signal. "
        "Compared with uninterrupted runs: weights, optimizer, generators, metrics.jsonl, "
        "metrics.json, exported weights; clocks and memory left out. Cancelled runs were started "
        "again by hand before they were compared.",
        "",
        "| array | task | interrupted by | at step | Slurm restarts | ended | as it should |",
        "|---|---|---|---|---|---|---|",
    ]
    for task in tasks:
        which = {UNTOUCHED: "", BAD_INPUT: " (bad input)", SEEDS - 1: " (last)"}
        by = "nobody" if task.at_row is None else WAYS[task.way]
        at = "" if task.interrupted_at_step is None else task.interrupted_at_step
        good_end = "78, not started again" if task.number == BAD_INPUT else "bitwise equal"
        lines.append(
            f"| {task.way} | {task.number}{which.get(task.number, '')} | {by} | {at} "
            f"| {task.restarts} | {task.state} | {'; '.join(task.problems) or good_end} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
