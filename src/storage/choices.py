"""`<log_dir>/choices.json`: precision, threads, micro-batch and loss chunk, chosen once a log
directory so that its runs compare."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from src.storage.files import open_lock_file, write_json


def get(
    log_dir: Path,
    key: str,
    decide: Callable[[], dict[str, Any]],
    kinds: Mapping[str, type] = MappingProxyType({}),
) -> dict[str, Any]:
    """What is stored for `key`, a device say, or `decide()`'s result, stored for all that follow.

    Processes that start together agree: one decides, the others wait for it. The result must be
    plain JSON values. Raises ValueError if the stored file is not what was written, or lacks what
    `kinds` says of the result's values.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    guard = open_lock_file(log_dir / ".choices.lock")
    try:
        fcntl.flock(guard, fcntl.LOCK_EX)
        choices = stored(log_dir)
        if key not in choices:
            choices[key] = json.loads(json.dumps(decide(), allow_nan=False))
            write_json(log_dir / "choices.json", choices)
        for name, kind in kinds.items():
            value = choices[key].get(name)
            if type(value) is not kind or (isinstance(value, int) and kind is int and value < 1):
                raise ValueError(
                    f"{log_dir / 'choices.json'}: {key}: {name}: found {value!r}, which this "
                    "program has not written; delete the file to choose again."
                )
        return choices[key]
    finally:
        os.close(guard)


def stored(log_dir: Path) -> dict[str, dict[str, Any]]:
    """All choices of a log directory so far; raises ValueError for a file that is none of ours."""
    path = log_dir / "choices.json"
    try:
        choices = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): delete it to choose again.") from error
    if not isinstance(choices, dict) or not all(isinstance(v, dict) for v in choices.values()):
        raise ValueError(f"{path}: expected one object per device: delete it to choose again.")
    return choices
