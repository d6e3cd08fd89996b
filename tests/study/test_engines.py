"""A study through a local loop, a Slurm array and SkyPilot's jobs: what becomes of exit codes."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from moto.server import ThreadedMotoServer
from pyarrow import fs

from src.storage.run_dir import RunDir
from src.study import engines
from tests import ROOT, python
from tests.conftest import SWEEP
from tests.faults.bench import differences
from tests.study import until

SECRET = "s3://key:SECRET@bucket/prefix"
# Long enough to be interrupted: 200 steps, about two seconds.
LONGER = ("training.tokens=51200", "training.eval_every_tokens=12800",
          "training.checkpoint_every_steps=40")  # fmt: skip


def rows(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


STUDY = "device: cpu\nblocks: [{{name: a, config: {sweep}, experiments: [{names}]}}]\n{more}\n"


def written(
    folder: Path, sweep: Path | str, names: str = "base", more: str = "", name: str = "tiny"
) -> Path:
    """A study file of one block."""
    path = folder / f"{name}.yaml"
    path.write_text(STUDY.format(sweep=sweep, names=names, more=f"tokens_per_s: 9\n{more}"))
    return path


def launch(*arguments: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "run_experiment.py"), "--study", *map(str, arguments)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def said(process: subprocess.Popen[str], code: int) -> str:
    """What a process says until it ends, with this exit code."""
    output, _ = process.communicate(timeout=180)
    assert process.returncode == code, output
    return output


def study(here: Path, *arguments: Any, code: int = 0) -> str:
    """What `--study` says that writes files, or refuses to."""
    done = python("run_experiment.py", "--study", *arguments, cwd=here)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def reference(tiny_sweep: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run of `base`, run as a task of a Slurm array runs it."""
    here = tmp_path_factory.mktemp("with a blank")
    file = written(here, tiny_sweep, "deep, base", f"overrides: {list(LONGER)}")
    done = as_slurm_task(slurm_script(file, here), 0)
    assert done.returncode == 0 and "base: exit code 0" in done.stdout, done.stdout + done.stderr
    return here / "logs" / "base"


def test_an_interrupted_run_ends_bitwise_as_an_uninterrupted_one(tiny_sweep, tmp_path, reference):
    """The run gets TERM alone: it is run again. The study gets TERM: the run saves, and the same
    command goes on. A run begun with another config is refused beside it."""
    logs = tmp_path / "logs"
    (logs / "idle").mkdir(parents=True)
    (logs / "idle" / "config.yaml").write_text("config_digest: of another config\n")
    file = written(tmp_path, tiny_sweep, "base, idle", f"jobs: 2\noverrides: {list(LONGER)}")
    first = launch(file, "--log_dir", logs)
    until(lambda: rows(logs / "base") > 45)
    lock = logs / "base" / ".lock"
    stopped = json.loads(lock.read_text())
    os.kill(stopped["pid"], signal.SIGTERM)
    until(lambda: json.loads(lock.read_text() or "null") not in (stopped, None))
    until(lambda: rows(logs / "base") > 90)
    first.send_signal(signal.SIGTERM)
    output = said(first, 75)
    assert "base: exited 75: again in 1 s" in output and "idle: failed: exit code 78" in output
    output = said(launch(file, "--log_dir", logs), 78)
    assert output.count("begun with another config") == 1, output
    assert differences(logs / "base", reference) == []


