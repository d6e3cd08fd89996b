"""One run, from its lock to its metrics.json: fetch, claim, train, evaluate, export, finish.

torch is imported only once the lock is held and the config is claimed, so that a run which is held
by another process, or finished, costs a fraction of a second.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from src.compute.process_group import PeerLost, ProcessGroup, size
from src.evaluation import metrics
from src.preflight import RunContext
from src.spec.command_line import BAD_INPUT, OK, OUR_FAULT, TRY_AGAIN
from src.storage.files import write_json
from src.storage.run_config import differences, stored_config
from src.storage.run_dir import Held, RunDir, exported, read_failure


class Preempted(BaseException):
    """Somebody wants this process to end; nothing is lost, run me again."""


def execute(context: RunContext) -> int:
    """Bring the run to its end, or find it there; returns the exit code.

    Raises ValueError (bad input), OSError (could not read or write), Preempted, PeerLost.
    """
    resolved, digest = metrics.resolved(
        context.run, context.allocations, context.sweep, context.data
    )
    digests = metrics.digests(digest, context.data)
    try:
        with (
            RunDir.open(context.log_dir, context.name) as directory,
            _Remote(context.remote, context.name, directory.path) as remote,
        ):
            if directory.finished() is None:
                remote.fetch(directory, digests)
            digest = directory.claim_config(resolved, digest, metrics.older_digest(resolved))
            digests = metrics.digests(digest, context.data)
            _change_evaluation(context, directory, resolved, digest)
            finished = directory.finished()
            if finished is not None:
                if finished.get("status") not in ("finished", "killed"):
                    raise ValueError(
                        f"{directory.path / 'metrics.json'}: found no results of a run, expected "
                        "its status; delete the file: the run measures again from its last "
                        "checkpoint"
                    )
                no_export = finished.get("status") == "finished" and not exported(directory.path)
                remark = ""
                if no_export and any(directory.checkpoints.glob("*")):
                    _export_again(context, directory.path, digests)
                elif no_export:  # small files from another machine are a finished run too
                    remark = "; it has neither final/ nor a checkpoint"
                print(f"{context.name}: finished before, nothing to do ({directory.path}){remark}")
                remote.push_missing(directory, digests)
                return OK if remote.landed(context.name) else TRY_AGAIN
            diverged = _diverged(directory.path)
            if diverged is not None:  # refused alone: the command's other runs go on
                print(diverged, file=sys.stderr)
                return BAD_INPUT
            directory.clear_failure()
            with _recorded_failure(directory, context.name):
                _train_and_measure(context, directory, digests, remote)
                return OK if remote.landed(context.name) else TRY_AGAIN
            return OUR_FAULT
    except Held as held:
        print(f"{context.name}: {held}", file=sys.stderr)
        return TRY_AGAIN


def execute_together(context: RunContext) -> int:
    """`execute` by as many processes as torchrun has started: rank 0 is the run, the others help.

    Raises as `execute` does.
    """
    if size() == 1:
        return execute(context)
    try:
        with ProcessGroup.join(context.device) as group:
            if group.rank:
                from src.training_step import serve_gradients

                return serve_gradients(context.run, context.allocation.model, context.data, group)
            code = execute(replace(context, device=str(group.device), group=group))
            group.shut_down(code)
            return code
    except PeerLost as lost:
        print(f"{context.name}: {lost}", file=sys.stderr)
        return TRY_AGAIN


def remote_is_stuck() -> bool:
    """Whether an upload hangs on a dead store; a normal exit would wait for it, about 40 s."""
    return _Remote.stuck


@contextlib.contextmanager
def _recorded_failure(directory: RunDir, name: str) -> Iterator[None]:
    """Leaves failure.json for what is our fault, so that the aggregator lists the run."""
    try:
        yield
    except (ValueError, OSError, PeerLost):
        raise  # the user's or the machine's; main says it in one sentence
    except Exception as error:
        directory.record_failure(type(error).__name__, str(error))
        if type(error).__name__ not in ("NonFinite", "NotLoadable"):
            traceback.print_exc()
        print(f"{name}: failed: {error}", file=sys.stderr)


class _Remote:
    """A `storage.remote.Remote` where one was asked for; closed on every way out."""

    stuck = False  # whether any upload thread hangs on a dead store

    def __init__(self, uri: str | None, run_name: str, path: Path) -> None:
        self._remote: Any = None
        if uri is not None:
            from src.storage.remote import Remote

            self._remote = Remote.open(uri, run_name, local=path)

    def __enter__(self) -> _Remote:
        return self

    def __exit__(self, *_: object) -> None:
        if self._remote is not None:
            self._remote.close(20)
            _Remote.stuck |= self._remote.stuck

    def fetch(self, directory: RunDir, digests: dict[str, str]) -> None:
        """Bring a finished run, or the newest checkpoint, to a machine that lacks it."""
        if self._remote is not None and not self._remote.fetch_final(directory, digests=digests):
            self._remote.fetch_latest(directory, digests=digests)

    def saved(self, directory: RunDir) -> Any:
        """What a checkpoint calls when it is durable here."""
        if self._remote is None:
            return None
        return lambda obj, manifest: self._remote.push(obj, manifest, directory.metrics_path)

    def fenced(self) -> bool:
        return self._remote is not None and self._remote.fenced

    def push_final(self, directory: RunDir, digests: dict[str, str]) -> None:
        if self._remote is not None:
            self._remote.push_final(directory, _results(directory.path), digests)

    def push_missing(self, directory: RunDir, digests: dict[str, str]) -> None:
        """The results of a finished run that the store has not got."""
        if self._remote is not None and any(directory.checkpoints.glob("step-*.json")):
            if not self._remote.has_final():
                self.push_final(directory, digests)

    def landed(self, name: str) -> bool:
        """Whether the store has all that was pushed, waited for; if not, that is said."""
        if self._remote is None or self._remote.drain(20):
            return True
        print(f"{name}: finished here, its store has not got all of it", file=sys.stderr)
        return False


def _results(path: Path) -> list[str]:
    """What a finished run is on another disk: all but its lock, views and older checkpoints."""
    left_out = ("tensorboard", "checkpoints")
    files = [file.relative_to(path) for file in sorted(path.rglob("*")) if file.is_file()]
    names = [str(f) for f in files if f.parts[0] not in left_out and f.name[0] != "."]
    newest = max((path / "checkpoints").glob("step-*.json"))
    stored = json.loads(newest.read_text(encoding="utf-8"))["file"]
    return [n for n in names if n != "remote.json"] + [
        f"checkpoints/{stored}",
        f"checkpoints/{newest.name}",
    ]


def _change_evaluation(
    context: RunContext, directory: RunDir, resolved: dict[str, Any], digest: str
) -> None:
    """Where other things are to be measured than config.yaml says: a finished run is a trained one
    again; one that the kill rule stopped is left as it is. Raises ValueError where the final
    weights are gone."""
    stored, finished = stored_config(directory.path) or {}, directory.finished()
    differing = differences(stored.get("evaluation", {}), resolved["evaluation"])
    key = "questions_sha256"
    if key in stored and stored[key] != resolved.get(key, stored[key]):
        differing.append("other tasks, rows or leakage report")
    changes = "; ".join(differing)
    if not changes:
        return
    if finished is not None and finished.get("status") == "killed":
        print(f"{context.name}: the kill rule stopped it, so it is not evaluated")
        return
    if finished is not None:
        from src.storage import checkpoint

        newest = checkpoint.newest_verified(directory.checkpoints, misfit=directory.misfit)
        if newest is None or newest["step"] != finished["steps"]:
            raise ValueError(
                f"{directory.path}: evaluation: found other keys than it was evaluated with "
                f"({changes}) and no checkpoint of its last step, expected that to evaluate again; "
                "restore it, or ask for the stored values"
            )
        directory.forget_evaluation()
    directory.write_config(resolved, digest)
    now = "evaluated again from its final weights" if finished else "its training stands"
    print(f"{context.name}: evaluation changed ({changes}): {now}", flush=True)


def _diverged(path: Path) -> str | None:
    """A run that met a NaN would meet it again: no loop of reruns. The refusal, or None."""
    failure = read_failure(path)
    if failure is None or failure.get("kind") != "NonFinite":
        return None
    return (
        f"{path / 'failure.json'}: found a run that diverged ({failure.get('message')}), expected "
        "one that can go on; change the config under another name, or delete the directory"
    )


def _export_again(context: RunContext, path: Path, digests: dict[str, str]) -> None:
    from src.evaluation.trained_run import export_again
    from src.models.transformer import Transformer

    training, model = context.run.training, Transformer(context.allocation.model)
    export_again(
        path, model, context.data.tokenizer_path,
        digests=digests, steps=training.steps, context=training.seq_len,
    )  # fmt: skip


def _train_and_measure(
    context: RunContext, directory: RunDir, digests: dict[str, str], remote: _Remote
) -> None:
    begun = time.perf_counter()
    from src import train
    from src.compute import compute_config, runtime
    from src.evaluation import evaluate as evaluation
    from src.models.export import export

    run, data, allocation = context.run, context.data, context.allocation
    compute = compute_config.choose(
        run.training, allocation.model, context.log_dir, context.device, context.name
    )
    environment = runtime.environment_stamp(compute.device)
    write_json(directory.path / "environment.json", environment)
    facts = metrics.facts(run, allocation, context.sweep, data, digests["config"], environment)
    print(
        f"{run.run_name}: {allocation.params.total:,} parameters on "
        f"{runtime.device_name(compute.device)} ({compute.precision}, {compute.threads} threads, "
        f"{'compiled at the first step' if compute.compile else 'eager'}), "
        f"{run.training.steps} steps of "
        f"{run.training.step_tokens:,} tokens, {facts['epochs']:.2f} epochs",
        flush=True,
    )
    outcome = train.train(
        context, directory, compute, digests,
        on_saved=remote.saved(directory), fenced=remote.fenced,
    )  # fmt: skip
    write_json(
        directory.path / "environment.json", environment | {"computed": list(outcome.conditions)}
    )
    if outcome.status == "preempted":
        # Not a return: the other runs of this command must not begin.
        raise Preempted(f"{outcome.reason} at step {outcome.step} of {run.run_name}")
    if context.group is not None:
        context.group.shut_down(OK)  # this process evaluates alone
    evaluated = time.perf_counter()
    measured: dict[str, Any] = {}
    if outcome.status == "trained":
        try:
            measured = evaluation.evaluate(
                run, outcome.model, data, outcome.compute, directory.path
            )
        except ValueError as error:  # its inputs were checked before training: not the user's
            raise RuntimeError(f"evaluation: {error}") from error
        train.board_final(directory, measured, outcome.step)
        export(
            outcome.model,
            data.tokenizer_path,
            directory.path / "final",
            max_position_embeddings=run.training.seq_len,
        )
    results = metrics.metrics(
        facts, outcome, measured,
        eval_seconds=time.perf_counter() - evaluated,
        wall_seconds=time.perf_counter() - begun,
    )  # fmt: skip
    directory.finish(results)
    remote.push_final(directory, digests)
    print(metrics.summary(results))
