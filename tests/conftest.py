"""A tiny corpus, its tokens, a sweep file on them, and runs that several tests look at."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests import ROOT, python, run_main

VOCAB = 300
TEXT = [
    "The café's 12 owls sleep; the river runs on and on.",
    "A naïve question:\nhow  many tokens is this?  ",
    "numbers 3.14 and words, words, words",
] * 20

# Seeded: a property test tries the same cases every time.
settings.register_profile("seeded", derandomize=True, deadline=None)
settings.load_profile("seeded")

# 70,000 parameters (2 or 3 layers of width 48); 20 steps of 8 x 32 tokens, a dev check every 5.
SWEEP = """\
model:
  total_params: 70_000
  vocab_size: 300
  embedding_ratio: 0.206
experiments:
  - name: base
    glu_expansion: 2.66
  - name: deep
    glu_expansion: 1.5
  - name: idle
    glu_expansion: 2.66
    training:
      learning_rate: 1e-7
training:
  tokens: 5_120
  batch_size: 8
  seq_len: 32
  eval_every_tokens: 1_280
  dev_tokens: 640
  threads: 1
  precision: fp32
data:
  dir: {tokens}
evaluation:
  metrics: [perplexity]
  latency: false
"""


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Sums depend on the number of threads; children are pinned by their environment."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # no pool of compiling processes
    torch.set_num_threads(1)


def _texts(rng: random.Random, count: int) -> list[str]:
    words = ["".join(rng.choices("abcdeimnorst", k=rng.randint(1, 7))) for _ in range(60)]
    return [" ".join(rng.choices(words, k=rng.randint(40, 90))) for _ in range(count)]


@pytest.fixture(scope="session")
def token_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for `data.dir` with tokens of 300 entries; not to be written to."""
    root = tmp_path_factory.mktemp("tiny")
    corpus = root / "corpus"
    corpus.mkdir()
    rng = random.Random(0)
    splits = {}
    for split, count in (("train", 60), ("validation", 12), ("test", 8)):
        texts = _texts(rng, count)
        path = corpus / f"{split}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        splits[split] = {
            "documents": count,
            "bytes": sum(len(text.encode()) for text in texts),
            "words": sum(len(text.split()) for text in texts),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
    source = {
        "dataset": "tests/tiny", "config": "default", "revision": None, "mirror": False,
        "licence": "CC0", "splits": splits,
    }  # fmt: skip
    (corpus / "source.json").write_text(json.dumps(source))
    arguments = ("--input", corpus, "--vocab_size", VOCAB, "--output", root / "tokens")
    assert python("scripts/preprocess_lm.py", *arguments).returncode == 0
    return root / "tokens"


@pytest.fixture(scope="session")
def tiny_sweep(token_root: Path) -> Path:
    """The experiment file above on the tiny tokens; not to be written to."""
    path = token_root.parent / "tiny.yaml"
    path.write_text(SWEEP.format(tokens=token_root))
    return path


@pytest.fixture(scope="session")
def finished(tiny_sweep: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log directory of a finished `base`; not to be written to."""
    logs, printed = tmp_path_factory.mktemp("finished") / "logs", io.StringIO()
    with contextlib.redirect_stdout(printed):
        arguments = ("--config", tiny_sweep, "--exp", "base", "--log_dir", logs)
        assert run_main(*arguments, "--device", "cpu") == 0
    assert "70,000 parameters" in printed.getvalue() and "dev perplexity" in printed.getvalue()
    return logs


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    return tmp_path / "logs"


@pytest.fixture
def copied(finished: Path, logs: Path) -> Path:
    """A finished `base` below `logs`, to be written to."""
    shutil.copytree(finished, logs)
    return logs / "base"


@pytest.fixture
def start(tiny_sweep: Path, logs: Path) -> Callable[..., int]:
    """start("key=value", ...): `run_experiment.py --exp base --set key=value ...` in this process;
    `arguments` are further ones. Returns the exit code."""

    def call(
        *overrides: str,
        exp: Sequence[str] = ("base",),
        log_dir: Path = logs,
        sweep: Path = tiny_sweep,
        arguments: Sequence[Any] = (),
    ) -> int:
        line: list[Any] = ["--config", sweep, "--log_dir", log_dir, "--device", "cpu"]
        line += ["--exp", *exp] if exp else []
        line += ["--set", *overrides] if overrides else []
        return run_main(*line, *arguments)

    return call


@pytest.fixture(scope="session")
def run_cli() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`python run_experiment.py ...` in a child; warnings are errors there too, but on a GPU's
    machine, whose libraries are not ours."""
    strict = "default" if os.environ.get("TEST_DEVICE", "cpu") != "cpu" else "error"

    def run(
        *arguments: Any, code: int | None = 0, cwd: Path = ROOT, **env: str
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-W", strict, str(ROOT / "run_experiment.py"), *map(str, arguments)],
            cwd=cwd, capture_output=True, text=True, timeout=120,
            env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        )  # fmt: skip
        assert code is None or done.returncode == code, done.stdout + done.stderr
        return done

    return run


@pytest.fixture(scope="session")
def tokenizer_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path
