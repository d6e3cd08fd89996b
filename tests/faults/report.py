"""The table of the fault plan as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import datetime
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from tests.faults.bench import Tally

MOST_NOTES = 4  # more than these stand below the table
HEADER = ("fault", "what", "injected", "survived or detected", "seconds", "verdict")


def _row(line: Tally) -> tuple[str, ...]:
    notes = line.notes if len(line.notes) <= MOST_NOTES else []
    what = line.what + (f" ({'; '.join(notes)})" if notes else "")
    share = f"{100 * line.good / line.injected:.0f} %" if line.injected else "not run"
    verdict = share if line.passed else f"FAILED, {share}"
    return line.fault, what, str(line.injected), str(line.good), f"{line.seconds:.0f}", verdict


def markdown(lines: Sequence[Tally], seed: int, begun: float, quick: bool) -> str:
    """The whole table with its date, machine and versions."""
    day = datetime.datetime.fromtimestamp(begun, datetime.UTC)
    minutes = (datetime.datetime.now(datetime.UTC) - day).total_seconds() / 60
    head = (
        f"{'Sample' if quick else 'Plan'} of {day:%Y-%m-%d %H:%M} UTC, seed {seed}, "
        f"{minutes:.0f} minutes, Python {platform.python_version()}, torch {torch.__version__}, "
        f"{platform.system()} on {platform.machine()}."
    )
    rows = [HEADER, ("---",) * len(HEADER), *map(_row, lines)]
    total, good = sum(line.injected for line in lines), sum(line.good for line in lines)
    rows.append(("all", "", str(total), str(good), "", "100 %" if total == good else "FAILED"))
    table = [f"| {' | '.join(row)} |" for row in rows]
    long = [line for line in lines if len(line.notes) > MOST_NOTES]
    below = [
        text
        for line in long
        for text in ("", f"{line.fault}, {line.what}:", "", *(f"- {note}" for note in line.notes))
    ]
    return "\n".join([head, "", *table, *below, ""])


def write(directory: Path, lines: Sequence[Tally], table: str) -> None:
    """faults.md, faults.csv and faults.json."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "faults.md").write_text(f"# The fault plan as run\n\n{table}")
    with (directory / "faults.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([HEADER, *map(_row, lines)])
    content = json.dumps([asdict(line) for line in lines], indent=2)
    (directory / "faults.json").write_text(content + "\n")
