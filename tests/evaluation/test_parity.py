"""A small sample of the comparison with lm-evaluation-harness, on rows made up here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from src.data.tasks import TASKS_FILE, load_tasks
from src.evaluation.smallbench import evaluate
from src.models.export import export
from tests.evaluation import write_rows
from tests.models import small_model
from tests.parity import __main__ as parity

WORDS = "the owl river sleeps runs on a naive question how many tokens of words 3.14 and".split()
ROWS_EACH = 12
TASKS = ("blimp_adjunct_island", "sst2", "rte", "arc_easy", "piqa", "hellaswag", "lambada",
         "winogrande", "wsc273")  # fmt: skip
# Not in the shipped list: a prompt for each choice, and what follows is scored.
BY_CHOICE = """
  - name: winogrande
    path: allenai/winogrande
    config: winogrande_xl
    split: validation
    prompt:
      - "{{ sentence.split('_')[0] }}{{ option1 }}"
      - "{{ sentence.split('_')[0] }}{{ option2 }}"
    choices: ["{{ sentence.split('_')[1].strip() }}", "{{ sentence.split('_')[1].strip() }}"]
    gold: "{{ ['1', '2'].index(answer) }}"
    chance: 0.5
  - name: wsc273
    path: lighteval/winograd_wsc
    config: wsc273
    split: test
    prompt: ["{{ text[:pronoun_loc] }}{{ options[0] }}", "{{ text[:pronoun_loc] }}{{ options[1] }}"]
    choices:
      - "{{ text[pronoun_loc + pronoun | length:] }}"
      - "{{ text[pronoun_loc + pronoun | length:] }}"
    gold: "{{ label }}"
    chance: 0.5
"""


def text(seed: int, length: int) -> str:
    return " ".join(WORDS[(seed * 7 + i * (seed + 3)) % len(WORDS)] for i in range(length))


def row(task: str, i: int) -> dict[str, Any]:
    """Row i of a task as the hub has it; some prompts are longer than the context."""
    if task == "blimp_adjunct_island":
        return {"sentence_good": text(i, 5) + ".", "sentence_bad": text(i + 1, 4) + " ."}
    if task == "sst2":
        return {"sentence": text(i, 3 + 2 * i) + " ", "label": i % 2, "idx": i}
    if task == "rte":
        return {"sentence1": text(i, 9), "sentence2": text(i + 5, 4), "label": i % 2, "idx": i}
    if task == "arc_easy":
        letters = ["A", "B", "C", "D"]
        choices = {"text": [text(i + k, 1 + k) for k in range(4)], "label": letters}
        return {"question": text(i, 6) + "?", "choices": choices, "answerKey": letters[i % 4]}
    if task == "piqa":
        return {"goal": text(i, 5), "sol1": text(i, 6), "sol2": text(i + 2, 4), "label": i % 2}
    if task == "winogrande":
        sentence = f"{text(i, 3 + 2 * i)} _ {text(i + 1, 3)}."
        return {"sentence": sentence, "option1": text(i, 1), "option2": text(i + 5, 2),
                "answer": str(1 + i % 2)}  # fmt: skip
    if task == "wsc273":
        before = text(i, 4) + " "
        return {"text": f"{before}it {text(i + 2, 4)}.", "pronoun": "it", "label": i % 2,
                "pronoun_loc": len(before), "options": ["the owl", "the naive river"]}  # fmt: skip
    if task == "hellaswag":
        return {
            "activity_label": "Owls",
            "ctx_a": f"How to [header] {text(i, 4)} [title] {text(i, 3)}",
            "ctx_b": text(i, 2).upper(),
            "endings": [text(i + k, 3 + k) + " [step] end." for k in range(4)],
            "label": str(i % 4),
        }
    return {"text": text(i, 8)}


def test_predictions_and_accuracies_are_the_harnesss(
    tokenizer_json: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All tasks agree but one, in which a prediction is falsified and must be found."""
    model = small_model()
    run, rows = tmp_path / "run", tmp_path / "smallbench"
    export(model, tokenizer_json, run / "final", max_position_embeddings=48)
    for task in TASKS:
        write_rows(rows, task, [row(task, i) for i in range(ROWS_EACH)])
    task_list = tmp_path / "tasks.yaml"
    task_list.write_text(TASKS_FILE.read_text(encoding="utf-8") + BY_CHOICE, encoding="utf-8")
    items = run / "smallbench_items.jsonl"
    ours = evaluate(
        model,
        Tokenizer.from_file(str(tokenizer_json)),
        [task for task in load_tasks(task_list) if task.name in TASKS],
        rows,
        context=48,
        device="cpu",
        autocast_dtype=None,
        items_path=items,
    )["tasks"]
    assert ours["sst2"]["cut_prompts"] > 0
    lines = [json.loads(line) for line in items.read_text().splitlines()]
    falsified = next(line for line in lines if line["task"] == "rte")
    falsified["prediction"] = 1 - falsified["prediction"]
    items.write_text("".join(json.dumps(line) + "\n" for line in lines))

    out = tmp_path / "parity.json"
    command = ["--run", run, "--smallbench", rows, "--task_list", task_list, "--output", out]
    assert parity.main([*map(str, command), "--tasks", *TASKS]) == 1
    table = {entry["task"]: entry for entry in json.loads(out.read_text())}
    assert set(table) == set(TASKS)
    for task, entry in table.items():
        assert entry["n"] + entry["skipped"] == ROWS_EACH and entry["n"] > ROWS_EACH // 2
        assert entry["equal"] == (task != "rte"), entry
        assert entry["largest_difference"] < 1e-3
        group = "blimp_syntax" if task.startswith("blimp") else task
        if entry["skipped"] == 0:
            assert ours[group]["accuracy"] == entry["harness_accuracy"]
    for task in ("winogrande", "wsc273"):  # what follows is the same text under both prompts
        assert ours[task]["accuracy_uniform"] == 0.5 and ours[task]["accuracy_calibrated"] is None
    assert table["rte"]["same_predictions"] == table["rte"]["n"] - 1
    assert "| rte | 12 | 11 |" in capsys.readouterr().out


def test_the_harness_takes_a_lone_choice_for_right() -> None:
    """Why such rows are refused: its own scoring of a multiple-choice task, on a row whose only
    choice the model finds all but impossible."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    row = {"q": "x", "options": ["a"]}
    task = ConfigurableTask(
        config={
            "task": "lone", "dataset_path": "json", "output_type": "multiple_choice",
            "custom_dataset": lambda **_: {"test": Dataset.from_list([row])},
            "test_split": "test", "doc_to_text": "{{q}}", "doc_to_choice": "options",
            "doc_to_target": 0, "metric_list": [{"metric": "acc"}],
        }
    )  # fmt: skip
    assert task.process_results(row, [(-1e9, False)])["acc"] == 1.0
