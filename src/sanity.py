"""Phase 0: does the wiring learn, at which rate, and where do the parameters lie?

    python run_experiment.py --config configs/embed_ratio.yaml --exp emb35 --phase sanity
    python -m src.sanity --config configs/embed_ratio.yaml --exp emb35     (speed probe, JSON)

Writes <log_dir>/<exp>-sanity/{learning_rates.json, learning_rates.png} and, last, sanity.json.
Shapes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from src import allocation, config, costs, machine, runtime
from src.allocation import Allocation
from src.config import RunConfig, TrainingConfig
from src.data import TokenData, Windows
from src.machine import Machine
from src.models.transformer import Transformer
from src.run_dir import locked, write_json
from src.train import build_model, build_optimizer, next_token_loss

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
PROBE_STEPS = 3


class Stepper:
    """A fresh model of the run and its optimizer; one call is one update at a given rate."""

    def __init__(self, run: RunConfig, answer: Allocation, chosen: Machine) -> None:
        # A ramp and a memorised batch have no schedule; the groups' ratios stay.
        self.training: TrainingConfig = dataclasses.replace(run.training, weight_decay=0.0)
        self.chosen = chosen
        seed = run.training.init_seed
        assert seed is not None
        self.model: Transformer = build_model(answer.model, seed).to(chosen.device)
        self.optimizer = build_optimizer(self.model, self.training)

    def step(self, batch: Tensor, rate: float) -> float:
        """One update on (B, T + 1); returns the batch's nats before it."""
        parts = batch.to(self.chosen.device).split(self.chosen.micro_batch)
        total = torch.zeros((), device=self.chosen.device)
        for part in parts:
            objective, nats = next_token_loss(self.model, part, self.chosen, self.training.z_loss)
            (objective * len(part) / len(batch)).backward()
            total += nats * len(part) / len(batch)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.training.grad_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_ratio"]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(total)


# ----------------------------------------------------------------------------------- the checks


def initial_loss(stepper: Stepper, batch: Tensor) -> float:
    """Nats of the untrained model; close to ln V, or the initialisation prefers some tokens."""
    with torch.no_grad():
        first = batch[: stepper.chosen.micro_batch].to(stepper.chosen.device)
        _, nats = next_token_loss(stepper.model, first, stepper.chosen, stepper.training.z_loss)
    return float(nats)


def overfit(stepper: Stepper, batch: Tensor) -> tuple[float, int]:
    """Memorise one batch at the run's own rate, warmed up over 20 steps; (last loss, steps)."""
    loss = math.inf
    for step in range(OVERFIT_STEPS):
        rate = stepper.training.learning_rate * min(1.0, (step + 1) / 20)
        loss = stepper.step(batch, rate)
        if not math.isfinite(loss) or loss < OVERFIT_LOSS:
            return loss, step + 1
    return loss, OVERFIT_STEPS


def ramp(
    step: Callable[[int, float], float], steps: int = RANGE_STEPS
) -> list[dict[str, float | int]]:
    """Losses under exponentially growing rates: rows of step, learning_rate, loss, smoothed.

    step(number, rate) trains once and gives its loss. Ends where the loss has diverged.
    """
    rows: list[dict[str, float | int]] = []
    average, lowest = 0.0, math.inf
    for number in range(steps):
        rate = RANGE_LOW * (RANGE_HIGH / RANGE_LOW) ** (number / (steps - 1))
        loss = step(number, rate)
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


# ------------------------------------------------------------------------------------ the phase


def check(
    run: RunConfig, answer: Allocation, data: TokenData, log_dir: Path, device: str
) -> dict[str, Any]:
    """All checks of one experiment; returns (and writes) sanity.json's content.

    A finished check is read back, not repeated. Raises Held where another process is at it.
    """
    directory = log_dir / f"{run.experiment}-sanity"
    directory.mkdir(parents=True, exist_ok=True)
    with locked(directory):
        done = directory / "sanity.json"
        if done.is_file():
            return json.loads(done.read_bytes())
        chosen = machine.choose(run.training, answer.model, log_dir, device)
        begun = time.perf_counter()
        found = _measure(run, answer, data, chosen, directory)
        hours = (time.perf_counter() - begun) / 3600
        price = costs.price_per_hour(chosen.device.type, found["device_name"])
        found["wall_seconds"] = hours * 3600
        found["cost_usd"] = None if price is None else hours * price
        write_json(done, found)
        return found


