"""F3: flipped bits, truncations, lost and swapped manifests: found, survived, or refused."""

from __future__ import annotations

import random
import shutil
import signal
import warnings
from collections.abc import Callable
from pathlib import Path

import yaml

from tests.faults import inject
from tests.faults.bench import (
    EXPERIMENT,
    Bench,
    Tally,
    broken_promises,
    differences,
    snapshot,
    tally,
    verified,
)
from tests.faults.processes import start

BAD_INPUT = 78


def run(bench: Bench) -> list[Tally]:
    tallies: list[Tally] = []
    stopped = stopped_run(bench)
    flips, cuts = bench.count(1000, 20), bench.count(200, 5)
    with tally(tallies, "F3", f"{flips} flipped bits of a real checkpoint") as line:
        for problems in module_level(bench, stopped, flips, flip):
            line.add(problems)
    with tally(tallies, "F3", f"{cuts} truncations") as line:
        for problems in module_level(bench, stopped, cuts, cut):
            line.add(problems)
    falls_back = ("object flipped",) if bench.quick else tuple(FALLS_BACK)
    with tally(tallies, "F3", "damaged newest checkpoint, run to its end") as line:
        for name in falls_back:
            line.add(end_to_end(bench, stopped, name), trial=name)
    refused = ("all objects flipped",) if bench.quick else tuple(REFUSED)
    with tally(tallies, "F3", "nothing left to trust: refused, nothing changed") as line:
        for name in refused:
            line.add(refusal(bench, stopped, name), trial=name)
    return tallies


def stopped_run(bench: Bench) -> Path:
    """The log directory of a run that was signalled at step 34: checkpoints of 30 and 34."""
    logs = bench.work / "stopped"
    if not logs.exists():
        logs.mkdir(parents=True)
        arms = [inject.signalled_at(34, signal.SIGTERM)]
        code = start(bench, bench.argv(logs), arms).wait()
        assert code == 75, f"the run to be damaged ended with {code}"
        assert not broken_promises(logs / EXPERIMENT)
    return logs


# ------------------------------------------------------------------------------- the module alone


def flip(draw: random.Random, data: bytes) -> bytes:
    broken = bytearray(data)
    bit = draw.randrange(8 * len(data))
    broken[bit // 8] ^= 1 << bit % 8
    return bytes(broken)


def cut(draw: random.Random, data: bytes) -> bytes:
    return data[: draw.choice([0, len(data) - 1, draw.randrange(len(data))])]


def module_level(
    bench: Bench, logs: Path, number: int, break_it: Callable[[random.Random, bytes], bytes]
) -> list[list[str]]:
    """Damage the newest object (three in four) or its manifest, load, expect the one before."""
    from src.storage import checkpoint

    source = logs / EXPERIMENT / "checkpoints"
    older, newest = verified(source)
    originals = {path.name: path.read_bytes() for path in source.iterdir()}
    draw = bench.draw("F3", break_it.__name__)
    place = bench.logs("F3", break_it.__name__)
    outcomes = []
    for name, data in originals.items():
        (place / name).write_bytes(data)
    for _ in range(number):
        victim = newest["file"] if draw.random() < 0.75 else f"step-{newest['step']:08d}.json"
        (place / victim).write_bytes(break_it(draw, originals[victim]))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                loaded = checkpoint.load_latest(place, digests=newest["digests"])
                step = loaded[1]["step"] if loaded else None
            except Exception as error:  # the judge reports whatever comes
                step = error
        problems = [] if step == older["step"] else [f"loaded {step!r}"]
        outcomes.append(problems + ([] if caught or problems else ["said nothing"]))
        for path in place.iterdir():  # as it was
            if path.name not in originals:
                path.unlink()
        for name in (newest["file"], f"step-{newest['step']:08d}.json"):
            (place / name).write_bytes(originals[name])
    return outcomes


# ------------------------------------------------------------------------------------- whole runs


def _paths(logs: Path) -> tuple[list[Path], list[Path]]:
    """(manifests, objects), oldest first."""
    directory = logs / EXPERIMENT / "checkpoints"
    manifests = [directory / f"step-{m['step']:08d}.json" for m in verified(directory)]
    return manifests, [directory / m["file"] for m in verified(directory)]


def _break(path: Path) -> int:
    return path.write_bytes(flip(random.Random(path.name), path.read_bytes()))


def _swap(a: Path, b: Path) -> None:
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)


