"""Device, precision, choices shared between processes, threads, seeds, and the stamp."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from src.compute import cores, runtime
from src.storage import choices
from tests import ROOT

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)


def _python(code: str, *arguments: object, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
    )


# --- device -------------------------------------------------------------------------------------


def test_cpu_and_unknown_devices(monkeypatch):
    assert runtime.choose_device("cpu") == CPU
    for name in ("mps", "cuda:", "cuda:-1", "cuda:x", "gpu", "cpu:0"):
        with pytest.raises(ValueError, match="expected auto, cpu, cuda or cuda:N"):
            runtime.choose_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runtime.choose_device("auto") == CPU
    for name in ("cuda", "cuda:0"):
        with pytest.raises(ValueError, match="no CUDA device"):
            runtime.choose_device(name)


# Forks (after the slow import) processes that choose at once and live until they are killed.
CLAIM = """
import os, signal, sys, time
from pathlib import Path
from src.compute import runtime
runtime.claims_directory = lambda: Path(sys.argv[1])
count_claims = runtime._live_claims

def slow_count(directory, key):  # leaves the others time to step in between
    live = count_claims(directory, key)
    time.sleep(0.03)
    return live

runtime._live_claims = slow_count

def start():
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        chosen = runtime.claim_least_used(["a", "b", "c"], [0.0, 0.0, 0.0], range(3))
        os.write(write, str(chosen).encode())
        time.sleep(600)
    return pid, read

def kill(pid):
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)

started = [start() for _ in range(4)]
chosen = [int(os.read(read, 9)) for _, read in started]
lonely = next(i for i, c in enumerate(chosen) if chosen.count(c) == 1)
kill(started.pop(lonely)[0])
started.append(start())
print(*chosen, chosen[lonely], int(os.read(started[-1][1], 9)))
for pid, _ in started:
    kill(pid)
