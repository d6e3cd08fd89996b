"""What many runs load: checkpoint bytes, object-store requests, the aggregation of run directories.

    python -m benchmarks.capacity --config configs/embed_ratio.yaml --exp emb35

Saves real checkpoints of that cell (no data is read), pushes them to an S3 server on this machine
that logs every request, and aggregates synthetic run directories. Needs requirements-test.txt.
Writes results/capacity/store.json and aggregation.json; docs/CAPACITY.md does the arithmetic.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import torch
from moto.server import ThreadedMotoServer
from pyarrow import fs

from src.spec.allocation import allocate
from src.spec.command_line import OK, Parser, at_least, refuse
from src.spec.config import load_sweep
from src.storage import checkpoint
from src.storage.remote import Remote, Timing
from src.storage.run_dir import RunDir, write_json
from src.train import build_model, build_optimizer
from tests.synthetic_runs import SHARE_SWEEP, write_sweep

ROOT = Path(__file__).resolve().parents[1]
_COLOUR = re.compile(r"\x1b\[\d+m")
DIGESTS = {"config": "c", "tokenizer": "t", "data": "d"}
SAVES = 3  # the store keeps two: from the third on a push deletes the one before
# Beside the checkpoint, what a finished run of this size leaves: exported weights, small files.
FINAL_FILES = {"final/model.safetensors": 4, **{f"final/{n}.json": 0 for n in range(8)}}
BEATS_S = 65.0  # idle seconds in which heartbeats are counted
# A row of training as src.train writes it, of a run of 50 million tokens in 1,526 steps.
TRAIN_ROWS = 1_526
TRAIN_ROW = {
    "step": 1234, "tokens": 40_435_712, "kind": "train", "train_loss": 3.4567891120910645,
    "gradient_norm": 0.41234567761421204, "learning_rate": 0.0007654321, "tokens_per_s":
    123456.78901234567, "elapsed_s": 345.67890123456789,
}  # fmt: skip


def main() -> int:
    parser = Parser(prog="python -m benchmarks.capacity", description=__doc__)
    parser.add_argument("--config", default="configs/embed_ratio.yaml")
    parser.add_argument("--exp", default="emb35")
    parser.add_argument("--only", choices=("store", "aggregation"), help="default: both")
    parser.add_argument("--directories", type=at_least(1), default=10_000)
    parser.add_argument("--full_directories", type=at_least(1), default=1_000)
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "capacity")
    asked = parser.parse_args()
    asked.results.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix="capacity-") as scratch:
            if asked.only != "aggregation":
                found = measure_store(asked.config, asked.exp, Path(scratch))
                _tell(asked.results / "store.json", found)
            if asked.only != "store":
                _tell(asked.results / "aggregation.json", _aggregations(asked, Path(scratch)))
    except (ValueError, OSError) as error:
        return refuse(error)
    return OK


def _aggregations(asked: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Without and with figures; many short records, and fewer that hold every training step."""
    plain, full = (work / "plain", asked.directories, 0), (work / "full", asked.full_directories)
    return {
        f"{name}{', figures' if figures else ''}": measure_aggregation(*place, figures=figures)
        for name, place in (("dev rows", plain), ("all rows", (*full, TRAIN_ROWS)))
        for figures in (False, True)
    }


def _tell(path: Path, found: dict[str, Any]) -> None:
    load = [round(value, 1) for value in os.getloadavg()]
    content = {"date": date.today().isoformat(), "cores": os.cpu_count(), "load": load, **found}
    write_json(path, content)
    print(json.dumps(content, indent=2))


# ------------------------------------------------------------------------------------- the store


