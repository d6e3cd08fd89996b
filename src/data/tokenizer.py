"""How a tokenizer is read from a file, in one place for training, evaluation and export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of `path`; a text that spells `<|endoftext|>` is a text to it.

    The token itself is put where it belongs by its id: before a document, at an answer's end. The
    file does not keep this switch, so it is set here; `final/` states it for transformers.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.encode_special_tokens = True
    return tokenizer
