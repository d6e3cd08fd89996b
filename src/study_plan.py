"""The plan of a study: which runs come next, and what the finished ones decide.

Pure functions of the study file and of what finished runs measured; no file, clock or device.
Where a choice has not been made yet (which share leads?) the plan assumes one, so that the whole
study can be counted in advance; an assumed job is never run.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from src import allocation, config, decisions, kill_rule
from src.config import ModelRequest, RunConfig, StudyConfig, Sweep

Metrics = Mapping[str, Any]
Decision = dict[str, str]

# Optimizer steps that the sanity checks cost at most, for the estimate alone.
SANITY_STEPS = 160
STAGES = ("0 sanity", "1 share", "1 glu", "1b vocabulary", "2 finals")


@dataclass(frozen=True, slots=True)
class Source:
    """An experiment file and its values."""

    path: Path
    raw: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """A study file with the three sweeps that it names; `overrides` go to every run."""

    file: str
    config: StudyConfig
    overrides: tuple[str, ...]
    embedding: Source
    glu: Source
    vocabulary: Source | None


@dataclass(frozen=True, slots=True)
class Documents:
    """Per-document losses of one run and split: nats (D,), tokens (D,), UTF-8 bytes (D,)."""

    nats: NDArray[np.float64]
    tokens: NDArray[np.int64]
    bytes: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """What the log directory holds.

    results: metrics.json by run name; a run that diverged stands as {"status": "failed", ...}.
    curves: dev checks by run name. documents(run, split): its losses, None without them.
    train_tokens: tokens of the train split by vocabulary; absent where they are to be made.
    sanity: sanity.json of the baseline.
    """

    results: Mapping[str, Metrics] = field(default_factory=dict)
    curves: Mapping[str, kill_rule.Curve] = field(default_factory=dict)
    documents: Callable[[str, str], Documents | None] = lambda run, split: None
    train_tokens: Mapping[int, int] = field(default_factory=dict)
    sanity: Metrics | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One step of the study: a run, the sanity checks, or tokens to be made.

    kind: "train", "sanity" or "tokens". alias_of: the run whose result stands for this one.
    assumed: rests on a choice that has not been made, so it is counted and not run.
    """

    stage: str
    kind: str
    name: str
    path: Path
    experiment: str
    phase: str
    seed: int
    tokens: int
    flops: float
    n_layers: int
    vocab_size: int
    done: bool
    assumed: bool = False
    alias_of: str | None = None
    is_baseline: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Jobs in order, the decisions so far, and the sweep files that the jobs need."""

    jobs: tuple[Job, ...]
    decisions: tuple[Decision, ...]
    sweeps: Mapping[Path, Mapping[str, Any]]
    assumptions: tuple[str, ...]
    aliased: tuple[Metrics, ...]  # study.json's `aliases`: what the aggregator needs of each
    complete: bool

    @property
    def next(self) -> Job | None:
        """The first job that is to be done and rests on no assumption."""
        open_jobs = (job for job in self.jobs if not (job.done or job.assumed or job.alias_of))
        return next(open_jobs, None)

    @property
    def aliases(self) -> dict[str, str]:
        return {job.name: job.alias_of for job in self.jobs if job.alias_of}


@dataclass(frozen=True, slots=True)
class Cell:
    """One experiment of a sweep at one seed, with its integers."""

    path: Path
    run: RunConfig
    answer: allocation.Allocation

    @property
    def name(self) -> str:
        return self.run.run_name

    @property
    def identity(self) -> str:
        """Equal for runs that compute the same thing, whatever they are called."""
        run = self.run
        content = {
            "model": config.to_dict(self.answer.model),
            "training": config.to_dict(run.training),
            "evaluation": config.to_dict(run.evaluation),
            "tokens": str(run.token_dir),
            "phase": run.phase,
            "seed": run.seed,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def flops(self) -> float:
        training = self.run.training
        per_token = allocation.flops_per_token(self.answer.model, training.seq_len)
        return float(per_token * training.steps * training.step_tokens)


# ---------------------------------------------------------------------------------- sweep files


@functools.lru_cache(maxsize=256)
def _allocated(
    requests: tuple[tuple[str, ModelRequest], ...],
) -> dict[str, allocation.Allocation]:
    return allocation.allocate(dict(requests))


def _allocate(sweep: Sweep) -> dict[str, allocation.Allocation]:
    try:
        return _allocated(tuple((run.experiment, run.model) for run in sweep.runs))
    except ValueError as error:
        raise ValueError(f"{sweep.file}: {error}") from None


@functools.lru_cache(maxsize=256)
def _feasible(request: ModelRequest) -> bool:
    try:
        _allocated((("", request),))
    except ValueError:
        return False
    return True


def _model_keys(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key not in ("name", "training")}


def glu_at_share(glu: Mapping[str, Any], leader: Mapping[str, Any], share: float) -> dict[str, Any]:
    """The GLU sweep at the leading experiment's share; names say whose share it is."""
    own = {key: value for key, value in _model_keys(leader).items() if key != "glu_expansion"}
    if not any(own.get(key) for key in ("embedding_dim", "d_model")):
        own.setdefault("embedding_ratio", share)
    renamed = [
        {**entry, "name": f"{entry['name']}-{leader['name']}"} for entry in glu["experiments"]
    ]
    baseline = glu.get("baseline", glu["experiments"][0]["name"])
    return {
        **glu,
        "model": {**(glu.get("model") or {}), **own},
        "baseline": f"{baseline}-{leader['name']}",
        "experiments": renamed,
    }


