"""The Slurm engine: one array job, a task a run, that asks to be queued again when it exits 75."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from src.spec.study_file import SlurmConfig
from src.storage.files import make_directory, write_atomic
from src.study.plan import Job
from src.study.processes import REPOSITORY

ENTRY = REPOSITORY / "run_experiment.py"

# Slurm's clock is coarse: the signal may come up to a minute earlier. A save takes seconds.
WARNING_S = 120
# Below this a job would spend its time on starting, being warned and waiting in the queue.
SHORTEST_S = 600

# bash forwards no signals, and one that it traps ends its `wait` early: hence the loop. Python
# dies of a signal that comes before its handlers are installed (143); nothing was begun then.
#
# The last task of an array carries the array's own id as SLURM_JOB_ID, and a requeue of that id is
# one of all tasks: hence the array's and the task's. `Incomplete` leaves a task alone that Slurm is
# already ending: a cancelled one stays cancelled, a preempted one comes back once.
_BODY = """
stopped= child=
signalled() {
  stopped=1
  [ -z "$child" ] || { echo "$name: told to save and end"; kill -TERM "$child" 2> /dev/null; }
}
trap signalled TERM INT USR1 USR2
"${command[@]}" &
child=$!
[ -z "$stopped" ] || kill -TERM "$child"
while :; do
  wait "$child"
  code=$?
  kill -0 "$child" 2> /dev/null || break
done
wait "$child"  # of a process that has ended: its own code, whatever interrupted the first wait
code=$?
child=  # a requeue brings one more TERM; the number may be another process's by then
if [ -n "$stopped" ] && [ "$code" -eq 143 ]; then code=75; fi
echo "$name: exit code $code"
if [ "$code" -eq 75 ]; then
  scontrol requeue Incomplete "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}" \\
    && sleep 30  # Slurm ends this script meanwhile
fi
exit "$code"
"""


def check(asked: SlurmConfig) -> None:
    """Raises ValueError for a time limit that is not one, or too short."""
    if seconds(asked.time) < SHORTEST_S:
        raise ValueError(
            f"slurm.time: found {asked.time}, expected at least {SHORTEST_S // 60} minutes: a job "
            f"is told to save and requeue itself {WARNING_S} s before its end"
        )


def script(
    asked: SlurmConfig,
    runs: Sequence[tuple[Job, Sequence[str]]],
    name: str,
    directory: Path,
    python: str = sys.executable,
) -> str:
    """The batch script for runs with their arguments of run_experiment.py. Every path in it is
    absolute or relative to this working directory."""
    options = [
        f"--job-name={name}",
        f"--array=0-{len(runs) - 1}" + (f"%{asked.at_once}" if asked.at_once else ""),
        f"--time={asked.time}",
        f"--signal=B:TERM@{WARNING_S}",
        "--requeue",
        "--open-mode=append",
        f'--output="{directory.resolve()}/%x-%A_%a.out"',
        "--ntasks=1",
        f"--cpus-per-task={asked.cpus}",
        *([f"--gres=gpu:{asked.gpu}"] if asked.gpu != "none" else []),
        *asked.options,
    ]
    head = ["#!/bin/bash", *(f"#SBATCH {line}" for line in options)]
    head += ["# Written by run_experiment.py --engine slurm; exit 75 alone is queued again."]
    cases = [
        f"  {index}) name={shlex.quote(job.name)} run=({shlex.join(arguments)}) ;;"
        for index, (job, arguments) in enumerate(runs)
    ]
    body = [
        f"cd {shlex.quote(str(Path.cwd()))} || exit 74",
        'case "$SLURM_ARRAY_TASK_ID" in',
        *cases,
        '  *) echo "no run $SLURM_ARRAY_TASK_ID"; exit 78 ;;',
        "esac",
        f'command=({shlex.join([python, str(ENTRY)])} "${{run[@]}}")',
    ]
    return "\n".join([*head, *body]) + _BODY


def seconds(time_limit: str) -> int:
    """Seconds of a time limit as sbatch reads it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time_limit)
    if found is None:
        raise ValueError(
            f"slurm.time: found {time_limit!r}, expected D-HH:MM:SS, HH:MM:SS or minutes"
        )
    days, *parts = found.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is None and len(numbers) < 3:  # without days, one or two numbers begin at minutes
        numbers = [0, *numbers]
    hours, minutes, rest = (*numbers, 0, 0)[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + rest


def write(
    asked: SlurmConfig, runs: Sequence[tuple[Job, Sequence[str]]], name: str, directory: Path
) -> Path:
    """`<directory>/<name>.sbatch`."""
    text = script(asked, runs, name, directory)
    make_directory(directory)
    path = directory / f"{name}.sbatch"
    write_atomic(path, text.encode())
    return path
