"""The scorer that all of evaluation uses: nats of chosen targets after given tokens.

Shapes: R rows (windows of tokens), Q queries (one target at one position of one row), G groups of
rows that begin alike, P tokens that the rows of a group share, N positions of a batch, V
vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Required, TypedDict, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from src.models.transformer import KVCache, Transformer
from src.spec.progress import Progress

IntArray = NDArray[np.int64]

# Rows that begin with so many equal tokens are read together: the beginning once, then each rest.
# Below that a second pass costs more than it saves.
SHARED_TOKENS = 12
# Tokens below which a part of a batch is not made smaller still, to pad less.
SMALLEST_PART = 192
# Fewer full batches than this are read by eager code: compiling costs about as much as they do.
COMPILED_BATCHES = 12


class LanguageModel(Protocol):
    """What scoring needs of a model; `src.models.transformer.Transformer` is one."""

    def hidden(self, tokens: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, width); position t sees tokens 0..t only."""

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., width) -> (..., V)."""


class Reading(TypedDict, total=False):
    """How a model reads: what every measurement passes on to `score_positions`."""

    device: Required[torch.device | str]
    autocast_dtype: Required[torch.dtype | None]  # None or float32 computes in float32
    batch_tokens: int | None
    label: str  # names the progress


def score_positions(
    model: LanguageModel,
    rows: Sequence[NDArray[Any]],
    queries: IntArray,
    *,
    greedy: bool = False,
    share_prefixes: bool = False,
    **reading: Unpack[Reading],
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Nats of chosen targets, each after its row's tokens up to and with its position.

    rows: R arrays of token ids. queries: (Q, 3) of row, position, target, sorted by row.
    Returns (Q,) -log p(target | row[: position + 1]) and (Q,) whether the target is the most
    likely token (all False unless `greedy` asks for it). `share_prefixes` reads once what several
    rows begin with, where the model is a Transformer. Rows are padded on the right, which a causal
    model cannot see, and batched by length; only queried positions reach the head, each once, a
    chunk at a time, so that float32 logits of a batch never exist.
    """
    device, autocast_dtype = torch.device(reading["device"]), reading["autocast_dtype"]
    dtype = autocast_dtype or torch.float32
    on_cpu = device.type == "cpu"
    batch_tokens = reading.get("batch_tokens") or (4_096 if on_cpu else 65_536)
    chunk = 256 if on_cpu else 4_096
    shape = None if dtype == torch.float32 else _compiled_shape(model, rows, batch_tokens)
    first_query = np.searchsorted(queries[:, 0], np.arange(len(rows) + 1))
    nats = torch.empty(len(queries), device=device)
    hits = torch.zeros(len(queries), dtype=torch.bool, device=device)
    groups = _groups(rows, share_prefixes and isinstance(model, Transformer))
    progress = Progress(reading.get("label", "scoring"), len(queries), "tokens")
    with inference(device, autocast_dtype), uncompiled(model), progress:
        for batch in _batches(rows, groups, batch_tokens):
            index = np.concatenate([np.arange(*first_query[[r, r + 1]]) for r in batch.rows])
            counts = np.diff(first_query)[batch.rows]
            places = batch.places(np.repeat(np.arange(len(batch.rows)), counts), queries[index, 1])
            order = np.argsort(places, kind="stable")
            index = index[order]
            queried, hidden_row = np.unique(places[order], return_inverse=True)
            hidden = _hidden(model, rows, batch, device, dtype, shape)
            query = torch.from_numpy(index).to(device)
            nats[query], hits[query] = _head_nats(
                model, hidden[torch.from_numpy(queried).to(device)], hidden_row, queries[index, 2],
                chunk, greedy, shape is not None,
            )  # fmt: skip
            progress.advance(len(index))
    return nats.cpu().numpy(), hits.cpu().numpy()


@contextlib.contextmanager
def inference(device: torch.device, autocast_dtype: torch.dtype | None) -> Iterator[None]:
    """One autocast context for everything: weights are cast once, as a deployed model's are.

    no_grad and not inference_mode: tensors that the model caches here (RoPE tables) must stay
    usable in training.
    """
    mixed = autocast_dtype not in (None, torch.float32)
    with torch.no_grad(), torch.autocast(device.type, autocast_dtype, enabled=mixed):
        yield


def uncompiled(model: object) -> contextlib.AbstractContextManager[Any]:
    """Blocks compiled for training's one shape must not be compiled anew for each of ours."""
    if _is_compiled(model):
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()


def _is_compiled(model: object) -> bool:
    modules = model.modules() if isinstance(model, torch.nn.Module) else ()
    return any(module._compiled_call_impl is not None for module in modules)


