"""Finalists against their baseline, seed by seed: speeds, intervals, the winner."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from src.analysis import decisions, intervals, rankings, repeats
from src.spec import run_identity
from src.study.builder import PlanBuilder, mean_text
from src.study.plan import Configuration

Seeds = list[Configuration]  # of one experiment
LENGTHS = (128, 512)  # prompts whose latency decides (PRD section 4)
Ratios = Mapping[int, tuple[float, float, float]]  # by length: ratio and its 95 % interval


class Judge:
    """The decisions on some experiments and their baseline, all of their seeds."""

    def __init__(
        self, builder: PlanBuilder, phase: str, baseline: Seeds, chosen: Mapping[str, Seeds]
    ) -> None:
        self.builder, self.phase = builder, phase
        self.baseline, self.chosen = baseline, chosen
        groups = (baseline, *chosen.values())
        tested = all(builder.losses(group, "test_loss") for group in groups)
        self.split, self.key = ("test", "test_loss") if tested else ("validation", "dev_loss")
        self.noise: repeats.Noise | None = None

    def _decide(self, rule: str, numbers: Sequence[str], verdict: str, reason: str) -> None:
        self.builder.decide(self.phase, rule, numbers, verdict, reason)

    # ------------------------------------------------------------------------------ speed

    def compare_speeds(self, stage: str, complete: bool) -> bool:
        """Add a comparison of each finalist with the baseline; True where all are there.

        None where the sweep measures no latency, and none of an experiment without a finished run.
        """
        measured, there = self.baseline[0].run.evaluation, True
        if not measured.latency:
            return True
        log_dir, threads = Path(self.builder.config.log_dir), self.baseline[0].run.training.threads
        for group in self.chosen.values():
            pair = self._first_finished(group)
            if pair is None and complete:
                continue
            theirs, ours = pair or (self.baseline[0].name, group[0].name)  # for the count
            name = comparison(ours, theirs)
            done = name in self.builder.state.latency
            there &= done
            arguments = ["--compare", str(log_dir / theirs), str(log_dir / ours)]
            arguments += ["--repeats", str(measured.latency_repeats)]
            arguments += ["--warmup", str(measured.latency_warmup)]
            arguments += [] if threads is None else ["--threads", str(threads)]
            self.builder.task(
                stage, "latency", group[0],
                name=name, done=done and complete, arguments=tuple(arguments),
                assumed=not complete,
            )  # fmt: skip
        return there

    def _first_finished(self, group: Seeds) -> tuple[str, str] | None:
        """(the baseline's, the group's) first finished run."""
        pair = [self.builder.finished(side) for side in (self.baseline, group)]
        if not all(pair):
            return None
        theirs, ours = (self.builder.run_of(side[0]) for side in pair)
        return theirs, ours

    def _ratios(self, group: Seeds) -> Ratios:
        """Ratio of the interleaved medians by prompt length; {} without them."""
        pair = self._first_finished(group)
        found = self.builder.state.latency.get(comparison(pair[1], pair[0]) if pair else "")
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

    def decide(self) -> None:
        """Everything that finished runs of both sides say."""
        reference = self._measured(self.baseline)
        judged: dict[str, Seeds] = {}
        for name, group in self.chosen.items():
            ended = len(self.builder.losses(group, self.key))
            if ended == len(group):
                judged[name] = group
                continue
            # A rule that stops bad seeds would leave a finalist with its good ones.
            self._decide(
                "every seed finished", [name], "out",
                f"{ended} of {len(group)} seeds finished (the others were stopped or diverged); "
                "judged on those it would be compared by its best seeds.",
            )  # fmt: skip
        if reference is None or not judged:
            self._decide(
                "winner", [], "no winner",
                "the baseline has no finished seed, or no finalist finished all of its seeds.",
            )  # fmt: skip
            return
        self.interval_decisions(judged)
        found: dict[str, decisions.Measured] = {}
        for name, group in judged.items():
            measured = self._measured(group)
            assert measured is not None
            found[name] = measured
            if ratios := self._ratios(group):
                found[name] = _relative(measured, reference, ratios)
                self._speed_decision(name, ratios)
        ties = {
            frozenset((a, b))
            for a, b in itertools.combinations(judged, 2)
            if not intervals.equivalence(self._interval(judged[a], judged[b])[0]).told_apart
        }
        self._winner_decision(reference, found, ties)

    def interval_decisions(self, judged: Mapping[str, Seeds]) -> None:
        """The 95 % interval of each against the baseline, p values after Holm; the noise is that
        of all pairs."""
        groups = {str(i): group for i, group in enumerate((self.baseline, *judged.values()))}
        self.noise = repeats.paired_noise({i: self._labelled(g) for i, g in groups.items()})
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
            results = [self.builder.result(o) or {} for o in (*judged[name], *self.baseline)]
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
        self.builder.winner = {
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

    def _measured(self, group: Seeds) -> decisions.Measured | None:
        losses = self.builder.losses(group, self.key)
        if not losses:
            return None

        def median(name: str) -> float | None:
            values = self.builder.losses(group, name)
            return float(np.median(values)) if values else None

        return decisions.Measured(
            name=group[0].run.experiment,
            log_perplexities=tuple(losses),
            latency_ms_l128=median("latency_ms_p50_l128"),
            latency_ms_l512=median("latency_ms_p50_l512"),
            peak_memory_mib=median("peak_memory_mib"),
        )

    def _labelled(self, group: Sequence[Configuration]) -> dict[repeats.Label, float]:
        """Losses of the finished ones by seed and by the program that computed them."""
        return {
            (one.run.seed, run_identity.computed_as(self.builder.result(one) or {})): loss
            for one in group
            for loss in self.builder.losses([one], self.key)
        }

    def _interval(self, ours: Seeds, theirs: Seeds) -> tuple[intervals.Interval, tuple[str, ...]]:
        """Over documents and the pairs of runs that differ in the configuration alone; over seeds
        without documents. Also what was left out."""
        pairs = repeats.pair(*(self._labelled(side) for side in (ours, theirs)))
        if not pairs.labels:  # unpaired means, and nothing follows from them
            means = [np.mean(self.builder.losses(side, self.key)) for side in (ours, theirs)]
            gap = float(means[0] - means[1])
            return intervals.Interval(gap, -math.inf, math.inf, None, 0, 0), pairs.left_out
        seeds = [seed for seed, _ in pairs.labels]
        stacks = []
        for side in (ours, theirs):
            kept = [one for seed in seeds for one in side if one.run.seed == seed]
            found = [self.builder.documents(one, self.split) for one in kept]
            stacks.append([one for one in found if one is not None])
        if any(len(stack) < len(seeds) for stack in stacks):
            losses = ([pair[side] for pair in pairs.pairs] for side in (0, 1))
            return intervals.seed_interval(*losses, noise=self.noise), pairs.left_out
        a, b = (np.stack([one.nats for one in stack]) for stack in stacks)
        interval = intervals.paired_bootstrap(a, b, stacks[0][0].tokens, noise=self.noise)
        return interval, pairs.left_out


def comparison(ours: str, theirs: str) -> str:
    """Where an interleaved comparison of two runs lies, below the log directory."""
    pair = f"{ours}-against-{theirs}".replace("/", "-")
    return f"latency/{pair}.json"


def _relative(
    ours: decisions.Measured, reference: decisions.Measured, ratios: Ratios
) -> decisions.Measured:
    """Latencies as the interleaved ratios say: medians of two processes differ by several percent
    from hour to hour, those of one process by the models."""

    def scaled(base: float | None, length: int) -> float | None:
        return None if base is None else base * ratios[length][0]

    return replace(
        ours,
        latency_ms_l128=scaled(reference.latency_ms_l128, 128),
        latency_ms_l512=scaled(reference.latency_ms_l512, 512),
    )


def rank_agreement(
    builder: PlanBuilder, full: Sequence[Configuration], ranked: Sequence[Configuration]
) -> None:
    """Do short runs and full runs agree on the order? Seed 0 of both, each model once."""
    by_name = {one.run.experiment: builder.losses([one]) for one in ranked if one.run.seed == 0}
    short: dict[str, dict[int, float]] = {}
    long: dict[str, dict[int, float]] = {}
    stopped = []
    for one in builder.different([one for one in full if one.run.seed == 0]):
        name, finished = one.run.experiment, builder.losses([one])
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
    builder.decide(
        "2", "short against full ranking",
        [*(f"{name}: {short[name][0]:.4f} -> {long[name][0]:.4f}" for name in short), *stopped],
        "same leader" if found.top1_same else "another leader",
        f"Spearman {rho}{chance} over {found.n} experiments, dev loss of seed 0; finishing the "
        f"short runs' best alone would have cost {found.top1_regret:.4f} nats.",
    )  # fmt: skip


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.2f} %" if math.isfinite(ratio) else "unbounded"
