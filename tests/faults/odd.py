"""F9: the clock set back, a NaN, a malicious pickle, a stopped holder of the lock."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import time
from pathlib import Path

import torch

from tests.faults import damage, inject
from tests.faults.bench import (
    EXPERIMENT,
    Bench,
    Tally,
    broken_promises,
    differences,
    snapshot,
    tally,
    verified,
)
from tests.faults.locks import holds
from tests.faults.processes import finish, start

DIVERGED, AGAIN, BAD_INPUT = 70, 75, 78
A_DAY = 86_400.0


def run(bench: Bench) -> list[Tally]:
    tallies: list[Tally] = []
    with tally(tallies, "F9", "clock set back by a day between two attempts") as line:
        for step in (34,) if bench.quick else (5, 34, 55):
            line.add(clock_set_back(bench, step), trial=f"step {step}")
    with tally(tallies, "F9", "NaN at step k") as line:
        for step in (25,) if bench.quick else (1, 10, 11, 25, 60):
            line.add(not_a_number(bench, step), trial=f"step {step}")
    with tally(tallies, "F9", "malicious pickle with a true manifest") as line:
        for form in ("torch",) if bench.quick else ("torch", "pickle"):
            line.add(malicious(bench, form), trial=form)
    with tally(tallies, "F9", "stopped (SIGSTOP) holder of the lock") as line:
        line.add(stopped_holder(bench))
    with tally(tallies, "F9", "resumed on a host that would choose otherwise") as line:
        line.add(another_host(bench))
    with tally(tallies, "F9", "another run's checkpoints, another config") as line:
        line.add(damage.foreign_checkpoints(bench), trial="checkpoints of another seed")
        line.add(damage.foreign_config(bench), trial="another learning rate")
    return tallies


def clock_set_back(bench: Bench, step: int) -> list[str]:
    """Interrupted at `step`, gone on a day earlier by the clock and by the files' times."""
    logs = bench.logs("F9", f"clock-{step}")
    argv, path = bench.argv(logs), logs / EXPERIMENT
    code = start(bench, argv, [inject.signalled_at(step, signal.SIGTERM)]).wait()
    problems = [] if code == AGAIN else [f"exit {code}, expected 75"]
    manifests = verified(path / "checkpoints")
    for manifest in manifests:  # the newest step has the oldest time
        for name in (manifest["file"], f"step-{manifest['step']:08d}.json"):
            then = time.time() - A_DAY - 1000 * manifest["step"]
            os.utime(path / "checkpoints" / name, (then, then))
    back = inject.clock_set_back(A_DAY)
    log = path / "resumed"
    problems += finish(bench, argv, [back, resumed_step(log)])
    if log.read_text() != str(manifests[-1]["step"]):
        problems.append(f"went on from {log.read_text()}, saved was {manifests[-1]['step']}")
    log.unlink()
    return problems or differences(path, bench.reference())


def another_host(bench: Bench) -> list[str]:
    """Interrupted at step 34; by then the host's stored choice is another micro-batch, which sums
    in another order."""
    logs = bench.logs("F9", "host")
    argv, path = bench.argv(logs), logs / EXPERIMENT
    code = start(bench, argv, [inject.signalled_at(34, signal.SIGTERM)]).wait()
    problems = [] if code == AGAIN else [f"exit {code}, expected 75"]
    stored = json.loads((logs / "choices.json").read_text())
    for choices in stored.values():
        choices["micro_batch_tokens"] = 32
    (logs / "choices.json").write_text(json.dumps(stored))
    problems += finish(bench, argv)
    return problems or differences(path, bench.reference())


def resumed_step(log: Path) -> inject.Arm:
    """Write down at which step the trainer went on."""

    def arm() -> None:
        from src import train

        real = train.Trainer.restore

        def restore(self: train.Trainer) -> bool:
            restored = real(self)
            log.write_text(str(self.step))
            return restored

        train.Trainer.restore = restore  # type: ignore[method-assign]

    return arm


