"""The run directory: lock, config claim, append-only metrics, atomic writes, signals."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from src.storage.files import write_atomic, write_json
from src.storage.run_dir import Held, Preemption, RunDir, read_rows
from tests import ROOT

HOLDER = """
import sys, time
from pathlib import Path
from src.storage.run_dir import RunDir
assert "torch" not in sys.modules
run = RunDir.open(Path(sys.argv[1]), "emb35")
{body}
print("held", flush=True)
time.sleep(60)
"""


def _start(log_dir: Path, body: str) -> tuple[subprocess.Popen[str], str]:
    """A process that opens the run and then does `body`; and the first line that it prints."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER.format(body=body), str(log_dir)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, process.stdout.readline()


def _holder(log_dir: Path, body: str = "") -> subprocess.Popen[str]:
    process, line = _start(log_dir, body)
    assert line == "held\n"
    return process


def _end(process: subprocess.Popen[str], number: signal.Signals = signal.SIGKILL) -> None:
    process.send_signal(number)
    process.communicate(timeout=20)


# --- lock ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stopped", [False, True])
def test_the_lock_is_free_after_sigkill_and_after_close_and_no_earlier(tmp_path, stopped):
    """Who comes second is told the holder's process and host."""
    for _ in range(2):
        holder = _holder(tmp_path)
        if stopped:
            holder.send_signal(signal.SIGSTOP)
        with pytest.raises(Held) as caught:
            RunDir.open(tmp_path, "emb35")
        assert (caught.value.pid, caught.value.host) == (holder.pid, os.uname().nodename)
        _end(holder)
        RunDir.open(tmp_path, "emb35").close()


def test_forked_child_of_a_killed_holder_does_not_keep_the_lock(tmp_path):
    # The child speaks, so it has been through what a fork does to its locks.
    body = "import os\nif os.fork() == 0:\n    print(os.getpid(), flush=True)\ntime.sleep(60)"
    process, line = _start(tmp_path, body)
    child = int(line)
    try:
        process.kill()
        process.wait(20)
        os.kill(child, 0)  # it lives
        RunDir.open(tmp_path, "emb35").close()
    finally:
        os.kill(child, signal.SIGKILL)
        process.stdout.close()


def test_exactly_one_of_many_gets_the_lock(tmp_path):
    code = HOLDER.format(body="") + "\n"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code.replace("time.sleep(60)", "sys.stdin.read()"), tmp_path],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for _ in range(4)
    ]
    lines = [p.stdout.readline() for p in processes if p.stdout]
    for process in processes:
        process.communicate(timeout=20)
    assert sorted(lines) == ["", "", "", "held\n"]
    assert sorted(p.returncode for p in processes) == [0, 1, 1, 1]


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "../x", "/etc", ".hidden", "-x", "a b"])
def test_names_that_leave_the_log_directory_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="run name"):
        RunDir.open(tmp_path / "logs", name)
    assert not (tmp_path / "logs").exists()


def test_links_case_clashes_and_files_are_refused(tmp_path):
    logs = tmp_path / "logs"
    RunDir.open(logs, "emb35").close()
    with pytest.raises(ValueError, match="letter case"):
        RunDir.open(logs, "EMB35")
    (tmp_path / "elsewhere").mkdir()
    (logs / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="outside"):
        RunDir.open(logs, "link")
    (logs / "file").write_text("")
    with pytest.raises(ValueError, match="not a directory"):
        RunDir.open(logs, "file")
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert sorted(p.name for p in logs.iterdir()) == ["emb35", "file", "link"]


# --- atomic writes ------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_full_disk_keeps_the_old_file_and_names_path_and_bytes(tmp_path, monkeypatch, call):
    path = tmp_path / "metrics.json"
    write_atomic(path, b"old")

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError) as caught:
        write_atomic(path, b"newer")
    monkeypatch.undo()
    assert caught.value.errno == errno.ENOSPC
    assert "5 bytes" in str(caught.value) and str(path) in str(caught.value)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.json"]


def test_short_writes_are_continued(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:3]))
    write_atomic(tmp_path / "f", b"0123456789")
    assert (tmp_path / "f").read_bytes() == b"0123456789"


def test_the_file_is_durable_before_it_is_renamed_and_the_directory_after(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor):
        target = os.readlink(f"/proc/self/fd/{descriptor}")
        events.append("directory" if os.path.isdir(target) else "file")
        fsync(descriptor)

    def record_replace(source, target):
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    write_atomic(tmp_path / "f", b"x")
    assert events == ["file", "rename", "directory"]


