"""Perplexity and its tokenizer-free relatives, and the scorer that all of evaluation uses.

Shapes: R rows (windows of tokens), Q queries (one target at one position of one row),
N queries of one batch, V vocabulary, D documents. Nats everywhere; bits only in the last division.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from src.spec.progress import Progress

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


class LanguageModel(Protocol):
    """What scoring needs of a model; `src.models.transformer.Transformer` is one."""

    def hidden(self, tokens: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, width); position t sees tokens 0..t only."""

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., width) -> (..., V)."""


# ---------------------------------------------------------------------------------- pure numbers


def perplexity(nats: float, tokens: int) -> float:
    """exp(nats per token): comparable between models of one tokenizer only."""
    return _exp_mean(nats, tokens)


def bits_per_byte(nats: float, utf8_bytes: int) -> float:
    """Bits per byte of UTF-8 text: comparable across tokenizers."""
    assert utf8_bytes > 0
    return nats / math.log(2) / utf8_bytes


def word_perplexity(nats: float, words: int) -> float:
    """exp(nats per whitespace word): comparable across tokenizers."""
    return _exp_mean(nats, words)


def _exp_mean(nats: float, count: int) -> float:
    assert count > 0
    mean = nats / count
    return math.exp(mean) if mean < 700 else math.inf  # e^709 is the largest float


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenPerplexity:
    """A perplexity per token and the tokenizer whose tokens it counts."""

    value: float
    tokenizer_sha256: str


def compare_token_perplexity(ours: TokenPerplexity, baseline: TokenPerplexity) -> float:
    """ours / baseline; raises ValueError where the tokenizers differ, even at equal size."""
    if ours.tokenizer_sha256 != baseline.tokenizer_sha256:
        raise ValueError(
            "token perplexities of two tokenizers cannot be compared: found tokenizer hashes "
            f"{ours.tokenizer_sha256[:12]} and {baseline.tokenizer_sha256[:12]}, expected the "
            "same one; compare bits per byte or word perplexity instead"
        )
    return ours.value / baseline.value


# --------------------------------------------------------------------------------------- scoring


def score_positions(
    model: LanguageModel,
    rows: Sequence[NDArray[Any]],
    queries: IntArray,
    *,
    device: torch.device | str,
    autocast_dtype: torch.dtype | None,
    greedy: bool = False,
    batch_tokens: int | None = None,
    label: str = "scoring",
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Nats of chosen targets, each after its row's tokens up to and with its position.

    rows: R arrays of token ids. queries: (Q, 3) of row, position, target, sorted by row.
    Returns (Q,) -log p(target | row[: position + 1]) and (Q,) whether the target is the most
    likely token (all False unless `greedy` asks for it). `autocast_dtype` None or float32 computes
    in float32. Rows are padded on the right, which a causal model cannot see, and batched by
    length; only queried positions reach the head, a chunk at a time, so that float32 logits of a
    batch never exist. `label` names the progress.
    """
    device = torch.device(device)
    on_cpu = device.type == "cpu"
    batch_tokens = batch_tokens or (4_096 if on_cpu else 65_536)
    first_query = np.searchsorted(queries[:, 0], np.arange(len(rows) + 1))
    nats = torch.empty(len(queries), device=device)
    hits = torch.zeros(len(queries), dtype=torch.bool, device=device)
    low = autocast_dtype not in (None, torch.float32)
    # no_grad and not inference_mode: tensors that the model caches here (RoPE tables) must stay
    # usable in training. One autocast context, so that weights are cast once for all batches.
    autocast = torch.autocast(device.type, autocast_dtype, enabled=low)
    lengths = [len(row) for row in rows]
    progress = Progress(label, sum(lengths), "tokens")
    with torch.no_grad(), autocast, uncompiled(model), progress:
        for batch in _batches(lengths, batch_tokens):
            tokens, index = _collate(rows, batch, first_query)
            wanted = queries[index]
            width = tokens.shape[1]
            row_in_batch = np.repeat(np.arange(len(batch)), np.diff(first_query)[batch])
            flat = torch.from_numpy(row_in_batch * width + wanted[:, 1]).to(device)
            targets = torch.from_numpy(wanted[:, 2]).to(device)
            hidden = model.hidden(torch.from_numpy(tokens).to(device)).flatten(0, 1)[flat]
            where = torch.from_numpy(index).to(device)
            chunk = 256 if on_cpu else 4_096
            nats[where], hits[where] = _head_nats(model, hidden, targets, chunk, greedy)
            progress.advance(sum(lengths[row] for row in batch))
    return nats.cpu().numpy(), hits.cpu().numpy()


def uncompiled(model: object) -> contextlib.AbstractContextManager[Any]:
    """Blocks compiled for training's one shape must not be compiled anew for each of ours."""
    modules = model.modules() if isinstance(model, torch.nn.Module) else ()
    if any(module._compiled_call_impl is not None for module in modules):
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()


