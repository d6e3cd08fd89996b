"""A study's processes: how many at a time, what ends them, and whose runs it waits for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from src.storage import run_dir
from src.study import jobs as study_jobs
from src.study import plan as study_plan
from src.study import runner as study
from src.study import state as study_record
from src.study.phases import costs
from src.study.phases.cells import Study
from tests import ROOT
from tests.study.test_study import SANE, comparison


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """The shipped study, its tokens and logs below tmp_path."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(study_jobs, "POLL_S", 0.0)
    found = study.load(
        Path("configs/study.yaml"),
        [f"data.dir={tmp_path / 'tokens'}"],
        str(tmp_path / "logs"),
        "cpu",
    )
    known = replace(found.config, jobs=1, tokens_per_s=10_000, corpus=str(tmp_path), final_seeds=2)
    return replace(found, config=known)


def leave(line: Sequence[str]) -> None:
    """What a command of a study leaves behind, with invented numbers."""
    stated = dict(zip(line, line[1:], strict=False))
    if "--vocab_size" in line:
        vocab = int(stated["--vocab_size"])
        path = Path(stated["--output"]) / f"v{vocab}" / "meta.json"
        content: Any = {"vocab_size": vocab, "splits": {"train": {"tokens": 20_000_000 // vocab}}}
    elif "--compare" in line:
        path, content = Path(stated["--output"]), comparison(0.9)
    elif stated["--phase"] == "sanity":
        path = Path(stated["--log_dir"]) / f"{stated['--exp']}-sanity" / "sanity.json"
        content = SANE
    else:
        name, rank = stated["--exp"], stated["--phase"] == "rank"
        seed = int(stated["--seed"])
        loss = 5.0 - 0.2 * ("emb25" in name) - 0.1 * ("glu2x" in name) - 1.0 * (not rank)
        loss += 0.001 * seed
        run = name + "-rank" * rank + (f"-seed{seed}" if seed else "")
        path = Path(stated["--log_dir"]) / run / "metrics.json"
        content = {
            "status": "finished", "phase": stated["--phase"],
            "dev_loss": loss, "dev_bits_per_byte": loss / 3,
            "test_loss": loss, "peak_memory_mib": 50.0, "latency_ms_p50_l128": 4.0,
            "latency_ms_p50_l512": 9.0,
        }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


class Machine:
    """Invented processes: each ends at its third poll, and what runs beside it is written down."""

    def __init__(self) -> None:
        self.running: list[Invented] = []
        self.beside: list[tuple[str, int]] = []  # command, running ones with it
        self.terminated = 0
        self.interrupt: Callable[[], None] = lambda: None

    def start(self, line: Sequence[str]) -> Invented:
        self.running.append(Invented(self, line))
        self.beside.append((" ".join(line), len(self.running)))
        return self.running[-1]


class Invented:
    def __init__(self, machine: Machine, line: Sequence[str]) -> None:
        self.machine, self.line, self.polls = machine, line, 0

    def poll(self) -> int | None:
        self.polls += 1
        self.machine.interrupt()
        if self.polls < 3:
            return None
        leave(self.line)
        self.machine.running.remove(self)
        return 0

    def terminate(self) -> None:
        self.machine.terminated += 1

    def wait(self) -> int:
        return 75


def decided(asked: Study) -> Any:
    content = json.loads((Path(asked.config.log_dir) / "study.json").read_text())
    assert content["complete"] is True
    return content["decisions"], content["aliases"], content["runs"]


def with_jobs(asked: Study, jobs: int, name: str) -> Study:
    log_dir = str(Path(asked.config.log_dir) / name)
    return replace(asked, config=replace(asked.config, jobs=jobs, log_dir=log_dir))


def test_runs_go_in_parallel_and_decide_the_same(asked: Study) -> None:
    outcomes, most = [], []
    for jobs in (1, 3):
        machine, one = Machine(), with_jobs(asked, jobs, f"j{jobs}")
        assert study.run(one, start=machine.start) == 0
        outcomes.append(decided(one))
        most.append(max(count for _, count in machine.beside))
        for line, count in machine.beside:
            if "--vocab_size" in line or "--compare" in line or "--phase sanity" in line:
                assert count == 1, line
    assert most == [1, 3]
    assert outcomes[0] == outcomes[1]


def test_a_signal_ends_all_that_runs_and_a_rerun_goes_on(asked: Study) -> None:
    class Signalled(BaseException):
        pass

    machine, polls = Machine(), 0

    def interrupt() -> None:
        nonlocal polls
        polls += 1
        if polls == 20:
            raise Signalled

    machine.interrupt = interrupt
    one = with_jobs(asked, 3, "cut")
    with pytest.raises(Signalled):
        study.run(one, start=machine.start)
    assert machine.terminated == len(machine.running) > 1
    whole = with_jobs(asked, 1, "whole")
    assert study.run(one, start=Machine().start) == 0
    assert study.run(whole, start=Machine().start) == 0
    assert decided(one) == decided(whole)


def test_a_command_that_ends_well_and_leaves_nothing_is_not_started_for_ever(
    asked: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine()
    monkeypatch.setitem(globals(), "leave", lambda line: None)
    with pytest.raises(RuntimeError, match="left no result"):
        study.run(with_jobs(asked, 1, "empty"), start=machine.start)
    assert len(machine.beside) == 1


def test_a_failure_ends_the_others_too(asked: Study) -> None:
    class Failing(Machine):
        def start(self, line: Sequence[str]) -> Invented:
            process = super().start(line)
            if "--seed 3" in " ".join(line):
                process.poll = lambda: 74  # type: ignore[method-assign]
            return process

    machine = Failing()
    assert study.run(with_jobs(asked, 5, "fails"), start=machine.start) == 74
    assert machine.terminated > 1


def test_the_budget_counts_what_runs(asked: Study, capsys: pytest.CaptureFixture[str]) -> None:
    reader = study_record.Reader(asked)
    jobs = study_plan.plan(asked, reader.record()).jobs
    one = next(costs.dollars(job, reader.rate()) for job in jobs if job.name == "emb35-rank")
    config = replace(asked.config, jobs=5, budget_usd=2.5 * one)
    machine = Machine()
    assert study.run(replace(asked, config=config), start=machine.start) == 78
    assert "stopped before" in capsys.readouterr().err
    seeds = [count for line, count in machine.beside if "--exp emb35 --phase rank" in line]
    assert len(seeds) == 5 and max(seeds) == 2
    assert not machine.running  # what was begun has ended


def test_damaged_losses_of_documents_and_failures_are_named(asked: Study) -> None:
    run = Path(asked.config.log_dir) / "emb35"
    run.mkdir(parents=True)
    reader = study_record.Reader(asked)
    assert reader.documents("emb35", "validation") is None
    (run / "documents_test.npz").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(ValueError, match="documents_test.npz: found a damaged file.*metrics.json"):
        reader.documents("emb35", "test")
    (run / "failure.json").write_text("{")
    with pytest.raises(ValueError, match="failure.json: found no JSON"):
        reader.record()


def test_what_another_process_holds_is_waited_for(
    asked: Study, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed study's run may still be saving when the study is started again."""
    held = Path(asked.config.log_dir) / "emb35-rank"
    held.mkdir(parents=True)
    order: list[str] = []
    sleeps = 0
    with ExitStack() as orphan:
        orphan.enter_context(run_dir.locked(held))

        def sleep(seconds: float) -> None:  # tokens and checks take four
            nonlocal sleeps
            sleeps += 1
            if sleeps > 10:
                orphan.close()

        monkeypatch.setattr(time, "sleep", sleep)

        class Watched(Machine):
            def start(self, line: Sequence[str]) -> Invented:
                order.append(" ".join(line))
                assert "emb35 --phase rank --seed 0" not in order[-1] or not study_jobs.is_held(
                    held
                )
                return super().start(line)

        assert study.run(asked, start=Watched().start) == 0
    assert "emb35-rank is held by another process" in capsys.readouterr().out
    assert sum("emb35 --phase rank --seed 0" in line for line in order) == 1


def test_a_run_held_by_a_dead_command_is_tried_again(asked: Study) -> None:
    """Held by somebody who came in between: exit 75, and the lock says who it was."""
    held = Path(asked.config.log_dir) / "emb35-rank-seed1"
    codes: list[int] = []
    with ExitStack() as other:

        class Overtaken(Machine):
            def start(self, line: Sequence[str]) -> Invented:
                process = super().start(line)
                if "--seed 1 " in " ".join(line) and not codes:
                    codes.append(75)
                    held.mkdir(parents=True)
                    other.enter_context(run_dir.locked(held))
                    process.poll = lambda: 75  # type: ignore[method-assign]
                elif codes == [75] and "--seed 1 " in " ".join(line):
                    codes.append(0)
                return process

        machine = Overtaken()
        sleeps = 0

        def sleep(seconds: float) -> None:
            nonlocal sleeps
            sleeps += 1
            if sleeps > 10:
                other.close()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(time, "sleep", sleep)
            assert study.run(asked, start=machine.start) == 0
    assert codes == [75, 0]


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_command_ends_when_its_parent_is_killed() -> None:
    code = (
        "import subprocess, sys\n"
        "from src.study.jobs import bound\n"
        "child = subprocess.Popen(bound([sys.executable, '-S', '-c', 'import time\\n"
        "print(1, flush=True)\\ntime.sleep(300)']), stdout=subprocess.PIPE)\n"
        "child.stdout.read(1)\n"
        "print(child.pid, flush=True)\n"
        "child.wait()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert parent.stdout is not None
    with parent, parent.stdout:
        pid = int(parent.stdout.readline())
        assert not ended(pid)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    deadline = time.monotonic() + 60
    while not ended(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert ended(pid)


def ended(pid: int) -> bool:
    """Whether a process is gone, or dead and not yet reaped by its new parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_a_command_without_its_parent_does_not_begin() -> None:
    if sys.platform != "linux":
        pytest.skip("prctl is Linux's")
    line = study_jobs.bound([sys.executable, "-S", "-c", "print('begun')"])
    line[line.index(str(os.getpid()))] = "1"  # another parent
    done = subprocess.run(line, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (75, "")
