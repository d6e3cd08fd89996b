"""Run directories -> rows: one a run, finished or not.

A row has the keys of src/spec/metric_keys.py, and `smallbench_<task>_<number>` for each
number of each task.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from src.analysis.run_csv import Row
from src.analysis.run_joins import Sweeps, aliases, and_also, built_of, each_once, provided
from src.evaluation import metrics as run_metrics
from src.spec import run_identity
from src.spec.metric_keys import KEYS, SMALLBENCH
from src.storage import run_dir

Curve = list[tuple[int, float]]
LENGTHS = ("l128", "l512")  # prompts of the table
_MARKS = ("config.yaml", "metrics.json", "metrics.jsonl", "failure.json", "checkpoints")


def find_runs(log_dir: Path) -> list[Path]:
    """Every run directory at or below log_dir, in name order; nothing inside a run is searched."""
    runs = []
    for folder, names, files in os.walk(log_dir):
        if any(mark in files or mark in names for mark in _MARKS):
            runs.append(Path(folder))
            names.clear()
        names.sort()
    return runs


def read_rows(*log_dirs: Path) -> list[Row]:
    """One row for every run at or below each directory, every alias of its study.json, and every
    run of its sweeps that has neither: with the numbers of a run that is the same, else missing.

    Each directory's sweeps are plans of their own. Of several directories a run's name begins with
    its directory's; ValueError where two have the same.
    """
    names = [log_dir.resolve().name for log_dir in log_dirs]
    if len(set(names)) < len(names):
        raise ValueError(
            f"--log_dir: found two directories called {max(names, key=names.count)}, expected "
            "different names, for the runs are called by them"
        )
    prefixes = [f"{name}/" if len(names) > 1 else "" for name in names]
    contents = list(map(_read, log_dirs, prefixes))
    rows = each_once(row for rows, _, _ in contents for row in rows)
    for (_, sweeps, study), prefix in zip(contents, prefixes, strict=True):
        rows += aliases(study, rows, prefix)
        rest = provided(sweeps.unbegun(rows, prefix), rows)
        rows += [
            row for row in rest if row["status"] != "missing" or _is_planned(row, study, prefix)
        ]
    return rows


def _read(log_dir: Path, prefix: str) -> tuple[list[Row], Sweeps, Mapping[str, Any]]:
    rows, sweeps, ratios = [], Sweeps(), read_ratios(log_dir)
    for path in find_runs(log_dir):
        config, problem = read_config(path)
        sweeps.add(config)
        name = path.name if path == log_dir else path.relative_to(log_dir).as_posix()
        row = computed(path) | _read_run(path, config) | ratios.get(name, {})
        row |= {} if problem is None else {"reason": and_also(row, problem)}
        rows.append(row | {"run": f"{prefix}{name}", "path": str(path)})
    return rows, sweeps, read_object(log_dir / "study.json") or {}


def _is_planned(row: Row, study: Mapping[str, Any], prefix: str) -> bool:
    """Whether a missing run is one that somebody means to begin: of its sweeps, a study trains at
    the full budget what it promoted."""
    if row["sweep"] not in study.get("sweeps", []):
        return True
    name = row["run"].removeprefix(prefix)  # whatever block's folder it would lie in
    planned = [run for run in study.get("runs", []) if run["state"] != "assumed"]
    return any(name in (run["run"], run["run"].rpartition("/")[2]) for run in planned)


def _read_run(path: Path, config: Mapping[str, Any]) -> Row:
    """What the run's directory says of it, but for its name and place."""
    known = _from_config(config)

    def failed(reason: str) -> Row:
        return known | {"status": "failed", "reason": reason}

    if (path / "metrics.json").exists():
        metrics = read_object(path / "metrics.json")
        if metrics is None:
            return failed("metrics.json is not a JSON object")
        row = known | {key: value for key, value in _flatten(metrics).items() if value is not None}
        if lacks := [key for key in ("experiment", "phase", "seed") if row.get(key) is None]:
            return failed(f"metrics.json is of no run of this project: no {', '.join(lacks)}")
        if row.get("status") not in ("finished", "killed"):
            row |= {"status": "failed", "reason": f"metrics.json says status {row.get('status')!r}"}
        return row
    known |= (last := _last_row(path))
    if (path / "failure.json").exists():
        failure = read_object(path / "failure.json") or {}
        parts = [str(failure[key]) for key in ("kind", "reason", "message") if failure.get(key)]
        return failed(": ".join(parts) or "failure.json gives no reason")
    at = f"step {last['steps']:,}" if last else "before its first row"
    return known | {"status": "unfinished", "reason": f"stopped at {at}, no metrics.json yet"}


