"""Memory of a model in use: weights, KV cache, and what one call holds at its peak."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from src.compute import runtime
from src.models.transformer import Transformer

MIB = 2**20


class PeakMemory(TorchDispatchMode):
    """Most bytes that tensors made inside the block held at one time, on any device.

    Counts storages as operators return them and until they are freed. Scratch space inside an
    operator is not seen. Unlike the process's resident set it is the same on every machine.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        for value in tree_iter((args, kwargs)):
            if isinstance(value, Tensor):
                self._known.add(value.untyped_storage()._cdata)
        result = function(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Bytes beyond what is held already that one call of `step` holds at its peak."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with PeakMemory() as memory:
        step()
    return memory.peak


def measure(
    model: Transformer,
    prefill: Callable[[], object],
    device: torch.device,
    cache_dtype: torch.dtype,
    length: int,
) -> dict[str, float]:
    """The memory keys of metrics.json, in MiB; `prefill` reads `length` tokens."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / MIB
    cache = model.new_cache(1, length, cache_dtype).nbytes() / MIB
    process = runtime.peak_memory_mib(device)  # before `peak_bytes` resets the counters
    activations = peak_bytes(prefill, device) / MIB
    return {
        "weights_mib": weights,
        "kv_cache_mib": cache,
        "activations_mib": activations,
        "peak_memory_mib": weights + cache + activations,
        "process_peak_memory_mib": process,
    }
