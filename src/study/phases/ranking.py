"""Phases 0 and 1 of a plan: the checks and the noise floor, the share sweep, the GLU sweep."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from src.analysis import decisions, kill_replay, rankings, repeats
from src.spec import kill_rule
from src.spec.config import ModelConfig, Sweep
from src.study.phases.cells import GLU, SANITY, SHARE, Cell, Metrics, Source, feasible, model_keys
from src.study.phases.ledger import Ledger, mean_text

# Optimizer steps that the sanity checks cost at most, for the estimate alone.
SANITY_STEPS = 160


@dataclass(frozen=True, slots=True)
class Floor:
    """The noise floor: None where it is unknown; `measured` once all of its runs have ended."""

    noise: repeats.Noise | None
    measured: bool


@dataclass(frozen=True, slots=True)
class Shares:
    """The share that leads, the runner-up where the margin was thin, and the sweep of both at the
    learning rates of later stages."""

    leader: str
    runner_up: str | None
    source: Source


@dataclass(frozen=True, slots=True)
class Expansions:
    """The GLU sweep at the leading share: its file, its cells from best to worst, who goes on."""

    source: Source
    sweep: Sweep
    ranking: tuple[str, ...]
    promoted: tuple[str, ...]


# ---------------------------------------------------------------------------------- phase 0


def sanity(ledger: Ledger) -> Floor:
    """Checks of the baseline, and its seeds at the ranking budget: the noise floor."""
    stage, baseline = SANITY, ledger.embedding.baseline
    seeds = ledger.cells(ledger.embedding, [baseline], range(ledger.config.noise_seeds))
    ledger.need_tokens(stage, seeds[0])
    checks, training = ledger.record.sanity, seeds[0].run.training
    ledger.task(
        stage,
        "sanity",
        seeds[0],
        name=f"{baseline}-sanity",
        done=checks is not None,
        tokens=min(SANITY_STEPS, training.steps) * training.step_tokens,
    )
    complete = ledger.schedule(stage, seeds)
    if checks is not None:
        _sanity_decisions(ledger, checks)
    if not complete:
        return Floor(None, False)
    losses = ledger.losses(seeds)
    noise = repeats.pooled_noise({baseline: losses}) if losses else None
    told = [f"{baseline}: {len(losses)} seeds, dev loss {mean_text(losses)}"]
    sd = "unknown" if noise is None else f"{noise.sd:.4f} nats"
    ledger.decide(
        "0", "noise floor", told, f"sd {sd}",
        "seeds of the baseline at the ranking budget; thin margins are measured against it.",
    )  # fmt: skip
    return Floor(noise, True)


def _sanity_decisions(ledger: Ledger, checks: Metrics) -> None:
    failed = [name for name, fine in checks["checks"].items() if not fine]
    memorised = checks["overfit_loss"]
    last = "not a number" if memorised is None else f"{memorised:.3f}"
    numbers = [
        f"initial loss {checks['initial_loss']:.3f} (ln V {checks['ln_vocab']:.3f})",
        f"{checks['overfit_tokens']} tokens to loss {last} in {checks['overfit_steps']} steps",
    ]
    verdict = "passed" if not failed else f"failed: {', '.join(failed)}"
    ledger.decide("0", "sanity", numbers, verdict, checks["reason"])
    rate, configured = checks["suggested_learning_rate"], checks["learning_rate"]
    near = rate is not None and 0.25 <= configured / rate <= 4
    suggested = "none" if rate is None else f"{rate:.2g}"
    ledger.decide(
        "0", "learning-rate range test",
        [f"suggested {suggested}", f"configured {configured:g}"],
        f"keep {configured:g}" + ("" if near else ", which is far from the suggestion"),
        checks["learning_rate_rule"],
    )  # fmt: skip


# ---------------------------------------------------------------------------------- phase 1


def shares(ledger: Ledger, floor: Floor) -> Shares:
    """The share sweep; its leader is the GLU sweep's share."""
    sweep = ledger.embedding
    cells = ledger.cells(sweep, _baseline_first(sweep), [0])
    complete = ledger.schedule(SHARE, cells)
    if not (complete and floor.measured):
        ledger.assume(f"the share of {sweep.baseline} leads")
        return Shares(sweep.baseline, None, ledger.study.embedding)
    _kill_decisions(ledger, "1", cells)
    promotion = _promoted(ledger, floor, "embedding share: lowest dev loss", sweep, cells)
    leader, *others = promotion.promoted
    return Shares(leader, others[0] if others else None, ledger.study.embedding)