def _measure(
    run: RunConfig, answer: Allocation, data: TokenData, chosen: Machine, directory: Path
) -> dict[str, Any]:
    training = run.training
    assert training.data_seed is not None
    windows = Windows(
        data.train.tokens,
        batch_size=training.batch_size,
        seq_len=training.seq_len,
        seed=training.data_seed,
    )
    first = torch.from_numpy(windows.batch(0))
    sequences = min(len(first), math.ceil(OVERFIT_TOKENS / training.seq_len))
    stepper = Stepper(run, answer, chosen)
    start = initial_loss(stepper, first)
    counted = blocks(stepper.model)
    loss, steps = overfit(stepper, first[:sequences])
    stepper = Stepper(run, answer, chosen)
    began = time.perf_counter()
    rows = ramp(lambda number, rate: stepper.step(torch.from_numpy(windows.batch(number)), rate))
    speed = len(rows) * training.step_tokens / (time.perf_counter() - began)
    rate = suggested_rate(rows)
    write_json(directory / "learning_rates.json", {"rule": RANGE_RULE, "suggested": rate,
                                                   "rows": rows})  # fmt: skip
    draw(rows, rate, training.learning_rate, directory / "learning_rates.png")
    expected = config.to_dict(answer.params)
    checks = {
        "initial loss near ln V": abs(start - math.log(run.model.vocab_size)) <= INITIAL_TOLERANCE,
        "overfits": loss < OVERFIT_LOSS,
        "parameters as planned": counted == expected,
    }
    return {
        "experiment": run.experiment,
        "checks": checks,
        "passed": all(checks.values()),
        "initial_loss": start,
        "ln_vocab": math.log(run.model.vocab_size),
        "overfit_loss": loss if math.isfinite(loss) else None,
        "overfit_steps": steps,
        "overfit_tokens": sequences * training.seq_len,
        "suggested_learning_rate": rate,
        "learning_rate": training.learning_rate,
        "learning_rate_rule": RANGE_RULE,
        "params": counted,
        "total_params": answer.params.total,
        "embedding_ratio": answer.params.share,
        "tokens_per_s": speed,
        "device": chosen.device.type,
        "device_name": runtime.device_name(chosen.device),
        "reason": f"limits: {OVERFIT_LOSS} nats within {OVERFIT_STEPS} steps; ln V +- "
        f"{INITIAL_TOLERANCE}; tensors counted against the allocator",
    }


def draw(
    rows: Sequence[dict[str, float | int]], suggested: float | None, configured: float, path: Path
) -> None:
    """The ramp's curve with both rates."""
    from matplotlib.figure import Figure  # half a second that nothing else here needs

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    rates = [row["learning_rate"] for row in rows]
    axes.semilogx(rates, [row["loss"] for row in rows], color="0.8", label="loss")
    axes.semilogx(rates, [row["smoothed"] for row in rows], color="C0", label="smoothed")
    axes.axvline(configured, color="0.4", linestyle="--", label=f"configured {configured:g}")
    if suggested is not None:
        axes.axvline(suggested, color="C1", label=f"suggested {suggested:.2g}")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("loss, nats a token")
    axes.legend()
    figure.savefig(path, dpi=120)


def report(found: dict[str, Any]) -> str:
    """The findings for people, parameters by block among them."""
    total = found["total_params"]
    lines = [
        f"{found['experiment']}: {'ok  ' if fine else 'FAIL'} {name}"
        for name, fine in found["checks"].items()
    ]
    lines += [
        f"  {block:<11} {count:>12,} {count / total:>8.2%}"
        for block, count in found["params"].items()
    ]
    lines.append(f"  {'total':<11} {total:>12,}, embedding_ratio {found['embedding_ratio']:.4f}")
    overfit_loss = found["overfit_loss"]
    last = "not a number" if overfit_loss is None else f"{overfit_loss:.3f}"
    lines.append(
        f"  loss: {found['initial_loss']:.3f} at first (ln V {found['ln_vocab']:.3f}), {last} "
        f"after {found['overfit_steps']} steps on {found['overfit_tokens']:,} tokens"
    )
    rate = found["suggested_learning_rate"]
    lines.append(
        f"  learning rate: suggested {'none' if rate is None else f'{rate:.2g}'}, configured "
        f"{found['learning_rate']:g}; rule: {found['learning_rate_rule']}"
    )
    return "\n".join(lines)


# ------------------------------------------------------------------------------ the speed probe


def probe(run: RunConfig, answer: Allocation, chosen: Machine) -> float:
    """Tokens a second of training on random tokens, the median of a few micro-batches."""
    stepper = Stepper(run, answer, chosen)
    generator = torch.Generator().manual_seed(0)
    shape = (chosen.micro_batch, run.training.seq_len + 1)
    batch = torch.randint(run.model.vocab_size, shape, generator=generator)
    times = []
    for _ in range(PROBE_STEPS + 1):
        begun = time.perf_counter()
        stepper.step(batch, 1e-4)  # returns a float, so the device has finished
        times.append(time.perf_counter() - begun)
    return chosen.micro_batch * run.training.seq_len / float(np.median(times[1:]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print {"tokens_per_s", "device", "device_name"} of one experiment as JSON."""
    parser = argparse.ArgumentParser(description="Time a few training steps on random tokens.")
    parser.add_argument("--config", required=True)
    parser.add_argument("--exp", required=True)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--log_dir", type=Path, default=Path("logs"))
    asked = parser.parse_args(arguments)
    try:
        sweep = config.load_sweep(asked.config, asked.set, "rank")
        run = sweep.run(asked.exp, 0)
        answer = allocation.allocate({r.experiment: r.model for r in sweep.runs})[asked.exp]
        asked.log_dir.mkdir(parents=True, exist_ok=True)
        chosen = machine.choose(run.training, answer.model, asked.log_dir, asked.device)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 78
    found = {
        "tokens_per_s": probe(run, answer, chosen),
        "device": chosen.device.type,
        "device_name": runtime.device_name(chosen.device),
    }
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
