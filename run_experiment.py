"""The entry point: python run_experiment.py --config configs/embed_ratio.yaml --exp emb35

Parse, load, plan, call. Exit codes: 0 finished (or stopped by the kill rule), 70 our fault,
74 could not read or write, 75 preempted or held by another process (run me again), 78 bad input.
Nothing heavy is imported before the arguments, the configuration and the lock are settled.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from src import run as execution
from src.compute import cores
from src.compute import process_group as distributed
from src.run import Preempted
from src.spec import allocation, allocation_table, config, costs
from src.spec.command_line import BAD_INPUT, IO_FAILED, OK, OUR_FAULT, TRY_AGAIN, Parser

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
NOISE_SEEDS = 5  # ranking runs of the baseline in phase 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="run_experiment.py",
        description="Train and evaluate the experiments of a sweep; resumes by itself.",
        epilog="Exit codes: 0 finished, 70 our fault, 74 I/O, 75 run me again, 78 bad input.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", help="experiment file, see configs/")
    source.add_argument("--study", type=Path, help="study file: phases 0 to 2, plan and budget")
    parser.add_argument("--exp", nargs="+", default=None, help="experiment names, or all")
    parser.add_argument("--seed", type=int, nargs="+", help="default: the file's seeds (0)")
    parser.add_argument(
        "--phase",
        choices=(*config.PHASES, "sanity"),
        help="full (default); rank: training.ranking_tokens; sanity: checks, learning rates, and "
        "the baseline's seeds 0 to 4 as ranking runs",
    )
    parser.add_argument(
        "--set", action="extend", nargs="+", default=[], metavar="section.key=value"
    )
    parser.add_argument("--log_dir", help="default: logs, or the study file's")
    parser.add_argument("--device", help="auto (default), cpu, cuda or cuda:N")
    parser.add_argument("--remote", help="s3://, gs:// or abfs:// prefix for checkpoints")
    parser.add_argument("--dry_run", action="store_true", help="print the sweep's table and stop")
    parser.add_argument("--json", action="store_true", help="with --dry_run: one object a line")
    arguments = parser.parse_args(argv)
    if arguments.json and not arguments.dry_run:
        parser.error("--json goes with --dry_run")
    if arguments.study is not None:
        if arguments.exp or arguments.seed or arguments.phase or arguments.json:
            parser.error("--study: takes no --exp, --seed, --phase or --json; its file says them")
        return arguments
    arguments.phase = arguments.phase or "full"
    arguments.log_dir, arguments.device = arguments.log_dir or "logs", arguments.device or "auto"
    if not arguments.dry_run and not arguments.exp:
        parser.error("--exp: name one experiment, several, or all (or use --dry_run)")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = _arguments(argv)
    for name, value in cores.WAITING.items():
        os.environ.setdefault(name, value)
    for number in SIGNALS:
        signal.signal(number, _preempt)
    try:
        if arguments.study is not None:
            distributed.check(None)
            return _study(arguments)
        checking = arguments.phase == "sanity"
        arguments.phase = "rank" if checking else arguments.phase
        sweep = config.load_sweep(arguments.config, arguments.set, arguments.phase)
        answers = _allocate(sweep)
        runs = sweep.chosen(arguments.exp or ["all"], arguments.seed)
        if arguments.dry_run:
            _print_plan(sweep, answers, arguments.json)
            if not arguments.json:
                _print_floor(answers, runs)
            return OK
        distributed.check(None if checking else runs)
        if checking and (code := _sanity(sweep, answers, arguments)) != OK:
            return code
        if checking:
            runs = sweep.chosen(arguments.exp, arguments.seed)
        contexts = _check_inputs(sweep, answers, runs, arguments)
        codes = [execution.execute_together(context) for context in contexts]
        return TRY_AGAIN if TRY_AGAIN in codes else max(codes, default=OK)
    except Preempted as signalled:
        print(f"stopped by {signalled}; run the same command again to go on", file=sys.stderr)
        return TRY_AGAIN
    except ValueError as error:
        print(error, file=sys.stderr)
        return BAD_INPUT
    except BrokenPipeError:  # the reader of a dry run has seen enough; a run is not at its end
        _write_to_nobody()
        if arguments.dry_run:
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


def _study(arguments: argparse.Namespace) -> int:
    from src.storage import run_dir
    from src.study import runner as study

    asked = study.load(arguments.study, arguments.set, arguments.log_dir, arguments.device)
    try:
        return study.run(asked, remote=arguments.remote, dry_run=arguments.dry_run)
    except run_dir.Held as held:
        print(held, file=sys.stderr)
        return TRY_AGAIN


def _sanity(
    sweep: config.Sweep, answers: dict[str, allocation.Allocation], arguments: argparse.Namespace
) -> int:
    """Phase 0's checks of every named experiment; then `arguments` ask for the noise floor."""
    chosen = sweep.chosen(arguments.exp, [0])
    contexts = _check_inputs(sweep, answers, chosen, arguments)
    from src.storage import run_dir
    from src.study import sanity

    log_dir, passed = Path(arguments.log_dir), True
    try:
        for context in contexts:
            run, answer, data = context.run, context.allocation, context.data
            found = sanity.check(run, answer, data, log_dir, arguments.device)
            if found is None:
                raise Preempted(f"a signal during the checks of {run.experiment}")
            print(sanity.report(found), flush=True)
            passed &= found["passed"]
    except run_dir.Held as held:
        print(held, file=sys.stderr)
        return TRY_AGAIN
    arguments.exp = [run.experiment for run in chosen if run.experiment == sweep.baseline]
    arguments.seed = arguments.seed or list(range(NOISE_SEEDS))
    return OK if passed else OUR_FAULT


