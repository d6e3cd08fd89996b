"""The scorer: what is read together, and by which code, changes no score beyond rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from src.compute.compiler import compiler
from src.evaluation import scoring
from src.evaluation.scoring import score_positions
from src.models.transformer import Transformer
from tests.evaluation.models import small_transformer

VOCAB = 40
MODEL = small_transformer(VOCAB)


def alone(row: np.ndarray, position: int, target: int) -> tuple[float, bool]:
    """The reference: the row's beginning read by itself, all logits, one log-softmax."""
    with torch.no_grad():
        logits = MODEL(torch.from_numpy(row[: position + 1].astype(np.int64))[None])[0, -1]
    return -float(torch.log_softmax(logits, -1)[target]), int(logits.argmax()) == target


def scored(rows: list[np.ndarray], queries: np.ndarray, **options: object):
    options = {"device": "cpu", "autocast_dtype": None, "greedy": True} | options
    return score_positions(MODEL, rows, queries, **options)  # type: ignore[arg-type]


def questions(seed: int, prompts: int, choices: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Rows of a few prompts with several endings each, some as long as one token or all equal, and
    every position of the endings asked about, and the last of the prompt twice."""
    rng = np.random.default_rng(seed)
    rows, queries = [], []
    for _ in range(prompts):
        prompt = rng.integers(0, VOCAB, rng.integers(1, 30))
        for _ in range(choices):
            rows.append(np.append(prompt, rng.integers(0, 3, rng.integers(1, 9))).astype(np.uint16))
            first = len(prompt) - 1
            for position in (first, *range(first, len(rows[-1]))):
                queries.append((len(rows) - 1, position, rng.integers(VOCAB)))
    return rows, np.array(queries, dtype=np.int64)


@settings(max_examples=12)
@given(
    st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 6), st.sampled_from([16, 96, 4096])
)
def test_a_score_depends_on_nothing_but_its_row(
    seed: int, prompts: int, choices: int, batch_tokens: int
) -> None:
    """Shared beginnings, padding, parts and batches of every size against each row read alone."""
    rows, queries = questions(seed, prompts, choices)
    nats, greedy = scored(rows, queries, share_prefixes=True, batch_tokens=batch_tokens)
    for (row, position, target), score, hit in zip(queries, nats, greedy, strict=True):
        expected_score, expected_hit = alone(rows[row], position, target)
        assert score == pytest.approx(expected_score, abs=1e-4)
        assert hit == expected_hit


def test_what_rows_begin_with_is_read_once() -> None:
    prompt = np.arange(20, dtype=np.uint16)
    rows = [np.append(prompt, np.array(end, dtype=np.uint16)) for end in ([1], [2, 3], [2, 4, 5])]
    queries = np.array([(i, len(row) - 1, 7) for i, row in enumerate(rows)], dtype=np.int64)
    read: list[tuple[int, ...]] = []

    class Counting(Transformer):
        def hidden(self, tokens, cache=None):  # type: ignore[no-untyped-def]
            read.append(tuple(tokens.shape))
            return super().hidden(tokens, cache)

    model = Counting(MODEL.config)
    model.load_state_dict(MODEL.state_dict())
    options = {"device": "cpu", "autocast_dtype": None}
    shared, _ = score_positions(model, rows, queries, share_prefixes=True, **options)  # type: ignore[arg-type]
    assert read == [(1, 20), (3, 3)]
    read.clear()
    apart, _ = score_positions(model, rows, queries, **options)  # type: ignore[arg-type]
    assert read == [(3, 23)]
    np.testing.assert_allclose(shared, apart, atol=1e-5)


def test_a_position_costs_one_row_of_logits() -> None:
    rows = [np.arange(5, dtype=np.uint16)]
    queries = np.array([(0, 4, target) for target in range(VOCAB)], dtype=np.int64)
    counted: list[int] = []

    class Counting(Transformer):
        def logits(self, hidden):  # type: ignore[no-untyped-def]
            counted.append(len(hidden))
            return super().logits(hidden)

    model = Counting(MODEL.config)
    model.load_state_dict(MODEL.state_dict())
    nats, greedy = score_positions(
        model, rows, queries, device="cpu", autocast_dtype=None, greedy=True
    )
    assert counted == [1] and greedy.sum() == 1
    assert np.exp(-nats.astype(np.float64)).sum() == pytest.approx(1.0, abs=1e-5)
    assert greedy.argmax() == nats.argmin()


def test_the_first_of_equal_logits_is_the_greedy_one() -> None:
    logits = torch.zeros(1, 5)
    logits[0, [1, 3]] = 2.0
    place = torch.zeros(5, dtype=torch.int64)
    hits = scoring._is_best(logits, place, torch.arange(5))
    assert hits.tolist() == [False, True, False, False, False]


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
def test_compiled_blocks_read_the_full_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16, where training has compiled; rows of other lengths are read by eager code."""
    monkeypatch.setattr(scoring, "COMPILED_BATCHES", 1)
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, VOCAB, size).astype(np.uint16) for size in (16, 16, 16, 16, 9)]
    queries = np.array([(i, p, 3) for i, r in enumerate(rows) for p in range(len(r))], np.int64)
    options = {"autocast_dtype": torch.bfloat16, "batch_tokens": 32, "greedy": False}
    expected, _ = scored(rows, queries, **options)
    model = small_transformer(VOCAB)
    for block in model.blocks:
        block.compile(dynamic=False)
    compiled, _ = score_positions(model, rows, queries, device="cpu", **options)  # type: ignore[arg-type]
    assert np.abs(compiled - expected).max() < 0.3  # roundings of bfloat16 between fused operations
    assert 0 < np.abs(compiled[:64] - expected[:64]).mean() < 0.03
    assert (compiled[64:] == expected[64:]).all()
