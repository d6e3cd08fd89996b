"""Tokens a second of the training step against its peers, interleaved, with roof and MFU.

    python -m benchmarks.throughput --config configs/embed_ratio.yaml --exp emb35 emb25 emb45
    python -m benchmarks.throughput --base main~20 --peers ours     (today's build against another)

Every peer runs in a process of its own, all started before anything is timed; they take turns of
a few steps, so that other load on the machine meets all of them. Medians over the turns and
ratios of one turn's neighbours; start-up, compilation and peak memory apart. Peers get the same
precision, compile and fused optimizer, and each its own best micro-batch: MICRO_BATCH, or the best
of several --micro_batches. --base REV adds this repository's own loop as it was at that commit.
Each turn is printed and written at once, into results/benchmarks/; a configuration takes under five
minutes on two cores. Needs accelerate for the Trainer (requirements-test.txt).
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.child import ROOT, Child, clone
from benchmarks.peers import PEERS, Work
from src.compute.cores import WAITING
from src.spec.allocation import allocate, flops_per_token
from src.spec.command_line import OUR_FAULT, Parser, at_least, refuse
from src.spec.config import ModelConfig, load_sweep

BASE = "base"  # the older build's name among the peers
# Sequences of 128 tokens; each peer's best of 8, 16, 32 and 64 on two cores (2026-11-23). Ours
# takes the same time at 8 and at 16, which is what a run chooses.
MICRO_BATCH = {"ours": 16, BASE: 16, "nanogpt": 16, "trainer": 8}
SEARCHED = (8, 16, 32, 64)  # on a GPU, where nothing is known and compiling is not most of the time
_WAITING_BEFORE = {"OMP_WAIT_POLICY": "PASSIVE"}  # as older builds' runs set it themselves
LEAST_TURNS = 3  # whatever --minutes says
MFU = "MFU: on a CPU against the measured rate of the bf16 products of the same shapes."
# Bytes a second of device memory, NVIDIA's data sheets; with TFLOP/s of bf16 (V100: fp16).
ROOFS = {
    "H200": (4.8e12, 989e12),
    "H100": (3.35e12, 989e12),
    "A100-SXM4-80GB": (2.04e12, 312e12),
    "A100": (1.56e12, 312e12),
    "V100": (0.9e12, 125e12),
}


def best_micro_batch(
    name: str, start: Callable[[str, int], Child], candidates: Sequence[int], steps: int
) -> int:
    """The fastest of `candidates` for this peer; what does not fit in memory is left out."""
    seconds: dict[int, float] = {}
    for size in candidates:
        child = start(name, size)
        try:
            child.receive()
            seconds[size] = min(child.seconds(steps) for _ in range(2))
            print(f"  {name}, micro-batch {size}: {seconds[size]:.2f} s a turn", flush=True)
        except RuntimeError as error:
            print(f"  {name}, micro-batch {size}: {error}", flush=True)
        finally:
            child.kill()
    if not seconds:
        raise RuntimeError(f"{name}: no micro-batch of {list(candidates)} ran")
    return min(seconds, key=lambda size: seconds[size])


def compare(
    children: Mapping[str, Child],
    *,
    turns: int,
    steps: int,
    tokens: int,
    seconds: float,
    on_turn: Callable[[dict[str, dict[str, Any]]], None],
) -> dict[str, dict[str, Any]]:
    """Interleaved turns of all peers, at most so many and no new one after `seconds`; `on_turn`
    gets what is known after each: tokens/s (`tokens` a turn) and ratios to ours, by peer."""
    facts: dict[str, Any] = {}
    for name, child in children.items():
        try:
            facts[name] = child.receive()["ready"]
        except RuntimeError as error:
            if name == "ours":
                raise
            print(f"  {error}: left out", flush=True)
            child.kill()
    children = {name: child for name, child in children.items() if name in facts}
    start = time.monotonic()
    times: dict[str, list[float]] = {name: [] for name in children}
    rows: dict[str, dict[str, Any]] = {}
    for turn in range(turns):
        if turn >= LEAST_TURNS and time.monotonic() - start > seconds:
            break
        for name in list(children) if turn % 2 == 0 else reversed(list(children)):
            times[name].append(children[name].seconds(steps))
        rows = {name: {**summary(times, name, tokens), **facts[name]} for name in children}
        speeds = ", ".join(f"{name} {tokens / times[name][-1]:,.0f}" for name in children)
        print(f"  turn {turn + 1} of {turns}: {speeds} tokens/s", flush=True)
        on_turn(rows)
    for name, child in children.items():
        rows[name]["peak_mib"] = child.close()
    on_turn(rows)
    return rows


def summary(times: Mapping[str, Sequence[float]], name: str, tokens: int) -> dict[str, Any]:
    """Medians of a peer's turns, and of the ratios to ours of the same turn."""
    ratios = [peer / ours for peer, ours in zip(times[name], times["ours"], strict=True)]
    return {
        "tokens_per_s": tokens / statistics.median(times[name]),
        "tokens_per_s_turns": [round(tokens / t, 1) for t in times[name]],
        "ours_over_it": statistics.median(ratios),
        "ours_over_it_range": [min(ratios), max(ratios)],
    }


