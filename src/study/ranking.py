"""What checks and ranking runs say: the seed noise, who is promoted, rates, the kill rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from src.analysis import decisions, kill_replay, rankings, repeats
from src.spec import kill_rule
from src.spec.config import Sweep
from src.spec.rates import spelled
from src.study.builder import PlanBuilder, mean_text
from src.study.plan import Configuration, Metrics


def sanity_decisions(builder: PlanBuilder, found: Metrics) -> None:
    failed = [name for name, fine in found["checks"].items() if not fine]
    memorised = found["overfit_loss"]
    last = "not a number" if memorised is None else f"{memorised:.3f}"
    numbers = [
        f"initial loss {found['initial_loss']:.3f} (ln V {found['ln_vocab']:.3f})",
        f"{found['overfit_tokens']} tokens to loss {last} in {found['overfit_steps']} steps",
    ]
    verdict = "passed" if not failed else f"failed: {', '.join(failed)}"
    builder.decide("0", "sanity", numbers, verdict, found["reason"])
    rate, configured = found["suggested_learning_rate"], found["learning_rate"]
    near = rate is not None and 0.25 <= configured / rate <= 4
    suggested = "none" if rate is None else f"{rate:.2g}"
    builder.decide(
        "0", "learning-rate range test",
        [f"suggested {suggested}", f"configured {configured:g}"],
        f"keep {configured:g}" + ("" if near else ", which is far from the suggestion"),
        found["learning_rate_rule"],
    )  # fmt: skip


def noise_decision(
    builder: PlanBuilder, losses: Mapping[str, Sequence[float]], noise: repeats.Noise | None
) -> None:
    """One configuration's seeds at the ranking budget."""
    builder.decide(
        "0", "seed noise",
        [f"{name}: {len(found)} seeds, dev loss {mean_text(found)}"
         for name, found in losses.items()],
        f"sd {'unknown' if noise is None else f'{noise.sd:.4f} nats'}",
        "seeds at the ranking budget; thin margins are measured against it.",
    )  # fmt: skip


def promoted(
    builder: PlanBuilder,
    noise: repeats.Noise | None,
    block: str,
    some: Sequence[Configuration],
    losses: Mapping[str, Sequence[float]],
) -> decisions.Promotion:
    """Who leads, by dev losses of each experiment's seeds; one without any was stopped."""
    stopped = [name for name, found in losses.items() if not found]
    promotion = decisions.promote(losses, noise)
    numbers = [f"{name} {loss:.4f}" for name, loss in promotion.ranking]
    numbers += [f"{name} stopped" for name in stopped]
    slopes = [f"{one.run.experiment} {_slope(builder.curve(one))}" for one in some]
    builder.decide(
        "1", f"lowest dev loss, block {block}", numbers, ", ".join(promotion.promoted),
        promotion.reason,
    )  # fmt: skip
    builder.decide(
        "1", f"dev PPL slope, block {block}", slopes, "recorded",
        "d ln PPL / d ln tokens over the last half of each run.",
    )  # fmt: skip
    return promotion


def _slope(curve: kill_rule.Curve) -> str:
    found = rankings.log_slope(curve)
    return "unknown" if found is None else f"{found:+.3f}"


# ------------------------------------------------------------------------------ learning rates


@dataclass(frozen=True, slots=True)
class Tried:
    """One share on the ranking budget: dev loss by learning rate of what finished, seed 0.

    listed: every rate that was to be tried; shared: the one that its file states.
    """

    losses: Mapping[float, float]
    listed: tuple[float, ...]
    shared: float

    @property
    def best(self) -> float | None:
        """The tried rate with the lowest loss; never one that was not tried."""
        return min(self.losses, key=lambda rate: self.losses[rate], default=None)

    @property
    def end(self) -> str:
        """Where the best is the list's lowest or highest rate: that it may lie beyond."""
        if self.best == max(self.listed):
            return ", the highest tried: its best may lie above"
        if self.best == min(self.listed):
            return ", the lowest tried: its best may lie below"
        return ""


def tried_rates(
    builder: PlanBuilder,
    sweep: Sweep,
    some: Sequence[Configuration],
    stated: Mapping[str, float],
) -> dict[str, Tried]:
    """What each experiment reached at each rate. stated: the rates without a list."""
    found = {}
    for name, rate in stated.items():
        alike = [one for one in some if one.run.experiment in sweep.named(name)]
        by_rate = {one.run.training.learning_rate: builder.losses([one]) for one in alike}
        losses = {tried: loss[0] for tried, loss in by_rate.items() if loss}
        found[name] = Tried(losses, tuple(by_rate), rate)
    return found


