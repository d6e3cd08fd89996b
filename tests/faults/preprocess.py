"""F6: seven preprocess_lm.py at once on one cold directory, one of them killed in half of the
rounds, while a reader looks."""

from __future__ import annotations

import hashlib
import json
import os
import random
import runpy
import subprocess
import sys
import time
from pathlib import Path

from tests.faults.bench import ROOT, VOCAB, Bench, Tally, clean_environment, tally
from tests.faults.processes import Child, fork

AT_ONCE = 7
FRESH_EVERY = 5  # every fifth round with processes as the user starts them


def run(bench: Bench) -> list[Tally]:
    tallies: list[Tally] = []
    rounds = bench.count(20, 2)
    count = 3 if bench.quick else AT_ONCE
    alone(bench)
    with tally(tallies, "F6", f"{count} preprocess_lm.py at once x {rounds}") as line:
        landed = 0
        for number in range(rounds):
            for _ in range(5):  # the writer may be done before the kill: then again
                problems, killed = one_round(bench, number, count)
                if killed or problems or number % 2:
                    break
            landed += killed
            line.add(problems, trial=f"round {number}")
        line.notes.append(f"the writer killed in {landed} of the rounds")
    return tallies


def alone(bench: Bench) -> None:
    """A corpus that takes long enough to be killed over, and what one process makes of it."""
    corpus, alone = bench.work / "F6-corpus", bench.work / "F6-alone"
    make = [sys.executable, str(ROOT / "scripts" / "make_corpus.py"), "--output", str(corpus)]
    subprocess.run([*make, "--documents", "1500"], check=True, stdout=subprocess.DEVNULL)
    child = _start(bench, _arguments(bench, alone), alone.with_suffix(".out"), fresh=True)
    assert child.wait() == 0, child.output


def _arguments(bench: Bench, out: Path) -> list[str]:
    corpus = bench.work / "F6-corpus"
    return ["--input", str(corpus), "--vocab_size", str(VOCAB), "--output", str(out)]


def one_round(bench: Bench, number: int, count: int = AT_ONCE) -> tuple[list[str], bool]:
    """Start `count`, kill the writer in every second round, read; (problems, killed)."""
    out = bench.logs("F6", f"round-{number}") / "tokens"
    arguments = _arguments(bench, out)
    fresh = number % FRESH_EVERY == FRESH_EVERY - 1
    log = out.with_suffix(".out")
    children = [_start(bench, arguments, log, fresh) for _ in range(count)]
    draw = bench.draw("F6", number)
    wait_s = draw.uniform(0, 0.2)
    problems: list[str] = []
    final, partial = out / f"v{VOCAB}", out / f".v{VOCAB}.partial"
    killing = number % 2 == 0
    killed = False
    while any(child.poll() is None for child in children):
        problems += half_read(final)
        if killing and partial.exists():
            time.sleep(wait_s)
            killed = _kill_the_holder(children, draw)
            killing = False
        time.sleep(0.002)
    codes = [code for child in children if (code := child.wait()) != -9]
    if set(codes) != {0}:
        problems.append(f"exits {codes}: {log.read_text()[-400:]}")
    return problems + invalid(bench, out), killed


def _start(bench: Bench, arguments: list[str], log: Path, fresh: bool) -> Child:
    script = str(bench.code / "scripts" / "preprocess_lm.py")
    if fresh:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, script, *arguments],
                stdout=output, stderr=output, env=clean_environment(),
            )  # fmt: skip
        process.returncode = 0  # the Child waits for it
        return Child(process.pid, log, time.monotonic())

    def action() -> int:
        sys.argv = [script, *arguments]
        sys.path.insert(0, os.path.dirname(script))  # as `python script` does
        runpy.run_path(script, run_name="__main__")
        return 70  # the script exits by itself

    return fork(action, log)


def _kill_the_holder(children: list[Child], draw: random.Random) -> bool:
    """Kill the one that is writing, or where the kernel does not say, any."""
    try:
        locks = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    except OSError:
        locks = []
    holders = {fields[4] for fields in locks if fields[1] == "FLOCK"}  # waiters have "->" there
    writing = [child for child in children if str(child.pid) in holders]
    return draw.choice(writing or children).kill() == -9


def half_read(final: Path) -> list[str]:
    """Read as a run does: nothing there, or everything there and true."""
    from src.data import tokens as data

    if not (final / "meta.json").exists():
        half = final.exists() and not (final / "meta.json").exists() and final.exists()
        return [f"{final.name} is there without meta.json"] if half else []
    try:
        data.load(final, VOCAB)
    except ValueError as error:
        return [f"a run would have read half: {error}"]
    return []


def invalid(bench: Bench, out: Path) -> list[str]:
    """One result, the same bytes as one process alone makes, and nothing else left."""
    final, expected = out / f"v{VOCAB}", bench.work / "F6-alone" / f"v{VOCAB}"
    names = sorted(path.name for path in expected.iterdir())
    if not final.is_dir() or sorted(path.name for path in final.iterdir()) != names:
        return [f"{final} is not whole"]
    problems = [
        f"{name} has other bytes" for name in names if _hash(final / name) != _hash(expected / name)
    ]
    json.loads((final / "meta.json").read_text())
    left = [p.name for p in out.iterdir() if p.name not in (final.name, f".v{VOCAB}.lock")]
    return problems + [f"left behind: {name}" for name in left]


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
