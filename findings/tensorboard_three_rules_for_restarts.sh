#!/bin/bash
# TensorBoard 2.21.0 (with tensorboard-data-server 0.7.2) has three readers of event files, and each
# has its own rule for a run that was cut and went on from an earlier step.
#
# A process writes steps 0 to 6 and is killed; the next one goes on at step 4 and writes 4 to 8. As
# the documentation of `purge_step` has it, the second file begins with a session start at step 4.
# Seen, as the number of points that each reader shows for the one scalar (9 steps exist):
#
#   first file begins with a session start      no    yes
#   event_accumulator (the Python API)           9      9   any start hides later steps before it
#   server, --load_fast=false                   12      9   the first start that it meets is ignored
#   server, fast loader (the default)            9      9   starts are ignored: order of steps decides
#
# and without any start, as after a kill before the first checkpoint (0 to 6, then 0 to 8):
#
#   event_accumulator                           16
#   server, --load_fast=false                   16
#   server, fast loader                          9
#
# So a writer that passes purge_step only where it resumes shows both histories on the slow loader.
# What is right everywhere: purge_step from the first writer on (0, then the first step to come).
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"
python3 -m venv venv
venv/bin/pip install -q tensorboard==2.21.0 tensorboard-data-server==0.7.2 'setuptools<81'
cat > check.py <<'PYTHON'
import json, pathlib, socket, subprocess, sys, time, urllib.request

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter


def attempt(folder, first, last, start):
    writer = EventFileWriter(str(folder))
    if start:
        log = SessionLog(status=SessionLog.START)
        writer.add_event(Event(wall_time=time.time(), step=first, session_log=log))
    for step in range(first, last + 1):
        summary = Summary(value=[Summary.Value(tag="loss", simple_value=float(first))])
        writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))
    writer.close()
    time.sleep(1.1)  # files are ordered by the second in their names


RUNS = {"resume": (False, 4, True), "both": (True, 4, True), "none": (False, 0, False)}
logs = pathlib.Path("logs").absolute()
for name, (first_start, at, second_start) in RUNS.items():
    attempt(logs / name, 0, 6, first_start)
    attempt(logs / name, at, 8, second_start)


def served(fast):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logs), "--port", str(port),
               "--host", "127.0.0.1", f"--load_fast={fast}", "--reload_interval", "1"]
    with open(f"server-{fast}.log", "wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}/data/plugin/scalars/scalars?tag=loss&run="
    try:
        last, same, deadline = None, 0, time.time() + 300
        while same < 3 and time.time() < deadline:
            time.sleep(2)
            try:
                now = {run: len(json.load(urllib.request.urlopen(url + run))) for run in RUNS}
            except OSError:
                continue
            same, last = (same + 1 if now == last else 0), now
        return last
    finally:
        server.terminate()
        server.wait()


found = {
    "event_accumulator": {
        run: len(EventAccumulator(str(logs / run)).Reload().Scalars("loss")) for run in RUNS
    },
    "slow": served("false"),
    "fast": served("true"),
}
expected = {
    "event_accumulator": {"resume": 9, "both": 9, "none": 16},
    "slow": {"resume": 12, "both": 9, "none": 16},
    "fast": {"resume": 9, "both": 9, "none": 9},
}
print(json.dumps(found, indent=1))
sys.exit(found != expected)
PYTHON
venv/bin/python check.py && echo "as described" || { echo "other than described"; exit 1; }
