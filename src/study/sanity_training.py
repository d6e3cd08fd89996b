"""What phase 0 trains: a memorised batch and a ramp of learning rates.

Shapes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src.compute import runtime
from src.compute.compute_config import Machine
from src.data.tokens import TokenData
from src.models.transformer import Transformer
from src.spec import config
from src.spec.allocation import Allocation
from src.spec.config import RunConfig
from src.spec.metric_keys import EMBEDDING_RATIO, TOTAL_PARAMS
from src.spec.progress import Progress
from src.storage import checkpoint
from src.storage.run_dir import Preemption, write_json
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


def fresh_stepper(run: RunConfig, answer: Allocation, chosen: Machine) -> Stepper:
    """A fresh model of the run. Not decayed: a ramp and a memorised batch have no schedule."""
    assert run.training.init_seed is not None
    model = build_model(answer.model, run.training.init_seed).to(chosen.device)
    return Stepper(model, dataclasses.replace(run.training, weight_decay=0.0), chosen)


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
        first = batch[: stepper.machine.micro_batch].to(stepper.machine.device)
        _, nats = next_token_loss(stepper.model, first, stepper.machine, stepper.training.z_loss)
    return float(nats)


def overfit(
    step: Callable[[Tensor, float], float], batch: Tensor, peak: float
) -> tuple[float, int]:
    """Memorise one batch at the run's own rate, warmed up over 20 steps; (last loss, steps)."""
    loss = math.inf
    for number in range(OVERFIT_STEPS):
        loss = step(batch, peak * min(1.0, (number + 1) / 20))
        if not math.isfinite(loss) or loss < OVERFIT_LOSS:
            return loss, number + 1
    return loss, OVERFIT_STEPS


def ramp(
    step: Callable[[int, float], float], steps: int = RANGE_STEPS, known: Sequence[float] = ()
) -> list[dict[str, float | int]]:
    """Losses under exponentially growing rates: rows of step, learning_rate, loss, smoothed.

    step(number, rate) trains once and gives its loss; `known` are the losses of the first steps,
    taken before an interruption. Ends where the loss has diverged.
    """
    rows: list[dict[str, float | int]] = []
    average, lowest = 0.0, math.inf
    for number in range(steps):
        rate = RANGE_LOW * (RANGE_HIGH / RANGE_LOW) ** (number / (steps - 1))
        loss = known[number] if number < len(known) else step(number, rate)
        if not math.isfinite(loss):
            break
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        smoothed = average / (1 - SMOOTHING ** (number + 1))
        rows.append({"step": number, "learning_rate": rate, "loss": loss, "smoothed": smoothed})
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


class Interrupted(Exception):
    """A signal asked for the end; what is saved is gone on with."""