def _compiled_shape(
    model: object, rows: Sequence[NDArray[Any]], batch_tokens: int
) -> tuple[int, int] | None:
    """(rows, tokens) of the batches that compiled blocks read: the longest rows', where training
    has compiled the model and there are enough of them. Other shapes are read by eager code."""
    if not rows or not _is_compiled(model):
        return None
    longest = max(len(row) for row in rows)
    size = max(1, batch_tokens // longest)
    full = sum(len(row) == longest for row in rows) // size
    return (size, longest) if full >= COMPILED_BATCHES else None


# --------------------------------------------------------------------------- what is read together


@dataclass(frozen=True, slots=True)
class _Batch:
    """Row numbers, longest first, the group 0..G-1 of each, P, and what is read at a time: slices
    of the rows, each padded to the first one's tokens after P."""

    rows: IntArray
    group: IntArray
    shared: int
    parts: list[tuple[int, int, int]]  # first row, last row + 1, width
    begins: IntArray  # where `_hidden` leaves each row's first token after P

    @classmethod
    def of(
        cls, groups: Sequence[tuple[list[int], int]], lengths: IntArray, batch_tokens: int
    ) -> _Batch:
        shared = groups[0][1]
        # Short rests differ much in length, and attention lays a copy of what they share beside
        # each of them: a quarter at a time.
        part_tokens = max(1, batch_tokens // 4) if shared else batch_tokens
        rows = np.concatenate([np.array(members) for members, _ in groups])
        group = np.repeat(np.arange(len(groups)), [len(members) for members, _ in groups])
        order = np.argsort(-lengths[rows], kind="stable")
        rows, group = rows[order], group[order]
        parts, begins = [], np.empty(len(rows), dtype=np.int64)
        first, place = 0, len(groups) * shared
        while first < len(rows):
            width = int(lengths[rows[first]]) - shared
            end = min(len(rows), first + max(1, part_tokens // width))
            if shared:  # what is shorter by a quarter waits for the next part
                near = int(np.sum(lengths[rows[first:end]] - shared >= 0.75 * width))
                end = min(end, first + max(near, -(-SMALLEST_PART // width)))
            parts.append((first, end, width))
            begins[first:end] = place + np.arange(end - first) * width
            first, place = end, place + (end - first) * width
        return cls(rows, group, shared, parts, begins)

    def places(self, row: IntArray, position: IntArray) -> IntArray:
        """Where `_hidden` leaves a position of a row (counted within the batch)."""
        own = self.begins[row] + position - self.shared
        return np.where(position < self.shared, self.group[row] * self.shared + position, own)


def _groups(rows: Sequence[NDArray[Any]], share: bool) -> list[tuple[list[int], int]]:
    """Row numbers that are read together, and how many tokens they share (0: a row alone).

    In the order of their tokens, rows that begin alike are neighbours. The next row joins a group
    where that saves more tokens than the group saves without it.
    """
    if not share:
        return [([row], 0) for row in range(len(rows))]
    groups: list[tuple[list[int], int]] = []
    for row in sorted(range(len(rows)), key=lambda row: rows[row].tobytes()):
        members, shared = groups[-1] if groups else ([], 0)
        common = _common_prefix(rows[members[-1]], rows[row]) if members else 0
        if len(members) > 1:
            common = min(common, shared)
        if common >= SHARED_TOKENS and len(members) * common > (len(members) - 1) * shared:
            groups[-1] = ([*members, row], common)
        else:
            groups.append(([row], 0))
    return groups


def _common_prefix(left: NDArray[Any], right: NDArray[Any]) -> int:
    """Tokens that both begin with, at most all but the last of either."""
    size = min(len(left), len(right)) - 1
    differ = np.flatnonzero(left[:size] != right[:size])
    return int(differ[0]) if len(differ) else size


def _batches(
    rows: Sequence[NDArray[Any]], groups: list[tuple[list[int], int]], batch_tokens: int
) -> Iterator[_Batch]:
    """Groups of one P, of like lengths, with at most `batch_tokens` tokens; longest first.

    One P a batch, so that what follows needs no mask of its own.
    """
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    ordered = sorted(groups, key=lambda group: (-group[1], -int(lengths[group[0]].max())))
    pending: list[tuple[list[int], int]] = []
    tokens = 0
    for members, shared in ordered:
        # Padded to the batch's longest where nothing is shared; else read in smaller parts.
        width = lengths[pending[0][0][0]] if pending and not shared else lengths[members].max()
        added = int(shared + len(members) * (width - shared))
        if pending and (tokens + added > batch_tokens or shared != pending[0][1]):
            yield _Batch.of(pending, lengths, batch_tokens)
            pending, tokens = [], 0
            added = int(shared + (lengths[members] - shared).sum())
        pending.append((members, shared))
        tokens += added
    if pending:
        yield _Batch.of(pending, lengths, batch_tokens)


# --------------------------------------------------------------------------------------- the model


class _Continuations(KVCache):
    """A cache of rows that follow the rows of another one: row i those of `owner[i]`.

    Every layer's copy lives for that layer alone, and nothing is stored.
    """

    def __init__(self, prefix: KVCache, owner: Tensor) -> None:
        self.prefix, self.owner, self.length = prefix, owner, prefix.length

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.prefix.keys[layer], self.prefix.values[layer]
        return (
            torch.cat((keys.index_select(0, self.owner), key.to(keys.dtype)), dim=2),
            torch.cat((values.index_select(0, self.owner), value.to(values.dtype)), dim=2),
        )


def _hidden(
    model: LanguageModel, rows: Sequence[NDArray[Any]], batch: _Batch, device: torch.device,
    dtype: torch.dtype, compiled_shape: tuple[int, int] | None,
) -> Tensor:  # fmt: skip
    """(N, width): G * P of what the groups share, then each part's rows after it."""

    def suffixes(part: tuple[int, int, int]) -> Tensor:
        first, end, width = part
        return _padded([rows[r][batch.shared :] for r in batch.rows[first:end]], width).to(device)

    if batch.shared == 0:
        (part,) = batch.parts
        tokens = suffixes(part)
        compiled = tuple(tokens.shape) == compiled_shape
        with torch.compiler.set_stance("default") if compiled else contextlib.nullcontext():
            return model.hidden(tokens).flatten(0, 1)
    assert isinstance(model, Transformer)
    _, one_of_each = np.unique(batch.group, return_index=True)
    prefixes = [rows[row][: batch.shared] for row in batch.rows[one_of_each]]
    cache = model.new_cache(len(prefixes), batch.shared, dtype)
    hidden = [model.hidden(_padded(prefixes, batch.shared).to(device), cache).flatten(0, 1)]
    for part in batch.parts:
        owner = torch.from_numpy(batch.group[part[0] : part[1]]).to(device)
        hidden.append(model.hidden(suffixes(part), _Continuations(cache, owner)).flatten(0, 1))
    return torch.cat(hidden)


def _padded(rows: Sequence[NDArray[Any]], width: int) -> Tensor:
    tokens = np.zeros((len(rows), width), dtype=np.int64)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    return torch.from_numpy(tokens)


def _head_nats(
    model: LanguageModel, hidden: Tensor, hidden_row: IntArray, targets: IntArray, chunk: int,
    greedy: bool, compiled: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(N, width); (Q,) sorted row of `hidden` and (Q,) target -> nats (Q,), greedy hits (Q,).

    Softmax in float32.
    """
    nats, hits = [], []
    target, row = (torch.from_numpy(array).to(hidden.device) for array in (targets, hidden_row))
    bounds = np.searchsorted(hidden_row, np.arange(0, len(hidden) + chunk, chunk))
    for i, part in enumerate(hidden.split(chunk)):
        queries = slice(int(bounds[i]), int(bounds[i + 1]))
        place, expected = row[queries] - i * chunk, target[queries]
        logits = model.logits(part)  # (chunk, V)
        if compiled and len(part) == chunk:
            with torch.compiler.set_stance("default"):
                log_z = _compiled_log_z()(logits)
            nats.append(log_z[place] - logits[place, expected].float())
        else:  # logsumexp would take 3 times as long on a CPU
            log_p = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
            nats.append(-log_p[place, expected])
        hits.append(_is_best(logits, place, expected) if greedy else place < 0)
    return torch.cat(nats), torch.cat(hits)


def _is_best(logits: Tensor, place: Tensor, target: Tensor) -> Tensor:
    """Whether each target is the first of the largest logits in its row; a CPU's argmax is slow, so
    it looks at the rows alone where a target's logit is the largest."""
    hit = logits[place, target] == logits.amax(-1)[place]
    if hit.any():
        hit[hit.clone()] = logits[place[hit]].argmax(-1) == target[hit]
    return hit


@functools.cache
def _compiled_log_z() -> Callable[[Tensor], Tensor]:
    """Reads the logits without writing anything of their size."""
    return torch.compile(lambda logits: torch.logsumexp(logits.float(), dim=-1), dynamic=False)