def test_a_reader_never_sees_half_a_file(tmp_path):
    path = tmp_path / "f"
    bodies = {bytes([65 + i]) * (1 << 16) for i in range(4)}
    write_atomic(path, b"A" * (1 << 16))
    done = threading.Event()
    seen = set()

    def read():
        while not done.is_set():
            seen.add(path.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    for body in sorted(bodies) * 10:
        write_atomic(path, body)
    done.set()
    reader.join()
    assert seen and seen <= bodies


def test_json_refuses_nan_and_keeps_the_key_order(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "f", {"dev_loss": float("nan")})
    assert list(tmp_path.iterdir()) == []
    write_json(tmp_path / "f", {"b": 1, "a": None})
    assert list(json.loads((tmp_path / "f").read_text())) == ["b", "a"]


def test_temporaries_of_dead_writers_are_removed_at_open(tmp_path):
    RunDir.open(tmp_path, "r").close()
    (tmp_path / "r" / ".metrics.json.99-aa.tmp").write_text("half")
    RunDir.open(tmp_path, "r").close()
    names = sorted(p.name for p in (tmp_path / "r").iterdir())
    assert names == [".lock", "checkpoints", "metrics.jsonl"]


def test_a_lock_that_its_holder_has_just_taken_away_is_none(tmp_path, monkeypatch):
    """A holder whose run was refused removes the new directory, its lock file in it."""
    real = fcntl.flock

    def late(descriptor: int, how: int) -> None:
        shutil.rmtree(tmp_path / "r")
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(Held):
        RunDir.open(tmp_path, "r")


def test_a_refusal_takes_away_only_what_this_process_made_and_has_not_used(tmp_path):
    for name, use in (("r", False), ("used", True)):
        with pytest.raises(ValueError), RunDir.open(tmp_path / "new" / name, "run") as run:
            if use:
                run.append({"step": 0, "kind": "dev"})
            raise ValueError
    with pytest.raises(OSError), RunDir.open(tmp_path / "disk", "run"):
        raise OSError
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("**/run"))
    assert left == ["disk/run", "new/used/run"] and not (tmp_path / "new" / "r").exists()


# --- metrics ------------------------------------------------------------------------------------


def test_rows_offsets_and_cutting_back(tmp_path):
    with RunDir.open(tmp_path, "r") as run:
        ends = [run.append({"step": i, "kind": "dev" if i == 2 else "train"}) for i in range(4)]
        assert run.offset() == ends[-1]
        run.truncate(ends[1])
        assert [row["step"] for row in run.rows()] == [0, 1]
        run.append({"step": 2, "kind": "dev"})
        assert [row["step"] for row in run.rows("dev")] == [2]
        assert run.misfit({"metrics_offset": ends[0]}) is None
        assert "lost rows" in str(run.misfit({"metrics_offset": ends[-1] + 1}))
        assert "no row ends at byte" in str(run.misfit({"metrics_offset": ends[0] + 3}))
        with pytest.raises(ValueError):
            run.append({"train_loss": float("inf")})
        run.sync()
        run.truncate(0)
        assert run.rows() == [] and run.offset() == 0


def test_rows_survive_sigkill_without_sync(tmp_path):
    _end(_holder(tmp_path, body="run.append({'step': 7, 'kind': 'train'})"))
    assert read_rows(tmp_path / "emb35" / "metrics.jsonl") == [{"step": 7, "kind": "train"}]


def test_torn_last_line_is_ignored_then_cut(tmp_path):
    with RunDir.open(tmp_path, "r") as run:
        run.append({"step": 1})
    path = tmp_path / "r" / "metrics.jsonl"
    with path.open("ab") as file:
        file.write(b'{"step": 2')
    assert read_rows(path) == [{"step": 1}]
    with RunDir.open(tmp_path, "r") as run:
        run.append({"step": 2, "kind": "dev"})
        assert [row["step"] for row in run.rows()] == [1, 2]


def test_broken_line_in_the_middle_names_file_and_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match="metrics.jsonl, line 2"):
        read_rows(path)
    assert read_rows(tmp_path / "missing.jsonl") == []


def test_a_full_disk_leaves_no_half_row(tmp_path, monkeypatch):
    with RunDir.open(tmp_path, "r") as run:
        run.append({"step": 1})
        real, calls = os.write, []

        def full(descriptor, data):
            calls.append(data)
            if len(calls) > 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(descriptor, data[:4])

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(OSError, match="metrics.jsonl"):
            run.append({"step": 2})
        monkeypatch.undo()
        assert run.metrics_path.read_bytes() == b'{"step": 1}\n'


# --- config, end and failure --------------------------------------------------------------------


