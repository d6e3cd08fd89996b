"""What compilation costs a study of 12 (or --runs) short runs, before and after.

    python -m benchmarks.compile_cost --config configs/miniature_embed.yaml

Before: every run in a process of its own, the whole model compiled, no cache kept. After: one
compiled block serves all layers, the cache on disk is kept between runs (PyTorch's default), so
that only the first run of a shape compiles. The first optimizer step is timed, less the median of
the next two. The runs are the sweep's experiments in turn, so that later ones are seeds of the
first. Writes results/benchmarks/compile_cost.json.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks import record
from src.spec.allocation import allocate
from src.spec.command_line import Parser, at_least
from src.spec.config import ModelConfig, load_sweep

SEQUENCES, SEQ_LEN = 16, 128


def first_steps(
    connection: Connection, model: ModelConfig, whole: bool, device: str, threads: int
) -> None:
    """Seconds of three optimizer steps of a fresh process, the first of which compiles."""
    import time

    import torch

    from src.compute.compute_config import LOSS_CHUNK, Machine
    from src.models.transformer import Transformer
    from src.spec.config import TrainingConfig
    from src.training_step import build_optimizer, compile_blocks, next_token_loss

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    machine = Machine(
        device=torch.device(device), precision="bf16", micro_batch=SEQUENCES, compile=True,
        threads=threads,
        loss_chunk=LOSS_CHUNK[device],
    )  # fmt: skip
    net = Transformer(model).to(device)
    optimizer = build_optimizer(net, TrainingConfig())
    if whole:
        setattr(net, "hidden", torch.compile(net.hidden, dynamic=False))  # noqa: B010
    else:
        compile_blocks(net, machine)
    tokens = torch.randint(model.vocab_size, (SEQUENCES, SEQ_LEN + 1)).to(device)
    seconds = []
    for _ in range(3):
        begun = time.perf_counter()
        objective, _ = next_token_loss(net, tokens, machine, 1e-4)
        objective.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        float(objective.detach())
        seconds.append(time.perf_counter() - begun)
    connection.send(seconds)


def run(model: ModelConfig, whole: bool, cache: Path, device: str, threads: int) -> float:
    """Compile seconds of one run with its inductor cache in `cache`."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=first_steps, args=(theirs, model, whole, device, threads))
    child.start()
    theirs.close()
    seconds = ours.recv()
    child.join()
    return seconds[0] - (seconds[1] + seconds[2]) / 2


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.compile_cost", description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/embed_ratio.yaml"))
    parser.add_argument("--runs", type=at_least(1), default=12)
    record.add_arguments(parser)
    asked = parser.parse_args(arguments)
    sweep = load_sweep(asked.config)
    answers = allocate({run.experiment: run.model for run in sweep.runs}, sweep.baseline)
    cells = [answers[name].model for name in sweep.names]
    shapes = [cells[i % len(cells)] for i in range(asked.runs)]
    found: dict[str, list[float]] = {"before": [], "after": []}
    conditions = record.facts(asked.device, asked.threads, config=str(asked.config))
    kept = Path(tempfile.mkdtemp(prefix="inductor-kept-"))
    for shape in shapes:
        fresh = Path(tempfile.mkdtemp(prefix="inductor-fresh-"))
        found["before"].append(run(shape, True, fresh, asked.device, asked.threads))
        shutil.rmtree(fresh)
        found["after"].append(run(shape, False, kept, asked.device, asked.threads))
        print(f"before {found['before'][-1]:.1f} s, after {found['after'][-1]:.1f} s", flush=True)
        total = {name: sum(values) for name, values in found.items()}
        results = {
            "compile_seconds": found,
            "total_seconds": total,
            "ratio": total["before"] / total["after"],
        }
        record.write(asked.output / "compile_cost.json", conditions, results)
    shutil.rmtree(kept)
    print(
        f"{asked.runs} runs: before {total['before']:.0f} s, after {total['after']:.0f} s; "
        f"{asked.output / 'compile_cost.json'}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
