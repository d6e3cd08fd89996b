"""Teeth: each promise is broken in a copy of our own code, and a check of the plan must notice.

A mutant that no check notices is a check that is missing.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from tests.faults.bench import ROOT, Bench, Tally, say, tally

Check = Callable[[Bench], list[str]]


@dataclass(frozen=True)
class Mutant:
    """`old` -> `new` in `file`, each pair once; `check` must report problems."""

    name: str
    file: str
    edits: tuple[tuple[str, str], ...]
    check: str
    quick: bool = False


MUTANTS = (
    Mutant(
        "files are written in place, not renamed", "src/storage/files.py",
        ((
            "        _write_new(temporary, data)\n        os.replace(temporary, path)\n",
            "        path.unlink(missing_ok=True)\n        _write_new(path, data)\n",
        ),),
        "F1 first manifest half written",
    ),
    Mutant(
        "nothing is fsynced", "src/storage/files.py",
        (("        write_all(descriptor, data)\n        os.fsync(descriptor)\n",
          "        write_all(descriptor, data)\n"),),
        "F1 order of fsync and rename",
    ),
    Mutant(
        "the metrics are not durable before a checkpoint", "src/train.py",
        (("        self.directory.sync()\n", ""),),
        "F1 order of fsync and rename",
    ),
    Mutant(
        "no hash", "src/storage/checkpoint.py",
        (('    if hashlib.sha256(data).hexdigest() != manifest["sha256"]:', "    if False:"),),
        "F3 flipped bits",
    ),
    Mutant(
        "a manifest's own hash is not checked", "src/storage/checkpoint.py",
        (("if not isinstance(manifest, dict) or manifest_bytes(manifest) != raw:",
          "if not isinstance(manifest, dict):"),),
        "F3 flipped bits",
    ),
    Mutant(
        "generators are not restored", "src/training_step.py",
        (('        checkpoint.restore_rng(state["rng"])\n', ""),),
        "F1 between a step and its row", quick=True,
    ),
    Mutant(
        "the optimizer is not restored", "src/training_step.py",
        (('        self.optimizer.load_state_dict(state["optimizer"])\n', ""),),
        "F1 between a step and its row",
    ),
    Mutant(
        "the data cursor is not restored", "src/train.py",
        (("self.windows.batch(self.step)", "self.windows.batch(next(CURSOR))"),
         ("LARGEST_LOSS = 700.0", "LARGEST_LOSS = 700.0\nCURSOR = iter(range(10**9))")),
        "F1 between a step and its row",
    ),
    Mutant(
        "the metrics are not cut back", "src/train.py",
        (('        self.directory.truncate(state["metrics_offset"])\n', ""),),
        "F1 between a step and its row",
    ),
    Mutant(
        "a torn line is not cut", "src/storage/run_dir.py",
        (("            os.ftruncate(self._metrics, end)\n\n", "            pass\n\n"),
         ("        os.ftruncate(self._metrics, offset)\n", "        pass\n")),
        "F1 half a row",
    ),
    Mutant(
        "a bare except starts over", "src/storage/checkpoint.py",
        (("    raise NoValidCheckpoint(\n", "    return None\n    raise NoValidCheckpoint(\n"),),
        "F3 nothing left to trust",
    ),
    Mutant(
        "the manifest is written first", "src/storage/checkpoint.py",
        (("        write_atomic(object_path, data)\n        write_atomic(manifest_path, raw",
          "        write_atomic(manifest_path, raw_manifest)\n"
          "        write_atomic(object_path, data"),
         ("object_path, data_manifest)", "object_path, data)")),
        "F1 object half written",
    ),
    Mutant(
        "pruned before the save has succeeded", "src/storage/checkpoint.py",
        (("    try:\n        write_atomic(object_path, data)",
          "    _prune(directory, keep - 1)\n    try:\n        write_atomic(object_path, data)"),),
        "F1 object half written",
    ),
    Mutant(
        "digests are ignored", "src/storage/checkpoint.py",
        (("        if stored.get(name) != current.get(name):", "        if False:"),),
        "F9 checkpoints of another run",
    ),
    Mutant(
        "another config is accepted", "src/storage/run_config.py",
        (("    if digest not in digests:", "    if False:"),),
        "F9 another config",
    ),
    Mutant(
        "weights_only is off", "src/storage/checkpoint.py",
        (("weights_only=True", "weights_only=False"),),
        "F9 malicious pickle",
    ),
    Mutant(
        "the newest by the clock is loaded", "src/storage/checkpoint.py",
        (("    return [path for _, path in sorted(steps, reverse=True)]",
          "    return sorted((p for _, p in steps), key=lambda p: -p.stat().st_mtime)"),),
        "F9 clock set back",
    ),
    Mutant(
        "a resumed run computes as this host chooses", "src/train.py",
        (('        self._compute_as(state["machine"])\n', ""),),
        "F9 another host",
    ),
    Mutant(
        "the signal's handler exits at once", "src/storage/run_dir.py",
        (("        self.requested = True\n", "        os._exit(75)\n"),),
        "F2 a signal at a step", quick=True,
    ),
    Mutant(
        "INT is left as the shell set it", "src/storage/run_dir.py",
        (("SIGNALS = (signal.SIGTERM, signal.SIGINT, ", "SIGNALS = (signal.SIGTERM, "),),
        "F2 INT in the background",
    ),
    Mutant(
        "a signal in the last save is forgotten", "src/train.py",
        (('    if stop.requested and status == "trained":', "    if False:"),),
        "F2 in the last save",
    ),
    Mutant(
        "no lock", "src/storage/run_dir.py",
        (("        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)\n", "        pass\n"),),
        "F5 two at once",
    ),
    Mutant(
        "NaN is trained on", "src/training_step.py",
        (("        if not math.isfinite(loss) or not (math.isfinite(norm) or tolerated):",
          "        if False:"),),
        "F9 NaN",
    ),
    Mutant(
        "a full disk is not an error", "src/storage/files.py",
        (("    except OSError as error:\n        with contextlib.suppress(OSError):\n"
          "            temporary.unlink()\n",
          "    except OSError as error:\n        return\n"),),
        "F4 full for one object, then room again",
    ),
    Mutant(
        "preprocessing without a lock", "src/storage/files.py",
        (("fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass"),),
        "F6 seven at once",
    ),
    Mutant(
        "the store's manifest goes first", "src/storage/remote.py",
        (("        self._store.put(object_key, data)\n", ""),
         ("        self._prune()\n\n    def _prune",
          "        self._store.put(object_key, data)\n        self._prune()\n\n    def _prune")),
        "F7 killed before each write",
    ),
)  # fmt: skip


def checks() -> dict[str, Check]:
    """The plan's checks, by the names that mutants refer to."""
    from tests.faults import damage, disk, kill, locks, odd, preprocess, signals, store

    def point(name: str, save: int, variant: str = "noise") -> Check:
        return lambda bench: kill.named(bench, name, save, variant)

    def flips(bench: Bench) -> list[str]:
        trials = damage.module_level(bench, damage.stopped_run(bench), 40, damage.flip)
        return [problem for problems in trials for problem in problems]

    def refused(bench: Bench) -> list[str]:
        return damage.refusal(bench, damage.stopped_run(bench), "all objects flipped")

    def seven(bench: Bench) -> list[str]:
        preprocess.alone(bench)
        return preprocess.one_round(bench, 1)[0]

    def uploading(bench: Bench) -> list[str]:
        os.environ |= store.SETTINGS
        with store.server(bench) as port:
            writes = range(1, 1 + 2 * store.WRITES)
            return [problem for n in writes for problem in store.killed_before(bench, port, n)]

    return {
        "F1 first manifest half written": point("manifest half written", 1),
        "F1 order of fsync and rename": kill.durable,
        "F1 between a step and its row": point("between a step and its row", 3),
        "F1 half a row": point("half a row", 3),
        "F1 object half written": point("object half written", 3),
        "F2 a signal at a step": lambda bench: signals.at_a_step(bench, signal.SIGTERM, 34),
        "F2 INT in the background": lambda bench: signals.at_a_step(bench, signal.SIGINT, 34),
        "F2 in the last save": signals.in_the_last_save,
        "F3 flipped bits": flips,
        "F3 nothing left to trust": refused,
        "F4 full for one object, then room again": lambda bench: disk.refused_write(
            bench, "one object", disk.WRITES["an object"][0], 2, lasting=False
        ),
        "F5 two at once": lambda bench: locks.pair(bench, 0)[0],
        "F6 seven at once": seven,
        "F7 killed before each write": uploading,
        "F9 checkpoints of another run": damage.foreign_checkpoints,
        "F9 another config": damage.foreign_config,
        "F9 malicious pickle": lambda bench: odd.malicious(bench, "torch"),
        "F9 clock set back": lambda bench: odd.clock_set_back(bench, 34),
        "F9 another host": odd.another_host,
        "F9 NaN": lambda bench: odd.not_a_number(bench, 25),
    }


