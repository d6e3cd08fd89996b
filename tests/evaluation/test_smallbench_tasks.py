"""SmallBench's list is data: what its templates become, which rows are taken, what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from src.data import tasks as smallbench
from src.data.tasks import TASKS_FILE, load_items, load_tasks, select_rows
from tests.evaluation import make_task, toy_rows, write_rows

# One row of every dataset in the shipped list, with the prompt and choices it must become.
# fmt: off
ROWS: dict[str, tuple[dict[str, Any], str, list[str], int]] = {
    "blimp_adjunct_island": (
        {"sentence_good": "Who left?", "sentence_bad": "Who left left?", "UID": "x"},
        "", ["Who left?", "Who left left?"], 0),
    "ag_news": (
        {"text": "Oil rises.", "label": 2},
        "Oil rises.\nQuestion: Is this about world, sports, business or technology?\nAnswer:",
        ["world", "sports", "business", "technology"], 2),
    "sst2": (
        {"sentence": "it 's charming . ", "label": 1, "idx": 0},
        "it 's charming . \nQuestion: Is this sentence positive or negative?\nAnswer:",
        ["negative", "positive"], 1),
    "trec": (
        {"text": "Who ?", "coarse_label": 3, "fine_label": 1},
        "Who ?\nQuestion: Does this ask for an abbreviation, a thing, a description, a person, "
        "a place or a number?\nAnswer:",
        ["abbreviation", "thing", "description", "person", "place", "number"], 3),
    "subj": (
        {"text": "a plot .", "label": 0, "label_text": "objective"},
        "a plot .\nQuestion: Is this sentence objective or subjective?\nAnswer:",
        ["objective", "subjective"], 0),
    "snli": (
        {"premise": "A man runs.", "hypothesis": " A man moves", "label": 0},
        "A man runs.\nQuestion: A man moves. True, False or Neither?\nAnswer:",
        ["True", "Neither", "False"], 0),
    "rte": (
        {"sentence1": "It rains.", "sentence2": "It is wet.", "label": 1, "idx": 0},
        "It rains.\nQuestion: It is wet. True or False?\nAnswer:", ["True", "False"], 1),
    "arc_easy": (
        {"question": "What melts?", "answerKey": "3",
         "choices": {"text": ["ice", "iron", "air", "fire"], "label": ["1", "2", "3", "4"]}},
        "Question: What melts?\nAnswer:", ["ice", "iron", "air", "fire"], 2),
    "sciq": (
        {"question": "Who?", "distractor1": "a", "distractor2": "b", "distractor3": "c",
         "correct_answer": "d", "support": "\nSome text."},
        "Some text.\nQuestion: Who?\nAnswer:", ["a", "b", "c", "d"], 3),
    "piqa": (
        {"goal": "To cut", "sol1": "use a knife", "sol2": "use a pen", "label": 0},
        "Question: To cut\nAnswer:", ["use a knife", "use a pen"], 0),
    "hellaswag": (
        {"activity_label": "Cooking", "ctx_a": "How to boil [title] Water  [substeps] hot",
         "ctx_b": "the COOK", "endings": ["stirs [step] it.", "sings.", "flies.", "eats."],
         "label": "1"},
        "Cooking: How to boil. Water  hot The cook",
        ["stirs it.", "sings.", "flies.", "eats."], 1),
    "lambada": (
        {"text": "the long road went on and\non to Rome"},
        "the long road went on and\non to", ["Rome"], 0),
}
# fmt: on


def test_shipped_list_renders_every_kind_of_row(tmp_path: Path) -> None:
    tasks = {task.name: task for task in load_tasks(TASKS_FILE)}
    blimp = [task for task in tasks.values() if task.path == "nyu-mll/blimp"]
    assert len(blimp) == 67 and len({task.group for task in blimp}) == 4
    assert {task.unit for task in tasks.values()} - set(ROWS) == {task.group for task in blimp}
    for name, (row, prompt, choices, gold) in ROWS.items():
        write_rows(tmp_path, name, [{**row, "_row": 7}])
        (item,) = load_items(tasks[name], tmp_path) or []
        assert (item.prompt, list(item.choices), item.gold) == (prompt, choices, gold), name
        assert item.row == 7 and item.delimiter == " "


def test_hub_rows_without_a_gold_label_are_left_out(tmp_path: Path) -> None:
    (snli,) = [task for task in load_tasks(TASKS_FILE) if task.name == "snli"]
    row = ROWS["snli"][0]
    write_rows(tmp_path, "snli", [{**row, "label": label} for label in (-1, 0, -1, 2)])
    items = load_items(snli, tmp_path)
    assert items is not None and [item.row for item in items] == [1, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("colour: red", r"task 1 \(toy\): colour: found an unknown key"),
        ("n: 0", "n: found 0, expected at least 1"),
        ("n: true", "n: found True"),
        ("metrics: [f1]", "metrics: found 'f1'"),
        ("choices: []", "choices: found"),
        ("prompt: [a, b, c]", "expected one text, or one for each choice"),
        ("prompt: [1, 2]", "expected one text, or one for each choice"),
        ("choices: {expression: x}", "expected {field: expression}"),
        ("gold: 1", "gold: found 1, expected str"),
    ],
)
def test_mistakes_in_the_list_are_named(change: str, message: str, tmp_path: Path) -> None:
    base = {
        "name": "toy", "path": "me/toy", "config": "default", "split": "test",
        "prompt": '"{{ q }}"', "choices": "[a, b]", "gold": '"{{ label }}"',
    }  # fmt: skip
    key, _, value = change.partition(": ")
    base[key] = value
    lines = [f"  {key}: {value}" for key, value in base.items()]
    task_list = tmp_path / "tasks.yaml"
    task_list.write_text("tasks:\n- " + "\n".join(lines).strip() + "\n")
    with pytest.raises(ValueError, match=message) as caught:
        load_tasks(task_list)
    assert str(task_list) in str(caught.value)


def test_same_name_twice_is_refused(tmp_path: Path) -> None:
    entry = "- {name: t, path: p, config: c, split: s, prompt: '', choices: [a], gold: '0'}\n"
    (tmp_path / "tasks.yaml").write_text("tasks:\n" + 2 * entry)
    with pytest.raises(ValueError, match="two tasks or a group called 't'"):
        load_tasks(tmp_path / "tasks.yaml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "{{ question }}"}, r"task toy, row 0: .*question.*; the rows have .*q, label"),
        ({"gold": "2"}, "gold: found 2, expected an index below 2"),
        ({"gold": "{{ q }}"}, "task toy, row 0"),
        ({"choices": "q"}, "expected texts"),
        ({"choices": "options.text"}, "task toy, row 0"),
        ({"prompt": "{% if %}"}, "not valid Jinja2"),
        ({"prompt": "{{ q.__class__.__mro__ }}"}, "task toy, row 0"),
        ({"chance": 0.25}, "chance: found 0.25, expected 0.5000"),
        ({"balanced": "colour"}, "without the field 'colour'"),
        ({"keep": "{{ label > 5 }}"}, "no usable row"),
    ],
)
def test_mistakes_in_templates_are_named(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_rows(tmp_path, "toy", toy_rows(4))
    with pytest.raises(ValueError, match=message):
        load_items(make_task(**changes), tmp_path)


def test_missing_changed_and_foreign_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="source.json.*download_smallbench.py"):
        load_items(make_task(), tmp_path)
    write_rows(tmp_path, "toy", toy_rows(4), split="train")
    with pytest.raises(ValueError, match="split: found the rows of 'train', expected 'test'"):
        load_items(make_task(), tmp_path)
    with pytest.raises(ValueError, match="other.jsonl: found no rows"):
        load_items(make_task(name="other"), tmp_path)
    assert load_items(make_task(name="other", only_in_mirror=True), tmp_path) is None
    (tmp_path / "toy.jsonl").write_text('{"q": "changed", "label": 0, "_row": 0}\n')
    with pytest.raises(ValueError, match="other bytes"):
        load_items(make_task(split="train"), tmp_path)


def test_the_choice_of_items_is_fixed_nested_and_balanced() -> None:
    rows = [{"label": int(i % 10 < 8), "_row": i} for i in range(200)]
    plain = make_task()
    ten = [row["_row"] for row in select_rows(plain, rows, 10)]
    # the very rows: a changed choice would change every published score
    assert ten == [9, 54, 58, 85, 122, 132, 155, 160, 188, 193]
    assert ten == sorted(ten)
    assert [row["_row"] for row in select_rows(plain, rows[::-1], 10)] == ten
    assert set(ten) < {row["_row"] for row in select_rows(plain, rows, 50)}
    other_seed = select_rows(make_task(seed=1), rows, 10)
    assert [row["_row"] for row in other_seed] != ten
    balanced = select_rows(make_task(balanced="label"), rows, 21)
    assert sorted(row["label"] for row in balanced) in ([0] * 10 + [1] * 11, [0] * 11 + [1] * 10)
    assert len(select_rows(plain, rows, None)) == 200


def test_limit_full_and_n(tmp_path: Path) -> None:
    write_rows(tmp_path, "toy", toy_rows(30))
    task = make_task(n=10)

    def count(**options: Any) -> int:
        return len(load_items(task, tmp_path, **options) or [])

    assert (count(), count(limit=4), count(limit=20), count(full=True)) == (10, 4, 10, 30)


def test_hash_of_items_changes_with_what_is_asked(tmp_path: Path) -> None:
    write_rows(tmp_path, "toy", toy_rows(5))
    hashes = {
        smallbench.items_sha256(load_items(make_task(**changes), tmp_path) or [])
        for changes in ({}, {"prompt": "{{ q }}?"}, {"choices": ("a", "c")}, {"n": 4})
    }
    assert len(hashes) == 4


@pytest.mark.parametrize("places", [(0,), (3,), range(5)])
def test_one_choice_alone_is_refused_where_the_rows_give_the_choices(
    places: Sequence[int], tmp_path: Path
) -> None:
    """lm-evaluation-harness counts such a row as right whatever the model says; also where every
    row is one, or a limit leaves only such rows."""
    rows = [{"q": f"item {i} is", "options": ["a", "b"], "label": 1} for i in range(5)]
    for place in places:
        rows[place] = rows[place] | {"options": ["a"], "label": 0}
    write_rows(tmp_path, "toy", rows)
    with pytest.raises(ValueError, match=rf"row {places[0]}: choices: found 'a' alone, expected s"):
        load_items(make_task(choices="options"), tmp_path)
    kept = make_task(choices="options", keep="{{ options | length > 1 }}")
    if len(places) < 5:
        assert len(load_items(kept, tmp_path) or []) == 4