Damage = Callable[[list[Path], list[Path]], object]
FALLS_BACK: dict[str, Damage] = {
    "object flipped": lambda m, o: _break(o[1]),
    "object truncated": lambda m, o: o[1].write_bytes(o[1].read_bytes()[:-1]),
    "object empty": lambda m, o: o[1].write_bytes(b""),
    "object missing": lambda m, o: o[1].unlink(),
    "manifest flipped": lambda m, o: _break(m[1]),
    "manifest truncated": lambda m, o: m[1].write_bytes(m[1].read_bytes()[:100]),
    "manifest missing": lambda m, o: m[1].unlink(),
    "older object in its place": lambda m, o: o[1].write_bytes(o[0].read_bytes()),
}
REFUSED: dict[str, Damage] = {
    "all objects flipped": lambda m, o: [_break(path) for path in o],
    "all manifests flipped": lambda m, o: [_break(path) for path in m],
    "all manifests missing": lambda m, o: any(map(Path.unlink, m)),
    "all objects missing": lambda m, o: any(map(Path.unlink, o)),
    "manifests swapped": lambda m, o: _swap(*m),
    "record cut": lambda m, o: (m[0].parents[1] / "metrics.jsonl").write_bytes(b""),
}


def copied(bench: Bench, logs: Path, name: str) -> Path:
    target = bench.logs("F3", name.replace(" ", "_"))
    shutil.copytree(logs, target, dirs_exist_ok=True)
    return target


def end_to_end(bench: Bench, stopped: Path, name: str) -> list[str]:
    logs = copied(bench, stopped, name)
    FALLS_BACK[name](*_paths(logs))
    child = start(bench, bench.argv(logs))
    problems = [] if child.wait() == 0 else [f"ended with {child.code}: {child.output[-500:]}"]
    # A lost newest manifest is an unfinished save.
    if name != "manifest missing" and "set aside" not in child.output:
        problems.append("said nothing of the damage")
    return problems or differences(logs / EXPERIMENT, bench.reference())


def refusal(bench: Bench, stopped: Path, name: str) -> list[str]:
    """Twice refused with one sentence, and not a byte of the record or a checkpoint changed."""
    logs = copied(bench, stopped, name)
    REFUSED[name](*_paths(logs))
    return _refused(bench, logs)


def _refused(bench: Bench, logs: Path) -> list[str]:
    def kept() -> dict[str, tuple[int, str]]:
        return {
            path: facts
            for path, facts in snapshot(logs / EXPERIMENT).items()
            if path.startswith("checkpoints") or path == "metrics.jsonl"
        }

    before, problems = kept(), []
    for _ in range(2):
        child = start(bench, bench.argv(logs))
        if child.wait() != BAD_INPUT:
            problems.append(f"exit {child.code}, expected 78: {child.output[-300:]}")
        if "Traceback" in child.output:
            problems.append("showed a traceback")
        if not any(word in child.output for word in ("delete", "Restore", "Bring")):
            problems.append(f"named no way out: {child.output[-300:]}")
    if kept() != before:
        problems.append("the refusal changed the run")
    return problems


def foreign_checkpoints(bench: Bench) -> list[str]:
    """Checkpoints of another run, of the same shapes, moved into this one: refused by digest."""
    logs = copied(bench, stopped_run(bench), "foreign")
    other = bench.logs("F3", "foreign-seed1")
    arms = [inject.signalled_at(34, signal.SIGTERM)]
    start(bench, bench.argv(other, extra=("--seed", "1")), arms).wait()
    shutil.rmtree(logs / EXPERIMENT / "checkpoints")
    source = other / f"{EXPERIMENT}-seed1"
    shutil.copytree(source / "checkpoints", logs / EXPERIMENT / "checkpoints")
    shutil.copy(source / "metrics.jsonl", logs / EXPERIMENT / "metrics.jsonl")
    return _refused(bench, logs)


def foreign_config(bench: Bench) -> list[str]:
    """The same run asked for with another learning rate: refused, naming the key."""
    logs = copied(bench, stopped_run(bench), "other_config")
    before = snapshot(logs)
    child = start(bench, bench.argv(logs, extra=("--set", "training.learning_rate=0.001")))
    problems = [] if child.wait() == BAD_INPUT else [f"exit {child.code}, expected 78"]
    if "training.learning_rate: 0.004 -> 0.001" not in child.output:
        problems.append(f"the key is not named: {child.output[-300:]}")
    stored = yaml.safe_load((logs / EXPERIMENT / "config.yaml").read_text())
    if stored["training"]["learning_rate"] != 0.004 or snapshot(logs) != before:
        problems.append("the refusal changed the run")
    return problems
