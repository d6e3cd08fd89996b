"""The fault plan: `python -m tests.faults` (everything), `--quick` (the everyday sample).

Ends in a table of faults injected and survived or detected, written to results/faults/ when all
of it ran; exit 1 if any line is below 100 %.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

from tests.faults import report
from tests.faults.bench import EXPERIMENT, ROOT, Bench, Tally, say
from tests.faults.inject import noise
from tests.faults.processes import finish, preload

FAMILIES = {
    "F1": "kill",
    "F2": "signals",
    "F3": "damage",
    "F4": "disk",
    "F5": "locks",
    "F6": "preprocess",
    "F7": "store",
    "F8": "inputs",
    "F9": "odd",
    "teeth": "mutants",
}
LONGEST = ("F1", "F2", "F7")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--quick", action="store_true", help="a sample of each family")
    parser.add_argument("--share", type=float, default=1.0, help="of the plan's counts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="families at the same time")
    parser.add_argument("--json", type=Path, help="write the lines of the table here")
    parser.add_argument(
        "--results", type=Path, help="write the table here (the whole plan: results/faults)"
    )
    parser.add_argument("--work", type=Path, help="scratch directory, kept (default: a temporary)")
    arguments = parser.parse_args()
    work = arguments.work or Path(tempfile.mkdtemp(prefix="faults-"))
    work.mkdir(parents=True, exist_ok=True)
    begun = time.time()
    try:
        # Where the load of other processes is unknown, seconds are printed and not judged.
        bench = Bench(
            work.resolve(),
            arguments.seed,
            arguments.quick,
            timed=not arguments.quick,
            share=arguments.share,
        )
        lines = everything(bench, arguments.only, arguments.jobs)
    finally:
        if arguments.work is None:
            shutil.rmtree(work, ignore_errors=True)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(line) for line in lines], indent=2) + "\n")
    table = report.markdown(lines, arguments.seed, begun, arguments.quick)
    whole = not arguments.quick and arguments.only == list(FAMILIES) and arguments.share == 1
    if whole or arguments.results:
        report.write(arguments.results or ROOT / "results" / "faults", lines, table)
    print(table)
    for line in lines:
        for problem in line.problems:
            print(f"{line.fault} {line.what}: {problem}")
    return 0 if lines and all(line.passed for line in lines) else 1


def everything(bench: Bench, families: list[str], jobs: int) -> list[Tally]:
    """Each family in a process of its own, which has imported everything and computed nothing."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(bench.work / "inductor")
    preload()
    bench.build()
    _, status = os.waitpid(_fork(partial(make_references, bench, families)), 0)
    if status:
        raise SystemExit("references failed")
    waiting = sorted(families, key=lambda name: name not in LONGEST)  # those first
    running: dict[int, str] = {}
    failed: list[str] = []
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            say(f"{name} begins")
            running[_fork(partial(run_family, bench, name))] = name
        pid, status = os.waitpid(-1, 0)
        name = running.pop(pid)
        if status:
            failed.append(name)
    lines = []
    for name in families:
        if name not in failed:
            stored = json.loads((bench.work / f"{name}.json").read_text())
            lines += [Tally(**line) for line in stored]
        else:
            lines.append(Tally(name, "the family itself failed", 1, 0, problems=["see above"]))
    return lines


def make_references(bench: Bench, families: list[str]) -> None:
    """The uninterrupted runs that all others are compared with."""
    warm()
    variants = ["plain", "noise"]
    if not bench.quick and "F1" in families:
        variants += ["bf16"] + ["compile"] * bool(shutil.which("g++"))
    for variant in variants:
        logs = bench.work / "reference" / variant
        if not (logs / EXPERIMENT / "metrics.json").exists():
            logs.mkdir(parents=True, exist_ok=True)
            arms = [noise] if variant == "noise" else []
            fresh = variant == "compile"
            problems = finish(bench, bench.argv(logs, variant), arms, fresh=fresh)
            assert not problems, problems


def run_family(bench: Bench, name: str) -> None:
    """Leaves the family's lines of the table in `<name>.json`."""
    family = importlib.import_module(f"tests.faults.{FAMILIES[name]}")
    if name != "teeth":  # whose processes import mutated copies
        warm()
    lines = family.run(bench)
    (bench.work / f"{name}.json").write_text(json.dumps([asdict(line) for line in lines]))


def _fork(action: Callable[[], None]) -> int:
    """Call `action` in a fork, so that this process stays free of the code under test; its pid."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return pid


def warm() -> None:
    """Import the code under test, so that the forks of this process need not."""
    import run_experiment
    import src.evaluation.evaluate
    import src.models.export
    import src.storage.remote
    import src.train

    assert run_experiment and src


if __name__ == "__main__":
    sys.exit(main())
