"""Engines: what a local loop, a Slurm array and SkyPilot's jobs do with a run's exit codes."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from moto.server import ThreadedMotoServer
from pyarrow import fs

from src.compute import cores
from src.storage.run_dir import RunDir
from src.study.engines import __main__ as launcher
from src.study.engines import local, runs, sky, slurm
from tests.conftest import ROOT, SWEEP
from tests.faults.bench import differences

SECRET = "s3://key:SECRET@bucket/prefix"
# Long enough to be interrupted: 320 steps, about two seconds.
LONGER = ("--set", "training.tokens=81920", "--set", "training.checkpoint_every_steps=40")


def until(ready: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


def rows(run: Path) -> int:
    record = run / "metrics.jsonl"
    return record.read_bytes().count(b"\n") if record.exists() else 0


# ------------------------------------------------------------------------------ the local engine


def job(name: str, script: str, progress: Callable[[], object] = time.monotonic) -> local.Job:
    return local.Job(name=name, command=("bash", "-c", script), progress=progress)


def engine(*jobs: local.Job, at_once: int = 2) -> local.Engine:
    return local.Engine(jobs, at_once, pause_s=0.0)


def test_75_is_run_again_until_it_finishes(tmp_path):
    script = f"echo >> {tmp_path}/tries; [ $(wc -l < {tmp_path}/tries) -ge 4 ] || exit 75"
    assert engine(job("a", script), job("b", "exit 0")).run() == 0
    assert (tmp_path / "tries").read_text() == "\n" * 4


@pytest.mark.parametrize(
    ("script", "code"), [("exit 78", 78), ("exit 70", 70), ("exit 74", 74), ("kill -9 $$", 137)]
)
def test_any_other_failure_is_final_and_the_others_go_on(tmp_path, capsys, script, code):
    bad = job("bad", f"echo >> {tmp_path}/tries; {script}")
    good = job("good", f"sleep 0.3; touch {tmp_path}/done")
    assert engine(bad, good, at_once=1).run() == code
    assert (tmp_path / "tries").read_text() == "\n" and (tmp_path / "done").exists()
    assert f"bad failed: exit code {code}" in capsys.readouterr().err


def test_75_without_progress_is_given_up(tmp_path, capsys):
    stuck = job("stuck", f"echo >> {tmp_path}/tries; exit 75", progress=lambda: 1)
    assert engine(stuck, job("bad", "exit 78")).run() == 75
    tries = len((tmp_path / "tries").read_text())
    assert tries == 1 + local.MOST_IDLE_RERUNS and "given up" in capsys.readouterr().err


def test_pauses_grow_while_nothing_moves_and_start_over_when_something_does():
    waits = []
    stuck = job("a", "", progress=lambda: 1)
    stuck.seen = 1
    for _ in range(8):
        local.Engine([stuck], 1)._again(stuck)
        waits.append(round(stuck.not_before - time.monotonic()))
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]
    stuck.seen = 0
    local.Engine([stuck], 1)._again(stuck)
    assert stuck.idle == 0 and stuck.code is None


@pytest.mark.parametrize("at_once", [1, 3])
def test_no_more_than_the_asked_runs_go_at_once_and_in_order(tmp_path, at_once):
    log = tmp_path / "log"
    script = f"echo + >> {log}; sleep 0.4; echo - >> {log}"
    assert engine(*(job(str(n), script) for n in range(4)), at_once=at_once).run() == 0
    heights = [0]
    for mark in log.read_text().split():
        heights.append(heights[-1] + (1 if mark == "+" else -1))
    assert max(heights) == at_once


def test_a_signal_ends_all_begins_nothing_and_asks_to_be_run_again(tmp_path):
    got = "trap 'echo $name >> {0}/got; exit 75' TERM; touch {0}/$name; sleep 30 & wait"
    jobs = [job(name, f"name={name}; {got.format(tmp_path)}") for name in "abc"]
    code = f"""
