"""A run that trains a little and pushes it, and what must hold in a store."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from pyarrow import fs

from src.storage.checkpoint import save
from src.storage.remote import Remote, Timing
from src.storage.run_dir import RunDir

DIGESTS = {"config": "c1", "tokenizer": "t1", "data": "d1"}


FAST = Timing(
    heartbeat_s=0.2,
    stale_s=30.0,
    settle_s=0.05,
    backoff_s=0.05,
    backoff_max_s=0.2,
    request_timeout_s=1.0,
    connect_timeout_s=1.0,
)


def state_of(step: int) -> dict:
    generator = torch.Generator().manual_seed(step)
    return {"w": torch.randn(64, 32, generator=generator), "cursor": step}


def train(run: RunDir, step: int, remote: Remote | None = None) -> None:
    """What the loop does at a checkpoint: rows, sync, save, push."""
    run.append({"step": step, "kind": "train", "train_loss": 1.0 / step})
    run.sync()

    def on_saved(object_path: Path, manifest_path: Path) -> None:
        if remote is not None:
            remote.push(object_path, manifest_path, run.metrics_path)

    save(
        run.checkpoints,
        state_of(step) | {"offset": run.offset()},
        step=step,
        digests=DIGESTS,
        environment={"threads": 1},
        on_saved=on_saved,
    )


def same_files(a: RunDir, b: RunDir, step: int) -> bool:
    """Whether the checkpoint of `step` and the metrics are the same bytes in both."""
    names = [p.name for p in a.checkpoints.iterdir() if p.name.startswith(f"step-{step:08d}")]
    files = [f"checkpoints/{name}" for name in names] + ["metrics.jsonl"]
    return len(names) == 2 and all(
        (a.path / name).read_bytes() == (b.path / name).read_bytes() for name in files
    )


def check_store(file_system: fs.FileSystem, base: str) -> list[int]:
    """Assert that every manifest has its object and metrics, whole; returns the steps."""
    steps = []
    for info in file_system.get_file_info(fs.FileSelector(f"{base}/manifests", True, True)):
        if not info.path.endswith(".json"):
            continue
        content = json.loads(file_system.open_input_stream(info.path).read())
        for key, sha256 in (
            (content["object"], content["manifest"]["sha256"]),
            (content["metrics"], content["metrics_sha256"]),
        ):
            data = file_system.open_input_stream(f"{base}/{key}").read()
            assert hashlib.sha256(data).hexdigest() == sha256
        steps.append(content["manifest"]["step"])
    return sorted(steps)
