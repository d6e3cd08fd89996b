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
    own_vocabulary, train_tokens = reference.run.model.vocab_size, state.train_tokens
    own_tokens = train_tokens.get(own_vocabulary)
    return {
        vocab: round(reference.run.training.tokens * train_tokens[vocab] / own_tokens)
        for vocab, _ in variants
        if vocab != own_vocabulary and own_tokens and train_tokens.get(vocab)
    }


def shift_decisions(
    plan: Plan,
    configurations: Sequence[Configuration],
    baseline: Sequence[Configuration],
    seeds: int,
) -> None:
    """The best share of each variant, and whether it moves. baseline: seeds of the study's own
    baseline, whose spread is the noise."""
    noise = repeats.pooled_noise({"": plan.losses(baseline, "dev_bits_per_byte")})
    bits = _bits_per_byte(plan, configurations)
    layers = {c.run.experiment: c.allocation.model.n_layers for c in configurations}
    by_variant: dict[str, Bits] = {}
    for label in dict.fromkeys(map(_label, configurations)):
        same_variant = plan.distinct([c for c in configurations if _label(c) == label])
        names = dict.fromkeys(c.run.experiment for c in same_variant)
        measured = {name: bits[name] for name in names if name in bits}
        # by the experiment of the share sweep that it was made from
        by_variant[label] = {name.rpartition("-v")[0]: values for name, values in measured.items()}
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
    _shift_decision(plan, by_variant, _label(baseline[0]), noise, seeds)


def _label(configuration: Configuration) -> str:
    model = configuration.run.model
    return f"{model.vocab_size} {'tied' if model.tie_embeddings else 'untied'}"


def _shift_decision(
    plan: Plan, by_variant: Mapping[str, Bits], own: str, noise: repeats.Noise | None, seeds: int
) -> None:
    """Each vocabulary and head against the study's own: a shift, none, or not decided."""
    reference = own if own in by_variant else next(iter(by_variant))
    shifts = {
        other: shift(by_variant[reference], bits, noise)
        for other, bits in by_variant.items()
        if other != reference
    }
    verdicts = [shifted for shifted, _ in shifts.values()]

    def variants_with(wanted: str) -> str:
        return ", ".join(name for name, (shifted, _) in shifts.items() if shifted == wanted)

    verdict = "no shift" if "no shift" in verdicts else "not decided"
    if "shift" in verdicts:
        verdict = f"shift at {variants_with('shift')}"
    if "not decided" in verdicts and verdict != "not decided":
        verdict += f"; not decided for {variants_with('not decided')}"
    plan.decide(
        "1b", "shift of the best share",
        [f"{other} against {reference}: {', '.join(pair)}" for other, pair in shifts.items()],
        verdict,
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


def _bits_per_byte(plan: Plan, configurations: Sequence[Configuration]) -> dict[str, list[float]]:
    """Dev bits per byte of each experiment's finished seeds, over the documents that all of them
    scored where they kept them."""
    finished = plan.finished(configurations)
    documents = [plan.documents(c, "validation") for c in finished]
    count = min((0 if losses is None else len(losses.nats) for losses in documents), default=0)
    bits: dict[str, list[float]] = {}
    for configuration, losses in zip(finished, documents, strict=True):
        value = float((plan.result(configuration) or {})["dev_bits_per_byte"])
        if losses is not None and count:
            value = float(np.sum(losses.nats[:count]) / math.log(2) / np.sum(losses.bytes[:count]))
        bits.setdefault(configuration.run.experiment, []).append(value)
    return bits