def vocabulary_grid(
    template: Mapping[str, Any],
    shares: Sequence[Mapping[str, Any]],
    variants: Sequence[tuple[int, bool]],
    budget: Mapping[int, int],
) -> dict[str, Any]:
    """Each variant (vocabulary, tied) at each of the `shares` (experiments of the share sweep).

    budget: ranking tokens by vocabulary where they differ from the template's, so that all
    variants train on equal bytes.
    """
    experiments = []
    for vocab, tied in variants:
        size = f"{vocab // 1000}k" if vocab % 1000 == 0 else str(vocab)
        for share in shares:
            entry: dict[str, Any] = {
                **_model_keys(share),
                "name": f"{share['name']}-v{size}-{'tied' if tied else 'untied'}",
                "vocab_size": vocab,
                "tie_embeddings": tied,
            }
            if vocab in budget:
                entry["training"] = {"tokens": budget[vocab], "ranking_tokens": budget[vocab]}
            experiments.append(entry)
    return {
        **{key: value for key, value in template.items() if key != "baseline"},
        "experiments": experiments,
    }


# --------------------------------------------------------------------------------------- the plan


def plan(study: Study, record: Record) -> Plan:
    """What is to be done next and what is decided; raises ValueError for sweeps that do not fit."""
    planner = _Planner(study, record)
    planner.sanity()
    planner.shares()
    planner.expansions()
    if study.vocabulary is not None:
        planner.vocabularies()
    planner.finals()
    jobs = tuple(planner.jobs)
    return Plan(
        jobs=jobs,
        decisions=tuple(planner.decisions),
        sweeps=planner.sweeps,
        assumptions=tuple(planner.assumptions),
        aliased=tuple(planner.aliased),
        complete=all((job.done or job.alias_of) and not job.assumed for job in jobs),
    )


def baseline_cell(study: Study) -> Cell:
    """The study's baseline as a ranking run."""
    sweep = config.sweep_from(study.embedding.raw, study.embedding.path, study.overrides, "rank")
    run = sweep.run(sweep.baseline, 0)
    return Cell(sweep.file, run, _allocate(sweep)[sweep.baseline])


_MADE_WITH = ("vocab_size", "d_model", "n_layers", "n_heads", "head_dim", "d_ff", "embedding_dim",
              "tie_embeddings")  # fmt: skip
_TRAINED_WITH = ("batch_size", "seq_len", "learning_rate", "embedding_lr_ratio")


def _check_same(cell: Cell, result: Metrics, own_baseline: bool) -> None:
    """Refuse a finished run of this name that was made with another configuration."""
    if result["status"] == "failed":
        if own_baseline:
            raise ValueError(
                f"{cell.name}: the baseline diverged ({result.get('reason')}), so nothing can be "
                "compared with it; lower training.learning_rate and use another log_dir"
            )
        return
    expected = {key: getattr(cell.answer.model, key) for key in _MADE_WITH}
    expected |= {key: getattr(cell.run.training, key) for key in _TRAINED_WITH}
    if result["status"] == "finished":
        expected["steps"] = cell.run.training.steps
    for key, value in expected.items():
        if key in result and result[key] != value:
            raise ValueError(
                f"{cell.name}: found a run with {key} {result[key]}, expected {value} as "
                f"{cell.path} asks; use another log_dir, or delete that run"
            )