def run(bench: Bench) -> list[Tally]:
    tallies: list[Tally] = []
    chosen = [mutant for mutant in MUTANTS if mutant.quick or not bench.quick]
    with tally(tallies, "teeth", f"{len(chosen)} mutants of our own code, each caught") as line:
        for mutant in chosen:
            begun = time.monotonic()
            problems, caught = bite(bench, mutant)
            line.add(problems, trial=mutant.name)
            if not problems:
                line.notes.append(f"{mutant.name} ({mutant.file}): caught by {mutant.check}")
                seconds = time.monotonic() - begun
                say(f"{mutant.name}: {seconds:.0f} s, {mutant.check}: {caught[:200]!r}")
    if bench.quick:
        return tallies
    names = sorted({mutant.check for mutant in MUTANTS})
    with tally(tallies, "teeth", "the same checks, code as it is: silent") as line:
        for name in names:
            problems = examined(bench, ROOT, name)
            line.add([problems] if problems else [], trial=name)
    return tallies


def mutated(mutant: Mutant) -> str:
    """The text of the mutant's file with its edits; ValueError where the code has changed."""
    text = (ROOT / mutant.file).read_text(encoding="utf-8")
    for old, new in mutant.edits:
        if text.count(old) != 1:
            raise ValueError(f"the code has changed: {old!r} is there {text.count(old)} times")
        text = text.replace(old, new)
    return text


