"""Device hours to dollars, by the dated table in configs/prices.yaml."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.spec.strict_yaml import read_yaml

TABLE = Path(__file__).resolve().parents[2] / "configs" / "prices.yaml"
_TOP_KEYS = ("as_of", "currency", "devices")
_KEYS = ("match", "tflops", "usd_per_hour", "kind", "read_on", "source")
_KINDS = ("spot", "on-demand", "marketplace")

UTILISATION = 0.5  # of peak; no run of ours has come near, which makes `floors` lower bounds

# (strings to look for, in lower case; USD an hour), in the order of the table
_Prices = tuple[tuple[tuple[str, ...], float], ...]


def price_per_hour(device_type: str, device_name: str) -> float | None:
    """USD an hour of a device, "cpu" or "cuda" and the device's own name.

    The first entry of the table counts one of whose strings is in both, joined by a blank,
    whatever the case. The shipped table ends with an entry that every device matches, so that an
    unknown one is charged too much rather than nothing; None only where a table has no such entry.
    Raises ValueError as `check` does.
    """
    device = f"{device_type} {device_name}".casefold()
    for strings, price in _prices(TABLE):
        if any(string in device for string in strings):
            return price
    return None


@dataclass(frozen=True, slots=True)
class Floor:
    """What some training costs at least on one device of the table."""

    device: str
    hours: float
    usd: float


def floors(flops: float) -> list[Floor]:
    """Hours and dollars of `flops` at half of each device's peak: training alone, a lower bound.

    Devices without `tflops` in the table are left out. Raises ValueError as `check` does.
    """
    check()
    devices = read_yaml(TABLE, "a table of prices")["devices"]
    found = []
    for name, entry in devices.items():
        if "tflops" in entry:
            hours = flops / (UTILISATION * 1e12 * entry["tflops"]) / 3600
            found.append(Floor(name, hours, hours * entry["usd_per_hour"]))
    return found


def check() -> None:
    """Raises ValueError (file, key, found, expected) for a table that cannot be used."""
    _prices(TABLE)


@functools.cache
def _prices(path: Path) -> _Prices:
    table = _mapping(f"{path}", read_yaml(path, "a table of prices"), _TOP_KEYS)
    # Another currency's numbers would be written down as cost_usd.
    if table.get("currency", "USD") != "USD":
        raise ValueError(f"{path}: currency: found {table['currency']!r}, expected USD")
    devices = _mapping(f"{path}: devices", table.get("devices"))
    if not devices:
        raise ValueError(f"{path}: devices: found none, expected at least one device")
    return tuple(_entry(f"{path}: devices.{key}", entry) for key, entry in devices.items())


def _entry(where: str, entry: Any) -> tuple[tuple[str, ...], float]:
    found = _mapping(where, entry, _KEYS)
    strings, price, kind = (found.get(key) for key in ("match", "usd_per_hour", "kind"))
    if not isinstance(strings, list) or not strings or not all(isinstance(s, str) for s in strings):
        raise ValueError(f"{where}.match: found {strings!r}, expected a list of texts")
    number = float(price) if isinstance(price, (int, float)) else math.nan
    if isinstance(price, bool) or not math.isfinite(number) or number < 0:
        raise ValueError(
            f"{where}.usd_per_hour: found {price!r}, expected a number of dollars of at least 0"
        )
    speed = found.get("tflops", 1)
    if isinstance(speed, bool) or not isinstance(speed, (int, float)) or not 0 < speed < 1e6:
        raise ValueError(f"{where}.tflops: found {speed!r}, expected TFLOP/s above 0")
    if "kind" in found and kind not in _KINDS:
        raise ValueError(f"{where}.kind: found {kind!r}, expected one of {', '.join(_KINDS)}")
    return tuple(string.casefold() for string in strings), number


def _mapping(where: str, found: Any, keys: tuple[str, ...] | None = None) -> Mapping[str, Any]:
    if not isinstance(found, dict):
        raise ValueError(f"{where}: found {found!r}, expected a mapping of keys")
    for key in found:
        if keys is not None and key not in keys:
            raise ValueError(
                f"{where}.{key}: found an unknown key, expected one of {', '.join(keys)}"
            )
    return found