def _preempt(number: int, _frame: object) -> NoReturn:
    raise Preempted(signal.Signals(number).name)


def _allocate(sweep: config.Sweep) -> dict[str, allocation.Allocation]:
    try:
        return allocation.allocate(
            {run.experiment: run.model for run in sweep.runs}, sweep.baseline
        )
    except ValueError as error:
        raise ValueError(f"{sweep.file}: {error}") from None


def _print_plan(
    sweep: config.Sweep, answers: dict[str, allocation.Allocation], as_json: bool
) -> None:
    if as_json:
        for name, answer in answers.items():
            print(json.dumps(allocation_table.as_json(name, answer)))
        return
    print(allocation_table.table(answers))
    for note in allocation_table.notes(answers, sweep.baseline):
        print(f"note: {note}")


def _print_floor(
    answers: dict[str, allocation.Allocation], runs: Sequence[config.RunConfig]
) -> None:
    """What the asked runs cost at least, device by device where that is a dollar anywhere."""
    tokens = sum(run.training.steps * run.training.step_tokens for run in runs)
    flops = sum(
        run.training.steps
        * run.training.step_tokens
        * allocation.flops_per_token(answers[run.experiment].model, run.training.seq_len)
        for run in runs
    )
    print(f"\nruns: {len(runs)}, tokens: {tokens:,}, training FLOPs: {flops:.2e}")
    floors = costs.floors(flops)
    if max((floor.usd for floor in floors), default=0.0) < 1:
        print("under 1 USD of training on every device of configs/prices.yaml at half its peak; "
              "small models reach a few per cent of it")  # fmt: skip
        return
    print(f"training alone, at {costs.UTILISATION:.0%} of each device's peak, so at least:")
    for floor in floors:
        print(f"  {floor.device:<8} {floor.hours:10.2f} h {floor.usd:10.2f} USD")


def _check_inputs(
    sweep: config.Sweep,
    answers: dict[str, allocation.Allocation],
    runs: Sequence[config.RunConfig],
    arguments: argparse.Namespace,
) -> list[Any]:
    """Every run with its verified tokens; nothing is written before all of them can work."""
    from src import preflight

    return [
        preflight.check(
            run, sweep, answers,
            log_dir=Path(arguments.log_dir), device=arguments.device, remote=arguments.remote,
        )
        for run in runs
    ]  # fmt: skip


if __name__ == "__main__":
    try:
        code = main()
    except Preempted:  # signalled once more on its way out
        code = TRY_AGAIN
    for number in SIGNALS:  # nothing is left to save: the exit code stands
        signal.signal(number, signal.SIG_IGN)
    try:
        for stream in filter(None, (sys.stdout, sys.stderr)):  # None: started with it closed
            stream.flush()
    except BrokenPipeError:
        _write_to_nobody()
    if execution.remote_is_stuck():
        os._exit(code)
    sys.exit(code)
