"""What a change of the recipe does to the loss's early jump: seeds x configurations x remedies.

    python -m benchmarks.recipe --config configs/miniature_embed.yaml --exp mini-emb35 mini-emb25 \
        --seed 0 1 2 3 4 --remedy none center --output results/recipe/miniature.csv

Trains at the ranking budget, on the CPU, and writes a row a run: dev loss, the largest one-step
rises of loss and gradient norm, and how much of the output embedding was one common direction (the
largest share, over the steps, of its squared norm that lies in its mean row). Runs that the file
holds already are not made again. Prints mean, sd and jumps (a rise above 1 nat) of all its rows.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from src.evaluation.stability import JUMP_NATS
from src.spec.allocation import allocate
from src.spec.command_line import Parser, at_least
from src.spec.config import load_sweep

KEYS = ["experiment", "seed", "remedy"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Remedy:
    """A change of the recipe that leaves the trained model a stock Qwen3 or Llama."""

    overrides: tuple[str, ...] = ()  # as for --set
    norm_eps: float | None = None  # of every RMSNorm; exported as rms_norm_eps
    center: bool = False  # subtract the output embedding's mean row after each step (2601.02031)


REMEDIES = {
    "none": Remedy(),
    "center": Remedy(center=True),
    "center_embedding_lr_x3": Remedy(overrides=("training.embedding_lr_ratio=3",), center=True),
    "warmup_half": Remedy(overrides=("training.warmup_fraction=0.5",)),
    "norm_eps_1e-4": Remedy(norm_eps=1e-4),
    "norm_eps_1e-3": Remedy(norm_eps=1e-3),
    "warmup_half_norm_eps_1e-3": Remedy(overrides=("training.warmup_fraction=0.5",), norm_eps=1e-3),
}


def measure(file: Path, experiment: str, seed: int, remedy: Remedy) -> dict[str, Any]:
    """One run by training's own step, without its evaluations, checkpoints and log."""
    import torch

    from src.compute import runtime
    from src.compute.compute_config import ComputeConfig
    from src.data import tokens
    from src.evaluation.stability import Stability
    from src.train import dev_loss
    from src.training_step import (
        Stepper,
        build_model,
        compile_blocks,
        dev_windows,
        learning_rate,
        training_windows,
    )

    sweep = load_sweep(file, remedy.overrides, "rank")
    requests = {run.experiment: run.model for run in sweep.runs}
    model = allocate(requests, sweep.baseline)[experiment].model
    model = replace(model, norm_eps=remedy.norm_eps or model.norm_eps)
    run = sweep.run(experiment, seed)
    compute = ComputeConfig(
        device=torch.device("cpu"),
        precision=runtime.resolve_precision(run.training.precision, torch.device("cpu")),
        micro_batch=min(16, run.training.batch_size),
        compile=run.training.compile == "on",
        threads=runtime.pin_threads(run.training.threads),
    )
    corpus = tokens.load(run.token_dir, run.model.vocab_size)
    training, stability = run.training, Stability()
    stepper = Stepper(build_model(model, training.init_seed or 0), training, compute)
    compile_blocks(stepper.model, compute)
    windows = training_windows(corpus, training)
    embedding, largest_share = stepper.model.head.table, 0.0
    while stepper.step < training.steps:
        nats = stepper.gradients(torch.from_numpy(windows.batch(stepper.step)))
        loss, norm = stepper.update(nats, learning_rate(training, stepper.step))
        stability.see(stepper.step, loss, norm)
        with torch.no_grad():
            if remedy.center:
                embedding.sub_(embedding.mean(dim=0))
            common = embedding.mean(dim=0).square().sum() * len(embedding)
            share = common / embedding.square().sum()
        largest_share = max(largest_share, float(share))
    dev = dev_loss(stepper.model, compute, dev_windows(corpus, training))
    return {"dev_loss": dev, **stability.metrics(), "common_share_largest": largest_share}


def summary(rows: pd.DataFrame) -> str:
    """Per configuration and remedy: runs, mean and sd of the dev loss, jumps."""
    jumps = rows.assign(jump=rows.loss_largest_rise_nats > JUMP_NATS)
    table = jumps.groupby(["experiment", "remedy"]).agg(
        runs=("seed", "size"), dev_loss=("dev_loss", "mean"), sd=("dev_loss", "std"),
        jumps=("jump", "sum"), largest_norm_rise=("grad_norm_largest_rise", "max"),
        common_share=("common_share_largest", "mean"),
    )  # fmt: skip
    return table.round(4).to_string()


def main() -> None:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--exp", nargs="+", required=True)
    parser.add_argument("--seed", nargs="+", type=at_least(0), required=True)
    parser.add_argument("--remedy", nargs="+", choices=REMEDIES, required=True)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    rows = pd.read_csv(args.output) if args.output.exists() else pd.DataFrame(columns=KEYS)
    done = set(rows[KEYS].itertuples(index=False, name=None))
    for experiment, remedy, seed in itertools.product(args.exp, args.remedy, args.seed):
        run = (experiment, seed, remedy)
        if run not in done:
            row = dict(zip(KEYS, run, strict=True))
            row |= measure(args.config, experiment, seed, REMEDIES[remedy])
            rows = pd.DataFrame([*rows.to_dict("records"), row])
            args.output.parent.mkdir(parents=True, exist_ok=True)
            rows.to_csv(args.output, index=False)
    print(summary(rows))


if __name__ == "__main__":
    main()
