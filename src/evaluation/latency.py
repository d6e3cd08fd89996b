"""Latency and memory at batch size 1: prefill, decoding with a KV cache, and what they hold.

    python -m src.evaluation.latency --run logs/glu266x
    python -m src.evaluation.latency --compare logs/glu4x logs/glu266x [--output FILE]

Both measure in the precision that the run was trained and measured in (the `precision` of its
metrics.json; fp32 where it has none), unless --precision states another.
`--compare` interleaves two runs' models in one process, so that whether the second is slower is
decided on one machine in one run, with an interval. Counts and times are always those of the
native model: the exported one has its factorised table folded.
Shapes: B = 1, L prompt tokens, V vocabulary, R repeats.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import json
import os
import sys
import tempfile
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from src.compute import runtime
from src.evaluation.trained_run import load_run
from src.models.transformer import Transformer
from src.spec import command_line
from src.spec.progress import Progress, say
from src.storage.run_dir import open_lock_file, write_json

MIB = 2**20
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# "Equal latency" is a ratio below this, fixed before any measurement (3 %, set in advance).
MARGIN = 1.03
RESAMPLES = 2_000

FloatArray = NDArray[np.float64]
Step = Callable[[], Tensor]


# --------------------------------------------------------------------------------------- numbers


def ratio_interval(ours: FloatArray, baseline: FloatArray, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of median(ours) / median(baseline).

    Repeats are interleaved, so repeat i of both is drawn together: drift cancels.
    """
    assert len(ours) == len(baseline)
    draws = _draws(len(ours), seed)
    return _percentiles(_resampled_medians(ours, draws) / _resampled_medians(baseline, draws))


def _draws(count: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, count, size=(RESAMPLES, count))


def _resampled_medians(samples: FloatArray, draws: NDArray[np.int64]) -> FloatArray:
    return np.median(samples[draws], axis=1)


def _percentiles(values: FloatArray) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def verdict(low: float, high: float, margin: float = MARGIN) -> str:
    """What an interval of the latency ratio says about a regression beyond `margin`."""
    if high <= margin:
        return "not slower"
    return "slower" if low > margin else "undecided"


# ---------------------------------------------------------------------------------------- timing


def time_interleaved(
    steps: Mapping[str, Step],
    *,
    device: torch.device,
    warmup: int,
    repeats: int,
    label: str = "latency",
) -> dict[str, FloatArray]:
    """Milliseconds (R,) of each step; every repeat runs all steps, so that drift hits all alike.

    Device events around one synchronised call on CUDA, the monotonic clock on a CPU. One process
    of a machine at a time.
    """
    once = _time_cuda if device.type == "cuda" else _time_cpu
    found = {name: np.empty(repeats) for name in steps}
    with _alone_on_this_machine(label), Progress(label, warmup + repeats, "rounds") as progress:
        for _ in range(warmup):
            for step in steps.values():
                once(step)
            progress.advance()
        for repeat in range(repeats):
            for name, step in steps.items():
                found[name][repeat] = once(step)
            progress.advance()
    return found


@contextlib.contextmanager
def _alone_on_this_machine(label: str) -> Iterator[None]:
    """Waits until no other process of this user measures here; a dead process's lock is free."""
    path = Path(tempfile.gettempdir()) / f"latency-measurement-{os.getuid()}.lock"
    lock = open_lock_file(path)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(label, "waiting for another process that measures here")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _time_cpu(step: Step) -> float:
    begun = time.perf_counter_ns()
    step()
    return (time.perf_counter_ns() - begun) / 1e6


def _time_cuda(step: Step) -> float:
    begun = torch.cuda.Event(enable_timing=True)
    ended = torch.cuda.Event(enable_timing=True)
    begun.record()
    step()
    ended.record()
    ended.synchronize()
    return begun.elapsed_time(ended)


