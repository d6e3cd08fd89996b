"""How long evaluation takes: perplexity of a whole split, and the aggregation of 500 runs.

    python -m benchmarks.evaluation --tokens data/english_tokenized [--device cuda]

An untrained model of --exp scores the validation split (overlapping windows); synthetic run
directories (tests/synthetic_runs.py) are aggregated with and without figures. Wall and CPU seconds,
because machines are shared. Writes results/benchmarks/evaluation-<device>.json.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import record
from src.spec.allocation import allocate
from src.spec.command_line import Parser
from src.spec.config import load_sweep

RUNS = 500


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.evaluation", description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/embed_ratio.yaml"))
    parser.add_argument("--exp", default="emb35")
    parser.add_argument("--tokens", type=Path, default=Path("data/english_tokenized"))
    record.add_arguments(parser)
    args = parser.parse_args(arguments)

    import torch

    from src.compute.runtime import keep_freed_memory

    torch.set_num_threads(args.threads)
    if args.device == "cpu":
        keep_freed_memory()  # as every run does
    conditions = record.facts(args.device, args.threads)
    results: dict[str, Any] = {"perplexity": _perplexity(args), "aggregation": []}
    path = args.output / f"evaluation-{args.device}.json"
    record.write(path, conditions, results)
    for figures in (False, True):
        results["aggregation"].append(_aggregation(figures))
        record.write(path, conditions, results)
    print(json.dumps({**conditions, **results}, indent=1))
    return 0


def _perplexity(args: Any) -> dict[str, Any]:
    import torch

    from src.data import tokens as data
    from src.evaluation import perplexity
    from src.models.transformer import Transformer

    sweep = load_sweep(args.config)
    allocations = allocate({run.experiment: run.model for run in sweep.runs}, sweep.baseline)
    run, config = sweep.run(args.exp, 0), allocations[args.exp].model
    tokens = data.load(args.tokens / f"v{config.vocab_size}", config.vocab_size)
    torch.manual_seed(0)
    model = Transformer(config).to(args.device).eval()
    start, cpu_start = time.perf_counter(), time.process_time()
    result = perplexity.evaluate_split(
        model, tokens.validation.tokens, tokens.validation.documents,
        context=run.training.seq_len, autocast_dtype=torch.bfloat16, device=args.device,
    )  # fmt: skip
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu_start,
        "bytes": int(result["document_bytes"].sum()),
        "tokens": result["tokens_scored"],
        "loss": result["loss"],
    }


def _aggregation(figures: bool) -> dict[str, Any]:
    from tests.synthetic_runs import SHARE_SWEEP, write_sweep

    with tempfile.TemporaryDirectory() as folder:
        logs = Path(folder) / "logs"
        for number in range(-(-RUNS // len(SHARE_SWEEP))):
            write_sweep(logs / f"{number:03}", "embed_ratio.yaml", SHARE_SWEEP)
        count = sum(1 for _ in logs.rglob("config.yaml"))
        start = time.perf_counter()
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "scripts/aggregate_results.py", "--log_dir", str(logs),
             "--output", str(Path(folder) / "all.csv"), *([] if figures else ["--no_figures"])],
            check=True, capture_output=True,
        )  # fmt: skip
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return {
            "runs": count,
            "figures": figures,
            "seconds": time.perf_counter() - start,
            "cpu_seconds": after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime,
        }


if __name__ == "__main__":
    raise SystemExit(main())
