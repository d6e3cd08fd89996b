"""One run by several processes: the same curve, the same bits after a kill, one writer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import run_experiment
from src.compute import process_group as distributed
from src.compute.compute_config import Machine
from src.compute.process_group import ProcessGroup
from src.data import tokens as data
from src.spec import allocation, config
from src.storage.run_dir import Preemption, read_rows
from src.training_step import batch_gradients, build_model
from tests.conftest import ROOT
from tests.faults.bench import differences
from tests.study import until
from tests.study.test_engines import rows

# Relative, of losses in float32: the same sums in another order.
TOLERANCE = 1e-5
SETTINGS = ("--set", "training.tokens=40960", "--set", "training.checkpoint_every_steps=40")


def torchrun(sweep: Path, logs: Path, restarts: int = 0) -> subprocess.Popen[str]:
    """`base` by two processes; 160 steps."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "--max-restarts", str(restarts), "--monitor-interval", "0.1",
         str(ROOT / "run_experiment.py"), "--config", str(sweep), "--exp", "base",
         "--log_dir", str(logs), "--device", "cpu", *SETTINGS],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def helper_of(process: subprocess.Popen[str], run: Path) -> int:
    """The process that torchrun has started beside the run's holder."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    holder = json.loads((run / ".lock").read_text())["pid"]
    (other,) = {int(child) for child in children} - {holder}
    return other


def losses(run: Path) -> list[tuple[int, float]]:
    found = read_rows(run / "metrics.jsonl")
    return [(row["step"], row.get("train_loss", row.get("dev_loss"))) for row in found]


def alone(sweep: Path, logs: Path) -> int:
    """The same command as `torchrun`'s, in this process alone; returns its exit code."""
    before = {number: signal.getsignal(number) for number in Preemption.SIGNALS}
    try:
        return run_experiment.main(
            ["--config", str(sweep), "--exp", "base", "--log_dir", str(logs), "--device", "cpu",
             *SETTINGS]
        )  # fmt: skip
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.fixture(scope="module")
def together(tiny_sweep: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log directory of an uninterrupted run of two processes."""
    logs = tmp_path_factory.mktemp("together")
    process = torchrun(tiny_sweep, logs)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    return logs


def test_two_processes_follow_the_curve_of_one(tiny_sweep, together, tmp_path):
    assert alone(tiny_sweep, tmp_path) == 0
    one, two = losses(tmp_path / "base"), losses(together / "base")
    assert len(one) > 160 and [step for step, _ in one] == [step for step, _ in two]
    worst = max(abs(a - b) / a for (_, a), (_, b) in zip(one, two, strict=True))
    assert 0 < worst < TOLERANCE  # 0: then nothing was shared


def test_one_process_writes(together):
    run = together / "base"
    manifests = sorted((run / "checkpoints").glob("*.json"))
    assert [path.name for path in manifests] == ["step-00000120.json", "step-00000160.json"]
    steps = [row["step"] for row in read_rows(run / "metrics.jsonl", "train")]
    assert steps == list(range(1, 161))
    environment = json.loads((run / "environment.json").read_text())
    assert environment["variables"]["WORLD_SIZE"] == "2"
    assert sorted(path.name for path in together.iterdir()) == [
        ".choices.lock", "base", "choices.json",
    ]  # fmt: skip


def test_a_killed_and_a_signalled_process_change_no_bit(tiny_sweep, together, tmp_path, capsys):
    """kill -9 of a helper: torchrun starts both again. TERM of a helper: the holder hears of it,
    saves, and all leave. One process is refused what two began; two end with the same bits."""
    run = tmp_path / "base"
    process = torchrun(tiny_sweep, tmp_path, restarts=1)
    until(lambda: rows(run) > 50)
    holder = json.loads((run / ".lock").read_text())
    os.kill(helper_of(process, run), signal.SIGKILL)
    until(lambda: json.loads((run / ".lock").read_text() or "null") not in (holder, None))
    until(lambda: rows(run) > 100)
    os.kill(helper_of(process, run), signal.SIGTERM)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 1, said  # whatever its processes exit with
    assert "stopped by a signal to another process" in said and not (run / "metrics.json").exists()
    capsys.readouterr()
    assert alone(tiny_sweep, tmp_path) == 78
    assert "checkpoints of a run of 2 process(es), expected 1" in capsys.readouterr().err
    process = torchrun(tiny_sweep, tmp_path)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert differences(run, together / "base") == []


@pytest.fixture
def under_torchrun(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def pretend(**variables: str) -> None:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            monkeypatch.setenv(name, variables.get(name, "1"))

    return pretend


def test_what_several_processes_cannot_do_is_refused(tiny_sweep, under_torchrun, monkeypatch):
    sweep = config.load_sweep(tiny_sweep)
    one, two = sweep.chosen(["base"], None), sweep.chosen(["base", "deep"], None)
    monkeypatch.setenv("WORLD_SIZE", "2")  # of somebody else's launcher: not ours to read
    assert distributed.size() == 1
    distributed.check(two)
    under_torchrun(WORLD_SIZE="1")
    distributed.check(two)
    under_torchrun(WORLD_SIZE="2")
    distributed.check(one)
    with pytest.raises(ValueError, match="found 2 processes for 2 runs, expected one run"):
        distributed.check(two)
    with pytest.raises(ValueError, match="found 2 processes for a study"):
        distributed.check(None)
    under_torchrun(WORLD_SIZE="3")
    with pytest.raises(ValueError, match=r"expected a divisor of training.batch_size \(8"):
        distributed.check(one)
    under_torchrun(WORLD_SIZE="2", RANK="")
    with pytest.raises(ValueError, match="RANK: found '', expected torchrun"):
        distributed.check(one)


@pytest.mark.parametrize("micro_batch", [8, 4, 1])
@pytest.mark.parametrize("size", [2, 4])
def test_shares_add_up_to_the_gradients_of_the_whole_batch(tiny_sweep, micro_batch, size):
    """Also where a micro-batch is larger than a share, and where z-loss is on."""
    sweep = config.load_sweep(tiny_sweep)
    (run,) = sweep.chosen(["base"], None)
    model_config = allocation.allocate({"base": run.model})["base"].model
    tokens = data.load(run.token_dir, run.model.vocab_size)
    windows = data.Windows(tokens.train.tokens, batch_size=8, seq_len=32, seed=0)
    machine = Machine(
        device=torch.device("cpu"), precision="fp32", micro_batch=micro_batch, compile=False,
        threads=1,
    )  # fmt: skip
    model = build_model(model_config, 0)
    batch = torch.from_numpy(windows.batch(3))

    def gradients(*groups: ProcessGroup | None) -> tuple[list[Any], float]:
        model.zero_grad(set_to_none=True)
        nats = sum(
            float(batch_gradients(model, batch, machine, 1e-2, lambda x: x, group))
            for group in groups
        )
        return [parameter.grad.clone() for parameter in model.parameters()], nats

    groups = [ProcessGroup(rank, size, machine.device) for rank in range(size)]
    whole, nats = gradients(None)
    shares, shared_nats = gradients(*groups)
    assert shared_nats == pytest.approx(nats, rel=1e-6)
    for a, b in zip(whole, shares, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    rows_of = [group.share(torch.arange(8)) for group in groups]
    assert torch.cat(rows_of).tolist() == list(range(8))


def test_a_process_that_is_gone_is_noticed_in_a_sentence():
    with pytest.raises(distributed.PeerLost, match="another process of this run is gone"):
        with distributed._peers():
            raise RuntimeError("Connection closed by peer")