def bytes_per_token(config: ModelConfig) -> float:
    """Memory traffic of a fused bf16 step with cache-resident cross-entropy (docs of the work:
    2 L (62 d + 18 r d), r = d_ff / d, and some 5 KB for the head)."""
    return 2 * config.n_layers * (62 * config.d_model + 18 * config.d_ff) + 5_000


def limits(device: str, config: ModelConfig, seq_len: int, threads: int) -> dict[str, Any]:
    """FLOPs a token, and the roofs of the device: of memory on a known GPU, of bf16 products of
    this model's shapes as measured on a CPU."""
    flops = flops_per_token(config, seq_len)
    result: dict[str, Any] = {"mflop_per_token": flops / 1e6}
    if device == "cuda":
        import torch

        name = torch.cuda.get_device_name()
        for key, (bandwidth, peak) in ROOFS.items():
            if key in name:
                result["roof_memory_tokens_per_s"] = bandwidth / bytes_per_token(config)
                result["peak_tflops"] = peak / 1e12
                break
        return result
    result["peak_tflops"] = _products_tflops(config, threads)
    result["roof_products_tokens_per_s"] = result["peak_tflops"] * 1e12 / flops
    return result


def _products_tflops(config: ModelConfig, threads: int) -> float:
    """TFLOP/s of the bf16 products of one block and the head, forward shapes, 2,048 rows."""
    import torch

    torch.set_num_threads(threads)
    d, f, a = config.d_model, config.d_ff, config.n_heads * config.head_dim
    shapes = [(d, 3 * a)] * config.n_layers + [(a, d)] * config.n_layers
    shapes += [(d, 2 * f)] * config.n_layers + [(f, d)] * config.n_layers
    shapes += [(d, config.vocab_size)]
    pairs = [
        (torch.randn(2048, k).bfloat16(), torch.randn(n, k).bfloat16()) for k, n in set(shapes)
    ]
    count = {(k, n): shapes.count((k, n)) for k, n in set(shapes)}
    # Written into memory that is there: fresh pages of 65 MB would be half of the head's time.
    outputs = {(k, n): torch.zeros(2048, n, dtype=torch.bfloat16) for k, n in count}
    best: dict[tuple[int, int], float] = {}
    for _ in range(5):
        for x, w in pairs:
            shape = (x.shape[1], w.shape[0])
            start = time.perf_counter()
            torch.mm(x, w.T, out=outputs[shape])
            best[shape] = min(best.get(shape, 1e9), time.perf_counter() - start)
    work = sum(2 * 2048 * k * n * c for (k, n), c in count.items())
    return work / sum(best[s] * c for s, c in count.items()) / 1e12


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.throughput", description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/embed_ratio.yaml"))
    parser.add_argument("--exp", nargs="+", default=["emb35"])
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp16", "fp32"))
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--base", metavar="REV", help="a commit whose own loop is a peer too")
    parser.add_argument("--batch_size", type=at_least(1), default=64, help="sequences of a step")
    parser.add_argument("--seq_len", type=at_least(2), default=128)
    parser.add_argument(
        "--micro_batches", type=at_least(1), nargs="+", help="one for all, or several to search"
    )
    parser.add_argument("--turns", type=at_least(1), default=7)
    parser.add_argument("--minutes", type=at_least(1), default=3, help="of turns a configuration")
    parser.add_argument("--steps", type=at_least(1), default=1, help="steps of a turn")
    parser.add_argument("--eager", action="store_true", help="no torch.compile for anybody")
    record.add_arguments(parser)
    args = parser.parse_args(arguments)
    try:
        with ExitStack() as stack:
            roots: dict[str, Path] = {}
            base = None
            if args.base is not None:
                roots[BASE], base = stack.enter_context(clone(args.base))
            return _measure(args, roots, base)
    except (ValueError, OSError) as error:
        return refuse(error)
    except RuntimeError as error:  # of our own step, in its process
        print(error, file=sys.stderr)
        return OUR_FAULT


