"""Training, told once from top to bottom: evaluate, save, stop?, accumulate, step, log.

Shapes: B sequences of a micro-batch, T tokens, N = B * T rows of the head, V vocabulary.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from src.compute import conditions, runtime
from src.compute.compute_config import Machine
from src.compute.process_group import Team
from src.data.tokens import TokenData, Windows, consecutive_windows
from src.evaluation import scoring
from src.evaluation.stability import Stability
from src.models.loss import chunked_cross_entropy
from src.models.transformer import Transformer
from src.spec import kill_rule
from src.spec.config import ModelConfig, RunConfig, TrainingConfig
from src.spec.progress import Progress
from src.storage import checkpoint
from src.storage.event_file import EventFile
from src.storage.run_dir import Preemption, RunDir, read_curve

# Rows in metrics.jsonl for training; a longer run logs every k-th step.
MOST_TRAIN_ROWS = 5_000
# fp16 only: skipped steps in a row after which the scaler has nothing left to lower.
MOST_SKIPPED_STEPS = 40
# Nats a token; its exponential, the perplexity, is still a number.
LARGEST_LOSS = 700.0
_UTILISATION = "gpu_utilisation_percent"
_FINAL = ".final"  # event files of the final evaluation


class NonFinite(RuntimeError):
    """Loss or gradient norm is NaN or infinite; raised before the optimizer step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How training ended. status: "trained", "killed" (by the rule) or "preempted"."""

    status: str
    reason: str | None
    step: int
    train_loss: float | None  # nats a token, mean over the last twentieth of the logged steps
    dev_loss: float | None  # nats a token on the dev windows at the last evaluation
    train_seconds: float  # over all attempts
    tokens_per_s: float | None  # median over logged steps
    gpu_utilisation_percent: float | None  # mean of samples; None on a CPU
    peak_memory_mib: float
    device_name: str
    machine: Machine  # as computed with: a resumed run goes on as it began
    processes: int  # that shared each batch
    conditions: tuple[dict[str, Any], ...]  # several where a resume changed them
    kill_verdict: str | None  # "kill", "keep", "none"; None where the rule is not on
    kill_verdict_literal: str | None  # the PRD's rule without grace
    kill_action: str | None  # "stop" or "record"; None where the rule is not on
    kill_tokens: int | None  # at the check that first said kill
    kill_checks_without_baseline: int | None  # checks made before the baseline's check was there
    largest_rises: dict[str, float | int | None]  # of loss and gradient norm, as in metrics.json
    model: Transformer


# ---------------------------------------------------------------------------------- the recipe


def build_model(config: ModelConfig, init_seed: int) -> Transformer:
    """The freshly initialised model of a seed."""
    runtime.seed_everything(init_seed)
    return Transformer(config)


def build_optimizer(model: Transformer, training: TrainingConfig) -> torch.optim.AdamW:
    """AdamW (0.9, 0.95); groups: tables (own rate, decayed), matrices (decayed), norms."""
    groups: dict[str, list[Tensor]] = {"embedding": [], "matrix": [], "norm": []}
    for name, parameter in model.named_parameters():
        is_table = name.endswith(("table", "projection"))
        groups["embedding" if is_table else "matrix" if parameter.ndim == 2 else "norm"].append(
            parameter
        )
    ratio = {"embedding": training.embedding_lr_ratio, "matrix": 1.0, "norm": 1.0}
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "lr_ratio": ratio[name],
                "weight_decay": 0.0 if name == "norm" else training.weight_decay,
            }
            for name, parameters in groups.items()
        ],
        lr=training.learning_rate,
        betas=(0.9, 0.95),
        eps=1e-8,
        fused=True,
    )


def next_token_loss(
    model: Transformer,
    tokens: Tensor,
    machine: Machine,
    z_loss: float,
    scored: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(B, T + 1) -> objective and mean nats over the targets that `scored` (B, T) picks, or all."""
    targets = tokens[:, 1:]
    with machine.autocast():
        hidden = model.hidden(tokens[:, :-1])  # (B, T, D)
        picked = hidden.flatten(0, 1) if scored is None else hidden[scored]  # (N, D)
        rows = model.head.head_input(picked)  # (N, D or E)
    return chunked_cross_entropy(
        rows,
        model.head.table,
        targets.flatten() if scored is None else targets[scored],
        z_loss,
        chunk=machine.loss_chunk,
        dtype=machine.dtype,
        compiled=machine.compile,
    )