def expansions(ledger: Ledger, floor: Floor, shares: Shares) -> Expansions:
    """The GLU sweep on the leading share's model: one or two cells go on to phase 2."""
    source = _glu_source(ledger, shares)
    sweep = ledger.sweep(source, "rank")
    names = tuple(_baseline_first(sweep))
    cells = ledger.cells(sweep, names, [0])
    complete = ledger.schedule(GLU, cells)
    if not complete:
        if ledger.decided:
            ledger.assume(f"{ledger.config.finalists} cells of {sweep.file.name} go on")
        return Expansions(source, sweep, names, names)
    _kill_decisions(ledger, "1", cells)
    promotion = _promoted(ledger, floor, "GLU expansion: lowest dev loss", sweep, cells)
    ranking = tuple(name for name, _ in promotion.ranking)
    return Expansions(source, sweep, ranking, promotion.promoted)


def _glu_source(ledger: Ledger, shares: Shares) -> Source:
    """The GLU sweep's own file where it stands on the leader's model, else one made for it."""
    stated, name = ledger.study.glu, shares.leader
    (cell,) = ledger.cells(ledger.sweep(shares.source, "rank"), [name], [0])
    glu = ledger.sweep(stated, "rank")
    entry = next(e for e in shares.source.raw["experiments"] if e["name"] == name)
    own = glu.runs[0].model
    asks_the_same = replace(cell.run.model, glu_expansion=own.glu_expansion) == own
    if asks_the_same and not entry.get("training"):
        theirs = [c.answer.model for c in ledger.cells(glu, glu.names, [0])]
        if all(width_and_heads(model) == width_and_heads(cell.answer.model) for model in theirs):
            return stated
    share = cell.run.model.embedding_ratio or cell.answer.params.share
    pinned = width_and_heads(cell.answer.model)
    if cell.run.model.allocate == "attention":  # the heads absorb the budget
        pinned = {"d_model": pinned["d_model"]}
    raw = glu_at_share(stated.raw, entry, share, pinned)
    made = Source(ledger.generated(f"glu-{name}.yaml"), raw)
    whole = ledger.sweep(made, "rank")
    unfit = [
        run.experiment
        for run in whole.runs
        if run.experiment != whole.baseline and not feasible(run.model)
    ]
    raw["experiments"] = [e for e in raw["experiments"] if e["name"] not in unfit]
    if unfit and ledger.decided:
        ledger.decide(
            "1", "allocation", unfit, "left out",
            f"no depth and d_ff are within the allocator's bounds on the model of {name}.",
        )  # fmt: skip
    ledger.sweeps[made.path] = raw
    return made


def width_and_heads(model: ModelConfig) -> dict[str, int]:
    """What a GLU sweep keeps of the leading share's model; it trades depth for d_ff."""
    return {"d_model": model.d_model, "n_heads": model.n_heads, "head_dim": model.head_dim}


def glu_at_share(
    glu: Mapping[str, Any], leader: Mapping[str, Any], share: float, pinned: Mapping[str, int]
) -> dict[str, Any]:
    """The GLU sweep on the leading experiment's model (`pinned`: its width and heads) and with its
    training; names say whose model it is."""
    own = {key: value for key, value in model_keys(leader).items() if key != "glu_expansion"}
    if not any(own.get(key) for key in ("embedding_dim", "d_model")):
        own.setdefault("embedding_ratio", share)
    renamed = [
        {**entry, "name": f"{entry['name']}-{leader['name']}"} for entry in glu["experiments"]
    ]
    baseline = glu.get("baseline", glu["experiments"][0]["name"])
    return {
        **glu,
        "model": {**(glu.get("model") or {}), **own, **pinned},
        "training": {**(glu.get("training") or {}), **(leader.get("training") or {})},
        "baseline": f"{baseline}-{leader['name']}",
        "experiments": renamed,
    }


