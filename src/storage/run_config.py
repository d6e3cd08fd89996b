"""`config.yaml` of a run directory: read, and compared with what is asked now."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

_SHOWN_DIFFERENCES = 6


def stored_config(run: Path) -> dict[str, Any] | None:
    """`config.yaml` of a run, None where there is none; ValueError for what is no run's."""
    path = run / "config.yaml"
    try:
        stored = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(stored, dict) or "config_digest" not in stored:
        raise ValueError(f"{path}, key config_digest: missing, so {run} is not a run.")
    return stored


def begun_with(run: Path, resolved: dict[str, Any], *digests: str) -> str | None:
    """The digest that a run directory was begun with, None where it was not; ValueError, listing
    `key: stored -> asked`, where it is none of `digests`."""
    stored = stored_config(run)
    if stored is None:
        return None
    digest = str(stored.pop("config_digest"))
    if digest not in digests:
        changes = differences(stored, resolved)
        shown = "; ".join(changes[:_SHOWN_DIFFERENCES]) or f"digest: {digest} -> {digests[0]}"
        more = len(changes) - _SHOWN_DIFFERENCES
        raise ValueError(
            f"{run / 'config.yaml'}: this run was begun with another config (stored -> "
            f"asked): {shown}{f'; and {more} more' if more > 0 else ''}. Ask for the stored "
            f"values, give the experiment another name, or delete {run}."
        )
    return digest


def differences(stored: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """`key: stored -> asked`, one for each that differs."""
    current = yaml.safe_load(yaml.safe_dump(current))
    before, now = dict(_flatten(stored)), dict(_flatten(current))
    missing = "(absent)"
    return [
        f"{key}: {before.get(key, missing)!r} -> {now.get(key, missing)!r}"
        for key in before | now
        if before.get(key, missing) != now.get(key, missing)
    ]


def _flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree
