"""What phase 0 trains: a memorised batch and a ramp of learning rates.

Shapes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src.compute import runtime
from src.compute.compute_config import ComputeConfig
from src.data.tokens import Windows
from src.models.transformer import Transformer
from src.preflight import RunContext
from src.run import Preempted
from src.spec import config
from src.spec.allocation import Allocation
from src.spec.config import RunConfig
from src.spec.metric_keys import EMBEDDING_RATIO, TOTAL_PARAMS
from src.spec.progress import Progress
from src.storage import checkpoint
from src.storage.files import write_json
from src.storage.run_dir import Preemption
from src.training_step import (
    NonFinite,
    Stepper,
    build_model,
    next_token_loss,
    training_windows,
)

OVERFIT_TOKENS = 1_024
OVERFIT_LOSS = 0.1  # nats a token
OVERFIT_STEPS = 500
INITIAL_TOLERANCE = 0.1  # nats around ln V
RANGE_STEPS = 100
RANGE_LOW, RANGE_HIGH = 1e-5, 0.3
RANGE_RULE = (
    "where the smoothed loss falls fastest per decade of an exponential ramp from "
    f"{RANGE_LOW:g} to {RANGE_HIGH:g} in {RANGE_STEPS} steps (Smith 2017, arXiv 1506.01186)"
)
LEAST_FALL = 0.1  # nats; a ramp that falls less has no slope to read
SMOOTHING = 0.8  # of the ramp's losses
DIVERGED = 1.5  # nats above the lowest smoothed loss: the ramp ends


def fresh_stepper(run: RunConfig, allocation: Allocation, compute: ComputeConfig) -> Stepper:
    """A fresh model of the run. Not decayed: a ramp and a memorised batch have no schedule."""
    assert run.training.init_seed is not None
    model = build_model(allocation.model, run.training.init_seed).to(compute.device)
    return Stepper(model, dataclasses.replace(run.training, weight_decay=0.0), compute)


def train_once(stepper: Stepper, batch: Tensor, rate: float) -> float:
    """One update on (B, T + 1); returns the batch's nats before it, NaN where it diverged."""
    try:
        return stepper.update(stepper.gradients(batch), rate)[0]
    except NonFinite:
        return math.nan


# ----------------------------------------------------------------------------------- the checks


def initial_loss(stepper: Stepper, batch: Tensor) -> float:
    """Nats of the untrained model; close to ln V, or the initialisation prefers some tokens."""
    with torch.no_grad():
        first = batch[: stepper.compute.micro_batch].to(stepper.compute.device)
        _, nats = next_token_loss(stepper.model, first, stepper.compute, stepper.training.z_loss)
    return float(nats)


def overfit(stepper: Stepper, batch: Tensor, name: str) -> tuple[float, int]:
    """Memorise one batch at the run's own rate, warmed up over 20 steps; (last loss, steps)."""
    loss, number = math.inf, 0
    with Progress(f"{name}: memorising a batch", OVERFIT_STEPS, "steps at most") as progress:
        while number < OVERFIT_STEPS and loss >= OVERFIT_LOSS:  # NaN is not
            number += 1
            loss = train_once(stepper, batch, stepper.training.learning_rate * min(1, number / 20))
            progress.advance(1, f"loss {loss:.3f}")
    return loss, number


def ramp(step: Callable[[int, float], float], name: str) -> list[dict[str, float | int]]:
    """Losses under exponentially growing rates: rows of step, learning_rate, loss, smoothed.

    step(number, rate) trains once and gives its loss. Ends where the loss has diverged.
    """
    rows: list[dict[str, float | int]] = []
    average, lowest = 0.0, math.inf
    with Progress(f"{name}: learning rates", RANGE_STEPS, "steps at most") as progress:
        for number in range(RANGE_STEPS):
            rate = RANGE_LOW * (RANGE_HIGH / RANGE_LOW) ** (number / (RANGE_STEPS - 1))
            loss = step(number, rate)
            if not math.isfinite(loss):
                break
            average = SMOOTHING * average + (1 - SMOOTHING) * loss
            smoothed = average / (1 - SMOOTHING ** (number + 1))
            rows.append({"step": number, "learning_rate": rate, "loss": loss, "smoothed": smoothed})
            progress.advance(1, f"rate {rate:.1e}, loss {loss:.3f}")
            lowest = min(lowest, smoothed)
            if smoothed > lowest + DIVERGED:
                break
    return rows


def suggested_rate(rows: Sequence[dict[str, float | int]]) -> float | None:
    """RANGE_RULE; None where the loss hardly fell.

    The slope at a row is taken over its neighbours on both sides, up to the lowest point.
    """
    smoothed = [row["smoothed"] for row in rows]
    lowest = smoothed.index(min(smoothed)) if rows else 0
    if lowest < 2 or smoothed[0] - smoothed[lowest] < LEAST_FALL:
        return None
    steepest = max(range(1, lowest), key=lambda i: smoothed[i - 1] - smoothed[i + 1])
    return float(rows[steepest]["learning_rate"])


def blocks(model: Transformer) -> dict[str, int]:
    """Parameters of the built model by block, counted tensor by tensor."""
    counts = {"embedding": 0, "projection": 0, "attention": 0, "ffn": 0, "norm": 0}
    for name, parameter in model.named_parameters():
        if name.endswith("table"):
            block = "embedding"
        elif name.endswith("projection"):
            block = "projection"
        elif parameter.ndim == 1:
            block = "norm"
        else:
            block = "ffn" if ".ffn." in name else "attention"
        counts[block] += parameter.numel()
    return counts