def _prompt(model: Transformer, length: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    tokens = torch.randint(0, model.config.vocab_size, (1, length), generator=generator)
    return tokens.to(device)


def _last_logits(model: Transformer, prompt: Tensor) -> Tensor:
    """(1, L) -> (1, V): what a generator needs of a prompt."""
    return model.logits(model.hidden(prompt)[:, -1])


def _steps(
    model: Transformer, device: torch.device, cache_dtype: torch.dtype, lengths: Sequence[int]
) -> dict[str, Step]:
    """What is timed: prefill to last-token logits, and one decoded token."""
    steps: dict[str, Step] = {
        f"l{length}": functools.partial(_last_logits, model, _prompt(model, length, device))
        for length in lengths
    }
    longest = max(lengths)
    cache = model.new_cache(1, longest, cache_dtype)
    model.hidden(_prompt(model, longest - 1, device), cache)
    token = _prompt(model, 1, device)

    def decode() -> Tensor:
        """One token after `longest - 1`: the same work at every repeat."""
        cache.length = longest - 1
        return model.logits(model.hidden(token, cache)[:, -1])

    steps["decode"] = decode
    return steps


def _graphed(step: Step) -> Step:
    """A CUDA graph of `step`, whose inputs and shapes are the same at every call."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


def _compiled_steps(
    model: Transformer, device: torch.device, cache_dtype: torch.dtype, lengths: Sequence[int]
) -> dict[str, Step]:
    """Prefill through compiled blocks in a CUDA graph; decoding in a CUDA graph.

    Decoding is not compiled: each layer would compile its own code for its place in the cache.
    """
    steps = {"decode": _graphed(_steps(model, device, cache_dtype, lengths)["decode"])}
    fast = _plain_copy(model, device)
    torch.compiler.reset()  # or dynamo's limit of eight shapes a process leaves some eager
    for block in fast.blocks:
        block.compile(dynamic=False)
    for length in lengths:
        prompt = _prompt(fast, length, device)
        steps[f"l{length}"] = _graphed(functools.partial(_last_logits, fast, prompt))
    return steps


# ---------------------------------------------------------------------------------------- memory


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


def peak_bytes(step: Step, device: torch.device) -> int:
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


def _memory(
    model: Transformer,
    steps: Mapping[str, Step],
    device: torch.device,
    cache_dtype: torch.dtype,
    longest: int,
) -> dict[str, float]:
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / MIB
    cache = model.new_cache(1, longest, cache_dtype).nbytes() / MIB
    process = runtime.peak_memory_mib(device)  # before the counters below are reset
    activations = peak_bytes(steps[f"l{longest}"], device) / MIB
    return {
        "weights_mib": weights,
        "kv_cache_mib": cache,
        "activations_mib": activations,
        "peak_memory_mib": weights + cache + activations,
        "process_peak_memory_mib": process,
    }


# ----------------------------------------------------------------------------------- one model


def measure(
    model: Transformer,
    *,
    device: torch.device | str,
    autocast_dtype: torch.dtype | None,
    lengths: Sequence[int] = (128, 512),
    warmup: int = 50,
    repeats: int = 200,
    compiled: bool = False,
    label: str = "latency",
) -> dict[str, Any]:
    """Latency and memory of `model` at batch size 1, as flat keys with units.

    latency_ms_{p50,p95}_l<L>: prefill of L tokens to last-token logits, median and 95th percentile;
    decode_ms_per_token_...: one token after the longest L - 1, with a KV cache.
    peak_memory_mib = weights_mib (float32, as held) + kv_cache_mib (longest L) + activations_mib
    (prefill of the longest L); process_peak_memory_mib is the whole process, training included.
    `compiled` adds latency_compiled_ms_... and decode_compiled_ms_... on CUDA (minutes of
    compiling); where capture fails they are missing. L may be longer than the model was trained
    for: the work is the same.
    """
    device = torch.device(device)
    model = _plain_copy(model, device)
    cache_dtype = autocast_dtype or torch.float32
    with _inference(device, autocast_dtype):
        steps = _steps(model, device, cache_dtype, lengths)
        memory_steps = steps
        if compiled and device.type == "cuda":
            steps = steps | _try_compiled(model, device, cache_dtype, lengths)
        times = time_interleaved(steps, device=device, warmup=warmup, repeats=repeats, label=label)
        memory = _memory(model, memory_steps, device, cache_dtype, max(lengths))
    found: dict[str, Any] = {}
    for name, samples in times.items():
        found |= _summary(name, samples)
    return found | memory


def _try_compiled(
    model: Transformer, device: torch.device, cache_dtype: torch.dtype, lengths: Sequence[int]
) -> dict[str, Step]:
    try:
        steps = _compiled_steps(model, device, cache_dtype, lengths)
    except RuntimeError as error:  # no compiler, or an operator that a graph cannot hold
        warnings.warn(f"compiled latency is missing: {error}", stacklevel=2)
        return {}
    return {f"compiled_{name}": step for name, step in steps.items()}


def _plain_copy(model: Transformer, device: torch.device) -> Transformer:
    """The same weights without what training compiled for its own shapes."""
    with torch.random.fork_rng(devices=[]):
        copy = Transformer(model.config)
    copy.load_state_dict(model.state_dict())
    return copy.to(device).eval()


@contextlib.contextmanager
def _inference(device: torch.device, autocast_dtype: torch.dtype | None) -> Iterator[None]:
    """One autocast context for everything: weights are cast once, as a deployed model's are."""
    low = autocast_dtype not in (None, torch.float32)
    with torch.no_grad(), torch.autocast(device.type, autocast_dtype, enabled=low):
        yield


def _summary(name: str, samples: FloatArray) -> dict[str, float]:
    values = {"p50": float(np.median(samples)), "p95": float(np.percentile(samples, 95))}
    return {_key(name, statistic): value for statistic, value in values.items()}


def _key(name: str, statistic: str) -> str:
    """`l128` -> latency_ms_p50_l128; `compiled_decode` -> decode_compiled_ms_per_token_p50."""
    kind, _, rest = name.rpartition("_")
    kind = f"{kind}_" if kind else ""
    if rest == "decode":
        return f"decode_{kind}ms_per_token_{statistic}"
    return f"latency_{kind}ms_{statistic}_{rest}"


# ----------------------------------------------------------------------------------- two models


def compare(
    ours: Transformer,
    baseline: Transformer,
    *,
    device: torch.device | str,
    autocast_dtype: torch.dtype | None,
    lengths: Sequence[int] = (128, 512),
    warmup: int = 50,
    repeats: int = 200,
) -> dict[str, dict[str, Any]]:
    """Ratios ours / baseline of the medians, both models interleaved in this process.

    For each of l<L> and decode: ours_ms_p50, baseline_ms_p50, ratio, ratio_low,
    ratio_high (95 %, repeats drawn in pairs) and the verdict at the 3 % margin.
    """
    device = torch.device(device)
    cache_dtype = autocast_dtype or torch.float32
    with _inference(device, autocast_dtype):
        steps: dict[str, Step] = {}
        for label, model in (("baseline", baseline), ("ours", ours)):
            of_model = _steps(_plain_copy(model, device), device, cache_dtype, lengths)
            steps |= {f"{label} {name}": step for name, step in of_model.items()}
        times = time_interleaved(steps, device=device, warmup=warmup, repeats=repeats)
    found = {}
    for name in of_model:
        mine, theirs = times[f"ours {name}"], times[f"baseline {name}"]
        low, high = ratio_interval(mine, theirs)
        found[name] = {
            "ours_ms_p50": float(np.median(mine)),
            "baseline_ms_p50": float(np.median(theirs)),
            "ratio": float(np.median(mine) / np.median(theirs)),
            "ratio_low": low,
            "ratio_high": high,
            "verdict": verdict(low, high),
        }
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_line.Parser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", type=Path, help="one finished run, measured alone")
    what.add_argument(
        "--compare", type=Path, nargs=2, metavar=("BASELINE", "OURS"), help="two finished runs"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", choices=tuple(DTYPES), help="default: the run's own")
    at_least = command_line.at_least
    parser.add_argument("--lengths", type=at_least(2), nargs="+", default=[128, 512])
    parser.add_argument("--warmup", type=at_least(0), default=50)
    parser.add_argument("--repeats", type=at_least(2), default=200)
    parser.add_argument("--threads", type=at_least(1), help="CPU threads (default: one a core)")
    parser.add_argument("--compiled", action="store_true", help="CUDA: also compiled, in graphs")
    parser.add_argument("--output", type=Path, help="a JSON file; what is there is not repeated")
    asked = parser.parse_args(arguments)
    begun = time.perf_counter()
    try:
        if asked.output is not None and asked.output.is_file():
            print(f"{asked.output}: measured before, nothing to do")
            return 0
        found = _measured(asked)
        if asked.output is not None:
            asked.output.parent.mkdir(parents=True, exist_ok=True)
            write_json(asked.output, {**found, "wall_seconds": time.perf_counter() - begun})
    except (ValueError, OSError) as error:
        return command_line.refuse(error)
    print(json.dumps(found, indent=2, allow_nan=False))
    return 0


def _measured(asked: argparse.Namespace) -> dict[str, Any]:
    device = runtime.choose_device(asked.device)
    runtime.pin_threads(asked.threads)
    paths = asked.compare or [asked.run]
    runs = [load_run(path) for path in paths]
    precision = asked.precision or _own_precision(paths)
    options: dict[str, Any] = {
        "device": device,
        "autocast_dtype": DTYPES[runtime.resolve_precision(precision, device)],
        "lengths": asked.lengths,
        "warmup": asked.warmup,
        "repeats": asked.repeats,
    }
    head = {"precision": precision, "warmup": asked.warmup, "repeats": asked.repeats}
    if asked.run is not None:
        result = measure(runs[0].model, compiled=asked.compiled, **options)
        names: dict[str, Any] = {"run": asked.run.name}
    else:
        baseline, ours = (run.model for run in runs)
        result = {"comparison": compare(ours, baseline, **options), "margin": MARGIN}
        names = {"baseline": asked.compare[0].name, "ours": asked.compare[1].name}
    return {**names, **head, **result, "environment": runtime.environment_stamp(device)}


def _own_precision(paths: Sequence[Path]) -> str:
    """What the runs' metrics.json say, fp32 where none does; ValueError where they disagree."""
    stated: dict[str, Path] = {}
    for path in paths:
        file = path / "metrics.json"
        if not file.is_file():
            continue
        try:
            found = json.loads(file.read_bytes()).get("precision") or "fp32"
        except (ValueError, AttributeError):
            raise ValueError(
                f"{file}: found no JSON object, expected a run's metrics; state --precision"
            ) from None
        if not isinstance(found, str) or found not in DTYPES:
            raise ValueError(
                f"{file}: precision: found {found!r}, expected one of {', '.join(DTYPES)}; "
                "state --precision"
            )
        stated.setdefault(found, path)
    if len(stated) > 1:
        told = ", ".join(f"{name} of {path}" for name, path in stated.items())
        raise ValueError(
            f"precision: found {told}, expected one for both models of a comparison; state it "
            "with --precision"
        )
    return next(iter(stated), "fp32")


if __name__ == "__main__":
    sys.exit(main())
