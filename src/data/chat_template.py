"""The wording of instructions, as text for training and as a chat template for other programs."""

from __future__ import annotations

import json
from collections.abc import Iterable

# Alpaca's: what stands before an instruction, and between it and its answer.
OPENING = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n"
)
CLOSING = "\n\n### Response:\n"


def chat_template(prompts: Iterable[str]) -> str:
    """Jinja2 that writes a conversation as tuning wrote its rows, one example a turn.

    A row is the beginning token, the prompt, the answer, the end token (the same token). Where all
    `prompts` have Alpaca's wording a user's message is only the instruction; otherwise it is the
    whole prompt. There was no system message in training, so the template refuses one.
    """
    wrapped = all(prompt.startswith(OPENING) and prompt.endswith(CLOSING) for prompt in prompts)
    before, after = (json.dumps(text if wrapped else "") for text in (OPENING, CLOSING))
    return (
        "{% for message in messages %}{% if message.role == 'user' %}"
        "{{ bos_token + " + before + " + message.content + " + after + " }}"
        "{% elif message.role == 'assistant' %}{{ message.content + eos_token }}"
        "{% else %}{{ raise_exception('this model knows the roles user and assistant') }}"
        "{% endif %}{% endfor %}"
    )
