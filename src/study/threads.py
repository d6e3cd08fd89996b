"""How many runs of a study stand side by side, and how many threads each of them has.

Sums change with the number of threads, so it is the same for every run that is compared: chosen
once, kept in the log directory's choices.json, and checked by the plan. `jobs: auto` measures one
run on all cores against one run a core (as many as a study has side by side), all on one thread.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.compute import cores
from src.spec import config
from src.spec.progress import Progress
from src.storage import choices
from src.study.jobs import REPOSITORY, bound
from src.study.phases.cells import Study

KEY = "study"  # of choices.json
TURNS = 5
# A lone run also wins where the last runs of a stage are fewer than the cores: 5 % is no reason.
LEAST_GAIN = 1.05


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """What a study's runs share."""

    jobs: int  # runs at a time
    threads: int  # of each
    source: str  # why, for people

    def __str__(self) -> str:
        return f"{self.jobs} at a time, threads of each: {self.threads} ({self.source})"


def settle(asked: int | str, cores: int, gpus: int, known: tuple[int, str] | None) -> Places | None:
    """The places of `jobs: <asked>`; None where that is to be measured.

    known: threads that are settled already, and by what. Nothing here reads a file or a clock.
    """
    if asked == "auto" and not gpus and known is None and cores > 1:
        return None
    if asked == "auto":
        jobs = gpus or max(1, cores // (known[0] if known else 1))
        source = "a run a GPU" if gpus else f"{cores} cores"
    else:
        jobs, source = int(asked), "jobs of the study file"
    threads, why = known or (max(1, cores // jobs), f"{cores} cores in equal parts")
    if not gpus and jobs * threads > cores:
        why += f"; more than the {cores} cores, so that runs wait for each other"
    return Places(jobs=jobs, threads=threads, source=f"{source}; {why}")


def known_threads(study: Study) -> tuple[int, str] | None:
    """Threads that a sweep states, that earlier runs of the log directory have, or that the
    environment asks for, and which of these it was."""
    stated = [
        run.training.threads
        for source in (study.embedding, study.glu, study.vocabulary)
        if source is not None
        for run in config.sweep_from(source.raw, source.path, study.overrides, "rank").runs
    ]
    if all(threads is not None for threads in stated):
        return max(t for t in stated if t is not None), "training.threads"
    stored = choices.stored(Path(study.config.log_dir))
    for name in (KEY, *stored):
        if "threads" in stored.get(name, {}):
            return int(stored[name]["threads"]), "choices.json of the log directory"
    wished = os.environ.get("OMP_NUM_THREADS", "")
    if wished.isdecimal() and int(wished) > 0:
        return int(wished), "OMP_NUM_THREADS"
    return None


def gpus(device: str) -> int:
    """GPUs that runs on `device` spread over; 0 on a CPU."""
    if device == "cpu":
        return 0
    return 1 if ":" in device else cores.visible_gpus()


def measured(study: Study, experiment: str, count: int) -> Places:
    """Both ways on `count` cores, timed in turns; what choices.json holds is not timed again."""
    jobs = min(count, study.config.noise_seeds)  # what the first stage has side by side

    def decide() -> dict[str, Any]:
        found = race(study, experiment, {1: count, jobs: max(1, count // jobs)})
        best = jobs if found[jobs] >= LEAST_GAIN * found[1] else 1
        return {
            "jobs": best,
            "threads": max(1, count // best),
            "cores": count,
            "tokens_per_s": {str(number): round(speed) for number, speed in found.items()},
        }

    kept = choices.get(Path(study.config.log_dir), KEY, decide)
    told = ", ".join(f"{n} at a time {speed:,}" for n, speed in kept["tokens_per_s"].items())
    return Places(jobs=kept["jobs"], threads=kept["threads"], source=f"measured tokens/s: {told}")


class Child:
    """`src.study.speed` of one run, in a process of its own that ends with this one."""

    def __init__(self, study: Study, experiment: str, log_dir: Path, threads: int | None) -> None:
        line = [sys.executable, "-m", "src.study.speed", "--config", str(study.embedding.path),
                "--exp", experiment, "--device", study.config.device,
                "--log_dir", str(log_dir)]  # fmt: skip
        line += [word for override in study.overrides for word in ("--set", override)]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}  # wherever it was started
        if threads is not None:
            line += ["--threads", str(threads)]
            environment["OMP_NUM_THREADS"] = str(threads)
        self.study, self.errors = study, tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            bound(line), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
            text=True, env=environment,
        )  # fmt: skip

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()

    def tell(self) -> None:
        """Take a step."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # `read` says why

    def read(self) -> dict[str, Any]:
        """Its next line; ValueError where it has ended instead."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        self.process.wait()
        self.errors.seek(0)
        told = self.errors.read().strip().splitlines()
        raise ValueError(
            f"{self.study.file}: device {self.study.config.device}: the speed probe failed: "
            f"{told[-1] if told else f'exit code {self.process.returncode}'}"
        )


def probe(study: Study, experiment: str, threads: int | None, steps: int = 3) -> dict[str, Any]:
    """{"tokens_per_s", "device", "device_name"} of one run alone; leaves no choice behind."""
    with (
        tempfile.TemporaryDirectory() as folder,
        Child(study, experiment, Path(folder), threads) as child,
        Progress(f"{experiment}: speed", steps + 1, "steps") as progress,
    ):
        found, seconds = child.read(), []
        for _ in range(steps):
            progress.advance()
            child.tell()
            seconds.append(child.read()["seconds"])
    return {**found, "tokens_per_s": found["tokens"] / statistics.median(seconds)}


def race(
    study: Study,
    experiment: str,
    threads: Mapping[int, int],
    child: Callable[..., Child] = Child,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[int, float]:
    """Tokens a second of so many runs side by side (with so many threads each), the median of
    interleaved turns. Raises ValueError where one cannot run."""
    times: dict[int, list[float]] = {jobs: [] for jobs in threads}
    tokens = 0
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        total = sum(threads) + TURNS * len(threads)
        label = f"{experiment}: one run on all cores against {max(threads)} side by side"
        progress = stack.enter_context(Progress(label, total, "turns"))
        groups: dict[int, list[Child]] = {}
        for jobs, each in threads.items():
            groups[jobs] = []
            for _ in range(jobs):  # one after the other: the first one compiles for the rest
                one = stack.enter_context(child(study, experiment, folder, each))
                tokens = one.read()["tokens"]
                groups[jobs].append(one)
                progress.advance()
        for _ in range(TURNS):
            for jobs, group in groups.items():
                begun = clock()
                for one in group:
                    one.tell()
                for one in group:
                    one.read()
                times[jobs].append(clock() - begun)
                progress.advance()
    return {jobs: jobs * tokens / statistics.median(taken) for jobs, taken in times.items()}