def _measure(args: Any, roots: Mapping[str, Path], base: str | None) -> int:
    import transformers

    names = ["ours", *roots, *(name for name in args.peers if name != "ours")]
    sweep = load_sweep(args.config)
    allocations = allocate({run.experiment: run.model for run in sweep.runs}, sweep.baseline)
    conditions = record.facts(
        args.device, args.threads, transformers=transformers.__version__,
        precision=args.precision, compile=not args.eager,
        batch=f"{args.batch_size} x {args.seq_len} tokens a step",
        turns=args.turns, steps_a_turn=args.steps, base=base,
    )  # fmt: skip
    name = f"throughput-{args.device}-{args.seq_len}{'-eager' if args.eager else ''}"
    path, results = args.output / f"{name}.json", {}
    micro_batches: dict[str, int] = {}

    def write(experiment: str, result: dict[str, Any]) -> None:
        results[experiment] = result
        text = f"{MFU}\n\n{table(results)}"
        record.write(path, conditions, {"cells": results}, title="Training throughput", text=text)

    for experiment in args.exp:
        work = Work(
            model=allocations[sweep.run(experiment, 0).experiment].model, device=args.device,
            precision=args.precision, compile=not args.eager, threads=args.threads,
            batch_size=args.batch_size, seq_len=args.seq_len, micro_batch=1,
        )  # fmt: skip
        print(f"{experiment}:", flush=True)
        start = partial(_start, work, roots)
        micro_batches = micro_batches or _micro_batches(args, names, start)
        _measure_configuration(args, work, start, micro_batches, partial(write, experiment))
        print(table({experiment: results[experiment]}), flush=True)
    print(f"{path} and .md")
    return 0


def _start(work: Work, roots: Mapping[str, Path], name: str, micro_batch: int) -> Child:
    peer = "ours" if name == BASE else name
    waiting = _WAITING_BEFORE if name == BASE else WAITING  # the best way for all peers
    return Child(peer, replace(work, micro_batch=micro_batch), roots.get(name, ROOT), waiting)


def _measure_configuration(
    args: Any,
    work: Work,
    start: Callable[[str, int], Child],
    micro_batches: Mapping[str, int],
    write: Callable[[dict[str, Any]], None],
) -> None:
    """All peers on one configuration; what is known is written after every turn."""
    roof: dict[str, Any] = {}

    def on_turn(rows: dict[str, dict[str, Any]]) -> None:
        for peer, row in rows.items():
            row["micro_batch"] = micro_batches[peer]
            _add_utilization(row, roof)
        write({"limits": roof, "peers": rows})

    children: dict[str, Child] = {}
    try:
        for peer, size in micro_batches.items():
            start_time = time.monotonic()
            children[peer] = start(peer, size)
            children[peer].pipe.poll(None)  # ready or failed: together they would fight for cores
            seconds = time.monotonic() - start_time
            print(f"  {peer}: started and compiled in {seconds:.0f} s", flush=True)
        # While the children wait: beside their compilation the products would seem slower.
        roof |= limits(args.device, work.model, work.seq_len, work.threads)
        compare(
            children, turns=args.turns, steps=args.steps, seconds=60 * args.minutes,
            tokens=args.steps * work.batch_size * work.seq_len, on_turn=on_turn,
        )  # fmt: skip
    finally:
        for child in children.values():
            child.kill()


def _micro_batches(
    args: Any, names: Sequence[str], start: Callable[[str, int], Child]
) -> dict[str, int]:
    """Sequences a micro-batch for each peer; searched at the first configuration alone."""
    default = () if args.device == "cpu" else SEARCHED
    candidates = [m for m in args.micro_batches or default if args.batch_size % m == 0]
    if len(candidates) > 1:
        best: dict[str, int] = {}
        for name in names:
            try:
                best[name] = best_micro_batch(name, start, candidates, args.steps)
            except RuntimeError as error:
                if name == "ours":
                    raise
                print(f"  {error}: left out", flush=True)
        return best
    if candidates:
        return dict.fromkeys(names, candidates[0])
    scale = max(1, args.seq_len // 128)
    return {name: max(1, min(MICRO_BATCH[name] // scale, args.batch_size)) for name in names}


def _add_utilization(row: dict[str, Any], roof: Mapping[str, float]) -> None:
    if "peak_tflops" in roof:
        row["mfu"] = (
            row["tokens_per_s"] * roof["mflop_per_token"] * 1e6 / roof["peak_tflops"] / 1e12
        )
    if "roof_memory_tokens_per_s" in roof:
        row["of_memory_roof"] = row["tokens_per_s"] / roof["roof_memory_tokens_per_s"]


def table(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "| configuration | peer | tokens/s | ours over it (range) | MFU | of memory roof "
        "| micro-batch | first step s | peak MiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for experiment, result in results.items():
        for name, row in result["peers"].items():
            low, high = row["ours_over_it_range"]
            mfu = f"{100 * row['mfu']:.0f} %" if "mfu" in row else "–"
            roof = f"{100 * row['of_memory_roof']:.0f} %" if "of_memory_roof" in row else "–"
            peak = f"{row['peak_mib']:,.0f}" if "peak_mib" in row else "–"
            lines.append(
                f"| {experiment} | {name} | {row['tokens_per_s']:,.0f} | {row['ours_over_it']:.2f} "
                f"({low:.2f}–{high:.2f}) | {mfu} | {roof} | {row['micro_batch']} | "
                f"{row['first_step_seconds']:.1f} | {peak} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
