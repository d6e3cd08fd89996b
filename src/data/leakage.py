"""Which SmallBench rows the training text contains, as found by scripts/check_leakage.py."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from src.data.tasks import held_tasks


def report_path(stated: str | None, smallbench_dir: Path, corpus: Mapping[str, Any]) -> Path | None:
    """The report to use: the stated file, else the one the script wrote for this `corpus` (a
    source.json); None where there is none."""
    if stated is not None:
        return Path(stated)
    train = corpus.get("splits", {}).get("train", {}).get("sha256")
    path = smallbench_dir / f"leakage-{str(train)[:12]}.json"
    return path if train and path.is_file() else None


def contaminated_rows(
    stated: str | None, smallbench_dir: Path, corpus: Mapping[str, Any]
) -> dict[str, set[int]] | None:
    """Rows by task to leave out; None where no report exists (nothing is known, nothing dropped).

    Raises ValueError for a report of another corpus, of other rows than `smallbench_dir` holds,
    or one that cannot be read.
    """
    path = report_path(stated, smallbench_dir, corpus)
    if path is None:
        return None
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        train_sha256 = report["corpus"]["splits"]["train"]["sha256"]
        rows = {task: set(entry["contaminated"]) for task, entry in report["tasks"].items()}
        checked = {task: str(entry["sha256"]) for task, entry in report["tasks"].items()}
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: found no readable leakage report ({error}), expected one of "
            "scripts/check_leakage.py"
        ) from None
    expected = corpus.get("splits", {}).get("train", {}).get("sha256")
    if train_sha256 != expected:
        raise ValueError(
            f"{path}: found a report on another train split ({str(train_sha256)[:12]}), expected "
            f"{str(expected)[:12]}; run scripts/check_leakage.py on this corpus"
        )
    # Row numbers of another download would leave out the wrong rows, and none of a new task.
    source = smallbench_dir / "source.json"
    for task, facts in held_tasks(smallbench_dir).items():
        sha256 = checked.get(task)
        if sha256 != facts["sha256"]:
            mismatch = f".{task}.sha256: found {sha256[:12]}" if sha256 else f": found no {task}"
            raise ValueError(
                f"{path}: tasks{mismatch}, expected {facts['sha256'][:12]} as in {source}, so the "
                "report is on other rows; run python scripts/check_leakage.py --smallbench "
                f"{smallbench_dir} again"
            )
    return rows
