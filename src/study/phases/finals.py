"""Phase 2 of a plan: finalists and baseline at the full budget, their speeds, and the decisions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from src.analysis import decisions
from src.spec.config import Sweep
from src.study.phases.cells import STAGES, Cell
from src.study.phases.ledger import Ledger, mean_text
from src.study.phases.ranking import Expansions, Shares

Chosen = Mapping[str, list[Cell]]
LENGTHS = (128, 512)  # prompts whose latency decides (PRD section 4)


def finals(ledger: Ledger, shares: Shares, expansions: Expansions) -> None:
    """Finalists and the study's baseline at the full budget, several seeds each, then their
    speeds side by side; with `full: all` every ranking cell at one seed too."""
    seeds = range(ledger.config.final_seeds)
    full = ledger.sweep(ledger.study.embedding, "full")
    glu = ledger.sweep(expansions.source, "full")
    baseline = ledger.cells(full, [full.baseline], seeds)
    chosen = _finalists(ledger, shares, expansions, (full, glu), baseline[0])
    cells = [cell for group in chosen.values() for cell in group]
    complete = ledger.schedule(STAGES[4], [*baseline, *cells])
    every: list[Cell] = []
    if ledger.config.full == "all":
        every = [*ledger.cells(full, full.names, [0]), *ledger.cells(glu, glu.names, [0])]
        # A full run is judged by a kill rule only where its sweep states one.
        complete &= ledger.schedule(
            STAGES[5], every, own_baseline=every[-1].run.kill_rule is not None
        )
    complete &= _comparisons(ledger, baseline, chosen, complete)
    if complete:
        _final_decisions(ledger, baseline, chosen)
        _rank_decision(ledger, [baseline[0], *(c[0] for c in chosen.values()), *every], expansions)


def _finalists(
    ledger: Ledger,
    shares: Shares,
    expansions: Expansions,
    sweeps: tuple[Sweep, Sweep],
    baseline: Cell,
) -> dict[str, list[Cell]]:
    """Promoted cells, best ranking loss first; the baseline itself is no candidate."""
    full, glu = sweeps
    pool = [(expansions.sweep, glu, name) for name in expansions.promoted]
    if shares.runner_up is not None:
        pool.append((ledger.embedding, full, shares.runner_up))
    if ledger.decided:
        pool.sort(key=lambda item: ledger.losses(ledger.cells(item[0], [item[2]], [0]))[:1])
    spare = [(expansions.sweep, glu, name) for name in expansions.ranking]
    chosen: dict[str, list[Cell]] = {}
    taken = {baseline.identity}
    for source, wanted in ((pool, ledger.config.finalists), (spare, 1)):
        for _, sweep, name in source:
            cells = ledger.cells(sweep, [name], range(ledger.config.final_seeds))
            if len(chosen) < wanted and cells[0].identity not in taken:
                taken.add(cells[0].identity)
                chosen[name] = cells
    return chosen


# ---------------------------------------------------------------------------------- speed


def _comparisons(ledger: Ledger, baseline: list[Cell], chosen: Chosen, complete: bool) -> bool:
    """Add a comparison of each finalist with the baseline; True where all are there.

    None where the sweep measures no latency, and none of a configuration without a finished run.
    """
    measured, there = baseline[0].run.evaluation, True
    if not measured.latency:
        return True
    for cells in chosen.values():
        name = _comparison(ledger, cells, baseline)
        if name is None:
            if complete:
                continue
            name = f"latency/{cells[0].name}-against-{baseline[0].name}.json"  # for the count
        done = name in ledger.record.latency
        threads = baseline[0].run.training.threads
        ledger.task(
            STAGES[6],
            "latency",
            cells[0],
            name=name,
            done=done and complete,
            arguments=(
                "--repeats", str(measured.latency_repeats),
                "--warmup", str(measured.latency_warmup),
                *(() if threads is None else ("--threads", str(threads))),
            ),
        )  # fmt: skip
        there &= done
    return there


def _comparison(ledger: Ledger, ours: list[Cell], theirs: list[Cell]) -> str | None:
    """The job that compares the first finished runs of both sides."""
    pair = [ledger.finished(cells) for cells in (ours, theirs)]
    if not all(pair):
        return None
    mine, other = (ledger.run_of(cells[0]) for cells in pair)
    return f"latency/{mine}-against-{other}.json"


def _speeds(
    ledger: Ledger, cells: list[Cell], baseline: list[Cell]
) -> dict[str, tuple[float, float, float]]:
    """Ratio of the interleaved medians and its 95 % interval by prompt length; {} without them."""
    found = ledger.record.latency.get(_comparison(ledger, cells, baseline) or "")
    if found is None:
        return {}
    rows = {length: found["comparison"][f"l{length}"] for length in LENGTHS}
    return {
        f"latency_ms_l{length}": (row["ratio"], row["ratio_low"], row["ratio_high"])
        for length, row in rows.items()
    }


# ---------------------------------------------------------------------------------- decisions


def _final_decisions(ledger: Ledger, baseline: list[Cell], chosen: Chosen) -> None:
    groups = (baseline, *chosen.values())
    split = "test" if all(ledger.losses(cells, "test_loss") for cells in groups) else "validation"
    key = "test_loss" if split == "test" else "dev_loss"
    reference = _measured(ledger, baseline, key)
    found: dict[str, decisions.Measured] = {}
    for name, cells in chosen.items():
        measured, ended = _measured(ledger, cells, key), len(ledger.losses(cells, key))
        if measured is not None and ended == len(cells):
            found[name] = measured
            continue
        # A rule that stops bad seeds would leave a finalist with its good ones.
        ledger.decide(
            "2", "every seed finished", [name], "out",
            f"{ended} of {len(cells)} seeds finished (the others were stopped or diverged); judged "
            "on those it would be compared by its best seeds.",
        )  # fmt: skip
    if reference is None or not found:
        ledger.decide(
            "2", "winner", [], "no winner",
            "the baseline has no finished seed, or no finalist finished all of its seeds.",
        )  # fmt: skip
        return
    left = {name: chosen[name] for name in found}
    _interval_decisions(ledger, baseline, left, split, key)
    for name, cells in left.items():
        if speeds := _speeds(ledger, cells, baseline):
            found[name] = _relative(found[name], reference, speeds)
            _speed_decision(ledger, name, reference.name, speeds)
    _winner_decision(ledger, reference, found, _ties(ledger, left, split, key))


def _interval_decisions(
    ledger: Ledger, baseline: list[Cell], chosen: Chosen, split: str, key: str
) -> None:
    reference = baseline[0].run.experiment
    intervals = {
        name: _interval(ledger, cells, baseline, split, key) for name, cells in chosen.items()
    }
    held = decisions.holm({name: interval.p for name, interval in intervals.items()})
    for name, interval in intervals.items():
        says = decisions.equivalence(interval)
        low, ratio, high = (_percent(value) for value in interval.ratio)
        ledger.decide(
            "2", "95 % interval and equivalence at +-1 %",
            [f"{name} against {reference}: PPL {ratio} ({low} to {high})"],
            says.verdict,
            f"{says.statement} {interval.seeds} seeds, {interval.documents} documents; "
            f"p {held[name].p:.4f}, {held[name].adjusted_p:.4f} after Holm.",
        )  # fmt: skip


def _relative(
    ours: decisions.Measured,
    reference: decisions.Measured,
    speeds: Mapping[str, tuple[float, float, float]],
) -> decisions.Measured:
    """Latencies as the interleaved ratios say: medians of two processes differ by the machine's
    mood (several percent), those of one process by the models."""

    def scaled(key: str, base: float | None) -> float | None:
        return None if base is None else base * speeds[key][0]

    return replace(
        ours,
        latency_ms_l128=scaled("latency_ms_l128", reference.latency_ms_l128),
        latency_ms_l512=scaled("latency_ms_l512", reference.latency_ms_l512),
    )


def _speed_decision(
    ledger: Ledger,
    name: str,
    reference: str,
    speeds: Mapping[str, tuple[float, float, float]],
) -> None:
    told = [
        f"{key.rpartition('_')[2]} {_percent(ratio)} ({_percent(low)} to {_percent(high)})"
        for key, (ratio, low, high) in speeds.items()
    ]
    slower = [low > 1 for _, low, _ in speeds.values()]
    faster = [high < 1 for _, _, high in speeds.values()]
    ledger.decide(
        "2", "latency, interleaved in one process",
        [f"{name} against {reference}", *told],
        "slower" if any(slower) else "faster" if all(faster) else "not told apart at every length",
        "ratio of medians at batch 1 with its 95 % interval; the winner rule reads these ratios.",
    )  # fmt: skip


def _winner_decision(
    ledger: Ledger,
    reference: decisions.Measured,
    found: Mapping[str, decisions.Measured],
    ties: set[frozenset[str]],
) -> None:
    result = decisions.winner(reference, list(found.values()), ties=ties)
    for verdict in result.candidates:
        ledger.decide(
            "2", ">= 5 % lower PPL, latency and memory not above the baseline's",
            [f"{verdict.name}: {mean_text(found[verdict.name].log_perplexities)} nats"
             f" against {mean_text(reference.log_perplexities)}"],
            "qualifies" if verdict.qualifies_strict
            else "qualifies within the 3 % margin" if verdict.qualifies_margin else "does not",
            "; ".join(verdict.reasons),
        )  # fmt: skip
    strict, margin = (name or "no winner" for name in (result.winner_strict, result.winner_margin))
    told = strict if strict == margin else f"{strict}; with the 3 % margin {margin}"
    tied = [" = ".join(sorted(pair)) for pair in ties]
    ledger.decide("2", "winner", tied or ["no ties"], told, result.reason)


def _measured(ledger: Ledger, cells: list[Cell], key: str) -> decisions.Measured | None:
    losses = ledger.losses(cells, key)
    if not losses:
        return None

    def median(name: str) -> float | None:
        values = ledger.losses(cells, name)
        return float(np.median(values)) if values else None

    return decisions.Measured(
        name=cells[0].run.experiment,
        log_perplexities=tuple(losses),
        latency_ms_l128=median("latency_ms_p50_l128"),
        latency_ms_l512=median("latency_ms_p50_l512"),
        peak_memory_mib=median("peak_memory_mib"),
    )


def _interval(
    ledger: Ledger, ours: Sequence[Cell], theirs: Sequence[Cell], split: str, key: str
) -> decisions.Interval:
    """Over documents and the seeds that both finished; over seeds alone without documents."""
    pairs = [
        (a, b)
        for a, b in zip(ours, theirs, strict=True)
        if ledger.losses([a], key) and ledger.losses([b], key)
    ]
    if not pairs:  # no common seed: unpaired means, and nothing follows from them
        gap = np.mean(ledger.losses(ours, key)) - np.mean(ledger.losses(theirs, key))
        return decisions.Interval(float(gap), -math.inf, math.inf, 0.95, 1.0, 0, 0)
    mine, other = [a for a, _ in pairs], [b for _, b in pairs]
    ours_found, theirs_found = (
        [found for cell in side if (found := ledger.documents(cell, split)) is not None]
        for side in (mine, other)
    )
    if min(len(ours_found), len(theirs_found)) < len(pairs):
        return decisions.seed_interval(ledger.losses(mine, key), ledger.losses(other, key))
    return decisions.paired_bootstrap(
        np.stack([found.nats for found in ours_found]),
        np.stack([found.nats for found in theirs_found]),
        ours_found[0].tokens,
    )


def _ties(ledger: Ledger, chosen: Chosen, split: str, key: str) -> set[frozenset[str]]:
    names = list(chosen)
    return {
        frozenset((a, b))
        for i, a in enumerate(names)
        for b in names[i + 1 :]
        if decisions.equivalence(_interval(ledger, chosen[a], chosen[b], split, key)).verdict
        == "equivalent"
    }


def _rank_decision(ledger: Ledger, cells: Sequence[Cell], expansions: Expansions) -> None:
    """Do short runs and full runs agree on the order? Seed 0 of both, each model once."""
    short, full, stopped = {}, {}, []
    for cell in ledger.different(cells):
        name = cell.run.experiment
        sweep = ledger.embedding if name in ledger.embedding.names else expansions.sweep
        ranked, finished = ledger.losses(ledger.cells(sweep, [name], [0])), ledger.losses([cell])
        if ranked and finished:
            short[name], full[name] = ranked[0], finished[0]
        elif finished:
            stopped.append(f"{name}: stopped -> {finished[0]:.4f}")
    if len(short) < 2:
        return
    found = decisions.rank_agreement(short, full)
    rho = "too few cells" if found.spearman is None else f"{found.spearman:.2f}"
    chance = "" if found.p is None else f" (p {found.p:.3f} by chance)"
    ledger.decide(
        "2", "short against full ranking",
        [*(f"{name}: {short[name]:.4f} -> {full[name]:.4f}" for name in short), *stopped],
        "same leader" if found.top1_same else "another leader",
        f"Spearman {rho}{chance} over {found.n} cells, dev loss of seed 0; finishing the short "
        f"runs' best alone would have cost {found.top1_regret:.4f} nats.",
    )  # fmt: skip


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.2f} %" if math.isfinite(ratio) else "unbounded"