# ------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize(
    ("more", "arguments", "says"),
    [
        ("overrides: [training.tokens=1]", (), "training.tokens"),
        ("", ("--engine", "cloud"), "invalid choice: 'cloud'"),
        ('slurm: {time: "2"}', ("--engine", "slurm"), "expected at least 10 minutes"),
        ("slurm: {time: soon}", ("--engine", "slurm"), "slurm.time: found 'soon'"),
        ("", ("--engine", "slurm", "--remote", SECRET), "holds credentials"),
        ("", ("--log_dir", "/dev/null/logs"), "/dev/null is no directory"),
        ("", ("--engine", "sky"), "--remote: found nothing, expected a bucket"),
        ("", ("--engine", "sky", "--remote", "file:///x"), "expected a bucket"),
    ],
)
def test_wrong_requests_are_refused_and_nothing_is_written(
    tiny_sweep, tmp_path, more, arguments, says
):
    file, here = written(tmp_path, tiny_sweep, more=more), tmp_path / "here"
    here.mkdir()
    output = study(here, file, *arguments, code=78)
    assert says in output and "SECRET" not in output
    assert list(here.iterdir()) == []


# ---------------------------------------------------------------------------------------- Slurm


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [("30", 1800), ("30:15", 1815), ("2:00:00", 7200), ("1-0", 86400), ("1-2:30", 95400),
     ("1-00:00:01", 86401)],
)  # fmt: skip
def test_time_limits_as_sbatch_reads_them(limit, seconds):
    assert engines.seconds(limit) == seconds


def slurm_script(file: Path, here: Path) -> Path:
    """What --engine slurm writes, with logs and files below `here`."""
    output = study(here, file, "--engine", "slurm", "--log_dir", here / "logs")
    assert "submit it with: sbatch" in output
    return here / "launch" / "tiny.sbatch"


def as_slurm_task(script: Path, number: int) -> subprocess.CompletedProcess[str]:
    """The script under bash, as slurmd starts it; `python -m tests.slurm` has the real Slurm. What
    it asks of scontrol stands in its directory's `requeued`."""
    scontrol = script.parent / "scontrol"
    scontrol.write_text(f'#!/bin/bash\necho "$@" >> "{script.parent}/requeued"\nexit 1\n')
    scontrol.chmod(0o755)
    environment = {
        **os.environ, "SLURM_ARRAY_TASK_ID": str(number), "SLURM_JOB_ID": "7",
        "SLURM_ARRAY_JOB_ID": "7",
        "PATH": f"{script.parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    return subprocess.run(
        ["bash", str(script)], env=environment, capture_output=True, text=True, timeout=120
    )


def test_the_batch_script_asks_for_what_a_run_needs_and_queues_75_alone_again(tiny_sweep, tmp_path):
    """In directories with a blank in their names. A task that cannot run ends with its code."""
    stated = "slurm: {gpu: a100:1, cpus: 2, time: '30', at_once: 2, options: [--partition=spot]}"
    (tmp_path / "my jobs").mkdir()
    script = slurm_script(written(tmp_path, tiny_sweep, "all", stated), tmp_path / "my jobs")
    options = [line[8:] for line in script.read_text().splitlines() if line.startswith("#SBATCH ")]
    for line in (
        "--array=0-2%2", "--requeue", "--signal=B:TERM@120", "--open-mode=append", "--time=30",
        "--gres=gpu:a100:1", "--cpus-per-task=2", "--partition=spot",
    ):  # fmt: skip
        assert line in options
    logs, requeued = script.parents[1] / "logs", script.parent / "requeued"
    with RunDir.open(logs, "deep"):
        held = as_slurm_task(script, 1)
    assert held.returncode == 75 and "is held by" in held.stderr
    assert requeued.read_text() == "requeue Incomplete 7_1\n"  # 7 would be all tasks of the array
    (logs / "deep" / "config.yaml").write_text("config_digest: of another config\n")
    assert as_slurm_task(script, 1).returncode == 78
    assert as_slurm_task(script, 3).returncode == 78
    assert requeued.read_text() == "requeue Incomplete 7_1\n"