def batch_gradients(
    model: Transformer, windows: Windows, step: int, machine: Machine, z_loss: float,
    scale: Callable[[Tensor], Tensor], team: Team | None = None,
) -> Tensor:  # fmt: skip
    """Add the gradients of a step's batch, or of this process's share of it; returns its nats.

    Both are shares of the whole batch's mean: summed over the team they are the mean. `scale` is
    the gradient scaler's.
    """
    batch = torch.from_numpy(windows.batch(step))
    if team is not None:
        batch = team.share(batch)
    if machine.device.type == "cuda":
        batch = batch.pin_memory().to(machine.device, non_blocking=True)
    parts = batch.split(math.gcd(len(batch), machine.micro_batch))
    count = len(parts) * (1 if team is None else team.size)
    nats = torch.zeros((), device=machine.device)
    for part in parts:
        objective, part_nats = next_token_loss(model, part, machine, z_loss)
        scale(objective / count).backward()
        nats += part_nats / count
    return nats


def compile_blocks(model: Transformer, machine: Machine) -> None:
    """Compile each block, where that was chosen; one code serves all blocks of a shape."""
    if machine.compile:
        torch.compiler.reset()  # or the ninth shape in one process would silently run eager
        for block in model.blocks:
            block.compile(dynamic=False)


def learning_rate(training: TrainingConfig, step: int) -> float:
    """Linear warm-up, then linear to zero (arXiv 2502.15938) over the run's own budget."""
    warmup, steps = training.warmup_steps, training.steps
    if step < warmup:
        return training.learning_rate * (step + 1) / warmup
    return training.learning_rate * max(0, steps - step) / (steps - warmup)


# ------------------------------------------------------------------------------------- the state


