"""Values as a Markdown table writes them; what is missing is a dash, never 0.0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

DASH = "–"


def field(value: Any) -> str:
    """A text or a truth."""
    if value is None or value is pd.NA or (isinstance(value, float) and pd.isna(value)):
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value).replace("|", "\\|").replace("\n", " ")


def fixed(value: float, digits: int, unit: str = "") -> str:
    return DASH if pd.isna(value) else f"{value:.{digits}f}{unit}"


def whole(value: float) -> str:
    """A count."""
    return DASH if pd.isna(value) else f"{value:,.0f}"


def mean_sd(values: pd.Series, digits: int) -> str:
    """Mean and sample standard deviation; a single value has none."""
    known = values.dropna()
    if known.empty:
        return DASH
    mean = fixed(known.mean(), digits)
    return mean if len(known) == 1 else f"{mean} ± {known.std():.{digits}f}"


def total(values: pd.Series, digits: int) -> str:
    return fixed(values.sum(min_count=1), digits)


def markdown(head: str, body: Sequence[Sequence[str]], empty: str) -> str:
    """head: names between ` | `; empty: what stands there instead of a table without lines."""
    if not body:
        return f"({empty})"
    names = [name.strip() for name in head.split(" | ")]
    lines = [names, ["---"] * len(names), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
