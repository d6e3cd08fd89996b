"""Perplexity: every token once, with known answers, and the same as the exported model's loss."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from src.evaluation import perplexity
from src.evaluation.perplexity import evaluate_split
from src.models.export import export
from tests.evaluation.models import small_transformer

VOCAB = 50


class TableModel:
    """A bigram model: logits of the next token depend on the current one alone."""

    def __init__(self, table: Tensor) -> None:
        self.table = table
        self.tokens_read = 0

    def hidden(self, tokens: Tensor) -> Tensor:
        self.tokens_read += tokens.numel()
        return torch.nn.functional.one_hot(tokens, len(self.table)).to(self.table.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden @ self.table


def corpus(
    lengths: list[int], seed: int = 0, table: Tensor | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Stream and (D, 3) documents of the given text lengths; sampled from a bigram table."""
    rng = np.random.default_rng(seed)
    stream, documents = [], []
    for length in lengths:
        documents.append((len(stream), 4 * length + 1, length // 2))
        stream.append(0)
        for _ in range(length):
            weights = None
            if table is not None:
                weights = torch.softmax(table[stream[-1]].double(), -1).numpy()
            stream.append(int(rng.choice(VOCAB, p=weights)))
    return np.array(stream, dtype=np.uint16), np.array(documents, dtype=np.int64)


def run(model: object, stream: np.ndarray, documents: np.ndarray, **changes: object) -> dict:
    options = {"context": 16, "autocast_dtype": None, "device": "cpu"} | changes
    return evaluate_split(model, stream, documents, **options)  # type: ignore[arg-type]


def test_uniform_model_has_perplexity_v() -> None:
    stream, documents = corpus([70, 3, 16, 17, 1, 33])
    result = run(TableModel(torch.zeros(VOCAB, VOCAB)), stream, documents)
    assert result["perplexity"] == pytest.approx(VOCAB, rel=1e-6)
    assert result["perplexity_nonoverlapping"] == pytest.approx(VOCAB, rel=1e-6)
    assert result["loss"] == pytest.approx(math.log(VOCAB))
    bits = math.log2(VOCAB) * 140 / documents[:, 1].sum()
    assert result["bits_per_byte"] == pytest.approx(bits)
    words = documents[:, 2].sum()
    assert result["word_perplexity"] == pytest.approx(math.exp(math.log(VOCAB) * 140 / words))


def test_bigram_model_gets_its_known_answer() -> None:
    table = 2 * torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0))
    stream, documents = corpus([40, 9, 100, 1, 16], table=table)
    log_p = torch.log_softmax(table.double(), dim=-1).numpy()
    expected = []
    for begin, end in zip(documents[:, 0], [*documents[1:, 0], len(stream)], strict=True):
        expected.append(-sum(log_p[stream[i], stream[i + 1]] for i in range(begin, end - 1)))
    result = run(TableModel(table), stream, documents, batch_tokens=64)
    np.testing.assert_allclose(result["document_nats"], expected, rtol=1e-6)
    assert result["perplexity"] == pytest.approx(math.exp(sum(expected) / 166), rel=1e-6)
    # one token of memory: windows cannot matter
    assert result["perplexity_nonoverlapping"] == pytest.approx(result["perplexity"], rel=1e-6)


def test_scored_tokens_are_the_corpus_without_separators() -> None:
    lengths = [70, 0, 16, 17, 1, 33]
    stream, documents = corpus(lengths)
    result = run(TableModel(torch.zeros(VOCAB, VOCAB)), stream, documents)
    assert result["tokens_scored"] == len(stream) - len(documents) == sum(lengths)
    assert result["document_tokens"].tolist() == lengths
    assert result["document_nats"][1] == 0.0


@given(
    st.integers(0, 300),
    st.integers(1, 40).flatmap(lambda c: st.tuples(st.just(c), st.integers(1, c))),
)
def test_windows_score_every_token_once_with_enough_context(
    length: int, sizes: tuple[int, int]
) -> None:
    context, stride = sizes
    scored = []
    for start, end, first in perplexity.windows(length, context, stride):
        assert 0 <= start < first <= end <= length and end - start <= context
        scored += range(first, end + 1)
        if start > 0:
            assert first - start > context - stride
    assert scored == list(range(1, length + 1))


