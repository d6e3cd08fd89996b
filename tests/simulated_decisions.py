"""How often does the whole decision procedure name a winner, and rightly? Simulated studies.

    python -m tests.simulated_decisions --output results/decisions

Each simulated study ranks a baseline (five seeds) and five rivals (one seed), promotes, runs the
finalists and the baseline with S seeds over documents, and asks for intervals, ties and the
winner: by the functions that judge real studies. One rival is truly better by `effect`, the others
equal the baseline; all cost the same. Writes procedure.csv and ties.csv; equal seeds write equal
files. Exit codes: 0, 78.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from src.analysis import intervals, repeats
from src.analysis.decisions import Measured, WinnerDecision, promote, winner
from src.spec.command_line import OK, Parser, at_least, refuse

EFFECTS = (0.0, 0.02, 0.05, 0.08)  # perplexity of the better rival below the baseline's
SEEDS = (1, 2, 3, 5)
RUN_SDS = (0.005, 0.02, 0.04)  # nats a token, of one run under reseeding
TIE_SDS = (0.003, 0.005, 0.008, 0.04)

# Per document and token, as three seeds of two full miniature runs show them
# (results/miniature-complete, mini-emb35 and mini-emb45): what a configuration gains or loses on
# a document, what one run does, and how far the documents' lengths spread (sd of ln tokens).
DOCUMENTS, CONFIGURATION_SD, DOCUMENT_RUN_SD, LENGTH_SD = 60, 0.026, 0.016, 1.2
DRAWS = 400  # of the bootstrap; 2,000 in a real study

BASELINE, BETTER = "baseline", "better"
RIVALS = (BETTER, "rival 1", "rival 2", "rival 3", "rival 4")
NOISE_SEEDS = 5

Losses = Mapping[repeats.Label, intervals.Floats]
"""Summed loss by document (D) of a configuration's runs."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one study found. `named` counts either reading: costs are equal here."""

    promoted: bool  # the better one is a finalist
    named: bool
    rightly: bool  # a winner is named that is truly >= 5 % better
    best_named: bool
    by_point_alone: bool  # a winner would be named if one seed were enough
    shown: bool  # named, and its difference from zero survives Holm
    covered: tuple[bool, ...]  # each finalist's 95 % interval holds its true difference
    winner_covered: bool | None
    wrongly_different: bool  # a finalist equal to the baseline is told apart from it after Holm


@dataclass(frozen=True, slots=True)
class Rates:
    """A row of procedure.csv: shares of the simulated studies (0 to 1), blank where none counts."""

    effect: float
    seeds: int
    run_sd: float
    studies: int
    better_promoted: float
    winner_named: float
    named_rightly: float
    better_named: float
    named_by_point_alone: float
    named_and_different: float
    coverage: float
    coverage_of_winner: float | None
    equal_told_apart: float


def study(rng: np.random.Generator, effect: float, seeds: int, run_sd: float) -> Outcome:
    """One simulated study, from its ranking to its winner."""
    gains = {name: 0.0 for name in (BASELINE, *RIVALS)} | {BETTER: -math.log1p(-effect)}
    finalists = _ranked(rng, gains, run_sd)
    tokens, runs = _runs(rng, {n: gains[n] for n in (BASELINE, *finalists)}, seeds, run_sd)
    noise = _noise(runs, tokens)
    against = {name: _interval(runs[name], runs[BASELINE], tokens, noise) for name in finalists}
    truth = {name: gains[BASELINE] - gains[name] for name in finalists}
    covered = {name: one.low <= truth[name] <= one.high for name, one in against.items()}
    adjusted = intervals.holm({name: one.p for name, one in against.items() if one.p is not None})
    different = {name for name, p in adjusted.items() if p <= 0.05}
    ties = _not_told_apart(runs, tokens, noise)
    decision = _winner(runs, tokens, ties)
    point = _winner(runs, tokens, ties, least_seeds=1)
    name = decision.winner_strict
    return Outcome(
        promoted=BETTER in finalists,
        named=name is not None,
        rightly=name == BETTER and effect >= 0.05,
        best_named=name == BETTER,
        by_point_alone=point.winner_strict is not None,
        shown=name in different,
        covered=tuple(covered.values()),
        winner_covered=None if name is None else covered[name],
        wrongly_different=any(gains[name] == 0 for name in different),
    )


