"""SmallBench as data: the task list, the downloaded rows, and the items made of them.

Imports no torch. `configs/smallbench.yaml` explains the keys of a task.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import jinja2.meta
import jinja2.sandbox

from src.spec.command_line import Refusal
from src.spec.config import SMALLBENCH_TASKS
from src.spec.strict_yaml import known_keys, read_yaml
from src.storage.files import sha256_of

TASKS_FILE = SMALLBENCH_TASKS
BLIMP = "nyu-mll/blimp"
METRICS = ("accuracy", "perplexity")


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One entry of the task list; `configs/smallbench.yaml` explains the keys."""

    name: str
    path: str
    config: str
    split: str
    prompt: str | tuple[str, ...]  # a template, or one for each choice
    choices: tuple[str, ...] | str  # templates of each, or one expression giving a list
    gold: str
    n: int | None = None
    group: str | None = None
    balanced: str | None = None
    keep: str | None = None
    metrics: tuple[str, ...] = ("accuracy",)
    chance: float | None = None
    target_delimiter: str = " "
    only_in_mirror: bool = False
    seed: int = 0

    @property
    def unit(self) -> str:
        """The name under which it enters the mean over tasks."""
        return self.group or self.name

    @property
    def is_blimp(self) -> bool:
        return self.path == BLIMP

    @property
    def is_cloze(self) -> bool:
        """One template in a list (LAMBADA): right where greedy decoding writes it."""
        return len(self.choices) == 1 and not isinstance(self.choices, str)


@dataclass(frozen=True, slots=True)
class Item:
    """One rendered question. `row` is its row in the hub's split."""

    task: str
    row: int
    prompt: str | tuple[str, ...]  # of all choices, or of each
    choices: tuple[str, ...]
    gold: int
    delimiter: str

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Context and continuation of each choice."""
        shared = self.prompt
        prompts = [shared] * len(self.choices) if isinstance(shared, str) else shared
        return [(p, self.delimiter + c) for p, c in zip(prompts, self.choices, strict=True)]


def load_tasks(path: Path) -> list[Task]:
    """Read a task list; ValueError names file, task, key, what was found and what is expected."""
    contents = read_yaml(path, "a list of tasks")
    if not isinstance(contents, dict) or not _is_list(contents.get("tasks"), lambda _: True):
        raise ValueError(f"{path}: tasks: found no list, expected a list of tasks under this key")
    seed = contents.get("seed", 0)
    if not isinstance(seed, int):
        raise ValueError(f"{path}: seed: found {seed!r}, expected a whole number")
    entries = enumerate(contents["tasks"], 1)
    tasks = [_parse_task(f"{path}: task {i}", entry, seed) for i, entry in entries]
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1 or name in {task.group for task in tasks}:
            raise ValueError(f"{path}: found two tasks or a group called {name!r}, expected one")
    return tasks


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_list(value: Any, suits: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and bool(value) and all(map(suits, value))


# What a key may hold, in words and as a test.
_KEYS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "name": ("a file name", lambda v: _is_text(v) and "/" not in v and v[:1] not in ("", ".")),
    **dict.fromkeys(("path", "config", "split"), ("a name", lambda v: _is_text(v) and v != "")),
    **dict.fromkeys(("gold", "target_delimiter"), ("str", _is_text)),
    **dict.fromkeys(("group", "balanced", "keep"), ("str", lambda v: v is None or _is_text(v))),
    "prompt": ("one text, or one for each choice", lambda v: _is_text(v) or _is_list(v, _is_text)),
    "choices": (
        "{field: expression}, or texts",
        lambda v: _is_list(v, _is_text) or (isinstance(v, dict) and [*v] == ["field"]),
    ),
    "metrics": (f"some of {', '.join(METRICS)}", lambda v: _is_list(v, METRICS.__contains__)),
    "n": ("at least 1, or null for all", lambda v: v is None or (type(v) is int and v > 0)),
    "chance": ("a number", lambda v: v is None or type(v) in (int, float)),
    "only_in_mirror": ("true or false", lambda v: isinstance(v, bool)),
}
_REQUIRED = ("name", "path", "config", "split", "prompt", "choices", "gold")


def _parse_task(where: str, entry: Any, seed: int) -> Task:
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: found {entry!r}, expected keys and values")
    fields: dict[str, Any] = dict.fromkeys(_REQUIRED) | entry
    where = f"{where} ({fields['name']})"
    known_keys(f"{where}: ", fields, list(_KEYS))
    for key, value in fields.items():
        expected, suits = _KEYS[key]
        if not suits(value):
            values = value if value and isinstance(value, list) else [value]
            actual = ", ".join(map(repr, values))
            raise ValueError(f"{where}: {key}: found {actual}, expected {expected}")
    prompts, choices = fields["prompt"], fields["choices"]
    if isinstance(choices, dict):
        fields["choices"] = str(choices["field"])
    elif isinstance(prompts, list) and len(prompts) != len(choices):
        raise ValueError(f"{where}: prompt: found {prompts}, expected {_KEYS['prompt'][0]}")
    for key, value in fields.items():
        fields[key] = tuple(value) if isinstance(value, list) else value
    return Task(**fields, seed=seed)


def wikihow(text: str) -> str:
    """HellaSwag's clean-up: WikiHow's markup leaves the text, as in lm-evaluation-harness."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def full_stop(text: str) -> str:
    """MNLI's rule: stripped, and closed by a full stop if it has none."""
    text = text.strip()
    return text if text.endswith(".") else text + "."


