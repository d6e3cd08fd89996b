"""The SkyPilot engine: one managed spot job a run, whose checkpoints live in a bucket.

A job that exits 75, or whose machine is taken away, is started again on another machine, which has
an empty disk: `--remote` is where it goes on from. Its finished files end up there, too.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from src.data import leakage
from src.data import tokens as data
from src.spec.study_file import SkyConfig
from src.storage.files import make_directory, write_atomic
from src.study.plan import Configuration, Job
from src.study.processes import REPOSITORY

WORKDIR = "~/sky_workdir"  # where SkyPilot puts `workdir` and begins `setup` and `run`

# A bare image has some python3, perhaps an old one, perhaps without venv, and no compiler (so runs
# are eager there). uv, from PyPI or its own installer, brings a Python where none fits.
_SETUP = """\
set -e
export PATH="$HOME/.local/bin:$PATH"
if [ ! -x .venv/bin/python ]; then
  found=
  for python in python3.13 python3.12 python3.11 python3; do
    if "$python" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
      found=$python
      break
    fi
  done
  if [ -n "$found" ]; then
    "$found" -m venv .venv
  else
    command -v uv > /dev/null || python3 -m pip install --user uv \\
      || curl -LsSf https://astral.sh/uv/install.sh | sh
    uv venv --seed --python 3.11 .venv
  fi
fi
if [ -n "$TORCH_INDEX" ]; then
  .venv/bin/python -m pip install -q torch==$(sed -n 's/^torch==//p' requirements.txt) \\
    --index-url "$TORCH_INDEX"
fi
.venv/bin/python -m pip install -q -r requirements.txt
"""


def check(remote: str | None) -> None:
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


def task(
    asked: SkyConfig,
    job: Job,
    arguments: Sequence[str],
    study: str,
    generated: Collection[Path] = (),
) -> str:
    """SkyPilot's YAML for one run. Raises ValueError for missing tokens.

    The tokens travel with the job, so that every machine trains on the same bytes, and so do sweep
    files that the study has generated; the code does as SkyPilot's `workdir`, less what .gitignore
    names.
    """
    command = shlex.join(["run_experiment.py", *arguments])
    mounts = _mounts(job.configuration, generated)
    lines = [
        "# Written by run_experiment.py --engine sky; start it with sky jobs launch.",
        # a letter first, then letters, digits, `-`, `_` and `.`: what SkyPilot takes
        f"name: {_quoted(f'run-{study}-{_flat(job)}')}",
        "resources:",
        *([f"  accelerators: {_quoted(asked.gpu)}"] if asked.gpu != "none" else []),
        f"  use_spot: {json.dumps(asked.spot)}",
        "  disk_size: 100",
        "  job_recovery:",
        "    max_restarts_on_errors: 0",
        "    recover_on_exit_codes: [75]",
        "workdir: .",
        "envs:",
        '  TORCH_INDEX: ""  # a PyTorch wheel index, where pip\'s torch is too new for the driver',
        "file_mounts:",
        *(f"  {_quoted(place)}: {_quoted(source)}" for place, source in mounts),
        "setup: |",
        *_indented(_SETUP),
        "run: |",
        *_indented(f"exec .venv/bin/python {command}\n"),
    ]
    return "\n".join(lines) + "\n"


def write(
    asked: SkyConfig,
    runs: Sequence[tuple[Job, Sequence[str]]],
    study: str,
    directory: Path,
    generated: Collection[Path],
) -> list[Path]:
    """`<directory>/<study>-<run>.yaml` of every run."""
    texts = {_flat(job): task(asked, job, words, study, generated) for job, words in runs}
    make_directory(directory)
    paths = []
    for name, text in texts.items():
        paths.append(directory / f"{study}-{name}.yaml")
        write_atomic(paths[-1], text.encode())
    return paths


def _flat(job: Job) -> str:
    return job.name.replace("/", "-")


def _mounts(one: Configuration, generated: Collection[Path]) -> Iterator[tuple[str, str]]:
    """(place on the machine, path here) of what the code's directory does not bring along."""
    tokens, evaluation = one.run.token_dir, one.run.evaluation
    corpus = data.load(tokens, one.run.model.vocab_size).corpus
    needed = [tokens]
    if "smallbench_accuracy" in evaluation.metrics:
        needed.append(Path(evaluation.smallbench_dir))
        report = leakage.report_path(evaluation.leakage, needed[-1], corpus)
        if report is not None and needed[-1] not in report.parents:
            needed.append(report)
    if evaluation.outside_dir is not None:
        needed.append(Path(evaluation.outside_dir))
    if one.path in generated or Path.cwd() not in one.path.resolve().parents:
        needed.append(one.path)
    for path in needed:
        if not path.exists():
            raise ValueError(f"{one.path}: {path} does not exist, expected it here")
        yield (str(path) if path.is_absolute() else f"{WORKDIR}/{path}"), str(path)


def _quoted(text: str) -> str:
    return json.dumps(text)  # a JSON string is a YAML string


def _indented(text: str) -> list[str]:
    return [f"  {line}".rstrip() for line in text.splitlines()]
