"""Tokens a second and memory of a training step by model size and sequence length.

    python -m benchmarks.scaling [--device cuda]

Sizes 3M to 100M at T = 128, lengths 128 to 2,048 at 10M (35 % share, GLU 8/3, V = 16,000; 3M with
V = 8,192). Each point is a process of its own. Beside the measured time a token stands the
arithmetic (FLOPs a token): where time a token grows faster than FLOPs a token, cost grows faster
than work. Writes results/benchmarks/scaling-<device>.{json,md}.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from benchmarks import record
from benchmarks.child import Child
from benchmarks.peers import Work
from src.compute.cores import WAITING
from src.spec.allocation import allocate, flops_per_token
from src.spec.command_line import Parser, at_least
from src.spec.config import ModelRequest
from src.spec.metric_keys import TOTAL_PARAMS

SIZES = ((3_000_000, 8_192), (10_000_000, 16_000), (30_000_000, 16_000), (100_000_000, 16_000))
# 35 % of 100M in a table of 16,000 would be d = 2,188 and one layer: the larger ones spend less.
SHARES = {3_000_000: 0.35, 10_000_000: 0.35, 30_000_000: 0.2, 100_000_000: 0.1}
LENGTHS = (128, 256, 512, 1_024, 2_048)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp16", "fp32"))
    parser.add_argument("--tokens", type=at_least(128), default=2_048, help="tokens of a step")
    parser.add_argument("--turns", type=at_least(1), default=3)
    parser.add_argument("--eager", action="store_true")
    record.add_arguments(parser)
    args = parser.parse_args(arguments)
    points = [(size, vocab, 128) for size, vocab in SIZES]
    points += [(*SIZES[1], length) for length in LENGTHS if length != 128]
    rows: list[dict[str, Any]] = []
    conditions = record.facts(
        args.device, args.threads, precision=args.precision, compile=not args.eager,
        tokens_a_step=args.tokens,
    )  # fmt: skip
    path = args.output / f"scaling-{args.device}.json"
    for size, vocab, length in points:
        rows.append(_point(args, size, vocab, length))
        print(json.dumps(rows[-1]), flush=True)
        record.write(
            path, conditions, {"points": rows}, title="Scaling of the training step",
            text=table(rows),
        )  # fmt: skip
    print(f"{path} and .md")
    return 0


def _point(args: Any, size: int, vocab: int, length: int) -> dict[str, Any]:
    request = ModelRequest(total_params=size, vocab_size=vocab, embedding_ratio=SHARES[size])
    allocation = allocate({"point": request})["point"]
    sequences = max(1, args.tokens // length)
    work = Work(
        model=allocation.model, device=args.device, precision=args.precision,
        compile=not args.eager, threads=args.threads, batch_size=sequences, seq_len=length,
        micro_batch=sequences,
    )  # fmt: skip
    child = Child("ours", work, variables=WAITING)
    first = child.receive()["ready"]["first_step_seconds"]
    best = min(child.seconds(1) for _ in range(args.turns))
    flops = flops_per_token(allocation.model, length)
    return {
        TOTAL_PARAMS.built: allocation.params.total,
        "d_model": allocation.model.d_model,
        "n_layers": allocation.model.n_layers,
        "vocab_size": vocab,
        "seq_len": length,
        "tokens_per_s": sequences * length / best,
        "us_per_token": 1e6 * best / (sequences * length),
        "mflop_per_token": flops / 1e6,
        "gflops_per_s": flops * sequences * length / best / 1e9,
        "first_step_seconds": first,
        "peak_mib": child.close(),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The points as Markdown; µs/MFLOP is cost over work: where it rises, cost grows faster."""
    lines = [
        "| parameters | d_model | layers | T | tokens/s | µs/token | MFLOP/token | µs/MFLOP "
        "| GFLOP/s | peak MiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {r[TOTAL_PARAMS.built]:,} | {r['d_model']} | {r['n_layers']} | {r['seq_len']} "
        f"| {r['tokens_per_s']:,.0f} | {r['us_per_token']:.0f} | {r['mflop_per_token']:.1f} "
        f"| {r['us_per_token'] / r['mflop_per_token']:.2f} "
        f"| {r['gflops_per_s']:.0f} | {r['peak_mib']:,.0f} |"
        for r in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
