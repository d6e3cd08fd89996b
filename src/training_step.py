"""One training step, for all that trains here: pretraining, phase 0 and instruction tuning.

Gradients of a batch, clip, step at a rate, save, restore; by one process or several.
Shapes: B sequences of a micro-batch, T tokens, N rows of the head, V vocabulary. Losses are nats a
token.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src.compute import runtime
from src.compute.compute_config import ComputeConfig
from src.compute.process_group import ProcessGroup
from src.data.tokens import TokenData, Windows, consecutive_windows
from src.models.loss import chunked_cross_entropy
from src.models.transformer import Transformer
from src.spec.config import ModelConfig, RunConfig, TrainingConfig
from src.storage import checkpoint
from src.storage.run_dir import Preemption

# fp16 only: skipped steps in a row after which the scaler has nothing left to lower.
MOST_SKIPPED_STEPS = 40


class NonFinite(RuntimeError):
    """Loss or gradient norm is NaN or infinite; raised before the optimizer step."""


# ---------------------------------------------------------------------------------- the recipe


def build_model(config: ModelConfig, init_seed: int) -> Transformer:
    """The freshly initialised model of a seed."""
    runtime.seed_everything(init_seed)
    return Transformer(config)


def build_optimizer(model: Transformer, training: TrainingConfig) -> torch.optim.AdamW:
    """AdamW (0.9, 0.95); groups: tables (own rate, decayed), matrices (decayed), norms."""
    groups: dict[str, list[Tensor]] = {"embedding": [], "matrix": [], "norm": []}
    for name, parameter in model.named_parameters():
        is_embedding = name.endswith(("table", "projection"))
        groups["embedding" if is_embedding else "matrix" if parameter.ndim == 2 else "norm"].append(
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


def learning_rate(training: TrainingConfig, step: int) -> float:
    """Linear warm-up, then linear to zero (arXiv 2502.15938) over the run's own budget."""
    warmup, steps = training.warmup_steps, training.steps
    if step < warmup:
        return training.learning_rate * (step + 1) / warmup
    return training.learning_rate * max(0, steps - step) / (steps - warmup)


def training_windows(data: TokenData, training: TrainingConfig) -> Windows:
    """The batches of a run, by step."""
    assert training.data_seed is not None
    return Windows(
        data.train.tokens,
        batch_size=training.batch_size,
        seq_len=training.seq_len,
        seed=training.data_seed,
    )


def dev_windows(data: TokenData, training: TrainingConfig) -> Tensor:
    """(B, T + 1) of the validation split, as training checks itself on."""
    return torch.from_numpy(
        consecutive_windows(
            data.validation.tokens, limit=training.dev_token_budget, seq_len=training.seq_len
        )
    )


def compile_blocks(model: Transformer, compute: ComputeConfig) -> None:
    """Compile each block, where that was chosen; one code serves all blocks of a shape."""
    if compute.compile:
        torch.compiler.reset()  # or the ninth shape in one process would silently run eager
        for block in model.blocks:
            block.compile(dynamic=False)


