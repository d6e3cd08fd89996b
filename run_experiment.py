"""The entry point: python run_experiment.py --config configs/embed_ratio.yaml --exp emb35

Parse, load, plan, call. Exit codes: 0 finished (or stopped by the kill rule), 70 our fault,
74 could not read or write, 75 preempted or locked by another process (run me again), 78 bad input.
Nothing heavy is imported before the arguments, the configuration and the lock are settled.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from src import preflight
from src import run as execution
from src.compute import cores
from src.compute import process_group as distributed
from src.run import Preempted
from src.spec import allocation_table, config
from src.spec.command_line import BAD_INPUT, IO_FAILED, OK, OUR_FAULT, TRY_AGAIN, Parser
from src.storage.run_dir import Held, Preemption
from src.study.plan import allocate


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="run_experiment.py",
        description="Train and evaluate the experiments of a sweep; resumes by itself.",
        epilog="Exit codes: 0 finished, 70 our fault, 74 I/O, 75 run me again, 78 bad input.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", help="experiment file, see configs/")
    source.add_argument("--study", type=Path, help="study file: phases or blocks, plan and budget")
    parser.add_argument("--exp", nargs="+", help="experiment names, or all")
    parser.add_argument("--seed", type=int, nargs="+", help="default: the file's seeds (0)")
    parser.add_argument("--phase", choices=(*config.PHASES, "sanity"), help="full (default); rank: "
                        "training.ranking_tokens; sanity: checks and a rate ramp")  # fmt: skip
    parser.add_argument("--set", action="extend", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--log_dir", help="default: logs, or the study file's")
    parser.add_argument("--device", help="auto (default), cpu, cuda or cuda:N")
    parser.add_argument("--remote", help="s3://, gs:// or abfs:// prefix for checkpoints")
    parser.add_argument("--dry_run", action="store_true", help="print the table or plan and stop")
    parser.add_argument("--json", action="store_true", help="with --dry_run: one object a line")
    parser.add_argument("--published", help="with --study: finished runs of other machines")
    parser.add_argument("--engine", choices=("local", "slurm", "sky"),
                        help="with --study: run here, or write files for a scheduler")  # fmt: skip
    args = parser.parse_args(argv)
    if args.json and not args.dry_run:
        parser.error("--json goes with --dry_run")
    if args.study is not None:
        if args.exp or args.seed or args.phase or args.json:
            parser.error("--study: takes no --exp, --seed, --phase or --json; its file says them")
        return args
    if args.engine or args.published:
        parser.error("--engine and --published go with --study")
    if args.phase == "sanity" and args.seed:
        parser.error("--phase sanity: takes no --seed; its checks begin from seed 0")
    args.phase = args.phase or "full"
    args.log_dir, args.device = args.log_dir or "logs", args.device or "auto"
    if not args.dry_run and not args.exp:
        parser.error("--exp: name one experiment, several, or all (or use --dry_run)")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = _arguments(argv)
    for name, value in cores.WAITING.items():
        os.environ.setdefault(name, value)
    for number in Preemption.SIGNALS:
        signal.signal(number, _preempt)
    try:
        os.getcwd()  # OSError where it was deleted: torch would end the process without a word
        if args.study is not None:
            code = _study(args)
            if code == TRY_AGAIN:
                command = ["python", "run_experiment.py", *(sys.argv[1:] if argv is None else argv)]
                print(f"to go on: {shlex.join(command)}", file=sys.stderr)
            return code
        return _sweep(args)
    except Preempted as signalled:
        print(f"stopped by {signalled}; run the same command again to go on", file=sys.stderr)
        return TRY_AGAIN
    except Held as error:
        print(error, file=sys.stderr)
        return TRY_AGAIN
    except ValueError as error:
        print(error, file=sys.stderr)
        return BAD_INPUT
    except BrokenPipeError:  # the reader of a dry run has seen enough; a run is not at its end
        _write_to_nobody()
        if args.dry_run:
            return OK
        print("could not write: who read the output has gone; run me again", file=sys.stderr)
        return IO_FAILED
    except OSError as error:
        print(f"could not read or write: {error}", file=sys.stderr)
        return IO_FAILED
    except Exception:
        traceback.print_exc()
        return OUR_FAULT


def _write_to_nobody() -> None:
    """Whoever read the output has gone; Python would complain once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _study(args: argparse.Namespace) -> int:
    from src.study import runner

    distributed.check(None)
    study = runner.load(args.study, args.set, args.log_dir, args.device, args.published)
    engine = args.engine or "local"
    return runner.run(study, remote=args.remote, dry_run=args.dry_run, engine=engine)


def _sweep(args: argparse.Namespace) -> int:
    """The named experiments of a file, one after the other."""
    sanity_only = args.phase == "sanity"
    sweep = config.load_sweep(args.config, args.set, "rank" if sanity_only else args.phase)
    allocations = allocate(sweep)
    runs = sweep.chosen(args.exp or ["all"], [0] if sanity_only else args.seed)
    if args.dry_run:
        allocation_table.print_sweep(allocations, sweep.baseline, runs, as_json=args.json)
        return OK
    distributed.check(None if sanity_only else runs)
    log_dir, device, remote = Path(args.log_dir), args.device, args.remote
    contexts = [  # nothing is written before all of them can work
        preflight.check(run, sweep, allocations, log_dir=log_dir, device=device, remote=remote)
        for run in runs
    ]
    if sanity_only:
        from src.study import sanity

        return sanity.check_all(contexts)
    codes = [execution.execute_together(context) for context in contexts]
    return TRY_AGAIN if TRY_AGAIN in codes else max(codes, default=OK)


def _preempt(number: int, _frame: object) -> NoReturn:
    raise Preempted(signal.Signals(number).name)


if __name__ == "__main__":
    try:
        code = main()
    except Preempted:  # signalled once more on its way out
        code = TRY_AGAIN
    for number in Preemption.SIGNALS:  # nothing is left to save: the exit code stands
        signal.signal(number, signal.SIG_IGN)
    try:
        for stream in filter(None, (sys.stdout, sys.stderr)):  # None: started with it closed
            stream.flush()
    except BrokenPipeError:
        _write_to_nobody()
    if execution.remote_is_stuck():
        os._exit(code)
    sys.exit(code)
