"""The scorer that all of evaluation uses: nats of chosen targets after given tokens.

Shapes: R rows (windows of tokens), Q queries (one target at one position of one row), N positions
of a batch, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, Required, TypedDict, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from src.spec.progress import Progress

IntArray = NDArray[np.int64]

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
    **reading: Unpack[Reading],
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Nats of chosen targets, each after its row's tokens up to and with its position.

    rows: R arrays of token ids. queries: (Q, 3) of row, position, target, sorted by row.
    Returns (Q,) -log p(target | row[: position + 1]) and (Q,) whether the target is the most
    likely token (all False unless `greedy` asks for it). Rows are padded on the right, which a
    causal model cannot see, and batched by length; only queried positions reach the head, each
    once, a chunk at a time, so that float32 logits of a batch never exist.
    """
    device, autocast_dtype = torch.device(reading["device"]), reading["autocast_dtype"]
    low = autocast_dtype not in (None, torch.float32)
    on_cpu = device.type == "cpu"
    batch_tokens = reading.get("batch_tokens") or (4_096 if on_cpu else 65_536)
    chunk = 256 if on_cpu else 4_096
    shape = _compiled_shape(model, rows, batch_tokens) if low else None
    first_query = np.searchsorted(queries[:, 0], np.arange(len(rows) + 1))
    nats = torch.empty(len(queries), device=device)
    hits = torch.zeros(len(queries), dtype=torch.bool, device=device)
    # no_grad and not inference_mode: tensors that the model caches here (RoPE tables) must stay
    # usable in training. One autocast context, so that weights are cast once for all batches.
    autocast = torch.autocast(device.type, autocast_dtype, enabled=low)
    progress = Progress(reading.get("label", "scoring"), len(queries), "tokens")
    with torch.no_grad(), autocast, uncompiled(model), progress:
        for batch in _batches(rows, batch_tokens):
            index = np.concatenate([np.arange(*first_query[[row, row + 1]]) for row in batch])
            counts = np.diff(first_query)[batch]
            width = len(rows[batch[0]])
            places = np.repeat(np.arange(len(batch)) * width, counts) + queries[index, 1]
            order = np.argsort(places, kind="stable")
            index = index[order]
            asked, which = np.unique(places[order], return_inverse=True)
            tokens = _padded([rows[row] for row in batch], width).to(device)
            with _compiled_blocks(tuple(tokens.shape) == shape):
                hidden = model.hidden(tokens).flatten(0, 1)
            where = torch.from_numpy(index).to(device)
            nats[where], hits[where] = _head_nats(
                model, hidden[torch.from_numpy(asked).to(device)], which, queries[index, 2],
                chunk, greedy, shape is not None,
            )  # fmt: skip
            progress.advance(len(index))
    return nats.cpu().numpy(), hits.cpu().numpy()


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


def _compiled_blocks(use: bool) -> contextlib.AbstractContextManager[Any]:
    return torch.compiler.set_stance("default") if use else contextlib.nullcontext()


def _batches(rows: Sequence[NDArray[Any]], batch_tokens: int) -> Iterator[list[int]]:
    """Numbers of rows of like lengths, with at most `batch_tokens` tokens; longest first."""
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
    begin = 0
    while begin < len(order):
        end = begin + max(1, batch_tokens // len(rows[order[begin]]))
        yield order[begin:end]
        begin = end


def _padded(rows: Sequence[NDArray[Any]], width: int) -> Tensor:
    tokens = np.zeros((len(rows), width), dtype=np.int64)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    return torch.from_numpy(tokens)


def _head_nats(
    model: LanguageModel, hidden: Tensor, which: IntArray, targets: IntArray, chunk: int,
    greedy: bool, compiled: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(N, width); (Q,) sorted row of `hidden` and (Q,) target -> nats (Q,), greedy hits (Q,).

    Softmax in float32.
    """
    nats, hits = [], []
    target, row = (torch.from_numpy(part).to(hidden.device) for part in (targets, which))
    bounds = np.searchsorted(which, np.arange(0, len(hidden) + chunk, chunk))
    for i, part in enumerate(hidden.split(chunk)):
        asked = slice(int(bounds[i]), int(bounds[i + 1]))
        place = row[asked] - i * chunk
        logits = model.logits(part)  # (chunk, V)
        if compiled and len(part) == chunk:
            with _compiled_blocks(True):
                log_z = _compiled_log_z()(logits)
            nats.append(log_z[place] - logits[place, target[asked]].float())
        else:  # logsumexp would take 3 times as long on a CPU
            log_p = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
            nats.append(-log_p[place, target[asked]])
        best = logits.amax(-1)[place] if greedy else math.inf
        hits.append(logits[place, target[asked]] == best)
    return torch.cat(nats), torch.cat(hits)


@functools.cache
def _compiled_log_z() -> Callable[[Tensor], Tensor]:
    """Reads the logits without writing anything of their size."""
    return torch.compile(lambda logits: torch.logsumexp(logits.float(), dim=-1), dynamic=False)
