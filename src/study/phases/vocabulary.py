"""Phase 1b of a plan: does the best share move with the vocabulary and the head?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from src.analysis import decisions, repeats
from src.spec.config import Sweep
from src.study.phases.cells import VOCABULARY, Cell, Source, feasible, model_keys
from src.study.phases.ledger import Ledger
from src.study.phases.ranking import Shares

Variant = tuple[int, bool]  # vocabulary, tied


def vocabularies(ledger: Ledger, template: Source, shares: Shares) -> None:
    """Vocabulary x tying at the leading share and its neighbours, on equal training bytes."""
    stage = VOCABULARY
    sweep, dropped = _grid_sweep(ledger, template, shares)
    cells = ledger.cells(sweep, sweep.names, range(ledger.config.vocabulary_seeds))
    for cell in cells:
        ledger.need_tokens(stage, cell)
    # No run of its own for the baseline: token perplexity cannot kill across vocabularies.
    if not ledger.schedule(stage, cells, own_baseline=False):
        return
    if dropped:
        ledger.decide(
            "1b", "allocation", dropped, "left out",
            "no shape is within the allocator's bounds at this share.",
        )  # fmt: skip
    _shift_decisions(ledger, cells)


def _grid_sweep(ledger: Ledger, template: Source, shares: Shares) -> tuple[Sweep, list[str]]:
    """The sweep that the study makes, and the cells that the allocator cannot serve."""
    stated = ledger.sweep(template, "rank")
    variants = list(
        dict.fromkeys((run.model.vocab_size, run.model.tie_embeddings) for run in stated.runs)
    )
    budgets = _byte_budgets(ledger, variants)
    raw = vocabulary_grid(template.raw, _neighbours(ledger, shares), variants, budgets)
    made = Source(ledger.generated("vocab_tying.yaml"), raw)
    whole = ledger.sweep(made, "rank")
    fits = [run.experiment for run in whole.runs if feasible(run.model)]
    if not fits:
        raise ValueError(
            f"{template.path}: found no vocabulary that the allocator can serve at these "
            "shares, expected one at least; set vocabulary to null in the study file"
        )
    raw["experiments"] = [entry for entry in raw["experiments"] if entry["name"] in fits]
    ledger.sweeps[made.path] = raw
    return ledger.sweep(made, "rank"), [name for name in whole.names if name not in fits]


def _neighbours(ledger: Ledger, shares: Shares) -> list[Mapping[str, Any]]:
    """Experiments of the share sweep: the leader and the shares on both sides of it."""
    sweep = ledger.sweep(shares.source, "rank")
    cells = ledger.cells(sweep, sweep.names, [0])
    ordered = [c.run.experiment for c in sorted(cells, key=lambda c: c.answer.params.share)]
    place = ordered.index(shares.leader)
    near = ordered[max(0, place - 1) : place + 2]
    entries = {entry["name"]: entry for entry in shares.source.raw["experiments"]}
    defaults = {cell.run.experiment: cell.run.model.embedding_ratio for cell in cells}
    found: list[Mapping[str, Any]] = []
    for name in near:
        entry = dict(entries[name])
        if defaults[name] is not None:
            entry.setdefault("embedding_ratio", defaults[name])
        found.append(entry)
    return found


def _byte_budgets(ledger: Ledger, variants: Sequence[Variant]) -> dict[int, int]:
    """Ranking tokens of each other vocabulary that hold as many bytes as the study's own."""
    reference = ledger.embedding.runs[0]
    ours = ledger.record.train_tokens.get(reference.model.vocab_size)
    budgets = {}
    for vocab, _ in variants:
        theirs = ledger.record.train_tokens.get(vocab)
        if vocab != reference.model.vocab_size and ours and theirs:
            budgets[vocab] = round(reference.training.tokens * theirs / ours)
    return budgets


