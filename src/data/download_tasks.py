"""Downloads SmallBench: the raw rows of every task that the task list names.

    python scripts/download_smallbench.py --output data/smallbench

Writes <task>.jsonl, a row of the hub's split a line with its number as `_row`, and source.json
last. A task added to the list is all that a second call downloads.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from src.data.hub import MIRROR_HELP, Loaded, find_mirror, load
from src.spec.progress import track
from src.storage.files import (
    Parser,
    Refusal,
    locked,
    make_directory,
    publish,
    read_json,
    sha256_of,
    workshop,
    write_json,
)

TASKS_FILE = Path(__file__).resolve().parents[2] / "configs" / "smallbench.yaml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What the task list says about one task's rows."""

    name: str
    path: str
    config: str
    split: str
    only_in_mirror: bool


def main() -> None:
    parser = Parser(
        __doc__.partition("\n")[0],
        example="python scripts/download_smallbench.py --output data/smallbench",
    )
    parser.add_argument("--output", type=Path, required=True, help="the directory to make")
    parser.add_argument(
        "--tasks", type=Path, default=TASKS_FILE, help="task list (default: the repository's)"
    )
    parser.add_argument("--mirror", help=MIRROR_HELP)
    parser.add_argument("--force", action="store_true", help="download everything again")
    arguments = parser.parse_args()
    tasks = read_tasks(arguments.tasks)
    mirror = find_mirror(arguments.mirror)
    left_out = [task.name for task in tasks if task.only_in_mirror and mirror is None]
    if left_out:
        print(f"left out, because the hub does not have them: {', '.join(left_out)}")
    tasks = [task for task in tasks if task.name not in left_out]
    output: Path = arguments.output
    make_directory(output)
    with locked(output / ".lock"):
        held = read_held(output, mirror is not None, force=arguments.force)
        kept = {} if arguments.force else whole_tasks(output, held, tasks)
        missing = [task for task in tasks if task.name not in kept]
        if not missing and kept.keys() == held.keys():
            print(f"{output}: holds the {len(kept)} tasks, whole and verified; nothing to do")
            return
        download(missing, kept, mirror, output)
        for name in held.keys() - kept.keys() - {task.name for task in tasks}:
            (output / f"{name}.jsonl").unlink(missing_ok=True)


def read_tasks(file: Path) -> list[Wanted]:
    """Names and sources of the listed tasks; other keys are the evaluation's business."""
    try:
        listed = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Refusal(f"{file}: found no such file, expected a list of tasks") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise Refusal(f"{file}: found no valid YAML: {' '.join(str(error).split())}") from None
    entries = listed.get("tasks") if isinstance(listed, dict) else None
    if not isinstance(entries, list) or not entries:
        raise Refusal(f"{file}: tasks: found no list of tasks, expected at least one")
    tasks = [wanted(f"{file}: task {i}", entry) for i, entry in enumerate(entries, 1)]
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise Refusal(f"{file}: found two tasks called {name!r}, expected different names")
    return tasks


def wanted(where: str, entry: Any) -> Wanted:
    """One entry of the task list; Refusal names the key."""
    if not isinstance(entry, dict):
        raise Refusal(f"{where}: found {entry!r}, expected keys and values")
    texts = {}
    for key in ("name", "path", "config", "split"):
        value = entry.get(key)
        if not isinstance(value, str) or not value:
            raise Refusal(f"{where}: {key}: found {value!r}, expected a text")
        texts[key] = value
    if os.sep in texts["name"] or texts["name"].startswith("."):
        raise Refusal(f"{where}: name: found {texts['name']!r}, expected a plain file name")
    return Wanted(only_in_mirror=entry.get("only_in_mirror") is True, **texts)


def read_held(output: Path, mirrored: bool, *, force: bool) -> dict[str, Any]:
    """The tasks that `output` says it holds; Refusal where it holds something else."""
    try:
        source = read_json(output / "source.json")
    except FileNotFoundError:
        return {}
    tasks = source.get("tasks") if isinstance(source, dict) else None
    if not isinstance(tasks, dict):
        if force:
            return {}
        raise Refusal(
            f"{output}: holds something else than SmallBench; choose another --output, or --force"
        )
    # Rows of a mirror and of the hub may differ: one directory never mixes them.
    return tasks if source.get("mirror") is mirrored else {}


def whole_tasks(
    output: Path, held: Mapping[str, Any], tasks: Sequence[Wanted]
) -> dict[str, dict[str, Any]]:
    """What need not be downloaded again: same source as in the list, and the recorded bytes."""
    kept = {}
    for task in tasks:
        facts = held.get(task.name, {})
        same = all(facts.get(key) == getattr(task, key) for key in ("path", "config", "split"))
        file = output / f"{task.name}.jsonl"
        if same and file.is_file() and sha256_of(file) == facts.get("sha256"):
            kept[task.name] = facts
    return kept


def download(
    missing: Sequence[Wanted], kept: Mapping[str, Any], mirror: Path | None, output: Path
) -> None:
    """Load the missing tasks and publish them, source.json last."""
    print(f"{len(missing)} tasks from {f'the mirror {mirror}' if mirror else 'the hub'}")
    facts = dict(kept)
    with workshop(output / ".partial") as partial:
        (partial / "files").mkdir()
        for task in track(missing, str(output), "tasks"):
            loaded = load(task.path, task.config, (task.split,), mirror, partial / "cache")
            facts[task.name] = write_rows(task, loaded, partial / "files" / f"{task.name}.jsonl")
        source = {"tasks": dict(sorted(facts.items())), "mirror": mirror is not None}
        write_json(partial / "files" / "source.json", source)
        publish(partial / "files", output, "source.json")
    print(f"{output}: {len(facts)} tasks, {sum(task['rows'] for task in facts.values()):,} rows")


def write_rows(task: Wanted, loaded: Loaded, file: Path) -> dict[str, Any]:
    """Write one task's rows as they are, numbered; return what source.json says of them."""
    rows = loaded.splits[task.split]
    with file.open("w", encoding="utf-8", newline="\n") as out:
        for number, row in enumerate(rows):
            try:
                out.write(json.dumps({"_row": number, **row}, ensure_ascii=False) + "\n")
            except TypeError as error:
                raise Refusal(
                    f"task {task.name}: row {number} of {task.path} holds more than text, "
                    f"numbers and lists of them ({error}); SmallBench cannot use it"
                ) from None
    return {
        "path": task.path,
        "config": task.config,
        "split": task.split,
        "rows": len(rows),
        "sha256": sha256_of(file),
        "revision": loaded.revision,
        "licence": loaded.licence,
    }
