"""Plausible run directories without training, for tests of whatever reads logs/."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from src.spec.config import digest
from src.spec.metric_keys import complete

CHECKS = 20
OUTSIDE = ("bits_per_byte", "word_perplexity", "tokens_scored")  # of text of another kind


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One experiment of a sweep; `gain` is its final loss against the baseline's, in nats."""

    name: str
    share: float = 0.35
    glu: float = 8 / 3
    gain: float = 0.0
    depth: int = 11
    vocab_size: int = 16_000
    tied: bool = True


SHARE_SWEEP = (
    Experiment(name="emb35"),
    Experiment(name="emb25", share=0.25, gain=-0.06, depth=26),
    Experiment(name="emb45", share=0.45, gain=0.05, depth=6),
)
GLU_SWEEP = (
    Experiment(name="glu2x", glu=2.0, gain=-0.004, depth=14),
    Experiment(name="glu266x", glu=2.66, gain=-0.01, depth=11),
    Experiment(name="glu3x", glu=3.0, gain=0.004, depth=10),
    Experiment(name="glu4x", glu=4.0, gain=0.0, depth=8),
)


def write_sweep(
    log_dir: Path,
    file: str,
    experiments: Sequence[Experiment],
    *,
    baseline: str | None = None,
    phase: str = "full",
    seeds: Sequence[int] = (0,),
    tokens: int = 50_000_000,
    killed: Mapping[str, float] | None = None,
    names: Sequence[str] | None = None,
    planned_seeds: Sequence[int] | None = None,
    **overrides: Any,
) -> None:
    """Write a run directory for each experiment and seed; `killed`: by name, the fraction it ran.

    `names` are the experiments the sweep file lists, where more than these were begun,
    and `planned_seeds` its seeds, where config.yaml is to list them.
    `overrides` replace keys of every metrics.json.
    """
    plan: dict[str, Any] = {
        "file": file, "experiments": list(names or [exp.name for exp in experiments]),
        "baseline": baseline or experiments[0].name, "phase": phase,
    }  # fmt: skip
    if planned_seeds is not None:
        plan["seeds"] = list(planned_seeds)
    for exp in experiments:
        ran = (killed or {}).get(exp.name, 1.0)
        for seed in seeds:
            run = exp.name + ("-rank" if phase == "rank" else "") + (f"-seed{seed}" * (seed > 0))
            same = {"sweep": plan, "phase": phase, "seed": seed, "tokens": tokens, "ran": ran}
            write_run(log_dir / run, exp, **same, **overrides)


