"""What a study is made of: its files, what its log directory holds, configurations, jobs, the plan.

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


@dataclass(frozen=True, slots=True)
class Source:
    """An experiment file and its values."""

    path: Path
    raw: Mapping[str, Any]

    def sweep(self, overrides: tuple[str, ...], phase: str) -> Sweep:
        return config.sweep_from(self.raw, self.path, overrides, phase)


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """A study file and the sweeps that its blocks name; `overrides` go to every run."""

    file: str
    config: StudyConfig
    overrides: tuple[str, ...]
    sources: Mapping[str, Source]

    def sweeps(self) -> list[Sweep]:
        """Every named sweep at the ranking budget, with all that is set for it."""
        own = {block.name: block.overrides for block in self.config.blocks}
        return [
            source.sweep((*self.overrides, *own.get(name, ())), "rank")
            for name, source in self.sources.items()
        ]

    def baseline(self) -> Configuration:
        """The first sweep's baseline as a ranking run: what the study's speed is measured on."""
        sweep = self.sweeps()[0]
        return Configuration(
            sweep.file, sweep.run(sweep.baseline, 0), allocate(sweep)[sweep.baseline]
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """What the log directory holds.

    results: metrics.json by run; a run that diverged stands as {"status": "failed", ...}.
    curves: dev checks by run. documents(run, split): its losses, None without them.
    train_tokens: tokens of the train split by vocabulary; absent where they are to be made.
    sanity: sanity.json by directory. latency: comparisons by job. threads: of every run that
    states none; None where that is not settled yet.
    """

    results: Mapping[str, Metrics] = field(default_factory=dict)
    curves: Mapping[str, kill_rule.Curve] = field(default_factory=dict)
    documents: Callable[[str, str], Documents | None] = lambda run, split: None
    train_tokens: Mapping[int, int] = field(default_factory=dict)
    sanity: Mapping[str, Metrics] = field(default_factory=dict)
    latency: Mapping[str, Metrics] = field(default_factory=dict)
    threads: int | None = None


@dataclass(frozen=True, slots=True)
class Configuration:
    """One experiment of a sweep at one seed: its integers, its directory, what was set for it."""

    path: Path  # of the sweep
    run: RunConfig
    allocation: allocation.Allocation
    folder: str = ""  # below the log directory
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Its run directory, relative to the log directory."""
        return self.place(self.run.run_name)

    def place(self, run_name: str) -> str:
        return f"{self.folder}/{run_name}" if self.folder else run_name

    @property
    def identity(self) -> str:
        """Equal for runs that compute the same thing, whatever they are called."""
        run = self.run
        content = {
            "model": config.to_dict(self.allocation.model),
            "training": config.to_dict(run.training),
            "evaluation": config.to_dict(run.evaluation),
            "tokens": str(run.token_dir),
            "phase": run.phase,
            "seed": run.seed,
        }
        return config.digest(content)

    @property
    def is_baseline(self) -> bool:
        return self.run.experiment == self.run.baseline

    @property
    def tokens(self) -> int:
        """Of the whole run."""
        return self.run.training.steps * self.run.training.step_tokens

    @property
    def flops(self) -> float:
        """Of the whole run's training."""
        per_token = allocation.flops_per_token(self.allocation.model, self.run.training.seq_len)
        return float(per_token * self.tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One step of the study: a run, the sanity checks, tokens to be made, or a comparison.

    kind: "train", "sanity", "tokens" or "latency". alias_of: the run whose result stands for this
    one. assumed: rests on a choice that has not been made, so it is counted and not run. alone:
    nothing runs beside it. after: the run that must have ended before (the kill rule reads its
    curve). arguments: what the command of a comparison takes beside its device.
    """

    stage: str
    kind: str
    name: str
    configuration: Configuration
    tokens: int
    flops: float
    done: bool
    assumed: bool = False
    alone: bool = False
    alias_of: str | None = None
    after: str | None = None
    arguments: tuple[str, ...] = ()

    @property
    def open(self) -> bool:
        """Whether it is still to be run, now or later."""
        return not (self.done or self.alias_of)

    @property
    def experiment(self) -> str:
        return self.configuration.run.experiment

    @property
    def phase(self) -> str:
        return self.configuration.run.phase

    @property
    def seed(self) -> int:
        return self.configuration.run.seed


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Jobs in order, the decisions so far, and the sweep files that the jobs need."""

    stages: tuple[str, ...]
    jobs: tuple[Job, ...]
    decisions: tuple[Decision, ...]
    sweeps: Mapping[Path, Mapping[str, Any]]
    assumptions: tuple[str, ...]
    winner: Metrics | None  # both readings of the rule; None before finalists were judged
    aliased: tuple[Metrics, ...]  # study.json's `aliases`: what the aggregator needs of each

    @property
    def complete(self) -> bool:
        return all(not job.open and not job.assumed for job in self.jobs)

    @property
    def aliases(self) -> dict[str, str]:
        return {job.name: job.alias_of for job in self.jobs if job.alias_of}

    def ready(self, running: Collection[str] = (), failed: Collection[str] = ()) -> list[Job]:
        """Jobs that may begin beside those `running`, in order; none rests on an assumption.

        Runs of a sweep are independent of each other but for its baseline's curve. Later runs need
        the tokens, and a comparison of speed shares the machine with nobody: these are alone, and
        what comes after them waits.
        """
        waiting = {job.name for job in self.jobs if job.open}
        found: list[Job] = []
        for job in self.jobs:
            if not job.open or job.assumed:
                continue
            if job.alone:
                return found or ([] if running or job.name in failed else [job])
            if job.name not in running and job.name not in failed and job.after not in waiting:
                found.append(job)
        return found


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
