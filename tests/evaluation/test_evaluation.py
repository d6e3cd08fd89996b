"""What an evaluation was over stands beside its numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from src.compute.compute_config import ComputeConfig
from src.data import tokens as data
from src.evaluation import evaluate as evaluation
from src.models.transformer import Transformer
from src.spec import config
from src.spec.config import ModelConfig
from tests.evaluation import toy_rows, write_rows

TASKS = """\
tasks:
- {name: toy, path: p, config: c, split: s, prompt: '{{ q }}', choices: [a, b], gold: '{{ label }}'}
- {name: elsewhere, path: p, config: c, split: s, prompt: x, choices: [a, b], gold: '0',
   only_in_mirror: true}
"""


def measure(run: config.RunConfig, path: Path) -> tuple[dict[str, Any], data.TokenData]:
    """An untrained model of `run` on its tokens, and what is measured of it."""
    tokens = data.load(run.token_dir, run.model.vocab_size)
    torch.manual_seed(0)
    sizes = {"d_model": 16, "n_layers": 1, "n_heads": 2, "head_dim": 8, "d_ff": 16}
    model = Transformer(ModelConfig(vocab_size=run.model.vocab_size, **sizes))
    compute = ComputeConfig(
        device=torch.device("cpu"), precision="fp32", micro_batch=8, compile=False, threads=1
    )
    path.mkdir(exist_ok=True)
    return evaluation.evaluate(run, model, tokens, compute, path), tokens


@pytest.mark.parametrize("limit", [4, None])
def test_tokens_tasks_and_limit_are_recorded(
    tmp_path: Path, tiny_sweep: Path, limit: int | None
) -> None:
    tmp_path = tmp_path / "run"
    tmp_path.mkdir()
    write_rows(tmp_path / "bench", "toy", toy_rows(10))
    (tmp_path / "tasks.yaml").write_text(TASKS)
    settings = {
        "metrics": "[perplexity, smallbench_accuracy]",
        "smallbench_dir": tmp_path / "bench",
        "smallbench_tasks": tmp_path / "tasks.yaml",
        "smallbench_limit": limit or "null",
        "perplexity_tokens": 500 if limit else "null",
    }
    overrides = [f"evaluation.{key}={value}" for key, value in settings.items()]
    run = config.load_sweep(tiny_sweep, overrides).run("base", 0)
    metrics, tokens = measure(run, tmp_path)
    assert metrics["smallbench_tasks"] == 1
    assert metrics["smallbench_missing_tasks"] == "elsewhere"
    assert metrics["smallbench_limit"] == limit
    assert metrics["smallbench_items"] == (limit or 10) and metrics["smallbench_chance"] == 0.5
    assert 0 <= metrics["smallbench_untrained_accuracy"] <= 1
    (cached,) = (tmp_path.parent / "untrained").glob("*.json")
    stored = json.loads(cached.read_bytes())
    assert stored["accuracy"] == metrics["smallbench_untrained_accuracy"]
    assert metrics["smallbench"]["toy"]["n"] == (limit or 10)
    # No leakage report of this corpus is there.
    assert metrics["smallbench_contaminated_items"] is None
    assert metrics["smallbench"]["toy"]["contaminated"] is None
    for prefix, split in (("dev", tokens.validation), ("test", tokens.test)):
        whole = len(split.tokens) - len(split.documents)
        scored = metrics[f"{prefix}_tokens_scored"]
        assert scored == whole if limit is None else 400 < scored < whole


def test_blimp_is_scored_whole_and_the_untrained_model_once(
    tmp_path: Path, tiny_sweep: Path
) -> None:
    """Every row of its tasks beside the list's own choice; what is stored is not measured again."""
    bench, path = tmp_path / "bench", tmp_path / "run"
    for name in ("one", "two"):
        write_rows(bench, name, toy_rows(12))
    entry = (
        "- {{name: {0}, group: g, path: nyu-mll/blimp, config: c, split: s, n: 3,\n"
        "   prompt: '{{{{ q }}}}', choices: [a, b], gold: '{{{{ label }}}}'}}\n"
    )
    (tmp_path / "tasks.yaml").write_text("tasks:\n" + entry.format("one") + entry.format("two"))
    settings = [
        "metrics=[smallbench_accuracy]", f"smallbench_dir={bench}", "blimp_full=true",
        f"smallbench_tasks={tmp_path / 'tasks.yaml'}", "latency=false",
    ]  # fmt: skip
    overrides = [f"evaluation.{setting}" for setting in settings]
    run = config.load_sweep(tiny_sweep, overrides).run("base", 0)
    metrics, _ = measure(run, path)
    assert (metrics["smallbench_items"], metrics["blimp_items"]) == (6, 24)
    assert 0 <= metrics["blimp_accuracy"] <= 1 and metrics["blimp_accuracy_se"] > 0
    (cached,) = (tmp_path / "untrained").glob("*.json")
    cached.write_text('{"accuracy": 0.25}')
    metrics, _ = measure(run, path)
    assert metrics["smallbench_untrained_accuracy"] == 0.25


def test_an_outside_corpus_is_read_as_the_runs_own_is(tmp_path: Path, tiny_sweep: Path) -> None:
    """Its own corpus given as the outside one: the same documents, so the same numbers."""
    corpus = tiny_sweep.parent / "corpus"
    overrides = ["evaluation.metrics=[perplexity]", f"evaluation.outside_dir={corpus}"]
    run = config.load_sweep(tiny_sweep, overrides).run("base", 0)
    metrics, tokens = measure(run, tmp_path)
    for name in ("validation", "test"):
        outside = data.outside_split(corpus, name, tokens.tokenizer_path, tokens.eot_id)
        own = getattr(tokens, name)
        assert outside.tokens.tolist() == own.tokens.tolist()
        assert outside.documents.tolist() == own.documents.tolist()
    assert metrics["outside_corpus"] == "tests/tiny:default"
    for split in ("dev", "test"):
        for key in ("bits_per_byte", "word_perplexity", "tokens_scored"):
            assert metrics[f"outside_{split}_{key}"] == metrics[f"{split}_{key}"]
    assert (tmp_path / "documents_outside_test.npz").is_file()


def test_an_outside_corpus_that_is_none_is_refused(tmp_path: Path, tiny_sweep: Path) -> None:
    with pytest.raises(ValueError, match="evaluation.outside_dir: .* expected a whole corpus"):
        data.outside_texts(tmp_path, "test")
    (tmp_path / "source.json").write_text('{"splits": {"test": {"sha256": "0"}}}')
    (tmp_path / "test.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match="found no sound split 'test'"):
        data.outside_split(tmp_path, "test", tmp_path / "tokenizer.json", 0)
