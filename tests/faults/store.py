"""F7: an S3-API server behind a faulty proxy: never a manifest without its object, and a machine
with an empty disk goes on from the remote alone, bit for bit."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import logging
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tests.faults.bench import EXPERIMENT, Bench, Tally, differences, results, rows, tally
from tests.faults.processes import fork, start

BUCKET = "faults"
SETTINGS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
KINDS = ("reset", "stall", "cut")
ATTEMPTS = 12  # a machine that exits 74 or 75 is started again; the proxy heals after half of them
AGAIN = (74, 75)
WRITES = 3  # of an upload: object, metrics, manifest
_context = multiprocessing.get_context("fork")


def run(bench: Bench) -> list[Tally]:
    tallies: list[Tally] = []
    trials = bench.count(20, 1)
    os.environ |= SETTINGS
    with server(bench) as port:
        with tally(
            tallies, "F7", f"S3 behind a proxy that resets, stalls, cuts x {trials}"
        ) as line:
            totals = {"connections broken": 0, "machines killed": 0, "resumed from the store": 0}
            for number in range(trials):
                problems, counts = trial(bench, port, number)
                for name in totals:
                    totals[name] += counts.get(name, 0)
                line.add(problems, trial=f"{KINDS[number % 3]} {number}")
            line.notes += [f"{count} {name}" for name, count in totals.items()]
        with tally(tallies, "F7", "killed before each write of two uploads") as line:
            for write in [WRITES] if bench.quick else range(1, 1 + 2 * WRITES):
                line.add(killed_before(bench, port, write), trial=f"write {write}")
    return tallies


@contextmanager
def server(bench: Bench) -> Iterator[int]:
    """moto on a loopback port, in a process of its own: this one must stay free of threads."""
    receiver, sender = _context.Pipe(duplex=False)

    def serve() -> None:
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
        moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        moto.start()
        sender.send(moto.get_host_and_port()[1])
        signal.pause()

    process = _context.Process(target=serve, daemon=True)
    process.start()
    port = int(receiver.recv())
    create = functools.partial(_create_bucket, port)
    assert fork(create, bench.work / "out" / "bucket.out").wait() == 0
    try:
        yield port
    finally:
        process.kill()
        process.join()


def _create_bucket(port: int) -> int:
    _direct(port).create_dir(BUCKET)
    return 0


def _direct(port: int) -> Any:
    from pyarrow import fs

    return fs.S3FileSystem(
        endpoint_override=f"127.0.0.1:{port}", scheme="http", allow_bucket_creation=True
    )


@contextmanager
def proxy(port: int, kind: str, share: float, seed: object) -> Iterator[Any]:
    """A faulty proxy in a process of its own; yields its port and ask("heal" or "faults"),
    which returns how many connections it has broken."""
    from tests.faulty_proxy import Proxy

    caller, server_end = _context.Pipe()

    def serve() -> None:
        draw = random.Random(f"{seed}")
        faulty = Proxy(("127.0.0.1", port))
        faulty.break_with(
            lambda: (kind, int(draw.expovariate(1 / 60_000))) if draw.random() < share else None
        )
        server_end.send(faulty.port)
        while (request := server_end.recv()) != "end":
            if request == "heal":
                faulty.heal()
            server_end.send(faulty.faults)

    def ask(request: str) -> int:
        caller.send(request)
        return int(caller.recv())

    process = _context.Process(target=serve, daemon=True)
    process.start()
    try:
        yield int(caller.recv()), ask
    finally:
        caller.send("end")
        process.kill()
        process.join()


def quick_timing() -> None:
    """A dead machine is replaced after one second, a stalled request given up after one."""
    from src.storage import remote

    remote.Timing = functools.partial(  # type: ignore[misc, assignment]
        remote.Timing,
        heartbeat_s=0.3,
        stale_s=1.0,
        settle_s=0.05,
        backoff_s=0.05,
        backoff_max_s=0.2,
        request_timeout_s=1.0,
        connect_timeout_s=1.0,
    )


def slowed(seconds: float) -> Callable[[], None]:
    """A pause at each save, as a real step takes: the store gets several of the checkpoints."""

    def arm() -> None:
        from src.storage import checkpoint

        real = checkpoint.save

        def save(*args: Any, **kwargs: Any) -> Any:
            saved = real(*args, **kwargs)
            time.sleep(seconds)
            return saved

        checkpoint.save = save

    return arm


def dies_before(write: int) -> Callable[[], None]:
    """Before the process's so many-th write of a checkpoint to the store."""

    def arm() -> None:
        from src.storage.object_store import ObjectStore

        real, count = ObjectStore.put, itertools.count(1)

        def put(store: ObjectStore, key: str, data: bytes) -> None:
            if key.startswith(("objects/", "manifests/")) and next(count) == write:
                os.kill(os.getpid(), signal.SIGKILL)
            real(store, key, data)

        ObjectStore.put = put  # type: ignore[method-assign]

    return arm


