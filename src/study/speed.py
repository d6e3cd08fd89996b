"""Seconds of one training step on random tokens, whenever a line comes in.

    python -m src.study.speed --config configs/embed_ratio.yaml --exp emb35 --log_dir DIR

Prints what it runs on (JSON: device, device_name, tokens) once a first step has compiled what is
compiled, then {"seconds": ...} for every line read from standard input. Several of these, told at
the same moment, are several runs side by side; `src.study.threads` does that, and a study's
estimate asks one of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from src.compute import compute_config as machine
from src.compute import runtime
from src.spec import allocation, config
from src.spec.command_line import BAD_INPUT, OK
from src.study.sanity_training import fresh_stepper, train_once
from src.training_step import compile_blocks

STEP_TOKENS = 8_192  # of a run's batch, which may be several times as large and as slow


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs until its input ends; what the device cannot do is refused with 78."""
    parser = argparse.ArgumentParser(description="Time training steps on random tokens.")
    parser.add_argument("--config", required=True)
    parser.add_argument("--exp", required=True)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, help="default: what the run would take")
    parser.add_argument("--log_dir", type=Path, required=True, help="where its choices are kept")
    asked = parser.parse_args(arguments)
    try:
        sweep = config.load_sweep(asked.config, asked.set, "rank")
        run = sweep.run(asked.exp, 0)
        models = {r.experiment: r.model for r in sweep.runs}
        answer = allocation.allocate(models, sweep.baseline)[asked.exp]
        training = run.training
        if asked.threads is not None:
            training = dataclasses.replace(training, threads=asked.threads)
        chosen = machine.choose(training, answer.model, asked.log_dir, asked.device)
    except ValueError as error:
        print(error, file=sys.stderr)
        return BAD_INPUT
    stepper = fresh_stepper(run, answer, chosen)
    compile_blocks(stepper.model, chosen)
    sequences = max(chosen.micro_batch, min(training.batch_size, STEP_TOKENS // training.seq_len))
    generator = torch.Generator().manual_seed(0)
    shape = (sequences, training.seq_len + 1)
    batch = torch.randint(run.model.vocab_size, shape, generator=generator)
    train_once(stepper, batch, 1e-4)
    found = {
        "device": chosen.device.type,
        "device_name": runtime.device_name(chosen.device),
        "tokens": sequences * training.seq_len,
    }
    print(json.dumps(found), flush=True)
    for _ in sys.stdin:
        begun = time.perf_counter()
        train_once(stepper, batch, 1e-4)  # returns a float, so the device has finished
        print(json.dumps({"seconds": time.perf_counter() - begun}), flush=True)
    return OK


if __name__ == "__main__":
    sys.exit(main())
