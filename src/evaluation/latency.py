"""Latency and memory at batch size 1: prefill, decoding with a KV cache, and what they hold.

    python -m src.evaluation.latency --run logs/glu266x
    python -m src.evaluation.latency --compare logs/glu4x logs/glu266x [--output FILE]

`--compare` interleaves two runs' models in one process, so that whether the second is slower is
decided on one machine in one run, with an interval. Counts and times are always those of the
native model: the exported one has its factorised table folded. docs/EVALUATION.md says more.
Shapes: B = 1, L prompt tokens, V vocabulary, R repeats.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from src.compute import runtime
from src.compute.autotune import seconds
from src.compute.compute_config import DTYPES
from src.evaluation import memory
from src.evaluation.scoring import inference
from src.evaluation.trained_run import load_shape
from src.models.transformer import Transformer
from src.spec import command_line
from src.spec.progress import Progress
from src.storage.files import locked, read_json, write_json

# "Equal latency" is a ratio below this, fixed before any measurement (3 %, set in advance).
MARGIN = 1.03
RESAMPLES = 2_000
_SIDES = ("baseline", "ours")

FloatArray = NDArray[np.float64]
Step = Callable[[], Tensor]


# --------------------------------------------------------------------------------------- numbers


def ratio_interval(ours: FloatArray, baseline: FloatArray, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of median(ours) / median(baseline).

    Repeats are interleaved, so repeat i of both is drawn together: drift cancels.
    """
    assert len(ours) == len(baseline)
    draws = np.random.default_rng(seed).integers(0, len(ours), size=(RESAMPLES, len(ours)))
    ratios = np.median(ours[draws], axis=1) / np.median(baseline[draws], axis=1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(low), float(high)


def verdict(low: float, high: float) -> str:
    """What an interval of the latency ratio says about a regression beyond the margin."""
    if high <= MARGIN:
        return "not slower"
    return "slower" if low > MARGIN else "undecided"


# ---------------------------------------------------------------------------------------- timing


def time_interleaved(
    steps: Mapping[str, Step],
    *,
    device: torch.device,
    warmup: int = 50,
    repeats: int = 200,
    label: str = "latency",
) -> dict[str, FloatArray]:
    """Milliseconds (R,) of each step; every repeat runs all steps, so that drift hits all alike.

    Device events around one synchronised call on CUDA, the monotonic clock on a CPU. One process
    of a machine at a time.
    """
    time_ms = _time_cuda if device.type == "cuda" else lambda step: 1e3 * seconds(step, device)
    rounds = np.empty((warmup + repeats, len(steps)))
    with _alone_on_this_machine(label), Progress(label, len(rounds), "rounds") as progress:
        for times in rounds:
            times[:] = [time_ms(step) for step in steps.values()]
            progress.advance()
    return dict(zip(steps, rounds[warmup:].T, strict=True))


def _alone_on_this_machine(label: str) -> AbstractContextManager[None]:
    """Waits until no other process of this user measures here; a dead process's lock is free."""
    path = Path(tempfile.gettempdir()) / f"latency-measurement-{os.getuid()}.lock"
    return locked(path, f"{label}: waiting for another process that measures here")


def _time_cuda(step: Step) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


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
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
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
    """Prefill through compiled blocks in a CUDA graph; decoding in a CUDA graph. Nothing where that
    fails: no compiler, or an operator that a graph cannot hold.

    Decoding is not compiled: each layer would compile its own code for its place in the cache.
    """
    compiled = _plain_copy(model, device)
    torch.compiler.reset()  # or dynamo's limit of eight shapes a process leaves some eager
    for block in compiled.blocks:
        block.compile(dynamic=False)
    try:
        decode = _steps(model, device, cache_dtype, lengths)["decode"]
        steps = {"compiled_decode": _graphed(decode)}
        for length in lengths:
            prefill = functools.partial(_last_logits, compiled, _prompt(compiled, length, device))
            steps[f"compiled_l{length}"] = _graphed(prefill)
    except RuntimeError as error:
        warnings.warn(f"compiled latency is missing: {error}", stacklevel=2)
        return {}
    return steps


# ----------------------------------------------------------------------------------- one model


def measure(
    model: Transformer,
    *,
    device: torch.device | str,
    autocast_dtype: torch.dtype | None,
    lengths: Sequence[int] = (128, 512),
    compiled: bool = False,
    **timing: Any,
) -> dict[str, Any]:
    """Latency and memory of `model` at batch size 1: the keys latency_*, decode_* and *_mib of
    metrics.json (docs/METRICS.md).

    `compiled` adds latency_compiled_ms_... and decode_compiled_ms_... on CUDA (minutes of
    compiling); where capture fails they are missing. L may be longer than the model was trained
    for: the work is the same. timing: warmup, repeats and label of `time_interleaved`.
    """
    device = torch.device(device)
    model = _plain_copy(model, device)
    cache_dtype = autocast_dtype or torch.float32
    with inference(device, autocast_dtype):
        steps = prefill = _steps(model, device, cache_dtype, lengths)
        if compiled and device.type == "cuda":
            steps = steps | _compiled_steps(model, device, cache_dtype, lengths)
        times = time_interleaved(steps, device=device, **timing)
        longest = max(lengths)
        metrics = memory.measure(model, prefill[f"l{longest}"], device, cache_dtype, longest)
    for name, samples in times.items():
        metrics |= _summary(name, samples)
    return metrics


def _plain_copy(model: Transformer, device: torch.device) -> Transformer:
    """The same weights without what training compiled for its own shapes."""
    with torch.random.fork_rng(devices=[]):
        copy = Transformer(model.config)
    copy.load_state_dict(model.state_dict())
    return copy.to(device).eval()


def _summary(name: str, samples: FloatArray) -> dict[str, float]:
    """`l128` -> latency_ms_p50_l128, ...; `compiled_decode` -> decode_compiled_ms_per_token_p50."""
    prefix = "compiled_" if name.startswith("compiled_") else ""
    work = name.removeprefix("compiled_")
    key = f"latency_{prefix}ms_p{{}}_{work}"
    if work == "decode":
        key = f"decode_{prefix}ms_per_token_p{{}}"
    return {key.format(p): float(np.percentile(samples, p)) for p in (50, 95)}


# ----------------------------------------------------------------------------------- two models


def compare(
    ours: Transformer,
    baseline: Transformer,
    *,
    device: torch.device | str,
    autocast_dtype: torch.dtype | None,
    lengths: Sequence[int] = (128, 512),
    **timing: Any,
) -> dict[str, dict[str, Any]]:
    """Ratios ours / baseline of the medians, both models interleaved in this process.

    For each of l<L> and decode: ours_ms_p50, baseline_ms_p50, ratio, ratio_low,
    ratio_high (95 %, repeats drawn in pairs) and the verdict at the 3 % margin. timing: as above.
    """
    device = torch.device(device)
    cache_dtype = autocast_dtype or torch.float32
    with inference(device, autocast_dtype):
        steps: dict[str, Step] = {}
        for label, model in (("baseline", baseline), ("ours", ours)):
            model_steps = _steps(_plain_copy(model, device), device, cache_dtype, lengths)
            steps |= {f"{label} {name}": step for name, step in model_steps.items()}
        times = time_interleaved(steps, device=device, **timing)
    comparison = {}
    for name in model_steps:
        ours_ms, baseline_ms = times[f"ours {name}"], times[f"baseline {name}"]
        low, high = ratio_interval(ours_ms, baseline_ms)
        ours_p50, baseline_p50 = float(np.median(ours_ms)), float(np.median(baseline_ms))
        comparison[name] = {
            "ours_ms_p50": ours_p50,
            "baseline_ms_p50": baseline_p50,
            "ratio": ours_p50 / baseline_p50,
            "ratio_low": low,
            "ratio_high": high,
            "verdict": verdict(low, high),
        }
    return comparison


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_line.Parser(description=__doc__.splitlines()[0])
    runs = parser.add_mutually_exclusive_group(required=True)
    runs.add_argument("--run", type=Path, help="one finished run, measured alone")
    runs.add_argument(
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
    args = parser.parse_args(arguments)
    start = time.perf_counter()
    try:
        if args.output is not None and args.output.is_file():
            _check_same_runs(args)
            print(f"{args.output}: measured before, nothing to do")
            return 0
        result = _measure_runs(args)
        if args.output is not None:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            write_json(args.output, {**result, "wall_seconds": time.perf_counter() - start})
    except (ValueError, OSError) as error:
        return command_line.refuse(error)
    print(json.dumps(result, indent=2, allow_nan=False))
    return 0


def _measure_runs(args: argparse.Namespace) -> dict[str, Any]:
    device = runtime.choose_device(args.device)
    runtime.pin_threads(args.threads)
    paths = args.compare or [args.run]
    models, trained = zip(*(load_shape(path) for path in paths), strict=True)
    precision = args.precision or _own_precision(paths)
    dtype = DTYPES[runtime.resolve_precision(precision, device)]
    timing = {"warmup": args.warmup, "repeats": args.repeats}
    options: dict[str, Any] = {
        "device": device, "autocast_dtype": dtype, "lengths": args.lengths, **timing,
    }  # fmt: skip
    if args.run is not None:
        result = measure(models[0], compiled=args.compiled, **options)
    else:
        result = {"comparison": compare(models[1], models[0], **options), "margin": MARGIN}
    conditions = {"trained_weights": all(trained), "precision": precision, **timing}
    environment = runtime.environment_stamp(device)
    return {**_names(args), **conditions, **result, "environment": environment}


def _names(args: argparse.Namespace) -> dict[str, str]:
    """What the output says of the runs: `run`, or `baseline` and `ours`."""
    runs = {"run": args.run} if args.run else dict(zip(_SIDES, args.compare, strict=True))
    return {key: _name(run, args.output) for key, run in runs.items()}


def _check_same_runs(args: argparse.Namespace) -> None:
    """ValueError where the output is of other runs."""
    content, names = read_json(args.output), _names(args)
    stored = {key: content[key] for key in ("run", *_SIDES) if key in content}
    if stored != names:
        raise ValueError(
            f"{args.output}: found the latency of {' and '.join(map(str, stored.values()))}, "
            f"expected {' and '.join(names.values())}; name another --output, or delete it"
        )


def _name(run: Path, output: Path | None) -> str:
    """The run's name in its log directory where the output is LOG_DIR/latency/FILE, as a study
    writes it; else that of its own directory."""
    if output is not None and output.absolute().parent.name == "latency":
        log_dir = output.absolute().parents[1]
        if run.absolute().is_relative_to(log_dir):
            return run.absolute().relative_to(log_dir).as_posix()
    return run.name


def _own_precision(paths: Sequence[Path]) -> str:
    """What the runs' metrics.json say, fp32 where none does; ValueError where they disagree."""
    files = [path / "metrics.json" for path in paths]
    dtypes = {str(read_json(file).get("precision") or "fp32") for file in files if file.is_file()}
    if len(dtypes) > 1 or not dtypes <= DTYPES.keys():
        raise ValueError(
            f"precision: found {' and '.join(sorted(dtypes))} in {' and '.join(map(str, files))}, "
            f"expected one of {', '.join(DTYPES)} for all models; state it with --precision"
        )
    return next(iter(dtypes), "fp32")


if __name__ == "__main__":
    sys.exit(main())
