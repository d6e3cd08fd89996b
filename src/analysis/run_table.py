"""Run directories -> rows: one a run, finished or not.

A row has the keys of src/spec/metric_keys.py, and `smallbench_<task>_<number>` for each
number of each task.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from src.analysis.latency_ratios import read_ratios
from src.analysis.run_csv import Row
from src.analysis.run_joins import Sweeps, aliases, and_also, each_once, provided
from src.evaluation import metrics as record
from src.spec.metric_keys import KEYS, SMALLBENCH

Curve = list[tuple[int, float]]

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
    """One row for every run at or below `log_dir`, every alias of its study.json, and every run of
    their sweeps that has neither: with the numbers of a run that is the same, else missing."""
    found, sweeps = [], Sweeps()
    for path in find_runs(log_dir):
        config, problem = read_config(path)
        sweeps.add(config)
        row = _read_run(path, path.relative_to(log_dir).as_posix(), config)
        found.append(row if problem is None else row | {"reason": and_also(row, problem)})
    file = log_dir / "study.json"
    study = (read_json(file) or {}) if file.exists() else {}
    rows = each_once(found)
    ratios = read_ratios(log_dir)
    rows = [row | ratios.get(str(row["run"]), {}) for row in rows]
    rows += aliases(study, rows)
    rest = provided(sweeps.unbegun(rows), rows)
    return rows + [row for row in rest if row["status"] != "missing" or _is_planned(row, study)]


def _is_planned(row: Row, study: Mapping[str, Any]) -> bool:
    """Whether a missing run is one that somebody means to begin: of its sweeps, a study trains at
    the full budget what it promoted."""
    if row["sweep"] not in study.get("sweeps", []):
        return True
    return any(
        run["run"] == row["run"] and run["state"] != "assumed" for run in study.get("runs", [])
    )


def _read_run(path: Path, name: str, config: Mapping[str, Any]) -> Row:
    where = {"run": path.name if name == "." else name, "path": str(path)}
    row = _from_config(config) | where
    metrics_file, failure_file = path / "metrics.json", path / "failure.json"
    if metrics_file.exists():
        metrics = read_json(metrics_file)
        if metrics is None:
            return row | {"status": "failed", "reason": "metrics.json is not a JSON object"}
        row |= {key: value for key, value in _flatten(metrics).items() if value is not None}
        lacks = [key for key in ("experiment", "phase", "seed") if row.get(key) is None]
        if lacks:
            reason = f"metrics.json is of no run of this project: no {', '.join(lacks)}"
            return _from_config(config) | where | {"status": "failed", "reason": reason}
        if row.get("status") not in ("finished", "killed"):
            row |= {"status": "failed", "reason": f"metrics.json says status {row.get('status')!r}"}
        return row | where
    row |= _progress(path / "metrics.jsonl")
    if failure_file.exists():
        failure = read_json(failure_file) or {}
        told = [failure[key] for key in ("kind", "reason", "message") if failure.get(key)]
        reason = ": ".join(str(part) for part in told) or "failure.json gives no reason"
        return row | {"status": "failed", "reason": reason}
    last = row.get("steps")
    at = f"step {last:,}" if isinstance(last, int) else "before its first row"
    return row | {"status": "unfinished", "reason": f"stopped at {at}, no metrics.json yet"}


def _from_config(config: Mapping[str, Any]) -> Row:
    """What a run that never wrote metrics.json is known to be: who it is and what was asked."""
    asked, model, training, built, params = (
        part if isinstance(part := config.get(name), dict) else {}
        for name in ("asked", "model", "training", "built", "params")
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
        "evaluation_digest": config.get("evaluation_digest"),
        "corpus": config.get("corpus"),
        "tokenizer_sha256": config.get("tokenizer_sha256"),
        "data_sha256": config.get("data_sha256"),
    }
    own = (sweep or {}).get("built")
    own = own.get(experiment) if isinstance(own, dict) else None
    known |= (own if isinstance(own, dict) else {}) | asked | built | model
    known |= {f"params_{block}": count for block, count in params.items()}
    known |= {key: training.get(key) for key in ("batch_size", "seq_len", "learning_rate")}
    return {k: value for k, value in known.items() if k in KEYS and value is not None}


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


def _flatten(metrics: Mapping[str, Any]) -> Row:
    """metrics.json as flat columns; numbers of task t become smallbench_<t>_<number>."""
    row: Row = {}
    for key, value in metrics.items():
        if key == SMALLBENCH:
            for task, numbers in (value or {}).items():
                if isinstance(numbers, dict):
                    for name, number in numbers.items():
                        if isinstance(number, (int, float, bool)):
                            row[f"{SMALLBENCH}_{task}_{name}"] = number
        elif isinstance(value, (dict, list)):
            row[key] = json.dumps(value, sort_keys=True)
        else:
            row[key] = value
    return row


def read_config(path: Path) -> tuple[dict[str, Any], str | None]:
    """(config.yaml's content, what is wrong with it); nothing of an edited file is believed."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C parser is ten times faster
    try:
        config = yaml.load((path / "config.yaml").read_bytes(), Loader=loader)  # noqa: S506
    except FileNotFoundError:
        return {}, None
    except (OSError, yaml.YAMLError) as error:
        return {}, f"config.yaml cannot be read ({type(error).__name__})"
    if not isinstance(config, dict):
        return {}, "config.yaml is no mapping"
    if record.edited(config):
        return {}, "config.yaml is not as the run wrote it (its digest differs), so it was not read"
    return config, None


def read_json(path: Path) -> dict[str, Any] | None:
    return _parse(path.read_bytes())


def _parse(data: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(data)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
