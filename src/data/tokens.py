"""Memory-mapped tokens; a batch is a pure function of (seed, step). Imports no torch.

Shapes: B sequences, T tokens, D documents.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from src.data.corpus import SPLITS, check_split, read_source, read_texts
from src.data.tokenizer import load_tokenizer
from src.storage.files import sha256_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """One split: the token stream (an end-of-text token before each document) and its documents."""

    tokens: NDArray[np.uint16]  # (N,), memory-mapped
    documents: NDArray[np.int64]  # (D, 3): token offset, UTF-8 bytes, words
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenData:
    """A verified token directory of scripts/preprocess_lm.py."""

    path: Path
    vocab_size: int
    eot_id: int
    tokenizer_sha256: str
    corpus: dict[str, Any]
    train: Split
    validation: Split
    test: Split

    @property
    def sha256(self) -> str:
        """Digest of all three token files."""
        parts = "".join(getattr(self, name).sha256 for name in SPLITS)
        return hashlib.sha256(parts.encode()).hexdigest()

    @property
    def tokenizer_path(self) -> Path:
        return self.path / "tokenizer.json"


def load(path: Path, vocab_size: int, train_tokens: int | None = None) -> TokenData:
    """Open and verify `path` (sizes, SHA-256, ids); ValueError with the way out if not sound.

    `train_tokens` keeps only the first so many of the train split, under a digest of its own.
    """
    command = (
        f"python scripts/preprocess_lm.py --input CORPUS --vocab_size {vocab_size} "
        f"--output {path.parent}"
    )
    meta_path = path / "meta.json"
    if not meta_path.is_file():
        raise ValueError(
            f"data.dir {path.parent}: found no tokens of vocab_size {vocab_size} "
            f"({meta_path.absolute()} is missing), expected them there; make them with: {command}"
        )
    try:
        meta = json.loads(meta_path.read_text(encoding="utf-8"))
        if meta["vocab_size"] != vocab_size:
            raise ValueError(f"vocab_size: found {meta['vocab_size']}, expected {vocab_size}")
        if not isinstance(meta["corpus"], dict):
            raise ValueError(f"corpus: found {meta['corpus']!r}, expected keys and values")
        _check_hash(path / "tokenizer.json", meta["tokenizer_sha256"])
        fields: dict[str, Any] = {
            name: _load_split(path, name, meta["splits"][name], vocab_size) for name in SPLITS
        }
        fields |= {key: meta[key] for key in ("vocab_size", "tokenizer_sha256", "corpus")}
        data = TokenData(path=path, eot_id=int(meta["eot_id"]), **fields)
    except (ValueError, KeyError, TypeError, FileNotFoundError, IsADirectoryError) as error:
        problem = f"the key {error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{meta_path}: {problem}; delete {path} and run: {command}") from None
    if train_tokens is None:
        return data
    train, count = data.train, len(data.train.tokens)
    if train_tokens > count:
        raise ValueError(
            f"data.train_tokens: found {train_tokens:,}, but train has {count:,} tokens"
        )
    digest = f"{train.sha256}:{train_tokens}"
    shortened = replace(train, tokens=train.tokens[:train_tokens], sha256=digest)
    return replace(data, train=shortened)


def _check_hash(path: Path, expected: str) -> None:
    actual = sha256_of(path)
    if actual != expected:
        raise ValueError(f"{path.name}: found sha256 {actual[:12]}..., expected {expected[:12]}...")


def _load_split(path: Path, name: str, meta: dict[str, Any], vocab_size: int) -> Split:
    file = path / meta["file"]
    size, count = file.stat().st_size, int(meta["tokens"])
    if size != 2 * count:
        raise ValueError(f"{file.name}: found {size:,} bytes, expected {2 * count:,}")
    if count == 0:
        raise ValueError(f"{file.name}: found an empty split, expected tokens")
    _check_hash(file, meta["sha256"])
    tokens = np.memmap(file, dtype="<u2", mode="r")
    largest = int(tokens.max())
    if largest >= vocab_size:
        raise ValueError(f"{file.name}: found the id {largest}, expected ids below {vocab_size}")
    documents_path = path / f"{name}_documents.npy"
    _check_hash(documents_path, meta["documents_sha256"])
    documents = np.load(documents_path, allow_pickle=False)
    return Split(tokens=tokens, documents=documents, sha256=meta["sha256"])


def outside_texts(corpus: Path, name: str) -> tuple[list[str], str]:
    """The documents of a split of another corpus directory, and its hash; ValueError where it is
    not what its source.json says."""
    file = corpus / f"{name}.jsonl"
    try:
        sha256 = read_source(corpus, [name])["splits"][name]["sha256"]
        check_split(file, sha256)
        texts = list(read_texts(file))
        if not any(texts):
            raise ValueError(f"{file}: found no text")
    except ValueError as error:
        raise ValueError(
            f"evaluation.outside_dir: found no sound split {name!r} ({error}), expected a corpus "
            "directory; make it again, or leave the key out"
        ) from None
    return texts, sha256


def outside_split(corpus: Path, name: str, tokenizer_path: Path, eot_id: int) -> Split:
    """`outside_texts`, encoded with the run's own tokenizer."""
    texts, sha256 = outside_texts(corpus, name)
    tokenizer = load_tokenizer(tokenizer_path)
    ids = [entry.ids for entry in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    starts = np.cumsum([0] + [len(row) + 1 for row in ids[:-1]])
    sizes = np.array([(len(text.encode()), len(text.split())) for text in texts], dtype=np.int64)
    return Split(
        tokens=np.concatenate([np.array([eot_id, *row], dtype=np.uint16) for row in ids]),
        documents=np.column_stack((starts, sizes)),
        sha256=sha256,
    )


def epoch_orders(count: int, seed: int) -> Callable[[int], NDArray[np.int64]]:
    """The order in which an epoch reads `count` things, drawn afresh from the seed."""

    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng([seed, epoch]).permutation(count)

    return order


class Windows:
    """Training windows of T + 1 tokens, permuted afresh in each epoch from the seed.

    The batch of a step depends on (seed, step) alone: a resumed run needs only its step number,
    and every variant with one seed sees the same data in the same order.
    """

    def __init__(
        self, tokens: NDArray[np.uint16], *, batch_size: int, seq_len: int, seed: int
    ) -> None:
        self._tokens = tokens
        self._batch_size, self._seq_len = batch_size, seq_len
        self.count = (len(tokens) - 1) // seq_len
        if self.count < batch_size:
            raise ValueError(
                f"training.batch_size: found {batch_size} sequences of {seq_len} tokens, but the "
                f"train split has {self.count}; expected at least one batch, so lower batch_size "
                "or use a larger corpus"
            )
        self._order = epoch_orders(self.count, seed)

    def batch(self, step: int) -> NDArray[np.int64]:
        """(B, T + 1) token ids of optimizer step `step` (from 0)."""
        positions = np.arange(step * self._batch_size, (step + 1) * self._batch_size)
        epochs, offsets = positions // self.count, positions % self.count
        index = np.empty(self._batch_size, dtype=np.int64)
        for epoch in np.unique(epochs):
            in_epoch = epochs == epoch
            index[in_epoch] = self._order(int(epoch))[offsets[in_epoch]]
        columns = np.arange(self._seq_len + 1)
        return self._tokens[index[:, None] * self._seq_len + columns].astype(np.int64)


def consecutive_windows(
    tokens: NDArray[np.uint16], *, limit: int, seq_len: int
) -> NDArray[np.int64]:
    """(B, T + 1): the first `limit` tokens of a split, cut without overlap of targets."""
    count = min(limit, len(tokens) - 1) // seq_len
    if count < 1:
        raise ValueError(
            f"training.dev_tokens: found {limit:,} of the validation split's {len(tokens):,} "
            f"tokens, expected one window of training.seq_len + 1 = {seq_len + 1} at least, so "
            "lower seq_len, raise dev_tokens or use a larger corpus"
        )
    starts = np.arange(count)[:, None] * seq_len
    return tokens[starts + np.arange(seq_len + 1)].astype(np.int64)
