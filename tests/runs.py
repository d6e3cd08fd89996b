"""What a run leaves, read so that two runs can be compared."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from src.storage.run_dir import read_rows


def timeless(row: dict[str, Any]) -> dict[str, Any]:
    """A row of metrics.jsonl without what clocks and memory meters say."""
    return {key: v for key, v in row.items() if not key.endswith(("_s", "_mib", "_percent"))}


def rows(run: Path) -> list[dict[str, Any]]:
    return [timeless(row) for row in read_rows(run / "metrics.jsonl")]


def metrics(run: Path) -> dict[str, Any]:
    return json.loads((run / "metrics.json").read_text())


def newest_state(run: Path) -> dict[str, Any]:
    """The newest checkpoint's content but for clocks and the byte offset that they move."""
    manifest = json.loads(sorted((run / "checkpoints").glob("step-*.json"))[-1].read_text())
    state = torch.load(run / "checkpoints" / manifest["file"], weights_only=True)
    clocks = ("seconds", "metrics_offset", "peak_memory_mib")
    return {key: v for key, v in state.items() if key not in clocks}


def assert_same(ours: Any, theirs: Any, where: str = "state") -> None:
    """Equal to the last bit, tensors inside nested dicts and lists included."""
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), where
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_same(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(a, b, f"{where}[{index}]")
    else:
        assert ours == theirs, where


def fingerprint(folder: Path) -> dict[str, str]:
    """Hashes of all files below a folder, but for locks."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith("lock")
    }