class Requests(logging.Handler):
    """Counts the lines that the server logs, one a request, by what they are in S3's terms."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.counts: Counter[str] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        words = _COLOUR.sub("", record.getMessage()).split('"')
        if len(words) > 1:
            method, _, target = words[1].partition(" ")
            self.counts[_kind(method, target)] += 1

    def take(self) -> dict[str, int]:
        """The counts since the last call."""
        counts, self.counts = dict(sorted(self.counts.items())), Counter()
        return counts


def _kind(method: str, target: str) -> str:
    if "list-type" in target:
        return "LIST"
    if "uploads" in target or "uploadId" in target:
        return {"PUT": "UploadPart"}.get(method, "multipart begin or end")
    return method


@contextmanager
def _server() -> Iterator[tuple[str, Requests]]:
    requests = Requests()
    logger = logging.getLogger("werkzeug")
    logger.setLevel(logging.INFO)
    logger.addHandler(requests)
    logger.propagate = False
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    store = fs.S3FileSystem(
        endpoint_override=f"{host}:{port}", scheme="http", allow_bucket_creation=True
    )
    store.create_dir("bucket")
    try:
        yield f"s3://bucket/runs?scheme=http&endpoint_override={host}%3A{port}", requests
    finally:
        server.stop()


def measure_store(config_file: str, experiment: str, work: Path) -> dict[str, Any]:
    """Bytes and seconds of a checkpoint; requests of opening, a push, a minute idle, the end."""
    (run,) = load_sweep(config_file).chosen([experiment], [0])
    answer = allocate({experiment: run.model})[experiment]
    model = build_model(answer.model, 0)
    optimizer = build_optimizer(model, run.training)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # the moments exist from the first step on
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    no_beats = Timing(heartbeat_s=1e6)
    with _server() as (uri, requests), RunDir.open(work / "logs", experiment) as directory:
        requests.take()
        remote = Remote.open(uri, experiment, local=directory.path, timing=no_beats)
        counts: dict[str, Any] = {"open": requests.take()}
        for _ in range(TRAIN_ROWS):
            directory.append(TRAIN_ROW)
        save_seconds, push_seconds = [], []
        for step in range(SAVES):
            begun = time.perf_counter()
            path = checkpoint.save(
                directory.checkpoints, state, step=step, digests=DIGESTS, environment={},
                on_saved=lambda obj, manifest: remote.push(obj, manifest, directory.metrics_path),
            )  # fmt: skip
            save_seconds.append(time.perf_counter() - begun)
            _drain(remote)
            push_seconds.append(time.perf_counter() - begun - save_seconds[-1])
            counts[f"push {step + 1}"] = requests.take()
        size = path.stat().st_size
        names = [f"checkpoints/{path.name}", *FINAL_FILES]
        for name, bytes_a_parameter in FINAL_FILES.items():
            (directory.path / name).parent.mkdir(exist_ok=True)
            (directory.path / name).write_bytes(os.urandom(bytes_a_parameter * 10**7 or 1000))
        remote.push_final(directory, names, DIGESTS)
        _drain(remote)
        counts[f"final, {len(names)} files"] = requests.take()
        remote.close()
        counts["close"] = requests.take()
        remote = Remote.open(uri, "idle")
        requests.take()
        time.sleep(BEATS_S)
        counts[f"{BEATS_S:.0f} s idle"] = requests.take()
        remote.close()
    return {
        "experiment": experiment,
        "parameters": answer.params.total,
        "checkpoint_bytes": size,
        "bytes_per_parameter": size / answer.params.total,
        "metrics_jsonl_bytes": TRAIN_ROWS * (len(json.dumps(TRAIN_ROW)) + 1),
        "save_seconds": [round(value, 3) for value in save_seconds],
        "push_seconds": [round(value, 3) for value in push_seconds],
        "requests": counts,
    }


def _drain(remote: Remote) -> None:
    if not remote.drain(600):
        raise OSError("the push has not ended in ten minutes")


# ------------------------------------------------------------------------------- the aggregation

_NO_FIGURES = ("--no_figures",)
# Its own peak: the kernel would report that of the process it was forked from.
_AGGREGATE = """
import atexit, pathlib, re, resource, runpy, sys
def report():
    status = pathlib.Path("/proc/self/status").read_text()
    print("peak", int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) / 1024,
          resource.getrusage(resource.RUSAGE_SELF).ru_utime)
atexit.register(report)
sys.argv = sys.argv[1:]
sys.path.insert(0, str(pathlib.Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def measure_aggregation(
    log_dir: Path, directories: int, train_rows: int, figures: bool
) -> dict[str, Any]:
    """Seconds and MiB of scripts/aggregate_results.py over synthetic runs."""
    seeds = range(-(-directories // len(SHARE_SWEEP)))
    size = 0
    if not log_dir.exists():
        write_sweep(log_dir, "embed_ratio.yaml", SHARE_SWEEP, seeds=seeds)
        extra = "".join(json.dumps(TRAIN_ROW) + "\n" for _ in range(train_rows))
        for path in log_dir.iterdir():
            with (path / "metrics.jsonl").open("a") as record:
                record.write(extra)
    size = sum(file.stat().st_size for file in log_dir.rglob("*") if file.is_file())
    csv = log_dir.parent / f"{log_dir.name}-{figures}" / "results.csv"
    csv.parent.mkdir()
    script = str(ROOT / "scripts" / "aggregate_results.py")
    words = ["--log_dir", str(log_dir), "--output", str(csv), *(() if figures else _NO_FIGURES)]
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", _AGGREGATE, script, *words], capture_output=True, text=True
    )
    seconds = time.perf_counter() - begun
    if done.returncode:
        raise OSError(f"the aggregation exited {done.returncode}: {done.stderr[-500:]}")
    _, peak, used = done.stdout.splitlines()[-1].split()
    return {
        "directories": len(seeds) * len(SHARE_SWEEP),
        "train_rows_each": train_rows,
        "figures": figures,
        "input_mib": round(size / 2**20, 1),
        "csv_rows": csv.read_bytes().count(b"\n") - 1,
        "csv_mib": round(csv.stat().st_size / 2**20, 1),
        "wall_seconds": round(seconds, 1),
        "cpu_seconds": round(float(used), 1),
        "peak_mib": round(float(peak), 1),
    }


if __name__ == "__main__":
    sys.exit(main())
