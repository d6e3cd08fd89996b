"""Run directories -> one table: a row a run, finished or not, and the CSV of it.

The columns are the keys of `metrics.json`, documented in docs/METRICS.md (a test holds the two
together), plus `path` and one `smallbench_<task>_<number>` column for each number of each task.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

Row = dict[str, Any]
Curve = list[tuple[int, float]]

COLUMNS: tuple[str, ...] = tuple(
    """
    run path status reason experiment sweep baseline baseline_name phase seed init_seed data_seed
    asked_total_params total_params asked_embedding_ratio embedding_ratio
    asked_glu_expansion glu_expansion
    vocab_size d_model n_layers n_heads head_dim d_ff embedding_dim tie_embeddings qk_norm
    attention_width_ratio
    params_embedding params_projection params_attention params_ffn params_norm flops_per_token
    tokens steps epochs batch_size seq_len learning_rate embedding_lr_ratio
    kill_verdict kill_verdict_literal
    train_loss loss_largest_rise_nats loss_largest_rise_step
    grad_norm_largest_rise grad_norm_largest_rise_step
    dev_loss dev_perplexity dev_bits_per_byte dev_word_perplexity
    dev_perplexity_nonoverlapping dev_tokens_scored
    test_loss test_perplexity test_bits_per_byte test_word_perplexity
    test_perplexity_nonoverlapping test_tokens_scored
    outside_corpus outside_dev_bits_per_byte outside_dev_word_perplexity outside_dev_tokens_scored
    outside_test_bits_per_byte outside_test_word_perplexity outside_test_tokens_scored
    smallbench_accuracy smallbench_accuracy_se smallbench_tasks smallbench_missing_tasks
    smallbench_limit smallbench_contaminated_items
    latency_ms_p50_l128 latency_ms_p95_l128 latency_ms_p50_low_l128 latency_ms_p50_high_l128
    latency_ms_p50_l512 latency_ms_p95_l512 latency_ms_p50_low_l512 latency_ms_p50_high_l512
    latency_full_logits_ms_p50_l128 latency_full_logits_ms_p95_l128
    latency_full_logits_ms_p50_low_l128 latency_full_logits_ms_p50_high_l128
    latency_full_logits_ms_p50_l512 latency_full_logits_ms_p95_l512
    latency_full_logits_ms_p50_low_l512 latency_full_logits_ms_p50_high_l512
    decode_ms_per_token_p50 decode_ms_per_token_p95
    decode_ms_per_token_p50_low decode_ms_per_token_p50_high
    weights_mib kv_cache_mib activations_mib activations_full_logits_mib peak_memory_mib
    process_peak_memory_mib
    train_seconds eval_seconds wall_seconds tokens_per_s gpu_utilisation_percent
    train_peak_memory_mib gpu_hours cost_usd
    corpus tokenizer_sha256 data_sha256 config_digest model_digest git_sha git_dirty
    device device_name precision micro_batch loss_chunk compile threads schema
    """.split()
)

STATUSES = ("finished", "killed", "failed", "unfinished", "missing")

_TEXT = frozenset(
    """
    run path status reason experiment sweep baseline_name phase corpus outside_corpus
    tokenizer_sha256
    data_sha256 config_digest model_digest git_sha device device_name precision
    kill_verdict kill_verdict_literal smallbench_missing_tasks
    """.split()
)
_MARKS = ("config.yaml", "metrics.json", "metrics.jsonl", "failure.json", "checkpoints")
_TAIL_BYTES = 65_536


def find_runs(log_dir: Path) -> list[Path]:
    """Every run directory at or below log_dir, in name order; nothing inside a run is searched."""
    found = []
    for folder, names, files in os.walk(log_dir):
        if any(mark in files or mark in names for mark in _MARKS):
            found.append(Path(folder))
            names.clear()
        names.sort()
    return found


def read_rows(log_dir: Path) -> list[Row]:
    """One row for every run directory, every alias of study.json, and every run of their sweeps
    that has neither."""
    rows: list[Row] = []
    sweeps: dict[_Plan, dict[str, Any]] = {}
    for path in find_runs(log_dir):
        config = read_config(path)
        sweep = config.get("sweep")
        if isinstance(sweep, dict) and isinstance(sweep.get("file"), str):
            plan = (sweep["file"], _phase(sweep, config))
            if _size(sweep) > _size(sweeps.setdefault(plan, sweep)):
                sweeps[plan] = sweep
        rows.append(_read_run(path, path.relative_to(log_dir).as_posix(), config))
    file = log_dir / "study.json"
    study = (read_json(file) or {}) if file.exists() else {}
    rows += _aliases(study, rows)
    return rows + [row for row in _missing(rows, sweeps) if _is_planned(row, study)]


def _is_planned(row: Row, study: Mapping[str, Any]) -> bool:
    """Whether a missing run is one that somebody means to begin: of its sweeps, a study trains at
    the full budget what it promoted."""
    if row["sweep"] not in study.get("sweeps", []):
        return True
    return any(
        run["run"] == row["run"] and run["state"] != "assumed" for run in study.get("runs", [])
    )


# What a run cost stands in its own row alone.
_COSTS = ("path", "train_seconds", "eval_seconds", "wall_seconds", "gpu_hours", "cost_usd")


def _aliases(study: Mapping[str, Any], rows: Iterable[Row]) -> Iterator[Row]:
    """Cells that a study did not train because an equal one was: that one's numbers, free."""
    listed = study.get("aliases", [])
    done = {row["run"]: row for row in rows if row["status"] in ("finished", "killed")}
    for alias in listed:
        original = done.get(alias["alias_of"])
        if original is not None and alias["run"] not in done:
            own = {key: value for key, value in alias.items() if key != "alias_of"}
            kept = {key: value for key, value in original.items() if key not in _COSTS}
            yield {**kept, **own, "reason": f"the same model and training as {alias['alias_of']}"}


