"""SmallBench: zero-shot tasks described in YAML, scored by log-likelihood.

The conventions (what is tokenised with what, what is cut) are those of lm-evaluation-harness
0.4.13, so that the exported checkpoint gets the same scores there; `tests/parity` compares them.
docs/EVALUATION.md describes the scoring in words.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from src.data.requests import Request, encode_requests, held_out_pairs, own_pairs
from src.data.tasks import Item, Task, load_items
from src.evaluation.perplexity import windows
from src.evaluation.scoring import LanguageModel, Reading, score_positions
from src.evaluation.task_scores import UNSCORED, FloatArray, TaskScores, item_lines, units
from src.models.transformer import Transformer
from src.spec.config import ModelConfig
from src.storage.files import write_atomic

# ----------------------------------------------------------------------------------- log-likelihood


def score_requests(
    model: LanguageModel, requests: Sequence[Request], *, context: int, **reading: Unpack[Reading]
) -> tuple[FloatArray, NDArray[np.bool_]]:
    """Log-probability of each continuation, and whether greedy decoding writes it.

    What does not fit into `context` is cut on the left. Each distinct input is read once: a row
    that begins another one is read as part of it, which is what makes labels of one token cost a
    single reading of their prompt. A continuation longer than `context` itself is scored in
    overlapping windows.
    """
    parts = [
        (number, np.array(inputs, dtype=np.uint16).tobytes(), len(inputs) - len(targets), targets)
        for number, request in enumerate(requests)
        for inputs, targets in _pieces(request, context)
    ]
    owner = _merge_prefixes({row for _, row, _, _ in parts})
    rows = sorted(set(owner.values()))
    row_index = {row: i for i, row in enumerate(rows)}
    counts = [len(targets) for *_, targets in parts]
    query_request = np.repeat([number for number, *_ in parts], counts)
    queries = np.empty((len(query_request), 3), dtype=np.int64)  # row, position, target
    queries[:, 0] = np.repeat([row_index[owner[row]] for _, row, _, _ in parts], counts)
    queries[:, 1] = np.concatenate([np.arange(at, at + len(t)) for _, _, at, t in parts])
    queries[:, 2] = np.concatenate([targets for *_, targets in parts])
    order = np.argsort(queries[:, 0], kind="stable")
    texts = [np.frombuffer(row, dtype=np.uint16) for row in rows]
    nats, greedy = score_positions(
        model, texts, queries[order], greedy=True, share_prefixes=True, **reading
    )
    scores, misses = np.zeros(len(requests)), np.zeros(len(requests), dtype=np.int64)
    np.subtract.at(scores, query_request[order], nats.astype(np.float64))
    np.add.at(misses, query_request[order], ~greedy)
    return scores, misses == 0


def _pieces(request: Request, context: int) -> list[tuple[Sequence[int], Sequence[int]]]:
    """(inputs, targets) whose targets are the last inputs' successors."""
    ids, continuation = request.ids, len(request.ids) - request.context
    if continuation <= context:
        kept = ids[-(context + 1) :]
        return [(kept[:-1], kept[-continuation:])]
    stride = max(1, context // 2)
    kept = ids[max(0, request.context - (context - stride)) :]
    scored_from = len(kept) - continuation
    pieces: list[tuple[Sequence[int], Sequence[int]]] = []
    for start, end, first in windows(len(kept) - 1, context, stride):
        if end >= scored_from:
            pieces.append((kept[start:end], kept[max(first, scored_from) : end + 1]))
    return pieces


def _merge_prefixes(rows: Iterable[bytes]) -> dict[bytes, bytes]:
    """For each row the row that is read for it: itself, or a longer one that begins with it."""
    ordered = sorted(rows)
    owner: dict[bytes, bytes] = {}
    for row, following in zip(reversed(ordered), [b"", *reversed(ordered)], strict=False):
        owner[row] = owner[following] if following.startswith(row) and following else row
    return owner


# --------------------------------------------------------------------------------------- evaluation


def evaluate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    tasks: Sequence[Task],
    data_dir: Path,
    *,
    context: int,
    limit: int | None = None,
    full: bool = False,
    exclude: Mapping[str, set[int]] | None = None,
    items_path: Path | None = None,
    **reading: Unpack[Reading],
) -> dict[str, Any]:
    """Score `tasks` from the rows in `data_dir`.

    `context`: tokens that the model was trained to read; longer prompts are cut on the left and
    counted. `limit` caps the items a task, `full` lifts the task list's own n. `exclude`: rows by
    task that the training text contains; they are dropped and counted. None: nothing is known of
    the training text, nothing dropped, and the counts are None. `items_path` receives one JSON
    line an item. Returns "accuracy" (the mean over tasks; the members of a group are
    averaged first, so that a group weighs as much as a task), "accuracy_se" and "chance" likewise,
    "items" (scored), "tasks" by name, "contaminated_items", "missing_tasks" and
    "contaminated_tasks", of which the training text contains every item: these keep their rows,
    with n 0, and stand in no mean. Raises ValueError for unusable tasks or data, and for
    scores that are not numbers.
    """
    task_items: list[tuple[Task, list[Item]]] = []
    dropped: dict[str, int | None] = {}
    for task in tasks:
        items = load_items(task, data_dir, limit=limit, full=full)
        if items is None:
            continue
        clean = [item for item in items if item.row not in (exclude or {}).get(task.name, ())]
        dropped[task.name] = None if exclude is None else len(items) - len(clean)
        if clean:
            task_items.append((task, clean))
    reading = {"label": "SmallBench", **reading}
    scored = _score_tasks(model, tokenizer, task_items, context=context, **reading)
    if items_path is not None:
        write_atomic(items_path, item_lines(scored))
    rows = {entry.task.name: entry.summary() for entry in scored}
    rows = {name: rows.get(name, UNSCORED) | {"contaminated": n} for name, n in dropped.items()}
    by_unit = units([task for task in tasks if task.name in rows], rows)
    counted = [row for row in by_unit.values() if row["n"]]
    errors = [row["accuracy_se"] for row in counted]
    known = errors and None not in errors
    return {
        "accuracy": float(np.mean([row["accuracy"] for row in counted])) if counted else None,
        "accuracy_se": math.hypot(*errors) / len(errors) if known else None,
        "chance": float(np.mean([row["chance"] for row in counted])) if counted else None,
        "items": sum(row["n"] for row in counted),
        "tasks": by_unit,
        # Without a leakage report the number is unknown, not 0.
        "contaminated_items": None if exclude is None else sum(dropped.values()),
        "contaminated_tasks": [name for name, row in rows.items() if not row["n"]],
        "missing_tasks": [task.name for task in tasks if task.name not in rows],
    }


