"""A real Slurm array whose every run is interrupted once: python -m tests.slurm

    apt-get install slurm-wlm        # as root, once; Debian 12 has 22.05
    python -m tests.slurm --results results/slurm

Seven tiny runs are submitted by `python -m src.study.engines --engine slurm --submit`. At a
random step of each, half are requeued over their heads (`scontrol requeue`, what a preempting
partition does) and half get TERM (`scancel --batch --signal=TERM`, what `--signal` sends before the
time limit), so that they save, exit 75 and requeue themselves. Then weights, optimizer, generators,
rows and results are compared, bit for bit, with runs that nobody interrupted. An eighth is bad
input and has to stay down (78). Exit code 1 unless all of that holds.

Slurm holds a requeued job back for two minutes; the test moves that forward (`scontrol update
StartTime=now`), nothing else of Slurm is shortened or stood in for.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.faults.bench import EXPERIMENT, ROOT, Bench, clean_environment, differences, say
from tests.slurm.cluster import Cluster, cluster, missing

STEPS = 600
SETTINGS = (f"training.tokens={STEPS * 128}", "training.checkpoint_every_steps=50")
WAYS = {"requeued": "scontrol requeue", "signalled": "scancel --batch --signal=TERM"}
HUNG_S = 600


@dataclass
class Task:
    """One task of the array, and how it went."""

    number: int
    run: str
    way: str
    at_row: int  # interrupted once the record has so many rows
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
    parser.add_argument("--runs", type=int, default=7)
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
        tasks, refused, script, version = trial(work, asked.runs, asked.seed)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    invocation = (
        f"`python -m tests.slurm --runs {asked.runs} --seed {asked.seed}`, "
        f"{time.strftime('%Y-%m-%d')}, {version}, one node, {time.monotonic() - begun:.0f} s"
    )
    table = markdown(tasks, refused, invocation)
    print(table)
    if asked.results:
        asked.results.mkdir(parents=True, exist_ok=True)
        rows = json.dumps([asdict(task) for task in tasks], indent=2) + "\n"
        (asked.results / "slurm.json").write_text(rows, encoding="utf-8")
        (asked.results / "slurm.md").write_text(table, encoding="utf-8")
        (asked.results / "array.sbatch").write_text(script, encoding="utf-8")
    return 1 if refused or any(task.problems for task in tasks) else 0


def trial(work: Path, runs: int, seed: int) -> tuple[list[Task], list[str], str, str]:
    """Interrupt an array of `runs` runs; returns the tasks, what was wrong with the refused one,
    the batch script and Slurm's version."""
    bench = Bench(work, seed, quick=True)
    bench.build()
    seeds = [str(number) for number in range(runs)]
    say("the uninterrupted runs")
    command(bench, "run_experiment.py", work / "references", seeds)
    names = [EXPERIMENT + (f"-seed{number}" if number != "0" else "") for number in seeds]
    draw = random.Random(seed)
    ways = [list(WAYS)[number % 2] for number in range(runs)]
    draw.shuffle(ways)
    tasks = [
        Task(number, name, way, draw.randint(20, STEPS * 3 // 4))
        for number, (name, way) in enumerate(zip(names, ways, strict=True))
    ]
    bad = work / "logs" / f"{EXPERIMENT}-seed{runs}"  # begun with another config
    bad.mkdir(parents=True)
    (bad / "config.yaml").write_text("config_digest: of another config\n")
    with cluster() as slurm:
        options = ("--engine", "slurm", "--submit", "--gpu", "none", "--cpus", "1")
        options += ("--output", str(work / "launch"))
        answer = command(
            bench,
            "src.study.engines",
            work / "logs",
            [*seeds, str(runs)],
            options,
            slurm.environment,
        )
        array = answer.split()[-1]
        say(answer.strip())
        version = slurm.command("sbatch", "--version").strip()
        jobs = watch(slurm, array, tasks, work / "logs")
    for task in tasks:
        judge(task, jobs[task.number], work)
    found = {key: jobs[runs][key] for key in ("JobState", "ExitCode", "Restarts")}
    expected = {"JobState": "FAILED", "ExitCode": "78:0", "Restarts": "0"}
    refused = [] if found == expected else [f"found {found}, expected {expected}"]
    script = (work / "launch" / f"{bench.config.stem}.sbatch").read_text()
    for path, name in ((work, "WORK"), (sys.executable, "PYTHON"), (ROOT, "REPOSITORY")):
        script = script.replace(str(path), name)
    return tasks, refused, script, version


def command(
    bench: Bench,
    entry: str,
    logs: Path,
    seeds: Sequence[str],
    options: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> str:
    """Standard output of run_experiment.py or `python -m src.study.engines` for the given seeds."""
    program = [str(ROOT / entry)] if entry.endswith(".py") else ["-m", entry]
    words = [sys.executable, *program, "--config", str(bench.config), "--exp", EXPERIMENT]
    words += ["--log_dir", str(logs), "--device", "cpu", "--seed", *seeds, *options]
    words += [word for setting in SETTINGS for word in ("--set", setting)]
    done = subprocess.run(
        words, cwd=ROOT, env=clean_environment() | dict(environment or {}), capture_output=True,
        text=True, timeout=HUNG_S,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{entry} exited {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def watch(
    slurm: Cluster, array: str, tasks: Sequence[Task], logs: Path
) -> dict[int, dict[str, str]]:
    """Interrupt each task once, bring requeued ones forward; returns how Slurm says each ended."""
    deadline = time.monotonic() + HUNG_S
    while time.monotonic() < deadline:
        for task in tasks:
            if task.interrupted_at_step is None and rows(logs / task.run) >= task.at_row:
                interrupt(slurm, f"{array}_{task.number}", task, logs / task.run)
        jobs = slurm.jobs(array)
        for number, job in jobs.items():
            if job["JobState"] == "PENDING" and job["Reason"] == "BeginTime":
                slurm.command("scontrol", "update", f"jobid={array}_{number}", "StartTime=now")
        ended = [job["JobState"] in ("COMPLETED", "FAILED", "CANCELLED") for job in jobs.values()]
        if len(jobs) == len(tasks) + 1 and all(ended):
            return jobs
        time.sleep(0.1)
    raise RuntimeError(f"not ended after {HUNG_S} s: {slurm.command('squeue')}")


def interrupt(slurm: Cluster, job: str, task: Task, run: Path) -> None:
    """Once. scancel sometimes delivers the signal, hears "Job can not be altered now" and would try
    for a minute longer, into the next attempt: it is ended; `judge` sees whether it was heard."""
    task.interrupted_at_step = newest_step(run)
    with contextlib.suppress(subprocess.TimeoutExpired):
        slurm.command(*WAYS[task.way].split(), job, seconds=3)
    say(f"{task.run}: {task.way} at step {task.interrupted_at_step}")


def rows(run: Path) -> int:
    record = run / "metrics.jsonl"
    return record.read_bytes().count(b"\n") if record.exists() else 0


def newest_step(run: Path) -> int:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return int(json.loads(lines[-2])["step"])  # the last may be half a row


def judge(task: Task, job: Mapping[str, str], work: Path) -> None:
    """Fill in how the task ended, and what of it is wrong."""
    task.state, task.restarts = job["JobState"], int(job["Restarts"])
    output = next((work / "launch").glob(f"*_{task.number}.out")).read_text()
    task.attempts = output.count(" parameters on ")
    if task.state != "COMPLETED" or task.restarts != 1 or task.attempts != 2:
        task.problems.append(
            f"{task.state} after {task.restarts} restarts, {task.attempts} attempts: {output}"
        )
    if task.interrupted_at_step is None:
        task.problems.append("it was never interrupted")
    task.problems += differences(work / "logs" / task.run, work / "references" / task.run)


def markdown(tasks: Sequence[Task], refused: Sequence[str], invocation: str) -> str:
    """The table, with what made it."""
    good = sum(not task.problems for task in tasks)
    lines = [
        f"# A Slurm array, each run interrupted once: {good}/{len(tasks)} bitwise equal",
        "",
        f"{invocation}; 95,320 parameters, {STEPS} steps, a checkpoint "
        "every 50 and at the signal. Compared with uninterrupted runs: weights, optimizer, "
        "generators, metrics.jsonl, metrics.json, exported weights; clocks and memory left out.",
        "",
        "| task | run | interrupted by | at step | Slurm restarts | ended | bitwise equal |",
        "|---|---|---|---|---|---|---|",
    ]
    for task in tasks:
        same = "; ".join(task.problems) or "yes"
        lines.append(
            f"| {task.number} | {task.run} | `{WAYS[task.way]}` | {task.interrupted_at_step} "
            f"| {task.restarts} | {task.state} | {same} |"
        )
    stayed = "; ".join(refused) or "FAILED with 78, 0 restarts, as it should"
    lines.append(f"| {len(tasks)} | bad input | nobody | | 0 | {stayed} | |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
