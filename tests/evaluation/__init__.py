"""SmallBench tasks and rows made here."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from src.data.tasks import Task


def write_rows(directory: Path, name: str, rows: list[dict[str, Any]], **source: str) -> None:
    """What the download leaves: one JSON line a row, and its entry in source.json."""
    directory.mkdir(exist_ok=True)
    lines = [json.dumps({**row, "_row": row.get("_row", i)}) + "\n" for i, row in enumerate(rows)]
    data = "".join(lines).encode()
    (directory / f"{name}.jsonl").write_bytes(data)
    path = directory / "source.json"
    manifest = json.loads(path.read_text()) if path.exists() else {"tasks": {}, "mirror": True}
    entry = {"rows": len(rows), "sha256": hashlib.sha256(data).hexdigest()}
    manifest["tasks"][name] = entry | source
    path.write_text(json.dumps(manifest))


def make_task(**changes: Any) -> Task:
    values: dict[str, Any] = {
        "name": "toy", "path": "me/toy", "config": "default", "split": "test",
        "prompt": "{{ q }}", "choices": ("a", "b"), "gold": "{{ label }}",
    }  # fmt: skip
    return Task(**(values | changes))


def toy_rows(count: int, classes: int = 2) -> list[dict[str, Any]]:
    return [{"q": f"item {i} is", "label": i % classes} for i in range(count)]