def bite(bench: Bench, mutant: Mutant) -> tuple[list[str], str]:
    """(problems of the teeth: a mutant that cannot be made or is not caught, what was caught)."""
    try:
        text = mutated(mutant)
    except ValueError as error:
        return [str(error)], ""
    copy = bench.work / "mutants" / mutant.name.replace(" ", "_").replace("'", "")
    shutil.rmtree(copy, ignore_errors=True)
    for name in ("src", "scripts", "configs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    shutil.copy(ROOT / "run_experiment.py", copy)
    (copy / mutant.file).write_text(text, encoding="utf-8")
    caught = examined(bench, copy, mutant.check)
    if caught.startswith("Traceback"):
        return [f"{mutant.check} itself failed: {caught}"], caught
    return ([] if caught else [f"not caught by {mutant.check}"]), caught


def examined(bench: Bench, code: Path, check: str) -> str:
    """What `check` reports of the code in `code`, examined in a fork that imports it."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        try:
            sys.path.insert(0, str(code))
            os.chdir(code)
            from tests.faults.__main__ import warm

            assert "src" not in sys.modules
            warm()
            place = bench.work / "mutants" / f"{code.name}-{check}".replace(" ", "_")
            place.mkdir(parents=True, exist_ok=True)
            for name in ("reference", "tokens", "corpus", "faults.yaml"):
                (place / name).unlink(missing_ok=True)
                (place / name).symlink_to(bench.work / name)
            problems = checks()[check](replace(bench, work=place, code=code))
        except BaseException:
            problems = [traceback.format_exc()]
        os.write(write, "; ".join(problems).encode()[:4000])
        os._exit(0)
    os.close(write)
    chunks = []
    while chunk := os.read(read, 4096):
        chunks.append(chunk)
    os.close(read)
    os.waitpid(pid, 0)
    return b"".join(chunks).decode(errors="replace")
