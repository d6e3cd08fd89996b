"""What a study is made of: its files, what its log directory holds, configurations, jobs, the plan.

Pure: integers come from the allocator, nothing from a file, a clock or a device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from src.spec import allocation, config, kill_rule, run_identity
from src.spec.config import ModelRequest, RunConfig, Sweep
from src.spec.study_file import StudyConfig
from src.storage.documents import Documents

Metrics = Mapping[str, Any]
Decision = dict[str, str]

LATENCY = "latency"  # the stage after all blocks: comparisons of speed, the machine to themselves
_TRAINED_WITH = ("batch_size", "seq_len", "learning_rate", "embedding_lr_ratio")


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
    others: those of tuned runs, and of runs that no plan knows.
    curves: dev checks by run. documents(run, split): its losses, None without them.
    train_tokens: tokens of the train split by vocabulary; absent where they are to be made.
    sanity: sanity.json by directory. latency: comparisons by job. threads: of every run that
    states none; None where that is not settled yet.
    """

    results: Mapping[str, Metrics] = field(default_factory=dict)
    others: Mapping[str, Metrics] = field(default_factory=dict)
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
    def flops_per_token(self) -> int:
        """Of training."""
        return allocation.flops_per_token(self.allocation.model, self.run.training.seq_len)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One step of the study.

    kind: "train", "sanity" (phase 0's checks), "tokens" (to be made) or "latency" (a comparison).
    tokens: trained on, for the estimate. assumed: rests on a choice that has not been made, so it
    is counted and not run. alias_of: the run whose result stands for this one. after: the run that
    must have ended before (the kill rule reads its curve). arguments: of a comparison's command.
    """

    stage: str
    kind: str
    name: str
    configuration: Configuration
    tokens: int
    done: bool
    assumed: bool
    alias_of: str | None = None
    after: str | None = None
    arguments: tuple[str, ...] = ()

    @property
    def open(self) -> bool:
        """Whether it is still to be run, now or later."""
        return not (self.done or self.alias_of)

    @property
    def alone(self) -> bool:
        """Later runs need the tokens; a comparison of speed shares the machine with nobody."""
        return self.kind in ("tokens", "latency")

    @property
    def flops(self) -> int:
        return self.configuration.flops_per_token * self.tokens

    @property
    def run(self) -> RunConfig:
        return self.configuration.run


# ------------------------------------------------------------------------------------- the plan


class Plan:
    """What has been scheduled and decided so far, and the questions that are asked of it.

    Blocks write into one plan in order; the first unfinished choice turns all later ones into
    guesses.
    """

    def __init__(self, study: Study, state: State) -> None:
        self.study, self.state = study, state
        self.stages = (*(block.name for block in study.config.blocks), LATENCY)
        self.jobs: list[Job] = []
        self.decisions: list[Decision] = []
        self.sweeps: dict[Path, Mapping[str, Any]] = {}  # files that the jobs need
        self.assumptions: list[str] = []
        self.aliases: dict[str, str] = {}
        self.winner: Metrics | None = None  # both readings of the rule, once finalists were judged
        self._first_with: dict[str, str] = {}  # identity -> run

    @property
    def decided(self) -> bool:
        """Whether every choice so far rests on finished runs."""
        return not self.assumptions

    @property
    def complete(self) -> bool:
        return all(not job.open and not job.assumed for job in self.jobs)

    def ready(self, running: Collection[str] = (), failed: Collection[str] = ()) -> list[Job]:
        """Jobs that may begin beside those `running`, in order; none rests on an assumption.

        Runs of a sweep are independent of each other but for its baseline's curve; what comes after
        a job that runs alone waits.
        """
        waiting = {job.name for job in self.jobs if job.open}
        ready: list[Job] = []
        for job in self.jobs:
            if not job.open or job.assumed:
                continue
            if job.alone:
                return ready or ([] if running or job.name in failed else [job])
            if job.name not in running and job.name not in failed and job.after not in waiting:
                ready.append(job)
        return ready

    # ------------------------------------------------------------------------------- questions

    def sweep(self, source: Source, phase: str, overrides: tuple[str, ...] = ()) -> Sweep:
        """The sweep of a file or of generated values, with what the study and a block set."""
        return source.sweep((*self.study.overrides, *overrides), phase)

    def run_of(self, configuration: Configuration) -> str:
        """The run directory that holds its numbers: its own, or its equal's."""
        return self.aliases.get(configuration.name, configuration.name)

    def result(self, configuration: Configuration) -> Metrics | None:
        """metrics.json of it or of its equal; None where it is not there yet."""
        return self.state.results.get(self.run_of(configuration))

    def finished(self, configurations: Sequence[Configuration]) -> list[Configuration]:
        """Those that ended neither killed nor diverged."""
        return [c for c in configurations if (r := self.result(c)) and r["status"] == "finished"]

    def losses(self, configurations: Sequence[Configuration], key: str = "dev_loss") -> list[float]:
        """`key` of the finished ones that measured it."""
        values = [(self.result(c) or {}).get(key) for c in self.finished(configurations)]
        return [float(value) for value in values if value is not None]

    def curve(self, configuration: Configuration) -> kill_rule.Curve:
        """Dev checks of its run."""
        return self.state.curves.get(self.run_of(configuration), ())

    def documents(self, configuration: Configuration, split: str) -> Documents | None:
        """Per-document losses of its run."""
        return self.state.documents(self.run_of(configuration), split)

    def distinct(self, configurations: Sequence[Configuration]) -> list[Configuration]:
        """One for each run: rounding can make two of a sweep the same model."""
        by_run: dict[str, Configuration] = {}
        for configuration in configurations:
            by_run.setdefault(self.run_of(configuration), configuration)
        return list(by_run.values())

    # --------------------------------------------------------------------------------- entries

    def generate(self, name: str, raw: Mapping[str, Any]) -> Source:
        """A sweep file of the study's own, written when a run needs it."""
        source = Source(Path(self.study.config.log_dir) / "configs" / name, raw)
        self.sweeps[source.path] = raw
        return source

    def schedule(
        self, stage: str, configurations: Sequence[Configuration], own_baseline: bool = True
    ) -> bool:
        """Add their runs; True where all of them have a result and none is assumed.

        One that is equal to an earlier one becomes its alias, unless that was killed or diverged
        (here it might not be) or, with `own_baseline`, it is its sweep's baseline: the kill rule
        looks for that run by its name.
        """
        results = self.state.results
        for configuration in configurations:
            name = configuration.name
            if any(job.name == name for job in self.jobs):
                continue
            run, is_baseline = configuration.run, configuration.is_baseline
            keeps_own_run = own_baseline and is_baseline
            original = self._first_with.setdefault(configuration.identity, name)
            original_result, own_result = results.get(original), results.get(name)
            if own_result is not None:
                _check_same(configuration, own_result, keeps_own_run, self.state.threads)
            usable = original_result is None or original_result["status"] == "finished"
            if original != name and usable and own_result is None and not keeps_own_run:
                self.aliases[name] = original
            needs_curve = run.may_be_killed and not is_baseline
            self.task(
                stage, "train", configuration, name, tokens=run.training.total_tokens,
                done=self.result(configuration) is not None, alias_of=self.aliases.get(name),
                after=configuration.place(run.baseline_run_name) if needs_curve else None,
            )  # fmt: skip
        return self.decided and all(self.result(c) is not None for c in configurations)

    def task(
        self, stage: str, kind: str, configuration: Configuration, name: str, *,
        done: bool, tokens: int = 0, assumed: bool = False, **fields: Any,
    ) -> None:  # fmt: skip
        """Add a job; `fields` are further ones of it."""
        assumed = not done and (assumed or not self.decided)
        job = Job(stage=stage, kind=kind, name=name, configuration=configuration, tokens=tokens,
                  done=done, assumed=assumed, **fields)  # fmt: skip
        self.jobs.append(job)

    def need_tokens(self, stage: str, configuration: Configuration) -> None:
        """Add the job that makes its tokens where they are not there."""
        run, name = configuration.run, str(configuration.run.token_dir)
        there = run.model.vocab_size in self.state.train_tokens
        if not there and not any(job.name == name for job in self.jobs):
            self.task(stage, "tokens", configuration, name, done=False)

    def assume(self, what: str) -> None:
        """All that follows is assumed; only the first assumption is reported."""
        if self.decided:
            self.assumptions.append(what)

    def decide(
        self, phase: str, rule: str, numbers: Sequence[str], verdict: str, reason: str
    ) -> None:
        """Keep a decision with its numbers and its reason."""
        self.decisions.append(
            {
                "phase": phase,
                "rule": rule,
                "numbers": "; ".join(numbers),
                "verdict": verdict,
                "reason": reason,
            }
        )


def _check_same(
    configuration: Configuration, result: Metrics, is_baseline: bool, threads: int | None
) -> None:
    """Refuse a finished run of this name that was made with another configuration, or on a CPU
    with another number of threads than the study's other runs, which changes its sums."""
    if result["status"] == "failed":
        if is_baseline:
            raise ValueError(
                f"{configuration.name}: the baseline diverged ({result.get('reason')}), so nothing "
                "can be compared with it; lower training.learning_rate and use another log_dir"
            )
        return
    training = configuration.run.training
    expected = config.to_dict(configuration.allocation.model)
    expected |= {key: getattr(training, key) for key in _TRAINED_WITH}
    if result["status"] == "finished":
        expected["steps"] = training.steps
    # All else that is learned from; what differs has no key in metrics.json.
    expected["training_digest"] = run_identity.training_digest(training)
    threads = training.threads or threads
    if result.get("device") == "cpu" and threads is not None:
        expected["threads"] = threads
    for key, value in expected.items():
        if result.get(key, value) not in (None, value):
            source = configuration.path if key != "threads" else "every run of this study"
            difference = f"{key} {result[key]}, expected {value}"
            if key == "training_digest":
                difference = "other training settings (see its config.yaml), expected those"
            raise ValueError(
                f"{configuration.name}: found a run with {difference} as {source} asks; use "
                "another log_dir, or delete that run (and its publication)"
            )


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
