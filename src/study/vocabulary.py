"""Does the best share move with the vocabulary and the head? On equal bytes and documents."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from src.analysis import decisions, repeats
from src.study.generated import Variant
from src.study.plan import Configuration, Plan, State

Bits = Mapping[str, Sequence[float]]  # bits per byte of each share's seeds


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
    plan: Plan,
    some: Sequence[Configuration],
    baseline: Sequence[Configuration],
    seeds: int,
) -> None:
    """The best share of each variant, and whether it moves. baseline: seeds of the study's own
    baseline, whose spread is the noise."""
    noise = repeats.pooled_noise({"": plan.losses(baseline, "dev_bits_per_byte")})
    bits = _bits_per_byte(plan, some)
    layers = {one.run.experiment: one.allocation.model.n_layers for one in some}
    found: dict[str, Bits] = {}
    for label in dict.fromkeys(map(_label, some)):
        alike = plan.different([one for one in some if _label(one) == label])
        names = dict.fromkeys(one.run.experiment for one in alike)
        measured = {name: bits[name] for name in names if name in bits}
        # by the experiment of the share sweep that it was made from
        found[label] = {name.rpartition("-v")[0]: values for name, values in measured.items()}
        if not measured:
            plan.decide("1b", f"best share, {label}", [], "none", "no configuration has a result.")
            continue
        promotion = decisions.promote(measured, noise)
        verdict = " or ".join(promotion.promoted)
        if len(measured) == 1:
            verdict = f"not decided: {verdict} alone has a result"
        elif len(promotion.promoted) > 1:
            verdict += ", not separable"
        numbers = [
            f"{name} {value:.4f} bits/byte at {layers[name]} layers"
            for name, value in promotion.ranking
        ]
        plan.decide("1b", f"best share, {label}", numbers, verdict, promotion.reason)
    _shift_decision(plan, found, _label(baseline[0]), noise, seeds)


def _label(one: Configuration) -> str:
    model = one.run.model
    return f"{model.vocab_size} {'tied' if model.tie_embeddings else 'untied'}"


def _shift_decision(
    plan: Plan, found: Mapping[str, Bits], own: str, noise: repeats.Noise | None, seeds: int
) -> None:
    """Each vocabulary and head against the study's own: a shift, none, or not decided."""
    reference = own if own in found else next(iter(found))
    shifts = {
        other: shift(found[reference], found[other], noise) for other in found if other != reference
    }
    verdicts = [verdict for verdict, _ in shifts.values()]

    def said(verdict: str) -> str:
        return ", ".join(name for name, found in shifts.items() if found[0] == verdict)

    decided = "no shift" if "no shift" in verdicts else "not decided"
    if "shift" in verdicts:
        decided = f"shift at {said('shift')}"
    if "not decided" in verdicts and decided != "not decided":
        decided += f"; not decided for {said('not decided')}"
    plan.decide(
        "1b", "shift of the best share",
        [f"{other} against {reference}: {', '.join(found)}" for other, found in shifts.items()],
        decided,
        "lowest dev bits per byte over the shares that both have, on equal documents and equal "
        "training bytes; claimed only where both have two shares in common and each a leader "
        f"beyond the seed noise; {'one seed' if seeds == 1 else f'{seeds} seeds'} a configuration.",
    )  # fmt: skip


def shift(ours: Bits, theirs: Bits, noise: repeats.Noise | None) -> tuple[str, str]:
    """Compare the best share of two variants over the shares that both have: ("shift", "no shift"
    or "not decided", why).

    A leader that is not separable from the next within seed noise is none, and one share alone
    leads nothing.
    """
    common = [share for share in ours if share in theirs]
    if len(common) < 2:
        which = f"one share, {common[0]}, is" if common else "no share is"
        return "not decided", f"{which} in common"
    leaders: list[str] = []
    for side in (ours, theirs):
        promoted = decisions.promote({share: side[share] for share in common}, noise).promoted
        if len(promoted) > 1:
            return "not decided", f"{' and '.join(promoted)} are not separable"
        leaders += promoted
    if leaders[0] == leaders[1]:
        return "no shift", f"{leaders[0]} leads both"
    return "shift", f"{leaders[1]} leads instead of {leaders[0]}"


def _bits_per_byte(plan: Plan, some: Sequence[Configuration]) -> dict[str, list[float]]:
    """Dev bits per byte of each experiment's finished seeds, over the documents that all of them
    scored where they kept them."""
    done = plan.finished(some)
    kept = [plan.documents(one, "validation") for one in done]
    count = min((0 if found is None else len(found.nats) for found in kept), default=0)
    bits: dict[str, list[float]] = {}
    for one, found in zip(done, kept, strict=True):
        value = float((plan.result(one) or {})["dev_bits_per_byte"])
        if found is not None and count:
            value = float(np.sum(found.nats[:count]) / math.log(2) / np.sum(found.bytes[:count]))
        bits.setdefault(one.run.experiment, []).append(value)
    return bits
