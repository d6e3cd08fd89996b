"""Files for schedulers that exist, made of `templates/`: a Slurm array, SkyPilot's managed jobs.

A run that exits 75, or whose machine is taken away, is started again. Slurm's nodes share the log
directory; SkyPilot's next machine has an empty disk, so `--remote` is where its run goes on from,
and where the finished files end up.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2

from src.data import leakage
from src.data import tokens as data
from src.spec.study_file import SkyConfig, SlurmConfig
from src.storage.files import make_directory, write_atomic
from src.study.plan import Configuration, Job
from src.study.processes import REPOSITORY

Runs = Sequence[tuple[Job, Sequence[str]]]  # with their arguments of run_experiment.py

# Slurm's clock is coarse: the signal may come up to a minute earlier. A save takes seconds.
WARNING_S = 120
# Below this a job would spend its time on starting, being warned and waiting in the queue.
SHORTEST_S = 600
WORKDIR = "~/sky_workdir"  # where SkyPilot puts `workdir` and begins `setup` and `run`


def _write(path: Path, template: str, **values: Any) -> Path:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    # A JSON string is a YAML string.
    environment.filters |= {"quoted": shlex.quote, "joined": shlex.join, "json": json.dumps}
    make_directory(path.parent)
    write_atomic(path, environment.get_template(template).render(values).encode())
    return path


# ---------------------------------------------------------------------------------------- Slurm


def check_slurm(settings: SlurmConfig) -> None:
    """Raises ValueError for a time limit that is not one, or too short."""
    if seconds(settings.time) < SHORTEST_S:
        raise ValueError(
            f"slurm.time: found {settings.time}, expected at least {SHORTEST_S // 60} minutes: a "
            f"job is told to save and requeue itself {WARNING_S} s before its end"
        )


def seconds(time_limit: str) -> int:
    """Seconds of a time limit as sbatch reads it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time_limit)
    if match is None:
        raise ValueError(
            f"slurm.time: found {time_limit!r}, expected D-HH:MM:SS, HH:MM:SS or minutes"
        )
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is None and len(numbers) < 3:  # without days, one or two numbers begin at minutes
        numbers = [0, *numbers]
    hours, minutes, rest = (*numbers, 0, 0)[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + rest


def slurm(settings: SlurmConfig, runs: Runs, name: str, directory: Path) -> Path:
    """`<directory>/<name>.sbatch`, an array with a task a run. Every path in it is absolute or
    relative to this working directory."""
    return _write(
        directory / f"{name}.sbatch", "array.sbatch",
        settings=settings, runs=runs, name=name,
        directory=directory.resolve(), here=str(Path.cwd()),
        command=[sys.executable, str(REPOSITORY / "run_experiment.py")], warning_s=WARNING_S,
    )  # fmt: skip


# ------------------------------------------------------------------------------------- SkyPilot


def check_sky(remote: str | None) -> None:
    """Raises ValueError for what could not work on another machine."""
    if remote is None or remote.startswith("file:"):
        raise ValueError(
            f"--remote: found {remote or 'nothing'}, expected a bucket (s3://, gs:// or abfs://): "
            "a machine that is taken away takes its disk with it"
        )
    if Path.cwd() != REPOSITORY:
        raise ValueError(
            f"found the working directory {Path.cwd()}, expected {REPOSITORY}: SkyPilot copies "
            "the directory that it is started in, so start there"
        )


def sky(
    settings: SkyConfig, runs: Runs, study: str, directory: Path, generated: Collection[Path]
) -> list[Path]:
    """`<directory>/<study>-<run>.yaml` of every run; ValueError for missing data.

    Tokens and test sets travel with the job, so that every machine reads the same bytes, and so do
    sweep files that the study has `generated`; the code does as SkyPilot's `workdir`, less what
    .gitignore names.
    """
    mounts = [list(_mounts(job.configuration, generated)) for job, _ in runs]
    written = []
    for (job, arguments), needed in zip(runs, mounts, strict=True):
        name = f"{study}-{job.name.replace('/', '-')}"
        path = directory / f"{name}.yaml"
        values = {"settings": settings, "name": name, "arguments": arguments, "mounts": needed}
        written.append(_write(path, "managed_job.yaml", **values))
    return written


def _mounts(configuration: Configuration, generated: Collection[Path]) -> Iterator[tuple[str, str]]:
    """(place on the machine, path here) of what the code's directory does not bring along."""
    tokens, evaluation = configuration.run.token_dir, configuration.run.evaluation
    corpus = data.load(tokens, configuration.run.model.vocab_size).corpus
    needed = [tokens]
    if "smallbench_accuracy" in evaluation.metrics:
        needed.append(Path(evaluation.smallbench_dir))
        report = leakage.report_path(evaluation.leakage, needed[-1], corpus)
        if report is not None and needed[-1] not in report.parents:
            needed.append(report)
    if evaluation.outside_dir is not None:
        needed.append(Path(evaluation.outside_dir))
    if configuration.path in generated or Path.cwd() not in configuration.path.resolve().parents:
        needed.append(configuration.path)
    for path in needed:
        if not path.exists():
            raise ValueError(f"{configuration.path}: {path} does not exist, expected it here")
        yield (str(path) if path.is_absolute() else f"{WORKDIR}/{path}"), str(path)