def _promoted(
    ledger: Ledger, floor: Floor, rule: str, sweep: Sweep, cells: Sequence[Cell]
) -> decisions.Promotion:
    losses: dict[str, Sequence[float]] = {}
    stopped: list[str] = []
    for cell in ledger.different(cells):
        name = cell.run.experiment
        seeds = range(ledger.config.noise_seeds) if name == ledger.embedding.baseline else [0]
        found = ledger.losses(ledger.cells(sweep, [name], seeds))
        if found and ledger.finished([cell]):
            losses[name] = found
        else:
            stopped.append(name)
    for name in stopped:  # promote() ranks what it is given; the stopped ones are named here
        losses.setdefault(name, [math.nan])
    promotion = decisions.promote(losses, floor.noise, killed=stopped)
    numbers = [f"{name} {loss:.4f}" for name, loss in promotion.ranking]
    numbers += [f"{name} stopped" for name in stopped]
    slopes = [f"{cell.run.experiment} {_slope(ledger.curve(cell))}" for cell in cells]
    ledger.decide("1", rule, numbers, ", ".join(promotion.promoted), promotion.reason)
    ledger.decide(
        "1", f"dev PPL slope, {sweep.file.name}", slopes, "recorded",
        "d ln PPL / d ln tokens over the last half of each run.",
    )  # fmt: skip
    return promotion


def _kill_decisions(ledger: Ledger, phase: str, cells: Sequence[Cell]) -> None:
    """Both readings of the kill rule for every cell, from the curves."""
    curves = {cell.run.experiment: ledger.curve(cell) for cell in cells}
    for cell in cells:
        stated, name = cell.run.kill_rule, cell.run.experiment
        result = ledger.result(cell)
        if result is not None and result["status"] == "failed":
            ledger.decide(phase, "diverged", [name], "out", str(result.get("reason")))
        elif stated is not None and name != cell.run.baseline:
            rule = stated.in_run(cell.run.training.tokens)
            found = kill_rule.verdict(rule, curves[cell.run.baseline], curves[name])
            verdict = f"{found.kind}; to the PRD's letter {found.literal_kind}"
            live = (result or {}).get("kill_verdict")
            if live is not None and live != found.kind:  # asked before the baseline's curve was
                verdict += f"; while it trained {live}"
            ledger.decide(
                phase, "kill rule", [f"{name} against {cell.run.baseline}"], verdict,
                found.reason,
            )  # fmt: skip

    _replay_decision(ledger, phase, cells)


def _replay_decision(ledger: Ledger, phase: str, cells: Sequence[Cell]) -> None:
    """How often the rule would have killed a run that ended no worse than the baseline."""
    baseline = next(cell for cell in cells if cell.run.experiment == cell.run.baseline)
    reference = ledger.curve(baseline)
    curves = {c.run.experiment: ledger.curve(c) for c in cells if c is not baseline}
    complete = {
        name: curve
        for name, curve in curves.items()
        if curve and reference and curve[-1][0] == reference[-1][0]
    }
    stated = baseline.run.kill_rule
    if stated is None or not complete:
        return
    told = []
    literal = replace(stated, grace_tokens=0)
    for label, rule in (
        ("letter", literal),
        ("grace", stated.in_run(baseline.run.training.tokens)),
    ):
        found = kill_replay.replay_kills(reference, complete, rule)
        told.append(
            f"{label}: {found.kills} kills, {found.false_kills} false, "
            f"{found.tokens_saved:,} of {found.tokens_total:,} tokens saved"
        )
    ledger.decide(
        phase, f"kill rule replayed, {baseline.path.name}", told, "recorded",
        f"over the {len(complete)} cells that ran to the end; false: ended no worse than the "
        "baseline.",
    )  # fmt: skip


def _baseline_first(sweep: Sweep) -> list[str]:
    return sorted(sweep.names, key=lambda name: name != sweep.baseline)


def _slope(curve: kill_rule.Curve) -> str:
    found = rankings.log_slope(curve)
    return "unknown" if found is None else f"{found:+.3f}"