# --------------------------------------------------------------------------------------- SkyPilot


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """An S3 bucket of a server on this machine, as --remote takes it."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
        }.items():  # fmt: skip
            patch.setenv(name, value)
        store = fs.S3FileSystem(
            endpoint_override=f"{host}:{port}", scheme="http", allow_bucket_creation=True
        )
        name = f"bucket-{random.SystemRandom().randrange(10**9)}"
        store.create_dir(name)
        yield f"s3://{name}/runs?scheme=http&endpoint_override={host}%3A{port}"
    server.stop()


@pytest.fixture(scope="module")
def checkout(token_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the code with its data beside it, as a user has it who starts SkyPilot."""
    here = tmp_path_factory.mktemp("checkout")
    for name in ("src", "configs"):
        shutil.copytree(ROOT / name, here / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("run_experiment.py", "requirements.txt"):
        shutil.copy(ROOT / name, here)
    shutil.copytree(token_root, here / "data" / "tokens")
    config = SWEEP.format(tokens="data/tokens")
    (here / "configs" / "tiny.yaml").write_text(config)
    return here


def sky_files(checkout: Path, remote: str, names: str = "base", more: str = "") -> list[Path]:
    file = written(checkout, "configs/tiny.yaml", names, more)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "REPOSITORY", checkout)
        study(checkout, file, "--engine", "sky", "--remote", remote, "--log_dir", "logs")
    return [checkout / "launch" / f"tiny-{name}.yaml" for name in names.split(", ")]


def test_a_spot_job_a_run_that_recovers_on_75_alone(checkout):
    files = sky_files(checkout, "s3://bucket/prefix", "base, deep")
    task = yaml.safe_load(files[1].read_text())
    assert task["resources"] == {
        "accelerators": "A100:1",
        "use_spot": True,
        "disk_size": 100,
        "job_recovery": {"max_restarts_on_errors": 0, "recover_on_exit_codes": [75]},
    }
    assert task["file_mounts"] == {"~/sky_workdir/data/tokens/v300": "data/tokens/v300"}
    assert "--exp deep" in task["run"] and "--remote s3://bucket/prefix" in task["run"]
    plain = sky_files(checkout, "s3://bucket/prefix", more="sky: {spot: false, gpu: none}")
    resources = yaml.safe_load(plain[0].read_text())["resources"]
    assert resources["use_spot"] is False and "accelerators" not in resources


def test_only_where_the_tokens_are_and_the_code_is(checkout, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="SkyPilot copies the directory that it is started in"):
        engines.check_sky("s3://bucket/prefix")
    (checkout / "configs" / "bare.yaml").write_text(SWEEP.format(tokens=tmp_path / "nowhere"))
    file = written(checkout, "configs/bare.yaml", name="bare")
    monkeypatch.setattr(engines, "REPOSITORY", checkout)
    output = study(checkout, file, "--engine", "sky", "--remote", "s3://b/p", code=78)
    assert "start this command once without --engine" in output


