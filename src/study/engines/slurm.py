"""The Slurm engine: one array job, a task a run, that asks to be queued again when it exits 75."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from src.storage.files import make_directory
from src.storage.run_dir import write_atomic
from src.study.engines.runs import ENTRY, Launch

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


def script(
    launch: Launch,
    *,
    gpu: str,
    cpus: int,
    time_limit: str,
    at_once: int | None,
    directory: Path,
    options: Sequence[str] = (),
    python: str = sys.executable,
) -> str:
    """The batch script. Every path in it is absolute or relative to this working directory.

    gpu: what `--gres=gpu:` takes, "1" or "a100:1", or "none"; time_limit: Slurm's D-HH:MM:SS, a
    run that needs longer requeues itself; options: further lines of `#SBATCH`. Raises ValueError
    for a time limit that is not one, or too short.
    """
    if seconds(time_limit) < SHORTEST_S:
        raise ValueError(
            f"--time: found {time_limit}, expected at least {SHORTEST_S // 60} minutes: a job is "
            f"told to save and requeue itself {WARNING_S} s before its end"
        )
    throttle = f"%{at_once}" if at_once else ""
    lines = [
        f"--job-name={launch.sweep}",
        f"--array=0-{len(launch.runs) - 1}{throttle}",
        f"--time={time_limit}",
        f"--signal=B:TERM@{WARNING_S}",
        "--requeue",
        "--open-mode=append",
        f'--output="{directory.resolve()}/%x-%A_%a.out"',
        "--ntasks=1",
        f"--cpus-per-task={cpus}",
        *([f"--gres=gpu:{gpu}"] if gpu != "none" else []),
        *options,
    ]
    head = ["#!/bin/bash", *(f"#SBATCH {line}" for line in lines)]
    head += [
        "# Written by python -m src.study.engines --engine slurm; exit 75 alone is queued again."
    ]
    cases = [
        f"  {index}) name={shlex.quote(run.name)} "
        f"run=({shlex.join(run.arguments[len(launch.shared) :])}) ;;"
        for index, run in enumerate(launch.runs)
    ]
    command = shlex.join([python, str(ENTRY), *launch.shared])
    body = [
        f"cd {shlex.quote(str(Path.cwd()))} || exit 74",
        'case "$SLURM_ARRAY_TASK_ID" in',
        *cases,
        '  *) echo "no run $SLURM_ARRAY_TASK_ID"; exit 78 ;;',
        "esac",
        f'command=({command} "${{run[@]}}")',
    ]
    return "\n".join([*head, *body]) + _BODY


def seconds(time_limit: str) -> int:
    """Seconds of a time limit as sbatch reads it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time_limit)
    if found is None:
        raise ValueError(f"--time: found {time_limit!r}, expected D-HH:MM:SS, HH:MM:SS or minutes")
    days, *parts = found.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is None and len(numbers) < 3:  # without days, one or two numbers begin at minutes
        numbers = [0, *numbers]
    hours, minutes, rest = (*numbers, 0, 0)[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + rest


def write(launch: Launch, text: str, directory: Path) -> Path:
    """`<directory>/<sweep>.sbatch`."""
    make_directory(directory)
    path = directory / f"{launch.sweep}.sbatch"
    write_atomic(path, text.encode())
    return path


def submit(path: Path) -> None:
    """Hand the script to sbatch. Raises ValueError where there is none or it refuses."""
    try:
        done = subprocess.run(["sbatch", str(path)], capture_output=True, text=True)
    except FileNotFoundError:
        raise ValueError(
            f"--submit: found no sbatch on this machine, expected Slurm's; {path} is written, "
            "submit it where Slurm is"
        ) from None
    if done.returncode:
        raise ValueError(f"--submit: sbatch refused {path}: {done.stderr.strip()}")
    print(done.stdout.strip())
