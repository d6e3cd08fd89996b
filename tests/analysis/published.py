"""Reading what is published in results/, and checking the prose of a page against it.

A claim is a piece of a sentence with its numbers filled in from results/. A page must hold all of
its claims, and no digit outside of them; its tables are checked by tests/test_links.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from src.analysis.run_csv import Row, read_csv
from tests import ROOT

RESULTS = ROOT / "results"
# What is no result: the PRD's size, rule and level, names, and papers.
GIVEN = re.compile(
    r"\b10M\b|at least 5 %|95 % interval|et al\. 20\d\d|arXiv \d{4}\.\d{5}|\(\d\)|"
    r"\b[A-Za-z]+-?[-\w]*\d\w*(?:-\w+)*"
)


@cache
def rows(folder: Path) -> dict[str, Row]:
    return {row["run"]: row for row in read_csv(folder / "results_summary.csv")}


@cache
def content(path: Path) -> Any:
    return json.loads(path.read_bytes())


def training(folder: Path, run: str) -> dict[str, Any]:
    section: dict[str, Any] = content(folder / "results_bundle.json")["runs"][run]["training"]
    return section


def sd(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1))


def prose(page: Path) -> str:
    """Without tables, code and the targets of links."""
    text = page.read_text(encoding="utf-8")
    text = re.sub(r"<!-- table:([\w-]+) -->.*?<!-- /table:\1 -->", "", text, flags=re.S)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return re.sub(r"\s+", " ", re.sub(r"`[^`]*`", "", text))


@cache
def claimed(claims: Callable[[], Iterator[str]]) -> tuple[str, ...]:
    """The claims of one part of a page, worked out once."""
    return tuple(claims())


def lacking(page: Path, claims: Callable[[], Iterator[str]]) -> list[str]:
    """Claims of one part that the prose does not hold."""
    text = prose(page)
    return [claim for claim in claimed(claims) if claim not in text]


def unchecked(page: Path, parts: Iterable[Callable[[], Iterator[str]]]) -> list[str]:
    """Where the prose has a number that stands in no claim."""
    text = prose(page)
    for claim in (claim for part in parts for claim in claimed(part)):
        text = text.replace(claim, " ")
    text = GIVEN.sub(" ", text)
    return [text[max(0, at.start() - 30) : at.end() + 20] for at in re.finditer(r"\d+", text)]
