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
    rows, readings = _plan(offsets, context)
    starts, (ends, lowest_targets) = np.array(list(rows)), np.array(list(rows.values())).T
    counts = ends - lowest_targets + 1
    row, first_query = np.repeat(np.arange(len(rows)), counts), np.cumsum(counts) - counts
    target = np.arange(len(row)) + np.repeat(lowest_targets - first_query, counts)
    queries = np.stack((row, target - starts[row] - 1, tokens[target].astype(np.int64)), axis=1)
    texts = [tokens[start:end] for start, (end, _) in rows.items()]
    nats, _ = score_positions(model, texts, queries, **reading)
    if not np.isfinite(nats).all():
        raise ValueError(
            "the model's log-probabilities: found values that are not finite numbers, expected "
            "numbers; the weights have diverged, or need a wider precision than "
            f"{reading['autocast_dtype'] or torch.float32}"
        )
    document_tokens = np.diff(offsets) - 1
    row_nats = dict(zip(rows, np.split(nats, first_query[1:]), strict=True))
    sums = []
    for reading_windows in readings:
        losses = np.full(int(offsets[-1]), np.nan)  # nats of each target; a separator is none
        for start, first in reading_windows:
            end, lowest_target = rows[start]
            losses[first : end + 1] = row_nats[start][first - lowest_target :]
        assert np.isfinite(losses).sum() == document_tokens.sum(), "each target is scored, once"
        sums.append(np.add.reduceat(np.nan_to_num(losses), offsets[:-1]))
    return sums[0], sums[1], document_tokens


def _plan(
    offsets: IntArray, context: int
) -> tuple[dict[int, tuple[int, int]], tuple[list[tuple[int, int]], list[tuple[int, int]]]]:
    """Windows of all documents, each read once though both readings may use it.

    By the first token that is read: the last target, and the first that any reading scores. And of
    each reading (overlapping, separate) the windows: first token read, first target scored.
    """
    rows: dict[int, tuple[int, int]] = {}
    readings: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
    for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        for stride, reading in zip((max(1, context // 2), context), readings, strict=True):
            for start, stop, first in windows(end - begin - 1, context, stride):
                _, lowest_target = rows.get(begin + start, (0, begin + first))
                rows[begin + start] = (begin + stop, min(lowest_target, begin + first))
                reading.append((begin + start, begin + first))
    return rows, readings


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
    word_perplexity = perplexity(total, words) if words else math.inf
    return {
        "loss": total / scored,
        "perplexity": perplexity(total, scored),
        "bits_per_byte": total / math.log(2) / utf8_bytes,
        "word_perplexity": word_perplexity if math.isfinite(word_perplexity) else None,
        "perplexity_nonoverlapping": perplexity(float(separate.sum()), scored),
        "tokens_scored": scored,
        "documents": len(documents),
        "document_nats": nats,
        "document_tokens": counts,
        "document_bytes": documents[:, 1],
        "document_words": documents[:, 2],
    }