def rate_decision(
    builder: PlanBuilder, noise: repeats.Noise | None, tried: Mapping[str, Tried]
) -> decisions.Promotion:
    """The order of the shares at each one's own best rate (returned) and at the shared rate, with
    one seed on either side of every comparison."""
    own = {name: [t.losses[t.best]] for name, t in tried.items() if t.best is not None}
    shared = {name: [t.losses[t.shared]] for name, t in tried.items() if t.shared in t.losses}
    readings = [decisions.promote(losses, noise) for losses in (own, shared) if losses]
    numbers = []
    for name, found in tried.items():
        best = "nothing finished"
        if found.best is not None:
            best = f"{own[name][0]:.4f} at its best, {spelled(found.best)}{found.end}"
        at = f"{shared[name][0]:.4f}" if name in shared else "not tried or not finished"
        numbers.append(f"{name}: {best}; {at} at the shared {spelled(found.shared)}")
    orders = [[name for name, _ in promotion.ranking] for promotion in readings]
    told = [" or ".join(promotion.promoted) for promotion in readings]
    told += ["unknown"] * (2 - len(told))
    reasons = " Shared: ".join(promotion.reason for promotion in readings)
    builder.decide(
        "1", "embedding share at each one's own best rate, and at the shared rate", numbers,
        f"own best: {told[0]}; shared: {told[1]}",
        f"{'the same' if orders[0] == orders[-1] else 'another'} order of the shares. Own best: "
        f"{reasons} One seed a run; no rate beyond the list is guessed, and the lowest of several "
        "runs flatters every share alike.",
    )  # fmt: skip
    return readings[0]


# --------------------------------------------------------------------------------- kill rule


def kill_decisions(builder: PlanBuilder, phase: str, some: Sequence[Configuration]) -> None:
    """Both readings of the kill rule for every experiment, from the curves."""
    curves = {one.run.experiment: builder.curve(one) for one in some}
    for one in some:
        stated, name = one.run.kill_rule, one.run.experiment
        result = builder.result(one)
        if result is not None and result["status"] == "failed":
            builder.decide(phase, "diverged", [name], "out", str(result.get("reason")))
        elif stated is not None and not one.is_baseline:
            rule = stated.in_run(one.run.training.tokens)
            found = kill_rule.verdict(rule, curves[one.run.baseline], curves[name])
            verdict = f"{found.kind}; to the PRD's letter {found.literal_kind}"
            live = (result or {}).get("kill_verdict")
            if live is not None and live != found.kind:  # asked before the baseline's curve was
                verdict += f"; while it trained {live}"
            builder.decide(
                phase, "kill rule", [f"{name} against {one.run.baseline}"], verdict, found.reason
            )
    _replay_decision(builder, phase, some)


def _replay_decision(builder: PlanBuilder, phase: str, some: Sequence[Configuration]) -> None:
    """How often the rule would have killed a run that ended no worse than the baseline."""
    baseline = next(one for one in some if one.is_baseline)
    reference, stated = builder.curve(baseline), baseline.run.kill_rule
    curves = {one.run.experiment: builder.curve(one) for one in some if one is not baseline}
    complete = {
        name: curve
        for name, curve in curves.items()
        if curve and reference and curve[-1][0] == reference[-1][0]
    }
    if stated is None or not complete:
        return
    told = []
    for label, rule in (
        ("letter", replace(stated, grace_tokens=0)),
        ("grace", stated.in_run(baseline.run.training.tokens)),
    ):
        found = [kill_replay.replay(reference, curve, rule) for curve in complete.values()]
        told.append(
            f"{label}: {sum(one.killed_at is not None for one in found)} kills, "
            f"{sum(one.false_kill for one in found)} false, "
            f"{sum(one.tokens_saved for one in found):,} of "
            f"{sum(one.budget for one in found):,} tokens saved"
        )
    builder.decide(
        phase, f"kill rule replayed, {baseline.path.name}", told, "recorded",
        f"over the {len(complete)} runs that ran to the end; false: ended no worse than the "
        "baseline.",
    )  # fmt: skip