def write_run(
    path: Path,
    exp: Experiment,
    *,
    sweep: Mapping[str, Any],
    phase: str = "full",
    seed: int = 0,
    tokens: int = 50_000_000,
    ran: float = 1.0,
    metrics_json: bool = True,
    failure: Mapping[str, str] | None = None,
    **overrides: Any,
) -> None:
    """Write config.yaml, metrics.jsonl and, unless told otherwise, metrics.json of one run.

    ran: the fraction of the budget after which the kill rule stopped it; 1 is a finished run.
    """
    path.mkdir(parents=True)
    request = {"embedding_ratio_asked": exp.share, "glu_expansion_asked": exp.glu}
    built = {"embedding_ratio_built": exp.share, "glu_expansion_built": exp.glu}
    config: dict[str, Any] = {
        "experiment": exp.name, "baseline": sweep["baseline"], "seed": seed, "phase": phase,
        "asked": {"total_params_asked": 10_000_000, "vocab_size": exp.vocab_size, **request},
        "built": {"total_params_built": 10_012_345, **built},
        "model": {"vocab_size": exp.vocab_size, "tie_embeddings": exp.tied},
        "training": {"tokens": tokens, "batch_size": 256, "seq_len": 128, "learning_rate": 4e-3},
        "sweep": dict(sweep),
    }  # fmt: skip
    decisive = ("experiment", "baseline", "seed", "phase", "model", "training")
    config["config_digest"] = digest({key: config[key] for key in decisive})
    (path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    curve = loss_curve(exp, seed, tokens)
    curve = curve[: max(1, round(ran * CHECKS))]
    rows = [
        {"step": t // 32_768, "tokens": t, "kind": "dev", "dev_loss": loss,
         "dev_perplexity": math.exp(loss)}
        for t, loss in curve
    ]  # fmt: skip
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if failure is not None:
        (path / "failure.json").write_text(json.dumps(failure))
    if metrics_json and failure is None:
        metrics = _metrics(path.name, exp, sweep, phase, seed, curve[-1], ran < 1.0)
        metrics |= {"config_digest": config["config_digest"], **overrides}
        (path / "metrics.json").write_text(json.dumps(metrics))


def loss_curve(exp: Experiment, seed: int, tokens: int) -> list[tuple[int, float]]:
    """(tokens, dev loss) of CHECKS checks: a power law, the experiment's gain, and seed noise."""
    rng = np.random.default_rng([*exp.name.encode(), seed])  # no str hash: it is salted
    noise = rng.normal(0.0, 0.004)
    points = [round(tokens * (i + 1) / CHECKS) for i in range(CHECKS)]
    floor = 4.9 - 0.16 * math.log(tokens / 1e6)
    return [
        (t, floor + 1.6 * (1 - t / tokens) ** 2 + exp.gain + noise + rng.normal(0, 0.003))
        for t in points
    ]


def _metrics(
    run: str,
    exp: Experiment,
    sweep: Mapping[str, Any],
    phase: str,
    seed: int,
    last: tuple[int, float],
    killed: bool,
) -> dict[str, Any]:
    tokens, loss = last
    d_model = round(exp.share * 10_000_000 / exp.vocab_size / (1 if exp.tied else 2) / 8) * 8
    d_ff = round(d_model * exp.glu / 8) * 8
    table = exp.vocab_size * d_model * (1 if exp.tied else 2)
    bytes_per_token = 4.1 if exp.vocab_size >= 16_000 else 3.74
    latency = 0.9 + 0.28 * exp.depth

    def evaluated(split: str, nats: float) -> dict[str, Any]:
        return {
            f"{split}_loss": nats,
            f"{split}_perplexity": math.exp(nats),
            f"{split}_bits_per_byte": nats / math.log(2) / bytes_per_token,
            f"{split}_word_perplexity": math.exp(nats * 1.3),
            f"{split}_perplexity_nonoverlapping": math.exp(nats + 0.04),
            f"{split}_tokens_scored": 250_000,
        }

    seconds = 900.0 * tokens / 5e7
    blimp = {"accuracy": 0.61 - 0.2 * exp.gain, "accuracy_se": 0.006, "n": 6700}
    common = {
        "schema": 2, "run": run, "experiment": exp.name, "sweep": sweep["file"], "phase": phase,
        "baseline": exp.name == sweep["baseline"], "baseline_name": sweep["baseline"],
        "seed": seed, "init_seed": seed, "data_seed": seed, "model_digest": f"{table + d_ff:064x}",
        "tokenizer_sha256": f"{exp.vocab_size:064x}", "data_sha256": "d" * 64,
        "corpus": "wikitext-2-v1", "git_sha": "1234567", "git_dirty": False, "device": "cuda",
        "device_name": "NVIDIA A100-SXM4-40GB", "precision": "bf16", "threads": 8,
        "micro_batch": 256, "loss_chunk": 8_192, "compile": True,
        "total_params_asked": 10_000_000, "total_params_built": 10_012_345,
        "embedding_ratio_asked": exp.share, "embedding_ratio_built": table / 10_012_345,
        "glu_expansion_asked": exp.glu, "glu_expansion_built": d_ff / d_model,
        "vocab_size": exp.vocab_size, "d_model": d_model, "n_layers": exp.depth, "n_heads": 4,
        "head_dim": 32, "d_ff": d_ff, "tie_embeddings": exp.tied, "qk_norm": True,
        "attention_width_ratio": 128 / d_model, "params_embedding": table, "params_projection": 0,
        "params_attention": 2_000_000, "params_norm": 9_000,
        "params_ffn": 10_012_345 - table - 2_000_000 - 9_000,
        "flops_per_token":
            2 * (10_012_345 - table) + 2 * exp.vocab_size * d_model + exp.depth * 9e4,
        "tokens": tokens, "steps": tokens // 32_768, "epochs": tokens / 2_800_000,
        "batch_size": 256, "seq_len": 128, "learning_rate": 0.004, "embedding_lr_ratio": 1.0,
        "train_loss": loss - 0.1, "loss_largest_rise_nats": 0.08, "loss_largest_rise_step": 40,
        "grad_norm_largest_rise": 0.5, "grad_norm_largest_rise_step": 41, **evaluated("dev", loss),
        "smallbench": {}, "smallbench_contaminated_items": 3,
        "latency_ms_p50_l128": latency, "latency_ms_p95_l128": latency * 1.1,
        "latency_ms_p50_l512": latency * 1.5, "latency_ms_p95_l512": latency * 1.7,
        "decode_ms_per_token_p50": latency * 0.8, "decode_ms_per_token_p95": latency * 0.9,
        "weights_mib": 19.1, "kv_cache_mib": exp.depth * 0.06, "activations_mib": 8 + d_model / 32,
        "peak_memory_mib": 36.0 + d_model / 32 + exp.depth * 0.06,
        "process_peak_memory_mib": 4_300.0, "train_peak_memory_mib": 4_100.0,
        "train_seconds": seconds, "eval_seconds": 60.0, "wall_seconds": 60.0 + seconds,
        "tokens_per_s": 55_000.0, "gpu_utilisation_percent": 71.0,
        "gpu_hours": (60.0 + seconds) / 3600, "cost_usd": (60.0 + seconds) / 3600 * 1.29,
    }  # fmt: skip
    stopped = {
        "status": "killed", "reason": "dev perplexity was 2.1 above the baseline.",
        "kill_verdict": "kill", "kill_verdict_literal": "kill", "kill_action": "stop",
        "kill_tokens": tokens, "kill_checks_without_baseline": 0,
    }  # fmt: skip
    finished = {
        "status": "finished", **evaluated("test", loss + 0.02), "outside_corpus": "tests/elsewhere",
        **{f"outside_{key}": value for split in ("dev", "test")
           for key, value in evaluated(split, loss).items() if key.endswith(OUTSIDE)},
        "smallbench": {
            "blimp": blimp, "arc_easy": {"accuracy": 0.29, "accuracy_se": 0.02, "n": 500},
        },
        "smallbench_accuracy": 0.52 - 0.1 * exp.gain, "smallbench_accuracy_se": 0.011,
        "smallbench_tasks": 2, "smallbench_missing_tasks": "lambada rte", "smallbench_items": 7200,
        "smallbench_chance": 0.375, "smallbench_untrained_accuracy": 0.381,
    }  # fmt: skip
    return complete(common | (stopped if killed else finished))
