"""Turns SmallBench items into pairs of context and continuation, and these into token ids.

The conventions are those of lm-evaluation-harness 0.4.13. Imports no torch, so that a run's
preflight can encode every item before it trains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from src.data.tasks import Item, fixed_labels
from src.data.tokenizer import END_OF_TEXT


@dataclass(frozen=True, slots=True)
class Request:
    """A continuation to score: token ids, and how many of them are the context."""

    ids: tuple[int, ...]
    context: int


def own_pairs(items: Sequence[Item]) -> list[tuple[str, str]]:
    """Every item's choices under their own prompts."""
    return [pair for item in items for pair in item.pairs]


def held_out_pairs(items: Sequence[Item]) -> list[tuple[str, str]]:
    """Every item's choices under another item's prompt, half the list away, for the calibration.

    Empty where that says nothing: for choices that stand alone, for prompts that are equal or
    differ by choice, and for labels, which are calibrated for nothing from the scores that are
    there anyway.
    """
    prompts = [item.prompt for item in items if isinstance(item.prompt, str)]
    single_choice = any(len(item.choices) == 1 for item in items)
    by_choice = len(prompts) < len(items)
    if single_choice or by_choice or fixed_labels(items) or len(set(prompts)) <= 1:
        return []
    half = round(len(items) / 2)
    other_prompts = prompts[half:] + prompts[:half]
    return [
        (prompt, item.delimiter + choice)
        for prompt, item in zip(other_prompts, items, strict=True)
        for choice in item.choices
    ]


def encode_requests(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> list[Request]:
    """Tokenise (context, continuation) pairs as lm-evaluation-harness does.

    The two are encoded together and the continuation is what follows the context's own tokens;
    blanks that end the context belong to the continuation; an empty context is the
    beginning-of-text token.
    """
    eot = tokenizer.token_to_id(END_OF_TEXT)
    if eot is None:
        raise ValueError(f"the tokenizer: found no token {END_OF_TEXT}, expected it as the start")
    contexts = sorted({context.rstrip() for context, _ in pairs})
    encoded = tokenizer.encode_batch(contexts)
    lengths = {text: len(e.ids) for text, e in zip(contexts, encoded, strict=True)}
    encodings = tokenizer.encode_batch([context + continuation for context, continuation in pairs])
    requests = []
    for (context, continuation), encoding in zip(pairs, encodings, strict=True):
        context_tokens = lengths[context.rstrip()]
        if len(encoding.ids) <= context_tokens:
            raise ValueError(
                f"the continuation {continuation!r} has no token of its own after "
                f"{context[-40:]!r}; give the task a target_delimiter that separates them"
            )
        prefix = () if context_tokens else (eot,)
        requests.append(Request((*prefix, *encoding.ids), max(context_tokens, 1)))
    return requests