def not_a_number(bench: Bench, step: int) -> list[str]:
    """Exit 70 before the step, the last good checkpoint kept, a rerun refused; without the NaN
    (a machine's mistake, failure.json deleted) the run ends bitwise equal."""
    logs = bench.logs("F9", f"nan-{step}")
    argv, path = bench.argv(logs), logs / EXPERIMENT
    child = start(bench, argv, [inject.not_a_number(step)])
    problems = [] if child.wait() == DIVERGED else [f"exit {child.code}, expected 70"]
    problems += broken_promises(path)
    good = (step - 1) // 10 * 10
    steps = [manifest["step"] for manifest in verified(path / "checkpoints")]
    if not steps or steps[-1] != good:
        problems.append(f"checkpoints of {steps}, expected the last at {good}")
    if f"step {step}" not in child.output:
        problems.append(f"the step is not named: {child.output[-300:]}")
    if not (path / "failure.json").exists():
        return [*problems, "no failure.json"]
    before = snapshot(path / "checkpoints")
    again = start(bench, argv)
    if again.wait() != BAD_INPUT or snapshot(path / "checkpoints") != before:
        problems.append(f"the rerun ended with {again.code}, expected 78 and nothing changed")
    (path / "failure.json").unlink()
    problems += finish(bench, argv)
    return problems or differences(path, bench.reference())


class _Evil:
    def __init__(self, canary: str) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (Path(self.canary),)


def malicious(bench: Bench, form: str) -> list[str]:
    """The newest object is code, its manifest is right: nothing runs, the run falls back."""
    import pickle

    logs = bench.logs("F9", f"pickle-{form}")
    shutil.copytree(damage.stopped_run(bench), logs, dirs_exist_ok=True)
    directory = logs / EXPERIMENT / "checkpoints"
    manifest = verified(directory)[-1]
    canary = logs / "canary"
    buffer = io.BytesIO()
    if form == "torch":
        torch.save({"step": 34, "model": _Evil(str(canary))}, buffer)
    else:
        pickle.dump({"step": 34, "model": _Evil(str(canary))}, buffer)
    data = buffer.getvalue()
    (directory / manifest["file"]).write_bytes(data)
    manifest |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    del manifest["manifest_sha256"]
    body = json.dumps(manifest, sort_keys=True)
    manifest["manifest_sha256"] = hashlib.sha256(body.encode()).hexdigest()
    text = json.dumps(manifest, sort_keys=True, indent=2) + "\n"
    (directory / f"step-{manifest['step']:08d}.json").write_text(text)
    verified(directory)  # the bait's papers are in order
    problems = finish(bench, bench.argv(logs))
    if canary.exists():
        problems.append("the pickle's code was run")
    torch.load(io.BytesIO(data), weights_only=False) if form == "torch" else pickle.loads(data)
    if not canary.exists():
        problems.append("the bait does not work")
    canary.unlink(missing_ok=True)
    return problems or differences(logs / EXPERIMENT, bench.reference())


def stopped_holder(bench: Bench) -> list[str]:
    """A holder that is stopped, not dead, keeps its lock, and ends bitwise equal when woken."""
    logs = bench.logs("F9", "stopped")
    argv, path = bench.argv(logs), logs / EXPERIMENT
    holder = start(bench, argv)
    holder.until(lambda: holds(path, holder) and (path / "metrics.jsonl").exists())
    os.kill(holder.pid, signal.SIGSTOP)
    problems = []
    for _ in range(2):
        second = start(bench, argv)
        if second.wait() != AGAIN or f"process {holder.pid} " not in second.output:
            problems.append(f"the second ended with {second.code}: {second.output[-300:]}")
    os.kill(holder.pid, signal.SIGCONT)
    if holder.wait() != 0:
        problems.append(f"the woken holder ended with {holder.code}")
    return problems or differences(path, bench.reference())
