"""Which SmallBench rows the training text contains, as found by scripts/check_leakage.py."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from src.data.tasks import held_tasks


def report_path(stated: str | None, smallbench_dir: Path, corpus: Mapping[str, Any]) -> Path | None:
    """The report to use: the stated file, else the one the script wrote for this corpus.

    `corpus` is the token directory's record of its source; None where there is no report.
    """
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
        found = report["corpus"]["splits"]["train"]["sha256"]
        rows = {task: set(entry["contaminated"]) for task, entry in report["tasks"].items()}
        checked = {task: str(entry["sha256"]) for task, entry in report["tasks"].items()}
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: found no readable leakage report ({error}), expected one of "
            "scripts/check_leakage.py"
        ) from None
    expected = corpus.get("splits", {}).get("train", {}).get("sha256")
    if found != expected:
        raise ValueError(
            f"{path}: found a report on another train split ({str(found)[:12]}), expected "
            f"{str(expected)[:12]}; run scripts/check_leakage.py on this corpus"
        )
    _check_rows(path, checked, smallbench_dir)
    return rows


def _check_rows(path: Path, checked: Mapping[str, str], smallbench_dir: Path) -> None:
    """Row numbers of another download would leave out the wrong rows, and none of a new task."""
    source = smallbench_dir / "source.json"
    way_out = f"run python scripts/check_leakage.py --smallbench {smallbench_dir} again"
    for task, facts in held_tasks(smallbench_dir).items():
        sha256 = facts["sha256"]
        if task not in checked:
            raise ValueError(
                f"{path}: tasks: found no {task}, expected every task of {source}; {way_out}"
            )
        if checked[task] != sha256:
            raise ValueError(
                f"{path}: tasks.{task}.sha256: found {checked[task][:12]}, expected "
                f"{sha256[:12]} as in {source}, so the report is on other rows; {way_out}"
            )