def killed_before(bench: Bench, port: int, write: int) -> list[str]:
    """A machine dies before that write; the store holds whole uploads alone, and another machine
    ends the run."""
    run_uri = f"{BUCKET}/write-{write}"
    remote = ("--remote", f"s3://{run_uri}?scheme=http&endpoint_override=127.0.0.1%3A{port}")
    a, b = (bench.logs("F7", f"write-{name}-{write}") for name in "ab")
    arms = [quick_timing, slowed(0.6), dies_before(write)]
    child = start(bench, bench.argv(a, extra=remote), arms)
    if child.wait() != -signal.SIGKILL:
        return [f"A was not killed but ended with {child.code}: {child.output[-500:]}"]
    steps, problems = inspect(bench, port, f"{run_uri}/{EXPERIMENT}", write)
    if problems or len(steps) != (write - 1) // WRITES:
        return [*problems, f"the store has the steps {steps} after {write - 1} writes"]
    code, deadline = AGAIN[0], time.monotonic() + 60
    while code in AGAIN and time.monotonic() < deadline:  # until A is taken for dead
        code = start(bench, bench.argv(b, extra=remote), [quick_timing]).wait()
    if code != 0:
        return [f"B ended with {code}"]
    return differences(b / EXPERIMENT, bench.reference())


def trial(bench: Bench, port: int, number: int) -> tuple[list[str], dict[str, int]]:
    """Machine A trains behind the proxy and is killed in two of three trials; machine B, with an
    empty disk, ends the run."""
    draw = bench.draw("F7", number)
    run_uri = f"{BUCKET}/trial-{number}"
    a, b = bench.logs("F7", f"a-{number}"), bench.logs("F7", f"b-{number}")
    kind = KINDS[number % 3]
    counts: dict[str, int] = {}
    problems: list[str] = []
    with proxy(port, kind, 0.35, ("F7", bench.seed, number)) as (proxy_port, ask):
        remote = (
            "--remote",
            f"s3://{run_uri}?scheme=http&endpoint_override=127.0.0.1%3A{proxy_port}",
        )
        child = start(bench, bench.argv(a, extra=remote), [quick_timing, slowed(0.6)])
        if number % 3 != 2:
            child.until(lambda: any((a / EXPERIMENT / "checkpoints").glob("step-*.json")))
            time.sleep(draw.uniform(0.5, 5.0))
            counts["machines killed"] = int(child.kill() == -9)
        elif child.wait() not in (0, *AGAIN):
            problems.append(f"A ended with {child.code}: {child.output[-500:]}")
        steps, in_store = inspect(bench, port, f"{run_uri}/{EXPERIMENT}", number)
        problems += in_store
        argv = bench.argv(b, extra=remote)
        code = -1
        for attempt in range(ATTEMPTS):
            if attempt == ATTEMPTS // 2:
                ask("heal")
            code = start(bench, argv, [quick_timing]).wait()
            if code not in AGAIN:
                break
            time.sleep(0.3)
        counts["connections broken"] = ask("faults")
        if code != 0:
            output = sorted((bench.work / "out").glob(f"logs-F7-b-{number}-*"))[-1].read_text()
            problems.append(f"B ended with {code}: {output[-800:]}")
    problems += inspect(bench, port, f"{run_uri}/{EXPERIMENT}", number)[1]
    if problems:
        return problems, counts
    if steps and steps[-1] > 0:
        # Clocks in A's rows are like no other's: B's record must have them.
        counts["resumed from the store"] = 1
        first = [
            (path / EXPERIMENT / "metrics.jsonl").read_text().split("\n")[1] for path in (a, b)
        ]
        if first[0] != first[1]:
            problems.append(f"the store had {steps}, but B began at 0")
    here, reference = b / EXPERIMENT, bench.reference()
    if (here / "final").is_dir():
        return problems + differences(here, reference), counts
    # A had finished and its results came back: there is nothing to train here.
    same = rows(here) == rows(reference) and results(here) == results(reference)
    return problems + ([] if same else ["the results that came back differ"]), counts


def inspect(bench: Bench, port: int, base: str, number: int) -> tuple[list[int], list[str]]:
    """(steps in the store, problems): every manifest has its object and record, whole.

    In a fork, because the S3 client starts threads."""
    log = bench.work / "out" / f"store-{number}-{time.monotonic_ns()}.out"

    def look() -> int:
        from pyarrow import fs

        direct, steps = _direct(port), []
        selector = fs.FileSelector(f"{base}/manifests", allow_not_found=True)
        for info in direct.get_file_info(selector):
            content = json.loads(direct.open_input_stream(info.path).read())
            for key, sha256 in (
                (content["object"], content["manifest"]["sha256"]),
                (content["metrics"], content["metrics_sha256"]),
            ):
                data = direct.open_input_stream(f"{base}/{key}").read()
                assert hashlib.sha256(data).hexdigest() == sha256, f"{key} is not whole"
            steps.append(content["manifest"]["step"])
        print("steps", *sorted(steps))
        return 0

    child = fork(look, log)
    if child.wait() != 0:
        return [], [f"a manifest without its object: {child.output[-500:]}"]
    return [int(step) for step in child.output.split()[1:]], []
