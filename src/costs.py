"""Device hours to dollars, by the dated table in configs/prices.yaml."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import yaml

TABLE = Path(__file__).resolve().parent.parent / "configs" / "prices.yaml"


@functools.cache
def _devices() -> dict[str, dict[str, Any]]:
    return yaml.safe_load(TABLE.read_text(encoding="utf-8"))["devices"]


def price_per_hour(device_type: str, device_name: str) -> float | None:
    """USD an hour of a device: "cpu", or a GPU by its name; None where the table has no price."""
    name = "cpu" if device_type == "cpu" else device_name
    for entry in _devices().values():
        if any(part.casefold() in name.casefold() for part in entry["match"]):
            return float(entry["usd_per_hour"])
    return None
