"""F1: kill -9 at named and at random instants; the resumed run is the uninterrupted one."""

from __future__ import annotations

import random
from pathlib import Path

from tests.faults import inject
from tests.faults.bench import EXPERIMENT, Bench, Tally, broken_promises, differences, tally
from tests.faults.processes import finish, pause, start, start_fresh

QUICK_POINTS = (
    ("half a row", 3, "noise"),
    ("object half written", 1, "plain"),
)


def run(bench: Bench) -> list[Tally]:
    tallies: list[Tally] = []
    with tally(tallies, "F1", "kill -9 at 12 named points x 3 saves") as line:
        for point, save, variant in QUICK_POINTS if bench.quick else named_plan():
            line.add(named(bench, point, save, variant), trial=f"{point}, save {save}, {variant}")
    with tally(tallies, "F1", "kill -9 at random times, chained 1-5 per run") as line:
        shares = {"noise": bench.count(60, 1), "bf16": bench.count(26, 0)}
        for variant, kills in shares.items():
            random_times(bench, line, variant, kills, fresh=False)
        random_times(bench, line, "plain", bench.count(10, 0), fresh=True)
        if has_reference(bench, "compile"):
            random_times(bench, line, "compile", 4, fresh=True)
    with tally(tallies, "F1", "order of fsync and rename in a whole run") as line:
        line.add(durable(bench))
    return tallies


def named_plan() -> list[tuple[str, int, str]]:
    """12 points x 3 saves; every third with bf16, the others with a loss that draws noise."""
    pairs = [(point, save) for point in inject.POINTS for save in inject.SAVES]
    return [(*pair, "bf16" if i % 3 == 2 else "noise") for i, pair in enumerate(pairs)]


def has_reference(bench: Bench, variant: str) -> bool:
    return (bench.work / "reference" / variant / EXPERIMENT / "metrics.json").is_file()


def arms_of(variant: str) -> list[inject.Arm]:
    return [inject.noise] if variant == "noise" else []


def named(bench: Bench, point: str, save: int, variant: str) -> list[str]:
    """One kill at a named instant, then to the end."""
    logs = bench.logs("F1", f"{point}-{save}-{variant}".replace(" ", "_").replace(",", ""))
    argv = bench.argv(logs, variant)
    arms = arms_of(variant)
    code = start(bench, argv, [*arms, inject.POINTS[point](save)]).wait()
    if code != -9:
        return [f"was to be killed and ended with {code}"]
    problems = broken_promises(logs / EXPERIMENT) + finish(bench, argv, arms)
    return problems or differences(logs / EXPERIMENT, bench.reference(variant))


def random_times(bench: Bench, line: Tally, variant: str, kills: int, fresh: bool) -> None:
    """`kills` kills in chains of one to five, each chain one run that ends bitwise equal."""
    draw = bench.draw("F1", variant, fresh)
    number = 0
    longest = 1.2 * bench.reference_seconds(variant) if kills else 0.0
    while kills > 0:
        number += 1
        wanted = min(kills, draw.randint(1, 5))
        logs = bench.logs("F1", f"random-{variant}-{'fresh-' if fresh else ''}{number}")
        landed, problems = chain(bench, logs, variant, wanted, longest, draw, fresh)
        if landed == 0:  # the reference paid for compiling, or for a busier machine
            longest *= 0.7
        line.add(problems, count=landed, trial=f"{logs.name}, {landed} kills")
        kills -= landed


def chain(
    bench: Bench,
    logs: Path,
    variant: str,
    wanted: int,
    longest: float,
    draw: random.Random,
    fresh: bool,
) -> tuple[int, list[str]]:
    """(kills that landed before the run ended, problems)."""
    argv, arms = bench.argv(logs, variant), arms_of(variant)
    landed, problems = 0, []
    for _ in range(wanted):
        child = start_fresh(bench, argv) if fresh else start(bench, argv, arms)
        if draw.random() < 0.75:
            child.until(lambda: has_begun(logs))
        pause(draw, longest, child)
        if child.kill() != -9:
            break
        landed += 1
        problems += broken_promises(logs / EXPERIMENT)
    problems += finish(bench, argv, arms, fresh)
    return landed, problems or differences(logs / EXPERIMENT, bench.reference(variant))


def has_begun(logs: Path) -> bool:
    """Whether the run has a checkpoint."""
    return any((logs / EXPERIMENT / "checkpoints").glob("step-*.json"))


def durable(bench: Bench) -> list[str]:
    """A power cut cannot be had here; the order that survives one can: the file before its
    rename, its directory after, the record before the checkpoint that counts its bytes."""
    logs = bench.logs("F1", "durable")
    log = logs.with_name("durable.events")
    log.unlink(missing_ok=True)
    problems = finish(bench, bench.argv(logs), [inject.durability(log)])
    synced: set[str] = set()
    waiting: dict[str, str] = {}  # directory -> file renamed into it and not yet durable
    renamed = 0
    for event in log.read_text().splitlines() if log.exists() else []:
        kind, *paths = event.split()
        if kind == "fsync":
            synced.add(paths[0])
            waiting.pop(paths[0], None)
            continue
        source, target = paths
        renamed += 1
        record = str(logs / EXPERIMENT / "metrics.jsonl")
        if source not in synced:
            problems.append(f"{Path(target).name} was renamed before its bytes were durable")
        if target.endswith(".pt") and record not in synced:
            problems.append(f"{Path(target).name} was saved before the record was durable")
        directory = str(Path(target).parent)
        if directory in waiting:
            problems.append(f"{waiting[directory]} was not durable when the next file came")
        waiting[directory] = Path(target).name
        if target.endswith(".pt"):
            synced.discard(record)
    problems += [f"{name} was never made durable" for name in waiting.values()]
    return problems + ([] if renamed > 10 else [f"only {renamed} renames were seen"])
