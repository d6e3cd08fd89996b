"""Phase 2 of a plan: finalists and baseline at the full budget, their speeds, and the decisions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from src.analysis import decisions, intervals, rankings, repeats
from src.spec.config import Sweep
from src.study.phases.cells import EVERY, FINALS, LATENCY, Cell
from src.study.phases.ledger import Ledger, mean_text
from src.study.phases.ranking import Expansions, Shares

Chosen = Mapping[str, list[Cell]]
LENGTHS = (128, 512)  # prompts whose latency decides (PRD section 4)


def finals(ledger: Ledger, shares: Shares, expansions: Expansions) -> None:
    """Finalists and the study's baseline at the full budget, several seeds each, then their
    speeds side by side; with `full: all` every ranking cell at one seed too."""
    seeds = range(ledger.config.final_seeds)
    full = ledger.sweep(shares.source, "full")
    glu = ledger.sweep(expansions.source, "full")
    baseline = ledger.cells(full, [full.baseline], seeds)
    chosen = _finalists(ledger, shares, expansions, (full, glu), baseline[0])
    cells = [cell for group in chosen.values() for cell in group]
    complete = ledger.schedule(FINALS, [*baseline, *cells])
    every: list[Cell] = []
    if ledger.config.full == "all":
        every = [*ledger.cells(full, full.names, [0]), *ledger.cells(glu, glu.names, [0])]
        # A full run is judged by a kill rule only where its sweep states one.
        complete &= ledger.schedule(EVERY, every, own_baseline=every[-1].run.kill_rule is not None)
    complete &= _comparisons(ledger, baseline, chosen, complete)
    if complete:
        _final_decisions(ledger, baseline, chosen)
        _rank_decision(
            ledger,
            [baseline[0], *(c[0] for c in chosen.values()), *every],
            (ledger.sweep(shares.source, "rank"), expansions.sweep),
        )


def _finalists(
    ledger: Ledger,
    shares: Shares,
    expansions: Expansions,
    sweeps: tuple[Sweep, Sweep],
    baseline: Cell,
) -> dict[str, list[Cell]]:
    """The leading share, what was promoted and a close second share, best ranking loss first; the
    baseline itself is no candidate."""
    full, glu = sweeps
    ranked = ledger.sweep(shares.source, "rank")
    pool = [(ranked, full, shares.leader)]
    pool += [(expansions.sweep, glu, name) for name in expansions.promoted]
    if shares.runner_up is not None:
        pool.append((ranked, full, shares.runner_up))
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
            LATENCY,
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
    noise = repeats.paired_noise(
        {
            str(i): _labelled(ledger, cells, key)
            for i, cells in enumerate((baseline, *left.values()))
        }
    )
    _interval_decisions(ledger, baseline, left, split, key, noise)
    for name, cells in left.items():
        if speeds := _speeds(ledger, cells, baseline):
            found[name] = _relative(found[name], reference, speeds)
            _speed_decision(ledger, name, reference.name, speeds)
    _winner_decision(ledger, reference, found, _ties(ledger, left, split, key, noise))


def _interval_decisions(
    ledger: Ledger,
    baseline: list[Cell],
    chosen: Chosen,
    split: str,
    key: str,
    noise: repeats.Noise | None,
) -> None:
    reference = baseline[0].run.experiment
    found = {
        name: _interval(ledger, cells, baseline, split, key, noise)
        for name, cells in chosen.items()
    }
    held = intervals.holm({name: one.p for name, (one, _) in found.items() if one.p is not None})
    for name, (interval, left_out) in found.items():
        says = intervals.equivalence(interval)
        low, ratio, high = (_percent(value) for value in interval.ratio)
        bounds = f"{low} to {high}" + ("" if interval.seeds > 1 else ", document noise only")
        told = f"{says.statement} {interval.seeds} seeds, {interval.documents} documents"
        if name in held:
            told += f"; p {held[name].p:.4f}, {held[name].adjusted_p:.4f} after Holm"
            if noise is not None:
                told += f"; seed noise {noise.sd:.4f} from all pairs ({noise.df} df)"
        if left_out:
            told += f"; left out: {'; '.join(left_out)}"
        ledger.decide(
            "2", "95 % interval and equivalence at +-1 %",
            [f"{name} against {reference}: PPL {ratio} ({bounds})"], says.verdict, f"{told}.",
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
    ledger.winner = {
        "baseline": reference.name,
        "strict": result.winner_strict,
        "margin": result.winner_margin,
        "reason": result.reason,
        "candidates": [
            {
                "name": verdict.name,
                "perplexity_ratio": verdict.perplexity_ratio,
                "strict": verdict.qualifies_strict,
                "margin": verdict.qualifies_margin,
                "reasons": list(verdict.reasons),
            }
            for verdict in result.candidates
        ],
    }
    tied = [f"{' and '.join(sorted(pair))} not told apart" for pair in ties]
    ledger.decide("2", "winner", tied or ["no ties"], result.readings, result.reason)


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


def _labelled(ledger: Ledger, cells: Sequence[Cell], key: str) -> dict[repeats.Label, float]:
    """`key` of the finished ones by seed and by everything else that changes bits."""
    return {
        (cell.run.seed, (ledger.result(cell) or {}).get("compute_digest")): loss
        for cell in cells
        for loss in ledger.losses([cell], key)
    }


def _interval(
    ledger: Ledger,
    ours: Sequence[Cell],
    theirs: Sequence[Cell],
    split: str,
    key: str,
    noise: repeats.Noise | None,
) -> tuple[intervals.Interval, tuple[str, ...]]:
    """Over documents and the pairs of runs that differ in the configuration alone; over seeds
    without documents. Also what was left out."""
    pairs = repeats.pair(*(_labelled(ledger, side, key) for side in (ours, theirs)))
    if not pairs.labels:  # unpaired means, and nothing follows from them
        gap = np.mean(ledger.losses(ours, key)) - np.mean(ledger.losses(theirs, key))
        nothing = intervals.Interval(float(gap), -math.inf, math.inf, 0.95, None, 0, 0)
        return nothing, pairs.left_out
    seeds = [seed for seed, _ in pairs.labels]
    kept = [[c for seed in seeds for c in side if c.run.seed == seed] for side in (ours, theirs)]
    documents = [[ledger.documents(cell, split) for cell in side] for side in kept]
    stacks = [[found.nats for found in side if found is not None] for side in documents]
    first = documents[0][0]
    if first is None or any(len(stack) < len(seeds) for stack in stacks):
        a, b = ([pair[side] for pair in pairs.pairs] for side in (0, 1))
        return intervals.seed_interval(a, b, noise=noise), pairs.left_out
    ours_nats, theirs_nats = (np.stack(stack) for stack in stacks)
    found = intervals.paired_bootstrap(ours_nats, theirs_nats, first.tokens, noise=noise)
    return found, pairs.left_out


def _ties(
    ledger: Ledger, chosen: Chosen, split: str, key: str, noise: repeats.Noise | None
) -> set[frozenset[str]]:
    """Pairs of finalists that the runs do not tell apart."""
    found = {
        frozenset((a, b)): _interval(ledger, chosen[a], chosen[b], split, key, noise)[0]
        for a, b in itertools.combinations(chosen, 2)
    }
    return {names for names, one in found.items() if not intervals.equivalence(one).told_apart}


def _rank_decision(ledger: Ledger, cells: Sequence[Cell], ranked_in: tuple[Sweep, Sweep]) -> None:
    """Do short runs and full runs agree on the order? Seed 0 of both, each model once."""
    short: dict[str, dict[int, float]] = {}
    full: dict[str, dict[int, float]] = {}
    stopped = []
    for cell in ledger.different(cells):
        name = cell.run.experiment
        shares, glu = ranked_in
        sweep = shares if name in shares.names else glu
        ranked, finished = ledger.losses(ledger.cells(sweep, [name], [0])), ledger.losses([cell])
        if ranked and finished:
            short[name], full[name] = {0: ranked[0]}, {0: finished[0]}
        elif finished:
            stopped.append(f"{name}: stopped -> {finished[0]:.4f}")
    if len(short) < 2:
        return
    found = rankings.rank_agreement(short, full)
    rho = "too few cells" if found.spearman is None else f"{found.spearman:.2f}"
    chance = "" if found.p is None else f" (p {found.p:.3f} by chance)"
    ledger.decide(
        "2", "short against full ranking",
        [*(f"{name}: {short[name][0]:.4f} -> {full[name][0]:.4f}" for name in short), *stopped],
        "same leader" if found.top1_same else "another leader",
        f"Spearman {rho}{chance} over {found.n} cells, dev loss of seed 0; finishing the short "
        f"runs' best alone would have cost {found.top1_regret:.4f} nats.",
    )  # fmt: skip


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.2f} %" if math.isfinite(ratio) else "unbounded"
