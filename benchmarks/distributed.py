"""One run by 1, 2 and 4 processes, and by 2 of which one is killed: the same losses, the same bits?

    python -m benchmarks.distributed

gloo on this machine's CPU, a 95,320-parameter model, 200 steps of 128 tokens, float32, a thread a
process. Writes results/distributed/ddp.md; exit 1 where a loss is off by more than 1e-5 (relative)
or the killed run's bits are not those of the uninterrupted one.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from src.spec.command_line import OK, OUR_FAULT, Parser
from src.storage.run_dir import read_rows
from tests.faults.bench import EXPERIMENT, ROOT, Bench, clean_environment, differences, last_state

TOLERANCE = 1e-5
STEPS = 200
SETTINGS = (f"training.tokens={STEPS * 128}", "training.checkpoint_every_steps=40")


@dataclass(frozen=True)
class Comparison:
    """A run beside the one of a single process; differences of losses are relative."""

    processes: int
    killed: str
    train_loss: float
    dev_loss: float
    weight: float  # absolute
    last_loss: float
    bitwise: str = ""

    @property
    def passed(self) -> bool:
        return max(self.train_loss, self.dev_loss) < TOLERANCE and self.bitwise in ("", "yes")


def main() -> int:
    parser = Parser(prog="python -m benchmarks.distributed", description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "distributed")
    parser.add_argument("--seed", type=int, default=0, help="of the kill's instant")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="distributed-") as scratch:
        bench = Bench(Path(scratch), args.seed, quick=True)
        bench.build()
        runs = {n: run(bench, n, Path(scratch) / f"{n}") for n in (1, 2, 4)}
        at_row = random.Random(args.seed).randint(45, 150)
        killed = run(bench, 2, Path(scratch) / "cut", at_row)
        comparisons = [compare(runs[1], runs[n], n) for n in (2, 4)]
        bitwise = "; ".join(differences(killed, runs[2])) or "yes"
        reason = f"kill -9 of process 1 at row {at_row}"
        comparisons.append(compare(runs[1], killed, 2, reason, bitwise))
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "ddp.md").write_text(table(comparisons), encoding="utf-8")
    print(table(comparisons))
    return OK if all(row.passed for row in comparisons) else OUR_FAULT


def run(bench: Bench, processes: int, logs: Path, kill_at_row: int | None = None) -> Path:
    """The run's directory, trained by so many processes; RuntimeError if it does not finish."""
    command = [str(ROOT / "run_experiment.py"), *bench.argv(logs)]
    command += [word for setting in SETTINGS for word in ("--set", setting)]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--max-restarts", "1"]
    torchrun += ["--nproc-per-node", str(processes)]
    with (logs.parent / f"{logs.name}.log").open("w+") as log:
        process = subprocess.Popen(
            [sys.executable, *(torchrun if processes > 1 else []), *command],
            stdout=log, stderr=log, env=clean_environment(),
        )  # fmt: skip
        directory = logs / EXPERIMENT
        if kill_at_row is not None:
            while len(read_rows(directory / "metrics.jsonl")) < kill_at_row:
                time.sleep(0.02)
            os.kill(_other_rank(process.pid, directory), signal.SIGKILL)
        if process.wait():
            log.seek(0)
            raise RuntimeError(f"{processes} processes: {log.read()[-2000:]}")
    return directory


def _other_rank(torchrun: int, directory: Path) -> int:
    """The id of a process that `torchrun` started and that does not own the run's lock."""
    lock_owner = json.loads((directory / ".lock").read_text())["pid"]
    children = Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split()
    return next(int(child) for child in children if int(child) != lock_owner)


def compare(
    alone: Path, run: Path, processes: int, killed: str = "", bitwise: str = ""
) -> Comparison:
    def largest_difference(kind: str) -> float:
        pairs = zip(
            *(read_rows(path / "metrics.jsonl", kind) for path in (alone, run)), strict=True
        )
        key = f"{kind}_loss"
        return max(abs(a[key] - b[key]) / a[key] for a, b in pairs)

    weights = [last_state(path)["model"] for path in (alone, run)]
    return Comparison(
        processes,
        killed,
        largest_difference("train"),
        largest_difference("dev"),
        max(float((weights[0][k] - weights[1][k]).abs().max()) for k in weights[0]),
        read_rows(run / "metrics.jsonl", "train")[-1]["train_loss"],
        bitwise,
    )


def table(comparisons: list[Comparison]) -> str:
    """Markdown."""
    lines = [
        "# One run by several processes, against one process",
        "",
        f"`python -m benchmarks.distributed`, {date.today().isoformat()}: gloo on a CPU, 95,320 "
        f"parameters, {STEPS} steps, the same batch of 4 sequences split over the processes. "
        "Largest differences over all steps (losses relative, weights absolute, at the end).",
        "",
        "| processes | killed | train loss | dev loss | weights | last train loss "
        "| bitwise equal to 2 uninterrupted |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.processes} | {row.killed} | {row.train_loss:.1e} | {row.dev_loss:.1e} "
        f"| {row.weight:.1e} | {row.last_loss:.7f} | {row.bitwise} |"
        for row in comparisons
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
