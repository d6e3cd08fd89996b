"""Latencies as ratios to a baseline's that one process measured in turns with it.

Milliseconds of runs that were measured each in its own process differ by what else the machine did;
of `latency/<run>-against-<baseline>.json` (python -m src.evaluation.latency --compare) only the
ratio is used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LENGTHS = (128, 512)


def read_ratios(log_dir: Path) -> dict[str, dict[str, Any]]:
    """By run: `latency_ratio_l<L>`, its 95 % interval `..._low_l<L>`, `..._high_l<L>`, and
    `latency_ratio_to`, the run it was measured beside; of that run itself the ratio 1.

    A run that was measured beside several, or both as a baseline and against one, has no one
    ratio that fits beside the others': the one against the baseline of most comparisons counts.
    """
    files = sorted((log_dir / "latency").glob("*.json"))
    found = [one for file in files if (one := _comparison(file)) is not None]
    baselines = [one["baseline"] for one in found]
    ratios: dict[str, dict[str, Any]] = {}
    for one in sorted(found, key=lambda one: baselines.count(one["baseline"])):
        columns = {"latency_ratio_to": one["baseline"]}
        for length in LENGTHS:
            row = one["comparison"][f"l{length}"]
            for end in ("", "_low", "_high"):
                columns[f"latency_ratio{end}_l{length}"] = row[f"ratio{end}"]
        ratios[one["ours"]] = columns
        itself = {f"latency_ratio_l{length}": 1.0 for length in LENGTHS}
        ratios[one["baseline"]] = {"latency_ratio_to": one["baseline"], **itself}
    return ratios


def _comparison(file: Path) -> Mapping[str, Any] | None:
    """A file of the command; None for another one, or one of other prompt lengths."""
    try:
        content = json.loads(file.read_bytes())
        rows = [content["comparison"][f"l{length}"] for length in LENGTHS]
        sound = all({"ratio", "ratio_low", "ratio_high"} <= set(row) for row in rows)
    except (ValueError, KeyError, TypeError):
        return None
    return content if sound and {"ours", "baseline"} <= set(content) else None


def side_by_side(groups: Sequence[Sequence[Mapping[str, Any]]]) -> str | None:
    """The run that the configurations (rows by configuration) were measured beside, where two of
    them at least have a ratio to the same one; None: no ratios to draw."""
    told = [
        {str(row["latency_ratio_to"]) for row in group if row.get("latency_ratio_to")}
        for group in groups
    ]
    names = [name for group in told for name in group]
    best = max(sorted(set(names)), key=names.count) if names else None
    return best if best is not None and names.count(best) > 1 else None