def vocabulary_grid(
    template: Mapping[str, Any],
    shares: Sequence[Mapping[str, Any]],
    variants: Sequence[tuple[int, bool]],
    budget: Mapping[int, int],
) -> dict[str, Any]:
    """Each variant (vocabulary, tied) at each of the `shares` (experiments of the share sweep).

    budget: ranking tokens by vocabulary where they differ from the template's, so that all
    variants train on equal bytes.
    """
    experiments = []
    for vocab, tied in variants:
        size = f"{vocab // 1000}k" if vocab % 1000 == 0 else str(vocab)
        for share in shares:
            entry: dict[str, Any] = {
                **model_keys(share),
                "name": f"{share['name']}-v{size}-{'tied' if tied else 'untied'}",
                "vocab_size": vocab,
                "tie_embeddings": tied,
            }
            own = dict(share.get("training") or {})
            if vocab in budget:
                own |= {"tokens": budget[vocab], "ranking_tokens": budget[vocab]}
            if own:
                entry["training"] = own
            experiments.append(entry)
    return {
        **{key: value for key, value in template.items() if key != "baseline"},
        "experiments": experiments,
    }


def _variant(cell: Cell) -> Variant:
    return cell.run.model.vocab_size, cell.run.model.tie_embeddings


def _share(cell: Cell) -> str:
    """The experiment of the share sweep that a configuration of the grid was made from."""
    return cell.run.experiment.rpartition("-v")[0]


def _shift_decisions(ledger: Ledger, cells: Sequence[Cell]) -> None:
    bits, noise = _bits_per_byte(ledger, cells), _bits_noise(ledger)
    layers = {cell.run.experiment: cell.answer.model.n_layers for cell in cells}
    found: dict[str, dict[str, Sequence[float]]] = {}
    for vocab, tied in dict.fromkeys(map(_variant, cells)):
        alike = ledger.different([cell for cell in cells if _variant(cell) == (vocab, tied)])
        names = dict.fromkeys(cell.run.experiment for cell in alike)
        label = f"{vocab} {'tied' if tied else 'untied'}"
        found[label] = {_share(c): bits[c.run.experiment] for c in alike
                        if c.run.experiment in bits}  # fmt: skip
        measured = {name: bits[name] for name in names if name in bits}
        if not measured:
            ledger.decide(
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
        ledger.decide("1b", f"best share, {label}", numbers, verdict, promotion.reason)
    _shift_decision(ledger, found, noise)


def _shift_decision(
    ledger: Ledger,
    found: Mapping[str, Mapping[str, Sequence[float]]],
    noise: decisions.Noise | None,
) -> None:
    """Each vocabulary and head against the study's own: a shift, none, or not decided."""
    own = ledger.embedding.runs[0].model
    label = f"{own.vocab_size} {'tied' if own.tie_embeddings else 'untied'}"
    reference = label if label in found else next(iter(found))
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
    seeds = ledger.config.vocabulary_seeds
    ledger.decide(
        "1b", "shift of the best share",
        [f"{other} against {reference}: {s.verdict}, {s.reason}" for other, s in shifts.items()],
        decided,
        "lowest dev bits per byte over the shares that both have, on equal documents and equal "
        "training bytes; claimed only where both have two shares in common and each a leader "
        f"beyond the seed noise; {'one seed' if seeds == 1 else f'{seeds} seeds'} a configuration.",
    )  # fmt: skip


SHIFTS = ("shift", "no shift", "not decided")


@dataclass(frozen=True, slots=True)
class Shift:
    """Whether the best share of two variants differs: one of SHIFTS, and why."""

    verdict: str
    reason: str


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


def _bits_per_byte(ledger: Ledger, cells: Sequence[Cell]) -> dict[str, list[float]]:
    """Dev bits per byte of each experiment's finished seeds, over the documents that all cells
    scored where they kept them."""
    done = ledger.finished(cells)
    losses = [ledger.documents(cell, "validation") for cell in done]
    kept = [found for found in losses if found is not None]
    if len(kept) == len(done):
        count = min((len(found.nats) for found in kept), default=0)
        values = [
            float(np.sum(found.nats[:count]) / math.log(2) / np.sum(found.bytes[:count]))
            for found in kept
        ]
    else:
        values = [float((ledger.result(cell) or {})["dev_bits_per_byte"]) for cell in done]
    bits: dict[str, list[float]] = {}
    for cell, value in zip(done, values, strict=True):
        bits.setdefault(cell.run.experiment, []).append(value)
    return bits


def _bits_noise(ledger: Ledger) -> repeats.Noise | None:
    baseline = ledger.embedding.baseline
    seeds = ledger.cells(ledger.embedding, [baseline], range(ledger.config.noise_seeds))
    found = ledger.losses(seeds, "dev_bits_per_byte")
    return repeats.pooled_noise({baseline: found}) if len(found) > 1 else None
