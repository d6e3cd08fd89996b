"""Many runs on other people's engines: python -m src.study.engines --engine local|slurm|sky ...

    python -m src.study.engines --engine local --config configs/embed_ratio.yaml --exp all --jobs 4
    python -m src.study.engines --engine slurm --config configs/embed_ratio.yaml --exp all --submit
    python -m src.study.engines --engine sky --config configs/embed_ratio.yaml --exp all --remote s3://b/p

`local` runs them; `slurm` and `sky` write files for those schedulers. See docs/ENGINES.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from src.compute import cores
from src.spec import config
from src.spec.command_line import OK, Parser, at_least, refuse
from src.study.engines import local, runs, sky, slurm
from src.study.jobs import bound


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m src.study.engines",
        description="Run the experiments of a sweep on this machine, or write files for Slurm or "
        "SkyPilot that do.",
        epilog="Exit codes of local: 0 all finished, 75 run me again, else the worst run's.",
    )
    parser.add_argument("--engine", required=True, choices=("local", "slurm", "sky"))
    parser.add_argument("--config", required=True, help="experiment file, see configs/")
    parser.add_argument("--exp", nargs="+", required=True, help="experiment names, or all")
    parser.add_argument("--seed", type=int, nargs="+", help="default: the file's seeds (0)")
    parser.add_argument("--phase", choices=config.PHASES, default="full")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value")
    parser.add_argument("--log_dir", default="logs")
    parser.add_argument("--device", help="auto (default), cpu, cuda or cuda:N")
    parser.add_argument("--remote", help="s3://, gs:// or abfs:// prefix for checkpoints")
    parser.add_argument(
        "--jobs",
        type=at_least(1),
        help="runs at a time; local: as many as there are GPUs, 1 on a CPU; slurm: no limit",
    )
    files = parser.add_argument_group("slurm and sky")
    files.add_argument("--output", type=Path, default=Path("launch"), help="directory for files")
    files.add_argument("--gpu", help='slurm: 1 (default) or a100:1; sky: A100:1 (default); "none"')
    files.add_argument("--cpus", type=at_least(1), default=4, help="slurm: cores a run")
    files.add_argument("--time", default="04:00:00", help="slurm: limit; a longer run is requeued")
    files.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="slurm: one more #SBATCH"
    )
    files.add_argument("--submit", action="store_true", help="slurm: call sbatch")
    files.add_argument("--on_demand", action="store_true", help="sky: no spot machines")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    asked = _arguments(argv)
    try:
        launch = runs.plan(
            asked.config,
            asked.exp,
            seeds=asked.seed,
            phase=asked.phase,
            overrides=asked.set,
            log_dir=asked.log_dir,
            device=asked.device,
            remote=asked.remote,
        )
        if asked.engine == "local":
            return _local(launch, asked)
        return _slurm(launch, asked) if asked.engine == "slurm" else _sky(launch, asked)
    except (ValueError, OSError) as error:
        return refuse(error)


def _local(launch: runs.Launch, asked: argparse.Namespace) -> int:
    jobs = [
        local.Job(
            name=run.name,
            command=bound([sys.executable, str(runs.ENTRY), *run.arguments]),
            progress=partial(local.progress_of, launch.log_dir / run.name),
        )
        for run in launch.runs
    ]
    at_once = asked.jobs or max(1, cores.visible_gpus())
    return local.Engine(jobs, at_once, environment=cores.shared(at_once)).run()


def _slurm(launch: runs.Launch, asked: argparse.Namespace) -> int:
    text = slurm.script(
        launch,
        gpu=asked.gpu or "1",
        cpus=asked.cpus,
        time_limit=asked.time,
        at_once=asked.jobs,
        directory=asked.output,
        options=asked.sbatch,
    )
    path = slurm.write(launch, text, asked.output)
    if asked.submit:
        slurm.submit(path)
    else:
        print(f"wrote {path}; submit it with: sbatch {path}")
    return OK


def _sky(launch: runs.Launch, asked: argparse.Namespace) -> int:
    sky.check(launch, asked.remote)
    gpu = asked.gpu or "A100:1"
    for path in sky.write(launch, asked.output, gpu=gpu, spot=not asked.on_demand):
        print(f"wrote {path}; start it with: sky jobs launch --yes --detach-run {path}")
    return OK


if __name__ == "__main__":
    sys.exit(main())
