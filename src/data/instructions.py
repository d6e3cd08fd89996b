"""Instructions as examples: prompt and answer in tokens, and the batch of a step.

Shapes: B examples, T tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from src.data.tokens import epoch_orders

END = 0  # <|endoftext|>: begins each prompt and ends each answer


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of prompt and answer; targets before `answer_start` are not trained on."""

    ids: NDArray[np.int64]
    answer_start: int  # index into ids of the answer's first token


def encode(tokenizer: Tokenizer, prompt: str, answer: str, context: int) -> Example:
    """One example of at most context + 1 tokens. Where both do not fit, the answer has what the
    prompt leaves, half of the context at least: long answers lose their end, long prompts their
    beginning, so that an answer always follows its own prompt's end."""
    prompt_ids = [END, *tokenizer.encode(prompt, add_special_tokens=False).ids]
    answer_limit = max(1, context // 2, context + 1 - len(prompt_ids))
    answer_ids = [*tokenizer.encode(answer, add_special_tokens=False).ids, END][:answer_limit]
    prompt_ids = prompt_ids[-(context + 1 - len(answer_ids)) :]
    return Example(np.array(prompt_ids + answer_ids, dtype=np.int64), len(prompt_ids))


def read_rows(file: Path) -> list[dict[str, str]]:
    """The rows of a file of scripts/download_instructions.py; ValueError where it is not one."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines if line]
        texts = [row[key] for row in rows for key in ("prompt", "answer")]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError("rows need texts under prompt and answer")
    except FileNotFoundError:
        raise ValueError(
            f"{file}: found no such file, expected instructions; make them with: python "
            f"scripts/download_instructions.py --output {file.parent}"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: found no instructions ({error}); download them again") from None
    return rows


def collate(examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """(B, T + 1) ids padded on the right, and (B, T) whether a target belongs to an answer."""
    width = max(len(example.ids) for example in examples)
    tokens = torch.full((len(examples), width), END, dtype=torch.int64)
    is_answer = torch.zeros(len(examples), width - 1, dtype=torch.bool)
    for row, example in enumerate(examples):
        tokens[row, : len(example.ids)] = torch.from_numpy(example.ids)
        is_answer[row, example.answer_start - 1 : len(example.ids) - 1] = True
    return tokens, is_answer


class Batches:
    """The batch of a step depends on (seed, step) alone, so a resumed run has nothing to replay."""

    def __init__(self, examples: Sequence[Example], batch_size: int, seed: int) -> None:
        self._examples = examples
        self.size = min(batch_size, len(examples))
        self.per_epoch = len(examples) // self.size
        self._order = epoch_orders(len(examples), seed)

    def __getitem__(self, step: int) -> list[Example]:
        epoch, batch = divmod(step, self.per_epoch)
        indices = self._order(epoch)[batch * self.size : (batch + 1) * self.size]
        return [self._examples[index] for index in indices]
