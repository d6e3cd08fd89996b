"""Tokens a second of the training step against its peers, interleaved, with roof and MFU.

    python -m benchmarks.throughput --config configs/embed_ratio.yaml --exp emb35 emb25 emb45

Every peer runs in a process of its own, all started before anything is timed; they take turns of
a few steps, so that other load on the machine meets all of them. Medians over the turns and
ratios of one turn's neighbours; start-up, compilation and peak memory apart. Peers get the same
precision, compile and fused optimizer, and each its own best micro-batch, found first.
Needs accelerate for the Trainer (requirements-test.txt). Writes results/benchmarks/.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.peers import PEERS, Work, peer
from src.spec.allocation import allocate, flops_per_token
from src.spec.command_line import Parser, at_least
from src.spec.config import ModelConfig, load_sweep

OUTPUT = Path("results/benchmarks")
# Bytes a second of device memory, NVIDIA's data sheets; with TFLOP/s of bf16 (V100: fp16).
ROOFS = {
    "H200": (4.8e12, 989e12),
    "H100": (3.35e12, 989e12),
    "A100-SXM4-80GB": (2.04e12, 312e12),
    "A100": (1.56e12, 312e12),
    "V100": (0.9e12, 125e12),
}


class Child:
    """A peer in its own process."""

    def __init__(self, name: str, work: Work) -> None:
        context = multiprocessing.get_context("spawn")
        self.name, self.work = name, work
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=peer, args=(theirs, name, work), daemon=True)
        self.process.start()
        theirs.close()

    def receive(self) -> dict[str, Any]:
        try:
            message = self.pipe.recv()
        except EOFError:
            message = {"error": f"ended with {self.process.exitcode}"}
        if "error" in message:
            raise RuntimeError(f"{self.name}: {message['error']}")
        return message

    def seconds(self, steps: int) -> float:
        self.pipe.send(steps)
        return self.receive()["seconds"]

    def close(self) -> float:
        """Peak MiB of its life."""
        self.pipe.send(None)
        peak = self.receive()["peak_mib"]
        self.process.join(30)
        return peak


def best_micro_batch(name: str, work: Work, candidates: Sequence[int], steps: int) -> int:
    """The fastest of `candidates` for this peer; what does not fit in memory is left out."""
    found: dict[int, float] = {}
    for size in candidates:
        child = Child(name, replace(work, micro_batch=size))
        try:
            child.receive()
            found[size] = min(child.seconds(steps) for _ in range(2))
            child.close()
        except RuntimeError as error:
            print(f"  {name}, micro-batch {size}: {error}", flush=True)
        finally:
            child.process.kill()
    if not found:
        raise RuntimeError(f"{name}: no micro-batch of {list(candidates)} ran")
    print(f"  {name}: " + ", ".join(f"{k}: {v:.2f} s" for k, v in found.items()), flush=True)
    return min(found, key=lambda size: found[size])


def compare(
    work: Work, names: Sequence[str], micro: Mapping[str, int], turns: int, steps: int
) -> dict[str, Any]:
    """Interleaved turns of all peers; tokens/s, ratios to ours, start-up and memory by peer."""
    children, facts = {}, {}
    for name in names:  # one after the other: compiling at once would fight for the cores
        children[name] = Child(name, replace(work, micro_batch=micro[name]))
        facts[name] = children[name].receive()["ready"]
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(turns):
        order = list(names) if turn % 2 == 0 else list(reversed(names))
        for name in order:
            times[name].append(children[name].seconds(steps))
    tokens = steps * work.batch_size * work.seq_len
    found: dict[str, Any] = {}
    for name in names:
        ratios = [theirs / ours for theirs, ours in zip(times[name], times["ours"], strict=True)]
        found[name] = {
            "tokens_per_s": tokens / statistics.median(times[name]),
            "tokens_per_s_turns": [round(tokens / t, 1) for t in times[name]],
            "ours_over_it": statistics.median(ratios),
            "ours_over_it_range": [min(ratios), max(ratios)],
            "micro_batch": micro[name],
            "peak_mib": children[name].close(),
            **facts[name],
        }
    return found


def bytes_per_token(config: ModelConfig) -> float:
    """Memory traffic of a fused bf16 step with cache-resident cross-entropy (docs of the work:
    2 L (62 d + 18 r d), r = d_ff / d, and some 5 KB for the head)."""
    return 2 * config.n_layers * (62 * config.d_model + 18 * config.d_ff) + 5_000


def limits(device: str, config: ModelConfig, seq_len: int, threads: int) -> dict[str, Any]:
    """FLOPs a token, and the roofs of the device: of memory on a known GPU, of bf16 products of
    this model's shapes as measured on a CPU."""
    flops = flops_per_token(config, seq_len)
    found: dict[str, Any] = {"mflop_per_token": flops / 1e6}
    if device == "cuda":
        import torch

        name = torch.cuda.get_device_name()
        for key, (bandwidth, peak) in ROOFS.items():
            if key in name:
                found["roof_memory_tokens_per_s"] = bandwidth / bytes_per_token(config)
                found["peak_tflops"] = peak / 1e12
                break
        return found
    found["peak_tflops"] = _products_tflops(config, threads)
    found["roof_products_tokens_per_s"] = found["peak_tflops"] * 1e12 / flops
    return found


