"""Does the best share move with the vocabulary and the head? On equal bytes and documents."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from src.analysis import decisions, repeats
from src.study.builder import PlanBuilder
from src.study.generated import Variant
from src.study.plan import Configuration, State

SHIFTS = ("shift", "no shift", "not decided")


@dataclass(frozen=True, slots=True)
class Shift:
    """Whether the best share of two variants differs: one of SHIFTS, and why."""

    verdict: str
    reason: str


def byte_budgets(
    state: State, reference: Configuration, variants: Sequence[Variant]
) -> dict[int, int]:
    """Ranking tokens of each other vocabulary that hold as many bytes as the study's own."""
    own, known = reference.run.model.vocab_size, state.train_tokens
    ours = known.get(own)
    return {
        vocab: round(reference.run.training.tokens * known[vocab] / ours)
        for vocab, _ in variants
        if vocab != own and ours and known.get(vocab)
    }


def shift_decisions(
    builder: PlanBuilder,
    some: Sequence[Configuration],
    baseline: Sequence[Configuration],
    seeds: int,
) -> None:
    """The best share of each variant, and whether it moves. baseline: seeds of the study's own
    baseline, whose spread is the noise."""
    bits, own = _bits_per_byte(builder, some), baseline[0]
    spread = builder.losses(baseline, "dev_bits_per_byte")
    noise = repeats.pooled_noise({own.run.experiment: spread}) if len(spread) > 1 else None
    layers = {one.run.experiment: one.allocation.model.n_layers for one in some}
    found: dict[str, dict[str, Sequence[float]]] = {}
    for label in dict.fromkeys(map(_label, some)):
        alike = builder.different([one for one in some if _label(one) == label])
        names = dict.fromkeys(one.run.experiment for one in alike)
        measured = {name: bits[name] for name in names if name in bits}
        # by the experiment of the share sweep that it was made from
        found[label] = {name.rpartition("-v")[0]: values for name, values in measured.items()}
        if not measured:
            builder.decide(
                "1b", f"best share, {label}", [], "none", "no configuration has a result."
            )
            continue
        promotion = decisions.promote(measured, noise)
        numbers = [
            f"{name} {value:.4f} bits/byte at {layers[name]} layers"
            for name, value in promotion.ranking
        ]
        verdict = (
            f"not decided: {promotion.promoted[0]} alone has a result" if len(measured) == 1
            else promotion.promoted[0] if len(promotion.promoted) == 1
            else f"{' or '.join(promotion.promoted)}, not separable"
        )  # fmt: skip
        builder.decide("1b", f"best share, {label}", numbers, verdict, promotion.reason)
    _shift_decision(builder, found, _label(own), noise, seeds)


def _label(one: Configuration) -> str:
    model = one.run.model
    return f"{model.vocab_size} {'tied' if model.tie_embeddings else 'untied'}"


def _shift_decision(
    builder: PlanBuilder,
    found: Mapping[str, Mapping[str, Sequence[float]]],
    own: str,
    noise: decisions.Noise | None,
    seeds: int,
) -> None:
    """Each vocabulary and head against the study's own: a shift, none, or not decided."""
    reference = own if own in found else next(iter(found))
    shifts = {
        other: shift(found[reference], found[other], noise) for other in found if other != reference
    }
    told = {kind: [name for name, s in shifts.items() if s.verdict == kind] for kind in SHIFTS}
    decided = (
        f"shift at {', '.join(told['shift'])}" if told["shift"]
        else "no shift" if told["no shift"]
        else "not decided"
    )  # fmt: skip
    if told["not decided"] and decided != "not decided":
        decided += f"; not decided for {', '.join(told['not decided'])}"
    builder.decide(
        "1b", "shift of the best share",
        [f"{other} against {reference}: {s.verdict}, {s.reason}" for other, s in shifts.items()],
        decided,
        "lowest dev bits per byte over the shares that both have, on equal documents and equal "
        "training bytes; claimed only where both have two shares in common and each a leader "
        f"beyond the seed noise; {'one seed' if seeds == 1 else f'{seeds} seeds'} a configuration.",
    )  # fmt: skip


def shift(
    ours: Mapping[str, Sequence[float]],
    theirs: Mapping[str, Sequence[float]],
    noise: decisions.Noise | None,
) -> Shift:
    """Compare the best share of two variants over the shares that both have.

    ours, theirs: bits per byte of each share's seeds. A leader that is not separable from the
    next within seed noise is none, and one share alone leads nothing.
    """
    common = [share for share in ours if share in theirs]
    if len(common) < 2:
        which = f"one share, {common[0]}, is" if common else "no share is"
        return Shift("not decided", f"{which} in common")
    leaders: list[str] = []
    for side in (ours, theirs):
        promotion = decisions.promote({share: side[share] for share in common}, noise)
        if len(promotion.promoted) > 1:
            return Shift("not decided", f"{' and '.join(promotion.promoted)} are not separable")
        leaders += promotion.promoted
    if leaders[0] == leaders[1]:
        return Shift("no shift", f"{leaders[0]} leads both")
    return Shift("shift", f"{leaders[1]} leads instead of {leaders[0]}")


def _bits_per_byte(builder: PlanBuilder, some: Sequence[Configuration]) -> dict[str, list[float]]:
    """Dev bits per byte of each experiment's finished seeds, over the documents that all of them
    scored where they kept them."""
    done = builder.finished(some)
    losses = [builder.documents(one, "validation") for one in done]
    kept = [found for found in losses if found is not None]
    if len(kept) == len(done):
        count = min((len(found.nats) for found in kept), default=0)
        values = [
            float(np.sum(found.nats[:count]) / math.log(2) / np.sum(found.bytes[:count]))
            for found in kept
        ]
    else:
        values = [float((builder.result(one) or {})["dev_bits_per_byte"]) for one in done]
    bits: dict[str, list[float]] = {}
    for one, value in zip(done, values, strict=True):
        bits.setdefault(one.run.experiment, []).append(value)
    return bits
