"""How many cores and GPUs this process may use; known without torch."""

from __future__ import annotations

import os
from pathlib import Path

# How a run's waiting OpenMP threads wait, read when torch loads: they look so many times for work,
# some microseconds, then sleep. A lone run on two cores is 6 to 15 % faster than with sleep alone;
# two that share them lose 10 %, where libgomp's own 300,000 looks cost a factor of 3
# (benchmarks/NOTES.md).
WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}


def available_cores() -> int:
    """Physical cores open to this process, by its CPU affinity and its cgroup's quota."""
    if hasattr(os, "sched_getaffinity"):
        cores = len({_core_of(cpu) for cpu in os.sched_getaffinity(0)})
    else:
        cores = os.cpu_count() or 1
    quota = _cgroup_quota(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    return max(1, min(cores, int(quota)) if quota else cores)


def _core_of(cpu: int) -> tuple[str, str]:
    topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
    try:
        package, core = (
            (topology / name).read_text().strip() for name in ("physical_package_id", "core_id")
        )
    except OSError:
        return "cpu", str(cpu)
    return package, core


def _cgroup_quota(membership: Path, root: Path) -> float | None:
    """CPUs that the cgroup (v2, or v1) or any of its parents allows, None if unlimited."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return None
    groups = [line.split(":", 2) for line in lines if line.count(":") >= 2]
    quotas: list[float] = []
    for _, controllers, path in groups:
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / "cpu" if controllers else root
        parts = [part for part in path.split("/") if part]
        for depth in range(len(parts) + 1):
            quotas += _group_quota(base.joinpath(*parts[:depth]))
    return min(quotas, default=None)


def _group_quota(group: Path) -> list[float]:
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota = (group / "cpu.cfs_quota_us").read_text().strip()
            period = (group / "cpu.cfs_period_us").read_text().strip()
    except (OSError, ValueError):
        return []
    return [] if quota in ("max", "-1") else [int(quota) / int(period)]


def visible_gpus() -> int:
    """GPUs that this process sees.

    Which run gets which is not decided here: `--device auto` claims the least used one
    (`runtime.claim_least_used`), which also counts the runs of other loops on this machine.
    """
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return len([name for name in listed.split(",") if name.strip() not in ("", "-1")])
    import pynvml

    try:
        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError:
        return 0


def shared(jobs: int, threads: int | None = None) -> dict[str, str]:
    """The environment of one of so many runs at a time: `threads` of its own, by default its part
    of the cores unless OMP_NUM_THREADS says otherwise."""
    environment = dict(os.environ)
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    elif jobs > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // jobs)))
    return environment
