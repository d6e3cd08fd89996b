"""The two CSVs of a study: results_summary.csv for people, results_details.csv beside it.

One row a run in both, joined by `run`; their columns are src/spec/metric_keys.py's, and after them,
in the details, the numbers of each SmallBench task and any key that the list does not know.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from src.spec.metric_keys import DETAILS, KEYS, SMALLBENCH, SUMMARY
from src.spec.rates import configuration
from src.storage.files import write_atomic

Row = dict[str, Any]
_DTYPES = {"text": "string", "integer": "Int64", "number": "Float64", "true/false": "boolean"}


def table(rows: Iterable[Row]) -> pd.DataFrame:
    """Rows as columns, every key of the list among them; numbers are floats, NaN where missing.

    Also `configuration`, `baseline_configuration`: the experiments without a list's rate; and
    `budget`: trained tokens to two digits, which the runs of one comparison share.
    """
    frame = pd.DataFrame(list(rows), dtype=object)
    columns = dict(frame.reindex(columns=list({**KEYS, **frame})).astype(object))
    for name, key in KEYS.items():
        if key.kind in ("number", "integer"):
            numbers = pd.to_numeric(columns[name], errors="coerce").astype(float)
            columns[name] = numbers.where(np.isfinite(numbers))
    columns["baseline"] = columns["baseline"].eq(True)
    columns["configuration"], columns["baseline_configuration"] = (
        columns[name].map(configuration, na_action="ignore")
        for name in ("experiment", "baseline_name")
    )
    columns["budget"] = columns["tokens"].map(lambda tokens: float(f"{tokens:.1e}"))
    return pd.DataFrame(columns)


def details_path(summary: Path) -> Path:
    """results_summary.csv -> results_details.csv; other.csv -> other_details.csv."""
    stem = summary.stem.removesuffix("_summary")
    return summary.with_name(f"{stem}_details.csv")


def unlisted(rows: Iterable[Row]) -> list[str]:
    """Keys that src/spec/metric_keys.py does not know; they are tabulated all the same."""
    keys = {key for row in rows for key in row} - set(KEYS)
    return sorted(key for key in keys if not key.startswith(f"{SMALLBENCH}_"))


def write_csv(rows: Sequence[Row], summary: Path) -> None:
    """Write both tables atomically; a missing value is an empty field, never 0.0."""
    summary.parent.mkdir(parents=True, exist_ok=True)
    tasks = {key for row in rows for key in row if key.startswith(f"{SMALLBENCH}_")} - set(KEYS)
    frame = pd.DataFrame(rows, dtype=object)
    for path, columns in (
        (summary, SUMMARY),
        (details_path(summary), (*DETAILS, *sorted(tasks), *unlisted(rows))),
    ):
        fields = frame.reindex(columns=columns).map(_field)
        write_atomic(path, fields.to_csv(index=False, lineterminator="\n").encode())


def read_csv(summary: Path) -> list[Row]:
    """The rows that `write_csv` wrote, with their types; empty fields are absent keys.

    The details are joined where they lie beside the summary; where the runs were published there
    too, `path` is that place. Raises ValueError for what is no table of runs.
    """
    frame, details = _read(summary), details_path(summary)
    if details.is_file():
        frame = frame.merge(_read(details), on="run", how="left", validate="one_to_one")
    records = frame.astype(object).to_dict("records")
    rows = [{str(k): v for k, v in row.items() if not pd.isna(v)} for row in records]
    for row in rows:
        folder = summary.parent / "runs" / str(row["run"])
        if "path" in row and folder.is_dir():
            row["path"] = str(folder)
    return rows


def _read(path: Path) -> pd.DataFrame:
    types = {name: _DTYPES[key.kind] for name, key in KEYS.items()}
    try:
        frame = pd.read_csv(path, dtype=types, keep_default_na=False, na_values=[""])
    except ValueError as error:
        raise ValueError(f"{path}: found no table of runs ({error})") from error
    if "run" not in frame.columns:
        raise ValueError(f"{path}: found no column run, expected a table of runs")
    rest = [column for column in frame.columns if column not in KEYS]
    return frame.assign(**{column: frame[column].convert_dtypes() for column in rest})


def _field(value: Any) -> str:
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)
