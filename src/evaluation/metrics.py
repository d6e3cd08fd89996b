"""Builds a run's config.yaml, the digests that let it resume, and its metrics.json.

The list of keys is src/spec/metric_keys.py; a missing value stays None, never 0.0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from src.data import leakage
from src.data.tasks import held_tasks
from src.data.tokens import TokenData
from src.spec import config as cfg
from src.spec import costs, metric_keys, run_identity
from src.spec.allocation import Allocation, flops_per_token
from src.spec.allocation_table import asked_and_built
from src.spec.config import RunConfig, Sweep
from src.spec.strict_yaml import read_yaml
from src.storage.files import read_json

SCHEMA = 2
_TRAINING_KEYS = (
    "experiment", "baseline", "phase", "seed", "model", "training", "kill_rule",
    "tokenizer_sha256", "data_sha256",
)  # fmt: skip
_EVALUATION_KEYS = ("evaluation", "questions_sha256")
_CONTENT_DIGEST = "content_sha256"  # over everything else in config.yaml
# Of the YAML's `model` section, what the allocator may build otherwise.
_ASKED = {quantity.request: quantity.asked for quantity in metric_keys.REQUESTS}


def resolved(
    run: RunConfig, allocations: Mapping[str, Allocation], sweep: Sweep, data: TokenData
) -> tuple[dict[str, Any], str]:
    """(config.yaml's content, the digest of what decides the training). Asked and built values side
    by side.

    That digest covers final integers, training, kill rule and tokens; not where the sweep file lies
    or which other experiments it names, and not the evaluation, which has a digest of its own.
    """
    allocation = allocations[run.experiment]
    content = {
        "experiment": run.experiment,
        "baseline": run.baseline,
        "phase": run.phase,
        "seed": run.seed,
        "model": cfg.to_dict(allocation.model),
        "training": cfg.to_dict(run.training),
        "kill_rule": cfg.to_dict(run.kill_rule) if run.kill_rule else None,
        "tokenizer_sha256": data.tokenizer_sha256,
        "data_sha256": data.sha256,
        "evaluation": cfg.to_dict(run.evaluation),
        **_questions(run, data.corpus),
        "evaluation_digest": evaluation_digest(run, data.corpus),
        "sweep": {
            "file": sweep.file.name,
            "experiments": list(sweep.names),
            "baseline": sweep.baseline,
            "phase": sweep.phase,
            "seeds": list(sweep.seeds),
            # What each would be, so that a run of another name that is the same stands for it.
            "built": {
                other.experiment: identity(other, allocations[other.experiment])
                for other in sweep.runs
            },
        },
        "asked": {_ASKED.get(key, key): value for key, value in cfg.to_dict(run.model).items()},
        "built": asked_and_built(allocation)[1],
        "params": cfg.to_dict(allocation.params),
        "data_dir": run.data.dir,
        "corpus": corpus_name(data.corpus),
    }
    return {**content, _CONTENT_DIGEST: cfg.json_sha256(content)}, _digest(content, _TRAINING_KEYS)


def evaluation_digest(run: RunConfig, corpus: Mapping[str, Any]) -> str:
    """Hash of what is measured after training."""
    return cfg.digest({"evaluation": cfg.to_dict(run.evaluation), **_questions(run, corpus)})


def _questions(run: RunConfig, corpus: Mapping[str, Any]) -> dict[str, str]:
    """Hash of what SmallBench asks: the task list, the rows, and which of them the training text
    contains; {} where it is not measured."""
    evaluation = run.evaluation
    if "smallbench_accuracy" not in evaluation.metrics:
        return {}
    directory = Path(evaluation.smallbench_dir)
    report = leakage.report_path(evaluation.leakage, directory, corpus)
    content = [
        read_yaml(run.smallbench_tasks, "a task list"),
        {task: facts["sha256"] for task, facts in held_tasks(directory).items()},
        None if report is None else read_json(report)["tasks"],
    ]
    return {"questions_sha256": cfg.json_sha256(content)}


def older_digest(content: Mapping[str, Any]) -> str:
    """What builds before `evaluation_digest` wrote as config_digest: the evaluation was in it."""
    return _digest(content, (*_TRAINING_KEYS, "evaluation"))


def edited(config: Mapping[str, Any]) -> bool:
    """Whether config.yaml is not what its run wrote; a tuned run's says too little to tell."""
    if config.get("phase") not in cfg.PHASES or "config_digest" not in config:
        return False
    content = {k: v for k, v in config.items() if k not in ("config_digest", _CONTENT_DIGEST)}
    if config.get(_CONTENT_DIGEST) not in (None, cfg.json_sha256(content)):
        return True
    if "evaluation_digest" not in config:
        return older_digest(content) != config["config_digest"]
    digests = (config["config_digest"], config["evaluation_digest"])
    return digests != (_digest(content, _TRAINING_KEYS), _digest(content, _EVALUATION_KEYS))


def _digest(content: Mapping[str, Any], keys: Sequence[str]) -> str:
    return cfg.digest({key: content[key] for key in keys if key in content})


def identity(run: RunConfig, allocation: Allocation) -> dict[str, Any]:
    """What a run is, whatever it is called: what was asked, built, and how it is trained."""
    requested, built = asked_and_built(allocation)
    return {
        **requested,
        **built,
        "vocab_size": allocation.model.vocab_size,
        "init_seed": run.training.init_seed,
        "data_seed": run.training.data_seed,
        "model_digest": model_digest(allocation),
        "training_digest": run_identity.training_digest(run.training),
    }


def corpus_name(source: Mapping[str, Any]) -> str:
    """`dataset` or `dataset:configuration`, as recorded by the download in source.json."""
    parts = [source.get("dataset"), source.get("config")]
    return ":".join(str(part) for part in parts if part) or "unknown"


def digests(config_digest: str, data: TokenData) -> dict[str, str]:
    """What a checkpoint must agree with to be resumed."""
    return {"config": config_digest, "tokenizer": data.tokenizer_sha256, "data": data.sha256}


def model_digest(allocation: Allocation) -> str:
    """Equal for configurations that are the same integers (emb35 and glu266x, say)."""
    return cfg.json_sha256(cfg.to_dict(allocation.model))


def facts(
    run: RunConfig,
    allocation: Allocation,
    sweep: Sweep,
    data: TokenData,
    config_digest: str,
    environment: Mapping[str, Any],
) -> dict[str, Any]:
    """The keys of metrics.json that are known before training."""
    model, training = allocation.model, run.training
    windows = (len(data.train.tokens) - 1) // training.seq_len
    training_keys = ("batch_size", "seq_len", "learning_rate", "embedding_lr_ratio")
    return {
        "schema": SCHEMA,
        "run": run.run_name,
        "experiment": run.experiment,
        "sweep": sweep.file.name,
        "baseline": run.experiment == run.baseline,
        "baseline_name": run.baseline,
        "phase": run.phase,
        "seed": run.seed,
        "config_digest": config_digest,
        "evaluation_digest": evaluation_digest(run, data.corpus),
        **identity(run, allocation),
        "tokenizer_sha256": data.tokenizer_sha256,
        "data_sha256": data.sha256,
        "corpus": corpus_name(data.corpus),
        "git_sha": environment.get("git_sha"),
        "git_dirty": environment.get("git_dirty"),
        **{key: v for key, v in cfg.to_dict(model).items() if key in metric_keys.KEYS},
        "attention_width_ratio": model.n_heads * model.head_dim / model.d_model,
        **{f"params_{block}": count for block, count in cfg.to_dict(allocation.params).items()},
        "flops_per_token": flops_per_token(model, training.seq_len),
        "epochs": training.steps * training.batch_size / windows,
        **{key: getattr(training, key) for key in training_keys},
    }


def metrics(
    facts: Mapping[str, Any],
    outcome: Any,
    measured: Mapping[str, Any],
    *,
    eval_seconds: float,
    wall_seconds: float,
) -> dict[str, Any]:
    """metrics.json: `facts`, how training ended, and what was measured (see docs/METRICS.md).

    `outcome` is a `src.train.Outcome`; of a killed run its last dev evaluation stands.
    """
    # Earlier attempts of a resumed run trained too; their start-up is not counted.
    wall = max(wall_seconds, outcome.metrics["train_seconds"] + eval_seconds)
    return metric_keys.complete(
        {
            **facts,
            "status": "killed" if outcome.status == "killed" else "finished",
            "reason": outcome.reason,
            "compute_digest": run_identity.compute_digest(outcome.conditions),
            "program_digest": run_identity.program_digest(outcome.conditions),
            "processors": run_identity.processors(outcome.conditions),
            "tokens": outcome.step * facts["batch_size"] * facts["seq_len"],
            "steps": outcome.step,
            **outcome.metrics,
            **measured,
            "eval_seconds": eval_seconds,
            **computed(outcome.compute, outcome.metrics["device_name"], wall, outcome.processes),
        }
    )


def computed(compute: Any, device_name: str, wall: float, processes: int = 1) -> dict[str, Any]:
    """How a run was computed, and what its `wall` seconds cost.

    `compute` is a `src.compute.compute_config.ComputeConfig`.
    """
    on_gpu = compute.device.type == "cuda"
    hours = wall / 3600 * (processes if on_gpu else 1)  # a GPU each; one CPU for all
    price = costs.price_per_hour(compute.device.type, device_name)
    compute_keys = ("precision", "micro_batch", "loss_chunk", "compile", "threads")
    return {
        "device": compute.device.type,
        "device_name": device_name,
        **{key: getattr(compute, key) for key in compute_keys},
        "wall_seconds": wall,
        "gpu_hours": hours if on_gpu else None,
        "cost_usd": None if price is None else hours * price,
    }


def summary(metrics: Mapping[str, Any]) -> str:
    """One line for people."""
    shown = [
        ("dev perplexity", "dev_perplexity", ".3f"),
        ("bits per byte", "dev_bits_per_byte", ".4f"),
        ("SmallBench", "smallbench_accuracy", ".3f"),
        ("chance", "smallbench_chance", ".3f"),
        ("untrained", "smallbench_untrained_accuracy", ".3f"),
        ("SmallBench items", "smallbench_items", ",d"),
        ("latency L=128 ms", "latency_ms_p50_l128", ".2f"),
        ("tokens/s", "tokens_per_s", ",.0f"),
        ("seconds", "wall_seconds", ",.0f"),
    ]
    parts = [
        f"{label} {metrics[key]:{spec}}"
        for label, key, spec in shown
        if metrics.get(key) is not None
    ]
    return f"{metrics['run']}: {metrics['status']}, " + ", ".join(parts)
