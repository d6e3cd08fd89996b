"""The plan builder: jobs as they are scheduled, equal configurations, what finished runs measured.

Pure functions of the study and its state. Blocks write into one builder in order; the
first unfinished choice turns all later ones into guesses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from src.analysis import repeats
from src.spec import kill_rule
from src.spec.config import Sweep
from src.spec.metric_keys import EMBEDDING_RATIO, GLU_EXPANSION
from src.storage.documents import Documents
from src.study.plan import Configuration, Decision, Job, Metrics, Plan, Source, State, Study
from src.study.plan import allocate as allocate_sweep

_MADE_WITH = ("vocab_size", "d_model", "n_layers", "n_heads", "head_dim", "d_ff", "embedding_dim",
              "tie_embeddings")  # fmt: skip
_TRAINED_WITH = ("batch_size", "seq_len", "learning_rate", "embedding_lr_ratio")


class PlanBuilder:
    """What has been scheduled and decided so far, and the questions that are asked of it."""

    def __init__(self, study: Study, state: State) -> None:
        self.study, self.state, self.config = study, state, study.config
        self.jobs: list[Job] = []
        self.decisions: list[Decision] = []
        self.sweeps: dict[Path, Mapping[str, Any]] = {}
        self.assumptions: list[str] = []
        self.winner: Metrics | None = None
        self.aliases: dict[str, str] = {}
        self.aliased: list[Metrics] = []
        self.decided = True  # whether every choice so far rests on finished runs
        self._first_with: dict[str, str] = {}  # identity -> run

    def plan(self, stages: Sequence[str]) -> Plan:
        return Plan(
            stages=tuple(stages),
            jobs=tuple(self.jobs),
            decisions=tuple(self.decisions),
            sweeps=self.sweeps,
            assumptions=tuple(self.assumptions),
            winner=self.winner,
            aliased=tuple(self.aliased),
        )

    # ------------------------------------------------------------------------------- questions

    def sweep(self, source: Source, phase: str, overrides: tuple[str, ...] = ()) -> Sweep:
        """The sweep of a file or of generated values, with what the study and a block set."""
        return source.sweep((*self.study.overrides, *overrides), phase)

    def configurations(
        self,
        sweep: Sweep,
        names: Sequence[str],
        seeds: Sequence[int],
        folder: str = "",
        overrides: tuple[str, ...] = (),
    ) -> list[Configuration]:
        """The experiments `names` of a sweep, seeds within names."""
        found = allocate_sweep(sweep)
        return [
            Configuration(sweep.file, sweep.run(name, seed), found[name], folder, overrides)
            for name in names
            for seed in seeds
        ]

    def run_of(self, one: Configuration) -> str:
        """The run directory that holds its numbers: its own, or its equal's."""
        return self.aliases.get(one.name, one.name)

    def result(self, one: Configuration) -> Metrics | None:
        """metrics.json of it or of its equal; None where it is not there yet."""
        return self.state.results.get(self.run_of(one))

    def finished(self, some: Sequence[Configuration]) -> list[Configuration]:
        """Those that ended neither killed nor diverged."""
        return [c for c in some if (found := self.result(c)) and found["status"] == "finished"]

    def losses(self, some: Sequence[Configuration], key: str = "dev_loss") -> list[float]:
        """`key` of the finished ones that measured it."""
        found = [(self.result(one) or {}).get(key) for one in self.finished(some)]
        return [float(value) for value in found if value is not None]

    def curve(self, one: Configuration) -> kill_rule.Curve:
        """Dev checks of its run."""
        return self.state.curves.get(self.run_of(one), ())

    def documents(self, one: Configuration, split: str) -> Documents | None:
        """Per-document losses of its run."""
        return self.state.documents(self.run_of(one), split)

    def different(self, some: Sequence[Configuration]) -> list[Configuration]:
        """One for each run: rounding can make two of a sweep the same model."""
        kept: dict[str, Configuration] = {}
        for one in some:
            kept.setdefault(self.run_of(one), one)
        return list(kept.values())

    # ------------------------------------------------------------------------------- entries

    def generate(self, name: str, raw: Mapping[str, Any]) -> Source:
        """A sweep file of the study's own, written when a run needs it."""
        source = Source(Path(self.config.log_dir) / "configs" / name, raw)
        self.sweeps[source.path] = raw
        return source

    def schedule(
        self, stage: str, some: Sequence[Configuration], own_baseline: bool = True
    ) -> bool:
        """Add jobs for `some`; True where all of them have a result and none is assumed.

        One that is equal to an earlier one becomes its alias, unless that was killed or diverged
        (here it might not be) or, with `own_baseline`, it is its sweep's baseline: the kill rule
        looks for that run by its name.
        """
        for one in some:
            if any(job.name == one.name for job in self.jobs):
                continue
            keeps = own_baseline and one.is_baseline
            original = self._first_with.setdefault(one.identity, one.name)
            found, own = self.state.results.get(original), self.state.results.get(one.name)
            if own is not None:
                _check_same(one, own, keeps, self.state.threads)
            usable = found is None or found["status"] == "finished"
            if original != one.name and usable and own is None and not keeps:
                self.aliases[one.name] = original
                self.aliased.append(_alias(one, original))
            rule = one.run.kill_rule
            judged = rule is not None and rule.action == "stop" and not one.is_baseline
            self.jobs.append(
                Job(
                    stage=stage,
                    kind="train",
                    name=one.name,
                    configuration=one,
                    tokens=one.tokens,
                    flops=one.flops,
                    done=self.result(one) is not None,
                    assumed=not self.decided,
                    alias_of=self.aliases.get(one.name),
                    after=one.place(one.run.baseline_run_name) if judged else None,
                )
            )
        return self.decided and all(self.result(one) is not None for one in some)

    def task(
        self,
        stage: str,
        kind: str,
        one: Configuration,
        *,
        name: str,
        done: bool,
        tokens: int = 0,
        alone: bool = True,
        assumed: bool = False,
        arguments: tuple[str, ...] = (),
    ) -> None:
        """Add a job that is no run of `one`; `tokens` are for the estimate alone."""
        self.jobs.append(
            Job(
                stage=stage,
                kind=kind,
                name=name,
                configuration=one,
                tokens=tokens,
                flops=one.flops * tokens / one.tokens,
                done=done,
                assumed=not done and (assumed or not self.decided),
                alone=alone,
                arguments=arguments,
            )
        )

    def need_tokens(self, stage: str, one: Configuration) -> None:
        """Add the job that makes its tokens where they are not there."""
        done, name = one.run.model.vocab_size in self.state.train_tokens, str(one.run.token_dir)
        if not done and not any(job.name == name for job in self.jobs):
            self.task(stage, "tokens", one, name=name, done=False)

    def assume(self, what: str) -> None:
        """From here on everything rests on a guess."""
        if self.decided:
            self.assumptions.append(what)
        self.decided = False

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
    one: Configuration, result: Metrics, is_baseline: bool, threads: int | None
) -> None:
    """Refuse a finished run of this name that was made with another configuration, or on a CPU
    with another number of threads than the study's other runs, which changes its sums."""
    if result["status"] == "failed":
        if is_baseline:
            raise ValueError(
                f"{one.name}: the baseline diverged ({result.get('reason')}), so nothing can be "
                "compared with it; lower training.learning_rate and use another log_dir"
            )
        return
    training = one.run.training
    expected = {key: getattr(one.allocation.model, key) for key in _MADE_WITH}
    expected |= {key: getattr(training, key) for key in _TRAINED_WITH}
    if result["status"] == "finished":
        expected["steps"] = training.steps
    threads = training.threads or threads
    if result.get("device") == "cpu" and threads is not None:
        expected["threads"] = threads
    for key, value in expected.items():
        if key in result and result[key] != value:
            asks = one.path if key != "threads" else "every run of this study"
            raise ValueError(
                f"{one.name}: found a run with {key} {result[key]}, expected {value} as "
                f"{asks} asks; use another log_dir, or delete that run"
            )


def _alias(one: Configuration, original: str) -> Metrics:
    """The keys of metrics.json by which it differs from the run that stands for it."""
    run = one.run
    return {
        "run": one.name,
        "alias_of": original,
        "experiment": run.experiment,
        "sweep": one.path.name,
        "baseline": one.is_baseline,
        "baseline_name": run.baseline,
        EMBEDDING_RATIO.asked: run.model.embedding_ratio,
        GLU_EXPANSION.asked: run.model.glu_expansion,
    }


def mean_text(values: Sequence[float]) -> str:
    """Mean +- sd for people; a single value has no sd."""
    if not values:
        return "unknown"
    found = repeats.mean_sd(values)
    return f"{found.mean:.4f}" + ("" if found.sd is None else f" +- {found.sd:.4f}")