def _read_run(path: Path, name: str, config: Mapping[str, Any]) -> Row:
    row = _from_config(config)
    row |= {"run": path.name if name == "." else name, "path": str(path)}
    metrics_file, failure_file = path / "metrics.json", path / "failure.json"
    if metrics_file.exists():
        metrics = read_json(metrics_file)
        if metrics is None:
            return row | {"status": "failed", "reason": "metrics.json is not a JSON object"}
        row |= {key: value for key, value in _flatten(metrics).items() if value is not None}
        if row.get("status") not in ("finished", "killed"):
            row |= {"status": "failed", "reason": f"metrics.json says status {row.get('status')!r}"}
        return row | {"run": path.name if name == "." else name, "path": str(path)}
    row |= _progress(path / "metrics.jsonl")
    if failure_file.exists():
        failure = read_json(failure_file) or {}
        told = [failure[key] for key in ("kind", "reason", "message") if failure.get(key)]
        reason = ": ".join(str(part) for part in told) or "failure.json gives no reason"
        return row | {"status": "failed", "reason": reason}
    where = (
        f"step {row['steps']:,}" if isinstance(row.get("steps"), int) else "before its first row"
    )
    return row | {"status": "unfinished", "reason": f"stopped at {where}, no metrics.json yet"}


def _from_config(config: Mapping[str, Any]) -> Row:
    """What a run that never wrote metrics.json is known to be: who it is and what was asked."""
    asked, model, training, realised, params = (
        part if isinstance(part := config.get(name), dict) else {}
        for name in ("asked", "model", "training", "realised", "params")
    )
    sweep = config.get("sweep") if isinstance(config.get("sweep"), dict) else {}
    experiment, baseline = config.get("experiment"), config.get("baseline")
    known = {
        "experiment": experiment,
        "sweep": (sweep or {}).get("file"),
        "baseline": None if experiment is None or baseline is None else experiment == baseline,
        "baseline_name": baseline,
        "phase": config.get("phase"),
        "seed": config.get("seed"),
        "config_digest": config.get("config_digest"),
        "corpus": config.get("corpus"),
        "tokenizer_sha256": config.get("tokenizer_sha256"),
        "data_sha256": config.get("data_sha256"),
    }
    known |= {f"asked_{key}": asked.get(key) for key in realised} | realised
    known |= {key: value for key, value in model.items() if key in COLUMNS}
    known |= {f"params_{block}": count for block, count in params.items()}
    known |= {key: training.get(key) for key in ("batch_size", "seq_len", "learning_rate")}
    return {key: value for key, value in known.items() if value is not None}


def _progress(path: Path) -> Row:
    """Steps and tokens of the last whole row of metrics.jsonl; a torn last line is skipped."""
    if not path.exists():
        return {}
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        lines = file.read().split(b"\n")
    for line in reversed(lines):
        row = _parse(line)
        if row and "step" in row and "tokens" in row:
            return {"steps": row["step"], "tokens": row["tokens"]}
    return {}


def read_curve(path: Path) -> Curve:
    """(tokens, dev perplexity) of each dev check in a run's metrics.jsonl, oldest first."""
    file = path / "metrics.jsonl"
    if not file.exists():
        return []
    curve: dict[int, float] = {}
    for line in file.read_bytes().split(b"\n"):
        if b'"dev"' not in line:  # train rows are many: not worth parsing
            continue
        row = _parse(line)
        if row and row.get("kind") == "dev" and isinstance(row.get("dev_perplexity"), (int, float)):
            curve[int(row["tokens"])] = float(row["dev_perplexity"])
    return sorted(curve.items())


# A sweep's file and the phase whose runs it lists; None where config.yaml lists no seeds.
_Plan = tuple[str, str | None]


