"""A short trial of one block and the head: which micro-batch and loss chunk are fastest here.

The whole model need not be run: its time a token is L blocks plus one head, and both depend on
how many rows are computed at a time (a CPU's caches, a GPU's launch costs).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from src.models.loss import chunked_cross_entropy
from src.models.transformer import Block, rope_tables
from src.spec.config import ModelConfig, TrainingConfig

ROUNDS = 3
# As in training, which then has the kernel that is compiled here.
Z_LOSS = TrainingConfig().z_loss
# Rows that the head is timed on; at least one chunk of every candidate on a CPU.
HEAD_ROWS = {"cpu": 1_024, "cuda": 16_384}
CHUNKS = {"cpu": (256, 512, 1_024), "cuda": (2_048, 8_192, 16_384)}


def micro_batch_candidates(device: torch.device, most_tokens: int) -> list[int]:
    """Tokens of a micro-batch to try: powers of two up to `most_tokens`."""
    low, high = (512, 4_096) if device.type == "cpu" else (4_096, 262_144)
    sizes = [low << i for i in range(20) if low << i <= high]
    return [size for size in sizes if size <= most_tokens] or [most_tokens]


def measure(
    model: ModelConfig,
    seq_len: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
    most_tokens: int,
    compiled: bool = False,
) -> dict[str, Any]:
    """The fastest `micro_batch_tokens` and `loss_chunk`, with the microseconds a token behind
    them (`block_us`, `head_us`, by candidate; the best of interleaved rounds, forward and
    backward). The head is measured as it will run, because compiled it prefers larger chunks; the
    block eager: compiling it at every size would take longer than all that could be won, and
    its compiled time hardly depends on the size. Draws nothing from the global generators."""
    head = {chunk: _head(model, chunk, device, dtype, compiled) for chunk in CHUNKS[device.type]}
    sizes = micro_batch_candidates(device, most_tokens)
    blocks = _blocks(model, seq_len, sizes, device, dtype)
    head_us = _race(head, {chunk: HEAD_ROWS[device.type] for chunk in head}, device)
    block_us = _race(blocks, {size: max(1, size // seq_len) * seq_len for size in blocks}, device)
    return {
        "micro_batch_tokens": min(block_us, key=lambda size: block_us[size]),
        "loss_chunk": min(head_us, key=lambda chunk: head_us[chunk]),
        "block_us": {str(size): round(value, 3) for size, value in block_us.items()},
        "head_us": {str(chunk): round(value, 3) for chunk, value in head_us.items()},
    }


def _head(
    model: ModelConfig, chunk: int, device: torch.device, dtype: torch.dtype, compiled: bool
) -> Callable[[], None]:
    generator = torch.Generator().manual_seed(0)
    rows, width = HEAD_ROWS[device.type], model.embedding_dim or model.d_model
    hidden = torch.randn(rows, width, generator=generator).to(device).requires_grad_()
    table = (0.02 * torch.randn(model.vocab_size, width, generator=generator)).to(device)
    table.requires_grad_()
    targets = torch.randint(model.vocab_size, (rows,), generator=generator).to(device)

    def step() -> None:
        objective, _ = chunked_cross_entropy(
            hidden, table, targets, Z_LOSS, chunk=chunk, dtype=dtype, compiled=compiled
        )
        torch.autograd.grad(objective, (hidden, table))

    return step


def _blocks(
    model: ModelConfig,
    seq_len: int,
    sizes: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
) -> dict[int, Callable[[], None]]:
    with torch.random.fork_rng(devices=[]):
        block = Block(model).to(device)
    rope = rope_tables(seq_len, model.head_dim, model.rope_theta, device)
    parameters = list(block.parameters())
    low = dtype != torch.float32

    def stepper(size: int) -> Callable[[], None]:
        x = torch.zeros(max(1, size // seq_len), seq_len, model.d_model, device=device)
        x += torch.linspace(-1, 1, model.d_model, device=device)
        x.requires_grad_()

        def step() -> None:
            with torch.autocast(device.type, dtype if low else torch.bfloat16, enabled=low):
                y = block(x, rope, None, 0)
            torch.autograd.grad(y.sum(), (x, *parameters))

        return step

    return {size: stepper(size) for size in sizes}


def _race(
    steps: dict[int, Callable[[], None]], tokens: dict[int, int], device: torch.device
) -> dict[int, float]:
    """Microseconds a token of each, in turns; the first round warms up. What does not fit in the
    device's memory is left out, unless nothing fits."""
    best: dict[int, float] = {}
    left = dict(steps)
    for turn in range(ROUNDS + 1):
        for key, step in list(left.items()):
            try:
                took = seconds(step, device)
            except torch.OutOfMemoryError:
                left.pop(key)
                best.pop(key, None)
                if not left:
                    raise
                continue
            if turn:
                best[key] = min(best.get(key, float("inf")), 1e6 * took / tokens[key])
    return best


def seconds(step: Callable[[], object], device: torch.device) -> float:
    """Wall clock of one call, the device's queue emptied before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begun = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun
