"""Chooses runs at a time and threads of each; times a few steps for the estimate of cost.

Sums change with the number of threads, so it is the same for every run that is compared: settled
once, kept by the runs in the log directory's choices.json, and checked by the plan.
"""

from __future__ import annotations

import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from src.compute import cores
from src.spec.progress import Progress
from src.storage import choices
from src.study.plan import Configuration, Study
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


def settle(requested: int | str, cores: int, gpus: int, settled: tuple[int, str] | None) -> Places:
    """The places of `jobs: <requested>`. settled: the threads that are already, and by what.

    auto is a run a GPU, or on a CPU a run a core: two runs of one thread each make about twice
    the tokens/s of one run with two threads (results/LOG.md).
    """
    if requested == "auto":
        most = MOST_CPU_JOBS if settled is None else cores
        jobs = gpus or max(1, min(most, cores // (settled[0] if settled else 1)))
        source = "a run a GPU" if gpus else f"{cores} cores"
    else:
        jobs, source = int(requested), "jobs of the study file"
    threads, threads_source = settled or (max(1, cores // jobs), f"{cores} cores in equal parts")
    if not gpus and jobs * threads > cores:
        threads_source += f"; more than the {cores} cores, so that runs wait for each other"
    return Places(jobs=jobs, threads=threads, source=f"{source}; {threads_source}")


def places(study: Study) -> Places:
    """What this machine has room for."""
    settings = study.config
    gpus = 0 if settings.device == "cpu" else 1 if ":" in settings.device else cores.visible_gpus()
    return settle(settings.jobs, cores.available_cores(), gpus, known_threads(study))


def known_threads(study: Study) -> tuple[int, str] | None:
    """Threads that every sweep states, that earlier runs of the log directory have, or that the
    environment asks for, and which of these it was."""
    stated = [run.training.threads for sweep in study.sweeps() for run in sweep.runs]
    if all(threads is not None for threads in stated):
        return max(t for t in stated if t is not None), "training.threads"
    for chosen in choices.stored(Path(study.config.log_dir)).values():
        if "threads" in chosen:
            return int(chosen["threads"]), "choices.json of the log directory"
    requested = os.environ.get("OMP_NUM_THREADS", "")
    if requested.isdecimal() and int(requested) > 0:
        return int(requested), "OMP_NUM_THREADS"
    return None


# ---------------------------------------------------------------------------------- the probe


def probe(study: Study, threads: int | None) -> dict[str, Any]:
    """{"tokens_per_s", "device", "device_name"} of the study's baseline, a few training steps on
    random tokens in a process of its own, because the study never loads torch; leaves no choice
    behind. Raises ValueError with the child's last words where the device cannot do it.
    """
    configuration = study.baseline()
    run, training = configuration.run, configuration.run.training
    training = replace(training, threads=threads or training.threads)
    configuration = replace(configuration, run=replace(run, training=training))
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            bound([sys.executable, "-m", "src.study.speed"]), capture_output=True,
            input=pickle.dumps((configuration, study.config.device, Path(folder))),
            env=cores.shared(1, threads), cwd=REPOSITORY,
        )  # fmt: skip
    if done.returncode:
        lines = done.stderr.decode().strip().splitlines() or [f"exit code {done.returncode}"]
        raise ValueError(
            f"{study.file}: device {study.config.device}: the speed probe failed: {lines[-1]}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def _measure(configuration: Configuration, device: str, log_dir: Path) -> dict[str, Any]:
    import torch

    from src.compute import compute_config, runtime
    from src.study.sanity_training import fresh_stepper, train_once
    from src.training_step import compile_blocks

    training, model = configuration.run.training, configuration.allocation.model
    compute = compute_config.choose(training, model, log_dir, device)
    stepper = fresh_stepper(configuration.run, configuration.allocation, compute)
    compile_blocks(stepper.model, compute)
    sequences = max(compute.micro_batch, min(training.batch_size, STEP_TOKENS // training.seq_len))
    generator = torch.Generator().manual_seed(0)
    shape = (sequences, training.seq_len + 1)
    batch = torch.randint(model.vocab_size, shape, generator=generator)
    seconds = []
    with Progress(f"{configuration.run.experiment}: speed", STEPS + 1, "steps") as progress:
        for _ in range(STEPS + 1):  # the first one compiles what is compiled
            begun = time.perf_counter()
            train_once(stepper, batch, 1e-4)  # returns a float, so the device has finished
            seconds.append(time.perf_counter() - begun)
            progress.advance()
    return {
        "tokens_per_s": sequences * training.seq_len / statistics.median(seconds[1:]),
        "device": compute.device.type,
        "device_name": runtime.device_name(compute.device),
    }


if __name__ == "__main__":
    print(json.dumps(_measure(*pickle.load(sys.stdin.buffer))), flush=True)