def _ranked(rng: np.random.Generator, gains: Mapping[str, float], run_sd: float) -> list[str]:
    """The finalists: who is promoted, or the best rival where that is the baseline alone."""
    losses = {
        name: (5 - gain + rng.normal(0, run_sd, NOISE_SEEDS if name == BASELINE else 1)).tolist()
        for name, gain in gains.items()
    }
    promotion = promote(losses, repeats.pooled_noise(losses))
    chosen = [name for name in promotion.promoted if name != BASELINE]
    return chosen or [name for name, _ in promotion.ranking if name != BASELINE][:1]


def _runs(
    rng: np.random.Generator, gains: Mapping[str, float], seeds: int, run_sd: float
) -> tuple[intervals.Floats, dict[str, Losses]]:
    """Tokens of the documents (D) and the losses of every run on them. Seeds move configurations
    independently of each other, which is the worst case for pairs."""
    tokens: intervals.Floats = np.ceil(np.exp(rng.normal(7, LENGTH_SD, DOCUMENTS)))
    level = rng.normal(5, 0.17, DOCUMENTS)
    runs: dict[str, Losses] = {}
    for name, gain in gains.items():
        own = level - gain + rng.normal(0, CONFIGURATION_SD / math.sqrt(2), DOCUMENTS)
        shape = (seeds, DOCUMENTS)
        noise = rng.normal(0, run_sd, (seeds, 1)) + rng.normal(0, DOCUMENT_RUN_SD, shape)
        runs[name] = {(s, "alike"): (own + noise[s]) * tokens for s in range(seeds)}
    return tokens, runs


def _loss(nats: intervals.Floats, tokens: intervals.Floats) -> float:
    return float(nats.sum() / tokens.sum())


def _noise(runs: Mapping[str, Losses], tokens: intervals.Floats) -> repeats.Noise | None:
    return repeats.paired_noise(
        {
            name: {label: _loss(nats, tokens) for label, nats in side.items()}
            for name, side in runs.items()
        }
    )


def _interval(
    first: Losses, second: Losses, tokens: intervals.Floats, noise: repeats.Noise | None
) -> intervals.Interval:
    pairs = repeats.pair(first, second).pairs
    a, b = (np.stack([pair[side] for pair in pairs]) for side in (0, 1))
    return intervals.paired_bootstrap(a, b, tokens, noise=noise, draws=DRAWS)


def _not_told_apart(
    runs: Mapping[str, Losses], tokens: intervals.Floats, noise: repeats.Noise | None
) -> set[frozenset[str]]:
    rivals = [name for name in runs if name != BASELINE]
    return {
        frozenset((a, b))
        for a, b in itertools.combinations(rivals, 2)
        if not intervals.equivalence(_interval(runs[a], runs[b], tokens, noise)).told_apart
    }


def _winner(
    runs: Mapping[str, Losses],
    tokens: intervals.Floats,
    ties: set[frozenset[str]],
    *,
    fast: str | None = None,
    least_seeds: int = 2,
) -> WinnerDecision:
    measured = {
        name: Measured(
            name=name,
            log_perplexities=tuple(_loss(nats, tokens) for nats in side.values()),
            latency_ms_l128=5.0 if name == fast else 10.0,
            latency_ms_l512=10.0 if name == fast else 20.0,
            peak_memory_mib=50.0,
        )
        for name, side in runs.items()
    }
    baseline = measured.pop(BASELINE)
    return winner(baseline, list(measured.values()), ties=ties, least_seeds=least_seeds)


# --- rates --------------------------------------------------------------------------------------


def rates(effect: float, seeds: int, run_sd: float, studies: int, seed: int = 0) -> Rates:
    """Shares of `studies` simulated studies."""
    rng = np.random.default_rng([seed, round(1000 * effect), seeds, round(10_000 * run_sd)])
    outcomes = [study(rng, effect, seeds, run_sd) for _ in range(studies)]
    winners = [o.winner_covered for o in outcomes if o.winner_covered is not None]
    return Rates(
        effect=effect,
        seeds=seeds,
        run_sd=run_sd,
        studies=studies,
        better_promoted=_share(o.promoted for o in outcomes),
        winner_named=_share(o.named for o in outcomes),
        named_rightly=_share(o.rightly for o in outcomes),
        better_named=_share(o.best_named for o in outcomes),
        named_by_point_alone=_share(o.by_point_alone for o in outcomes),
        named_and_different=_share(o.shown for o in outcomes),
        coverage=_share(covers for o in outcomes for covers in o.covered),
        coverage_of_winner=_share(winners) if winners else None,
        equal_told_apart=_share(o.wrongly_different for o in outcomes),
    )


