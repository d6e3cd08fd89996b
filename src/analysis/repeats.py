"""Runs of one configuration that differ in seed: their mean, their noise, and which ones pair.

Losses are nats (per token or per document) or ln bits per byte; lower is better. Pure functions.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import ArrayLike

T = TypeVar("T")

Label = tuple[int, str | None]
"""(seed, digest) of a run. The digest covers what changes results besides the configuration: code,
precision, micro-batch, threads, library versions (`run_identity.computed_as`). None: unknown, so
equal to no other."""


@dataclass(frozen=True, slots=True)
class Summary:
    """Mean and sample standard deviation (n - 1); sd is None for a single value, never 0.0."""

    n: int
    mean: float
    sd: float | None


def mean_sd(values: Sequence[float]) -> Summary:
    """Summarise one configuration's seeds; ValueError without values or with a non-finite one."""
    need_finite("values", values)
    data = np.asarray(values, dtype=np.float64)
    sd = float(data.std(ddof=1)) if data.size > 1 else None
    return Summary(n=int(data.size), mean=float(data.mean()), sd=sd)


@dataclass(frozen=True, slots=True)
class Noise:
    """Standard deviation of one run's loss under reseeding, and the degrees of freedom behind it.

    Means of n_1 and n_2 runs differ by chance with sd sqrt(1/n_1 + 1/n_2) times this.
    """

    sd: float
    df: int


def pooled_noise(configurations: Mapping[str, Sequence[float]]) -> Noise | None:
    """Noise of unpaired runs, sd^2 = sum (n_i - 1) s_i^2 / sum (n_i - 1); None without repeats."""
    repeated = [mean_sd(values) for values in configurations.values() if len(values) > 1]
    if not repeated:
        return None
    df = sum(s.n - 1 for s in repeated)
    variance = sum((s.n - 1) * s.sd**2 for s in repeated if s.sd is not None) / df
    return Noise(sd=math.sqrt(variance), df=df)


def paired_noise(losses: Mapping[str, Mapping[Label, float]]) -> Noise | None:
    """Noise that is left of paired runs, from all pairs of a study; None where none repeats.

    losses: by configuration and label. Least squares of loss = configuration + label: the
    residuals know neither what a configuration is worth nor what a seed does to all of them.
    For two configurations of S seeds, sd is that of their S differences over sqrt(2), with S - 1
    degrees of freedom; k more configurations on the same seeds make it (k + 1)(S - 1). The
    differences against one baseline are not pooled themselves: they share the baseline's noise,
    so counting each one's degrees of freedom would count it several times.
    A configuration's seed counts once, under the digest that most configurations have. The noise
    is taken to be the same for all configurations.
    """
    sizes = Counter(label for runs in losses.values() for label in runs if label[1] is not None)
    values, rows, columns = [], [], []
    for name, runs in losses.items():
        for seed in {seed for seed, _ in runs}:
            known = [label for label in runs if label[0] == seed and label in sizes]
            if known:
                label = max(known, key=lambda label: (sizes[label], label))
                values.append(runs[label])
                rows.append(name)
                columns.append(label)
    if not values:
        return None
    need_finite("losses", values)
    design = np.array(
        [
            [*(row == name for name in dict.fromkeys(rows)),
             *(column == label for label in dict.fromkeys(columns))]
            for row, column in zip(rows, columns, strict=True)
        ],
        dtype=np.float64,
    )  # fmt: skip
    fit, _, rank, _ = np.linalg.lstsq(design, np.asarray(values), rcond=None)
    df = len(values) - int(rank)
    if df == 0:
        return None
    return Noise(sd=float(np.linalg.norm(values - design @ fit)) / math.sqrt(df), df=df)


@dataclass(frozen=True, slots=True)
class Pairs(Generic[T]):
    """Runs with equal seed and equal digest on both sides, and a sentence for each other.

    pairs[i] is (ours, theirs) of labels[i], in order of seeds.
    """

    labels: tuple[Label, ...]
    pairs: tuple[tuple[T, T], ...]
    left_out: tuple[str, ...]


def pair(ours: Mapping[Label, T], baseline: Mapping[Label, T]) -> Pairs[T]:
    """Pair the runs of two configurations that differ in nothing but the configuration.

    Where both sides ran a seed under two digests, one pair of them counts (that of the digest with
    the most seeds): the same seed twice is no second seed.
    """
    common = [label for label in ours if label in baseline and label[1] is not None]
    seeds = Counter(digest for _, digest in common)
    kept: dict[int, Label] = {}
    for label in sorted(common, key=lambda label: (-seeds[label[1]], str(label[1]))):
        kept.setdefault(label[0], label)
    labels = tuple(kept[seed] for seed in sorted(kept))
    left_out = [
        f"{side} seed {seed} (compute {'unknown' if digest is None else digest[:8]}): "
        + _why_alone((seed, digest), other, kept)
        for side, runs, other in (("ours", ours, baseline), ("the baseline's", baseline, ours))
        for seed, digest in runs
        if kept.get(seed) != (seed, digest)
    ]
    return Pairs(labels, tuple((ours[x], baseline[x]) for x in labels), tuple(left_out))


def _why_alone(label: Label, others: Mapping[Label, object], kept: Mapping[int, Label]) -> str:
    seed, digest = label
    if seed in kept:
        return f"the seed is paired as computed by {str(kept[seed][1])[:8]}"
    if digest is None:
        return "how it was computed is not recorded"
    if any(other == seed for other, _ in others):
        return "the other side's run of this seed was computed otherwise"
    return "the other side has no run of this seed"


def need_finite(name: str, values: ArrayLike) -> None:
    """Raise ValueError for no values, NaN or infinity."""
    data = np.asarray(values, dtype=np.float64)
    if data.size == 0 or not np.isfinite(data).all():
        raise ValueError(f"{name} must be one or more finite numbers, found {data.tolist()}.")
