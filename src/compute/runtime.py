"""The machine under a run: device, precision, threads, seeds, and a stamp of what they were.

What a run chooses by itself is chosen once per log directory and device (`src.storage.choices`), so
that runs that are compared, and a run before and after its interruption, use the same.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from src.compute.cores import available_cores
from src.storage.files import open_lock_file

MIN_BF16_SPEEDUP = 1.3
_REPOSITORY = Path(__file__).resolve().parents[2]
_CODE = ("src", "scripts", "configs", "run_experiment.py", "requirements.txt")
_RECORDED_VARIABLES = (
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "WORLD_SIZE",
    "SLURM_JOB_ID",
    "SLURM_ARRAY_TASK_ID",
    "SKYPILOT_TASK_ID",
)
_RECORDED_AS_SET = ("HUB_MIRROR",)  # its value is a path of this machine


# --- device -------------------------------------------------------------------------------------


def choose_device(name: str) -> torch.device:
    """The device for this process: "auto", "cpu", "cuda" (least used) or "cuda:N".

    Raises ValueError for a CUDA device that is not there, and for any other name. A GPU that is
    chosen is made current and counted as in use until the process ends.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    index = _cuda_index(name)
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def _cuda_index(name: str) -> int:
    kind, _, number = name.partition(":")
    if name not in ("auto", "cuda") and not (kind == "cuda" and number.isdecimal()):
        raise ValueError(
            f"--device {name!r}: expected auto, cpu, cuda or cuda:N (other backends are not "
            f"supported)."
        )
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise ValueError(
            f"--device {name}: this machine has no CUDA device that PyTorch {torch.__version__} "
            f"can use; use --device cpu, or install a CUDA build of PyTorch and a driver."
        )
    if number and int(number) >= count:
        raise ValueError(f"--device {name}: found {count} CUDA device(s), cuda:0 to {count - 1}.")
    keys = [str(torch.cuda.get_device_properties(i).uuid) for i in range(count)]
    candidates = [int(number)] if number else range(count)
    return claim_least_used(keys, [_free_mib(key) for key in keys], candidates)


def claims_directory() -> Path:
    """Where this user's processes on this machine count who uses which GPU."""
    return Path(tempfile.gettempdir()) / f"gpu-claims-{os.getuid()}"


def claim_least_used(
    keys: Sequence[str], free_mib: Sequence[float], candidates: Sequence[int]
) -> int:
    """Index of the candidate GPU with the fewest claims, then the most free memory; claims it.

    A claim is a flock'ed file that ends with the process, so processes that start at the same
    instant, before any of them has used memory, still spread out. Asked again, a process gets the
    GPU that it has.
    """
    directory = claims_directory()
    directory.mkdir(mode=0o700, exist_ok=True)
    guard = open_lock_file(directory / "lock")
    try:
        fcntl.flock(guard, fcntl.LOCK_EX)
        claims = [_live_claims(directory, key) for key in keys]
        own = [directory / f"{key}.{os.getpid()}.claim" for key in keys]
        chosen = min(candidates, key=lambda i: (not own[i].exists(), claims[i], -free_mib[i], i))
        if not own[chosen].exists():  # _live_claims has removed dead ones
            claim = open_lock_file(own[chosen])
            fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)  # left open: held until the end
    finally:
        os.close(guard)
    return chosen


def _live_claims(directory: Path, key: str) -> int:
    live = 0
    for path in directory.glob(f"{key}.*.claim"):
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()  # nobody holds it: its process is gone
        except BlockingIOError:
            live += 1
        finally:
            os.close(descriptor)
    return live