class ComputeConfig:
    """What SkyPilot gives a job: an empty home, the workdir, the mounts, its variables. `setup`
    is left out (it installs torch); the interpreter of this test stands in .venv instead."""

    def __init__(self, home: Path, checkout: Path, file: Path) -> None:
        self.task = yaml.safe_load(file.read_text())
        self.workdir = home / "sky_workdir"
        shutil.copytree(checkout, self.workdir, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("data", "launch"):  # of the root alone, as .gitignore has them
            shutil.rmtree(self.workdir / name, ignore_errors=True)
        for place, source in self.task["file_mounts"].items():
            shutil.copytree(checkout / source, home / place.removeprefix("~/"))
        python = self.workdir / ".venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(f'#!/bin/bash\nexec "{sys.executable}" "$@"\n')
        python.chmod(0o755)
        self.environment = {
            **os.environ, "HOME": str(home), "OMP_NUM_THREADS": "1", **self.task["envs"],
            "SKYPILOT_TASK_ID": f"sky-managed-2026-11-23-10-00-00-000000_{self.task['name']}_1-0",
            "SKYPILOT_NODE_RANK": "0", "SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_IPS": "127.0.0.1",
            "SKYPILOT_NUM_GPUS_PER_NODE": "0",
        }  # fmt: skip

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", "-c", self.task["run"]], cwd=self.workdir, env=self.environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip


def test_the_run_section_goes_on_from_the_bucket_on_a_machine_with_an_empty_disk(
    checkout, bucket, tmp_path, reference
):
    (file,) = sky_files(checkout, bucket, more=f"overrides: {list(LONGER)}")
    machines = [ComputeConfig(tmp_path / name, checkout, file) for name in ("first", "second")]
    first, second = (compute.workdir / "logs" / "base" for compute in machines)
    process = machines[0].start()
    until(lambda: rows(first) > 60)
    process.send_signal(signal.SIGTERM)
    said(process, 75)  # which SkyPilot recovers on, and on nothing else
    said(machines[1].start(), 0)
    assert differences(second, reference) == []
    logs = [(run / "metrics.jsonl").read_bytes() for run in (first, second)]
    assert logs[1].startswith(logs[0]), "it began again: the clocks of the rows are others"


def test_setup_installs_into_the_first_python_that_is_new_enough(checkout, tmp_path):
    """Of invented ones: python3.13 is too old, python3.12 answers as this one and writes down what
    else it is asked."""
    (file,) = sky_files(checkout, "s3://bucket/prefix")
    task = yaml.safe_load(file.read_text())
    calls = tmp_path / "calls"
    for name, action in (("python3.13", "exit 1"), ("python3.12", f'exec "{sys.executable}" "$@"')):
        invented = tmp_path / name
        invented.write_text(
            f'#!/bin/bash\nif [ "$1" = -c ]; then {action}; fi\necho "${{0##*/}} $*" >> {calls}\n'
            'if [ "$2" = venv ]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; fi\n'
        )
        invented.chmod(0o755)
    (tmp_path / "requirements.txt").write_text("torch==9.9\n")
    environment = {**os.environ, **task["envs"], "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for index in ("", "https://index"):  # the second time the environment is there
        again = environment | {"TORCH_INDEX": index}
        subprocess.run(["bash", "-c", task["setup"]], cwd=tmp_path, env=again, check=True)
    installed = "python -m pip install -q -r requirements.txt"
    assert calls.read_text().splitlines() == [
        "python3.12 -m venv .venv", installed,
        "python -m pip install -q torch==9.9 --index-url https://index", installed,
    ]  # fmt: skip


@pytest.mark.skipif(
    "SKYPILOT_PYTHON" not in os.environ,
    reason="SKYPILOT_PYTHON names a python with SkyPilot, see docs/ENGINES.md",
)
def test_skypilots_own_parser_reads_every_file(checkout, tmp_path):
    files = sky_files(checkout, "s3://bucket/prefix", "base, deep, idle")
    code = """
import json, sys, sky
from sky.utils import schemas
recovery = schemas.get_resources_schema()["properties"]["job_recovery"]["anyOf"]
(known,) = (kind["properties"] for kind in recovery if kind["type"] == "object")
for path in sys.argv[1:]:
    task = sky.Task.from_yaml(path)
    (resources,) = task.resources
    task.validate_name()
    assert set(resources.job_recovery) <= set(known)  # its parser takes any key here
    print(json.dumps([task.name, resources.use_spot, resources.accelerators,
                      resources.job_recovery, task.workdir, task.file_mounts]))
"""
    done = subprocess.run(
        [os.environ["SKYPILOT_PYTHON"], "-c", code, *map(str, files)],
        cwd=checkout, env={**os.environ, "HOME": str(tmp_path)}, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    read = [json.loads(line) for line in done.stdout.splitlines()]
    assert [task[0] for task in read] == [f"run-tiny-{name}" for name in ("base", "deep", "idle")]
    for _, spot, accelerators, recovery, workdir, mounts in read:
        assert spot is True and accelerators == {"A100": 1} and workdir == "."
        assert recovery["recover_on_exit_codes"] == [75]
        assert recovery["max_restarts_on_errors"] == 0
        assert mounts == {"~/sky_workdir/data/tokens/v300": "data/tokens/v300"}
