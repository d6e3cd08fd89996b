"""The supervisor: how many at a time, what is run again, what ends a command, and its threads."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from src.compute import cores
from src.storage import choices
from src.storage.run_dir import RunDir
from src.study import processes, runner, speed
from src.study.processes import Supervisor, bound, progress_of, starter
from src.study.speed import settle
from tests import ROOT, python
from tests.study import Ended, until


def codes(
    *scripts: str, at_once: int = 2, progress: Callable[[], object] = time.monotonic
) -> dict[str, int]:
    """Exit codes of bash scripts, named a, b, c ... and run in that order."""
    exit_codes: dict[str, int] = {}
    waiting = list(zip("abcdef", scripts, strict=False))
    with Supervisor(subprocess.Popen, at_once, pause_s=0.0) as supervisor:
        while waiting or supervisor.names:
            while waiting and supervisor.has_room:
                name, script = waiting.pop(0)
                supervisor.add(name, ["bash", "-c", script], progress)
            ended = supervisor.first_ended()
            assert ended is not None
            exit_codes[ended[0]] = ended[1]
    return exit_codes


def test_75_and_a_death_by_a_signal_are_run_again_until_they_finish(tmp_path: Path) -> None:
    script = "echo >> {0}; [ $(wc -l < {0}) -ge 4 ] || {1}"
    a, b = tmp_path / "a", tmp_path / "b"
    assert codes(script.format(a, "exit 75"), script.format(b, "kill -9 $$")) == {"a": 0, "b": 0}
    assert a.read_text() == b.read_text() == "\n" * 4


@pytest.mark.parametrize("code", [78, 70, 74])
def test_any_other_failure_is_final_and_the_others_go_on(tmp_path: Path, code: int) -> None:
    tries, done = tmp_path / "tries", tmp_path / "done"
    exit_codes = codes(f"echo >> {tries}; exit {code}", f"sleep 0.2; touch {done}", at_once=1)
    assert exit_codes == {"a": code, "b": 0}
    assert tries.read_text() == "\n" and done.exists()


@pytest.mark.parametrize(("script", "code"), [("exit 75", 75), ("kill -9 $$", 137)])
def test_without_progress_it_is_given_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], script: str, code: int
) -> None:
    exit_codes = codes(f"echo >> {tmp_path}/tries; {script}", progress=lambda: 1)
    assert exit_codes == {"a": code} and "given up" in capsys.readouterr().err
    assert len((tmp_path / "tries").read_text()) == 1 + processes.MOST_IDLE_RERUNS


def test_pauses_grow_while_nothing_moves(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + 1.0))

    with Supervisor(lambda line: Ended(75), 1) as supervisor:
        supervisor.add("a", [], lambda: 1)
        assert supervisor.first_ended() == ("a", 75)
    pauses = re.findall(r"again in (\d+) s", capsys.readouterr().err)
    assert pauses == ["1", "2", "4", "8", "16", "32", "60", "60", "60", "60"]


@pytest.mark.parametrize("at_once", [1, 3])
def test_no_more_than_the_asked_commands_run_at_once_and_in_order(
    tmp_path: Path, at_once: int
) -> None:
    log = tmp_path / "log"
    script = f"echo + >> {log}; sleep 0.4; echo - >> {log}"
    assert set(codes(*[script] * 4, at_once=at_once).values()) == {0}
    heights = [0]
    for mark in log.read_text().split():
        heights.append(heights[-1] + (1 if mark == "+" else -1))
    assert max(heights) == at_once


def test_a_signal_is_passed_on_and_nothing_is_begun(tmp_path: Path) -> None:
    code = f"""
import subprocess, sys
from src.study.processes import Supervisor
script = "trap 'echo $0 >> {tmp_path}/got; exit 75' USR1; touch {tmp_path}/$0; sleep 300 & wait"
with Supervisor(subprocess.Popen, 2) as supervisor:
    for name in "ab":
        supervisor.add(name, ["bash", "-c", script, name], int)
    assert supervisor.first_ended() is None and supervisor.stopped and not supervisor.has_room
sys.exit(75)
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    until(lambda: (tmp_path / "a").exists() and (tmp_path / "b").exists())
    time.sleep(0.2)  # for the traps
    process.send_signal(signal.SIGUSR1)
    assert process.wait(120) == 75
    assert sorted((tmp_path / "got").read_text().split()) == ["a", "b"]


def test_an_error_in_between_asks_what_runs_to_end(tmp_path: Path) -> None:
    script = f"trap 'touch {tmp_path}/saved; exit 75' TERM; touch {tmp_path}/on; sleep 300 & wait"
    with pytest.raises(RuntimeError), Supervisor(subprocess.Popen, 1) as supervisor:
        supervisor.add("a", ["bash", "-c", script], int)
        until(lambda: (tmp_path / "on").exists())
        time.sleep(0.2)
        raise RuntimeError("planning failed")
    assert (tmp_path / "saved").exists()