def evaluate_untrained(
    config: ModelConfig,
    tokenizer: Tokenizer,
    tasks: Sequence[Task],
    data_dir: Path,
    *,
    seed: int = 0,
    device: torch.device | str,
    **options: Any,
) -> dict[str, Any]:
    """`evaluate` for the same model untrained: what the tasks give away for nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Transformer(config).to(device)
    return evaluate(model, tokenizer, tasks, data_dir, device=device, **options)


def _score_tasks(
    model: LanguageModel,
    tokenizer: Tokenizer,
    task_items: Sequence[tuple[Task, list[Item]]],
    *,
    context: int,
    **reading: Unpack[Reading],
) -> list[TaskScores]:
    """One pass over the requests of all tasks, so that batches are full and sorted by length."""
    pairs: list[tuple[str, str]] = []
    spans: list[tuple[slice, slice]] = []  # of a task's pairs: its own, those to calibrate by
    for _, items in task_items:
        own, held_out = own_pairs(items), held_out_pairs(items)
        assert len(held_out) in (0, len(own)), "a choice is calibrated by one other prompt"
        start, middle = len(pairs), len(pairs) + len(own)
        pairs += own + held_out
        spans.append((slice(start, middle), slice(middle, len(pairs))))
    if not pairs:
        return []
    requests = encode_requests(tokenizer, pairs)
    scores, greedy = score_requests(model, requests, context=context, **reading)
    if not np.isfinite(scores).all():
        raise ValueError(
            "SmallBench: found log-probabilities that are not finite numbers, expected numbers; "
            "the model's weights have diverged"
        )
    tokens = np.array([len(request.ids) - request.context for request in requests], np.float64)
    too_long = np.array([len(request.ids) > context + 1 for request in requests])
    result = []
    for (task, items), (own_span, held_out_span) in zip(task_items, spans, strict=True):
        ends = np.cumsum([len(item.choices) for item in items])[:-1]  # of all items but the last
        held_out_scores = scores[held_out_span]
        result.append(
            TaskScores(
                task=task,
                items=items,
                scores=np.split(scores[own_span], ends),
                greedy=[bool(part[0]) for part in np.split(greedy[own_span], ends)],
                uniform=np.split(-tokens[own_span], ends),
                held_out=np.split(held_out_scores, ends) if len(held_out_scores) else None,
                cut=sum(bool(part.any()) for part in np.split(too_long[own_span], ends)),
            )
        )
    return result
