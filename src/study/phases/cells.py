"""What a study is made of: its files, what the log directory holds, its jobs, and its cells.

Pure: integers come from the allocator, nothing from a file, a clock or a device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from src.spec import allocation, config, kill_rule
from src.spec.config import ModelRequest, RunConfig, Sweep
from src.spec.study_file import StudyConfig
from src.storage.documents import Documents

Metrics = Mapping[str, Any]
Decision = dict[str, str]

STAGES = SANITY, SHARE, RATES, GLU, VOCABULARY, FINALS, EVERY, LATENCY = (
    "0 sanity", "1 share", "1 rates", "1 glu", "1b vocabulary", "2 finals", "2 all cells",
    "2 latency",
)  # fmt: skip


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """What the log directory holds.

    results: metrics.json by run name; a run that diverged stands as {"status": "failed", ...}.
    curves: dev checks by run name. documents(run, split): its losses, None without them.
    train_tokens: tokens of the train split by vocabulary; absent where they are to be made.
    sanity: sanity.json of the baseline. latency: comparisons by job name. threads: of every run
    that states none; None where that is not settled yet.
    """

    results: Mapping[str, Metrics] = field(default_factory=dict)
    curves: Mapping[str, kill_rule.Curve] = field(default_factory=dict)
    documents: Callable[[str, str], Documents | None] = lambda run, split: None
    train_tokens: Mapping[int, int] = field(default_factory=dict)
    sanity: Metrics | None = None
    latency: Mapping[str, Metrics] = field(default_factory=dict)
    threads: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One step of the study: a run, the sanity checks, tokens to be made, or a comparison.

    kind: "train", "sanity", "tokens" or "latency". alias_of: the run whose result stands for this
    one. assumed: rests on a choice that has not been made, so it is counted and not run.
    after: the run that must have ended before this one begins (the kill rule reads its curve).
    arguments: what the command of a comparison takes beside its device.
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
    after: str | None = None
    arguments: tuple[str, ...] = ()

    @property
    def open(self) -> bool:
        """Whether it is still to be run, now or later."""
        return not (self.done or self.alias_of)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Jobs in order, the decisions so far, and the sweep files that the jobs need."""

    jobs: tuple[Job, ...]
    decisions: tuple[Decision, ...]
    sweeps: Mapping[Path, Mapping[str, Any]]
    assumptions: tuple[str, ...]
    winner: Metrics | None  # both readings of the rule; None before finalists were judged
    aliased: tuple[Metrics, ...]  # study.json's `aliases`: what the aggregator needs of each
    complete: bool

    def ready(self, running: Collection[str] = ()) -> list[Job]:
        """Jobs that may begin beside those `running`, in order; none rests on an assumption.

        Runs of a sweep are independent of each other but for its baseline's curve. Everything
        else is alone: later runs need the tokens, the checks say whether to train at all, and a
        comparison of speed shares the machine with nobody.
        """
        waiting = {job.name for job in self.jobs if job.open}
        found: list[Job] = []
        for job in self.jobs:
            if not job.open or job.assumed:
                continue
            if job.kind != "train":
                return found or ([] if running else [job])
            if job.name not in running and job.after not in waiting:
                found.append(job)
        return found

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
        return config.digest(content)

    @property
    def tokens(self) -> int:
        """Of the whole run."""
        return self.run.training.steps * self.run.training.step_tokens

    @property
    def flops(self) -> float:
        """Of the whole run's training."""
        per_token = allocation.flops_per_token(self.answer.model, self.run.training.seq_len)
        return float(per_token * self.tokens)


# ---------------------------------------------------------------------------------- allocation


@functools.lru_cache(maxsize=256)
def _allocated(
    requests: tuple[tuple[str, ModelRequest], ...], baseline: str | None
) -> dict[str, allocation.Allocation]:
    return allocation.allocate(dict(requests), baseline)


def allocate(sweep: Sweep) -> dict[str, allocation.Allocation]:
    """The integers of every experiment; raises ValueError naming the sweep's file."""
    try:
        return _allocated(tuple((run.experiment, run.model) for run in sweep.runs), sweep.baseline)
    except ValueError as error:
        raise ValueError(f"{sweep.file}: {error}") from None


@functools.lru_cache(maxsize=256)
def feasible(request: ModelRequest) -> bool:
    """Whether the allocator has a shape for this request."""
    try:
        _allocated((("", request),), None)
    except ValueError:
        return False
    return True


def model_keys(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What an experiment states of its model."""
    return {key: value for key, value in entry.items() if key not in ("name", "training")}


def baseline_cell(study: Study) -> Cell:
    """The study's baseline as a ranking run."""
    sweep = config.sweep_from(study.embedding.raw, study.embedding.path, study.overrides, "rank")
    run = sweep.run(sweep.baseline, 0)
    return Cell(sweep.file, run, allocate(sweep)[sweep.baseline])
