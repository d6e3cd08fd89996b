"""How many runs stand side by side, with how many threads, and how fast one is.

Sums change with the number of threads, so it is the same for every run that is compared: settled
once, kept by the runs in the log directory's choices.json, and checked by the plan.

    python -m src.study.speed --config configs/embed_ratio.yaml --exp emb35 --log_dir DIR

prints {"tokens_per_s", "device", "device_name"} of a few training steps on random tokens, what a
study's first estimate asks.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.compute import cores
from src.spec import config
from src.spec.command_line import BAD_INPUT, OK
from src.spec.progress import Progress
from src.storage import choices
from src.study.plan import Study, allocate
from src.study.processes import REPOSITORY, bound

MOST_CPU_JOBS = 5  # as many as the first stage of the phases has side by side
STEPS = 3
STEP_TOKENS = 8_192  # of a run's batch, which may be several times as large and as slow


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """What a study's runs share."""

    jobs: int  # runs at a time
    threads: int  # of each
    source: str  # why, for people

    def __str__(self) -> str:
        return f"{self.jobs} at a time, threads of each: {self.threads} ({self.source})"


def settle(asked: int | str, cores: int, gpus: int, known: tuple[int, str] | None) -> Places:
    """The places of `jobs: <asked>`. known: threads that are settled already, and by what.

    auto is a run a GPU, or on a CPU a run a core: two runs of one thread each make about twice
    the tokens/s of one run with two threads (results/LOG.md).
    """
    if asked == "auto":
        most = MOST_CPU_JOBS if known is None else cores
        jobs = gpus or max(1, min(most, cores // (known[0] if known else 1)))
        source = "a run a GPU" if gpus else f"{cores} cores"
    else:
        jobs, source = int(asked), "jobs of the study file"
    threads, why = known or (max(1, cores // jobs), f"{cores} cores in equal parts")
    if not gpus and jobs * threads > cores:
        why += f"; more than the {cores} cores, so that runs wait for each other"
    return Places(jobs=jobs, threads=threads, source=f"{source}; {why}")


def places(study: Study) -> Places:
    """What this machine has room for."""
    asked = study.config
    gpus = 0 if asked.device == "cpu" else 1 if ":" in asked.device else cores.visible_gpus()
    return settle(asked.jobs, cores.available_cores(), gpus, known_threads(study))


def known_threads(study: Study) -> tuple[int, str] | None:
    """Threads that every sweep states, that earlier runs of the log directory have, or that the
    environment asks for, and which of these it was."""
    stated = [run.training.threads for sweep in study.sweeps() for run in sweep.runs]
    if all(threads is not None for threads in stated):
        return max(t for t in stated if t is not None), "training.threads"
    for chosen in choices.stored(Path(study.config.log_dir)).values():
        if "threads" in chosen:
            return int(chosen["threads"]), "choices.json of the log directory"
    wished = os.environ.get("OMP_NUM_THREADS", "")
    if wished.isdecimal() and int(wished) > 0:
        return int(wished), "OMP_NUM_THREADS"
    return None


# ---------------------------------------------------------------------------------- the probe


def probe(study: Study, experiment: str, threads: int | None) -> dict[str, Any]:
    """{"tokens_per_s", "device", "device_name"} of one run alone; leaves no choice behind.

    Raises ValueError with the child's last words where the device cannot do it.
    """
    sweep, asked = study.sweeps()[0], study.config
    with tempfile.TemporaryDirectory() as folder:
        line = [sys.executable, "-m", "src.study.speed", "--config", str(sweep.file), "--exp",
                experiment, "--device", asked.device, "--log_dir", folder]  # fmt: skip
        own = asked.blocks[0].overrides if asked.blocks else ()
        line += [word for override in (*study.overrides, *own) for word in ("--set", override)]
        line += [] if threads is None else ["--threads", str(threads)]
        environment = {**cores.shared(1, threads), "PYTHONPATH": str(REPOSITORY)}
        done = subprocess.run(bound(line), capture_output=True, text=True, env=environment)
    if done.returncode != OK:
        told = done.stderr.strip().splitlines()
        raise ValueError(
            f"{study.file}: device {asked.device}: the speed probe failed: "
            f"{told[-1] if told else f'exit code {done.returncode}'}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: Sequence[str] | None = None) -> int:
    """Time a run's steps; what the device cannot do is refused with 78."""
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
        if asked.threads is not None:
            training = dataclasses.replace(run.training, threads=asked.threads)
            run = dataclasses.replace(run, training=training)
        found = _measure(run, sweep, asked)
    except ValueError as error:
        print(error, file=sys.stderr)
        return BAD_INPUT
    print(json.dumps(found), flush=True)
    return OK


def _measure(
    run: config.RunConfig, sweep: config.Sweep, asked: argparse.Namespace
) -> dict[str, Any]:
    import torch  # here, because the study itself never loads it

    from src.compute import compute_config, runtime
    from src.study.sanity_training import fresh_stepper, train_once
    from src.training_step import compile_blocks

    training, answer = run.training, allocate(sweep)[asked.exp]
    chosen = compute_config.choose(training, answer.model, asked.log_dir, asked.device)
    stepper = fresh_stepper(run, answer, chosen)
    compile_blocks(stepper.model, chosen)
    sequences = max(chosen.micro_batch, min(training.batch_size, STEP_TOKENS // training.seq_len))
    generator = torch.Generator().manual_seed(0)
    shape = (sequences, training.seq_len + 1)
    batch = torch.randint(run.model.vocab_size, shape, generator=generator)
    seconds = []
    with Progress(f"{asked.exp}: speed", STEPS + 1, "steps") as progress:
        for _ in range(STEPS + 1):  # the first one compiles what is compiled
            begun = time.perf_counter()
            train_once(stepper, batch, 1e-4)  # returns a float, so the device has finished
            seconds.append(time.perf_counter() - begun)
            progress.advance()
    return {
        "tokens_per_s": sequences * training.seq_len / statistics.median(seconds[1:]),
        "device": chosen.device.type,
        "device_name": runtime.device_name(chosen.device),
    }


if __name__ == "__main__":
    sys.exit(main())