class Trainer:
    """Everything that a checkpoint holds, and how it is saved and restored."""

    def __init__(
        self, run: RunConfig, config: ModelConfig, data: TokenData, directory: RunDir,
        machine: Machine, digests: dict[str, str], on_saved: Callable[[Path, Path], None] | None,
        team: Team | None = None,
    ) -> None:  # fmt: skip
        assert run.training.init_seed is not None and run.training.data_seed is not None
        self.run, self.training, self.machine = run, run.training, machine
        self.directory, self.digests, self.on_saved = directory, digests, on_saved
        self.team = team
        self.model = build_model(config, run.training.init_seed).to(machine.device)
        self.optimizer = build_optimizer(self.model, run.training)
        self.scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.precision == "fp16")
        self.windows = Windows(
            data.train.tokens,
            batch_size=run.training.batch_size,
            seq_len=run.training.seq_len,
            seed=run.training.data_seed,
        )
        self.dev = torch.from_numpy(
            consecutive_windows(
                data.validation.tokens,
                limit=run.training.dev_token_budget,
                seq_len=run.training.seq_len,
            )
        )
        self.step = 0
        self.skipped = 0  # consecutive fp16 steps without an update
        self.stability = Stability()
        self.seconds_before = 0.0  # of earlier attempts
        self.conditions_before: list[dict[str, Any]] = []  # likewise
        self.peak_before = 0.0  # MiB, likewise
        self.first_step = 0  # of this attempt
        self.begun = time.perf_counter()
        runtime.reset_peak_memory(machine.device)

    @property
    def seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.begun

    @property
    def peak_memory_mib(self) -> float:
        """Of all attempts that took a step."""
        if self.step == self.first_step:
            return self.peak_before
        return max(self.peak_before, runtime.peak_memory_mib(self.machine.device))

    @property
    def processes(self) -> int:
        return 1 if self.team is None else self.team.size

    @property
    def conditions(self) -> list[dict[str, Any]]:
        """What the bits depend on, now and at earlier attempts, each once."""
        now = conditions.found(self.machine, self.processes)
        return [*self.conditions_before, *([] if now in self.conditions_before else [now])]

    def save(self) -> None:
        """One checkpoint of this instant; metrics.jsonl is made durable first."""
        self.directory.sync()
        state = {
            "step": self.step,
            "processes": self.processes,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "skipped": self.skipped,
            "stability": self.stability.state(),
            "rng": checkpoint.pack_rng(),
            "metrics_offset": self.directory.offset(),
            "seconds": self.seconds,
            "peak_memory_mib": self.peak_memory_mib,
            "conditions": self.conditions,
            "machine": {
                "device": self.machine.device.type,
                "precision": self.machine.precision,
                "micro_batch": self.machine.micro_batch,
                "compile": self.machine.compile,
                "threads": self.machine.threads,
                "loss_chunk": self.machine.loss_chunk,
            },
        }
        checkpoint.save(
            self.directory.checkpoints,
            state,
            step=self.step,
            digests=self.digests,
            environment=runtime.environment_stamp(self.machine.device),
            on_saved=self.on_saved,
        )

    def restore(self) -> bool:
        """Load the newest valid checkpoint, or cut the record back to nothing."""
        found = checkpoint.load_latest(
            self.directory.checkpoints, digests=self.digests, misfit=self.directory.misfit
        )
        if found is None:
            self.directory.truncate(0)
            return False
        state, _ = found
        self._check_processes(state.get("processes", 1))
        self._compute_as(state["machine"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step = self.first_step = state["step"]
        self.skipped = state["skipped"]
        self.stability.load(state["stability"])
        self.seconds_before = state["seconds"]
        self.peak_before = state.get("peak_memory_mib", 0.0)
        self.conditions_before = state.get("conditions", [{}])  # {}: an older build did not say
        checkpoint.restore_rng(state["rng"])
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
        if stored["device"] != self.machine.device.type:
            print(f"{self.run.run_name}: begun on {stored['device']}, so bits differ from here on")
            return
        self.machine = replace(self.machine, **choices)
        runtime.pin_threads(self.machine.threads)
        enabled = self.machine.precision == "fp16"
        self.scaler = torch.amp.GradScaler(self.machine.device.type, enabled=enabled)

    def compile(self) -> None:
        compile_blocks(self.model, self.machine)

    # ------------------------------------------------------------------------------ one step

    def accumulate(self) -> Tensor:
        """Gradients of one step's whole batch; returns its mean nats. Raises PeerLost."""
        parameters = list(self.model.parameters())
        if self.team is not None:
            self.team.tell("step", self.step, self.scaler.get_scale())
            self.team.spread(parameters)
        nats = batch_gradients(
            self.model, self.windows, self.step, self.machine, self.training.z_loss,
            self.scaler.scale, self.team,
        )  # fmt: skip
        return nats if self.team is None else self.team.add_up(parameters, nats, False)

    def update(self, nats: Tensor) -> tuple[float, float]:
        """Clip and step; returns (nats, gradient norm). Raises NonFinite before the step."""
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.training.grad_clip)
        loss, size = torch.stack((nats, norm)).tolist()  # the step's only wait for the device
        overflowed = self.scaler.is_enabled() and not math.isfinite(size)
        self.skipped = self.skipped + 1 if overflowed else 0
        tolerated = overflowed and self.skipped <= MOST_SKIPPED_STEPS  # the scaler skips the step
        if not math.isfinite(loss) or not (math.isfinite(size) or tolerated):
            raise NonFinite(
                f"step {self.step + 1}: loss {loss}, gradient norm {size}; the last checkpoint is "
                "intact. Lower training.learning_rate or set training.precision=fp32"
            )
        rate = learning_rate(self.training, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_ratio"]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss, size

    @torch.no_grad()
    def dev_loss(self) -> float:
        """Mean nats a token over the dev windows."""
        total = torch.zeros((), device=self.machine.device, dtype=torch.float64)
        rows = 0
        for part in self.dev.split(self.machine.micro_batch):
            part = part.to(self.machine.device)
            with self.machine.autocast(), scoring.uncompiled(self.model):
                hidden = self.model.hidden(part[:, :-1])
                head_rows = self.model.head.head_input(hidden).flatten(0, 1)
            targets = part[:, 1:].flatten()
            total += _sum_nats(head_rows, self.model.head.table, targets, self.machine)
            rows += targets.numel()
        return float(total / rows)


def _sum_nats(rows: Tensor, table: Tensor, targets: Tensor, machine: Machine) -> Tensor:
    chunk = machine.loss_chunk
    weight = table.to(machine.dtype)
    total = torch.zeros((), device=rows.device, dtype=torch.float64)
    for part, target in zip(rows.split(chunk), targets.split(chunk), strict=True):
        logits = torch.nn.functional.linear(part.to(machine.dtype), weight).float()
        total += torch.nn.functional.cross_entropy(logits, target, reduction="sum")
    return total


# -------------------------------------------------------------------------------------- the loop


def train(
    run: RunConfig,
    config: ModelConfig,
    data: TokenData,
    directory: RunDir,
    machine: Machine,
    *,
    digests: dict[str, str],
    on_saved: Callable[[Path, Path], None] | None = None,
    fenced: Callable[[], bool] = lambda: False,
    team: Team | None = None,
) -> Outcome:
    """Train `run` from its last checkpoint to its end, a kill verdict or a signal.

    `fenced()` says that another machine has taken this run over: then stop as at a signal.

    `team`: the processes that share each batch, where there are more than this one.

    Raises NonFinite, OSError (disk), PeerLost, ValueError (a checkpoint that does not fit).
    """
    trainer = Trainer(run, config, data, directory, machine, digests, on_saved, team)
    training = run.training
    resumed = trainer.restore()
    trainer.compile()
    if team is not None:
        choices = {f.name: getattr(trainer.machine, f.name) for f in fields(Machine)}
        team.tell("begin", {name: choices[name] for name in choices if name != "device"})
    steps, every = training.steps, training.eval_every_steps
    log_every = math.ceil(steps / MOST_TRAIN_ROWS)
    board = EventFile(directory.path / "tensorboard", trainer.step + 1 if resumed else 0)
    status, reason = "trained", None
    saved_at, saved_step = time.perf_counter(), trainer.step if resumed else -1
    _freeze_garbage()
    progress = Progress(run.run_name, steps, "steps", done=trainer.step)
    with Preemption() as stop, board, progress:
        while True:
            step = trainer.step
            last = step == steps
            if step % every == 0 or last:
                again = _evaluated(directory, step)
                if not again:
                    row = _dev_row(trainer, step)
                    directory.append(row)
                    _board_dev(board, row, training)
                # Asked again by a run that was cut between its kill and its metrics.json.
                verdict, reference = _verdict(run, directory, step)
                if verdict is not None and not again:
                    directory.append(_verdict_row(step, training, verdict, reference))
                if verdict is not None and verdict.kind == "kill" and _stops(run):
                    if not directory.rows("event"):
                        directory.append(_kill_row(step, training, verdict))
                    status, reason = "killed", verdict.reason
            minutes = (time.perf_counter() - saved_at) / 60
            chosen = training.checkpoint_every_steps
            due = minutes >= training.checkpoint_minutes or (chosen and step % chosen == 0)
            leaving = stop.requested or fenced() or (team is not None and team.stop)
            ending = last or leaving or status == "killed"
            if (due or ending) and step != saved_step:
                trainer.save()
                saved_at, saved_step = time.perf_counter(), step
            if status == "killed" or last:
                break
            if leaving:
                status, reason = "preempted", stop.signal_name or _other_reason(team)
                break
            begun = time.perf_counter()
            loss, norm = trainer.update(trainer.accumulate())
            trainer.step += 1
            trainer.stability.see(trainer.step, loss, norm)
            if trainer.step % log_every == 0 or trainer.step == steps:
                row = _train_row(trainer, loss, norm, time.perf_counter() - begun)
                directory.append(row)
                _board_train(board, row, trainer.machine)
            progress.advance(1, f"train loss {loss:.4f}")
    if stop.requested and status == "trained":  # it came too late for a step: during the last save
        status, reason = "preempted", stop.signal_name
    gc.unfreeze()
    return _outcome(trainer, status, reason, _verdict(run, directory, trainer.step)[0])


def _other_reason(team: Team | None) -> str:
    signalled = team is not None and team.stop
    return "a signal to another process" if signalled else "another machine has this run"


def _outcome(
    trainer: Trainer, status: str, reason: str | None, verdict: kill_rule.Verdict | None
) -> Outcome:
    rows = trainer.directory.rows()
    trained = [row for row in rows if row["kind"] == "train"]
    dev = [row["dev_loss"] for row in rows if row["kind"] == "dev"]
    losses = [row["train_loss"] for row in trained]
    used = [row[_UTILISATION] for row in trained if _UTILISATION in row]
    checks = [row for row in rows if row["kind"] == "kill_rule"]
    rule = trainer.run.kill_rule if verdict else None
    device = trainer.machine.device
    return Outcome(
        status=status,
        reason=reason,
        step=trainer.step,
        train_loss=float(np.mean(losses[-max(1, len(losses) // 20) :])) if losses else None,
        dev_loss=dev[-1] if dev else None,
        train_seconds=trainer.seconds,
        tokens_per_s=statistics.median(row["tokens_per_s"] for row in trained) if trained else None,
        gpu_utilisation_percent=statistics.mean(used) if used else None,
        peak_memory_mib=trainer.peak_memory_mib,
        device_name=runtime.device_name(device),
        machine=trainer.machine,
        processes=trainer.processes,
        conditions=tuple(trainer.conditions),
        kill_verdict=verdict.kind if verdict else None,
        kill_verdict_literal=verdict.literal_kind if verdict else None,
        kill_action=rule.action if rule else None,
        kill_tokens=next((row["tokens"] for row in checks if row["verdict"] == "kill"), None),
        kill_checks_without_baseline=sum(not row["baseline_check"] for row in checks)
        if rule
        else None,
        largest_rises=trainer.stability.metrics(),
        model=trainer.model,
    )


def _freeze_garbage() -> None:
    """Nothing built so far is garbage; scanning it at every collection costs time."""
    gc.collect()
    gc.freeze()


def _evaluated(directory: RunDir, step: int) -> bool:
    """Whether the dev row of this step is in the record (a run resumed at an evaluation)."""
    rows = directory.rows("dev")
    return bool(rows) and rows[-1]["step"] == step


def _dev_row(trainer: Trainer, step: int) -> dict[str, Any]:
    loss = trainer.dev_loss()
    if not loss < LARGEST_LOSS:
        raise NonFinite(f"step {step}: the dev loss is {loss}; the last checkpoint is intact")
    return {
        "step": step,
        "tokens": step * trainer.training.step_tokens,
        "kind": "dev",
        "dev_loss": loss,
        "dev_perplexity": math.exp(loss),
        "elapsed_s": trainer.seconds,
    }


def _train_row(trainer: Trainer, loss: float, norm: float, seconds: float) -> dict[str, Any]:
    training = trainer.training
    return {
        "step": trainer.step,
        "tokens": trainer.step * training.step_tokens,
        "kind": "train",
        "train_loss": loss,
        "gradient_norm": norm if math.isfinite(norm) else None,
        "learning_rate": learning_rate(training, trainer.step - 1),
        "tokens_per_s": training.step_tokens / seconds,
        "elapsed_s": trainer.seconds,
        **(runtime.gpu_stats(trainer.machine.device) if trainer.step % 10 == 0 else {}),
    }


# --------------------------------------------------------------------------------- the kill rule


def _verdict(
    run: RunConfig, directory: RunDir, step: int
) -> tuple[kill_rule.Verdict | None, kill_rule.Curve]:
    """The rule's verdict, and the baseline's curve on disk at this moment, which it rests on; None
    where the rule is not on. The rule waits for nothing."""
    if run.kill_rule is None or run.experiment == run.baseline or step == 0:
        return None, ()
    rule = run.kill_rule.in_run(run.training.tokens)
    baseline = directory.path.parent / run.baseline_run_name
    reference = read_curve(baseline) if _comparable(directory.path, baseline) else []
    return kill_rule.verdict(rule, reference, read_curve(directory.path)), reference


def _stops(run: RunConfig) -> bool:
    return run.kill_rule is not None and run.kill_rule.action == "stop"


def _verdict_row(
    step: int, training: TrainingConfig, verdict: kill_rule.Verdict, reference: kill_rule.Curve
) -> dict[str, Any]:
    """One check by the rule, and the part of the baseline's curve that was there to check by."""
    tokens = step * training.step_tokens
    return {
        "step": step,
        "tokens": tokens,
        "kind": "kill_rule",
        "verdict": verdict.kind,
        "verdict_literal": verdict.literal_kind,
        "baseline_check": any(seen == tokens for seen, _ in reference),
        "baseline_checks": len(reference),
        "baseline_tokens": reference[-1][0] if reference else None,
    }


def _comparable(mine: Path, baseline: Path) -> bool:
    try:
        ours, theirs = (
            yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
            for path in (mine, baseline)
        )
    except FileNotFoundError:
        return False
    return kill_rule.comparable(ours, theirs)


def _kill_row(step: int, training: TrainingConfig, verdict: kill_rule.Verdict) -> dict[str, Any]:
    return {
        "step": step,
        "tokens": step * training.step_tokens,
        "kind": "event",
        "event": "killed",
        "reason": verdict.reason,
    }


# ---------------------------------------------------------------------------------------- views


def _board_dev(board: EventFile, row: dict[str, Any], training: TrainingConfig) -> None:
    board.add_scalar("dev/loss", row["dev_loss"], row["step"])
    board.add_scalar("dev/perplexity", row["dev_perplexity"], row["step"])


def _board_train(board: EventFile, row: dict[str, Any], machine: Machine) -> None:
    step = row["step"]
    board.add_scalar("train/loss", row["train_loss"], step)
    board.add_scalar("train/perplexity", math.exp(min(row["train_loss"], LARGEST_LOSS)), step)
    board.add_scalar("train/learning_rate", row["learning_rate"], step)
    board.add_scalar("train/tokens_per_s", row["tokens_per_s"], step)
    board.add_scalar("device/peak_memory_mib", runtime.peak_memory_mib(machine.device), step)
    for name in (_UTILISATION, "gpu_memory_mib"):
        if name in row:
            board.add_scalar(f"device/{name}", row[name], step)


def board_final(directory: RunDir, measured: dict[str, Any], step: int) -> None:
    """The numbers of the final evaluation, as scalars at the last step."""
    views = directory.path / "tensorboard"
    for cut in views.glob(f"*{_FINAL}"):  # by a kill before metrics.json
        cut.unlink()
    with EventFile(views, step + 1, _FINAL) as board:
        for name, value in measured.items():
            if isinstance(value, int | float):
                board.add_scalar(f"final/{name}", value, step)