class _Planner:
    """Walks the stages in order; the first unfinished one turns all later choices into guesses."""

    def __init__(self, study: Study, record: Record) -> None:
        self.study, self.record, self.config = study, record, study.config
        self.jobs: list[Job] = []
        self.decisions: list[Decision] = []
        self.sweeps: dict[Path, Mapping[str, Any]] = {}
        self.assumptions: list[str] = []
        self.aliases: dict[str, str] = {}
        self.aliased: list[Metrics] = []
        self.first_with: dict[str, str] = {}  # identity -> run
        self.decided = True
        self.embedding = self._sweep(study.embedding, "rank")
        self.glu = self._sweep(study.glu, "rank")
        self.glu_source = study.glu
        self.leader = self.embedding.baseline
        self.runner_up: str | None = None
        self.glu_ranking: tuple[str, ...] = ()
        self.glu_promoted: tuple[str, ...] = ()
        self.noise: decisions.Noise | None = None
        self._check_budgets()

    # ------------------------------------------------------------------------------- building

    def _sweep(self, source: Source, phase: str) -> Sweep:
        return config.sweep_from(source.raw, source.path, self.study.overrides, phase)

    def _check_budgets(self) -> None:
        ours, theirs = self.embedding.runs[0].model, self.glu.runs[0].model
        for key in ("total_params", "vocab_size"):
            if getattr(ours, key) != getattr(theirs, key):
                raise ValueError(
                    f"{self.study.file}: glu: found model.{key} {getattr(theirs, key):,} in "
                    f"{self.study.glu.path}, expected {getattr(ours, key):,} as in "
                    f"{self.study.embedding.path}: one study compares cells of one budget"
                )

    def _cells(self, sweep: Sweep, names: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
        answers = _allocate(sweep)
        return [
            Cell(sweep.file, sweep.run(name, seed), answers[name])
            for name in names
            for seed in seeds
        ]

    def _result(self, cell: Cell) -> Metrics | None:
        run = self.aliases.get(cell.name, cell.name)
        return self.record.results.get(run)

    def _schedule(self, stage: str, cells: Sequence[Cell], own_baseline: bool = True) -> bool:
        """Add jobs for `cells`; True where all of them have a result and none is assumed.

        A cell equal to an earlier one becomes its alias, unless that was killed or diverged
        (here it might not be) or, with `own_baseline`, the cell is its sweep's baseline: the kill
        rule looks for that run by its name.
        """
        for cell in cells:
            if any(job.name == cell.name for job in self.jobs):
                continue
            is_baseline = cell.run.experiment == cell.run.baseline
            original = self.first_with.setdefault(cell.identity, cell.name)
            found, own = self.record.results.get(original), self.record.results.get(cell.name)
            if own is not None:
                _check_same(cell, own, own_baseline and is_baseline)
            may = found is None or found["status"] == "finished"
            if original != cell.name and may and own is None and not (own_baseline and is_baseline):
                self.aliases[cell.name] = original
                self.aliased.append(_alias(cell, original))
            self.jobs.append(
                Job(
                    stage=stage,
                    kind="train",
                    name=cell.name,
                    path=cell.path,
                    experiment=cell.run.experiment,
                    phase=cell.run.phase,
                    seed=cell.run.seed,
                    tokens=cell.run.training.steps * cell.run.training.step_tokens,
                    flops=cell.flops,
                    n_layers=cell.answer.model.n_layers,
                    vocab_size=cell.run.model.vocab_size,
                    done=self._result(cell) is not None,
                    assumed=not self.decided,
                    alias_of=self.aliases.get(cell.name),
                    is_baseline=is_baseline,
                )
            )
        return self.decided and all(self._result(cell) is not None for cell in cells)

    def _task(self, stage: str, kind: str, cell: Cell, *, done: bool, tokens: int) -> None:
        name = f"{cell.run.experiment}-sanity" if kind == "sanity" else str(cell.run.token_dir)
        self.jobs.append(
            Job(
                stage=stage,
                kind=kind,
                name=name,
                path=cell.path,
                experiment=cell.run.experiment,
                phase="rank",
                seed=0,
                tokens=tokens,
                flops=cell.flops * tokens / (cell.run.training.steps * _step_tokens(cell)),
                n_layers=cell.answer.model.n_layers,
                vocab_size=cell.run.model.vocab_size,
                done=done,
                assumed=not self.decided,
                is_baseline=True,
            )
        )

    def _need_tokens(self, stage: str, cell: Cell) -> None:
        done = cell.run.model.vocab_size in self.record.train_tokens
        if not done and not any(job.name == str(cell.run.token_dir) for job in self.jobs):
            self._task(stage, "tokens", cell, done=False, tokens=0)

    def _assume(self, what: str) -> None:
        self.decided = False
        self.assumptions.append(what)

    def _decide(
        self, phase: str, rule: str, numbers: Sequence[str], verdict: str, reason: str
    ) -> None:
        self.decisions.append(
            {
                "phase": phase,
                "rule": rule,
                "numbers": "; ".join(numbers),
                "verdict": verdict,
                "reason": reason,
            }
        )

    # ---------------------------------------------------------------------------- phase 0

    def sanity(self) -> None:
        """Checks of the baseline, and its seeds at the ranking budget: the noise floor."""
        stage, baseline = STAGES[0], self.embedding.baseline
        seeds = self._cells(self.embedding, [baseline], range(self.config.noise_seeds))
        self._need_tokens(stage, seeds[0])
        checks = self.record.sanity
        steps = min(SANITY_STEPS, seeds[0].run.training.steps)
        self._task(
            stage,
            "sanity",
            seeds[0],
            done=checks is not None,
            tokens=steps * _step_tokens(seeds[0]),
        )
        complete = self._schedule(stage, seeds)
        if checks is not None:
            self._sanity_decisions(checks)
        if not complete:
            return
        losses = self._losses(seeds)
        self.noise = decisions.pooled_noise({baseline: losses}) if losses else None
        told = [f"{baseline}: {len(losses)} seeds, dev loss {_mean(losses)}"]
        sd = "unknown" if self.noise is None else f"{self.noise.sd:.4f} nats"
        self._decide(
            "0", "noise floor", told, f"sd {sd}",
            "seeds of the baseline at the ranking budget; thin margins are measured against it.",
        )  # fmt: skip

    def _sanity_decisions(self, checks: Metrics) -> None:
        failed = [name for name, fine in checks["checks"].items() if not fine]
        numbers = [
            f"initial loss {checks['initial_loss']:.3f} (ln V {checks['ln_vocab']:.3f})",
            f"{checks['overfit_tokens']} tokens to loss {checks['overfit_loss']:.3f} "
            f"in {checks['overfit_steps']} steps",
        ]
        verdict = "passed" if not failed else f"failed: {', '.join(failed)}"
        self._decide("0", "sanity", numbers, verdict, checks["reason"])
        rate, configured = checks["suggested_learning_rate"], checks["learning_rate"]
        near = rate is not None and 0.25 <= configured / rate <= 4
        suggested = "none" if rate is None else f"{rate:.2g}"
        self._decide(
            "0", "learning-rate range test",
            [f"suggested {suggested}", f"configured {configured:g}"],
            f"keep {configured:g}" + ("" if near else ", which is far from the suggestion"),
            checks["learning_rate_rule"],
        )  # fmt: skip

    def _losses(self, cells: Sequence[Cell], key: str = "dev_loss") -> list[float]:
        found = [self._result(cell) for cell in cells]
        return [
            float(result[key])
            for result in found
            if result is not None and result["status"] == "finished" and result.get(key) is not None
        ]

    # ---------------------------------------------------------------------------- phase 1

    def shares(self) -> None:
        """The share sweep; its leader is the GLU sweep's share."""
        sweep = self.embedding
        cells = self._cells(sweep, _baseline_first(sweep), [0])
        complete = self._schedule(STAGES[1], cells)
        if not complete:
            self._assume(f"the share of {sweep.baseline} leads")
            return
        self._kill_decisions("1", cells)
        promotion = self._promoted("1", "embedding share: lowest dev loss", sweep, cells)
        self.leader = promotion.promoted[0]
        self.runner_up = promotion.promoted[1] if len(promotion.promoted) > 1 else None

    def expansions(self) -> None:
        """The GLU sweep at the leading share: one or two cells go on to phase 2."""
        cell = self._cells(self.embedding, [self.leader], [0])[0]
        own = self.glu.runs[0].model
        same = replace(cell.run.model, glu_expansion=own.glu_expansion) == own
        if not same:
            entry = _entry(self.study.embedding.raw, self.leader)
            share = cell.run.model.embedding_ratio or cell.answer.params.share
            path = self._generated(f"glu-{self.leader}.yaml")
            self.glu_source = Source(path, glu_at_share(self.study.glu.raw, entry, share))
            self.sweeps[path] = self.glu_source.raw
            self.glu = self._sweep(self.glu_source, "rank")
        sweep = self.glu
        cells = self._cells(sweep, _baseline_first(sweep), [0])
        complete = self._schedule(STAGES[2], cells)
        self.glu_ranking = tuple(_baseline_first(sweep))
        if not complete:
            if self.decided:
                self._assume(f"{self.config.finalists} cells of {sweep.file.name} go on")
            self.glu_promoted = self.glu_ranking
            return
        self._kill_decisions("1", cells)
        promotion = self._promoted("1", "GLU expansion: lowest dev loss", sweep, cells)
        self.glu_ranking = tuple(name for name, _ in promotion.ranking)
        self.glu_promoted = promotion.promoted

    def _generated(self, name: str) -> Path:
        return Path(self.config.log_dir) / "configs" / name

    def _promoted(
        self, phase: str, rule: str, sweep: Sweep, cells: Sequence[Cell]
    ) -> decisions.Promotion:
        losses: dict[str, Sequence[float]] = {}
        stopped: list[str] = []
        for cell in self._different(cells):
            name = cell.run.experiment
            seeds = range(self.config.noise_seeds) if name == self.embedding.baseline else [0]
            found = self._losses(self._cells(sweep, [name], seeds))
            if found and self._result(cell)["status"] == "finished":  # type: ignore[index]
                losses[name] = found
            else:
                stopped.append(name)
        for name in stopped:  # promote() ranks what it is given; the stopped ones are named here
            losses.setdefault(name, [math.nan])
        promotion = decisions.promote(losses, self.noise, killed=stopped)
        numbers = [f"{name} {loss:.4f}" for name, loss in promotion.ranking]
        numbers += [f"{name} stopped" for name in stopped]
        slopes = [f"{cell.run.experiment} {_slope(self._curve(cell))}" for cell in cells]
        self._decide(phase, rule, numbers, ", ".join(promotion.promoted), promotion.reason)
        self._decide(
            phase, f"dev PPL slope, {sweep.file.name}", slopes, "recorded",
            "d ln PPL / d ln tokens over the last half of each run.",
        )  # fmt: skip
        return promotion

    def _different(self, cells: Sequence[Cell]) -> list[Cell]:
        """One cell for each run: rounding can make two of a sweep the same model."""
        kept: dict[str, Cell] = {}
        for cell in cells:
            kept.setdefault(self.aliases.get(cell.name, cell.name), cell)
        return list(kept.values())

    def _curve(self, cell: Cell) -> kill_rule.Curve:
        return self.record.curves.get(self.aliases.get(cell.name, cell.name), ())

    def _kill_decisions(self, phase: str, cells: Sequence[Cell]) -> None:
        """Both readings of the kill rule for every cell, from the curves."""
        curves = {cell.run.experiment: self._curve(cell) for cell in cells}
        for cell in cells:
            stated, name = cell.run.kill_rule, cell.run.experiment
            result = self._result(cell)
            if result is not None and result["status"] == "failed":
                self._decide(phase, "diverged", [name], "out", str(result.get("reason")))
            elif stated is not None and name != cell.run.baseline:
                rule = _rule(stated, stated.grace(cell.run.training.tokens))
                found = kill_rule.verdict(rule, curves[cell.run.baseline], curves[name])
                verdict = f"{found.kind}; to the PRD's letter {found.literal_kind}"
                self._decide(
                    phase, "kill rule", [f"{name} against {cell.run.baseline}"], verdict,
                    found.reason,
                )  # fmt: skip

        self._replay_decision(phase, cells)

    def _replay_decision(self, phase: str, cells: Sequence[Cell]) -> None:
        """How often the rule would have killed a run that ended no worse than the baseline."""
        baseline = next(cell for cell in cells if cell.run.experiment == cell.run.baseline)
        reference = self._curve(baseline)
        curves = {c.run.experiment: self._curve(c) for c in cells if c is not baseline}
        complete = {
            name: curve
            for name, curve in curves.items()
            if curve and reference and curve[-1][0] == reference[-1][0]
        }
        stated = baseline.run.kill_rule
        if stated is None or not complete:
            return
        told = []
        for label, grace in (("letter", 0), ("grace", stated.grace(baseline.run.training.tokens))):
            found = decisions.replay_kills(reference, complete, _kills_at(stated, grace))
            told.append(
                f"{label}: {found.kills} kills, {found.false_kills} false, "
                f"{found.tokens_saved:,} of {found.tokens_total:,} tokens saved"
            )
        self._decide(
            phase, f"kill rule replayed, {baseline.path.name}", told, "recorded",
            f"over the {len(complete)} cells that ran to the end; false: ended no worse than the "
            "baseline.",
        )  # fmt: skip

    # ---------------------------------------------------------------------------- phase 1b

    def vocabularies(self) -> None:
        """Vocabulary x tying at the leading share and its neighbours, on equal training bytes."""
        assert self.study.vocabulary is not None
        stage, template = STAGES[3], self.study.vocabulary
        shares = self._neighbours()
        budget = self._byte_budgets(template)
        raw = vocabulary_grid(template.raw, shares, self._variants(template), budget)
        path = self._generated("vocab_tying.yaml")
        whole = config.sweep_from(raw, path, self.study.overrides, "rank")
        fits = [run.experiment for run in whole.runs if _feasible(run.model)]
        dropped = [name for name in whole.names if name not in fits]
        if not fits:
            raise ValueError(
                f"{template.path}: found no vocabulary that the allocator can serve at these "
                "shares, expected one at least; set vocabulary to null in the study file"
            )
        raw["experiments"] = [entry for entry in raw["experiments"] if entry["name"] in fits]
        self.sweeps[path] = raw
        sweep = config.sweep_from(raw, path, self.study.overrides, "rank")
        cells = self._cells(sweep, sweep.names, [0])
        for cell in cells:
            self._need_tokens(stage, cell)
        # No run of its own for the baseline: token perplexity cannot kill across vocabularies.
        complete = self._schedule(stage, cells, own_baseline=False)
        if complete and dropped:
            self._decide(
                "1b", "allocation", dropped, "left out",
                "no shape is within the allocator's bounds at this share.",
            )  # fmt: skip
        if complete:
            self._vocabulary_decisions(cells)

    def _neighbours(self) -> list[Mapping[str, Any]]:
        """Experiments of the share sweep: the leader and the shares on both sides of it."""
        cells = self._cells(self.embedding, self.embedding.names, [0])
        ordered = [c.run.experiment for c in sorted(cells, key=lambda c: c.answer.params.share)]
        place = ordered.index(self.leader)
        near = ordered[max(0, place - 1) : place + 2]
        defaults = {cell.run.experiment: cell.run.model.embedding_ratio for cell in cells}
        found: list[Mapping[str, Any]] = []
        for name in near:
            entry = dict(_entry(self.study.embedding.raw, name))
            if defaults[name] is not None:
                entry.setdefault("embedding_ratio", defaults[name])
            found.append(entry)
        return found

    def _variants(self, template: Source) -> list[tuple[int, bool]]:
        sweep = config.sweep_from(template.raw, template.path, self.study.overrides, "rank")
        return list(
            dict.fromkeys((run.model.vocab_size, run.model.tie_embeddings) for run in sweep.runs)
        )

    def _byte_budgets(self, template: Source) -> dict[int, int]:
        """Ranking tokens of each other vocabulary that hold as many bytes as the study's own."""
        reference = self.embedding.runs[0]
        ours = self.record.train_tokens.get(reference.model.vocab_size)
        budgets = {}
        for vocab, _ in self._variants(template):
            theirs = self.record.train_tokens.get(vocab)
            if vocab != reference.model.vocab_size and ours and theirs:
                budgets[vocab] = round(reference.training.tokens * theirs / ours)
        return budgets

    def _vocabulary_decisions(self, cells: Sequence[Cell]) -> None:
        groups: dict[tuple[int, bool], dict[str, Cell]] = {}
        for cell in cells:
            key = (cell.run.model.vocab_size, cell.run.model.tie_embeddings)
            groups.setdefault(key, {})
        for key, group in groups.items():
            alike = [
                c for c in cells if (c.run.model.vocab_size, c.run.model.tie_embeddings) == key
            ]
            group.update({cell.run.experiment: cell for cell in self._different(alike)})
        bits = self._bits_per_byte(cells)
        noise = self._bits_noise()
        leads = []
        for (vocab, tied), group in groups.items():
            found = {name: [bits[name]] for name in group if bits.get(name) is not None}
            label = f"{vocab} {'tied' if tied else 'untied'}"
            if not found:
                self._decide("1b", f"best share, {label}", [], "none", "no cell has a result.")
                continue
            promotion = decisions.promote(found, noise)
            numbers = [
                f"{name} {value:.4f} bits/byte at {group[name].answer.model.n_layers} layers"
                for name, value in promotion.ranking
            ]
            clear = len(promotion.promoted) == 1
            best = promotion.ranking[0]
            leads.append((label, best[0], best[1]))
            verdict = best[0] if clear else f"{' or '.join(promotion.promoted)}, not separable"
            self._decide("1b", f"best share, {label}", numbers, verdict, promotion.reason)
        shares = {name.rpartition("-v")[0] for _, name, _ in leads}
        self._decide(
            "1b", "shift of the best share",
            [f"{label}: {name} {value:.4f}" for label, name, value in leads],
            "no shift" if len(shares) == 1 else "the best shares differ",
            "lowest dev bits per byte of each vocabulary and head, on equal documents and equal "
            "training bytes; one seed a cell, so read it with the separability above.",
        )  # fmt: skip

    def _bits_per_byte(self, cells: Sequence[Cell]) -> dict[str, float]:
        """Dev bits per byte over the documents that all cells scored, where they kept them."""
        names = {c.run.experiment: self.aliases.get(c.name, c.name) for c in cells}
        done = {
            name: run
            for name, run in names.items()
            if self.record.results[run]["status"] == "finished"
        }
        losses = {name: self.record.documents(run, "validation") for name, run in done.items()}
        if any(found is None for found in losses.values()):
            return {
                name: self.record.results[run]["dev_bits_per_byte"] for name, run in done.items()
            }
        count = min((len(found.nats) for found in losses.values() if found), default=0)
        return {
            name: float(found.nats[:count].sum() / math.log(2) / found.bytes[:count].sum())
            for name, found in losses.items()
            if found
        }

    def _bits_noise(self) -> decisions.Noise | None:
        baseline = self.embedding.baseline
        seeds = self._cells(self.embedding, [baseline], range(self.config.noise_seeds))
        found = self._losses(seeds, "dev_bits_per_byte")
        return decisions.pooled_noise({baseline: found}) if len(found) > 1 else None

    # ---------------------------------------------------------------------------- phase 2

    def finals(self) -> None:
        """Finalists and the study's baseline at the full budget, several seeds each."""
        seeds = range(self.config.final_seeds)
        full = self._sweep(self.study.embedding, "full")
        baseline = self._cells(full, [full.baseline], seeds)
        chosen = self._finalists(full, baseline[0])
        cells = [cell for group in chosen.values() for cell in group]
        complete = self._schedule(STAGES[4], [*baseline, *cells])
        if complete:
            self._final_decisions(baseline, chosen)

    def _finalists(self, full: Sweep, baseline: Cell) -> dict[str, list[Cell]]:
        """Promoted cells, best ranking loss first; the baseline itself is no candidate."""
        glu = self._sweep(self.glu_source, "full")
        pool = [(self.glu, glu, name) for name in self.glu_promoted]
        if self.runner_up is not None:
            pool.append((self.embedding, full, self.runner_up))
        if self.decided:
            pool.sort(key=lambda item: self._losses(self._cells(item[0], [item[2]], [0]))[:1])
        spare = [(self.glu, glu, name) for name in self.glu_ranking]
        chosen: dict[str, list[Cell]] = {}
        taken = {baseline.identity}
        for source, wanted in ((pool, self.config.finalists), (spare, 1)):
            for _, sweep, name in source:
                cells = self._cells(sweep, [name], range(self.config.final_seeds))
                if len(chosen) < wanted and cells[0].identity not in taken:
                    taken.add(cells[0].identity)
                    chosen[name] = cells
        return chosen

    def _final_decisions(self, baseline: list[Cell], chosen: Mapping[str, list[Cell]]) -> None:
        split = "test" if all(self._losses(c, "test_loss") for c in (baseline, *chosen.values())) \
            else "validation"  # fmt: skip
        key = "test_loss" if split == "test" else "dev_loss"
        reference = self._measured(baseline, key)
        candidates = {name: self._measured(cells, key) for name, cells in chosen.items()}
        lost = [name for name, found in candidates.items() if found is None]
        for name in lost:
            self._decide("2", "finished", [name], "out", "no seed of it finished.")
        found = [measured for measured in candidates.values() if measured is not None]
        if reference is None or not found:
            self._decide(
                "2", "winner", [], "no winner",
                "the baseline or every finalist is without a finished seed.",
            )  # fmt: skip
            return
        intervals = {m.name: self._interval(chosen[m.name], baseline, split, key) for m in found}
        held = decisions.holm({name: interval.p for name, interval in intervals.items()})
        for name, interval in intervals.items():
            says = decisions.equivalence(interval)
            self._decide(
                "2", "95 % interval and equivalence at +-1 %",
                [f"{name} against {reference.name}: PPL {_percent(interval.ratio[1])} "
                 f"({_percent(interval.ratio[0])} to {_percent(interval.ratio[2])})"],
                says.verdict,
                f"{says.statement} {interval.seeds} seeds, {interval.documents} documents; "
                f"p {held[name].p:.4f}, {held[name].adjusted_p:.4f} after Holm.",
            )  # fmt: skip
        ties = self._ties({m.name: chosen[m.name] for m in found}, split, key)
        result = decisions.winner(reference, found, ties=ties)
        for verdict in result.candidates:
            self._decide(
                "2", ">= 5 % lower PPL, latency and memory not above the baseline's",
                [f"{verdict.name}: {_mean(candidates[verdict.name].log_perplexities)} nats"  # type: ignore[union-attr]
                 f" against {_mean(reference.log_perplexities)}"],
                "qualifies" if verdict.qualifies_strict
                else "qualifies within the 3 % margin" if verdict.qualifies_margin else "does not",
                "; ".join(verdict.reasons),
            )  # fmt: skip
        strict, margin = (
            name or "no winner" for name in (result.winner_strict, result.winner_margin)
        )
        verdict_text = strict if strict == margin else f"{strict}; with the 3 % margin {margin}"
        tied = [" = ".join(sorted(pair)) for pair in ties]
        self._decide("2", "winner", tied or ["no ties"], verdict_text, result.reason)
        self._rank_decision(baseline, chosen)

    def _measured(self, cells: Sequence[Cell], key: str) -> decisions.Measured | None:
        losses = self._losses(cells, key)
        if not losses:
            return None

        def median(name: str) -> float | None:
            values = self._losses(cells, name)
            return float(np.median(values)) if values else None

        return decisions.Measured(
            name=cells[0].run.experiment,
            log_perplexities=tuple(losses),
            latency_ms_l128=median("latency_ms_p50_l128"),
            latency_ms_l512=median("latency_ms_p50_l512"),
            peak_memory_mib=median("peak_memory_mib"),
        )

    def _interval(
        self, ours: Sequence[Cell], theirs: Sequence[Cell], split: str, key: str
    ) -> decisions.Interval:
        """Over documents and the seeds that both finished; over seeds alone without documents."""
        pairs = [
            (a, b)
            for a, b in zip(ours, theirs, strict=True)
            if self._losses([a], key) and self._losses([b], key)
        ]
        if not pairs:  # no common seed: unpaired means, and nothing follows from them
            gap = np.mean(self._losses(ours, key)) - np.mean(self._losses(theirs, key))
            return decisions.Interval(float(gap), -math.inf, math.inf, 0.95, 1.0, 0, 0)
        mine, other = [a for a, _ in pairs], [b for _, b in pairs]
        ours_found, theirs_found = (
            [found for cell in side if (found := self._documents(cell, split)) is not None]
            for side in (mine, other)
        )
        if min(len(ours_found), len(theirs_found)) < len(pairs):
            return decisions.seed_interval(self._losses(mine, key), self._losses(other, key))
        return decisions.paired_bootstrap(
            np.stack([found.nats for found in ours_found]),
            np.stack([found.nats for found in theirs_found]),
            ours_found[0].tokens,
        )

    def _documents(self, cell: Cell, split: str) -> Documents | None:
        return self.record.documents(self.aliases.get(cell.name, cell.name), split)

    def _ties(
        self, chosen: Mapping[str, Sequence[Cell]], split: str, key: str
    ) -> set[frozenset[str]]:
        names = list(chosen)
        return {
            frozenset((a, b))
            for i, a in enumerate(names)
            for b in names[i + 1 :]
            if decisions.equivalence(self._interval(chosen[a], chosen[b], split, key)).verdict
            == "equivalent"
        }

    def _rank_decision(self, baseline: list[Cell], chosen: Mapping[str, list[Cell]]) -> None:
        """Do short runs and full runs agree on the order?"""
        groups = {baseline[0].run.experiment: baseline, **chosen}
        short, full = {}, {}
        for name, cells in groups.items():
            sweep = self.embedding if name in self.embedding.names else self.glu
            ranked = self._losses(self._cells(sweep, [name], [0]))
            finished = self._losses(cells)
            if ranked and finished:
                short[name], full[name] = ranked[0], float(np.mean(finished))
        if len(short) < 2:
            return
        found = decisions.rank_agreement(short, full)
        rho = "too few cells" if found.spearman is None else f"{found.spearman:.2f}"
        self._decide(
            "2", "short against full ranking",
            [f"{name}: {short[name]:.4f} -> {full[name]:.4f}" for name in short],
            "same leader" if found.top1_same else "another leader",
            f"Spearman {rho} over {found.n} cells; finishing the short runs' best alone would "
            f"have cost {found.top1_regret:.4f} nats.",
        )  # fmt: skip


def _rule(stated: config.KillRuleConfig, grace: int) -> kill_rule.KillRule:
    return kill_rule.KillRule(
        margin_ppl=stated.margin_ppl, window_tokens=stated.window_tokens, grace_tokens=grace
    )


def _kills_at(
    stated: config.KillRuleConfig, grace: int
) -> Callable[[kill_rule.Curve, kill_rule.Curve], int | None]:
    rule = _rule(stated, grace)
    return lambda baseline, run: kill_rule.verdict(rule, baseline, run).tokens


def _alias(cell: Cell, original: str) -> Metrics:
    """The keys of metrics.json by which a cell differs from the run that stands for it."""
    run = cell.run
    return {
        "run": cell.name,
        "alias_of": original,
        "experiment": run.experiment,
        "sweep": cell.path.name,
        "baseline": run.experiment == run.baseline,
        "baseline_name": run.baseline,
        "asked_embedding_ratio": run.model.embedding_ratio,
        "asked_glu_expansion": run.model.glu_expansion,
    }


def _step_tokens(cell: Cell) -> int:
    return cell.run.training.step_tokens


def _baseline_first(sweep: Sweep) -> list[str]:
    return sorted(sweep.names, key=lambda name: name != sweep.baseline)


def _entry(raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return next(entry for entry in raw["experiments"] if entry["name"] == name)


def _mean(values: Sequence[float]) -> str:
    if not values:
        return "unknown"
    found = decisions.mean_sd(values)
    return f"{found.mean:.4f}" + ("" if found.sd is None else f" +- {found.sd:.4f}")


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.2f} %" if math.isfinite(ratio) else "unbounded"


def _slope(curve: kill_rule.Curve) -> str:
    found = decisions.log_slope(curve)
    return "unknown" if found is None else f"{found:+.3f}"


# ------------------------------------------------------------------------------------- estimates


@dataclass(frozen=True, kw_only=True, slots=True)
class Rate:
    """What a job takes here: training FLOPs a second, seconds around training, dollars an hour."""

    flops_per_s: float
    overhead_s: float
    usd_per_hour: float | None
    source: str


def seconds(job: Job, rate: Rate) -> float:
    """Estimated wall seconds of a job that is not done; 0 for what is done or an alias."""
    if job.done or job.alias_of or job.kind == "tokens":
        return 0.0
    return job.flops / rate.flops_per_s + rate.overhead_s


def dollars(job: Job, rate: Rate) -> float:
    """Estimated cost of a job; 0 where the device has no price."""
    return seconds(job, rate) / 3600 * (rate.usd_per_hour or 0.0)


def table(found: Plan, rate: Rate, spent: Mapping[str, float], budget: float) -> str:
    """The plan for people: a line a stage with runs, tokens, hours and dollars."""
    lines = [f"{'stage':<15} {'runs':>5} {'done':>5} {'alias':>5} {'tokens to go':>14} "
             f"{'hours':>8} {'USD':>8} {'spent':>8}"]  # fmt: skip
    total_h = total_usd = 0.0
    for stage in STAGES:
        jobs = [job for job in found.jobs if job.stage == stage and job.kind != "tokens"]
        if not jobs:
            continue
        open_jobs = [job for job in jobs if not (job.done or job.alias_of)]
        hours = sum(seconds(job, rate) for job in jobs) / 3600
        usd = sum(dollars(job, rate) for job in jobs)
        total_h, total_usd = total_h + hours, total_usd + usd
        lines.append(
            f"{stage:<15} {len(jobs):>5} {sum(job.done for job in jobs):>5} "
            f"{sum(job.alias_of is not None for job in jobs):>5} "
            f"{sum(job.tokens for job in open_jobs):>14,} {hours:>8.2f} {usd:>8.2f} "
            f"{spent.get(stage, 0.0):>8.2f}"
        )
    all_spent = sum(spent.values())
    lines.append(
        f"to go: {total_h:.2f} hours, {total_usd:.2f} USD; spent {all_spent:.2f} USD; together "
        f"{all_spent + total_usd:.2f} of budget_usd {budget:.2f} ({rate.source})"
    )
    lines += [f"assumed until it is decided: {what}" for what in found.assumptions]
    return "\n".join(lines)
