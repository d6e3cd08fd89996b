"""Do the fits' intervals cover at their nominal rate? Simulated studies with known coefficients.

    python -m tests.simulated_studies --studies 1000 --output results/science/coverage.json

The suite runs the same with fewer studies (test_fits.py). Sizes are those of the shipped sweeps;
noise is 0.005 nats, what reseeding is expected to move ln BPB by at 10M parameters.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np

from src.analysis.science import fits
from src.analysis.science.surface import response_surface
from src.spec import config
from src.study.plan import allocate
from tests import ROOT

SD = 0.005
SHARES = np.array([0.25, 0.30, 0.35, 0.40, 0.45, 0.50])
# ln BPB = 0.2 + 1.2 (share - best)^2: PPL is 5 % up at 45 % against 35 % where the best is 20 %.
BOWL = 1.2

SURFACE = {
    "share": 0.30, "share^2": 1.2, "glu": -0.02, "glu^2": 0.015, "share*glu": 0.1, "ln L": -0.03,
}  # fmt: skip

Outcome = dict[str, list[bool]]


def share_curve(
    rng: np.random.Generator, best: float, seeds: int, unfitted: float = 0.0
) -> fits.CurveFit:
    """Means of `seeds` runs at each of a frontier's six shares. Every seed moves all its runs, and
    what no quadratic fits (`unfitted`, its sd in nats: depth in whole layers, say) moves all seeds
    of a share."""
    seed_shift = 0.02 * rng.standard_normal((seeds, 1)) if seeds > 1 else 0.0
    noise = SD * rng.standard_normal((seeds, len(SHARES))) + seed_shift
    y = 0.2 + BOWL * (SHARES - best) ** 2 + unfitted * rng.standard_normal(len(SHARES))
    mean = y + noise.mean(axis=0)
    return fits.quadratic(SHARES, mean, draws=1000, seed=int(rng.integers(2**31)))


def covers(estimate: fits.Estimate, truth: float) -> bool:
    assert estimate.low is not None and estimate.high is not None
    return estimate.low <= truth <= estimate.high


def curves(rng: np.random.Generator, out: Outcome) -> None:
    """Optimum, minimum and curvature of share curves, with an optimum inside and at the edge."""
    for name, best, seeds, unfitted in (
        ("one seed", 0.36, 1, 0.0),
        ("three seeds", 0.33, 3, 0.0),
        ("three seeds, lack of fit", 0.40, 3, 2 * SD),
    ):
        fit = share_curve(rng, best, seeds, unfitted)
        out.setdefault(f"share optimum, {name}", []).append(covers(fit.optimum, best))
        out.setdefault(f"share curvature, {name}", []).append(covers(fit.curvature, BOWL))
        if seeds == 1:  # the seeds' mean offset is part of what their runs measure
            out.setdefault(f"share minimum, {name}", []).append(covers(fit.minimum, 0.2))
    # No optimum in the range: the curve still falls at the upper end (best at 70 %).
    fit = share_curve(rng, 0.70, 1)
    out.setdefault("false interior optimum", []).append(fit.verdict == "interior")
    out.setdefault("edge found", []).append(fit.verdict == "edge" and fit.optimum.value == 0.5)
    flat = 0.2 + SD * rng.standard_normal(len(SHARES))
    nothing = fits.quadratic(SHARES, flat, draws=1000, seed=int(rng.integers(2**31)))
    out.setdefault("curvature of a flat curve", []).append(covers(nothing.curvature, 0.0))


def configurations_of(*files: str) -> np.ndarray:
    """(n, 3): share, GLU expansion and depth of every configuration that the sweeps would build."""
    built = [
        one
        for name in files
        for one in allocate(config.load_sweep(ROOT / "configs" / f"{name}.yaml")).values()
    ]
    return np.array([(a.params.share, a.glu_expansion, a.model.n_layers) for a in built])


def surface(design: np.ndarray, rng: np.random.Generator, out: Outcome) -> None:
    """Every coefficient of the response surface, over the configurations of all four sweeps."""
    share, glu, layers = design.T
    s, g = share - share.mean(), glu - glu.mean()
    terms = (s, s**2, g, g**2, s * g, np.log(layers))
    y = sum(c * t for c, t in zip(SURFACE.values(), terms, strict=True))
    fit = response_surface(share, glu, layers, y + SD * rng.standard_normal(len(share)))
    for term, truth in SURFACE.items():
        out.setdefault(f"surface, {term}", []).append(covers(fit.coefficients[term], truth))
    assert fit.best_share is not None
    best = share.mean() - SURFACE["share"] / (2 * SURFACE["share^2"])
    out.setdefault("surface, best share", []).append(covers(fit.best_share, best))


def simulate(studies: int, seed: int = 0) -> dict[str, tuple[float, int]]:
    """Share of studies in which each thing held, and of how many."""
    rng, out = np.random.default_rng(seed), Outcome()
    design = configurations_of("frontier", "factorised", "depth_control", "glu_expansion")
    for _ in range(studies):
        curves(rng, out)
        surface(design, rng, out)
    return {name: (float(np.mean(held)), len(held)) for name, held in out.items()}


NOT_COVERAGE = ("false interior optimum", "edge found")


def main() -> None:
    parser = argparse.ArgumentParser(description="How often the fits' 95 % intervals cover.")
    parser.add_argument("--studies", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    rates = simulate(args.studies, args.seed)
    rows = {}
    for name, (rate, n) in rates.items():
        error = math.sqrt(rate * (1 - rate) / n)
        rows[name] = {"rate": round(rate, 4), "standard_error": round(error, 4), "n": n}
        print(f"{name:<46} {rate:7.4f} +- {error:.4f}  (n = {n:,})")
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        content = {"level": 0.95, "studies": args.studies, "seed": args.seed, "held": rows}
        args.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