class _Renderer:
    """A task's templates, compiled once. Sandboxed: a task list is data, not code."""

    def __init__(self, task: Task) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False
        )
        environment.filters |= {"wikihow": wikihow, "full_stop": full_stop}
        self.task = task
        prompts = [task.prompt] if isinstance(task.prompt, str) else task.prompt
        expression = task.choices if isinstance(task.choices, str) else None
        choices = [f"{{{{ {expression} }}}}"] if expression else task.choices
        keep = task.keep or "True"
        try:
            parsed = map(environment.parse, (*prompts, *choices, task.gold, keep))
            self.fields = set[str]().union(*map(jinja2.meta.find_undeclared_variables, parsed))
            self.prompts = [environment.from_string(text) for text in prompts]
            self.gold, self.keep = environment.from_string(task.gold), environment.from_string(keep)
            self.choices = [environment.from_string(text) for text in choices]
            # undefined_to_none=False: a misspelt field is an error, not no choices
            self.choice_list = expression and environment.compile_expression(expression, False)
        except jinja2.TemplateError as error:
            raise ValueError(f"task {task.name}: a template is not valid Jinja2: {error}") from None

    def kept(self, row: Mapping[str, Any]) -> bool:
        with self._errors_name_row(row):
            return self.keep.render(row).strip() == "True"

    def item(self, row: Mapping[str, Any]) -> Item:
        task = self.task
        with self._errors_name_row(row):
            choices = tuple(self._choices(row))
            gold = int(self.gold.render(row))
            if not 0 <= gold < len(choices):
                raise ValueError(f"gold: found {gold}, expected an index below {len(choices)}")
            prompts = tuple(template.render(row) for template in self.prompts)
            prompt = prompts[0] if isinstance(task.prompt, str) else prompts
            if isinstance(prompt, tuple) and len(prompt) != len(choices):
                raise ValueError(f"prompt: found {len(prompt)} for {len(choices)} choices")
            return Item(task.name, int(row["_row"]), prompt, choices, gold, task.target_delimiter)

    def _choices(self, row: Mapping[str, Any]) -> list[str]:
        if not self.choice_list:
            return [template.render(row) for template in self.choices]
        choices = self.choice_list(**row)
        if not isinstance(choices, list) or not all(map(_is_text, choices)):
            raise ValueError(f"choices: {self.task.choices!r} gives {choices!r}, expected texts")
        # Alone, a choice is right whatever the model says (lm-evaluation-harness 0.4.13 counts
        # it so): every such row would raise the accuracy by itself.
        if len(choices) == 1:
            raise ValueError(
                f"choices: found {choices[0]!r} alone, expected several in every row; leave such "
                "rows out with keep, or ask for what greedy decoding writes with a list of one "
                "template"
            )
        return choices

    @contextlib.contextmanager
    def _errors_name_row(self, row: Mapping[str, Any]) -> Iterator[None]:
        """What goes wrong inside is said with the task, the row and its fields."""
        try:
            yield
        except (jinja2.TemplateError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"task {self.task.name}, row {row['_row']}: {error}; the rows have the fields "
                f"{', '.join(key for key in row if key != '_row')}"
            ) from None