class Measuring:
    """All checks of one experiment, part by part: what a part has found stands in `directory`,
    and the ramp, which trains 100 whole batches, has checkpoints."""

    def __init__(
        self,
        run: RunConfig,
        answer: Allocation,
        data: TokenData,
        chosen: Machine,
        directory: Path,
        digests: dict[str, str],
        stop: Preemption,
    ) -> None:
        self.run, self.answer, self.chosen, self.stop = run, answer, chosen, stop
        self.training, self.directory, self.digests = run.training, directory, digests
        self.windows = training_windows(data, self.training)

    def result(self) -> dict[str, Any]:
        """sanity.json's content but its price; raises Interrupted after a signal."""
        wiring = self._part("wiring.json", self._wiring)
        ramp = self._part("learning_rates.json", self._ramp)
        shutil.rmtree(self.directory / "ramp", ignore_errors=True)
        rate, loss = ramp["suggested"], wiring["overfit_loss"]
        configured = self.training.learning_rate
        draw(ramp["rows"], rate, configured, self.directory / "learning_rates.png")
        vocab = math.log(self.run.model.vocab_size)
        checks = {
            "initial loss near ln V": abs(wiring["initial_loss"] - vocab) <= INITIAL_TOLERANCE,
            "overfits": loss is not None and loss < OVERFIT_LOSS,
            "parameters as planned": wiring["params"] == config.to_dict(self.answer.params),
        }
        return {
            "experiment": self.run.experiment,
            "config_digest": self.digests["config"],
            "checks": checks,
            "passed": all(checks.values()),
            "initial_loss": wiring["initial_loss"],
            "ln_vocab": vocab,
            "overfit_loss": loss,
            "overfit_steps": wiring["overfit_steps"],
            "overfit_tokens": wiring["overfit_tokens"],
            "suggested_learning_rate": rate,
            "learning_rate": configured,
            "learning_rate_rule": RANGE_RULE,
            "params": wiring["params"],
            TOTAL_PARAMS.built: self.answer.params.total,
            EMBEDDING_RATIO.built: self.answer.params.share,
            "tokens_per_s": len(ramp["rows"]) * self.training.step_tokens / ramp["seconds"],
            "wall_seconds": wiring["seconds"] + ramp["seconds"],
            "device": self.chosen.device.type,
            "device_name": runtime.device_name(self.chosen.device),
            "reason": f"limits: {OVERFIT_LOSS} nats within {OVERFIT_STEPS} steps; ln V +- "
            f"{INITIAL_TOLERANCE}; tensors counted against the allocator",
        }

    def _part(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Read back what was found under this configuration, else find it."""
        path = self.directory / name
        if path.is_file():
            found = json.loads(path.read_bytes())
            if found.get("config_digest") == self.digests["config"]:
                return found
        found = {"config_digest": self.digests["config"], **measure()}
        write_json(path, found)
        return found

    def _wiring(self) -> dict[str, Any]:
        begun = time.perf_counter()
        first = torch.from_numpy(self.windows.batch(0))
        sequences = min(len(first), math.ceil(OVERFIT_TOKENS / self.training.seq_len))
        stepper = fresh_stepper(self.run, self.answer, self.chosen)
        start, counted = initial_loss(stepper, first), blocks(stepper.model)

        name = f"{self.directory.name}: memorising a batch"

        def step(batch: Tensor, rate: float) -> float:
            if self.stop.requested:
                raise Interrupted
            loss = train_once(stepper, batch, rate)
            progress.advance(1, f"loss {loss:.3f}")
            return loss

        with Progress(name, OVERFIT_STEPS, "steps at most") as progress:
            loss, steps = overfit(step, first[:sequences], self.training.learning_rate)
        return {
            "initial_loss": start,
            "params": counted,
            "overfit_loss": loss if math.isfinite(loss) else None,
            "overfit_steps": steps,
            "overfit_tokens": sequences * self.training.seq_len,
            "seconds": time.perf_counter() - begun,
        }

    def _ramp(self) -> dict[str, Any]:
        stepper = fresh_stepper(self.run, self.answer, self.chosen)
        losses, before = self._resume(stepper)
        begun = saved = time.perf_counter()
        known = tuple(losses)

        def step(number: int, rate: float) -> float:
            nonlocal saved
            now = time.perf_counter()
            if self.stop.requested or now - saved >= 60 * self.training.checkpoint_minutes:
                stepper.save_state(self.directory / "ramp", self.digests, losses=list(losses))
                saved = now
            if self.stop.requested:
                raise Interrupted
            batch = torch.from_numpy(self.windows.batch(number))
            losses.append(train_once(stepper, batch, rate))
            progress.advance(1, f"rate {rate:.1e}, loss {losses[-1]:.3f}")
            return losses[-1]

        name = f"{self.directory.name}: learning rates"
        with Progress(name, RANGE_STEPS, "steps at most", done=len(known)) as progress:
            rows = ramp(step, RANGE_STEPS, known)
        return {
            "rule": RANGE_RULE,
            "suggested": suggested_rate(rows),
            "rows": rows,
            "seconds": before + time.perf_counter() - begun,
        }

    def _resume(self, stepper: Stepper) -> tuple[list[float], float]:
        """Losses and seconds of an interrupted ramp, whose state `stepper` takes on."""
        found = checkpoint.load_latest(self.directory / "ramp", digests=self.digests)
        if found is None:
            return [], 0.0
        state, _ = found
        stepper.load_state(state)
        return list(state["losses"]), stepper.seconds_before


def draw(
    rows: Sequence[dict[str, float | int]], suggested: float | None, configured: float, path: Path
) -> None:
    """The ramp's curve with both rates; a diverging end of it leaves the panel at the top."""
    from src.analysis import paper  # matplotlib: half a second that nothing else here needs

    with paper.style():
        figure, (axes,) = paper.grid(1)
        rates = [row["learning_rate"] for row in rows]
        smooth = [row["smoothed"] for row in rows]
        paper.hold(
            axes, "x", [*rates, configured, *([] if suggested is None else [suggested])], log=True
        )
        paper.hold(axes, "y", [smooth[0], min(smooth)])
        axes.plot(rates, [row["loss"] for row in rows], color="0.8")
        axes.plot(rates, smooth, color=paper.COLOURS[0])
        axes.axvline(configured, color=paper.BLACK, linestyle="--")
        handles = [
            paper.line("loss", color="0.8"),
            paper.line("smoothed", color=paper.COLOURS[0]),
            paper.line(f"configured {configured:g}", color=paper.BLACK, ls="--"),
        ]
        if suggested is not None:
            axes.axvline(suggested, color=paper.COLOURS[1])
            handles.append(paper.line(f"suggested {suggested:.2g}", color=paper.COLOURS[1]))
        axes.set_xlabel("Learning rate")
        axes.set_ylabel("Loss (nats a token)")
        paper.finish(figure, handles, "Learning-rate range test")
        paper.save(figure, path)