"""


def test_processes_that_start_together_spread_over_the_gpus(tmp_path):
    output, _ = _python(CLAIM, tmp_path / "claims").communicate(timeout=60)
    *chosen, left, taken = map(int, output.split())
    assert len(chosen) == 4 and sorted(set(chosen)) == [0, 1, 2]
    assert taken == left  # the claim of a killed process is void


def test_cpu_has_no_gpu_stats_and_a_peak_memory():
    assert runtime.gpu_stats(CPU) == {}
    before = runtime.peak_memory_mib(CPU)
    block = bytearray(os.urandom(1 << 20) * 64)
    assert runtime.peak_memory_mib(CPU) >= before > 10 and len(block) == 64 << 20


# --- precision ----------------------------------------------------------------------------------


def _pretend_capability(monkeypatch, major, native):
    def supported(including_emulation=True):
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (major, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")


def test_gpu_precision(monkeypatch):
    _pretend_capability(monkeypatch, 8, native=True)
    assert runtime.resolve_precision("auto", GPU) == "bf16"
    assert runtime.resolve_precision("fp32", GPU) == "fp32"
    _pretend_capability(monkeypatch, 7, native=False)
    assert runtime.resolve_precision("auto", GPU) == "fp16"
    assert runtime.resolve_precision("fp16", GPU) == "fp16"
    with pytest.raises(ValueError, match="compute capability 7.0"):
        runtime.resolve_precision("bf16", GPU)


def test_cpu_precision_follows_the_instructions_and_the_measured_speedup(monkeypatch):
    shapes = {"d_model": 8, "d_ff": 16, "vocab_size": 64, "rows": 4}
    calls = []

    def bf16_speedup(**kwargs):
        calls.append(kwargs)
        return speedup

    monkeypatch.setattr(runtime, "bf16_speedup", bf16_speedup)
    monkeypatch.setattr(runtime, "cpu_flags", lambda: frozenset({"avx2"}))
    assert runtime.resolve_precision("auto", CPU, **shapes) == "fp32" and not calls
    monkeypatch.setattr(runtime, "cpu_flags", lambda: frozenset({"avx512_bf16"}))
    speedup = 1.31
    assert runtime.resolve_precision("auto", CPU, **shapes) == "bf16"
    speedup = 1.29
    assert runtime.resolve_precision("auto", CPU, **shapes) == "fp32"
    assert calls[0] == {"d_model": 8, "d_ff": 16, "vocab": 64, "rows": 4}
    assert runtime.resolve_precision("bf16", CPU) == "bf16"
    with pytest.raises(ValueError, match="fp16: not supported on a CPU"):
        runtime.resolve_precision("fp16", CPU)
    with pytest.raises(ValueError, match="expected auto, fp32, bf16 or fp16"):
        runtime.resolve_precision("int8", CPU)


def test_the_speedup_is_measured_and_draws_nothing():
    before = torch.get_rng_state()
    assert runtime.bf16_speedup(d_model=16, d_ff=32, vocab=64, rows=8) > 0
    assert torch.equal(before, torch.get_rng_state())


# --- choices ------------------------------------------------------------------------------------


def test_choices_are_made_once_per_device(tmp_path):
    first = choices.get(tmp_path / "logs", "A100", lambda: {"precision": "bf16", "micro_batch": 64})
    again = choices.get(tmp_path / "logs", "A100", lambda: pytest.fail("decided twice"))
    other = choices.get(tmp_path / "logs", "V100", lambda: {"precision": "fp16"})
    assert first == again == {"precision": "bf16", "micro_batch": 64}
    assert other == {"precision": "fp16"}
    stored = json.loads((tmp_path / "logs" / "choices.json").read_text())
    assert stored == {"A100": first, "V100": other}


def test_a_failed_decision_stores_nothing_and_a_broken_file_is_named(tmp_path):
    with pytest.raises(ZeroDivisionError):
        choices.get(tmp_path, "cpu", lambda: {"x": 1 / 0})
    assert choices.get(tmp_path, "cpu", lambda: {"x": 1}) == {"x": 1}
    for broken in ("{", "[]", '{"cpu": 3}'):
        (tmp_path / "choices.json").write_text(broken)
        with pytest.raises(ValueError, match="choices.json.*delete it"):
            choices.get(tmp_path, "cpu", lambda: {"x": 2})


DECIDE = """
import os, sys, time
from pathlib import Path
from src.storage import choices

def decide():
    with open(sys.argv[2], "a") as file:
        file.write("x")
    time.sleep(0.2)
    return {"pid": os.getpid()}

pids = []
for _ in range(4):
    pids.append(os.fork())
    if pids[-1] == 0:
        chosen = choices.get(Path(sys.argv[1]), "cpu", decide)
        os._exit(chosen != choices.get(Path(sys.argv[1]), "cpu", decide))
