"""Downloads SmallBench: the raw rows of every task that the task list names.

    python scripts/download_smallbench.py --output data/smallbench

Writes <task>.jsonl, a row of the hub's split a line with its number as `_row`, and source.json
last. A task added to the list is all that a second call downloads; one that left it goes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from src.data.corpus import corpus_parser, write_rows, writing_to
from src.data.hub import MIRROR_HELP, find_mirror, load, source_name
from src.data.parquet import Split, is_plain
from src.data.tasks import TASKS_FILE, Task, load_tasks, needed_fields
from src.spec.command_line import Refusal
from src.spec.progress import say, track
from src.storage.files import publish, read_json, scratch_directory, sha256_of, write_json


def main() -> None:
    parser = corpus_parser(__doc__)
    tasks_help = "task list (default: the repository's)"
    parser.add_argument("--tasks", type=Path, default=TASKS_FILE, help=tasks_help)
    parser.add_argument("--mirror", help=MIRROR_HELP)
    args = parser.parse_args()
    try:
        tasks = load_tasks(args.tasks)
        for task in tasks:
            needed_fields(task)  # templates that are none are refused before the download
    except ValueError as error:
        raise Refusal(str(error)) from None
    mirror = find_mirror(args.mirror)
    left_out = [task.name for task in tasks if task.only_in_mirror and mirror is None]
    if left_out:
        print(f"left out, because the hub does not have them: {', '.join(left_out)}")
    tasks = [task for task in tasks if task.name not in left_out]
    output: Path = args.output
    with writing_to(output):
        stored = {} if args.force else read_stored(output, mirror is not None)
        missing = [task for task in tasks if not is_whole(output, task, stored.get(task.name, {}))]
        removed = stored.keys() - {task.name for task in tasks}
        if missing or removed:
            kept = {name: facts for name, facts in stored.items() if name not in removed}
            download(missing, kept, mirror, output)
        else:
            print(f"{output}: holds the {len(tasks)} tasks, whole and verified; nothing to do")
        for name in removed:
            (output / f"{name}.jsonl").unlink(missing_ok=True)


def read_stored(output: Path, mirrored: bool) -> dict[str, dict[str, Any]]:
    """What `output` says of the tasks that it holds; Refusal where it holds something else."""
    try:
        source = read_json(output / "source.json")
    except FileNotFoundError:
        return {}
    if not isinstance(source.get("tasks"), dict):
        raise Refusal(
            f"{output}: holds something else than SmallBench; choose another --output, or --force"
        )
    # Rows of a mirror and of the hub may differ: one directory never mixes them.
    return source["tasks"] if source.get("mirror") is mirrored else {}


def is_whole(output: Path, task: Task, facts: Mapping[str, Any]) -> bool:
    """Whether the rows are there: same source as in the list, and the recorded bytes."""
    file = output / f"{task.name}.jsonl"
    same_source = all(facts.get(key) == getattr(task, key) for key in ("path", "config", "split"))
    return same_source and file.is_file() and sha256_of(file) == facts.get("sha256")


def download(
    missing: Sequence[Task], kept: Mapping[str, Any], mirror: Path | None, output: Path
) -> None:
    """Load the missing tasks and publish them beside the others, source.json last."""
    print(f"{len(missing)} tasks from {source_name(mirror)}", flush=True)
    facts = dict(kept)
    with scratch_directory(output / ".partial") as partial:
        (partial / "files").mkdir()
        for task in track(missing, str(output), "tasks"):
            loaded, origin = load(task.path, task.config, [task.split], mirror, partial / "cache")
            facts[task.name] = {
                **{"path": task.path, "config": task.config, "split": task.split},
                **write_task(task, loaded[task.split], partial / "files" / f"{task.name}.jsonl"),
                **{key: origin[key] for key in ("revision", "licence")},
            }
        source = {"tasks": dict(sorted(facts.items())), "mirror": mirror is not None}
        write_json(partial / "files" / "source.json", source)
        publish(partial / "files", output, "source.json")
    print(f"{output}: {len(facts)} tasks, {sum(task['rows'] for task in facts.values()):,} rows")


def write_task(task: Task, split: Split, file: Path) -> dict[str, Any]:
    """Write one task's rows as they are, numbered; their number and hash."""
    needed = needed_fields(task)
    names = split.columns()
    columns = [name for name in names if name in needed or split.holds(name, is_plain)]
    if left_out := sorted({*names} - {*columns}):
        say(task.name, f"without {', '.join(left_out)}, which no template reads")
    rows = split.rows(columns, is_plain, "texts, numbers, or lists or structs of them")
    return write_rows(file, ({"_row": number, **row} for number, row in enumerate(rows)))
