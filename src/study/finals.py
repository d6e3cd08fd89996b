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

        No comparison where the sweep measures no latency, nor of an experiment without a finished
        run.
        """
        evaluation, all_there = self.baseline[0].run.evaluation, True
        if not evaluation.latency:
            return True
        log_dir, threads = self.plan.study.config.log_dir, self.baseline[0].run.training.threads
        for group in self.chosen.values():
            pair = self._first_finished(group)
            if pair is None and complete:
                continue
            baseline_run, run = pair or (self.baseline[0].name, group[0].name)  # for the count
            name = comparison(run, baseline_run)
            done = name in self.plan.state.latency
            all_there &= done
            arguments = ["--compare", str(Path(log_dir, baseline_run)), str(Path(log_dir, run))]
            arguments += ["--repeats", str(evaluation.latency_repeats)]
            arguments += ["--warmup", str(evaluation.latency_warmup)]
            arguments += [] if threads is None else ["--threads", str(threads)]
            self.plan.task(
                LATENCY, "latency", group[0], name,
                done=done and complete, assumed=not complete, arguments=tuple(arguments),
            )  # fmt: skip
        return all_there

    def _first_finished(self, group: Seeds) -> tuple[str, str] | None:
        """(the baseline's, the group's) first finished run."""
        baselines, finished = (self.plan.finished(side) for side in (self.baseline, group))
        if not (baselines and finished):
            return None
        return self.plan.run_of(baselines[0]), self.plan.run_of(finished[0])

    def _ratios(self, group: Seeds) -> Ratios:
        """Ratio of the interleaved medians by prompt length; {} without them."""
        pair = self._first_finished(group)
        result = self.plan.state.latency.get(comparison(pair[1], pair[0]) if pair else "")
        if result is None:
            return {}
        rows = {n: result["comparison"][f"l{n}"] for n in LENGTHS}
        return {n: (row["ratio"], row["ratio_low"], row["ratio_high"]) for n, row in rows.items()}

    def _speed_decision(self, name: str, ratios: Ratios) -> None:
        texts = [
            f"l{length} {_percent(ratio)} ({_percent(low)} to {_percent(high)})"
            for length, (ratio, low, high) in ratios.items()
        ]
        slower = any(low > 1 for _, low, _ in ratios.values())
        faster = all(high < 1 for _, _, high in ratios.values())
        self._decide(
            "latency, interleaved in one process",
            [f"{name} against {self.baseline[0].run.experiment}", *texts],
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
        measured = {name: self._measured(group) for name, group in judged.items()}
        for name, group in judged.items():
            if ratios := self._ratios(group):
                measured[name] = _relative(measured[name], reference, ratios)
                self._speed_decision(name, ratios)
        ties = {
            frozenset((a, b))
            for a, b in itertools.combinations(judged, 2)
            if (interval := self._interval(judged[a], judged[b])[0]).seeds > 1
            and not intervals.equivalence(interval).told_apart
        }
        self._winner_decision(reference, measured, ties)

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
        pairing = repeats.pair(*sides)
        alike = not pairing.left_out or min(map(len, sides)) < 2
        if not alike:
            reasons = "; ".join(pairing.left_out)
            self._decide("every seed computed alike", [name], "out", f"left out: {reasons}.")
        return alike

    def interval_decisions(self, judged: Mapping[str, Seeds]) -> None:
        """The 95 % interval of each against the baseline, p values after Holm; the noise is that
        of all pairs."""
        groups = [self._labelled(group) for group in (self.baseline, *judged.values())]
        losses = {
            str(i): {label: self.plan.losses([c], self.key)[0] for label, c in group.items()}
            for i, group in enumerate(groups)
        }
        self.noise = repeats.paired_noise(losses)
        reference = self.baseline[0].run.experiment
        compared = {name: self._interval(group, self.baseline) for name, group in judged.items()}
        p_values = {name: i.p for name, (i, _) in compared.items() if i.p is not None}
        adjusted = intervals.holm(p_values)
        for name, (interval, left_out) in compared.items():
            equivalence = intervals.equivalence(interval)
            low, ratio, high = (_percent(value) for value in interval.ratio)
            bounds = f"{low} to {high}" + ("" if interval.seeds > 1 else ", document noise only")
            text = f"{equivalence.statement} {interval.seeds} seeds, {interval.documents} documents"
            if name in adjusted:
                text += f"; p {p_values[name]:.4f}, {adjusted[name]:.4f} after Holm"
                if self.noise is not None:
                    text += f"; seed noise {self.noise.sd:.4f} from all pairs ({self.noise.df} df)"
            results = [self.plan.result(c) or {} for c in (*judged[name], *self.baseline)]
            kinds = sorted({r["processors"] for r in results if r.get("processors")})
            if len(kinds) > 1:
                text += f"; computed on {len(kinds)} kinds of processor ({', '.join(kinds)}), "
                text += "whose rounding is part of the differences"
            if left_out:
                text += f"; left out: {'; '.join(left_out)}"
            self._decide(
                "95 % interval and equivalence at +-1 %",
                [f"{name} against {reference}: PPL {ratio} ({bounds})"],
                equivalence.verdict, f"{text}.",
            )  # fmt: skip

    def _winner_decision(
        self,
        reference: decisions.Measured,
        measured: Mapping[str, decisions.Measured],
        ties: set[frozenset[str]],
    ) -> None:
        result = decisions.winner(reference, list(measured.values()), ties=ties)
        for verdict in result.candidates:
            self._decide(
                ">= 5 % lower PPL, latency and memory not above the baseline's",
                [f"{verdict.name}: {mean_text(measured[verdict.name].log_perplexities)} nats"
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
            (c.run.seed, run_identity.computed_as(self.plan.result(c) or {})): c
            for c in group
            if self.plan.losses([c], self.key)
        }

    def _interval(self, ours: Seeds, theirs: Seeds) -> tuple[intervals.Interval, tuple[str, ...]]:
        """Over documents and the pairs of runs that differ in the configuration alone; over seeds
        without documents. Also what was left out."""
        pairing = repeats.pair(self._labelled(ours), self._labelled(theirs))
        if not pairing.pairs:  # unpaired means, and nothing follows from them
            means = [np.mean(self.plan.losses(side, self.key)) for side in (ours, theirs)]
            gap = float(means[0] - means[1])
            return intervals.Interval(gap, -math.inf, math.inf, None, 0, 0), pairing.left_out
        sides = list(zip(*pairing.pairs, strict=True))
        documents = [
            [kept for c in side if (kept := self.plan.documents(c, self.split)) is not None]
            for side in sides
        ]
        if any(len(kept) < len(pairing.pairs) for kept in documents):
            losses = (self.plan.losses(side, self.key) for side in sides)
            return intervals.seed_interval(*losses, noise=self.noise), pairing.left_out
        a, b = (np.stack([document.nats for document in kept]) for kept in documents)
        interval = intervals.paired_bootstrap(a, b, documents[0][0].tokens, noise=self.noise)
        return interval, pairing.left_out


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
    by_name = {c.run.experiment: plan.losses([c]) for c in ranked if c.run.seed == 0}
    short: dict[str, dict[int, float]] = {}
    long: dict[str, dict[int, float]] = {}
    stopped = []
    for configuration in plan.distinct([c for c in full if c.run.seed == 0]):
        name, full_losses = configuration.run.experiment, plan.losses([configuration])
        ranked_losses = by_name.get(name)
        if ranked_losses and full_losses:
            short[name], long[name] = {0: ranked_losses[0]}, {0: full_losses[0]}
        elif full_losses:
            stopped.append(f"{name}: stopped -> {full_losses[0]:.4f}")
    if len(short) < 2:
        return
    agreement = rankings.rank_agreement(short, long)
    rho = "too few runs" if agreement.spearman is None else f"{agreement.spearman:.2f}"
    chance = "" if agreement.p is None else f" (p {agreement.p:.3f} by chance)"
    plan.decide(
        "2", "short against full ranking",
        [*(f"{name}: {short[name][0]:.4f} -> {long[name][0]:.4f}" for name in short), *stopped],
        "same leader" if agreement.top1_same else "another leader",
        f"Spearman {rho}{chance} over {agreement.n} experiments, dev loss of seed 0; finishing the "
        f"short runs' best alone would have cost {agreement.top1_regret:.4f} nats.",
    )  # fmt: skip


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.2f} %" if math.isfinite(ratio) else "unbounded"
