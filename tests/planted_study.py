"""A study whose truth is known: run directories of real sweeps' configurations with planted losses.

    python -m tests.planted_study --output planted --seeds 3
    python -m src.analysis.science.report --log_dir planted --output planted/science

ln BPB of a configuration = 0.2 + 1.2 (share - 0.36)^2 + 0.01 (glu - 3)^2 - 0.03 ln(L / 10)
    + 0.02 (ln rate / best)^2, best = 4e-3, in sweeps of rates 4e-3 (0.35 / share)^2, + noise.
A ranking run adds 0.1 and has three times the noise. Curves fall as tokens^-0.3 to the run's end.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from src.evaluation import metrics as run_metrics
from src.spec import allocation, config
from tests import ROOT

SD = 0.004
BEST_SHARE, BOWL, DEPTH, BEST_RATE = 0.36, 1.2, -0.03, 4e-3
BITS_PER_NAT = 1 / (3.5 * math.log(2))  # bits per byte of a nat per token, 3.5 bytes a token
CHECKS = 20


def truth(share: float, glu: float, layers: int, rate: float, best: float = BEST_RATE) -> float:
    """ln BPB without noise, where `best` is the best learning rate."""
    shape = BOWL * (share - BEST_SHARE) ** 2 + 0.01 * (glu - 3) ** 2 + DEPTH * math.log(layers / 10)
    return 0.2 + shape + 0.02 * math.log(rate / best) ** 2


def best_rate(share: float) -> float:
    """In sweeps of rates the best one falls with the share, that is, with the width."""
    return BEST_RATE * (0.35 / share) ** 2


def write(
    log_dir: Path,
    sweeps: Sequence[str],
    *,
    seeds: Sequence[int] = (0,),
    phases: Sequence[str] = ("full",),
    overrides: Sequence[str] = (),
    seed: int = 0,
    sd: float = SD,
) -> None:
    """Write every run of configs/<sweep>.yaml below `log_dir`. The same seed, the same noise."""
    rng = np.random.default_rng(seed)
    for name in sweeps:
        for phase in phases:
            file = ROOT / "configs" / f"{name}.yaml"
            sweep = config.load_sweep(file, overrides, phase)
            allocations = allocation.allocate(
                {run.experiment: run.model for run in sweep.runs}, sweep.baseline
            )
            for planned in sweep.runs:
                for number in seeds:
                    run = sweep.run(planned.experiment, number)
                    noise = sd * (3 if phase == "rank" else 1) * rng.standard_normal(2)
                    _write_run(
                        log_dir,
                        name,
                        run,
                        allocations[planned.experiment],
                        noise,
                        bool(sweep.rates),
                    )


def write_study(log_dir: Path, seeds: int, seed: int = 0) -> None:
    """Four sweeps of so many seeds, a ranking phase of one of them and a sweep of rates."""
    sweeps = ("frontier", "factorised", "depth_control", "glu_expansion")
    grid = ("model.total_params=10_485_760", "model.vocab_size=16_384")
    grid += ("training.batch_size=64", "training.seq_len=512")
    write(log_dir, sweeps, seeds=range(seeds), overrides=grid, seed=seed)
    write(log_dir, ["frontier"], phases=["rank"], seed=seed + 1)
    write(log_dir / "rates", ["miniature_lr"], seed=seed + 2)


def _write_run(
    log_dir: Path,
    sweep: str,
    run: config.RunConfig,
    built: allocation.Allocation,
    noise: np.ndarray,
    rates: bool,
) -> None:
    training, model, params = run.training, built.model, built.params
    share, glu = params.share, built.glu_expansion
    best = best_rate(share) if rates else BEST_RATE
    clean = truth(share, glu, model.n_layers, training.learning_rate, best)
    clean += 0.1 if run.phase == "rank" else 0.0
    bits = {split: math.exp(clean + e) for split, e in zip(("dev", "test"), noise, strict=True)}
    tokens = training.steps * training.step_tokens
    metrics = {
        "status": "finished",
        "run": run.run_name,
        "experiment": run.experiment,
        "sweep": f"{sweep}.yaml",
        "baseline": run.experiment == run.baseline,
        "baseline_name": run.baseline,
        "phase": run.phase,
        "seed": run.seed,
        "config_digest": f"{run.run_name} {training.learning_rate} {tokens}",
        "model_digest": run_metrics.model_digest(built),
        "tokenizer_sha256": "0" * 64,
        "corpus": "planted",
        "device_name": "none: planted losses",
        "total_params_asked": run.model.total_params,
        "glu_expansion_asked": run.model.glu_expansion,
        "total_params_built": params.total,
        "embedding_ratio_built": share,
        "glu_expansion_built": glu,
        "attention_width_ratio": model.n_heads * model.head_dim / model.d_model,
        **{key: getattr(model, key) for key in ("vocab_size", "d_model", "n_layers")},
        "embedding_dim": model.embedding_dim,
        "tokens": tokens,
        "batch_size": training.batch_size,
        "seq_len": training.seq_len,
        "learning_rate": training.learning_rate,
        "embedding_lr_ratio": training.embedding_lr_ratio,
        **{f"{split}_bits_per_byte": value for split, value in bits.items()},
        **{f"{split}_loss": value / BITS_PER_NAT for split, value in bits.items()},
        **{f"{split}_perplexity": math.exp(v / BITS_PER_NAT) for split, v in bits.items()},
    }
    path = log_dir / run.run_name
    path.mkdir(parents=True)
    (path / "metrics.json").write_text(json.dumps(metrics) + "\n", encoding="utf-8")
    rows = []
    for check in range(1, CHECKS + 1):
        at = round(tokens * check / CHECKS)
        loss = metrics["dev_loss"] + 1.5 * ((check / CHECKS) ** -0.3 - 1)
        rows.append({"kind": "dev", "tokens": at, "dev_perplexity": math.exp(loss)})
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description="Write run directories with planted losses.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    args = parser.parse_args()
    write_study(args.output, args.seeds, args.seed)


if __name__ == "__main__":
    main()