def _phase(sweep: Mapping[str, Any], config: Mapping[str, Any]) -> str | None:
    """The phase that `sweep` plans; None for a run outside it, or one that lists no seeds."""
    phase = sweep.get("phase")
    planned = isinstance(phase, str) and phase == config.get("phase") and _seeds(sweep)
    return phase if planned else None


def _missing(rows: Iterable[Row], sweeps: Mapping[_Plan, Mapping[str, Any]]) -> Iterator[Row]:
    """Runs that a sweep lists, in a phase that was begun, and that were not begun themselves.

    A sweep that lists no seeds lacks an experiment only where no run of it was begun.
    """
    known = list(rows)
    begun = {tuple(row.get(k) for k in ("sweep", "phase", "experiment", "seed")) for row in known}
    named = {(row.get("sweep"), row.get("experiment")) for row in known}
    planned = {file for file, phase in sweeps if phase is not None}
    for (file, phase), sweep in sorted(sweeps.items(), key=lambda item: str(item[0])):
        for name in _names(sweep):
            if phase is None:
                if file not in planned and (file, name) not in named:
                    yield _missing_row(file, sweep, name) | {"run": name}
                continue
            for seed in _seeds(sweep):
                if (file, phase, name, seed) not in begun:
                    own = {"run": _run_name(name, phase, seed), "phase": phase, "seed": seed}
                    yield _missing_row(file, sweep, name) | own


def _missing_row(file: str, sweep: Mapping[str, Any], name: str) -> Row:
    return {
        "status": "missing",
        "reason": f"named in {file}, but no run of it was begun",
        "experiment": name,
        "sweep": file,
        "baseline": name == sweep.get("baseline"),
        "baseline_name": sweep.get("baseline"),
    }


def _run_name(experiment: str, phase: str, seed: int) -> str:
    """As run_experiment.py names run directories."""
    return experiment + ("-rank" if phase == "rank" else "") + (f"-seed{seed}" if seed else "")


def _names(sweep: Mapping[str, Any]) -> list[str]:
    names = sweep.get("experiments")
    return [str(name) for name in names] if isinstance(names, list) else []


def _seeds(sweep: Mapping[str, Any]) -> list[int]:
    seeds = sweep.get("seeds")
    return [seed for seed in seeds if isinstance(seed, int)] if isinstance(seeds, list) else []


def _size(sweep: Mapping[str, Any]) -> int:
    return len(_names(sweep)) * max(1, len(_seeds(sweep)))


def _flatten(metrics: Mapping[str, Any]) -> Row:
    """metrics.json as flat columns; numbers of task t become smallbench_<t>_<number>."""
    row: Row = {}
    for key, value in metrics.items():
        if key == "smallbench":
            for task, numbers in (value or {}).items():
                if isinstance(numbers, dict):
                    for name, number in numbers.items():
                        if isinstance(number, (int, float, bool)):
                            row[f"smallbench_{task}_{name}"] = number
        elif isinstance(value, (dict, list)):
            row[key] = json.dumps(value, sort_keys=True)
        else:
            row[key] = value
    return row


def read_config(path: Path) -> dict[str, Any]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C parser is ten times faster
    try:
        config = yaml.load((path / "config.yaml").read_bytes(), Loader=loader)  # noqa: S506
    except (OSError, yaml.YAMLError):
        return {}
    if not isinstance(config, dict):
        return {}
    return config


def read_json(path: Path) -> dict[str, Any] | None:
    return _parse(path.read_bytes())


def _parse(data: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(data)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


# --- CSV ----------------------------------------------------------------------------------------


def columns_of(rows: Iterable[Row]) -> list[str]:
    """The documented columns, then the tasks' columns, then any key this list does not know."""
    found = {key for row in rows for key in row} - set(COLUMNS)
    tasks = sorted(key for key in found if key.startswith("smallbench_"))
    return [*COLUMNS, *tasks, *sorted(found - set(tasks))]


def undocumented(rows: Iterable[Row]) -> list[str]:
    """Keys that no documentation names; they are tabulated all the same."""
    columns = columns_of(rows)
    return [key for key in columns[len(COLUMNS) :] if not key.startswith("smallbench_")]


def write_csv(rows: list[Row], output: Path) -> None:
    """Write the table atomically; a missing value is an empty field, never 0.0."""
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f"{output.name}.{os.getpid()}.tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns_of(rows), restval="", lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: _cell(value) for key, value in row.items()})
    temporary.replace(output)


def read_csv(path: Path) -> list[Row]:
    """The rows of a CSV that `write_csv` wrote, with their types; empty fields are absent keys."""
    with path.open(newline="", encoding="utf-8") as file:
        return [
            {key: _typed(key, text) for key, text in row.items() if text}
            for row in csv.DictReader(file)
        ]


def number(row: Row, key: str) -> float | None:
    """A finite number, or None where the row has none."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _typed(key: str, text: str) -> Any:
    if key in _TEXT:  # a git hash may look like a number
        return text
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