def test_another_config_is_refused_by_key(tmp_path):
    first = {"model": {"d_model": 8, "rope_theta": 1e-5}, "training": {"tokens": 100}}
    with RunDir.open(tmp_path, "r") as run:
        run.claim_config(first, "aaa")
        before = (run.path / "config.yaml").read_bytes()
        run.claim_config(first, "aaa")
        other = {"model": {"d_model": 16, "rope_theta": 1e-5}, "training": {"tokens": 100}}
        with pytest.raises(ValueError, match=r"config.yaml.*model.d_model: 8 -> 16") as caught:
            run.claim_config(other, "bbb")
        assert "rope_theta" not in str(caught.value) and "tokens" not in str(caught.value)
        assert (run.path / "config.yaml").read_bytes() == before
        (run.path / "config.yaml").write_text("training: {}\n")
        with pytest.raises(ValueError, match="config_digest"):
            run.claim_config(first, "aaa")


def test_metrics_json_means_done_and_ends_a_failure(tmp_path):
    with RunDir.open(tmp_path, "r") as run:
        assert run.finished() is None
        run.record_failure("non_finite", "train_loss is NaN at step 3")
        failure = json.loads((run.path / "failure.json").read_text())
        assert failure == {"kind": "non_finite", "message": "train_loss is NaN at step 3"}
        with pytest.raises(ValueError):
            run.finish({"dev_loss": float("nan")})
        assert run.finished() is None
        run.finish({"dev_loss": 1.5, "test_loss": None})
        assert not (run.path / "failure.json").exists()
    with RunDir.open(tmp_path, "r") as run:
        assert run.finished() == {"dev_loss": 1.5, "test_loss": None}
        (run.path / "metrics.json").write_text("{")
        with pytest.raises(ValueError, match="metrics.json"):
            run.finished()


# --- signals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", Preemption.SIGNALS)
def test_signals_set_a_flag_and_old_handlers_come_back(number):
    before = signal.getsignal(number)
    with Preemption() as stop:
        assert not stop.requested and stop.signal_name is None
        os.kill(os.getpid(), number)
        time.sleep(0)  # a bytecode boundary, where Python runs handlers
        assert stop.requested and stop.signal_name == signal.Signals(number).name
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal_name == signal.Signals(number).name
    assert signal.getsignal(number) is before


def test_interrupt_reaches_a_background_job_of_a_shell(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(
        "import sys, time\n"
        "from src.storage.run_dir import Preemption\n"
        "with Preemption() as stop:\n"
        "    print('ready', flush=True)\n"
        "    while not stop.requested:\n"
        "        time.sleep(0.01)\n"
        "print(stop.signal_name, flush=True)\n"
        "sys.exit(75)\n"
    )
    command = f"{sys.executable} {script} & pid=$!; echo $pid; wait $pid; echo exit $?"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    shell = subprocess.Popen(
        ["bash", "-c", command], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert shell.stdout is not None
    pid = int(shell.stdout.readline())
    assert shell.stdout.readline() == "ready\n"
    os.kill(pid, signal.SIGINT)
    rest, _ = shell.communicate(timeout=20)
    assert rest == "SIGINT\nexit 75\n"


@pytest.mark.parametrize("fault", ["moved", "deleted", "another in its place"])
def test_a_directory_that_is_gone_is_noticed_before_anything_is_saved(tmp_path, fault):
    """A save would otherwise begin another directory, without this lock and these rows."""
    with RunDir.open(tmp_path, "r") as run:
        run.append({"step": 1})
        run.sync()
        run.path.rename(tmp_path / "elsewhere")
        if fault == "deleted":
            shutil.rmtree(tmp_path / "elsewhere")
        if fault == "another in its place":
            RunDir.open(tmp_path, "r").close()
        before = sorted(tmp_path.rglob("*"))
        for write in (run.sync, lambda: run.finish({"status": "finished"})):
            with pytest.raises(OSError, match="moved or deleted while its run was at work"):
                write()
        assert sorted(tmp_path.rglob("*")) == before


def test_a_log_directory_that_the_locale_cannot_spell_is_refused(tmp_path):
    code = "import sys; from pathlib import Path; from src.storage import run_dir\n"
    code += "run_dir.check_log_dir(Path(sys.argv[1]))"
    plain = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", code, str(tmp_path / "ü")]
    done = subprocess.run(command, cwd=ROOT, env=plain, capture_output=True, text=True)
    assert "ValueError: --log_dir" in done.stderr and "PYTHONUTF8=1" in done.stderr
    spelled = plain | {"PYTHONUTF8": "1"}
    assert subprocess.run(command, cwd=ROOT, env=spelled).returncode == 0
