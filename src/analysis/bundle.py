"""The repro bundle: one JSON file with what it takes to repeat every run of a results CSV.

Written by scripts/aggregate_results.py as `results_bundle.json` beside the CSV. The same log
directory gives the same bytes: no clocks, no costs, no paths of the log directory.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from src.analysis.run_csv import Row
from src.analysis.run_table import read_config, read_object

SCHEMA = 1
NAME = "results_bundle.json"
_TOKENS = ("corpus", "vocab_size", "tokenizer_sha256", "data_sha256")
_CODE = ("git_sha", "git_dirty", "compute_digest")


def bundle(rows: Sequence[Row], log_dirs: Sequence[Path]) -> dict[str, Any]:
    """Code, tokens, seeds, environments (versions, machine), the resolved config of every run,
    and a study's sweep files and decisions where there was one."""
    runs = [row for row in rows if "path" in row]
    return {
        "schema": SCHEMA,
        "code": _combinations(runs, _CODE),
        "tokens": _combinations(runs, _TOKENS),
        "seeds": _seeds(runs),
        "environments": _environments(runs),
        "runs": {str(row["run"]): _config(Path(row["path"])) for row in runs},
        "sweeps": {
            path.name: portable(yaml.safe_load(path.read_bytes()))
            for log_dir in log_dirs
            for path in sorted((log_dir / "configs").glob("*.yaml"))
        },
        "study": next((portable(s) for d in log_dirs if (s := _study(d / "study.json"))), None),
    }


def portable(value: Any) -> Any:
    """JSON values without this machine's folders: relative below the working directory, `~` for the
    home, else the last name alone."""
    if isinstance(value, dict):
        return {key: portable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [portable(item) for item in value]
    if not isinstance(value, str):
        return value
    text = value.replace(f"{Path.cwd()}/", "").replace(f"{Path.home()}/", "~/")
    return f".../{Path(text).name}" if text.startswith("/") else text


def _config(path: Path) -> dict[str, Any]:
    """A run's config.yaml; of one that was edited after the run began, only that it was."""
    config, problem = read_config(path)
    return portable(config) if problem is None else {"not_read": problem}


def _combinations(runs: Sequence[Row], keys: Sequence[str]) -> list[dict[str, Any]]:
    """Each combination of these columns once, with the number of its runs."""
    counts = Counter(
        json.dumps({key: row.get(key) for key in keys})
        for row in runs
        if any(row.get(key) is not None for key in keys)
    )
    return [{**json.loads(text), "runs": count} for text, count in sorted(counts.items())]


def _seeds(runs: Sequence[Row]) -> dict[str, dict[str, list[int]]]:
    """By experiment and phase."""
    seeds: dict[str, dict[str, list[int]]] = {}
    known = [row for row in runs if isinstance(row.get("seed"), int)]  # of a foreign file: a text
    for row in sorted(known, key=lambda row: row["seed"]):
        phases = seeds.setdefault(str(row.get("experiment")), {})
        phases.setdefault(str(row.get("phase")), []).append(row["seed"])
    return seeds


def _environments(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Versions and machines as the runs' environment.json have them, each once, with its runs."""
    runs: dict[str, list[str]] = {}
    for row in rows:
        content = read_object(Path(row["path"]) / "environment.json")
        if content is not None:
            runs.setdefault(json.dumps(content, sort_keys=True), []).append(str(row["run"]))
    return [{**json.loads(text), "runs": sorted(names)} for text, names in sorted(runs.items())]


def _study(path: Path) -> dict[str, Any] | None:
    content = read_object(path)
    if content is None:
        return None
    kept = {key: value for key, value in content.items() if key != "costs"}
    kept["decisions"] = [d for d in content.get("decisions", []) if d.get("phase") != "all"]
    return kept
