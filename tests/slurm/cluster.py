"""A real Slurm cluster of one node on this machine's loopback, for as long as a test needs it.

Debian's slurm-wlm, its two daemons started here: no systemd, no munge (auth/none trusts whoever
can reach the two loopback ports: for tests only), no cgroups, no accounting.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

NEEDS = ("slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "squeue", "sinfo")
CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control_port}
SlurmdPort={node_port}
AuthType=auth/none
CredType=cred/none
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={work}/state
SlurmdSpoolDir={work}/spool
SlurmctldPidFile={work}/slurmctld.pid
SlurmdPidFile={work}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MailProg=/bin/true
ReturnToService=2
MinJobAge=3600
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """Commands of Slurm that this machine lacks (Debian: apt-get install slurm-wlm)."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin"
    return [name for name in NEEDS if shutil.which(name, path=path) is None]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Cluster:
    """Commands to a running cluster."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment

    def command(self, *words: str, seconds: float = 60) -> str:
        """Standard output of one of Slurm's commands; RuntimeError if it fails."""
        done = subprocess.run(
            words, env=self.environment, capture_output=True, text=True, timeout=seconds
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")
        return done.stdout

    def jobs(self, array: str) -> dict[int, dict[str, str]]:
        """Fields of `scontrol show job` of every task of an array, by its number."""
        found: dict[int, dict[str, str]] = {}
        for line in self.command("scontrol", "--oneliner", "show", "job", array).splitlines():
            fields = dict(re.findall(r"(\w+)=(\S*)", line))
            if fields.get("ArrayTaskId", "").isdigit():
                found[int(fields["ArrayTaskId"])] = fields
        return found


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    """Start both daemons, wait until the node is idle, and end them at the end."""
    work = Path(tempfile.mkdtemp(prefix="slurm-"))  # a path in slurm.conf holds no blanks
    for name in ("state", "spool"):
        (work / name).mkdir(parents=True)
    config = work / "slurm.conf"
    host = socket.gethostname().partition(".")[0]
    config.write_text(
        CONFIG.format(
            host=host,
            user=getpass.getuser(),
            work=work,
            cpus=len(os.sched_getaffinity(0)),
            control_port=_free_port(),
            node_port=_free_port(),
        )
    )
    path = f"{os.environ.get('PATH', '')}:/usr/sbin"
    environment = os.environ | {"SLURM_CONF": str(config), "PATH": path}
    daemons = []
    try:
        for name in ("slurmctld", "slurmd"):
            with (work / f"{name}.log").open("wb") as log:
                daemons.append(
                    subprocess.Popen([name, "-D"], stdout=log, stderr=log, env=environment)
                )
        running = Cluster(environment)
        _wait_for_node(running, work)
        yield running
        with contextlib.suppress(RuntimeError):
            running.command("scancel", "--full", "--user", getpass.getuser())
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            daemon.wait(60)
        shutil.rmtree(work, ignore_errors=True)


def _wait_for_node(running: Cluster, work: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(RuntimeError):
            if running.command("sinfo", "--noheader", "--format=%T").strip() == "idle":
                return
        time.sleep(0.2)
    logs = "".join((work / f"{name}.log").read_text() for name in ("slurmctld", "slurmd"))
    raise RuntimeError(f"no node after {seconds:.0f} s:\n{logs[-3000:]}")
