"""The study file: phases 0 to 2 for one corpus, budget and device. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from src.spec.strict_yaml import build, key, one_of, read_yaml


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyConfig:
    """Phases 0 to 2 for one corpus, budget and device; read by `src.study.runner`. Paths are
    relative to the working directory, as in the sweeps."""

    embedding: str = key("configs/embed_ratio.yaml", "the sweep of embedding shares")
    glu: str = key("configs/glu_expansion.yaml", "the sweep of GLU expansions")
    vocabulary: str | None = key(None, "the vocabularies and heads of phase 1b, or null to skip")
    corpus: str | None = key(None, "the corpus that missing tokens are made from, or null")
    log_dir: str = key("logs", "a directory")
    device: str = key("auto", "auto, cpu, cuda or cuda:N")
    overrides: tuple[str, ...] = key((), "a list of section.key=value, as for --set")
    noise_seeds: int = key(5, "seeds of at least 2", lambda v: v >= 2)
    # Every share at each of these on the ranking budget; the sweep's own rate is among them.
    learning_rates: tuple[float, ...] = key(
        (), "a list of different rates above 0, at most 1",
        lambda v: all(0 < rate <= 1 for rate in v) and len(set(v)) == len(v),
    )  # fmt: skip
    # own: later stages train each share, and what is made from it, at its own best rate.
    rate: str = one_of("shared", "shared", "own")
    final_seeds: int = key(3, "seeds of at least 1", lambda v: v >= 1)
    finalists: int = key(2, "a number of configurations of at least 1", lambda v: v >= 1)
    # all: every ranking cell at the full budget too, one seed, for the rank agreement.
    full: str = one_of("finalists", "finalists", "all")
    vocabulary_seeds: int = key(1, "seeds of at least 1", lambda v: v >= 1)
    # auto: one run on all cores against one a core, measured; a run a GPU.
    jobs: int | str = key(
        1,
        "auto, or runs at a time, from 1 to 64",
        lambda v: v == "auto" or isinstance(v, int) and 1 <= v <= 64,
    )
    budget_usd: float = key(50.0, "dollars above 0", lambda v: v > 0)
    runbook_budget_usd: float = key(150.0, "dollars above 0", lambda v: v > 0)
    # None: from earlier runs of log_dir, else from a short probe on the device.
    tokens_per_s: float | None = key(None, "tokens a second above 0, or null", lambda v: v > 0)


def load_study(path: Path) -> StudyConfig:
    """Read a study file; raises ValueError (one sentence) for what a user can get wrong."""
    return build(StudyConfig, f"{path}: ", read_yaml(path, "a study file"))
