"""The throughput benchmark: what it writes as it goes, and an older build as a peer."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import child, record, throughput
from benchmarks.plain_model import PlainModel
from src.models.transformer import Transformer
from src.spec.config import ModelConfig


class Steady:
    """An invented peer that always takes as long."""

    def __init__(self, seconds: float) -> None:
        self.taken, self.closed = seconds, False

    def receive(self) -> dict[str, Any]:
        return {"ready": {"first_step_seconds": 1.0}}

    def seconds(self, steps: int) -> float:
        return self.taken * steps

    def close(self) -> float:
        return 100.0


def test_every_turn_is_told_at_once() -> None:
    turns: list[dict[str, Any]] = []

    def keep(rows: dict[str, dict[str, Any]]) -> None:
        turns.append(json.loads(json.dumps(rows)))

    peers: Any = {"ours": Steady(1.0), "base": Steady(1.5)}
    rows = throughput.compare(peers, turns=4, steps=2, tokens=600, seconds=60, on_turn=keep)
    assert [len(rows["base"]["tokens_per_s_turns"]) for rows in turns] == [1, 2, 3, 4, 4]
    assert rows["ours"]["tokens_per_s"] == 300 and rows["base"]["ours_over_it"] == 1.5
    assert "peak_mib" not in turns[0]["ours"] and rows["ours"]["peak_mib"] == 100


def test_no_turn_begins_after_the_time_is_up() -> None:
    peers: Any = {"ours": Steady(1.0)}
    rows = throughput.compare(peers, turns=9, steps=1, tokens=1, seconds=-1, on_turn=lambda _: None)
    assert len(rows["ours"]["tokens_per_s_turns"]) == throughput.LEAST_TURNS


def test_a_table_of_turns_that_are_not_over(tmp_path: Path) -> None:
    row = {
        "tokens_per_s": 3_000.0, "ours_over_it": 1.0, "ours_over_it_range": [1.0, 1.0],
        "micro_batch": 16, "first_step_seconds": 5.0,
    }  # fmt: skip
    text = throughput.table({"emb35": {"peers": {"ours": row}}})
    assert "| emb35 | ours | 3,000 |" in text
    record.write(tmp_path / "a.json", {"load": 1}, {"cells": {}}, title="T", text=text)
    assert json.loads((tmp_path / "a.json").read_text()) == {"load": 1, "cells": {}}
    assert "- load: 1" in (tmp_path / "a.md").read_text()


def test_the_plain_peer_computes_the_same_logits() -> None:
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=50, d_model=16, n_layers=2, n_heads=2, head_dim=8, d_ff=24)
    model, plain = Transformer(config), PlainModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    names = {"table": "weight", "attention_norm": "norm1", "ffn_norm": "norm2", "attention.": "",
             "ffn.": ""}  # fmt: skip
    weights = {}
    for name, value in model.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        weights[name] = value
    plain.load_state_dict(weights)
    tokens = torch.randint(50, (2, 9))
    torch.testing.assert_close(plain.logits(tokens), model(tokens))


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of two commits whose peers answer with the text of their commit."""
    code = """
from dataclasses import dataclass
@dataclass
class ModelConfig:
    width: int
@dataclass
class Work:
    model: ModelConfig
def peer(connection, name, work):
    connection.send({"ready": [TEXT, name, work.model.width]})
"""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q", "-b", "main"], check=True)
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").touch()
    for text in ("'old'", "'new'"):
        (tmp_path / "benchmarks" / "peers.py").write_text(code.replace("TEXT", text))
        subprocess.run([*git, "add", "-A"], check=True)
        subprocess.run([*git, "commit", "-q", "-m", text], check=True)
    monkeypatch.setattr(child, "ROOT", tmp_path)
    return tmp_path


def test_an_older_build_runs_its_own_code(repository: Path) -> None:
    work = throughput.Work(
        model=throughput.ModelConfig(
            vocab_size=300, d_model=16, n_layers=2, n_heads=1, head_dim=16, d_ff=40
        ),
        device="cpu", precision="fp32", compile=False, threads=1, batch_size=4, seq_len=8,
        micro_batch=4,
    )  # fmt: skip
    peers = repository / "benchmarks" / "peers.py"
    peers.write_text(peers.read_text().replace("width: int", "d_model: int").replace(
        "model.width", "model.d_model"))  # fmt: skip
    one = child.Child("ours", work, repository)
    assert one.receive()["ready"] == ["new", "ours", 16]
    one.kill()
    with child.clone("main~1") as (root, commit):
        assert len(commit) == 40 and "'old'" in (root / "benchmarks" / "peers.py").read_text()
    assert not root.exists()
    with pytest.raises(ValueError, match="--base: found 'nowhere', expected a commit"):
        with child.clone("nowhere"):
            pass
