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
    stats = repeats.mean_sd(values)
    return f"{stats.mean:.4f}" + ("" if stats.sd is None else f" +- {stats.sd:.4f}")


def sanity_decisions(plan: Plan, result: Metrics) -> None:
    """What phase 0's checks found, and the learning rate that stays."""
    failed = [name for name, passed in result["checks"].items() if not passed]
    verdict = "passed" if not failed else f"failed: {', '.join(failed)}"
    plan.decide("0", "sanity", sanity.losses_text(result), verdict, result["reason"])
    rate, configured = result["suggested_learning_rate"], result["learning_rate"]
    near = rate is not None and 0.25 <= configured / rate <= 4
    plan.decide(
        "0", "learning-rate range test", sanity.rates_text(result),
        f"keep {configured:g}" + ("" if near else ", which is far from the suggestion"),
        result["learning_rate_rule"],
    )  # fmt: skip


def noise_decision(
    plan: Plan, losses: Mapping[str, Sequence[float]], noise: repeats.Noise | None
) -> None:
    """One configuration's seeds at the ranking budget."""
    plan.decide(
        "0", "seed noise",
        [f"{name}: {len(values)} seeds, dev loss {mean_text(values)}"
         for name, values in losses.items()],
        f"sd {'unknown' if noise is None else f'{noise.sd:.4f} nats'}",
        "seeds at the ranking budget; thin margins are measured against it.",
    )  # fmt: skip


def promoted(
    plan: Plan,
    noise: repeats.Noise | None,
    block: str,
    configurations: Sequence[Configuration],
    losses: Mapping[str, Sequence[float]],
) -> decisions.Promotion:
    """Who leads, by dev losses of each experiment's seeds; one without any was stopped."""
    stopped = [name for name, values in losses.items() if not values]
    promotion = decisions.promote(losses, noise)
    numbers = [f"{name} {loss:.4f}" for name, loss in promotion.ranking]
    numbers += [f"{name} stopped" for name in stopped]
    slopes = [f"{c.run.experiment} {_slope(plan.curve(c))}" for c in configurations]
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
    slope = rankings.log_slope(curve)
    return "unknown" if slope is None else f"{slope:+.3f}"


# ------------------------------------------------------------------------------ learning rates


def rate_decision(
    plan: Plan,
    noise: repeats.Noise | None,
    sweep: Sweep,
    configurations: Sequence[Configuration],
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
    for name, shared_rate in stated.items():
        runs = [c for c in configurations if c.run.experiment in sweep.named(name)]
        tried = {c.run.training.learning_rate: c for c in runs}
        losses = {rate: loss for rate, c in tried.items() for loss in plan.losses([c])}
        own_text, shared_text = "nothing finished", "not tried or not finished"
        if losses:
            rate = min(losses, key=lambda rate: losses[rate])
            own[name], best[name] = [losses[rate]], tried[rate].run.experiment
            own_text = f"{losses[rate]:.4f} at its best, {spelled(rate)}"
            if rate == max(tried):
                own_text += ", the highest tried: its best may lie above"
            elif rate == min(tried):
                own_text += ", the lowest tried: its best may lie below"
        if shared_rate in losses:
            shared[name], shared_text = [losses[shared_rate]], f"{losses[shared_rate]:.4f}"
        numbers.append(f"{name}: {own_text}; {shared_text} at the shared {spelled(shared_rate)}")
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


def kill_decisions(plan: Plan, configurations: Sequence[Configuration]) -> None:
    """Both readings of the kill rule for every experiment, from the curves."""
    curves = {c.run.experiment: plan.curve(c) for c in configurations}
    for configuration in configurations:
        run, name = configuration.run, configuration.run.experiment
        result = plan.result(configuration)
        if result is not None and result["status"] == "failed":
            plan.decide("1", "diverged", [name], "out", str(result.get("reason")))
        elif run.kill_rule is not None and not configuration.is_baseline:
            rule = run.kill_rule.in_run(run.training.tokens)
            verdict = kill_rule.verdict(rule, curves[run.baseline], curves[name])
            text = f"{verdict.kind}; without grace {verdict.literal_kind}"
            plan.decide("1", "kill rule", [f"{name} against {run.baseline}"], text, verdict.reason)
