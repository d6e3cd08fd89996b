"""Perplexity and its tokenizer-free relatives, over whole documents.

Shapes: Q scored targets, D documents. Nats everywhere; bits only in the last division.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Unpack

import numpy as np
import torch
from numpy.typing import NDArray

from src.evaluation.scoring import IntArray, LanguageModel, Reading, score_positions

FloatArray = NDArray[np.float64]


# ---------------------------------------------------------------------------------- pure numbers


def perplexity(nats: float, count: int) -> float:
    """exp(nats per token), comparable between models of one tokenizer only; or per whitespace word,
    comparable across tokenizers."""
    assert count > 0
    mean = nats / count
    return math.exp(mean) if mean < 700 else math.inf  # e^709 is the largest float


# ------------------------------------------------------------------------------------- documents


def windows(length: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Windows over a text of `length` tokens after one token that is context only.

    Yields (start, end, first): inputs start..end-1 are read and targets first..end scored, where
    target t is read at t - 1. Every target 1..length is scored exactly once; after the first
    window each has at least context - stride tokens before it. stride = context does not overlap.
    """
    assert 0 < stride <= context
    start, first = 0, 1
    while first <= length:
        end = min(start + context, length)
        yield start, end, first
        start, first = start + stride, end + 1


def score_documents(
    model: LanguageModel,
    tokens: NDArray[np.uint16],
    offsets: IntArray,
    *,
    context: int,
    **reading: Unpack[Reading],
) -> tuple[FloatArray, FloatArray, IntArray]:
    """Nats (D,) with overlapping windows, nats (D,) without, and scored tokens (D,).

    Document i is tokens[offsets[i]:offsets[i + 1]] (`offsets` is (D + 1,)); its first token is
    the separator, which is read and never scored. With a stride of half the context most windows
    of the second reading are windows of the first, so the pair costs little more than one.
    """
    plan = _WindowPlan()
    for begin, end in zip(offsets[:-1], offsets[1:], strict=True):
        plan.add(int(begin), int(end - begin) - 1, context)
    rows = [tokens[start:end] for start, end in plan.rows]
    queries = plan.queries(tokens)
    nats, _ = score_positions(model, rows, queries, **reading)
    if not np.isfinite(nats).all():
        raise ValueError(
            "the model's log-probabilities: found values that are not finite numbers, expected "
            "numbers; the weights have diverged, or need a wider precision than "
            f"{reading['autocast_dtype'] or torch.float32}"
        )
    readings = [plan.gather(nats, r, int(offsets[-1])) for r in (plan.overlapping, plan.separate)]
    counts = np.diff(offsets) - 1
    assert all(np.isfinite(reading).sum() == counts.sum() for reading in readings)
    # The separator's NaN counts nothing, so that no document is empty.
    sums = [np.add.reduceat(np.nan_to_num(reading), offsets[:-1]) for reading in readings]
    return sums[0], sums[1], counts


class _WindowPlan:
    """Windows of all documents, each read once though two readings may use it."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, int]] = []
        self.lowest: list[int] = []  # first target that any reading scores in the row
        self.overlapping: list[tuple[int, int]] = []  # (row, first target it scores)
        self.separate: list[tuple[int, int]] = []

    def add(self, begin: int, length: int, context: int) -> None:
        stride = max(1, context // 2)
        known: dict[int, int] = {}
        for size, reading in ((stride, self.overlapping), (context, self.separate)):
            for start, end, first in windows(length, context, size):
                if start not in known:
                    known[start] = len(self.rows)
                    self.rows.append((begin + start, begin + end))
                    self.lowest.append(begin + first)
                row = known[start]
                self.lowest[row] = min(self.lowest[row], begin + first)
                reading.append((row, begin + first))

    def queries(self, tokens: NDArray[np.uint16]) -> IntArray:
        """(Q, 3): for every row its targets lowest..end."""
        starts, ends = np.array(self.rows, dtype=np.int64).T
        lowest = np.array(self.lowest, dtype=np.int64)
        counts = ends - lowest + 1
        row = np.repeat(np.arange(len(self.rows)), counts)
        self.first_query = np.concatenate(([0], np.cumsum(counts)))
        target = np.arange(len(row)) + np.repeat(lowest - self.first_query[:-1], counts)
        return np.stack((row, target - starts[row] - 1, tokens[target].astype(np.int64)), axis=1)

    def gather(
        self, nats: NDArray[np.float32], reading: list[tuple[int, int]], size: int
    ) -> FloatArray:
        """Nats of every token of the stream as one reading scores them; NaN elsewhere."""
        out = np.full(size, np.nan)
        for row, first in reading:
            end = self.rows[row][1]
            skip = first - self.lowest[row]
            out[first : end + 1] = nats[self.first_query[row] + skip : self.first_query[row + 1]]
        return out


def evaluate_split(
    model: LanguageModel,
    tokens: NDArray[np.uint16],
    documents: IntArray,
    *,
    context: int,
    limit_tokens: int | None = None,
    **reading: Unpack[Reading],
) -> dict[str, Any]:
    """Losses of one split, document by document.

    tokens: the split's stream. documents: (D, 3) token offset, UTF-8 bytes, words. `context` is
    the length trained on. `limit_tokens` keeps the first documents that hold so many tokens.
    Returns loss (nats per token), perplexity, bits_per_byte, word_perplexity (None where there
    are no words or it is too large for a float), perplexity_nonoverlapping, tokens_scored,
    documents, and the arrays document_nats (D,), document_tokens, document_bytes, document_words
    for paired statistics.
    """
    offsets = np.append(documents[:, 0], len(tokens)).astype(np.int64)
    if limit_tokens is not None:
        kept = int(np.searchsorted(offsets, limit_tokens, side="left"))
        offsets = offsets[: min(max(kept, 1), len(documents)) + 1]
    tokens = tokens[: offsets[-1]]
    documents = documents[: len(offsets) - 1]
    nats, separate, counts = score_documents(model, tokens, offsets, context=context, **reading)
    total, scored = float(nats.sum()), int(counts.sum())
    _, utf8_bytes, words = documents.sum(axis=0).tolist()
    by_word = perplexity(total, words) if words else math.inf
    return {
        "loss": total / scored,
        "perplexity": perplexity(total, scored),
        "bits_per_byte": total / math.log(2) / utf8_bytes,
        "word_perplexity": by_word if math.isfinite(by_word) else None,
        "perplexity_nonoverlapping": perplexity(float(separate.sum()), scored),
        "tokens_scored": scored,
        "documents": len(documents),
        "document_nats": nats,
        "document_tokens": counts,
        "document_bytes": documents[:, 1],
        "document_words": documents[:, 2],
    }
