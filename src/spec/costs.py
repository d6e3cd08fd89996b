"""Device hours to dollars, by the dated table in configs/prices.yaml."""

from __future__ import annotations

import functools
from dataclasses import MISSING, dataclass
from pathlib import Path

from src.spec.strict_yaml import build, key, known_keys, mapping, one_of, read_yaml

TABLE = Path(__file__).resolve().parents[2] / "configs" / "prices.yaml"
UTILISATION = 0.5  # of peak; no run of ours has come near it, hence lower bounds


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """One entry of the table; the file explains the keys."""

    match: tuple[str, ...] = key(MISSING, "a list of texts", bool)
    usd_per_hour: float = key(MISSING, "dollars of at least 0", lambda v: v >= 0)
    tflops: float | None = key(None, "TFLOP/s above 0", lambda v: 0 < v < 1e6)
    kind: str = one_of("on-demand", "spot", "on-demand", "marketplace")
    read_on: str | None = key(None, "a day, or null")
    source: str | None = key(None, "where the price stands")


def price_per_hour(device_type: str, device_name: str) -> float | None:
    """USD an hour of a device, "cpu" or "cuda" and the device's own name.

    The first entry of the table counts one of whose strings is in both, joined by a blank,
    whatever the case. The shipped table ends with an entry that every device matches, so that an
    unknown one is charged too much rather than nothing; None only where a table has no such entry.
    Raises ValueError as `check` does.
    """
    name = f"{device_type} {device_name}".casefold()
    for device in _devices(TABLE).values():
        if any(string.casefold() in name for string in device.match):
            return device.usd_per_hour
    return None


def lower_bounds(flops: float) -> list[tuple[str, float, float]]:
    """(device, hours, USD) of `flops` at half of each device's peak: training alone, a lower bound.

    Devices without `tflops` in the table are left out. Raises ValueError as `check` does.
    """
    bounds = []
    for name, device in _devices(TABLE).items():
        if device.tflops is not None:
            hours = flops / (UTILISATION * 1e12 * device.tflops) / 3600
            bounds.append((name, hours, hours * device.usd_per_hour))
    return bounds


def check() -> None:
    """Raises ValueError (file, key, found, expected) for a table that cannot be used."""
    _devices(TABLE)


@functools.cache
def _devices(path: Path) -> dict[str, Device]:
    table = mapping(f"{path}", read_yaml(path, "a table of prices"))
    known_keys(f"{path}: ", table, ("as_of", "currency", "devices"))
    # Another currency's numbers would be written down as cost_usd.
    if table.get("currency", "USD") != "USD":
        raise ValueError(f"{path}: currency: found {table['currency']!r}, expected USD")
    devices = mapping(f"{path}: devices", table.get("devices"))
    if not devices:
        raise ValueError(f"{path}: devices: found none, expected at least one device")
    return {
        name: build(Device, f"{path}: devices.{name}.", entry) for name, entry in devices.items()
    }