def _nvml_handle(uuid: str) -> tuple[Any, Any] | None:
    """(pynvml, device handle), or None where the driver's library is missing.

    By UUID, because CUDA_VISIBLE_DEVICES renumbers CUDA's devices and not NVML's.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except pynvml.NVMLError:
        return None


def _free_mib(uuid: str) -> float:
    """Free memory from NVML; torch.cuda.mem_get_info would open a context on every GPU."""
    nvml_device = _nvml_handle(uuid)
    if nvml_device is None:
        return 0.0
    nvml, handle = nvml_device
    return nvml.nvmlDeviceGetMemoryInfo(handle).free / 2**20


def gpu_stats(device: torch.device) -> dict[str, float]:
    """`gpu_utilisation_percent` and `gpu_memory_mib` (whole device) from NVML; {} on the CPU."""
    if device.type != "cuda":
        return {}
    nvml_device = _nvml_handle(str(torch.cuda.get_device_properties(device).uuid))
    if nvml_device is None:
        return {}
    nvml, handle = nvml_device
    try:
        return {
            "gpu_utilisation_percent": float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu),
            "gpu_memory_mib": nvml.nvmlDeviceGetMemoryInfo(handle).used / 2**20,
        }
    except nvml.NVMLError:  # a MIG slice has no utilisation counter
        return {}


def peak_memory_mib(device: torch.device) -> float:
    """Most memory this process has held: PyTorch's allocations on a GPU, resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, KiB on Linux


def reset_peak_memory(device: torch.device) -> None:
    """Start `peak_memory_mib` afresh, for the next of several runs in one process."""
    with contextlib.suppress(OSError, AttributeError):  # what `keep_freed_memory` kept
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):  # Linux only, and not in every container
        Path("/proc/self/clear_refs").write_text("5")


# --- precision ----------------------------------------------------------------------------------


def resolve_precision(
    requested: str,
    device: torch.device,
    *,
    d_model: int = 216,
    d_ff: int = 576,
    vocab_size: int = 16_000,
    rows: int = 512,
) -> str:
    """The one of "fp32", "bf16" and "fp16" for `requested` ("auto" or one of them) on `device`.

    auto on a GPU: bf16 where it is native, else fp16 (the caller adds a GradScaler). auto on a
    CPU: bf16 where the CPU has instructions for it and a trial of the model's shapes says that
    they pay (`bf16_speedup`), else fp32. Raises ValueError for what the device cannot do.
    """
    if requested not in ("auto", "fp32", "bf16", "fp16"):
        raise ValueError(f"precision {requested!r}: expected auto, fp32, bf16 or fp16.")
    if device.type == "cuda":
        return _cuda_precision(requested, device)
    if requested == "fp16":
        raise ValueError("precision fp16: not supported on a CPU; use auto, bf16 or fp32.")
    if requested != "auto":
        return requested
    if not cpu_has_bf16():
        return "fp32"
    speedup = bf16_speedup(d_model=d_model, d_ff=d_ff, vocab=vocab_size, rows=rows)
    return "bf16" if speedup >= MIN_BF16_SPEEDUP else "fp32"


def _cuda_precision(requested: str, device: torch.device) -> str:
    # is_bf16_supported() counts emulation by default, and then says yes on a V100
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    major, minor = torch.cuda.get_device_capability(device)
    if requested == "bf16" and not (native and major >= 8):
        raise ValueError(
            f"precision bf16: {torch.cuda.get_device_name(device)} has compute capability "
            f"{major}.{minor}, expected 8.0 or higher; use auto or fp16."
        )
    return requested if requested != "auto" else ("bf16" if native else "fp16")


def cpu_flags() -> frozenset[str]:
    """Instruction set flags of the first CPU in /proc/cpuinfo; empty where there is none."""
    for key, value in _cpuinfo():
        if key == "flags":
            return frozenset(value.split())
    return frozenset()


def _cpuinfo() -> list[tuple[str, str]]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    pairs = (line.partition(":") for line in lines)
    return [(key.strip(), value.strip()) for key, _, value in pairs]


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 natively (AVX-512 or AMX), not by conversion."""
    return bool({"avx512_bf16", "amx_bf16"} & cpu_flags())


def bf16_speedup(d_model: int, d_ff: int, vocab: int, rows: int, repeats: int = 3) -> float:
    """How many times faster bf16 autocast is than fp32 for one layer and head on this CPU.

    Forward and backward of `rows` tokens; the two alternate, so that other load hits both; the
    ratio of their medians. Draws nothing from the global generators.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_()

    x, up, down = normal(rows, d_model), normal(2 * d_ff, d_model), normal(d_model, 2 * d_ff)
    head = normal(vocab, d_model)

    def seconds(bf16: bool) -> float:
        begun = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = F.linear(F.linear(F.linear(x, up), down), head).sum()
        torch.autograd.grad(loss, (x, up, down, head))
        return time.perf_counter() - begun

    timings = [(seconds(bf16=False), seconds(bf16=True)) for _ in range(repeats + 1)][1:]
    return statistics.median(a for a, _ in timings) / statistics.median(b for _, b in timings)


