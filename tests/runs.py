"""Runs trained in process, and what they leave, read so that two can be compared."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from src import train
from src.compute.compute_config import ComputeConfig
from src.data import tokens as data
from src.evaluation import metrics as record
from src.preflight import RunContext
from src.spec import allocation, config
from src.spec.config import RunConfig
from src.storage.run_dir import RunDir, read_rows
from src.train import Outcome

CPU = ComputeConfig(
    device=torch.device("cpu"), precision="fp32", micro_batch=8, compile=False, threads=1
)


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


class Lab:
    """Trains the tiny sweep's experiments in process, in directories of its own."""

    outcome: Outcome  # of the run that a fixture trained

    def __init__(self, sweep_file: Path, log_dir: Path) -> None:
        self.sweep_file, self.log_dir = sweep_file, log_dir

    def plan(self, name: str = "base", *overrides: str) -> tuple[RunConfig, Any, Any, Any]:
        sweep = config.load_sweep(self.sweep_file, overrides)
        self.answers = allocation.allocate(
            {run.experiment: run.model for run in sweep.runs}, sweep.baseline
        )
        run = sweep.run(name, 0)
        return run, self.answers[name], sweep, data.load(run.token_dir, run.model.vocab_size)

    def train(
        self, name: str = "base", *overrides: str, compute: ComputeConfig = CPU, under: str = "logs"
    ) -> Outcome:
        run, answer, sweep, tokens = self.plan(name, *overrides)
        resolved, digest = record.resolved(run, self.answers, sweep, tokens)
        with RunDir.open(self.log_dir / under, run.run_name) as directory:
            directory.claim_config(resolved, digest)
            context = self.context(run, sweep, tokens)
            return train.train(context, directory, compute, record.digests(digest, tokens))

    def context(self, run: RunConfig, sweep: Any, tokens: Any) -> RunContext:
        return RunContext(
            run=run, sweep=sweep, allocations=self.answers, data=tokens, log_dir=self.log_dir,
            device="cpu",
        )  # fmt: skip

    def path(self, name: str = "base", under: str = "logs") -> Path:
        return self.log_dir / under / name

    def rows(self, name: str = "base", under: str = "logs") -> list[dict[str, Any]]:
        return rows(self.path(name, under))

    def state(self, name: str = "base", under: str = "logs") -> dict[str, Any]:
        return newest_state(self.path(name, under))
