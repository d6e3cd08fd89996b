"""Finalists against their baseline, seed by seed: speeds, intervals, the winner."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from src.analysis import decisions, intervals, rankings, repeats
from src.spec import run_identity
from src.study.plan import LATENCY, Configuration, Plan
from src.study.ranking import mean_text

Seeds = list[Configuration]  # of one experiment
LENGTHS = (128, 512)  # prompts whose latency decides (PRD section 4)
Ratios = Mapping[int, tuple[float, float, float]]  # by length: ratio and its 95 % interval


class Judge:
    """The decisions on some experiments and their baseline, all of their seeds."""

    def __init__(
        self, plan: Plan, phase: str, baseline: Seeds, chosen: Mapping[str, Seeds]
    ) -> None:
        self.plan, self.phase = plan, phase
        self.baseline, self.chosen = baseline, chosen
        groups = (baseline, *chosen.values())
        tested = all(plan.losses(group, "test_loss") for group in groups)
        self.split, self.key = ("test", "test_loss") if tested else ("validation", "dev_loss")
        self.noise: repeats.Noise | None = None

    def _decide(self, rule: str, numbers: Sequence[str], verdict: str, reason: str) -> None:
        self.plan.decide(self.phase, rule, numbers, verdict, reason)

    # ------------------------------------------------------------------------------ speed

    def compare_speeds(self, complete: bool) -> bool:
        """Add a comparison of each finalist with the baseline; True where all are there.

        None where the sweep measures no latency, and none of an experiment without a finished run.
        """
        measured, there = self.baseline[0].run.evaluation, True
        if not measured.latency:
            return True
        log_dir, threads = self.plan.study.config.log_dir, self.baseline[0].run.training.threads
        for group in self.chosen.values():
            pair = self._first_finished(group)
            if pair is None and complete:
                continue
            theirs, ours = pair or (self.baseline[0].name, group[0].name)  # for the count
            name = comparison(ours, theirs)
            done = name in self.plan.state.latency
            there &= done
            arguments = ["--compare", str(Path(log_dir, theirs)), str(Path(log_dir, ours))]
            arguments += ["--repeats", str(measured.latency_repeats)]
            arguments += ["--warmup", str(measured.latency_warmup)]
            arguments += [] if threads is None else ["--threads", str(threads)]
            self.plan.task(
                LATENCY, "latency", group[0], name,
                done=done and complete, assumed=not complete, arguments=tuple(arguments),
            )  # fmt: skip
        return there

    def _first_finished(self, group: Seeds) -> tuple[str, str] | None:
        """(the baseline's, the group's) first finished run."""
        theirs, ours = (self.plan.finished(side) for side in (self.baseline, group))
        return (self.plan.run_of(theirs[0]), self.plan.run_of(ours[0])) if theirs and ours else None

    def _ratios(self, group: Seeds) -> Ratios:
        """Ratio of the interleaved medians by prompt length; {} without them."""
        pair = self._first_finished(group)
        found = self.plan.state.latency.get(comparison(pair[1], pair[0]) if pair else "")
        if found is None:
            return {}
        rows = {length: found["comparison"][f"l{length}"] for length in LENGTHS}
        return {n: (row["ratio"], row["ratio_low"], row["ratio_high"]) for n, row in rows.items()}

    def _speed_decision(self, name: str, ratios: Ratios) -> None:
        told = [
            f"l{length} {_percent(ratio)} ({_percent(low)} to {_percent(high)})"
            for length, (ratio, low, high) in ratios.items()
        ]
        slower = any(low > 1 for _, low, _ in ratios.values())
        faster = all(high < 1 for _, _, high in ratios.values())
        self._decide(
            "latency, interleaved in one process",
            [f"{name} against {self.baseline[0].run.experiment}", *told],
            "slower" if slower else "faster" if faster else "not told apart at every length",
            "ratio of medians at batch 1 with its 95 % interval; the winner rule reads these "
            "ratios.",
        )

    # -------------------------------------------------------------------------- decisions

    def decide(self, speeds: bool) -> None:
        """Everything that finished runs of both sides say; who wins only once all `speeds` are
        there."""
        judged = {name: g for name, g in self.chosen.items() if self._every_seed_finished(name, g)}
        if not judged or not self.plan.losses(self.baseline, self.key):
            self._no_winner(
                "the baseline has no finished seed, or no finalist finished all of its seeds."
            )
            return
        self.interval_decisions(judged)
        if not speeds:
            return
        judged = {name: g for name, g in judged.items() if self._computed_alike(name, g)}
        if not judged:
            self._no_winner("no finalist has its seeds computed as the baseline's were.")
            return
        reference = self._measured(self.baseline)
        found = {name: self._measured(group) for name, group in judged.items()}
        for name, group in judged.items():
            if ratios := self._ratios(group):
                found[name] = _relative(found[name], reference, ratios)
                self._speed_decision(name, ratios)
        ties = {
            frozenset((a, b))
            for a, b in itertools.combinations(judged, 2)
            if (found_pair := self._interval(judged[a], judged[b])[0]).seeds > 1
            and not intervals.equivalence(found_pair).told_apart
        }
        self._winner_decision(reference, found, ties)

    def _no_winner(self, reason: str) -> None:
        self._decide("winner", [], "no winner", reason)

    def _every_seed_finished(self, name: str, group: Seeds) -> bool:
        """A rule that stops bad seeds would leave a finalist with its good ones."""
        ended = len(self.plan.losses(group, self.key))
        if ended < len(group):
            self._decide(
                "every seed finished", [name], "out",
                f"{ended} of {len(group)} seeds finished (the others were stopped or diverged); "
                "judged on those it would be compared by its best seeds.",
            )  # fmt: skip
        return ended == len(group)

    def _computed_alike(self, name: str, group: Seeds) -> bool:
        """Whether all seeds pair, where both sides have two: what another program computed differs
        by that as well, and could carry a mean."""
        sides = [self._labelled(group), self._labelled(self.baseline)]
        found = repeats.pair(*sides)
        alike = not found.left_out or min(map(len, sides)) < 2
        if not alike:
            told = "; ".join(found.left_out)
            self._decide("every seed computed alike", [name], "out", f"left out: {told}.")
        return alike

    def interval_decisions(self, judged: Mapping[str, Seeds]) -> None:
        """The 95 % interval of each against the baseline, p values after Holm; the noise is that
        of all pairs."""
        groups = [self._labelled(group) for group in (self.baseline, *judged.values())]
        losses = [{k: self.plan.losses([c], self.key)[0] for k, c in g.items()} for g in groups]
        self.noise = repeats.paired_noise({str(i): found for i, found in enumerate(losses)})
        reference = self.baseline[0].run.experiment
        found = {name: self._interval(group, self.baseline) for name, group in judged.items()}
        p = {name: one.p for name, (one, _) in found.items() if one.p is not None}
        adjusted = intervals.holm(p)
        for name, (interval, left_out) in found.items():
            says = intervals.equivalence(interval)
            low, ratio, high = (_percent(value) for value in interval.ratio)
            bounds = f"{low} to {high}" + ("" if interval.seeds > 1 else ", document noise only")
            told = f"{says.statement} {interval.seeds} seeds, {interval.documents} documents"
            if name in adjusted:
                told += f"; p {p[name]:.4f}, {adjusted[name]:.4f} after Holm"
                if self.noise is not None:
                    told += f"; seed noise {self.noise.sd:.4f} from all pairs ({self.noise.df} df)"
            results = [self.plan.result(o) or {} for o in (*judged[name], *self.baseline)]
            kinds = sorted({r["processors"] for r in results if r.get("processors")})
            if len(kinds) > 1:
                told += f"; computed on {len(kinds)} kinds of processor ({', '.join(kinds)}), "
                told += "whose rounding is part of the differences"
            if left_out:
                told += f"; left out: {'; '.join(left_out)}"
            self._decide(
                "95 % interval and equivalence at +-1 %",
                [f"{name} against {reference}: PPL {ratio} ({bounds})"], says.verdict, f"{told}.",
            )  # fmt: skip

    def _winner_decision(
        self,
        reference: decisions.Measured,
        found: Mapping[str, decisions.Measured],
        ties: set[frozenset[str]],
    ) -> None:
        result = decisions.winner(reference, list(found.values()), ties=ties)
        for verdict in result.candidates:
            self._decide(
                ">= 5 % lower PPL, latency and memory not above the baseline's",
                [f"{verdict.name}: {mean_text(found[verdict.name].log_perplexities)} nats"
                 f" against {mean_text(reference.log_perplexities)}"],
                "qualifies" if verdict.qualifies_strict
                else "qualifies within the 3 % margin" if verdict.qualifies_margin
                else "does not",
                "; ".join(verdict.reasons),
            )  # fmt: skip
        self.plan.winner = {
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
        self._decide("winner", tied or ["no ties"], result.readings, result.reason)

    # --------------------------------------------------------------------------- numbers

    def _measured(self, group: Seeds) -> decisions.Measured:
        def median(name: str) -> float | None:
            values = self.plan.losses(group, name)
            return float(np.median(values)) if values else None

        return decisions.Measured(
            name=group[0].run.experiment,
            log_perplexities=tuple(self.plan.losses(group, self.key)),
            latency_ms_l128=median("latency_ms_p50_l128"),
            latency_ms_l512=median("latency_ms_p50_l512"),
            peak_memory_mib=median("peak_memory_mib"),
        )

    def _labelled(self, group: Seeds) -> dict[repeats.Label, Configuration]:
        """The finished ones by seed and by the program that computed them."""
        return {
            (one.run.seed, run_identity.computed_as(self.plan.result(one) or {})): one
            for one in group
            if self.plan.losses([one], self.key)
        }

    def _interval(self, ours: Seeds, theirs: Seeds) -> tuple[intervals.Interval, tuple[str, ...]]:
        """Over documents and the pairs of runs that differ in the configuration alone; over seeds
        without documents. Also what was left out."""
        found = repeats.pair(self._labelled(ours), self._labelled(theirs))
        if not found.pairs:  # unpaired means, and nothing follows from them
            means = [np.mean(self.plan.losses(side, self.key)) for side in (ours, theirs)]
            gap = float(means[0] - means[1])
            return intervals.Interval(gap, -math.inf, math.inf, None, 0, 0), found.left_out
        sides = list(zip(*found.pairs, strict=True))
        documents = [
            [kept for one in side if (kept := self.plan.documents(one, self.split)) is not None]
            for side in sides
        ]
        if any(len(kept) < len(found.pairs) for kept in documents):
            losses = (self.plan.losses(side, self.key) for side in sides)
            return intervals.seed_interval(*losses, noise=self.noise), found.left_out
        a, b = (np.stack([one.nats for one in kept]) for kept in documents)
        interval = intervals.paired_bootstrap(a, b, documents[0][0].tokens, noise=self.noise)
        return interval, found.left_out


def comparison(ours: str, theirs: str) -> str:
    """Where an interleaved comparison of two runs lies, below the log directory."""
    pair = f"{ours}-against-{theirs}".replace("/", "-")
    return f"latency/{pair}.json"


def _relative(
    ours: decisions.Measured, reference: decisions.Measured, ratios: Ratios
) -> decisions.Measured:
    """Latencies as the interleaved ratios say: medians of two processes differ by several percent
    from hour to hour, those of one process by the models."""
    scaled: dict[str, Any] = {}
    for length, (ratio, _, _) in ratios.items():
        key = f"latency_ms_l{length}"
        base = getattr(reference, key)
        scaled[key] = None if base is None else base * ratio
    return replace(ours, **scaled)


def rank_agreement(
    plan: Plan, full: Sequence[Configuration], ranked: Sequence[Configuration]
) -> None:
    """Do short runs and full runs agree on the order? Seed 0 of both, each model once."""
    by_name = {one.run.experiment: plan.losses([one]) for one in ranked if one.run.seed == 0}
    short: dict[str, dict[int, float]] = {}
    long: dict[str, dict[int, float]] = {}
    stopped = []
    for one in plan.different([one for one in full if one.run.seed == 0]):
        name, finished = one.run.experiment, plan.losses([one])
        before = by_name.get(name)
        if before and finished:
            short[name], long[name] = {0: before[0]}, {0: finished[0]}
        elif finished:
            stopped.append(f"{name}: stopped -> {finished[0]:.4f}")
    if len(short) < 2:
        return
    found = rankings.rank_agreement(short, long)
    rho = "too few runs" if found.spearman is None else f"{found.spearman:.2f}"
    chance = "" if found.p is None else f" (p {found.p:.3f} by chance)"
    plan.decide(
        "2", "short against full ranking",
        [*(f"{name}: {short[name][0]:.4f} -> {long[name][0]:.4f}" for name in short), *stopped],
        "same leader" if found.top1_same else "another leader",
        f"Spearman {rho}{chance} over {found.n} experiments, dev loss of seed 0; finishing the "
        f"short runs' best alone would have cost {found.top1_regret:.4f} nats.",
    )  # fmt: skip


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.2f} %" if math.isfinite(ratio) else "unbounded"
