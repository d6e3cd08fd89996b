"""The ledger of a plan: jobs as they are scheduled, equal cells, and what finished runs measured.

Pure functions of the study and its record. The phases (`ranking`, `vocabulary`, `finals`) write
into one ledger in order; the first unfinished stage turns all later choices into guesses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from src.analysis import repeats
from src.spec import config, kill_rule
from src.spec.config import Sweep
from src.spec.metric_keys import EMBEDDING_RATIO, GLU_EXPANSION
from src.storage.documents import Documents
from src.study.phases.cells import (
    Cell,
    Decision,
    Job,
    Metrics,
    Record,
    Source,
    Study,
    allocate,
)

_MADE_WITH = ("vocab_size", "d_model", "n_layers", "n_heads", "head_dim", "d_ff", "embedding_dim",
              "tie_embeddings")  # fmt: skip
_TRAINED_WITH = ("batch_size", "seq_len", "learning_rate", "embedding_lr_ratio")


def _check_same(cell: Cell, result: Metrics, own_baseline: bool, threads: int | None) -> None:
    """Refuse a finished run of this name that was made with another configuration, or on a CPU
    with another number of threads than the study's other runs, which changes its sums."""
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
    threads = cell.run.training.threads or threads
    if result.get("device") == "cpu" and threads is not None:
        expected["threads"] = threads
    for key, value in expected.items():
        if key in result and result[key] != value:
            asks = cell.path if key != "threads" else "every run of this study"
            raise ValueError(
                f"{cell.name}: found a run with {key} {result[key]}, expected {value} as "
                f"{asks} asks; use another log_dir, or delete that run"
            )


class Ledger:
    """What has been scheduled and decided so far, and the questions the phases ask of it."""

    def __init__(self, study: Study, record: Record) -> None:
        self.study, self.record, self.config = study, record, study.config
        self.jobs: list[Job] = []
        self.decisions: list[Decision] = []
        self.sweeps: dict[Path, Mapping[str, Any]] = {}
        self.assumptions: list[str] = []
        self.winner: Metrics | None = None
        self.aliases: dict[str, str] = {}
        self.aliased: list[Metrics] = []
        self.first_with: dict[str, str] = {}  # identity -> run
        self.decided = True  # whether every choice so far rests on finished runs
        self.embedding = self.sweep(study.embedding, "rank")

    # ------------------------------------------------------------------------------- questions

    def sweep(self, source: Source, phase: str) -> Sweep:
        """The sweep of a file or of generated values, with the study's overrides."""
        return config.sweep_from(source.raw, source.path, self.study.overrides, phase)

    def cells(self, sweep: Sweep, names: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
        """The cells `names` of a sweep, seeds within names."""
        answers = allocate(sweep)
        return [
            Cell(sweep.file, sweep.run(name, seed), answers[name])
            for name in names
            for seed in seeds
        ]

    def run_of(self, cell: Cell) -> str:
        """The run directory that holds the cell's numbers: its own, or its equal's."""
        return self.aliases.get(cell.name, cell.name)

    def result(self, cell: Cell) -> Metrics | None:
        """metrics.json of the cell or of its equal; None where it is not there yet."""
        return self.record.results.get(self.run_of(cell))

    def finished(self, cells: Sequence[Cell]) -> list[Cell]:
        """Those that ended neither killed nor diverged."""
        return [c for c in cells if (found := self.result(c)) and found["status"] == "finished"]

    def losses(self, cells: Sequence[Cell], key: str = "dev_loss") -> list[float]:
        """`key` of the finished ones that measured it."""
        found = [(self.result(cell) or {}).get(key) for cell in self.finished(cells)]
        return [float(value) for value in found if value is not None]

    def curve(self, cell: Cell) -> kill_rule.Curve:
        """Dev checks of the cell's run."""
        return self.record.curves.get(self.run_of(cell), ())

    def documents(self, cell: Cell, split: str) -> Documents | None:
        """Per-document losses of the cell's run."""
        return self.record.documents(self.run_of(cell), split)

    def different(self, cells: Sequence[Cell]) -> list[Cell]:
        """One cell for each run: rounding can make two of a sweep the same model."""
        kept: dict[str, Cell] = {}
        for cell in cells:
            kept.setdefault(self.run_of(cell), cell)
        return list(kept.values())

    def generated(self, name: str) -> Path:
        """Where the study writes a sweep file of its own."""
        return Path(self.config.log_dir) / "configs" / name

    # ------------------------------------------------------------------------------- entries

    def schedule(self, stage: str, cells: Sequence[Cell], own_baseline: bool = True) -> bool:
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
                _check_same(cell, own, own_baseline and is_baseline, self.record.threads)
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
                    tokens=cell.tokens,
                    flops=cell.flops,
                    n_layers=cell.answer.model.n_layers,
                    vocab_size=cell.run.model.vocab_size,
                    done=self.result(cell) is not None,
                    assumed=not self.decided,
                    alias_of=self.aliases.get(cell.name),
                    after=None
                    if is_baseline
                    or cell.run.kill_rule is None
                    or cell.run.kill_rule.action == "record"  # replayed over whole curves
                    else cell.run.baseline_run_name,
                )
            )
        return self.decided and all(self.result(cell) is not None for cell in cells)

    def task(
        self,
        stage: str,
        kind: str,
        cell: Cell,
        *,
        name: str,
        done: bool,
        tokens: int = 0,
        arguments: tuple[str, ...] = (),
    ) -> None:
        """Add a job that trains no cell; `tokens` are for the estimate alone."""
        self.jobs.append(
            Job(
                stage=stage,
                kind=kind,
                name=name,
                path=cell.path,
                experiment=cell.run.experiment,
                phase=cell.run.phase,
                seed=0,
                tokens=tokens,
                flops=cell.flops * tokens / cell.tokens,
                n_layers=cell.answer.model.n_layers,
                vocab_size=cell.run.model.vocab_size,
                done=done,
                assumed=not (self.decided or done),
                arguments=arguments,
            )
        )

    def need_tokens(self, stage: str, cell: Cell) -> None:
        """Add the job that makes the cell's tokens where they are not there."""
        done, name = cell.run.model.vocab_size in self.record.train_tokens, str(cell.run.token_dir)
        if not done and not any(job.name == name for job in self.jobs):
            self.task(stage, "tokens", cell, name=name, done=False)

    def assume(self, what: str) -> None:
        """From here on everything rests on a guess."""
        self.decided = False
        self.assumptions.append(what)

    def decide(
        self, phase: str, rule: str, numbers: Sequence[str], verdict: str, reason: str
    ) -> None:
        """Record a decision with its numbers and its reason."""
        self.decisions.append(
            {
                "phase": phase,
                "rule": rule,
                "numbers": "; ".join(numbers),
                "verdict": verdict,
                "reason": reason,
            }
        )


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
        EMBEDDING_RATIO.asked: run.model.embedding_ratio,
        GLU_EXPANSION.asked: run.model.glu_expansion,
    }


def mean_text(values: Sequence[float]) -> str:
    """Mean +- sd for people; a single value has no sd."""
    if not values:
        return "unknown"
    found = repeats.mean_sd(values)
    return f"{found.mean:.4f}" + ("" if found.sd is None else f" +- {found.sd:.4f}")