def _from_config(config: Mapping[str, Any]) -> Row:
    """What a run that never wrote metrics.json is known to be: who it is and what was asked."""
    requested, model, training, built, params, sweep = (
        part if isinstance(part := config.get(name), dict) else {}
        for name in ("asked", "model", "training", "built", "params", "sweep")
    )
    experiment, baseline = config.get("experiment"), config.get("baseline")
    known = {
        **config,
        "sweep": sweep.get("file"),
        "baseline": None if experiment is None or baseline is None else experiment == baseline,
        "baseline_name": baseline,
        **built_of(sweep, experiment),
        **requested, **built, **model,
        **{f"params_{block}": count for block, count in params.items()},
        **{key: training.get(key) for key in ("batch_size", "seq_len", "learning_rate")},
    }  # fmt: skip
    return {
        key: value
        for key, value in known.items()
        if key in KEYS and value is not None and not isinstance(value, (dict, list))
    }


def _last_row(path: Path) -> dict[str, int]:
    """Steps and tokens of the last row of metrics.jsonl; {} without one, or where it is damaged."""
    try:
        rows = run_dir.read_rows(path / "metrics.jsonl")
    except ValueError:
        return {}
    progress = [row for row in rows if "step" in row and "tokens" in row]
    return {"steps": progress[-1]["step"], "tokens": progress[-1]["tokens"]} if progress else {}


def computed(path: Path) -> Row:
    """What environment.json says of the program and the processors that computed a run, for those
    whose metrics.json is older than these keys; nothing where it does not say."""
    conditions = (read_object(path / "environment.json") or {}).get("computed")
    if not conditions or not all(isinstance(part, dict) and part for part in conditions):
        return {}
    return {
        "program_digest": run_identity.program_digest(conditions),
        "processors": run_identity.processors(conditions),
    }


def read_curve(path: Path) -> Curve:
    """(tokens, dev perplexity) of a run's dev checks, oldest first: of its metrics.jsonl, or of
    the curve.csv that was published of it; empty without a readable one."""
    published = path / "curve.csv"
    if published.is_file():
        losses = pd.read_csv(published, usecols=["tokens", "dev_loss"]).dropna()
        return [(int(tokens), math.exp(loss)) for tokens, loss in losses.itertuples(index=False)]
    try:
        return run_dir.read_curve(path)
    except ValueError:
        return []


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
    if run_metrics.edited(config):
        return {}, "config.yaml is not as the run wrote it (its digest differs), so it was not read"
    return config, None


def read_object(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None where there is no such file or it holds something else."""
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return value if isinstance(value, dict) else None


# --- latencies that one process measured in turns -------------------------------------------------


def read_ratios(log_dir: Path) -> dict[str, dict[str, Any]]:
    """By run: `latency_ratio_l<L>`, its 95 % interval `..._low_l<L>`, `..._high_l<L>`, and
    `latency_ratio_to`, the run it was measured beside; of that run itself the ratio 1.

    From `latency/*.json` (python -m src.evaluation.latency --compare): milliseconds of runs that
    were measured each in its own process differ by what else the computer did. A run that was
    measured beside several has no one ratio that fits beside the others': the one against the
    baseline of most comparisons counts.
    """
    files = sorted((log_dir / "latency").glob("*.json"))
    comparisons = [content for file in files if _is_comparison(content := read_object(file) or {})]
    counts = Counter(content["baseline"] for content in comparisons)
    ratios: dict[str, dict[str, Any]] = {}
    for content in sorted(comparisons, key=lambda content: counts[content["baseline"]]):
        reference = {"latency_ratio_to": content["baseline"]}
        rows = {key: content["comparison"][key] for key in LENGTHS}
        ratios[content["ours"]] = reference | {
            f"latency_{name}_{key}": row[name]
            for key, row in rows.items()
            for name in ("ratio", "ratio_low", "ratio_high")
        }
        ratios[content["baseline"]] = reference | {f"latency_ratio_{key}": 1.0 for key in rows}
    return ratios


def _is_comparison(content: Mapping[str, Any]) -> bool:
    """Whether it is a file of that command, of these prompt lengths."""
    try:
        rows = [content["comparison"][key] for key in LENGTHS]
        sound = all({"ratio", "ratio_low", "ratio_high"} <= set(row) for row in rows)
    except (KeyError, TypeError):
        return False
    return sound and {"ours", "baseline"} <= set(content)


def read_curves(rows: Sequence[Row]) -> dict[str, Curve]:
    """The dev curve of each run that has a directory, by name."""
    return {row["run"]: read_curve(Path(row["path"])) for row in rows if "path" in row}