@dataclass(frozen=True, slots=True)
class TieRates:
    """A row of ties.csv: how often the faster of two equal models wins, by the rule for ties.

    equivalent: a tie needs an interval inside +-1 %, from the two models' own three pairs (the
    rule until now). not_told_apart: a tie is what the runs do not tell apart (the rule).
    """

    run_sd: float
    studies: int
    equivalent: float
    not_told_apart: float


def ties(run_sd: float, studies: int, seed: int = 0) -> TieRates:
    """Two equal models 15 % below the baseline, one twice as fast; three seeds."""
    rng = np.random.default_rng([seed, round(10_000 * run_sd)])
    gains = {BASELINE: 0.0, "slow": -math.log1p(-0.15), "fast": -math.log1p(-0.15)}
    before = after = 0
    pair = frozenset(("slow", "fast"))
    for _ in range(studies):
        tokens, runs = _runs(rng, gains, 3, run_sd)
        own = intervals.equivalence(_interval(runs["slow"], runs["fast"], tokens, None))
        proved = {pair} if own.verdict == "equivalent" else set()
        untold = _not_told_apart(runs, tokens, _noise(runs, tokens))
        before += _winner(runs, tokens, proved, fast="fast").winner_strict == "fast"
        after += _winner(runs, tokens, untold, fast="fast").winner_strict == "fast"
    return TieRates(run_sd, studies, before / studies, after / studies)


def _share(values: Iterable[bool]) -> float:
    return float(np.mean(list(values)))


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m tests.simulated_decisions", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--studies", type=at_least(1), default=1000, help="of each kind (1,000)")
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--output", type=Path, required=True, help="directory of the two tables")
    args = parser.parse_args(argv)
    kinds = itertools.product(RUN_SDS, EFFECTS, SEEDS)
    rows = [rates(effect, n, sd, args.studies, args.seed) for sd, effect, n in kinds]
    tied = [ties(sd, args.studies, args.seed) for sd in TIE_SDS]
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        _write(args.output / "procedure.csv", [asdict(row) for row in rows])
        _write(args.output / "ties.csv", [asdict(row) for row in tied])
    except OSError as error:
        return refuse(error)
    print(named_table([asdict(row) for row in rows]))
    print(ties_table([asdict(row) for row in tied]))
    return OK


def named_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """procedure.csv as a Markdown table: a line for each noise and number of seeds, percent."""
    lines = ["| run sd | seeds | null | 2 % | 5 % | 8 % | shown: null / 2 / 5 / 8 % | coverage |"]
    kinds: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        kinds.setdefault((str(row["run_sd"]), str(row["seeds"])), []).append(row)
    for (run_sd, seeds), kind in kinds.items():
        named = [f"{_percent(r['winner_named'])} ({_percent(r['named_rightly'])})" for r in kind]
        shown = " / ".join(_percent(r["named_and_different"]) for r in kind)
        ends = [100 * float(r["coverage"]) for r in kind]
        coverage = f"{min(ends):.0f} to {max(ends):.0f} %"
        if seeds == "1":
            named = [f"none; point {_percent(r['named_by_point_alone'])}" for r in kind]
            shown, coverage = "none", f"{coverage}, documents alone"
        lines.append(f"| {' | '.join((run_sd, seeds, *named, shown, coverage))} |")
    lines.insert(1, "|---|---|---|---|---|---|---|---|")
    return "".join(f"{line}\n" for line in lines)


def ties_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """ties.csv as a Markdown table, percent."""
    lines = ["| run sd, nats | tie by proof (before) | not told apart (now) |", "|---|---|---|"]
    for row in rows:
        before, now = (_percent(row[key]) for key in ("equivalent", "not_told_apart"))
        lines.append(f"| {row['run_sd']} | {before} % | {now} % |")
    return "".join(f"{line}\n" for line in lines)


def _percent(share: float | str) -> str:
    return f"{100 * float(share):.1f}"


def _write(path: Path, content: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(content[0]), lineterminator="\n")
        writer.writeheader()
        for row in content:
            writer.writerow({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
    print(path)


if __name__ == "__main__":
    raise SystemExit(main())
