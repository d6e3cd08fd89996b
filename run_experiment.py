"""The entry point: python run_experiment.py --config configs/embed_ratio.yaml --exp emb35

Parse, load, plan, call. Exit codes: 0 finished (or stopped by the kill rule), 70 our fault,
74 could not read or write, 75 preempted or held by another process (run me again), 78 bad input.
Nothing heavy is imported before the arguments, the configuration and the lock are settled.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from src import allocation, config

OK, OUR_FAULT, IO_FAILED, TRY_AGAIN, BAD_INPUT = 0, 70, 74, 75, 78
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
NOISE_SEEDS = 5  # ranking runs of the baseline in phase 0


class Preempted(BaseException):
    """A signal outside the training loop; nothing is lost, run me again."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}; see --help", file=sys.stderr)
        raise SystemExit(BAD_INPUT)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(
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
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value")
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
    # Read when torch loads: waiting OpenMP threads sleep instead of spinning. Three runs started
    # at once on two cores make 3 to 4 times the tokens/s this way (results/LOG.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for number in SIGNALS:
        signal.signal(number, _preempt)
    try:
        if arguments.study is not None:
            return _study(arguments)
        checking = arguments.phase == "sanity"
        arguments.phase = "rank" if checking else arguments.phase
        sweep = config.load_sweep(arguments.config, arguments.set, arguments.phase)
        answers = _allocate(sweep)
        if arguments.dry_run:
            _print_plan(answers, arguments.json)
            return OK
        if checking and (code := _sanity(sweep, answers, arguments)) != OK:
            return code
        runs = _chosen(sweep, arguments.exp, arguments.seed)
        inputs = [_check_inputs(run, answers[run.experiment], arguments) for run in runs]
        codes = [
            _run(run, answers[run.experiment], sweep, data, arguments)
            for run, data in zip(runs, inputs, strict=True)
        ]
        return TRY_AGAIN if TRY_AGAIN in codes else max(codes, default=OK)
    except Preempted as signalled:
        print(f"stopped by {signalled}; run the same command again to go on", file=sys.stderr)
        return TRY_AGAIN
    except ValueError as error:
        print(error, file=sys.stderr)
        return BAD_INPUT
    except OSError as error:
        print(f"could not read or write: {error}", file=sys.stderr)
        return IO_FAILED


def _study(arguments: argparse.Namespace) -> int:
    from src import run_dir, study

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
    chosen = _chosen(sweep, arguments.exp, [0])
    inputs = [_check_inputs(run, answers[run.experiment], arguments) for run in chosen]
    from src import run_dir, sanity

    log_dir, passed = Path(arguments.log_dir), True
    try:
        for run, tokens in zip(chosen, inputs, strict=True):
            found = sanity.check(run, answers[run.experiment], tokens, log_dir, arguments.device)
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
        return allocation.allocate({run.experiment: run.model for run in sweep.runs})
    except ValueError as error:
        raise ValueError(f"{sweep.file}: {error}") from None


def _print_plan(answers: dict[str, allocation.Allocation], as_json: bool) -> None:
    if not as_json:
        print(allocation.table(answers))
        return
    for name, answer in answers.items():
        print(json.dumps(allocation.as_json(name, answer)))


def _chosen(
    sweep: config.Sweep, names: Sequence[str], seeds: Sequence[int] | None
) -> list[config.RunConfig]:
    """The asked runs: seeds within experiments, the baseline first (others are judged by it)."""
    for seed in seeds or ():
        if not 0 <= seed < 2**31:
            raise ValueError(f"--seed: found {seed}, expected a seed from 0 to 2^31 - 1")
    wanted = list(sweep.names) if list(names) == ["all"] else list(dict.fromkeys(names))
    wanted.sort(key=lambda name: name != sweep.baseline)
    return [sweep.run(name, seed) for name in wanted for seed in (seeds or sweep.seeds)]


def _check_inputs(
    run: config.RunConfig, answer: allocation.Allocation, arguments: argparse.Namespace
) -> Any:
    """Refuse, before anything is written, what cannot work; returns the verified tokens."""
    from src import data, kill_rule, run_dir

    checkpoints = Path(arguments.log_dir) / run.run_name / "checkpoints"
    run_dir.check_disk(checkpoints, 12 * answer.params.total)  # weights, two moments; float32

    tokens = data.load(run.token_dir, run.model.vocab_size)
    training = run.training
    data.Windows(
        tokens.train.tokens, batch_size=training.batch_size, seq_len=training.seq_len, seed=0
    )
    data.consecutive_windows(
        tokens.validation.tokens, limit=training.dev_token_budget, seq_len=training.seq_len
    )
    if "smallbench_accuracy" in run.evaluation.metrics:
        _check_smallbench(run, tokens.corpus)
    rule = run.kill_rule
    every = training.eval_every_steps * training.step_tokens
    if rule is not None and arguments.phase != "rank":
        stated = kill_rule.KillRule(
            margin_ppl=rule.margin_ppl,
            window_tokens=rule.window_tokens,
            grace_tokens=rule.grace(training.tokens),
        )
        if not kill_rule.can_ever_fire(stated, training.tokens, every):
            raise ValueError(
                f"{arguments.config}: kill_rule: found a rule that can never fire in "
                f"{training.tokens:,} tokens with dev evaluations every {every:,}; expected "
                "window_tokens and grace_tokens that fit, or no kill_rule"
            )
    explicit = training.precision in ("bf16", "fp16")
    if arguments.device not in ("auto", "cpu") or explicit:
        from src import runtime  # imports torch; only where there is something to refuse

        device = runtime.choose_device(arguments.device)
        if explicit:
            runtime.resolve_precision(training.precision, device)
    return tokens


def _check_smallbench(run: config.RunConfig, corpus: dict[str, Any]) -> None:
    from src import leakage, smallbench

    tasks = smallbench.load_tasks(run.smallbench_tasks)
    directory = Path(run.evaluation.smallbench_dir)
    if not (directory / "source.json").is_file():
        raise ValueError(
            f"evaluation.smallbench_dir: found no SmallBench data in {directory}; get "
            f"it with: python scripts/download_smallbench.py --output {directory}, or "
            "leave smallbench_accuracy out of evaluation.metrics"
        )
    for task in tasks:  # whole and unchanged, before hours of training
        smallbench.read_rows(task, directory)
    leakage.contaminated_rows(run.evaluation.leakage, directory, corpus)


def _run(
    run: config.RunConfig,
    answer: allocation.Allocation,
    sweep: config.Sweep,
    data: Any,
    arguments: argparse.Namespace,
) -> int:
    """One run under its lock; returns its exit code."""
    from src import record
    from src.run_dir import Held, RunDir

    resolved, digest = record.resolved(run, answer, sweep, data)
    digests = record.digests(digest, data)
    try:
        with (
            RunDir.open(Path(arguments.log_dir), run.run_name) as directory,
            _Remote(arguments.remote, run.run_name, directory.path) as remote,
        ):
            if directory.finished() is None:
                remote.fetch(directory, digests)
            directory.claim_config(resolved, digest)
            if directory.finished() is not None:
                print(f"{run.run_name}: finished before, nothing to do ({directory.path})")
                return OK
            diverged = _diverged(directory.path)
            if diverged is not None:  # refused alone: the command's other runs go on
                print(diverged, file=sys.stderr)
                return BAD_INPUT
            directory.clear_failure()
            with _recorded_failure(directory, run.run_name):
                return _execute(run, answer, sweep, data, directory, digest, arguments, remote)
            return OUR_FAULT
    except Held as held:
        print(f"{run.run_name}: {held}", file=sys.stderr)
        return TRY_AGAIN


@contextlib.contextmanager
def _recorded_failure(directory: Any, name: str) -> Iterator[None]:
    """Leaves failure.json for what is our fault, so that the aggregator lists the run."""
    try:
        yield
    except (ValueError, OSError):
        raise  # the user's or the machine's; main says it in one sentence
    except Exception as error:
        directory.record_failure(type(error).__name__, str(error))
        if type(error).__name__ != "NonFinite":
            traceback.print_exc()
        print(f"{name}: failed: {error}", file=sys.stderr)


class _Remote:
    """`src.remote.Remote` where one was asked for, nothing otherwise; closed on every way out."""

    FINAL = ("config.yaml", "environment.json", "metrics.jsonl", "metrics.json")
    stuck = False  # whether any upload thread hangs on a dead store

    def __init__(self, uri: str | None, run_name: str, path: Path) -> None:
        self._remote: Any = None
        if uri is not None:
            from src.remote import Remote

            self._remote = Remote.open(uri, run_name, local=path)

    def __enter__(self) -> _Remote:
        return self

    def __exit__(self, *_: object) -> None:
        if self._remote is not None:
            self._remote.close(20)
            _Remote.stuck |= self._remote.stuck

    def fetch(self, directory: Any, digests: dict[str, str]) -> None:
        """Bring a finished run, or the newest checkpoint, to a machine that lacks it."""
        if self._remote is not None and not self._remote.fetch_final(directory, digests=digests):
            self._remote.fetch_latest(directory, digests=digests)

    def saved(self, directory: Any) -> Any:
        """What a checkpoint calls when it is durable here."""
        if self._remote is None:
            return None
        return lambda obj, manifest: self._remote.push(obj, manifest, directory.metrics_path)

    def fenced(self) -> bool:
        return self._remote is not None and self._remote.fenced

    def push_final(self, directory: Any, digests: dict[str, str]) -> None:
        if self._remote is not None:
            self._remote.push_final(directory, list(self.FINAL), digests)


def _diverged(path: Path) -> str | None:
    """A run that met a NaN would meet it again: no loop of reruns. The refusal, or None."""
    failure = path / "failure.json"
    if not failure.exists():
        return None
    content = json.loads(failure.read_text(encoding="utf-8"))
    if content.get("kind") != "NonFinite":
        return None
    return (
        f"{failure}: found a run that diverged ({content.get('message')}), expected one that can "
        "go on; change the config under another name, or delete the directory"
    )


def _execute(
    run: config.RunConfig,
    answer: allocation.Allocation,
    sweep: config.Sweep,
    data: Any,
    directory: Any,
    digest: str,
    arguments: argparse.Namespace,
    remote: _Remote,
) -> int:
    """Train, evaluate, export, finish."""
    begun = time.perf_counter()
    from src import evaluation, machine, record, runtime, train
    from src.models.export import export
    from src.run_dir import write_json

    chosen = machine.choose(run.training, answer.model, Path(arguments.log_dir), arguments.device)
    environment = runtime.environment_stamp(chosen.device)
    write_json(directory.path / "environment.json", environment)
    facts = record.facts(run, answer, sweep, data, digest, environment)
    device = runtime.device_name(chosen.device)
    print(
        f"{run.run_name}: {answer.params.total:,} parameters on {device} "
        f"({chosen.precision}, {chosen.threads} threads), {run.training.steps} steps of "
        f"{run.training.step_tokens:,} tokens, {facts['epochs']:.2f} epochs",
        flush=True,
    )
    digests = record.digests(digest, data)
    outcome = train.train(
        run, answer.model, data, directory, chosen,
        digests=digests, on_saved=remote.saved(directory), fenced=remote.fenced,
    )  # fmt: skip
    if outcome.status == "preempted":
        # Not a return: the other runs of this command must not begin.
        raise Preempted(f"{outcome.reason} at step {outcome.step} of {run.run_name}")
    evaluated = time.perf_counter()
    measured: dict[str, Any] = {}
    if outcome.status == "trained":
        measured = evaluation.evaluate(run, outcome.model, data, outcome.machine, directory.path)
        train.board_final(directory, measured, outcome.step)
        export(
            outcome.model,
            data.tokenizer_path,
            directory.path / "final",
            max_position_embeddings=run.training.seq_len,
        )
    metrics = record.metrics(
        facts, outcome, measured,
        eval_seconds=time.perf_counter() - evaluated,
        wall_seconds=time.perf_counter() - begun,
    )  # fmt: skip
    directory.finish(metrics)
    remote.push_final(directory, digests)
    print(record.summary(metrics))
    return OK


if __name__ == "__main__":
    try:
        code = main()
    except Preempted:  # signalled once more on its way out
        code = TRY_AGAIN
    for number in SIGNALS:  # nothing is left to save: the exit code stands
        signal.signal(number, signal.SIG_IGN)
    sys.stdout.flush()
    sys.stderr.flush()
    if _Remote.stuck:  # a normal exit would wait for the store's time-outs, about 40 s
        os._exit(code)
    sys.exit(code)
