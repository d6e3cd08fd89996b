"""A run as asked for; what cannot work is refused in about a second, before anything is written."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from src.compute.compiler import compiler
from src.compute.process_group import ProcessGroup
from src.data import leakage, requests
from src.data import tasks as smallbench
from src.data import tokens as data
from src.data.tokenizer import load_tokenizer
from src.evaluation import metrics
from src.spec import costs, kill_rule
from src.spec.allocation import Allocation
from src.spec.config import RunConfig, Sweep
from src.spec.progress import say
from src.storage import address, run_dir
from src.storage.run_config import begun_with


@dataclass(frozen=True, kw_only=True, slots=True)
class RunContext:
    """One run as asked for, in its sweep, and where it happens."""

    run: RunConfig
    sweep: Sweep
    allocations: Mapping[str, Allocation]  # of every experiment of `sweep`
    data: data.TokenData
    log_dir: Path
    device: str
    remote: str | None = None  # a store's address
    group: ProcessGroup | None = None  # the processes that share each batch, where it has several

    @property
    def name(self) -> str:
        return self.run.run_name

    @property
    def allocation(self) -> Allocation:
        return self.allocations[self.run.experiment]


def check(
    run: RunConfig,
    sweep: Sweep,
    allocations: Mapping[str, Allocation],
    *,
    log_dir: Path,
    device: str,
    remote: str | None,
) -> RunContext:
    """`run` with its verified tokens; ValueError, one sentence, for whatever would fail later."""
    _check_machine(run, log_dir, device, remote)
    run_dir.check_log_dir(log_dir)
    directory = log_dir / run.run_name
    parameters = allocations[run.experiment].params.total
    if not (directory / "metrics.json").is_file():
        # Weights and two moments in float32.
        run_dir.check_disk(directory / "checkpoints", 12 * parameters)
    tokens = data.load(run.token_dir, run.model.vocab_size, run.data.train_tokens)
    training = run.training
    data.Windows(
        tokens.train.tokens, batch_size=training.batch_size, seq_len=training.seq_len, seed=0
    )
    data.consecutive_windows(
        tokens.validation.tokens, limit=training.dev_token_budget, seq_len=training.seq_len
    )
    kill_rule.check_fits(run.kill_rule, training, str(sweep.file), sweep.states_kill_rule)
    costs.check()
    evaluation = run.evaluation
    if "smallbench_accuracy" in evaluation.metrics:
        smallbench_dir = Path(evaluation.smallbench_dir)
        _check_smallbench(
            run.smallbench_tasks, smallbench_dir, evaluation.smallbench_limit,
            evaluation.blimp_full, tokens.tokenizer_path,
        )  # fmt: skip
        if leakage.contaminated_rows(evaluation.leakage, smallbench_dir, tokens.corpus) is None:
            say(
                run.run_name,
                f"no report says which items of {smallbench_dir} the training text contains: all "
                "are asked; python scripts/check_leakage.py --smallbench "
                f"{smallbench_dir} --corpus ... makes it",
            )
    if evaluation.outside_dir is not None:
        for name in ("validation", "test") if evaluation.test else ("validation",):
            data.outside_texts(Path(evaluation.outside_dir), name)
    resolved, digest = metrics.resolved(run, allocations, sweep, tokens)
    begun_with(directory, resolved, digest, metrics.older_digest(resolved))
    return RunContext(
        run=run, sweep=sweep, allocations=allocations, data=tokens,
        log_dir=log_dir, device=device, remote=remote,
    )  # fmt: skip


def _check_machine(run: RunConfig, log_dir: Path, device: str, remote: str | None) -> None:
    if remote is not None:
        parts = address.check(remote)
        if parts.scheme == "file" and Path(parts.path).resolve() == log_dir.resolve():
            raise ValueError(
                f"--remote: found the log directory itself ({log_dir}), expected another place"
            )
    if run.training.compile == "on" and compiler() is None:
        raise ValueError(
            "training.compile: found on, but this machine has no C++ compiler (g++ or clang++); "
            "install one, or use auto or off"
        )
    explicit = run.training.precision in ("bf16", "fp16")
    if device not in ("auto", "cpu") or explicit:
        from src.compute import runtime  # imports torch; only where there is something to refuse

        torch_device = runtime.choose_device(device)
        if explicit:
            runtime.resolve_precision(run.training.precision, torch_device)


@functools.cache
def _check_smallbench(
    task_list: Path, directory: Path, limit: int | None, blimp_full: bool, tokenizer_path: Path
) -> None:
    """Every item rendered once: a wrong template, or a choice without a token of its own, is found
    now, not after hours of training."""
    tasks = smallbench.load_tasks(task_list)
    if blimp_full and not any(task.is_blimp for task in tasks):
        raise ValueError(
            f"evaluation.blimp_full: found no task of {smallbench.BLIMP} in {task_list}, expected "
            "some; add them or leave the key out"
        )
    if not (directory / "source.json").is_file():
        raise ValueError(
            f"evaluation.smallbench_dir: found no SmallBench data in {directory.absolute()}; get "
            f"it with: python scripts/download_smallbench.py --output {directory}, or "
            "leave smallbench_accuracy out of evaluation.metrics"
        )
    tokenizer = load_tokenizer(tokenizer_path)
    for task in tasks:
        for full in (False, True) if blimp_full and task.is_blimp else (False,):
            items = smallbench.load_items(task, directory, limit=None if full else limit, full=full)
            if items:
                pairs = requests.own_pairs(items) + requests.held_out_pairs(items)
                # Our tokenizers cut before a blank and a word: such a word has tokens of its own.
                pairs = [(c, text) for c, text in pairs if not text.strip() or text[0] != " "]
                try:
                    requests.encode_requests(tokenizer, pairs)
                except ValueError as error:
                    raise ValueError(f"{task_list}: task {task.name}: {error}") from None
