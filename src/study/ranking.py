"""What checks and ranking runs say: the seed noise, who is promoted, rates, the kill rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from src.analysis import decisions, rankings, repeats
from src.spec import kill_rule
from src.spec.config import Sweep
from src.spec.rates import spelled
from src.study import sanity
from src.study.plan import Configuration, Metrics, Plan


def mean_text(values: Sequence[float]) -> str:
    """Mean +- sd for people; a single value has no sd."""
    if not values:
        return "unknown"
    found = repeats.mean_sd(values)
    return f"{found.mean:.4f}" + ("" if found.sd is None else f" +- {found.sd:.4f}")


def sanity_decisions(plan: Plan, found: Metrics) -> None:
    """What phase 0's checks found, and the learning rate that stays."""
    failed = [name for name, fine in found["checks"].items() if not fine]
    verdict = "passed" if not failed else f"failed: {', '.join(failed)}"
    plan.decide("0", "sanity", sanity.losses_text(found), verdict, found["reason"])
    rate, configured = found["suggested_learning_rate"], found["learning_rate"]
    near = rate is not None and 0.25 <= configured / rate <= 4
    plan.decide(
        "0", "learning-rate range test", sanity.rates_text(found),
        f"keep {configured:g}" + ("" if near else ", which is far from the suggestion"),
        found["learning_rate_rule"],
    )  # fmt: skip


def noise_decision(
    plan: Plan, losses: Mapping[str, Sequence[float]], noise: repeats.Noise | None
) -> None:
    """One configuration's seeds at the ranking budget."""
    plan.decide(
        "0", "seed noise",
        [f"{name}: {len(found)} seeds, dev loss {mean_text(found)}"
         for name, found in losses.items()],
        f"sd {'unknown' if noise is None else f'{noise.sd:.4f} nats'}",
        "seeds at the ranking budget; thin margins are measured against it.",
    )  # fmt: skip


def promoted(
    plan: Plan,
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
    slopes = [f"{one.run.experiment} {_slope(plan.curve(one))}" for one in some]
    plan.decide(
        "1", f"lowest dev loss, block {block}", numbers, ", ".join(promotion.promoted),
        promotion.reason,
    )  # fmt: skip
    plan.decide(
        "1", f"dev PPL slope, block {block}", slopes, "recorded",
        "d ln PPL / d ln tokens over the last half of each run.",
    )  # fmt: skip
    return promotion


def _slope(curve: kill_rule.Curve) -> str:
    found = rankings.log_slope(curve)
    return "unknown" if found is None else f"{found:+.3f}"


# ------------------------------------------------------------------------------ learning rates


def rate_decision(
    plan: Plan,
    noise: repeats.Noise | None,
    sweep: Sweep,
    some: Sequence[Configuration],
    stated: Mapping[str, float],
) -> tuple[decisions.Promotion, dict[str, str]]:
    """The order of the shares at each one's own best rate and at the shared one, with one seed on
    either side of every comparison. stated: the shared rates, which the file has without the list.

    Returns the order at the best rates, and each share's run at its own: never one that was not
    tried.
    """
    own: dict[str, list[float]] = {}
    shared: dict[str, list[float]] = {}
    best: dict[str, str] = {}
    numbers = []
    for name, at in stated.items():
        alike = [one for one in some if one.run.experiment in sweep.named(name)]
        tried = {one.run.training.learning_rate: one for one in alike}
        losses = {rate: loss for rate, one in tried.items() for loss in plan.losses([one])}
        told, there = "nothing finished", "not tried or not finished"
        if losses:
            rate = min(losses, key=lambda rate: losses[rate])
            own[name], best[name] = [losses[rate]], tried[rate].run.experiment
            told = f"{losses[rate]:.4f} at its best, {spelled(rate)}"
            if rate == max(tried):
                told += ", the highest tried: its best may lie above"
            elif rate == min(tried):
                told += ", the lowest tried: its best may lie below"
        if at in losses:
            shared[name], there = [losses[at]], f"{losses[at]:.4f}"
        numbers.append(f"{name}: {told}; {there} at the shared {spelled(at)}")
    at_best = decisions.promote(own, noise)
    at_shared = decisions.promote(shared, noise) if shared else None
    orders = [[n for n, _ in found.ranking] for found in (at_best, at_shared) if found is not None]
    reasons, second = at_best.reason, "unknown"
    if at_shared is not None:
        reasons += f" Shared: {at_shared.reason}"
        second = " or ".join(at_shared.promoted)
    plan.decide(
        "1", "embedding share at each one's own best rate, and at the shared rate", numbers,
        f"own best: {' or '.join(at_best.promoted)}; shared: {second}",
        f"{'the same' if orders[0] == orders[-1] else 'another'} order of the shares. Own best: "
        f"{reasons} One seed a run; no rate beyond the list is guessed, and the lowest of several "
        "runs flatters a share.",
    )  # fmt: skip
    return at_best, best


# --------------------------------------------------------------------------------- kill rule


def kill_decisions(plan: Plan, some: Sequence[Configuration]) -> None:
    """Both readings of the kill rule for every experiment, from the curves."""
    curves = {one.run.experiment: plan.curve(one) for one in some}
    for one in some:
        stated, name = one.run.kill_rule, one.run.experiment
        result = plan.result(one)
        if result is not None and result["status"] == "failed":
            plan.decide("1", "diverged", [name], "out", str(result.get("reason")))
        elif stated is not None and not one.is_baseline:
            rule = stated.in_run(one.run.training.tokens)
            found = kill_rule.verdict(rule, curves[one.run.baseline], curves[name])
            verdict = f"{found.kind}; to the PRD's letter {found.literal_kind}"
            plan.decide(
                "1", "kill rule", [f"{name} against {one.run.baseline}"], verdict, found.reason
            )