def test_overlap_gives_a_token_the_context_that_separate_windows_lack() -> None:
    model = small_transformer(VOCAB, 3)
    stream, documents = corpus([100])
    result = run(model, stream, documents, context=8)
    tokens = torch.from_numpy(stream.astype(np.int64))
    nats = {"overlapping": 0.0, "separate": 0.0}
    for target in range(1, 101):
        for kind in nats:
            # overlapping: windows start at multiples of 4; separate ones at multiples of 8
            overlapping, separate = max(0, (target - 5) // 4 * 4), (target - 1) // 8 * 8
            start = overlapping if kind == "overlapping" else separate
            with torch.no_grad():
                logits = model(tokens[None, start:target])[0, -1]
            nats[kind] -= float(torch.log_softmax(logits, -1)[tokens[target]])
    assert result["document_nats"].sum() == pytest.approx(nats["overlapping"], rel=1e-5)
    separate = math.exp(nats["separate"] / 100)
    assert result["perplexity_nonoverlapping"] == pytest.approx(separate, rel=1e-5)
    assert abs(nats["overlapping"] - nats["separate"]) > 1e-3


def test_the_two_readings_share_their_windows() -> None:
    model = TableModel(torch.zeros(VOCAB, VOCAB))
    stream, documents = corpus([16 * 20])
    run(model, stream, documents, batch_tokens=16)
    overlapping = 16 + 38 * 16  # the first window, then every 8 tokens one of 16
    assert model.tokens_read == overlapping


def test_batches_and_order_do_not_matter() -> None:
    model = small_transformer(VOCAB, 3)
    stream, documents = corpus([40, 9, 100, 1, 16])
    alone = run(model, stream, documents, batch_tokens=1)
    together = run(model, stream, documents, batch_tokens=100_000)
    np.testing.assert_allclose(alone["document_nats"], together["document_nats"], rtol=1e-5)
    again = run(model, stream, documents, batch_tokens=100_000)
    assert (again["document_nats"] == together["document_nats"]).all()


def test_autocast_is_near_and_not_float32() -> None:
    model = small_transformer(VOCAB, 3)
    stream, documents = corpus([100, 60])
    exact = run(model, stream, documents)["loss"]
    low = run(model, stream, documents, autocast_dtype=torch.bfloat16)["loss"]
    assert low != exact
    assert low == pytest.approx(exact, rel=2e-2)


def test_agrees_with_the_exported_models_own_loss(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM

    from tests.models import EOT

    vocabulary = {EOT: 0, **{f"t{i}": i for i in range(1, VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=EOT))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    model = small_transformer(VOCAB, 3)
    export(model, tmp_path / "tokenizer.json", tmp_path / "final", max_position_embeddings=64)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    stream, documents = corpus([60])
    tokens = torch.from_numpy(stream.astype(np.int64))[None]
    with torch.no_grad():
        stock_loss = float(stock(tokens, labels=tokens).loss)
    assert run(model, stream, documents, context=64)["loss"] == pytest.approx(stock_loss, abs=1e-5)


def test_training_goes_on_after_an_evaluation() -> None:
    model = small_transformer(VOCAB, 3)
    stream, documents = corpus([40])
    run(model, stream, documents)
    model(torch.zeros(1, 8, dtype=torch.int64)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_blocks_compiled_for_training_are_not_compiled_for_our_shapes() -> None:
    """Each new shape would cost a compilation, and after eight of them a fallback."""
    compiled = []

    def backend(module: torch.fx.GraphModule, inputs: object) -> object:
        compiled.append(module)
        return module.forward

    model = small_transformer(VOCAB, 3)
    stream, documents = corpus([40, 9])
    expected = run(model, stream, documents)["document_nats"]
    for block in model.blocks:
        block.compile(dynamic=False, backend=backend)
    result = run(model, stream, documents)["document_nats"]
    assert (result == expected).all() and not compiled
    with torch.no_grad():
        model(torch.zeros(1, 8, dtype=torch.int64))
    assert compiled  # training's own calls still are


def test_limit_keeps_the_first_whole_documents() -> None:
    model = TableModel(torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0)))
    stream, documents = corpus([40, 9, 100, 1, 16])
    whole = run(model, stream, documents)
    for limit, kept in ((1, 1), (41, 1), (42, 2), (60, 3), (10_000, 5)):
        part = run(model, stream, documents, limit_tokens=limit)
        assert part["documents"] == kept
        np.testing.assert_allclose(part["document_nats"], whole["document_nats"][:kept])


def test_diverged_weights_are_an_error() -> None:
    stream, documents = corpus([40])
    with pytest.raises(ValueError, match="not finite"):
        run(TableModel(torch.full((VOCAB, VOCAB), math.nan)), stream, documents)


def test_word_perplexity_is_missing_where_there_are_no_words() -> None:
    stream, documents = corpus([1])
    assert documents[0, 2] == 0
    result = run(TableModel(torch.zeros(VOCAB, VOCAB)), stream, documents)
    assert result["word_perplexity"] is None
