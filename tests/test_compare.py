"""python -m src.analysis.compare: the paired comparison of finished runs, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from src.analysis import compare
from src.spec.command_line import BAD_INPUT, OK

DOCUMENTS = 40


def write_run(path: Path, seed: int, gain: float = 0.0, tokenizer: str = "a" * 64) -> Path:
    """A finished run whose documents cost `gain` nats a token less than 5."""
    rng = np.random.default_rng(seed)
    tokens = np.arange(100, 100 + DOCUMENTS)
    noise = np.random.default_rng(99).normal(0, 0.2, DOCUMENTS) + rng.normal(0, 0.001)
    path.mkdir(parents=True)
    np.savez(path / "documents_test.npz", document_nats=tokens * (5 - gain + noise),
             document_tokens=tokens, document_bytes=4 * tokens)  # fmt: skip
    (path / "metrics.json").write_text(json.dumps({"seed": seed, "tokenizer_sha256": tokenizer}))
    return path


@pytest.mark.parametrize("measure", ["perplexity", "bits_per_byte"])
def test_a_known_gain_is_found(tmp_path: Path, measure: str, capsys) -> None:
    theirs = [write_run(tmp_path / f"a{seed}", seed) for seed in (0, 1, 2)]
    ours = [write_run(tmp_path / f"b{seed}", seed, gain=0.1) for seed in (0, 1, 2)]
    arguments = ["--baseline", *theirs, "--ours", *ours, "--measure", measure, "--json"]
    assert compare.main([str(a) for a in arguments]) == OK
    found = json.loads(capsys.readouterr().out)
    truth = 100 * (np.exp(-0.1) - 1) if measure == "perplexity" else -2.0
    assert found["percent"] == pytest.approx(truth, abs=0.15)
    assert found["low_percent"] <= found["percent"] <= found["high_percent"] < 0
    assert (found["seeds"], found["documents"], found["verdict"]) == (3, DOCUMENTS, "different")


def test_what_does_not_compare_is_refused(tmp_path: Path, capsys) -> None:
    base = write_run(tmp_path / "base", 0)
    other_seed = write_run(tmp_path / "seed", 1)
    other_tokens = write_run(tmp_path / "tokens", 0, tokenizer="b" * 64)
    (tmp_path / "cut").mkdir()
    for ours, says in (
        (other_seed, "expected the baseline's [0]"),
        (other_tokens, "token perplexities of two tokenizers cannot be compared"),
        (tmp_path / "cut", "expected a finished run"),
    ):
        assert compare.main(["--baseline", str(base), "--ours", str(ours)]) == BAD_INPUT
        assert says in capsys.readouterr().err
    arguments = ["--baseline", str(base), "--ours", str(other_tokens)]
    assert compare.main([*arguments, "--measure", "bits_per_byte"]) == OK
    assert compare.main(["--baseline", str(base), "--ours", str(other_seed), "--unpaired"]) == OK
