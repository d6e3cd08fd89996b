"""Which way to the next-token loss and its gradients is fastest, and how far each is from float64.

    python -m benchmarks.loss_paths [--device cuda]

Paths: plain (logits of all rows, float32 loss), plain compiled, PyTorch's F.linear_cross_entropy
where it exists (from 2.13), ours in chunks, eager and compiled. They take turns; milliseconds are
medians, errors are relative to float64 in the norm of the table's gradient. Writes
results/benchmarks/loss_paths-<device>.{json,md}.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import record
from src.spec.command_line import Parser, at_least


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.loss_paths", description=__doc__)
    parser.add_argument("--rows", type=at_least(1), default=2_048, help="tokens of a micro-batch")
    parser.add_argument("--d_model", type=at_least(1), default=224)
    parser.add_argument("--vocab_size", type=at_least(2), default=16_000)
    parser.add_argument("--chunks", type=at_least(1), nargs="+", default=[128, 256, 512, 1_024])
    parser.add_argument("--turns", type=at_least(1), default=9)
    record.add_arguments(parser)
    asked = parser.parse_args(arguments)

    import torch

    from src.compute.autotune import seconds
    from src.compute.runtime import keep_freed_memory

    torch.set_num_threads(asked.threads)
    if asked.device == "cpu":
        keep_freed_memory()
    torch.manual_seed(0)
    device = torch.device(asked.device)
    hidden = torch.randn(asked.rows, asked.d_model, device=device)
    table = 0.02 * torch.randn(asked.vocab_size, asked.d_model, device=device)
    targets = torch.randint(asked.vocab_size, (asked.rows,), device=device)
    exact = _gradients(_plain, hidden.double(), table.double(), targets)[1]
    rows: list[dict[str, Any]] = []
    runs: dict[str, Callable[[], Any]] = {}
    for name, path in paths(asked.chunks).items():
        runs[name] = lambda path=path: _gradients(path, hidden, table, targets)
        loss, gradient = runs[name]()
        error = float((gradient.double() - exact).norm() / exact.norm())
        rows.append({"path": name, "loss": loss, "relative_error_of_gradient": error})
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(asked.turns):
        for name, run in runs.items():
            times[name].append(seconds(run, device))
    for row in rows:
        row["ms"] = 1e3 * statistics.median(times[row["path"]])
        print(json.dumps(row), flush=True)
    path = asked.output / f"loss_paths-{asked.device}.json"
    conditions = record.facts(
        asked.device, asked.threads, rows=asked.rows, d_model=asked.d_model,
        vocab_size=asked.vocab_size,
    )  # fmt: skip
    record.write(
        path, conditions, {"paths": rows}, title="Ways to the loss and its gradients",
        text=table(rows),
    )  # fmt: skip
    print(f"{path} and .md")
    return 0


def paths(chunks: Sequence[int]) -> dict[str, Callable[..., Any]]:
    """name -> (hidden (N, D), table (V, D), targets (N,)) -> scalar loss; products in bf16."""
    import torch
    import torch.nn.functional as F

    from src.models.loss import chunked_cross_entropy

    found: dict[str, Callable[..., Any]] = {
        "plain": _plain_bf16,
        "plain, compiled": torch.compile(_plain_bf16, dynamic=False),
    }
    if hasattr(F, "linear_cross_entropy"):
        found["F.linear_cross_entropy"] = lambda h, w, t: F.linear_cross_entropy(
            h.bfloat16(), w.bfloat16(), t
        )
    for compiled in (False, True):
        for chunk in chunks:
            name = f"ours, chunks of {chunk}{', compiled' if compiled else ''}"
            found[name] = lambda h, w, t, chunk=chunk, compiled=compiled: chunked_cross_entropy(
                h, w, t, 0.0, chunk=chunk, dtype=torch.bfloat16, compiled=compiled
            )[0]
    return found


def _plain(hidden: Any, table: Any, targets: Any) -> Any:
    import torch.nn.functional as F

    return F.cross_entropy(F.linear(hidden, table), targets)


def _plain_bf16(hidden: Any, table: Any, targets: Any) -> Any:
    import torch.nn.functional as F

    return F.cross_entropy(F.linear(hidden.bfloat16(), table.bfloat16()).float(), targets)


def _gradients(
    path: Callable[..., Any], hidden: Any, table: Any, targets: Any
) -> tuple[float, Any]:
    """The loss and d loss / d table; the gradient of `hidden` is computed too."""
    import torch

    hidden, table = hidden.detach().requires_grad_(), table.detach().requires_grad_()
    loss = path(hidden, table, targets)
    _, gradient = torch.autograd.grad(loss, (hidden, table))
    return float(loss.detach()), gradient


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The paths as Markdown."""
    lines = ["| path | ms | relative error of the table's gradient |", "| --- | --- | --- |"]
    lines += [
        f"| {row['path']} | {row['ms']:.0f} | {row['relative_error_of_gradient']:.1e} |"
        for row in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
