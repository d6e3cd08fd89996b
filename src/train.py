"""Training, told once from top to bottom: evaluate, save, stop?, accumulate, step, log."""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from src.compute import conditions, runtime
from src.compute.compute_config import ComputeConfig
from src.evaluation import scoring
from src.evaluation.stability import Stability
from src.models.transformer import Transformer
from src.preflight import RunContext
from src.spec import kill_rule
from src.spec.progress import Progress
from src.storage import checkpoint
from src.storage.event_file import EventFile
from src.storage.run_dir import Preemption, RunDir, read_curve
from src.training_step import (
    NonFinite,
    Stepper,
    build_model,
    compile_blocks,
    dev_windows,
    learning_rate,
    training_windows,
)

# Rows in metrics.jsonl for training; a longer run logs every k-th step.
MOST_TRAIN_ROWS = 5_000
# Nats a token; its exponential, the perplexity, is still a number.
LARGEST_LOSS = 700.0
_FINAL = ".final"  # event files of the final evaluation
_SCALARS = {  # key of a row of metrics.jsonl -> its name in TensorBoard
    "dev_loss": "dev/loss",
    "dev_perplexity": "dev/perplexity",
    "train_loss": "train/loss",
    "learning_rate": "train/learning_rate",
    "tokens_per_s": "train/tokens_per_s",
    "gpu_utilisation_percent": "device/gpu_utilisation_percent",
    "gpu_memory_mib": "device/gpu_memory_mib",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How training ended. status: "trained", "killed" (by the rule) or "preempted"."""

    status: str
    reason: str | None
    step: int
    model: Transformer
    compute: ComputeConfig  # as computed with: a resumed run goes on as it began
    processes: int  # that shared each batch
    conditions: tuple[dict[str, Any], ...]  # several where a resume changed them
    metrics: dict[str, Any]  # by key of metrics.json


# -------------------------------------------------------------------------------------- the loop


def train(
    context: RunContext,
    directory: RunDir,
    compute: ComputeConfig,
    digests: dict[str, str],
    *,
    on_saved: Callable[[Path, Path], None] | None = None,
    fenced: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Train a run from its last checkpoint to its end, a kill verdict or a signal.

    `on_saved` gets each checkpoint's two files. `fenced()` says that another machine has taken this
    run over: then stop as at a signal. Raises NonFinite, OSError (disk), PeerLost, ValueError (a
    checkpoint that does not fit).
    """
    trainer = Trainer(context, directory, compute, digests, on_saved)
    training = context.run.training
    board = EventFile(directory.path / "tensorboard", trainer.step + 1 if trainer.resumed else 0)
    progress = Progress(context.name, training.steps, "steps", done=trainer.step)
    log_every = math.ceil(training.steps / MOST_TRAIN_ROWS)
    status, reason = "trained", None
    _freeze_garbage()
    with Preemption() as stop, board, progress:
        while True:
            step, last = trainer.step, trainer.step == training.steps
            # Evaluate, and let the kill rule judge.
            if last or step % training.eval_every_steps == 0:
                verdict = trainer.evaluate(board)
                if verdict is not None:
                    status, reason = "killed", verdict.reason
            # Save: every so often, and before any end.
            leaving = stop.requested or fenced() or trainer.peer_signalled
            trainer.save_if_due(ending=last or leaving or status == "killed")
            # Stop?
            if last or status == "killed":
                break
            if leaving:
                status, reason = "preempted", stop.signal_name or trainer.other_reason
                break
            # Accumulate and step.
            begun = time.perf_counter()
            loss, norm = trainer.update(trainer.accumulate(), learning_rate(training, step))
            # Log.
            trainer.stability.see(trainer.step, loss, norm)
            if trainer.step % log_every == 0 or trainer.step == training.steps:
                trainer.log(board, loss, norm, time.perf_counter() - begun)
            progress.advance(1, f"train loss {loss:.4f}")
    if stop.requested and status == "trained":  # it came too late for a step: during the last save
        status, reason = "preempted", stop.signal_name
    gc.unfreeze()
    return trainer.outcome(status, reason)


def _freeze_garbage() -> None:
    """Nothing built so far is garbage; scanning it at every collection costs time."""
    gc.collect()
    gc.freeze()


# ------------------------------------------------------------------------------------- the state


class Trainer(Stepper):
    """A run's step, its batches, its checks, and everything that its checkpoints hold."""

    def __init__(
        self, context: RunContext, directory: RunDir, compute: ComputeConfig,
        digests: dict[str, str],
        on_saved: Callable[[Path, Path], None] | None = None,
    ) -> None:  # fmt: skip
        training, data = context.run.training, context.data
        assert training.init_seed is not None
        model = build_model(context.allocation.model, training.init_seed).to(compute.device)
        super().__init__(model, training, compute)
        self.run, self.group = context.run, context.group
        self.directory, self.digests, self.on_saved = directory, digests, on_saved
        self.windows = training_windows(data, training)
        self.dev = dev_windows(data, training)
        self.stability = Stability()
        self.judged: kill_rule.Verdict | None = None  # at the newest check
        self.peak_before = 0.0  # MiB, of earlier attempts
        self.conditions_before: list[dict[str, Any]] = []  # likewise
        runtime.reset_peak_memory(compute.device)
        self.resumed = self.restore()
        self.first_step = self.step  # of this attempt
        self.saved_at, self.saved_step = time.perf_counter(), self.step if self.resumed else -1
        compile_blocks(model, self.compute)
        if self.group is not None:
            choices = asdict(self.compute)
            del choices["device"]
            self.group.announce("begin", choices)

    @property
    def tokens(self) -> int:
        """Trained on so far."""
        return self.step * self.training.step_tokens

    @property
    def processes(self) -> int:
        return 1 if self.group is None else self.group.size

    @property
    def peer_signalled(self) -> bool:
        return self.group is not None and self.group.stop

    @property
    def other_reason(self) -> str:
        """Why to leave without a signal of one's own."""
        signalled = "a signal to another process"
        return signalled if self.peer_signalled else "another machine has this run"

    @property
    def peak_memory_mib(self) -> float:
        """Of all attempts that took a step."""
        if self.step == self.first_step:
            return self.peak_before
        return max(self.peak_before, runtime.peak_memory_mib(self.compute.device))

    @property
    def conditions(self) -> list[dict[str, Any]]:
        """What the bits depend on, now and at earlier attempts, each once."""
        now = conditions.current(self.compute, self.processes)
        return [*self.conditions_before, *([] if now in self.conditions_before else [now])]

    # ------------------------------------------------------------------------- save and restore

    def save_if_due(self, ending: bool) -> None:
        """Save after checkpoint_minutes or checkpoint_every_steps, or at an end; each step once."""
        every = self.training.checkpoint_every_steps
        minutes = (time.perf_counter() - self.saved_at) / 60
        due = minutes >= self.training.checkpoint_minutes or (every and self.step % every == 0)
        if (due or ending) and self.step != self.saved_step:
            self.save()
            self.saved_at, self.saved_step = time.perf_counter(), self.step

    def save(self) -> None:
        """One checkpoint of this instant; metrics.jsonl is made durable first."""
        self.directory.sync()
        self.save_state(
            self.directory.checkpoints,
            self.digests,
            self.on_saved,
            processes=self.processes,
            stability=self.stability.state(),
            metrics_offset=self.directory.offset(),
            peak_memory_mib=self.peak_memory_mib,
            conditions=self.conditions,
            machine={**asdict(self.compute), "device": self.compute.device.type},
        )

    def restore(self) -> bool:
        """Load the newest valid checkpoint, or cut the metrics back to nothing."""
        loaded = checkpoint.load_latest(
            self.directory.checkpoints, digests=self.digests, misfit=self.directory.misfit
        )
        if loaded is None:
            self.directory.truncate(0)
            return False
        state, _ = loaded
        self._check_processes(state.get("processes", 1))
        self._compute_as(state["machine"])
        self.load_state(state)
        self.stability.load(state["stability"])
        self.peak_before = state.get("peak_memory_mib", 0.0)
        self.conditions_before = state.get("conditions", [{}])  # {}: an older build did not say
        self.directory.truncate(state["metrics_offset"])
        return True

    def _check_processes(self, stored: int) -> None:
        if stored != self.processes:
            raise ValueError(
                f"{self.directory.path}: found checkpoints of a run of {stored} process(es), "
                f"expected {self.processes} as this one has: sums would be taken in another order. "
                f"Start it with torchrun --nproc-per-node {stored}, or give the experiment another "
                "name"
            )

    def _compute_as(self, stored: dict[str, Any]) -> None:
        """Go on as the checkpoint was made (another host may choose otherwise), so that the bits
        agree; on another kind of device keep this one's choices and say so."""
        choices = {key: value for key, value in stored.items() if key != "device"}
        if stored["device"] != self.compute.device.type:
            print(f"{self.run.run_name}: begun on {stored['device']}, so bits differ from here on")
            return
        self.compute_with(replace(self.compute, **choices))
        runtime.pin_threads(self.compute.threads)

    # ------------------------------------------------------------------- accumulate and evaluate

    def accumulate(self) -> Tensor:
        """Gradients of one step's whole batch; returns its mean loss, nats. Raises PeerLost."""
        batch = torch.from_numpy(self.windows.batch(self.step))
        if self.group is None:
            return self.gradients(batch)
        parameters = list(self.model.parameters())
        self.group.announce("step", self.step, self.scaler.get_scale())
        self.group.broadcast(parameters)
        return self.group.reduce(parameters, self.gradients(batch, self.group), False)

    def evaluate(self, board: EventFile) -> kill_rule.Verdict | None:
        """Log the dev loss and the rule's verdict; returns the one that stops the run, if it does.

        A run resumed at a check that it has logged repeats that verdict, by the part of the
        baseline's curve that there was then: it logs nothing twice.
        """
        logged = self.directory.rows("dev")
        again = bool(logged) and logged[-1]["step"] == self.step
        if not again:
            loss = dev_loss(self.model, self.compute, self.dev)
            if not loss < LARGEST_LOSS:
                raise NonFinite(
                    f"step {self.step}: the dev loss is {loss}; the last checkpoint is intact"
                )
            row = self._append(
                "dev", dev_loss=loss, dev_perplexity=math.exp(loss), elapsed_s=self.seconds
            )
            _show(board, row)
        earlier = [row for row in self.directory.rows("kill_rule") if row["step"] == self.step]
        self.judged, reference = self.verdict(earlier[-1]["baseline_checks"] if earlier else None)
        if self.judged is None:
            return None
        row = earlier[-1] if earlier else kill_rule.row(self.judged, reference, self.tokens)
        if not earlier:
            self._append("kill_rule", **row)
        if row["verdict"] != "kill" or self._rule.action != "stop":
            return None
        if not self.directory.rows("event"):
            self._append("event", event="killed", reason=self.judged.reason)
        return self.judged

    @property
    def _rule(self) -> kill_rule.KillRule:
        assert self.run.kill_rule is not None
        return self.run.kill_rule.in_run(self.training.tokens)

    def verdict(self, checks: int | None) -> tuple[kill_rule.Verdict | None, kill_rule.Curve]:
        """The rule's verdict, and the baseline's curve on disk at this moment, which it rests on
        (its first `checks`); None where the rule is not on. The rule waits for nothing."""
        if self.run.kill_rule is None or self.run.experiment == self.run.baseline or not self.step:
            return None, ()
        baseline = self.directory.path.parent / self.run.baseline_run_name
        ours = read_curve(self.directory.path)
        try:
            comparable = _comparable(self.directory.path, baseline)
            reference = read_curve(baseline)[:checks] if comparable else []
            return kill_rule.verdict(self._rule, reference, ours), reference
        except (ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
            print(f"{self.run.run_name}: no verdict: {baseline} cannot be read ({error!r})")
            return kill_rule.verdict(self._rule, [], ours), []

    # ----------------------------------------------------------------------------------- the log

    def log(self, board: EventFile, loss: float, norm: float, seconds: float) -> None:
        """The row of a training step, here and in TensorBoard."""
        row = self._append(
            "train",
            train_loss=loss,
            gradient_norm=norm if math.isfinite(norm) else None,
            learning_rate=learning_rate(self.training, self.step - 1),
            tokens_per_s=self.training.step_tokens / seconds,
            elapsed_s=self.seconds,
            **(runtime.gpu_stats(self.compute.device) if self.step % 10 == 0 else {}),
        )
        _show(board, row)
        perplexity = math.exp(min(loss, LARGEST_LOSS))
        board.add_scalar("train/perplexity", perplexity, self.step)
        board.add_scalar(
            "device/peak_memory_mib", runtime.peak_memory_mib(self.compute.device), self.step
        )

    def _append(self, kind: str, **values: Any) -> dict[str, Any]:
        row = {"step": self.step, "tokens": self.tokens, "kind": kind, **values}
        self.directory.append(row)
        return row

    def outcome(self, status: str, reason: str | None) -> Outcome:
        """How training ended, with what its log sums up to."""
        rows = self.directory.rows()
        trained = [row for row in rows if row["kind"] == "train"]
        dev = [row for row in rows if row["kind"] == "dev"]
        checks = [row for row in rows if row["kind"] == "kill_rule"]
        usages = [u for row in trained if (u := row.get("gpu_utilisation_percent")) is not None]
        metrics: dict[str, Any] = {
            "device_name": runtime.device_name(self.compute.device),
            "train_loss": final_loss(trained),
            "dev_loss": dev[-1]["dev_loss"] if dev else None,
            "dev_perplexity": dev[-1]["dev_perplexity"] if dev else None,
            "train_seconds": self.seconds,
            "tokens_per_s": statistics.median(row["tokens_per_s"] for row in trained)
            if trained
            else None,
            "gpu_utilisation_percent": statistics.mean(usages) if usages else None,
            "train_peak_memory_mib": self.peak_memory_mib,
            **self.stability.metrics(),
        }
        if self.judged is not None:
            metrics |= {
                "kill_verdict": self.judged.kind,
                "kill_verdict_literal": self.judged.literal_kind,
                "kill_action": self._rule.action,
                "kill_tokens": next((r["tokens"] for r in checks if r["verdict"] == "kill"), None),
                "kill_checks_without_baseline": sum(not r["baseline_check"] for r in checks),
            }
        return Outcome(
            status=status,
            reason=reason,
            step=self.step,
            model=self.model,
            compute=self.compute,
            processes=self.processes,
            conditions=tuple(self.conditions),
            metrics=metrics,
        )


@torch.no_grad()
def dev_loss(model: Transformer, compute: ComputeConfig, windows: Tensor) -> float:
    """Mean nats a token over (B, T + 1) windows. Blocks that training has compiled read whole
    micro-batches; a shorter last one would be compiled for itself alone."""
    weight = model.head.table.to(compute.dtype)
    total = torch.zeros((), device=compute.device, dtype=torch.float64)
    for part in windows.split(compute.micro_batch):
        part = part.to(compute.device)
        short = len(part) < compute.micro_batch
        with compute.autocast(), scoring.uncompiled(model) if short else contextlib.nullcontext():
            hidden = model.hidden(part[:, :-1])
            states = model.head.head_input(hidden).flatten(0, 1).to(compute.dtype)
        targets = part[:, 1:].flatten().split(compute.loss_chunk)
        for chunk, target in zip(states.split(compute.loss_chunk), targets, strict=True):
            logits = torch.nn.functional.linear(chunk, weight).float()
            total += torch.nn.functional.cross_entropy(logits, target, reduction="sum")
    return float(total / windows[:, 1:].numel())


def final_loss(trained: list[dict[str, Any]]) -> float | None:
    """Nats a token, mean over the last twentieth of the logged steps."""
    losses = [row["train_loss"] for row in trained]
    return float(np.mean(losses[-max(1, len(losses) // 20) :])) if losses else None


def _comparable(run: Path, baseline: Path) -> bool:
    try:
        configs = [
            yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
            for path in (run, baseline)
        ]
    except FileNotFoundError:
        return False
    return kill_rule.comparable(*configs)


def _show(board: EventFile, row: dict[str, Any]) -> None:
    for key, name in _SCALARS.items():
        if row.get(key) is not None:
            board.add_scalar(name, row[key], row["step"])


def board_final(directory: RunDir, measured: dict[str, Any], step: int) -> None:
    """The numbers of the final evaluation, as scalars at the last step."""
    views = directory.path / "tensorboard"
    for cut in views.glob(f"*{_FINAL}"):  # by a kill before metrics.json
        cut.unlink()
    with EventFile(views, step + 1, _FINAL) as board:
        for name, value in measured.items():
            if isinstance(value, int | float):
                board.add_scalar(f"final/{name}", value, step)
