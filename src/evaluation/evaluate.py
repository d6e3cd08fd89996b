"""Everything measured on a trained model, as keys of metrics.json: perplexity, SmallBench,
latency and memory. One place calls the measurements; each lives in its own module."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from src.compute.compute_config import ComputeConfig
from src.data import leakage
from src.data.corpus import read_source
from src.data.tasks import load_tasks
from src.data.tokenizer import load_tokenizer
from src.data.tokens import Split, TokenData, outside_split
from src.evaluation import latency, perplexity, smallbench
from src.evaluation.metrics import corpus_name
from src.models.transformer import Transformer
from src.spec.config import RunConfig, json_sha256
from src.spec.metric_keys import KEYS
from src.storage.files import write_atomic, write_json


def evaluate(
    run: RunConfig, model: Transformer, data: TokenData, compute: ComputeConfig, run_path: Path
) -> dict[str, Any]:
    """Measure `model`; writes per-document losses and SmallBench items into `run_path`.

    Returns flat keys with units. Raises ValueError for unusable data or scores that are not
    numbers.
    """
    model.eval()
    config = run.evaluation
    metrics: dict[str, Any] = {}
    if "perplexity" in config.metrics:
        names = ("validation", "test") if config.test else ("validation",)
        for name in names:
            metrics |= _split(run, model, getattr(data, name), name, compute, run_path)
        if config.outside_dir:
            corpus = Path(config.outside_dir)
            metrics["outside_corpus"] = corpus_name(read_source(corpus, []))
            for name in names:
                split = outside_split(corpus, name, data.tokenizer_path, data.eot_id)
                metrics |= _split(run, model, split, f"outside_{name}", compute, run_path)
    if "smallbench_accuracy" in config.metrics:
        metrics |= _smallbench(run, model, data, compute, run_path)
    if config.latency:
        metrics |= latency.measure(
            model, device=compute.device, autocast_dtype=compute.dtype,
            warmup=config.latency_warmup, repeats=config.latency_repeats,
            compiled=compute.compile, label=f"{run.run_name}: latency",
        )  # fmt: skip
    return metrics


def _split(
    run: RunConfig,
    model: Transformer,
    split: Split,
    name: str,
    compute: ComputeConfig,
    run_path: Path,
) -> dict[str, Any]:
    result = perplexity.evaluate_split(
        model, split.tokens, split.documents,
        context=run.training.seq_len, autocast_dtype=compute.dtype, device=compute.device,
        limit_tokens=run.evaluation.perplexity_tokens, label=f"{run.run_name}: {name} perplexity",
    )  # fmt: skip
    arrays: dict[str, Any] = {k: v for k, v in result.items() if isinstance(v, np.ndarray)}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_atomic(run_path / f"documents_{name}.npz", buffer.getbuffer())
    prefix = name.replace("validation", "dev")
    metrics = {f"{prefix}_{key}": value for key, value in result.items()}
    # Of another corpus the list has what can be compared across corpora and tokenizers.
    return {key: value for key, value in metrics.items() if key in KEYS}


def _smallbench(
    run: RunConfig, model: Transformer, data: TokenData, compute: ComputeConfig, run_path: Path
) -> dict[str, Any]:
    config = run.evaluation
    directory = Path(config.smallbench_dir)
    tokenizer = load_tokenizer(data.tokenizer_path)
    tasks = load_tasks(run.smallbench_tasks)
    options: dict[str, Any] = {
        "context": run.training.seq_len,
        "device": compute.device,
        "autocast_dtype": None,  # bf16 makes ties; lm-evaluation-harness scores in float32 too
        "exclude": leakage.contaminated_rows(config.leakage, directory, data.corpus),
    }
    limit, label = config.smallbench_limit, f"{run.run_name}: SmallBench"
    result = smallbench.evaluate(
        model, tokenizer, tasks, directory,
        limit=limit, items_path=run_path / "smallbench_items.jsonl", label=label, **options,
    )  # fmt: skip
    metrics = {
        **{f"smallbench_{key}": result[key] for key in ("accuracy", "accuracy_se", "chance")},
        "smallbench_items": result["items"],
        "smallbench_tasks": sum(row["n"] > 0 for row in result["tasks"].values()),
        "smallbench_missing_tasks": " ".join(result["missing_tasks"]) or None,
        "smallbench_contaminated_tasks": " ".join(result["contaminated_tasks"]) or None,
        "smallbench_limit": limit,
        "smallbench_contaminated_items": result["contaminated_items"],
        "smallbench": result["tasks"],
    }
    if config.smallbench_untrained:
        cache_key = {
            "model": dataclasses.asdict(model.config),
            "tokenizer": data.tokenizer_sha256,
            "context": run.training.seq_len,
            "questions": [row.get("items_sha256") for row in result["tasks"].values()],
        }
        metrics["smallbench_untrained_accuracy"] = _cached_untrained_accuracy(
            run_path,
            cache_key,
            lambda: smallbench.evaluate_untrained(
                model.config, tokenizer, tasks, directory,
                limit=limit, label=f"{label}, untrained", **options,
            )["accuracy"],
        )  # fmt: skip
    if config.blimp_full:
        paradigms = [dataclasses.replace(task, group=None) for task in tasks if task.is_blimp]
        blimp = smallbench.evaluate(
            model, tokenizer, paradigms, directory,
            full=True, label=f"{run.run_name}: BLiMP", **options,
        )  # fmt: skip
        metrics |= {f"blimp_{key}": blimp[key] for key in ("accuracy", "accuracy_se", "items")}
    return metrics


def _cached_untrained_accuracy(
    run_path: Path, cache_key: dict[str, Any], measure: Callable[[], float | None]
) -> float | None:
    """The untrained model of seed 0 is the same for all seeds and phases of a configuration: it is
    scored once in a log directory."""
    path = run_path.parent / "untrained" / f"{json_sha256(cache_key)[:16]}.json"
    if path.is_file():
        return json.loads(path.read_bytes())["accuracy"]
    accuracy = measure()
    path.parent.mkdir(exist_ok=True)
    write_json(path, {**cache_key, "accuracy": accuracy})
    return accuracy