print(sum(os.waitpid(pid, 0)[1] for pid in pids))
"""


def test_processes_that_start_together_agree(tmp_path):
    logs, decisions = tmp_path / "logs", tmp_path / "decisions"
    output, _ = _python(DECIDE, logs, decisions).communicate(timeout=60)
    assert output == "0\n"
    assert decisions.read_text() == "x"  # one of the four decided, once
    assert set(json.loads((logs / "choices.json").read_text())) == {"cpu"}


# --- determinism --------------------------------------------------------------------------------


def test_seeding_repeats_draws():
    draws = []
    for seed in (5, 6, 5):
        runtime.seed_everything(seed)
        draws.append((random.random(), torch.rand(3).tolist()))
    assert draws[0] == draws[2] != draws[1]


def test_deterministic_kernels_are_switched_on(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.backends.cudnn.deterministic
    runtime.deterministic()
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = before
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")


def test_threads_are_pinned_as_asked_or_by_environment_or_by_cores(monkeypatch):
    before = torch.get_num_threads()
    try:
        assert runtime.pin_threads(1) == 1 == torch.get_num_threads()
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        assert runtime.pin_threads() == 2
        monkeypatch.delenv("OMP_NUM_THREADS")
        assert runtime.pin_threads() == cores.available_cores()
        with pytest.raises(ValueError, match="at least 1"):
            runtime.pin_threads(0)
    finally:
        torch.set_num_threads(before)


def test_cores_follow_the_affinity(monkeypatch):
    monkeypatch.setattr(cores, "_cgroup_quota", lambda *_: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(cores, "_core_of", lambda cpu: ("0", str(cpu // 2)))
    assert cores.available_cores() == 2  # four hyperthreads
    monkeypatch.setattr(cores, "_cgroup_quota", lambda *_: 0.5)
    assert cores.available_cores() == 1


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/job/run\n", {"job/cpu.max": "300000 100000", "job/run/cpu.max": "max 100000"}, 3.0),
        ("0::/job\n", {"job/cpu.max": "max 100000"}, None),
        (
            "4:cpu,cpuacct:/job\n1:memory:/job\n",
            {"cpu/job/cpu.cfs_quota_us": "150000", "cpu/job/cpu.cfs_period_us": "100000"},
            1.5,
        ),
        ("0::/\n", {}, None),
    ],
)
def test_cgroup_quota(tmp_path, membership, files, expected):
    (tmp_path / "membership").write_text(membership)
    for name, content in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    assert cores._cgroup_quota(tmp_path / "membership", tmp_path / "cgroup") == expected


# --- provenance ---------------------------------------------------------------------------------


def test_the_stamp_is_json_and_holds_no_secret(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2-secret")
    monkeypatch.setenv("HUB_MIRROR", "/private/place")
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    stamp = runtime.environment_stamp(CPU)
    text = json.dumps(stamp, allow_nan=False)
    assert "hunter2" not in text and "/private" not in text
    assert stamp["variables"]["HUB_MIRROR"] == "set"
    assert stamp["variables"]["SLURM_JOB_ID"] == "123"
    assert stamp["variables"]["SLURM_ARRAY_TASK_ID"] is None
    assert stamp["torch"] == torch.__version__ and stamp["threads"] == torch.get_num_threads()
    assert stamp["device"] == "cpu" and stamp["device_name"] == stamp["cpu_model"] != ""
    assert stamp["driver"] is None and stamp["cuda"] is None


def test_git_state_of_a_repository(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True)

    monkeypatch.setattr(runtime, "_REPOSITORY", tmp_path)
    assert runtime._git_state() == (None, None)  # no repository
    git("init", "-q")
    assert runtime._git_state() == (None, None)  # no commit
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.py").write_text("1\n")
    git("add", ".")
    git("commit", "-q", "-m", "x")
    (tmp_path / "notes.txt").write_text("not code\n")
    sha, dirty = runtime._git_state()
    assert sha is not None and len(sha) == 40 and dirty is False
    (tmp_path / "src" / "b.py").write_text("2\n")
    assert runtime._git_state() == (sha, True)
    monkeypatch.setattr(runtime, "_REPOSITORY", tmp_path / "src")
    assert runtime._git_state() == (None, None)  # inside somebody else's repository


def test_freed_memory_is_kept():
    """In a process of its own: without it, freeing three tensors of 16 MB returns their pages."""
    huge_pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if huge_pages.exists() and "[always]" in huge_pages.read_text():
        pytest.skip("huge pages leave too few faults to count")
    code = """
import resource, sys, torch
from src.compute import runtime
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        kept = [torch.ones(4_000_000) for _ in range(3)]
        del kept
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
torch.set_num_threads(1)
faults()
plain = faults()
if not runtime.keep_freed_memory():
    sys.exit(3)
faults()
print(plain, faults())
"""
    # Stated, glibc's threshold stays; left out, it moves with what was freed before.
    stated = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=stated)
    if done.returncode == 3:
        pytest.skip("not glibc")
    plain, kept = map(int, done.stdout.split())
    assert plain > 10_000 and kept < plain / 10, done.stdout + done.stderr