def _products_tflops(config: ModelConfig, threads: int) -> float:
    """TFLOP/s of the bf16 products of one block and the head, forward shapes, 2,048 rows."""
    import time

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
    best: dict[tuple[int, int], float] = {}
    for _ in range(5):
        for x, w in pairs:
            begun = time.perf_counter()
            torch.nn.functional.linear(x, w)
            shape = (x.shape[1], w.shape[0])
            best[shape] = min(best.get(shape, 1e9), time.perf_counter() - begun)
    work = sum(2 * 2048 * k * n * c for (k, n), c in count.items())
    return work / sum(best[s] * c for s, c in count.items()) / 1e12


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.throughput", description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/embed_ratio.yaml"))
    parser.add_argument("--exp", nargs="+", default=["emb35"])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp16", "fp32"))
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--batch_size", type=at_least(1), default=64, help="sequences of a step")
    parser.add_argument("--seq_len", type=at_least(2), default=128)
    parser.add_argument("--micro_batches", type=at_least(1), nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--threads", type=at_least(1), default=os.cpu_count())
    parser.add_argument("--turns", type=at_least(1), default=7)
    parser.add_argument("--steps", type=at_least(1), default=1, help="steps of a turn")
    parser.add_argument("--eager", action="store_true", help="no torch.compile for anybody")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    asked = parser.parse_args(arguments)
    names = ["ours", *(name for name in asked.peers if name != "ours")]
    sweep = load_sweep(asked.config)
    answers = allocate({run.experiment: run.model for run in sweep.runs}, sweep.baseline)
    micro: dict[str, int] = {}
    cells: dict[str, Any] = {}
    for experiment in asked.exp:
        work = Work(
            model=answers[sweep.run(experiment, 0).experiment].model, device=asked.device,
            precision=asked.precision, compile=not asked.eager, threads=asked.threads,
            batch_size=asked.batch_size, seq_len=asked.seq_len, micro_batch=1,
        )  # fmt: skip
        print(f"{experiment}:", flush=True)
        for name in names:  # searched at the first cell, kept for the others
            fitting = [m for m in asked.micro_batches if asked.batch_size % m == 0]
            micro[name] = micro.get(name) or best_micro_batch(name, work, fitting, asked.steps)
        rows = compare(work, names, micro, asked.turns, asked.steps)
        roof = limits(asked.device, work.model, work.seq_len, work.threads)
        for row in rows.values():
            _against(row, roof)
        cells[experiment] = {"limits": roof, "peers": rows}
        print(table({experiment: cells[experiment]}), flush=True)
    _write(asked, cells)
    return 0


def _against(row: dict[str, Any], roof: Mapping[str, float]) -> None:
    if "peak_tflops" in roof:
        row["mfu"] = (
            row["tokens_per_s"] * roof["mflop_per_token"] * 1e6 / roof["peak_tflops"] / 1e12
        )
    if "roof_memory_tokens_per_s" in roof:
        row["of_memory_roof"] = row["tokens_per_s"] / roof["roof_memory_tokens_per_s"]


def table(cells: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "| cell | peer | tokens/s | ours over it (range) | MFU | of memory roof | micro-batch "
        "| first step s | peak MiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for cell, found in cells.items():
        for name, row in found["peers"].items():
            low, high = row["ours_over_it_range"]
            mfu = f"{100 * row['mfu']:.0f} %" if "mfu" in row else "–"
            roof = f"{100 * row['of_memory_roof']:.0f} %" if "of_memory_roof" in row else "–"
            lines.append(
                f"| {cell} | {name} | {row['tokens_per_s']:,.0f} | {row['ours_over_it']:.2f} "
                f"({low:.2f}–{high:.2f}) | {mfu} | {roof} | {row['micro_batch']} | "
                f"{row['first_step_seconds']:.1f} | {row['peak_mib']:,.0f} |"
            )
    return "\n".join(lines)


def _write(asked: argparse.Namespace, cells: Mapping[str, Any]) -> None:
    import torch
    import transformers

    from src.compute.runtime import device_name

    device = device_name(torch.device(asked.device))
    facts = {
        "date": datetime.date.today().isoformat(),
        "device": device,
        "threads": asked.threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "precision": asked.precision,
        "compile": not asked.eager,
        "batch": f"{asked.batch_size} x {asked.seq_len} tokens a step",
        "turns": asked.turns,
        "steps_a_turn": asked.steps,
        "load_average": os.getloadavg()[0],
        "command": "python -m benchmarks.throughput " + " ".join(sys.argv[1:]),
    }
    name = f"throughput-{asked.device}-{asked.seq_len}{'-eager' if asked.eager else ''}"
    asked.output.mkdir(parents=True, exist_ok=True)
    path = asked.output / f"{name}.json"
    path.write_text(json.dumps({**facts, "cells": cells}, indent=1) + "\n", encoding="utf-8")
    head = "\n".join(f"- {key}: {value}" for key, value in facts.items())
    path.with_suffix(".md").write_text(
        f"# Training throughput\n\n{head}\n\nMFU: on a CPU against the measured rate of the bf16 "
        f"products of the same shapes.\n\n{table(cells)}\n",
        encoding="utf-8",
    )
    print(f"{path} and .md")


if __name__ == "__main__":
    raise SystemExit(main())
