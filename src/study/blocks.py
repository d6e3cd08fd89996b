"""The plan of a study: block by block, which runs come next and what the finished ones decide.

Which share leads, at which rate, and who is a finalist follows from finished runs. Until they are
there the plan assumes the baseline, so that the whole study can be counted in advance; what rests
on an assumption is never run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from src.analysis import decisions, repeats
from src.spec import kill_rule
from src.spec.config import Sweep
from src.spec.study_file import SANITY, Block
from src.study import generated, ranking, vocabulary
from src.study.finals import Judge, rank_agreement
from src.study.plan import Configuration, Plan, Source, State, Study, allocate, feasible

# Optimizer steps that the sanity checks cost at most, for the estimate alone.
SANITY_STEPS = 160


@dataclass(slots=True)
class _Planned:
    """A block with its runs, and what later blocks ask of it."""

    block: Block
    source: Source
    sweep: Sweep
    runs: list[Configuration]
    complete: bool  # and decided
    promotion: decisions.Promotion | None = None  # of the names in `best`
    best: dict[str, str] = field(default_factory=dict)  # experiment -> its run that counts

    @property
    def baseline(self) -> str:
        """The experiment that is the baseline, whatever rate its runs have."""
        names = (name for name, runs in self.sweep.rates.items() if self.sweep.baseline in runs)
        return next(names, self.sweep.baseline)

    def first_rates(self) -> dict[str, str]:
        """Each experiment's first run, the baseline's before all."""
        runs = self.sweep.rates or {name: (name,) for name in self.sweep.names}
        first = sorted(runs, key=lambda name: name != self.baseline)
        return {name: runs[name][0] for name in first}

    def run(self, name: str, seed: int = 0) -> Configuration:
        """One of the block's sweep as the block would run it."""
        return replace(
            next(c for c in self.runs if c.run.experiment == name),
            run=self.sweep.run(name, seed),
        )


def plan(study: Study, state: State) -> Plan:
    """Raises ValueError for a block that does not fit, and for runs that were made otherwise."""
    blocks = _Blocks(Plan(study, state))
    for block in study.config.blocks:
        blocks.add(block)
    blocks.judge()
    return blocks.plan


