"""When two runs are the same: what was built, how it was trained, on which data. Pure.

Names do not count: `emb35` and `glu266x` may be one model. Rows have the keys of
src/spec/metric_keys.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from src.spec import config
from src.spec.config import TrainingConfig

Identity = tuple[Any, ...]

# Of the training section: seeds (they tell runs apart, not configurations), what only watches, and
# what `compute_digest` holds. Everything else, keys of tomorrow too, decides what is learned.
_NOT_LEARNED_FROM = frozenset(
    """
    init_seed data_seed ranking_tokens eval_every_tokens dev_tokens checkpoint_minutes
    checkpoint_every_steps precision micro_batch loss_chunk compile threads deterministic
    """.split()
)
# Of those conditions, what says which processor computed: it moves rounding and nothing else.
_PROCESSOR = frozenset({"device_name", "cpu_capability", "amx"})
# Where a run of an older build has no training_digest: what it says of its training.
_TRAINED = ("batch_size", "seq_len", "learning_rate", "embedding_lr_ratio", "tokens")
DATA = ("corpus", "tokenizer_sha256", "data_sha256")
_SEEDS = ("init_seed", "data_seed")


def training_digest(training: TrainingConfig) -> str:
    """Hash of what decides what is learned; a ranking run's and a full run's differ in tokens."""
    kept = {k: v for k, v in config.to_dict(training).items() if k not in _NOT_LEARNED_FROM}
    return config.json_sha256(kept)


def compute_digest(conditions: Iterable[Mapping[str, Any]]) -> str:
    """Hash of what bits depend on (`src.compute.conditions`); of a run resumed under others all of
    them, in their order, joined by `+`, so that it equals neither."""
    return "+".join(config.json_sha256(condition) for condition in conditions)


def program_digest(conditions: Iterable[Mapping[str, Any]]) -> str:
    """The same without the processor: equal where the same program computed, on whatever CPU or
    GPU, so that runs are comparable though rounding differs."""
    texts = {
        json.dumps({k: v for k, v in condition.items() if k not in _PROCESSOR}, sort_keys=True)
        for condition in conditions
    }
    return hashlib.sha256("\n".join(sorted(texts)).encode()).hexdigest()


def processors(conditions: Iterable[Mapping[str, Any]]) -> str:
    """Each device and instruction set of those conditions once, joined by `; `."""
    parts = (
        (one.get("device_name"), one.get("cpu_capability"), *(one.get("amx") or ()))
        for one in conditions
    )
    return "; ".join(dict.fromkeys(" ".join(map(str, filter(None, names))) for names in parts))


def computed_as(row: Mapping[str, Any]) -> str | None:
    """Equal for runs whose comparison is about their configurations: the program, on whichever
    processor; of an older run its exact conditions, None where it does not say."""
    return row.get("program_digest") or row.get("compute_digest")


def configuration(row: Mapping[str, Any]) -> Identity:
    """Equal for runs that differ by seed alone. `phase` counts: it decides what is measured."""
    trained = row.get("training_digest") or tuple(row.get(key) for key in _TRAINED)
    return (row.get("model_digest"), trained, *(row.get(k) for k in (*DATA, "phase")))


def same_run(row: Mapping[str, Any]) -> Identity | None:
    """Equal for runs that compute the same thing; None where a row does not say what it is."""
    seeds = [row.get("seed") if row.get(key) is None else row[key] for key in _SEEDS]
    known = row.get("model_digest") is not None and None not in seeds
    return (*configuration(row), *seeds) if known else None


def same_copy(row: Mapping[str, Any]) -> Identity | None:
    """Equal for one run found in two directories: the same configuration file, seed and name."""
    identity = tuple(row.get(k) for k in ("config_digest", "experiment", "phase", "seed"))
    return None if None in identity else (*identity, row.get("evaluation_digest"))
