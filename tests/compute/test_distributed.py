"""One run by several processes: the same curve, the same bits after a kill, one writer."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from src.compute import process_group
from src.compute.compute_config import ComputeConfig
from src.compute.process_group import ProcessGroup
from src.data import tokens as data
from src.spec import allocation, config
from src.storage.run_dir import read_rows
from src.training_step import batch_gradients, build_model
from tests import ROOT, python
from tests.faults.bench import differences
from tests.study import until
from tests.study.test_engines import rows

# Relative, of losses in float32: the same sums in another order.
TOLERANCE = 1e-5
SETTINGS = ("--set", "training.tokens=40960", "training.checkpoint_every_steps=40",
            "training.eval_every_tokens=10240")  # fmt: skip


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
    return [
        (row["step"], row.get("train_loss", row.get("dev_loss")))
        for row in read_rows(run / "metrics.jsonl")
    ]


def alone(sweep: Path, logs: Path) -> subprocess.CompletedProcess[str]:
    """The same command as `torchrun`'s, in this process alone."""
    line = ("--config", sweep, "--exp", "base", "--log_dir", logs, "--device", "cpu")
    return python("run_experiment.py", *line, *SETTINGS)


@pytest.fixture(scope="module")
def together(tiny_sweep: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log directory of an uninterrupted run of two processes."""
    logs = tmp_path_factory.mktemp("together")
    process = torchrun(tiny_sweep, logs)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return logs


def test_two_processes_follow_the_curve_of_one(tiny_sweep, together, tmp_path):
    assert alone(tiny_sweep, tmp_path).returncode == 0
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


def test_one_process_is_refused_what_two_began(tiny_sweep, together, tmp_path):
    shutil.copytree(together / "base", tmp_path / "base")
    (tmp_path / "base" / "metrics.json").unlink()
    done = alone(tiny_sweep, tmp_path)
    assert done.returncode == 78
    assert "checkpoints of a run of 2 process(es), expected 1" in done.stderr


def test_a_killed_and_a_signalled_process_change_no_bit(tiny_sweep, together, tmp_path):
    """kill -9 of a helper: torchrun starts both again. TERM of a helper: the holder hears of it,
    saves, and all leave; started once more they end with the same bits."""
    run = tmp_path / "base"
    process = torchrun(tiny_sweep, tmp_path, restarts=2)
    for number, step in ((signal.SIGKILL, 40), (signal.SIGTERM, 85)):
        until(lambda step=step: rows(run) > step, process)
        holder = json.loads((run / ".lock").read_text())
        os.kill(helper_of(process, run), number)
        until(lambda holder=holder: json.loads((run / ".lock").read_text() or "null")
              not in (holder, None), process)  # fmt: skip
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert "stopped by a signal to another process" in output
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
    assert process_group.size() == 1
    process_group.check(two)
    under_torchrun(WORLD_SIZE="1")
    process_group.check(two)
    under_torchrun(WORLD_SIZE="2")
    process_group.check(one)
    with pytest.raises(ValueError, match="found 2 processes for 2 runs, expected one run"):
        process_group.check(two)
    with pytest.raises(ValueError, match="found 2 processes for a study"):
        process_group.check(None)
    under_torchrun(WORLD_SIZE="3")
    with pytest.raises(ValueError, match=r"expected a divisor of training.batch_size \(8"):
        process_group.check(one)
    under_torchrun(WORLD_SIZE="2", RANK="")
    with pytest.raises(ValueError, match="RANK: found '', expected torchrun"):
        process_group.check(one)


@pytest.mark.parametrize("micro_batch", [8, 4, 1])
@pytest.mark.parametrize("size", [2, 4])
def test_shares_add_up_to_the_gradients_of_the_whole_batch(tiny_sweep, micro_batch, size):
    """Also where a micro-batch is larger than a share, and where z-loss is on."""
    sweep = config.load_sweep(tiny_sweep)
    (run,) = sweep.chosen(["base"], None)
    model_config = allocation.allocate({"base": run.model})["base"].model
    tokens = data.load(run.token_dir, run.model.vocab_size)
    windows = data.Windows(tokens.train.tokens, batch_size=8, seq_len=32, seed=0)
    compute = ComputeConfig(
        device=torch.device("cpu"), precision="fp32", micro_batch=micro_batch, compile=False,
        threads=1,
    )  # fmt: skip
    model = build_model(model_config, 0)
    batch = torch.from_numpy(windows.batch(3))

    def gradients(*groups: ProcessGroup | None) -> tuple[list[Any], float]:
        model.zero_grad(set_to_none=True)
        nats = sum(
            float(batch_gradients(model, batch, compute, 1e-2, lambda x: x, group))
            for group in groups
        )
        return [parameter.grad.clone() for parameter in model.parameters()], nats

    groups = [ProcessGroup(rank, size, compute.device) for rank in range(size)]
    whole, nats = gradients(None)
    shares, shared_nats = gradients(*groups)
    assert shared_nats == pytest.approx(nats, rel=1e-6)
    for a, b in zip(whole, shares, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    rows_of = [group.share(torch.arange(8)) for group in groups]
    assert torch.cat(rows_of).tolist() == list(range(8))


def test_a_process_that_is_gone_is_noticed_in_a_sentence():
    with pytest.raises(process_group.PeerLost, match="another process of this run is gone"):
        with process_group._peers():
            raise RuntimeError("Connection closed by peer")