def next_token_loss(
    model: Transformer,
    tokens: Tensor,
    compute: ComputeConfig,
    z_loss: float,
    scored: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(B, T + 1) -> objective and mean loss over the targets that `scored` (B, T) picks, or all."""
    targets = tokens[:, 1:]
    with compute.autocast():
        hidden = model.hidden(tokens[:, :-1])  # (B, T, D)
        picked = hidden.flatten(0, 1) if scored is None else hidden[scored]  # (N, D)
        states = model.head.head_input(picked)  # (N, D or E)
    return chunked_cross_entropy(
        states,
        model.head.table,
        targets.flatten() if scored is None else targets[scored],
        z_loss,
        chunk=compute.loss_chunk,
        dtype=compute.dtype,
        compiled=compute.compile,
    )


def batch_gradients(
    model: Transformer, batch: Tensor, compute: ComputeConfig, z_loss: float,
    scale: Callable[[Tensor], Tensor], group: ProcessGroup | None = None,
) -> Tensor:  # fmt: skip
    """Add the gradients of a batch (all micro-batches of it), or of this process's share; returns
    its loss.

    Both are shares of the whole batch's mean: summed over the group they are the mean. `scale` is
    the gradient scaler's.
    """
    if group is not None:
        batch = group.share(batch)
    if compute.device.type == "cuda":
        batch = batch.pin_memory().to(compute.device, non_blocking=True)
    parts = batch.split(math.gcd(len(batch), compute.micro_batch))
    count = len(parts) * (1 if group is None else group.size)
    loss = torch.zeros((), device=compute.device)
    for part in parts:
        objective, part_loss = next_token_loss(model, part, compute, z_loss)
        scale(objective / count).backward()
        loss += part_loss / count
    return loss


# ------------------------------------------------------------------------------------ the step


class Stepper:
    """Model, optimizer, scaler and clock of one training, their checkpoints, and its step."""

    def __init__(
        self, model: Transformer, training: TrainingConfig, compute: ComputeConfig
    ) -> None:
        self.model, self.training = model, training
        self.optimizer = build_optimizer(model, training)
        self.compute_with(compute)
        self.step = 0
        self.skipped = 0  # consecutive fp16 steps without an update
        self.seconds_before = 0.0  # of earlier attempts
        self.begun = time.perf_counter()

    def compute_with(self, compute: ComputeConfig) -> None:
        """Before the first step, or as a checkpoint was made."""
        self.compute = compute
        enabled = compute.precision == "fp16"
        self.scaler = torch.amp.GradScaler(compute.device.type, enabled=enabled)

    @property
    def seconds(self) -> float:
        """Of all attempts."""
        return self.seconds_before + time.perf_counter() - self.begun

    def gradients(self, batch: Tensor, group: ProcessGroup | None = None) -> Tensor:
        """Add those of (B, T + 1) tokens; returns the mean loss."""
        return batch_gradients(
            self.model, batch, self.compute, self.training.z_loss, self.scaler.scale, group
        )

    def update(self, batch_loss: Tensor, rate: float) -> tuple[float, float]:
        """Clip and step; returns (loss, gradient norm). Raises NonFinite before the step."""
        self.scaler.unscale_(self.optimizer)
        raw_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.training.grad_clip)
        # The step's only wait for the device.
        loss, norm = torch.stack((batch_loss, raw_norm)).tolist()
        overflowed = self.scaler.is_enabled() and not math.isfinite(norm)
        self.skipped = self.skipped + 1 if overflowed else 0
        tolerated = overflowed and self.skipped <= MOST_SKIPPED_STEPS  # the scaler skips the step
        if not math.isfinite(loss) or not (math.isfinite(norm) or tolerated):
            raise NonFinite(
                f"step {self.step + 1}: loss {loss}, gradient norm {norm}; the last checkpoint is "
                "intact. Lower the learning rate (training.learning_rate) or set "
                "training.precision=fp32"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_ratio"]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss, norm

    def save_state(
        self, directory: Path, digests: dict[str, str],
        on_saved: Callable[[Path, Path], None] | None = None, **more: Any,
    ) -> None:  # fmt: skip
        """One checkpoint of this instant, `more` beside what every training has."""
        state = {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "skipped": self.skipped,
            "rng": checkpoint.pack_rng(),
            "seconds": self.seconds,
            **more,
        }
        checkpoint.save(
            directory,
            state,
            step=self.step,
            digests=digests,
            environment=runtime.environment_stamp(self.compute.device),
            on_saved=on_saved,
        )

    def load_state(self, state: dict[str, Any]) -> None:
        """Take on what `save_state` has saved."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty where the checkpoint's machine needed none
            self.scaler.load_state_dict(state["scaler"])
        self.step, self.skipped = state["step"], state["skipped"]
        self.seconds_before = state["seconds"]
        checkpoint.restore_rng(state["rng"])


# ----------------------------------------------------------------------------- several processes


def serve_gradients(
    run: RunConfig, config: ModelConfig, data: TokenData, group: ProcessGroup
) -> int:
    """What every process but rank 0 does under torchrun: gradients of its share, until rank 0 ends
    it; returns the exit code that it says.

    A signal is passed on with the next gradients: rank 0 decides, saves and shuts down. Raises
    PeerLost where it is gone.
    """
    training = run.training
    assert training.init_seed is not None
    with Preemption() as stop:
        kind, content = group.receive()
        if kind == "end":
            return int(content)
        compute = ComputeConfig(device=group.device, **content)
        runtime.pin_threads(compute.threads)
        if training.deterministic:
            runtime.deterministic()
        model = build_model(config, training.init_seed).to(compute.device)
        compile_blocks(model, compute)
        windows = training_windows(data, training)
        parameters = list(model.parameters())
        while (message := group.receive())[0] == "step":
            _, step, scale = message
            group.broadcast(parameters)
            loss = batch_gradients(
                model, torch.from_numpy(windows.batch(step)), compute, training.z_loss,
                partial(torch.mul, other=scale), group,
            )  # fmt: skip
            group.reduce(parameters, loss, stop.requested)
            model.zero_grad(set_to_none=True)
        if stop.requested:
            print(f"process {group.rank}: stopped by {stop.signal_name}", file=sys.stderr)
        return int(message[1])