def _batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[IntArray]:
    """Row numbers in batches of at most `batch_tokens` padded tokens, longest first."""
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    start = 0
    while start < len(order):
        size = max(1, batch_tokens // max(1, lengths[order[start]]))
        yield order[start : start + size]
        start += size


def _collate(
    rows: Sequence[NDArray[Any]], batch: IntArray, first_query: IntArray
) -> tuple[IntArray, IntArray]:
    """Padded tokens (B, T) of the rows in `batch`, and the numbers of their queries."""
    tokens = np.zeros((len(batch), len(rows[batch[0]])), dtype=np.int64)
    for i, row in enumerate(batch):
        tokens[i, : len(rows[row])] = rows[row]
    index = [np.arange(first_query[row], first_query[row + 1]) for row in batch]
    return tokens, np.concatenate(index)


def _head_nats(
    model: LanguageModel, hidden: Tensor, targets: Tensor, chunk: int, greedy: bool
) -> tuple[Tensor, Tensor]:
    """(N, width), (N,) -> nats (N,) and greedy hits (N,), softmax in float32."""
    nats, hits = [], []
    for part, target in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        logits = model.logits(part)  # (chunk, V)
        # logsumexp would take 3 times as long on a CPU.
        log_p = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
        nats.append(-log_p.gather(1, target[:, None])[:, 0])
        hits.append(logits.argmax(-1) == target if greedy else torch.zeros_like(target).bool())
    return torch.cat(nats), torch.cat(hits)


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
    stride: int | None = None,
    device: torch.device | str,
    autocast_dtype: torch.dtype | None,
    batch_tokens: int | None = None,
    label: str = "scoring",
) -> tuple[FloatArray, FloatArray, IntArray]:
    """Nats (D,) with overlapping windows, nats (D,) without, and scored tokens (D,).

    Document i is tokens[offsets[i]:offsets[i + 1]] (`offsets` is (D + 1,)); its first token is
    the separator, which is read and never scored. `stride` defaults to context // 2: most windows
    of the second reading are then windows of the first, so the pair costs little more than one.
    """
    stride = stride or max(1, context // 2)
    plan = _WindowPlan()
    for begin, end in zip(offsets[:-1], offsets[1:], strict=True):
        plan.add(int(begin), int(end - begin) - 1, context, stride)
    rows = [tokens[start:end] for start, end in plan.rows]
    queries = plan.queries(tokens)
    nats, _ = score_positions(
        model,
        rows,
        queries,
        device=device,
        autocast_dtype=autocast_dtype,
        batch_tokens=batch_tokens,
        label=label,
    )
    if not np.isfinite(nats).all():
        raise ValueError(
            "the model's log-probabilities: found values that are not finite numbers, expected "
            "numbers; the weights have diverged, or need a wider precision than "
            f"{autocast_dtype or torch.float32}"
        )
    overlapping = plan.gather(nats, plan.overlapping, int(offsets[-1]))
    separate = plan.gather(nats, plan.separate, int(offsets[-1]))
    scored = int(offsets[-1] - offsets[0]) - (len(offsets) - 1)
    assert np.isfinite(overlapping).sum() == np.isfinite(separate).sum() == scored
    return (
        _document_sums(overlapping, offsets),
        _document_sums(separate, offsets),
        np.diff(offsets) - 1,
    )


class _WindowPlan:
    """Windows of all documents, each read once though two readings may use it."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, int]] = []
        self.lowest: list[int] = []  # first target that any reading scores in the row
        self.overlapping: list[tuple[int, int]] = []  # (row, first target it scores)
        self.separate: list[tuple[int, int]] = []

    def add(self, begin: int, length: int, context: int, stride: int) -> None:
        known: dict[int, int] = {}
        for size, reading in ((stride, self.overlapping), (context, self.separate)):
            for start, end, first in windows(length, context, size):
                row = known.get(start)
                if row is None:
                    row = known[start] = len(self.rows)
                    self.rows.append((begin + start, begin + end))
                    self.lowest.append(begin + first)
                self.lowest[row] = min(self.lowest[row], begin + first)
                reading.append((row, begin + first))

    def queries(self, tokens: NDArray[np.uint16]) -> IntArray:
        """(Q, 3): for every row its targets lowest..end."""
        starts = np.array([start for start, _ in self.rows], dtype=np.int64)
        ends = np.array([end for _, end in self.rows], dtype=np.int64)
        counts = ends - np.array(self.lowest, dtype=np.int64) + 1
        row = np.repeat(np.arange(len(self.rows)), counts)
        self.first_query = np.concatenate(([0], np.cumsum(counts)))
        target = np.arange(len(row)) - np.repeat(self.first_query[:-1], counts)
        target += np.repeat(np.array(self.lowest, dtype=np.int64), counts)
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


def _document_sums(nats: FloatArray, offsets: IntArray) -> FloatArray:
    """Sums over documents; the separator's NaN counts nothing, so that none is empty."""
    return np.add.reduceat(np.nan_to_num(nats), offsets[:-1])


def evaluate_split(
    model: LanguageModel,
    tokens: NDArray[np.uint16],
    documents: IntArray,
    *,
    context: int,
    autocast_dtype: torch.dtype | None,
    device: torch.device | str,
    limit_tokens: int | None = None,
    batch_tokens: int | None = None,
    label: str = "scoring",
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
    nats, separate, counts = score_documents(
        model,
        tokens,
        offsets,
        context=context,
        device=device,
        autocast_dtype=autocast_dtype,
        batch_tokens=batch_tokens,
        label=label,
    )
    total, scored, words = float(nats.sum()), int(counts.sum()), int(documents[:, 2].sum())
    by_word = word_perplexity(total, words) if words else math.inf
    return {
        "loss": total / scored,
        "perplexity": perplexity(total, scored),
        "bits_per_byte": bits_per_byte(total, int(documents[:, 1].sum())),
        "word_perplexity": by_word if math.isfinite(by_word) else None,
        "perplexity_nonoverlapping": perplexity(float(separate.sum()), scored),
        "tokens_scored": scored,
        "documents": len(documents),
        "document_nats": nats,
        "document_tokens": counts,
        "document_bytes": documents[:, 1],
        "document_words": documents[:, 2],
    }