# --- determinism --------------------------------------------------------------------------------


def seed_everything(seed: int) -> None:
    """Seed Python's and PyTorch's generators (CPU and GPU), the ones that checkpoints carry.

    NumPy's global generator is left alone: nothing of ours draws from it.
    """
    random.seed(seed)
    torch.manual_seed(seed)


def deterministic() -> None:
    """Switch PyTorch's deterministic kernels on; on the CPU they already are.

    To be called before CUDA starts, because cuBLAS reads its workspace setting once.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def pin_threads(threads: int | None = None) -> int:
    """Set PyTorch's CPU threads and return their number; sums change with it, so record it.

    None: OMP_NUM_THREADS if it is set, else the physical cores that this process may use.
    """
    if threads is None:
        setting = os.environ.get("OMP_NUM_THREADS", "")
        threads = int(setting) if setting.isdecimal() and int(setting) > 0 else available_cores()
    if threads < 1:
        raise ValueError(f"threads: found {threads}, expected at least 1.")
    torch.set_num_threads(threads)
    return torch.get_num_threads()


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory, and up to 32 MiB on its heap; returns whether it does.

    By default large tensors go back to the system after every use, and a CPU step of 8,192 tokens
    waits for 100,000 page faults: 5 % of its time (benchmarks/NOTES.md). The peak is the same.
    """
    trim_threshold, mmap_threshold = -1, -3  # malloc.h: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(mmap_threshold, 32 << 20)) and bool(mallopt(trim_threshold, 2**31 - 1))


# --- provenance ---------------------------------------------------------------------------------


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(_REPOSITORY), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _git_state() -> tuple[str | None, bool | None]:
    """(commit, whether code differs from it); (None, None) outside a repository of our own."""
    top = _git("rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != _REPOSITORY:
        return None, None
    sha = _git("rev-parse", "--verify", "HEAD")
    changed = _git("status", "--porcelain", "--", *_CODE)
    return sha, None if sha is None or changed is None else bool(changed)


def cpu_model() -> str:
    """The CPU's name, with family and model, for a virtual machine may call all kinds alike."""
    first = dict(reversed(_cpuinfo()))  # of the first CPU
    name = first.get("model name") or platform.processor() or platform.machine()
    kind = ", ".join(f"{k.split()[-1]} {first[k]}" for k in ("cpu family", "model") if k in first)
    return f"{name} ({kind})" if kind else name


def environment_stamp(device: torch.device) -> dict[str, Any]:
    """What a result may depend on: code, versions, machine; variables by allow-list alone.

    Values are plain JSON; what cannot be found out is None.
    """
    sha, dirty = _git_state()
    on_gpu = device.type == "cuda"
    return {
        "git_sha": sha,
        "git_dirty": dirty,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "device": str(device),
        "device_name": device_name(device),
        "compute_capability": list(torch.cuda.get_device_capability(device)) if on_gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
        "driver": _driver_version() if on_gpu else None,
        "cpu_model": cpu_model(),
        "cpu_bf16": cpu_has_bf16(),
        "threads": torch.get_num_threads(),
        "variables": {name: os.environ.get(name) for name in _RECORDED_VARIABLES}
        | {name: "set" if name in os.environ else "unset" for name in _RECORDED_AS_SET},
    }


def device_name(device: torch.device) -> str:
    """The GPU's or CPU's product name, the key of its choices and of the price table."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()


def _driver_version() -> str | None:
    import pynvml

    try:
        pynvml.nvmlInit()
        return pynvml.nvmlSystemGetDriverVersion()
    except pynvml.NVMLError:
        return None