def read_rows(task: Task, data_dir: Path) -> list[dict[str, Any]] | None:
    """The downloaded rows, checked against `source.json`; None where only a mirror has them."""
    facts = held_tasks(data_dir).get(task.name)
    if facts is None and task.only_in_mirror:
        return None
    path = data_dir / f"{task.name}.jsonl"
    if facts is None or not path.is_file():
        raise ValueError(
            f"{path}: found no rows of this task, expected its download; {_hint(data_dir)}"
        )
    for key in ("path", "config", "split"):
        if facts.get(key, getattr(task, key)) != getattr(task, key):
            raise ValueError(
                f"{path}: {key}: found the rows of {facts[key]!r}, expected "
                f"{getattr(task, key)!r} as in the task list; {_hint(data_dir)}"
            )
    check_rows(path, facts["sha256"])
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def held_tasks(data_dir: Path) -> dict[str, dict[str, Any]]:
    """What `source.json` says of each downloaded task; Refusal where it says nothing."""
    source = data_dir / "source.json"
    try:
        tasks = json.loads(source.read_bytes())["tasks"]
        if all(isinstance(facts["sha256"], str) for facts in tasks.values()):
            return tasks
    except (FileNotFoundError, NotADirectoryError, KeyError, TypeError, AttributeError, ValueError):
        pass
    raise Refusal(f"{source}: found no list of downloaded tasks, expected one; {_hint(data_dir)}")


def check_rows(file: Path, sha256: str) -> None:
    """Refusal for rows that are missing or are not those of source.json."""
    if not file.is_file() or sha256_of(file) != sha256:
        raise Refusal(f"{file}: found other bytes than source.json says; {_hint(file.parent)}")


def _hint(data_dir: Path) -> str:
    return f"run python scripts/download_smallbench.py --output {data_dir}"


def needed_fields(task: Task) -> set[str]:
    """The fields of a row that the task's templates name."""
    return _Renderer(task).fields | ({task.balanced} if task.balanced else set())


def select_rows(task: Task, rows: Sequence[dict[str, Any]], n: int | None) -> list[dict[str, Any]]:
    """A fixed choice of n rows (None: all): the same on every machine, nested in n.

    Rows are ordered by the hash of seed, task and row number; with `balanced`, the values of
    that field take turns. Returned in the order of the hub's split.
    """

    def draw(row: Mapping[str, Any]) -> str:
        return hashlib.sha256(f"{task.seed}:{task.name}:{row['_row']}".encode()).hexdigest()

    order = sorted(rows, key=draw)
    if task.balanced is not None:
        if any(task.balanced not in row for row in rows):
            raise ValueError(
                f"task {task.name}: balanced: found rows without the field {task.balanced!r}"
            )
        by_value: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for row in order:
            by_value[str(row[task.balanced])].append(row)
        rounds = zip_longest(*(by_value[value] for value in sorted(by_value)))
        order = [row for values in rounds for row in values if row is not None]
    return sorted(order if n is None else order[:n], key=lambda row: row["_row"])


def load_items(
    task: Task, data_dir: Path, *, limit: int | None = None, full: bool = False
) -> list[Item] | None:
    """The task's items, rendered; None where only a mirror has its rows.

    `limit` caps n; `full` uses every usable row instead. Raises ValueError, with the task, on
    missing or changed data, on fields that a template names and the rows lack, and where the
    stated `chance` is not what the number of choices gives.
    """
    rows = read_rows(task, data_dir)
    if rows is None:
        return None
    render = _Renderer(task)
    n = None if full else task.n
    if limit is not None:
        n = limit if n is None else min(n, limit)
    selected = select_rows(task, [row for row in rows if render.kept(row)], n)
    items = [render.item(row) for row in selected]
    if not items:
        raise ValueError(f"task {task.name}: found no usable row in {data_dir}, expected some")
    if task.chance is not None and abs(task.chance - chance(items)) > 0.02:
        raise ValueError(
            f"task {task.name}: chance: found {task.chance}, expected {chance(items):.4f}, "
            "which is what its numbers of choices give"
        )
    return items


def chance(items: Sequence[Item]) -> float:
    """Expected accuracy of a guess; greedy decoding hits a given word with about none."""
    guesses = [1 / len(item.choices) if len(item.choices) > 1 else 0.0 for item in items]
    return math.fsum(guesses) / len(items)


def fixed_labels(items: Sequence[Item]) -> bool:
    """Whether every item offers the same choices (classification)."""
    return all(item.choices == items[0].choices for item in items)


def items_sha256(items: Iterable[Item]) -> str:
    """Hash of what is asked: rows, prompts, choices and answers."""
    lines = [json.dumps(dataclasses.astuple(item)) for item in items]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
