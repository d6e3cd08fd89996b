"""Lists of learning rates in an experiment file: each experiment becomes one run per rate."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

Check = Callable[[str, Any], float]  # (place, value) -> the rate, or ValueError


@dataclass(frozen=True, slots=True)
class Expanded:
    """An experiment file's values without lists of rates.

    runs: for each experiment that asked for several rates, its runs' names in the list's order.
    """

    shared: Mapping[str, Any]
    entries: list[dict[str, Any]]
    forced: dict[str, dict[str, Any]]
    runs: dict[str, tuple[str, ...]] = field(default_factory=dict)


def spelled(rate: float) -> str:
    """A rate as run names have it: 0.002 is 2e-3, 0.016 is 1.6e-2."""
    digits, _, exponent = f"{rate:.15e}".partition("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"


def configuration(name: str) -> str:
    """An experiment's name without the rate that a list put behind it: emb35-lr2e-3 is emb35's."""
    return re.sub(r"-lr[0-9.]+e-?[0-9]+$", "", name)


def expand(
    where: str,
    shared: Mapping[str, Any],
    entries: Sequence[dict[str, Any]],
    forced: Mapping[str, dict[str, Any]],
    check: Check,
) -> Expanded:
    """Replace each experiment whose `training.learning_rate` is a list by one per rate.

    shared: the file's top level; entries: its experiments; forced: --set by section. The nearest
    statement counts, as for every other key: --set, then the experiment's own, then the file's.
    The run of `emb35` at 0.002 is `emb35-lr2e-3`, with everything else as `emb35` states it.
    Raises ValueError (place, found, expected) for a list that is empty, repeats a rate or holds
    what `check` refuses.
    """
    over = forced.get("training", {})
    file = shared.get("training")
    for place, stated in ((f"{where}training.", file), ("--set training.", over)):
        _rates(place, stated, check)
    made: list[dict[str, Any]] = []
    runs: dict[str, tuple[str, ...]] = {}
    for entry in entries:
        place, own = f"{where}experiments.{entry['name']}.training.", entry.get("training")
        _rates(place, own, check)
        asked = next(
            (layer["learning_rate"] for layer in (over, own, file) if _has_rate(layer)), None
        )
        plain = {**entry, "training": _without(own)} if "training" in entry else entry
        if not isinstance(asked, list):
            made.append(plain)
            continue
        named = {f"{entry['name']}-lr{spelled(float(rate))}": rate for rate in asked}
        runs[entry["name"]] = tuple(named)
        for name, rate in named.items():
            own_training = {**(plain.get("training") or {}), "learning_rate": rate}
            made.append({**plain, "name": name, "training": own_training})
    return Expanded(
        shared={**shared, "training": _without(file)} if "training" in shared else shared,
        entries=made,
        forced={**forced, "training": _without(over)} if over else dict(forced),
        runs=runs,
    )


def _has_rate(layer: Any) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(layer, Mapping) and layer.get("learning_rate") is not None


def _without(layer: Any) -> Any:
    """A section without a list of rates; a single rate, and anything that is no section, stays."""
    if not _has_rate(layer) or not isinstance(layer["learning_rate"], list):
        return layer
    return {key: value for key, value in layer.items() if key != "learning_rate"}


def _rates(place: str, layer: Any, check: Check) -> None:
    if not _has_rate(layer) or not isinstance(layer["learning_rate"], list):
        return
    found = layer["learning_rate"]
    rates = [check(place, rate) for rate in found]
    if not rates or len(set(rates)) != len(rates):
        raise ValueError(
            f"{place}learning_rate: found {found!r}, expected one rate, or a list of different ones"
        )