import sys
from src.study.engines.local import Engine, Job
jobs = [Job(name=str(i), command=["bash", "-c", s], progress=int) for i, s in
        enumerate({[list(j.command)[-1] for j in jobs]!r})]
sys.exit(Engine(jobs, 2).run())
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    until(lambda: (tmp_path / "a").exists() and (tmp_path / "b").exists())
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 75
    assert sorted((tmp_path / "got").read_text().split()) == ["a", "b"]
    assert not (tmp_path / "c").exists()


def launch(*arguments: Any, cwd: Path = ROOT) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "src.study.engines", *map(str, arguments)],
        cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def reference(tiny_sweep: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run of `base`, run as a task of a Slurm array runs it."""
    here = tmp_path_factory.mktemp("with a blank")
    plan = runs.plan(
        str(tiny_sweep), ["deep", "base"], device="cpu", overrides=LONGER[1::2], log_dir=str(here)
    )
    text = slurm.script(
        plan, gpu="none", cpus=1, time_limit="30", at_once=None, directory=here / "jobs"
    )
    done = as_slurm_task(slurm.write(plan, text, here / "jobs"), 0)
    assert done.returncode == 0 and "base: exit code 0" in done.stdout, done.stdout + done.stderr
    return here / "base"


def test_an_interrupted_run_ends_bitwise_as_an_uninterrupted_one(tiny_sweep, tmp_path, reference):
    """The run gets TERM alone: the engine runs it again. The engine gets TERM: the run saves, and
    the same command goes on. A run begun with another config is refused beside it."""
    logs = tmp_path / "logs"
    arguments = ("--config", tiny_sweep, "--device", "cpu", *LONGER)
    (logs / "idle").mkdir(parents=True)
    (logs / "idle" / "config.yaml").write_text("config_digest: of another config\n")
    command = ("--engine", "local", "--exp", "base", "idle", "--jobs", 2, "--log_dir", logs)
    first = launch(*command, *arguments)
    until(lambda: rows(logs / "base") > 60)
    os.kill(json.loads((logs / "base" / ".lock").read_text())["pid"], signal.SIGTERM)
    stopped = json.loads((logs / "base" / ".lock").read_text())
    until(
        lambda: json.loads((logs / "base" / ".lock").read_text() or "null") not in (stopped, None)
    )
    until(lambda: rows(logs / "base") > 150)
    first.send_signal(signal.SIGTERM)
    said, _ = first.communicate(timeout=60)
    assert first.returncode == 75, said
    assert "base exited 75: again in 1 s" in said and "idle failed: exit code 78" in said
    second = launch(*command, *arguments)
    said, _ = second.communicate(timeout=90)
    assert second.returncode == 78 and said.count("begun with another config") == 1, said
    assert differences(logs / "base", reference) == []


def test_progress_is_a_checkpoint_or_a_row(tmp_path):
    assert local.progress_of(tmp_path / "none") == (-1, 0)
    with RunDir.open(tmp_path, "r") as directory:
        directory.append({"step": 1})
        (directory.checkpoints / "step-00000040.json").touch()
        (directory.checkpoints / "step-00000120.json").touch()
        assert local.progress_of(directory.path) == (120, directory.offset())


def test_a_place_for_each_visible_gpu(monkeypatch):
    for listed, places in (("", 0), ("-1", 0), ("0", 1), ("2,3, 5", 3)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
        assert cores.visible_gpus() == places


# ----------------------------------------------------------------------------- what is launched


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--exp", "nobody"), "no experiment named 'nobody'"),
        (("--exp", "base", "--set", "training.tokens=1"), "training.tokens"),
        (("--exp", "base", "--jobs", "0"), "at least 1"),
        (("--exp", "base", "--engine", "cloud"), "invalid choice: 'cloud'"),
        (("--exp", "base", "--engine", "slurm", "--time", "2"), "expected at least 10 minutes"),
        (("--exp", "base", "--engine", "slurm", "--time", "soon"), "--time: found 'soon'"),
        (("--exp", "base", "--engine", "slurm", "--remote", SECRET), "holds credentials"),
        (("--exp", "base", "--engine", "sky", "--remote", SECRET), "holds credentials"),
        (("--exp", "base", "--log_dir", "/dev/null/logs"), "/dev/null is no directory"),
        (("--exp", "base", "--engine", "slurm", "--output", "/dev/null"), "expected a directory"),
        (("--exp", "base", "--engine", "sky"), "--remote: found nothing, expected a bucket"),
        (("--exp", "base", "--engine", "sky", "--remote", "file:///x"), "expected a bucket"),
    ],
)
def test_wrong_requests_are_refused_and_nothing_is_written(
    tiny_sweep, tmp_path, monkeypatch, capsys, arguments, says
):
    monkeypatch.chdir(tmp_path)
    command = ["--engine", "local", "--config", str(tiny_sweep), *arguments]
    try:
        code = launcher.main(command)
    except SystemExit as ended:
        code = ended.code
    error = capsys.readouterr().err
    assert code == 78 and says in error and "SECRET" not in error
    assert list(tmp_path.iterdir()) == []


def test_a_command_a_run_with_the_baseline_first(tiny_sweep):
    plan = runs.plan(str(tiny_sweep), ["deep", "base"], seeds=[0, 3], overrides=["a.b=c d"][:0])
    assert [run.name for run in plan.runs] == ["base", "base-seed3", "deep", "deep-seed3"]
    assert plan.runs[1].arguments == (
        "--config", str(tiny_sweep), "--log_dir", "logs", "--exp", "base", "--seed", "3",
    )  # fmt: skip


# ---------------------------------------------------------------------------------------- Slurm


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [("30", 1800), ("30:15", 1815), ("2:00:00", 7200), ("1-0", 86400), ("1-2:30", 95400),
     ("1-00:00:01", 86401)],
)  # fmt: skip
def test_time_limits_as_sbatch_reads_them(limit, seconds):
    assert slurm.seconds(limit) == seconds


@pytest.fixture
def script(tiny_sweep: Path, tmp_path: Path) -> Path:
    """The batch script of all three tiny runs, in directories with a blank in their names."""
    plan = runs.plan(str(tiny_sweep), ["all"], device="cpu", log_dir=str(tmp_path / "my logs"))
    text = slurm.script(
        plan, gpu="a100:1", cpus=2, time_limit="30", at_once=2, directory=tmp_path / "my jobs",
        options=("--partition=spot",),
    )  # fmt: skip
    return slurm.write(plan, text, tmp_path / "my jobs")


def test_the_batch_script_asks_slurm_for_what_a_run_needs(script):
    asked = [line[8:] for line in script.read_text().splitlines() if line.startswith("#SBATCH ")]
    for line in (
        "--array=0-2%2", "--requeue", "--signal=B:TERM@120", "--open-mode=append", "--time=30",
        "--gres=gpu:a100:1", "--cpus-per-task=2", "--partition=spot",
    ):  # fmt: skip
        assert line in asked


def as_slurm_task(script: Path, number: int) -> subprocess.CompletedProcess[str]:
    """The script under bash, as slurmd starts it; `python -m tests.slurm` has the real Slurm. What
    it asks of scontrol stands in its directory's `asked`."""
    scontrol = script.parent / "scontrol"
    scontrol.write_text(f'#!/bin/bash\necho "$@" >> "{script.parent}/asked"\nexit 1\n')
    scontrol.chmod(0o755)
    environment = {
        **os.environ, "SLURM_ARRAY_TASK_ID": str(number), "SLURM_JOB_ID": "7",
        "SLURM_ARRAY_JOB_ID": "7",
        "PATH": f"{script.parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    return subprocess.run(
        ["bash", str(script)], env=environment, capture_output=True, text=True, timeout=120
    )


def test_a_task_that_cannot_run_ends_with_its_code_and_75_alone_asks_slurm(script, tmp_path):
    logs, asked = tmp_path / "my logs", script.parent / "asked"
    with RunDir.open(logs, "deep"):
        held = as_slurm_task(script, 1)
    assert held.returncode == 75 and "is held by" in held.stderr
    assert asked.read_text() == "requeue Incomplete 7_1\n"  # 7 would be all tasks of the array
    (logs / "deep" / "config.yaml").write_text("config_digest: of another config\n")
    assert as_slurm_task(script, 1).returncode == 78
    assert as_slurm_task(script, 3).returncode == 78
    assert asked.read_text() == "requeue Incomplete 7_1\n"


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


def sky_files(
    checkout: Path, remote: str, *more: Any, exp: Sequence[str] = ("base",)
) -> list[Path]:
    process = launch(
        "--engine", "sky", "--config", "configs/tiny.yaml", "--remote", remote, "--exp", *exp,
        "--output", "launch", *more, cwd=checkout,
    )  # fmt: skip
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    return [checkout / "launch" / f"tiny-{name}.yaml" for name in exp]


def test_a_spot_job_a_run_that_recovers_on_75_alone(checkout):
    files = sky_files(checkout, "s3://bucket/prefix", exp=("base", "deep"))
    task = yaml.safe_load(files[1].read_text())
    assert task["resources"] == {
        "accelerators": "A100:1",
        "use_spot": True,
        "disk_size": 100,
        "job_recovery": {"max_restarts_on_errors": 0, "recover_on_exit_codes": [75]},
    }
    assert task["file_mounts"] == {"~/sky_workdir/data/tokens/v300": "data/tokens/v300"}
    assert "--exp deep" in task["run"] and "--remote s3://bucket/prefix" in task["run"]
    plain = sky_files(checkout, "s3://bucket/prefix", "--on_demand", "--gpu", "none")
    resources = yaml.safe_load(plain[0].read_text())["resources"]
    assert resources["use_spot"] is False and "accelerators" not in resources


def test_only_where_the_tokens_are_and_the_code_is(checkout, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "tiny.yaml").write_text(SWEEP.format(tokens=tmp_path / "nowhere"))
    plan = runs.plan(str(tmp_path / "tiny.yaml"), ["base"])
    with pytest.raises(ValueError, match="found no tokens of vocab_size 300"):
        sky.task(plan, plan.runs[0], gpu="none", spot=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="SkyPilot copies the directory that it is started in"):
        sky.check(plan, "s3://bucket/prefix")


class Machine:
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
    more = ("--device", "cpu", *LONGER)
    (file,) = sky_files(checkout, bucket, *more)
    first = Machine(tmp_path / "first", checkout, file)
    process = first.start()
    until(lambda: rows(first.workdir / "logs" / "base") > 100)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=90)
    assert process.returncode == 75, said  # which SkyPilot recovers on, and on nothing else
    second = Machine(tmp_path / "second", checkout, file)
    process = second.start()
    said, _ = process.communicate(timeout=90)
    assert process.returncode == 0, said
    assert "step 32/320" not in said, "it began again at step 0"
    assert differences(second.workdir / "logs" / "base", reference) == []


def test_setup_is_a_shell_script_and_finds_a_python_that_is_new_enough(checkout, tmp_path):
    """Run for real; the requirements are empty, so that pip needs no index."""
    (file,) = sky_files(checkout, "s3://bucket/prefix")
    task = yaml.safe_load(file.read_text())
    (tmp_path / "requirements.txt").write_text("# none\n")
    environment = {
        **os.environ, **task["envs"], "HOME": str(tmp_path), "PIP_DRY_RUN": "1",
        "PIP_NO_INDEX": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", "-c", task["setup"]], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    version = subprocess.run(
        [str(tmp_path / ".venv/bin/python"), "-c", "import sys; print(sys.version_info[:2])"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert version.stdout.strip() >= "(3, 11)"


@pytest.mark.skipif(
    "SKYPILOT_PYTHON" not in os.environ,
    reason="SKYPILOT_PYTHON names a python with SkyPilot, see docs/ENGINES.md",
)
def test_skypilots_own_parser_reads_every_file(checkout, tmp_path):
    files = sky_files(checkout, "s3://bucket/prefix", exp=("base", "deep", "idle"))
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