def test_progress_is_a_checkpoint_or_a_row(tmp_path: Path) -> None:
    assert progress_of(tmp_path / "none") == ([], 0)
    with RunDir.open(tmp_path, "r") as directory:
        directory.append({"step": 1})
        (directory.checkpoints / "step-00000040.json").touch()
        assert progress_of(directory.path) == (["step-00000040.json"], directory.offset())


def test_a_run_that_another_process_has_is_waited_for(tiny_sweep: Path, tmp_path: Path) -> None:
    """A killed study's run may still be saving when the study is started again."""
    block = f"{{name: a, config: {tiny_sweep}, experiments: [base]}}"
    file = tmp_path / "study.yaml"
    file.write_text(f"device: cpu\ntokens_per_s: 9\nblocks: [{block}]\n")
    study = runner.load(file, log_dir=str(tmp_path / "logs"))
    codes: list[int] = []

    def start(line: Sequence[str]) -> Ended:
        if not codes:
            codes.append(subprocess.run(line, timeout=120).returncode)
            owner.__exit__(None, None, None)  # it ends, a little later
        else:
            codes.append(python(*line[1:], cwd=Path.cwd()).returncode)
        return Ended(codes[-1])

    with RunDir.open(tmp_path / "logs", "base") as owner:
        assert runner.run(study, start=start, pause_s=0.0) == 0
    assert codes == [75, 0]


# ------------------------------------------------------------------------------ bound to a parent


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_command_ends_when_its_parent_is_killed() -> None:
    code = (
        "import subprocess, sys\n"
        "from src.study.processes import bound\n"
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
    until(lambda: ended(pid))


def ended(pid: int) -> bool:
    """Whether a process is gone, or dead and not yet reaped by its new parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_command_without_its_parent_does_not_begin() -> None:
    line = bound([sys.executable, "-S", "-c", "print('begun')"])
    line[line.index(str(os.getpid()))] = "1"  # another parent
    done = subprocess.run(line, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (75, "")


# ------------------------------------------------------------------------------------- threads


def test_runs_have_the_studys_threads_and_no_terminal(tmp_path: Path) -> None:
    code = (
        "import json, os, sys; print(json.dumps([os.environ['OMP_NUM_THREADS'], sys.stdin.read()]))"
    )
    out = tmp_path / "out"
    line = ["/bin/sh", "-c", f'exec "$0" -S -c "$1" > {out}', sys.executable, code]
    process = starter(2, 3)(line)
    until(lambda: process.poll() is not None)
    assert json.loads(out.read_text()) == ["3", ""]


@pytest.mark.parametrize(
    ("asked", "cores", "gpus", "known", "expected"),
    [
        ("auto", 1, 0, None, (1, 1)),
        ("auto", 2, 0, None, (2, 1)),
        ("auto", 64, 0, None, (5, 12)),  # as many as there are seeds at first
        ("auto", 8, 0, (2, "before"), (4, 2)),  # another machine: as many as fit
        ("auto", 2, 0, (4, "before"), (1, 4)),
        ("auto", 16, 4, None, (4, 4)),
        (2, 8, 0, None, (2, 4)),
        (3, 2, 0, None, (3, 1)),
        (2, 2, 0, (2, "before"), (2, 2)),
    ],
)
def test_how_many_runs_stand_side_by_side(
    asked: int | str,
    cores: int,
    gpus: int,
    known: tuple[int, str] | None,
    expected: tuple[int, int],
) -> None:
    places = settle(asked, cores, gpus, known)
    assert (places.jobs, places.threads) == expected
    overbooked = not gpus and places.jobs * places.threads > cores
    assert ("wait for each other" in str(places)) == overbooked


def test_a_place_for_each_visible_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for listed, places in (("", 0), ("-1", 0), ("0", 1), ("2,3, 5", 3)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
        assert cores.visible_gpus() == places


def test_threads_are_what_is_stated_else_what_was_used_else_the_environments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    logs = str(tmp_path / "logs")
    study = runner.load(Path("configs/study.yaml"), log_dir=logs)
    assert speed.known_threads(study) is None
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert speed.known_threads(study) == (3, "OMP_NUM_THREADS")
    choices.get(Path(logs), "a CPU", lambda: {"threads": 2})  # by a run before
    assert speed.known_threads(study) == (2, "choices.json of the log directory")
    stated = runner.load(Path("configs/study.yaml"), ["training.threads=1"], logs)
    assert speed.known_threads(stated) == (1, "training.threads")


def test_the_probe_times_a_real_run_and_says_what_is_wrong(
    tiny_sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(f"device: cpu\nblocks: [{{name: a, config: {tiny_sweep}}}]\n")
    study = runner.load(file, log_dir=str(tmp_path / "logs"))
    speeds = speed.probe(study, 1)
    assert speeds["tokens_per_s"] > 0 and speeds["device"] == "cpu" and speeds["device_name"]
    assert not (tmp_path / "logs").exists()  # what the child chose is not the runs' choice
    failing = ["bash", "-c", "echo 'a line before'; echo 'no such device' >&2; exit 78"]
    monkeypatch.setattr(speed, "bound", lambda line: failing)
    with pytest.raises(ValueError, match="device cpu: the speed probe failed: no such device"):
        speed.probe(study, 1)
