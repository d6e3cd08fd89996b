"""SmallBench's numbers: from the log-probabilities of choices to a task's row and a group's."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from src.data.tasks import Item, Task, chance, fixed_labels, items_sha256

# Differences of float32 log-probabilities below this are rounding, not preference.
CALIBRATED_TIE = 1e-6

FloatArray = NDArray[np.float64]


def credit(scores: FloatArray, gold: int, tie: float = 0.0) -> float:
    """1 if gold scores best alone, 1/k if it shares the best score with k - 1 others, else 0.

    A scorer without preference gets chance exactly. Values that are not numbers are an error.
    """
    if not np.isfinite(scores).all():
        raise ValueError(f"scores: found {scores.tolist()}, expected finite log-probabilities")
    best = scores >= scores.max() - tie
    return float(best[gold] / best.sum())


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean; None for a single value."""
    if len(values) < 2:
        return None
    return float(np.std(values, ddof=1)) / math.sqrt(len(values))


def calibrated_by_halves(scores: Sequence[FloatArray], golds: Sequence[int]) -> list[float]:
    """Credits after subtracting each label's mean score over the half the item is not in."""
    item_scores = np.stack(scores)
    if len(item_scores) < 2:
        return []
    shifted = item_scores.copy()
    shifted[::2] -= item_scores[1::2].mean(axis=0)
    shifted[1::2] -= item_scores[::2].mean(axis=0)
    return [credit(row, gold, CALIBRATED_TIE) for row, gold in zip(shifted, golds, strict=True)]


@dataclass(slots=True)
class TaskScores:
    """What the model said about one task's items."""

    task: Task
    items: list[Item]
    scores: list[FloatArray]
    greedy: list[bool]  # of the first choice
    uniform: list[FloatArray]  # minus the number of tokens of each choice
    held_out: list[FloatArray] | None  # each choice's mean score under other items' prompts
    cut: int  # items of which something was cut to fit the context

    @property
    def golds(self) -> list[int]:
        return [item.gold for item in self.items]

    def predictions(self) -> list[int | None]:
        """Index of the best choice; of a cloze 0 where greedy decoding writes it."""
        if self.task.is_cloze:
            return [0 if hit else None for hit in self.greedy]
        return [int(np.argmax(scores)) for scores in self.scores]

    def credits(self) -> list[float]:
        if self.task.is_cloze:
            return [float(hit) for hit in self.greedy]
        return self._credits(self.scores)

    def _credits(self, scores: Sequence[FloatArray], tie: float = 0.0) -> list[float]:
        return [credit(s, gold, tie) for s, gold in zip(scores, self.golds, strict=True)]

    def calibrated(self) -> list[float]:
        if fixed_labels(self.items):
            return calibrated_by_halves(self.scores, self.golds)
        if self.held_out is None:
            return []
        shifted = [own - mean for own, mean in zip(self.scores, self.held_out, strict=True)]
        return self._credits(shifted, CALIBRATED_TIE)

    def summary(self) -> dict[str, Any]:
        """The task's row of the result; None means that a number does not apply."""
        credits = self.credits()
        gold_scores = [s[gold] for s, gold in zip(self.scores, self.golds, strict=True)]
        row: dict[str, Any] = {
            "n": len(self.items),
            "accuracy": float(np.mean(credits)),
            "accuracy_se": standard_error(credits),
            "chance": chance(self.items),
            "gold_logprob": float(np.mean(gold_scores)),
            "cut_prompts": self.cut,
            "items_sha256": items_sha256(self.items),
        }
        if not self.task.is_cloze:
            row |= self._choice_summary(credits)
        if "perplexity" in self.task.metrics:
            mean = -row["gold_logprob"]
            row["perplexity"] = math.exp(mean) if mean < 700 else None
        return row

    def _choice_summary(self, credits: Sequence[float]) -> dict[str, Any]:
        by_length = [
            scores / np.array([max(1, len(choice)) for choice in item.choices])
            for scores, item in zip(self.scores, self.items, strict=True)
        ]
        margins = [
            float(scores[gold] - np.delete(scores, gold).max())
            for scores, gold in zip(self.scores, self.golds, strict=True)
        ]
        calibrated, majority = self.calibrated(), None
        if fixed_labels(self.items):
            majority = Counter(self.golds).most_common(1)[0][1] / len(self.items)
        return {
            "accuracy_norm": float(np.mean(self._credits(by_length))),
            "accuracy_calibrated": float(np.mean(calibrated)) if calibrated else None,
            "accuracy_uniform": float(np.mean(self._credits(self.uniform))),
            "gold_margin": float(np.mean(margins)),
            "gold_margin_se": standard_error(margins),
            "majority": majority,
            "ties": sum(0 < value < 1 for value in credits),
        }


def item_lines(scored: Sequence[TaskScores]) -> bytes:
    lines = []
    for entry in scored:
        predictions = entry.predictions()
        for item, scores, prediction in zip(entry.items, entry.scores, predictions, strict=True):
            row = {"task": item.task, "row": item.row, "scores": scores.tolist()}
            lines.append(json.dumps({**row, "prediction": prediction, "gold": item.gold}) + "\n")
    return "".join(lines).encode()


# The row of a task without an item that the training text does not hold.
UNSCORED: dict[str, Any] = {"n": 0, "accuracy": None, "accuracy_se": None, "chance": None}


def units(tasks: Sequence[Task], rows: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Tasks as they enter the mean: a group's members averaged, and listed inside it."""
    members: dict[str, list[str]] = {}
    for task in tasks:
        members.setdefault(task.unit, []).append(task.name)
    return {
        unit: rows[unit] if names == [unit] else _group({name: rows[name] for name in names})
        for unit, names in members.items()
    }


def _group(rows: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Means over the members that were scored, each weighing the same; counts add up over all."""
    counted = [row for row in rows.values() if row["n"]] or list(rows.values())
    merged: dict[str, Any] = {}
    for key in counted[0]:
        values: list[Any] = [row.get(key) for row in counted]
        if key == "contaminated":
            values = [row[key] for row in rows.values()]
        if None in values:
            merged[key] = None
        elif key in ("n", "ties", "cut_prompts", "contaminated"):
            merged[key] = sum(values)
        elif key == "items_sha256":
            merged[key] = hashlib.sha256("\n".join(values).encode()).hexdigest()
        elif key.endswith("_se"):
            merged[key] = math.hypot(*values) / len(values)
        else:
            merged[key] = float(np.mean(values))
    merged["members"] = {
        name: {key: row.get(key) for key in ("n", "accuracy", "accuracy_se", "gold_margin")}
        for name, row in rows.items()
    }
    return merged