# ---------------------------------------------------------------------------------- the phase


def resumable(
    stepper: Stepper, windows: Windows, directory: Path, digests: dict[str, str], stop: Preemption
) -> Callable[[int, float], float]:
    """`ramp`'s step over the training windows, in whole batches: 25 minutes on a CPU, so it goes on
    from `directory`, where losses and state are saved every `checkpoint_minutes` and on a signal
    (then it raises Preempted)."""
    losses: list[float] = []
    if latest := checkpoint.load_latest(directory, digests=digests):
        state, _ = latest
        stepper.load_state(state)
        losses += state["losses"]
    saved = time.perf_counter()

    def step(number: int, rate: float) -> float:
        nonlocal saved
        if number < len(losses):
            return losses[number]
        now = time.perf_counter()
        if stop.requested or now - saved >= 60 * stepper.training.checkpoint_minutes:
            stepper.save_state(directory, digests, losses=list(losses))
            saved = now
        if stop.requested:
            raise Preempted(f"a signal during the checks in {directory.parent}")
        losses.append(train_once(stepper, torch.from_numpy(windows.batch(number)), rate))
        return losses[-1]

    return step


def measure(
    context: RunContext, compute: ComputeConfig, directory: Path, config_digest: str
) -> dict[str, Any]:
    """All checks of one experiment, as sanity.json has them; the ramp's files are left in
    `directory`. Raises Preempted after a signal, with the ramp's state saved."""
    run, training, allocation = context.run, context.run.training, context.allocation
    windows, begun = training_windows(context.data, training), time.perf_counter()
    first = torch.from_numpy(windows.batch(0))
    sequences = min(len(first), math.ceil(OVERFIT_TOKENS / training.seq_len))
    stepper = fresh_stepper(run, allocation, compute)
    first_loss, params = initial_loss(stepper, first), blocks(stepper.model)
    loss, steps = overfit(stepper, first[:sequences], directory.name)

    memorised, stepper = time.perf_counter(), fresh_stepper(run, allocation, compute)
    digests = {
        "config": config_digest,
        "tokenizer": context.data.tokenizer_sha256,
        "data": context.data.sha256,
    }
    with Preemption() as stop:
        step = resumable(stepper, windows, directory / "ramp", digests, stop)
        rows = ramp(step, directory.name)
    ramp_seconds, suggested = stepper.seconds, suggested_rate(rows)
    write_json(
        directory / "learning_rates.json",
        {"rule": RANGE_RULE, "suggested": suggested, "rows": rows},
    )
    draw(rows, suggested, training.learning_rate, directory / "learning_rates.png")
    ln_vocab = math.log(run.model.vocab_size)
    checks = {
        "initial loss near ln V": abs(first_loss - ln_vocab) <= INITIAL_TOLERANCE,
        "overfits": loss < OVERFIT_LOSS,  # NaN is not
        "parameters as planned": params == config.to_dict(allocation.params),
    }
    return {
        "checks": checks,
        "passed": all(checks.values()),
        "initial_loss": first_loss,
        "ln_vocab": ln_vocab,
        "overfit_loss": loss if math.isfinite(loss) else None,
        "overfit_steps": steps,
        "overfit_tokens": sequences * training.seq_len,
        "suggested_learning_rate": suggested,
        "learning_rate": training.learning_rate,
        "learning_rate_rule": RANGE_RULE,
        "params": params,
        TOTAL_PARAMS.built: allocation.params.total,
        EMBEDDING_RATIO.built: allocation.params.share,
        "tokens_per_s": len(rows) * training.step_tokens / ramp_seconds,
        "wall_seconds": memorised - begun + ramp_seconds,
        "device": compute.device.type,
        "device_name": runtime.device_name(compute.device),
        "reason": f"limits: {OVERFIT_LOSS} nats within {OVERFIT_STEPS} steps; ln V +- "
        f"{INITIAL_TOLERANCE}; tensors counted against the allocator",
    }


def draw(
    rows: Sequence[dict[str, float | int]], suggested: float | None, configured: float, path: Path
) -> None:
    """The ramp's curve with both rates; a diverging end of it leaves the panel at the top."""
    from src.analysis import paper  # matplotlib: half a second that nothing else here needs

    rates, smooth = ([row[key] for row in rows] for key in ("learning_rate", "smoothed"))
    named = {f"configured {configured:g}": (configured, paper.BLACK, "--")}
    if suggested is not None:
        named[f"suggested {suggested:.2g}"] = (suggested, paper.COLOURS[1], "-")
    with paper.style():
        figure, (axes,) = paper.grid(1)
        paper.hold(axes, "x", [*rates, *(rate for rate, _, _ in named.values())], log=True)
        paper.hold(axes, "y", [smooth[0], min(smooth)])
        axes.plot(rates, [row["loss"] for row in rows], color="0.8")
        axes.plot(rates, smooth, color=paper.COLOURS[0])
        handles = [
            paper.line("loss", color="0.8"), paper.line("smoothed", color=paper.COLOURS[0])
        ]  # fmt: skip
        for label, (rate, colour, dash) in named.items():
            axes.axvline(rate, color=colour, linestyle=dash)
            handles.append(paper.line(label, color=colour, ls=dash))
        axes.set_xlabel("Learning rate")
        axes.set_ylabel("Loss (nats a token)")
        paper.finish(figure, handles, "Learning-rate range test")
        paper.save(figure, path)
