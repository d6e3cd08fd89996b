"""Runs lm-evaluation-harness on the rows that a run was scored on, and compares.

The harness gets its own templates (task files that include those it ships), the exported
checkpoint and the same rows; it shares no code with `src.evaluation.smallbench`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tokenizers import Tokenizer

from src.data.requests import encode_requests
from src.data.tasks import Item, Task, load_items
from src.data.tokenizer import load_tokenizer

# Our task -> the harness's own file; BLiMP's paradigms have one each.
TEMPLATES = {
    "sst2": "glue/sst2/default.yaml",
    "rte": "glue/rte/default.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "sciq": "sciq/sciq.yaml",
    "piqa": "piqa/piqa.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "lambada": "lambada/lambada_openai.yaml",
    "winogrande": "winogrande/default.yaml",
    "wsc273": "wsc273/default.yaml",
}


@dataclass(frozen=True, slots=True)
class Row:
    """The comparison of one task; `skipped` items have a choice longer than the context."""

    task: str
    n: int
    skipped: int
    same_predictions: int
    largest_difference: float  # of log-probabilities, nats
    accuracy: float
    harness_accuracy: float
    accuracy_norm: float | None
    harness_accuracy_norm: float | None

    @property
    def equal(self) -> bool:
        """Every prediction and both accuracies, to the last digit."""
        return (
            self.same_predictions == self.n
            and self.accuracy == self.harness_accuracy
            and self.accuracy_norm == self.harness_accuracy_norm
        )


def template(task: Task) -> str | None:
    """The harness's file for one of our tasks, relative to its tasks folder."""
    if task.name.startswith("blimp_"):
        return f"blimp/{task.config}.yaml"
    return TEMPLATES.get(task.name)


def read_items(path: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """smallbench_items.jsonl as task -> row -> line."""
    items: dict[str, dict[int, dict[str, Any]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        item = json.loads(line)
        items.setdefault(item["task"], {})[item["row"]] = item
    return items


def compare(
    final: Path,
    recorded: dict[str, dict[int, dict[str, Any]]],
    tasks: Sequence[Task],
    data_dir: Path,
    work: Path,
    *,
    batch_size: int = 32,
) -> list[Row]:
    """One row for each of `tasks`; `work` is an empty folder for the harness's files."""
    # Nothing may come from the network, and nothing is to stay in the account's cache.
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_DATASETS_CACHE=str(work))
    context = json.loads((final / "config.json").read_bytes())["max_position_embeddings"]
    tokenizer = load_tokenizer(final / "tokenizer.json")
    kept: dict[str, list[Item]] = {}
    skipped: dict[str, int] = {}
    for task in tasks:
        ours = recorded[task.name]
        items = [item for item in load_items(task, data_dir, full=True) or [] if item.row in ours]
        kept[task.name] = [item for item in items if _fits(tokenizer, item, context)]
        skipped[task.name] = len(items) - len(kept[task.name])
        _write_task(task, [item.row for item in kept[task.name]], data_dir, work)
    samples, results = _run_harness(final, [task.name for task in tasks], work, batch_size)
    return [
        _row(
            kept[task.name],
            recorded[task.name],
            samples[f"parity_{task.name}"],
            results[f"parity_{task.name}"],
            skipped[task.name],
        )
        for task in tasks
    ]


def _fits(tokenizer: Tokenizer, item: Item, context: int) -> bool:
    """The harness refuses a continuation longer than the context; we score it in windows."""
    requests = encode_requests(tokenizer, item.pairs)
    return all(len(r.ids) - r.context <= context for r in requests)


def _write_task(task: Task, rows: Iterable[int], data_dir: Path, work: Path) -> None:
    """A local dataset of exactly these rows, and a task file that points the harness to it."""
    import lm_eval

    wanted = set(rows)
    folder = work / "data" / task.name
    folder.mkdir(parents=True)
    with (folder / "test.jsonl").open("w", encoding="utf-8") as out:
        for line in (data_dir / f"{task.name}.jsonl").read_text(encoding="utf-8").splitlines():
            if json.loads(line)["_row"] in wanted:
                out.write(line + "\n")
    shipped = Path(lm_eval.__file__).parent / "tasks" / str(template(task))
    content = {
        "include": str(shipped),
        "task": f"parity_{task.name}",
        "tag": None,
        "dataset_path": str(folder),
        "dataset_name": None,
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
    }
    (work / "tasks").mkdir(exist_ok=True)
    (work / "tasks" / f"{task.name}.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")


def _run_harness(
    final: Path, names: Sequence[str], work: Path, batch_size: int
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, dict[str, Any]]]:
    """Samples by task in row order, and result rows by task; float32 on the CPU."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = HFLM(pretrained=str(final), dtype="float32", device="cpu", batch_size=batch_size)
    evaluation = simple_evaluate(
        model=model,
        tasks=[f"parity_{name}" for name in names],
        task_manager=TaskManager(include_path=str(work / "tasks"), include_defaults=False),
        num_fewshot=0,
        bootstrap_iters=0,
        log_samples=True,
    )
    assert evaluation is not None
    ordered = {
        name: sorted(samples, key=lambda sample: sample["doc_id"])
        for name, samples in evaluation["samples"].items()
    }
    return ordered, evaluation["results"]


def _row(
    items: Sequence[Item],
    recorded: dict[int, dict[str, Any]],
    samples: Sequence[dict[str, Any]],
    result: dict[str, Any],
    skipped: int,
) -> Row:
    assert len(samples) == len(items) > 0
    one_choice = len(items[0].choices) == 1
    same, difference, right, right_norm = 0, 0.0, 0, 0
    for item, sample in zip(items, samples, strict=True):
        ours, responses = recorded[item.row], sample["filtered_resps"]
        scores = np.array([float(score) for score, _ in responses])
        prediction = (0 if responses[0][1] else None) if one_choice else int(np.argmax(scores))
        same += prediction == ours["prediction"]
        difference = max(difference, float(np.abs(scores - ours["scores"]).max()))
        right += ours["prediction"] == ours["gold"]
        lengths = np.array([float(len(choice)) for choice in item.choices])
        right_norm += int(np.argmax(np.array(ours["scores"]) / lengths)) == ours["gold"]
    has_norm = "acc_norm,none" in result
    return Row(
        task=items[0].task,
        n=len(items),
        skipped=skipped,
        same_predictions=same,
        largest_difference=difference,
        accuracy=right / len(items),
        harness_accuracy=float(result["acc,none"]),
        accuracy_norm=right_norm / len(items) if has_norm else None,
        harness_accuracy_norm=float(result["acc_norm,none"]) if has_norm else None,
    )