class _Blocks:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.planned: dict[str, _Planned] = {}

    def add(self, block: Block) -> None:
        """Its runs, and what they say once they have finished."""
        plan = self.plan
        if block.best_of is not None:
            parent = self.planned[block.best_of]
            block = replace(
                block, folder=parent.block.folder, phase=parent.block.phase,
                overrides=(*parent.block.overrides, *block.overrides),
                experiments=tuple(self._best(parent).values()),
            )  # fmt: skip
            source = parent.source
        elif block.finalists_of:
            source = self._finalists(block)
        elif block.grid_of is not None:
            source = self._grid(block, self.planned[block.grid_of])
        elif block.leader_of is not None:
            source = self._at_leader(block, self.planned[block.leader_of])
        else:
            source = plan.study.sources[block.name]
        phase = "rank" if block.phase == SANITY else block.phase
        sweep = plan.sweep(source, phase, block.overrides)
        shapes = allocate(sweep)
        runs = [
            Configuration(sweep.file, run, shapes[run.experiment], block.folder, block.overrides)
            for seed in block.seeds  # the first seed of all comes first
            for run in sweep.chosen(block.experiments, [seed])
        ]
        for configuration in runs:
            rule, training = configuration.run.kill_rule, configuration.run.training
            kill_rule.check_fits(rule, training, str(sweep.file), sweep.states_kill_rule)
            plan.need_tokens(block.name, configuration)
        if block.phase == SANITY:
            self._check(block, runs[0])
            return
        # Its own run for a baseline that a kill rule looks for by its name; none across
        # vocabularies, whose token perplexities do not compare.
        own_baseline = runs[0].run.may_be_killed and block.grid_of is None
        complete = plan.schedule(block.name, runs, own_baseline=own_baseline)
        # Until it is known how much seeds differ, nobody knows whether a margin is thin.
        complete &= all(p.complete for p in self.planned.values() if len(p.block.seeds) > 1)
        planned = _Planned(block, source, sweep, runs, complete)
        self.planned[block.name] = planned
        if complete and phase == "rank":
            self._rank(planned)

    def _check(self, block: Block, configuration: Configuration) -> None:
        """Phase 0's checks of one experiment: the job, and what they found."""
        run, training = configuration.run, configuration.run.training
        name = configuration.place(f"{run.experiment}-sanity")
        checks = self.plan.state.sanity.get(name)
        done, tokens = checks is not None, min(SANITY_STEPS, training.steps) * training.step_tokens
        self.plan.task(block.name, "sanity", configuration, name, done=done, tokens=tokens)
        if checks is not None:
            ranking.sanity_decisions(self.plan, checks)

    # ------------------------------------------------------------------------- choices

    def _best(self, parent: _Planned) -> dict[str, str]:
        """The run of each experiment that counts, the leader first; assumed while one is missing:
        the baseline, each experiment at its first rate."""
        if parent.promotion is None:
            self.plan.assume(f"{parent.baseline} leads block {parent.block.name}")
            return parent.first_rates()
        return {name: parent.best[name] for name, _ in parent.promotion.ranking}

    def _leader(self, parent: _Planned) -> Configuration:
        return parent.run(next(iter(self._best(parent).values())))

    def _at_leader(self, block: Block, parent: _Planned) -> Source:
        """A GLU sweep, or factorised tables, on the model and rate of the leading experiment."""
        leader = self._leader(parent)
        name = leader.run.experiment
        entry = generated.experiment(parent.source.raw, name)
        if block.factorised:
            tables = [generated.factorised(entry, leader, share) for share in block.factorised]
            raw = generated.of_entries(parent.source.raw, name, [entry, *tables])
            return self.plan.generate(f"{block.name}.yaml", raw)
        glu = self.plan.study.sources[block.name]
        if self._stands_on(block, glu, leader):
            return glu
        source = Source(glu.path, generated.on_model_of(glu.raw, entry, leader))
        raw = self._feasible(
            block, source, "1",
            f"no depth and d_ff are within the allocator's bounds on the model of {name}.",
            keep=source.raw["baseline"],
        )  # fmt: skip
        twins = self._built_as_another(block, Source(glu.path, raw))
        entries = [entry for entry in raw["experiments"] if entry["name"] not in twins]
        return self.plan.generate(f"{block.name}-{name}.yaml", {**raw, "experiments": entries})

    def _built_as_another(self, block: Block, source: Source) -> list[str]:
        """Experiments of a GLU sweep whose expansion comes out nearer to what another one asks:
        on a shallow model a layer more or less is a large step."""
        sweep = self.plan.sweep(source, "rank", block.overrides)
        requested = {run.experiment: run.model.glu_expansion for run in sweep.runs}
        built = {name: shape.glu_expansion for name, shape in allocate(sweep).items()}
        twins = [
            name
            for name, expansion in built.items()
            if name != sweep.baseline
            and min(requested.values(), key=lambda value: abs(value - expansion)) != requested[name]
        ]
        if twins and self.plan.decided:
            numbers = [f"{n}: asked {requested[n]:g}, built {built[n]:.2f}" for n in twins]
            reason = "what can be built is nearer to another expansion of the sweep."
            self.plan.decide("1", "allocation", numbers, "left out", reason)
        return twins

    def _stands_on(self, block: Block, glu: Source, leader: Configuration) -> bool:
        """Whether a GLU sweep stands on the leader's model and rate as its file says."""
        sweep = self.plan.sweep(glu, leader.run.phase, block.overrides)
        first, leading = sweep.runs[0], leader.run
        models = [allocation.model for allocation in allocate(sweep).values()]
        wanted = generated.width_and_heads(leader.allocation.model)
        return (
            replace(leading.model, glu_expansion=first.model.glu_expansion) == first.model
            and first.training.learning_rate == leading.training.learning_rate
            and all(generated.width_and_heads(model) == wanted for model in models)
        )

    def _grid(self, block: Block, parent: _Planned) -> Source:
        """Vocabularies and heads at the leading share and its neighbours, on equal bytes."""
        template, leader = self.plan.study.sources[block.name], self._leader(parent)
        # A stopped share has its place, too.
        shares = {**parent.first_rates(), **self._best(parent)}
        configurations = [parent.run(name) for name in shares.values()]
        ordered = sorted(configurations, key=lambda c: c.allocation.params.share)
        place = [c.run.experiment for c in ordered].index(leader.run.experiment)
        entries = []
        for run in [c.run for c in ordered[max(0, place - 1) : place + 2]]:
            entry = generated.experiment(parent.source.raw, run.experiment)
            if run.model.embedding_ratio is not None:
                entry.setdefault("embedding_ratio", run.model.embedding_ratio)
            entries.append(entry)
        requests = [run.model for run in self.plan.sweep(template, "rank", block.overrides).runs]
        variants = list(dict.fromkeys((r.vocab_size, r.tie_embeddings) for r in requests))
        budgets = vocabulary.byte_budgets(self.plan.state, leader, variants)
        grid = generated.vocabulary_grid(template.raw, entries, variants, budgets)
        raw = self._feasible(
            block, Source(template.path, grid), "1b",
            "no shape is within the allocator's bounds at this share.",
        )  # fmt: skip
        if not raw["experiments"]:
            raise ValueError(
                f"{template.path}: found no vocabulary that the allocator can serve at these "
                f"shares, expected one at least; leave block {block.name} out"
            )
        return self.plan.generate(f"{block.name}.yaml", raw)

    def _feasible(
        self, block: Block, source: Source, phase: str, reason: str, keep: str | None = None
    ) -> dict[str, Any]:
        """A made sweep file without the experiments that the allocator has no shape for."""
        runs = self.plan.sweep(source, "rank", block.overrides).runs
        unfit = [r.experiment for r in runs if r.experiment != keep and not feasible(r.model)]
        if unfit and self.plan.decided:
            self.plan.decide(phase, "allocation", unfit, "left out", reason)
        entries = [entry for entry in source.raw["experiments"] if entry["name"] not in unfit]
        return {**source.raw, "experiments": entries}

    def _finalists(self, block: Block) -> Source:
        """The baseline and the best configurations that were promoted, each as it was ranked.

        The baseline itself is no candidate, whatever it is called; where nothing else was promoted
        the best of the rest goes on.
        """
        plan, parts = self.plan, [self.planned[name] for name in block.finalists_of]
        first = parts[0]
        best = self._best(first)
        base = first.run(best.get(first.baseline, first.sweep.baseline))
        seeds = [p for p in self.planned.values() if p.block.best_of == first.block.name]
        unknown = [p for p in (*parts[1:], *seeds) if p.promotion is None]
        if unknown:
            plan.assume(f"{block.finalists} of block {unknown[-1].block.name} go on")
        promoted, ranked = self._candidates(parts, base)
        scores = {run: self._score(parts, part, c) for run, (part, c) in ranked.items()}
        order = sorted(scores, key=lambda run: scores[run])
        pool = [run for run in order if run in promoted] or order[:1]
        chosen, entries = pool[: block.finalists], []
        for run in chosen:
            part, configuration = ranked[run]
            model = configuration.allocation.model
            shape = {} if part is first else generated.width_and_heads(model)
            entries.append(generated.experiment(part.source.raw, run) | shape)
        if plan.decided:
            plan.decide(
                "2", f"finalists, block {block.name}", [f"{r} {scores[r]:.4f}" for r in order],
                ", ".join(chosen),
                "lowest mean dev loss of the shares' seeds among what was promoted; a "
                "configuration of one seed counts with its difference from the leading share's "
                "run of that seed, as equal where that is less than seeds differ by chance.",
            )  # fmt: skip
        baseline = generated.experiment(first.source.raw, base.run.experiment)
        raw = generated.of_entries(first.source.raw, base.run.experiment, [baseline, *entries])
        source = plan.generate(f"{block.name}.yaml", raw)
        built = allocate(plan.sweep(source, "full", block.overrides))
        for run in chosen if plan.decided else ():
            assert built[run].model == ranked[run][1].allocation.model, f"{run} has another shape"
        return source

    def _candidates(
        self, parts: Sequence[_Planned], base: Configuration
    ) -> tuple[set[str], dict[str, tuple[_Planned, Configuration]]]:
        """The runs that the blocks promoted, and every run that could go on with its block: each
        configuration once, and none that is equal to `base`."""
        promoted: set[str] = set()
        ranked: dict[str, tuple[_Planned, Configuration]] = {}
        identities = {base.identity}
        for part in parts:
            counted = self._best(part)
            names = counted if part.promotion is None else part.promotion.promoted
            promoted |= {counted[name] for name in names if name in counted}
            for run in counted.values():
                configuration = part.run(run)
                if configuration.identity not in identities:
                    identities.add(configuration.identity)
                    ranked[run] = part, configuration
        return promoted, ranked

    def _score(self, parts: Sequence[_Planned], part: _Planned, one: Configuration) -> float:
        """Mean loss over the seeds of a share; another configuration counts with the leading
        share's mean and its difference from the leader's run of the same seed, 0 where chance
        makes such a one."""
        if not self.plan.decided:
            return 0.0
        leader = one if part is parts[0] else self._leader(parts[0])
        mean = repeats.mean_sd(self.plan.losses(self._seeds(leader))).mean
        if leader is one:
            return mean
        own, leading = self.plan.losses([one]), self.plan.losses([leader])
        if not own:
            return math.inf
        gap, noise = own[0] - leading[0], self._noise()
        by_chance = noise is not None and 0 < -gap < decisions.by_chance(noise, 1, 1)
        return mean if by_chance else mean + gap

    def _seeds(self, configuration: Configuration) -> list[Configuration]:
        """The runs of its experiment at every seed that blocks so far gave it."""
        by_name = {
            other.name: other
            for planned in self.planned.values()
            for other in planned.runs
            if (other.folder, other.run.experiment, other.run.phase)
            == (configuration.folder, configuration.run.experiment, configuration.run.phase)
        }
        return sorted(by_name.values(), key=lambda other: other.run.seed)

    # ----------------------------------------------------------------------- decisions

    def _rank(self, planned: _Planned) -> None:
        """What a finished block of ranking runs says."""
        plan, block = self.plan, planned.block
        if block.grid_of is not None:
            parent = self.planned[block.grid_of]
            base = self._seeds(parent.run(parent.sweep.baseline))
            vocabulary.shift_decisions(plan, planned.runs, base, len(block.seeds))
            return
        noise = self._noise()
        if planned.sweep.rates and block.best_of is None:
            stated = planned.source.sweep(plan.study.overrides, "rank")
            rates = {run.experiment: run.training.learning_rate for run in stated.runs}
            planned.promotion, planned.best = ranking.rate_decision(
                plan, noise, planned.sweep, planned.runs, rates
            )
            return
        first = plan.distinct([c for c in planned.runs if c.run.seed == block.seeds[0]])
        losses: dict[str, Sequence[float]] = {}
        for configuration in first:
            group = self._seeds(configuration)
            finished = plan.finished([configuration])
            losses[configuration.run.experiment] = plan.losses(group) if finished else []
        if len(losses) == 1 and len(block.seeds) > 1:
            ranking.noise_decision(plan, losses, noise)
        elif any(c.is_baseline for c in first):
            ranking.kill_decisions(plan, first)
        planned.promotion = ranking.promoted(plan, noise, block.name, first, losses)
        planned.best = {name: name for name in losses}
        if block.best_of is not None:
            parent = self.planned[block.best_of]
            groups = {c.run.experiment: self._seeds(c) for c in first}
            baseline = groups.pop(parent.best.get(parent.baseline, ""), None)
            if baseline is not None and groups:
                Judge(plan, "1", baseline, groups).interval_decisions(groups)

    def _noise(self) -> repeats.Noise | None:
        """Seed noise of a ranking run, of all configurations so far that have several seeds."""
        groups: dict[str, dict[str, float]] = {}
        for planned in self.planned.values():
            if planned.complete and planned.block.phase == "rank":
                for c in planned.runs:
                    for loss in self.plan.losses([c]):
                        groups.setdefault(c.place(c.run.experiment), {})[c.name] = loss
        return repeats.pooled_noise({name: list(group.values()) for name, group in groups.items()})

    def judge(self) -> None:
        """Finalists against their baselines, and what short runs told of full ones."""
        full = [p for p in self.planned.values() if p.block.phase == "full"]
        for planned in full:
            judge = self._judge(planned)
            if judge:
                speeds = judge.compare_speeds(planned.complete)
                if planned.complete:
                    judge.decide(speeds)
        ranked = [c for p in self.planned.values() if p.block.phase == "rank" for c in p.runs]
        for folder in dict.fromkeys(p.block.folder for p in full):
            in_folder = [p for p in full if p.block.folder == folder]
            if all(p.complete for p in in_folder):
                rank_agreement(self.plan, [c for p in in_folder for c in p.runs], ranked)

    def _judge(self, planned: _Planned) -> Judge | None:
        """Who is compared in a block of finalists."""
        groups: dict[str, list[Configuration]] = {}
        for configuration in planned.runs:
            groups.setdefault(configuration.run.experiment, []).append(configuration)
        baseline = groups.pop(planned.sweep.baseline, None)
        if not planned.block.finalists_of or not baseline or not groups:
            return None
        return Judge(self.plan, "2", baseline, groups)
