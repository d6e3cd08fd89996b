"""The whole pipeline against a number known in closed form: the generated language's entropy."""

from __future__ import annotations

import json
from pathlib import Path

from tests import run_main
from tests.data import run

SWEEP = """
model: {total_params: 99_200, vocab_size: 330, embedding_ratio: 0.15}
experiments: [{name: probe}]
training:
  {tokens: 204_800, batch_size: 16, seq_len: 64, learning_rate: 1e-2, precision: fp32, threads: 1,
   eval_every_tokens: 102_400}
data: {dir: TOKENS}
evaluation: {metrics: [perplexity], latency: false}
"""


def test_the_harness_approaches_the_entropy_rate_and_never_beats_it(tmp_path: Path) -> None:
    """Two bounds from theory, in bits per byte of the test split.

    Below: nothing beats the language on average, so at most 4 standard errors under its entropy.
    Above: a model that learns the transitions closes the gap between the entropy of single words
    and the entropy rate; this one must close nine tenths of it. A harness that scored the wrong
    tokens, or fewer, or leaked the future, would leave that band.
    """

    sizes = ("--lexicon", 32, "--successors", 4, "--documents", 1500)
    run("make_corpus.py", "--output", tmp_path / "corpus", *sizes)
    corpus, tokens = tmp_path / "corpus", tmp_path / "tokens"
    run("preprocess_lm.py", "--input", corpus, "--vocab_size", 330, "--output", tokens)
    (tmp_path / "sweep.yaml").write_text(SWEEP.replace("TOKENS", str(tokens)))
    arguments = ("--config", tmp_path / "sweep.yaml", "--exp", "probe", "--device", "cpu")
    assert run_main(*arguments, "--log_dir", tmp_path / "logs") == 0

    source = json.loads((tmp_path / "corpus/source.json").read_text())
    test = source["splits"]["test"]
    metrics = json.loads((tmp_path / "logs/probe/metrics.json").read_text())
    entropy = test["entropy_bits"] / test["bytes"]
    single_words = source["entropy_bits_first_word"] * test["words"] / test["bytes"]
    # A word's -log2 p lies between 0 and the first word's entropy: its sd is below half of that.
    standard_error = 0.5 * source["entropy_bits_first_word"] * test["words"] ** 0.5 / test["bytes"]
    assert metrics["test_bits_per_byte"] > entropy - 4 * standard_error
    assert metrics["test_bits_per_byte"] < entropy + 0.1 * (single_words - entropy)
