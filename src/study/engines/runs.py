"""What is launched: one command line of run_experiment.py for each experiment and seed.

Runs are independent and resume by themselves, so all that an engine has to keep is the contract:
exit 0 is done, 75 means "run me again", anything else means "do not".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from src.spec import config
from src.storage import address
from src.storage.run_dir import check_log_dir

ENTRY = Path(__file__).resolve().parents[3] / "run_experiment.py"


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One run: its name (also its directory in the log directory) and its arguments."""

    name: str
    arguments: tuple[str, ...]  # of run_experiment.py
    config: config.RunConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """A launch as asked for: its runs, the baseline's first, and what they share."""

    sweep: str  # the experiment file's name without its suffix
    runs: tuple[Run, ...]
    shared: tuple[str, ...]  # arguments of every run
    config_file: Path
    log_dir: Path


def plan(
    config_file: str,
    experiments: Sequence[str],
    *,
    seeds: Sequence[int] | None = None,
    phase: str = "full",
    overrides: Sequence[str] = (),
    log_dir: str = "logs",
    device: str | None = None,
    remote: str | None = None,
) -> Launch:
    """The runs that `run_experiment.py` would do one after the other, one command line each.

    Raises ValueError for a file, an experiment, a seed, a log directory or a remote that
    run_experiment.py would refuse.
    """
    check_log_dir(Path(log_dir))
    if remote is not None:
        address.check(remote)
    sweep = config.load_sweep(config_file, overrides, phase)
    shared = ["--config", config_file, "--log_dir", log_dir]
    shared += ["--phase", phase] if phase != "full" else []
    shared += [word for override in overrides for word in ("--set", override)]
    shared += ["--device", device] if device is not None else []
    shared += ["--remote", remote] if remote is not None else []
    return Launch(
        sweep=Path(config_file).stem,
        runs=tuple(
            Run(
                name=run.run_name,
                arguments=(*shared, "--exp", run.experiment, "--seed", str(run.seed)),
                config=run,
            )
            for run in sweep.chosen(experiments, seeds)
        ),
        shared=tuple(shared),
        config_file=Path(config_file),
        log_dir=Path(log_dir),
    )
