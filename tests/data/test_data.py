"""Tokens: batches are a pure function of (seed, step), and damaged directories are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.data import tokens as data
from src.data.corpus import read_texts
from src.data.tokens import Windows, consecutive_windows
from tests.conftest import VOCAB
from tests.data import sha256

TOKENS = np.arange(3 * 7 * 5 + 1, dtype=np.uint16)  # its value is its place


def windows(seed: int = 0, batch_size: int = 4, seq_len: int = 5) -> Windows:
    return Windows(TOKENS, batch_size=batch_size, seq_len=seq_len, seed=seed)


# --------------------------------------------------------------------------------------- windows


def test_a_window_is_consecutive_and_holds_its_targets():
    batch = windows().batch(0)
    assert batch.shape == (4, 6) and batch.dtype == np.int64
    assert (np.diff(batch, axis=1) == 1).all() and (batch[:, 0] % 5 == 0).all()


def test_a_batch_depends_on_seed_and_step_alone():
    one, other = windows(3), windows(3)
    forward = [one.batch(step) for step in range(30)]
    backward = [other.batch(step) for step in reversed(range(30))][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(forward, backward, strict=True))
    resumed = windows(3)
    assert all(np.array_equal(resumed.batch(step), forward[step]) for step in range(17, 30))
    assert not np.array_equal(windows(4).batch(0), forward[0])


@settings(max_examples=40)
@given(seed=st.integers(0, 2**31 - 1), batch_size=st.integers(1, 21), seq_len=st.integers(2, 5))
def test_each_epoch_reads_every_window_once(seed, batch_size, seq_len):
    reader = Windows(TOKENS, batch_size=batch_size, seq_len=seq_len, seed=seed)
    steps = -(-3 * reader.count // batch_size)
    starts = np.concatenate([reader.batch(step)[:, 0] for step in range(steps)])
    for epoch in range(3):
        seen = starts[epoch * reader.count : (epoch + 1) * reader.count]
        assert sorted(seen) == [seq_len * i for i in range(reader.count)]


def test_epochs_differ_in_order():
    reader = windows(batch_size=21)
    assert not np.array_equal(reader.batch(0), reader.batch(1))


def test_batches_do_not_depend_on_the_global_generator():
    np.random.seed(1)
    first = windows().batch(2)
    np.random.seed(2)
    assert np.array_equal(first, windows().batch(2))


def test_a_split_smaller_than_one_batch_is_refused():
    assert windows(batch_size=21).count == 21  # exactly one batch
    with pytest.raises(ValueError, match=r"training\.batch_size: found 22 .* has 21; expected"):
        windows(batch_size=22)
    with pytest.raises(ValueError, match="has 0"):
        Windows(TOKENS[:5], batch_size=1, seq_len=5, seed=0)


def test_dev_windows_are_the_first_tokens_each_target_once():
    batch = consecutive_windows(TOKENS, limit=23, seq_len=5)
    assert batch.shape == (4, 6) and batch.dtype == np.int64
    assert batch[:, 1:].flatten().tolist() == list(range(1, 21))
    assert len(consecutive_windows(TOKENS, limit=10**9, seq_len=5)) == 21
    with pytest.raises(ValueError, match=r"training\.dev_tokens: found 4 .* at least, so"):
        consecutive_windows(TOKENS, limit=4, seq_len=5)


# --------------------------------------------------------------------------------- the directory


@pytest.fixture
def token_dir(token_root: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(token_root / f"v{VOCAB}", tmp_path / "tokens" / f"v{VOCAB}"))


def edit_meta(path: Path, change: Any) -> None:
    meta = json.loads((path / "meta.json").read_text())
    change(meta)
    (path / "meta.json").write_text(json.dumps(meta))


def refusal(path: Path, vocab_size: int = VOCAB) -> str:
    with pytest.raises(ValueError) as caught:
        data.load(path, vocab_size)
    message = str(caught.value)
    assert f"python scripts/preprocess_lm.py --input CORPUS --vocab_size {vocab_size}" in message
    assert f"--output {path.parent}" in message
    return message


def test_a_sound_directory_loads(token_dir):
    tokens = data.load(token_dir, VOCAB)
    assert tokens.vocab_size == VOCAB and tokens.eot_id == 0
    assert tokens.corpus["dataset"] == "tests/tiny"
    assert tokens.tokenizer_sha256 == sha256(tokens.tokenizer_path)
    for split in (tokens.train, tokens.validation, tokens.test):
        assert split.documents.shape[1] == 3
        assert (split.tokens[split.documents[:, 0]] == 0).all()
        assert (split.tokens == 0).sum() == len(split.documents)
        assert int(split.tokens.max()) < VOCAB
    assert len(tokens.sha256) == 64
    assert isinstance(tokens.train.tokens, np.memmap)


def test_missing_tokens_name_the_command(tmp_path):
    message = refusal(tmp_path / "tokens" / "v999", 999)
    assert "data.dir" in message and "meta.json is missing" in message


@pytest.mark.parametrize("file", ["train.bin", "tokenizer.json", "validation_documents.npy"])
def test_a_file_that_is_not_as_it_was_is_refused(token_dir, file):
    """One flipped bit, another size where that is stated, none, a directory in its place."""
    path = token_dir / file
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    path.write_bytes(flipped)
    assert f"{file}: found sha256" in refusal(token_dir)
    for length in (len(whole) - 1, len(whole) - 2, 0) if file == "train.bin" else ():
        path.write_bytes(whole[:length])
        message = refusal(token_dir)
        assert "train.bin: found" in message and f"expected {len(whole):,}" in message
    path.unlink()
    assert file in refusal(token_dir)
    path.mkdir()
    assert file in refusal(token_dir)


def test_an_id_outside_the_vocabulary_is_refused(token_dir):
    tokens = np.fromfile(token_dir / "validation.bin", dtype="<u2")
    tokens[7] = VOCAB
    tokens.tofile(token_dir / "validation.bin")

    def change(meta):
        meta["splits"]["validation"]["sha256"] = sha256(token_dir / "validation.bin")

    edit_meta(token_dir, change)
    message = refusal(token_dir)
    assert f"validation.bin: found the id {VOCAB}, expected ids below {VOCAB}" in message


def test_an_empty_split_is_refused(token_dir):
    (token_dir / "test.bin").write_bytes(b"")
    edit_meta(token_dir, lambda meta: meta["splits"]["test"].update(tokens=0))
    assert "test.bin: found an empty split" in refusal(token_dir)


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda meta: meta.update(vocab_size=301), "vocab_size: found 301, expected 300"),
        (lambda meta: meta.pop("tokenizer_sha256"), "'tokenizer_sha256' is missing"),
        (lambda meta: meta["splits"].pop("test"), "'test' is missing"),
        (lambda meta: meta.update(splits=[]), "meta.json"),
        (lambda meta: meta["splits"]["train"].update(tokens="x"), "meta.json"),
        (lambda meta: meta.update(eot_id="x"), "meta.json"),
        (lambda meta: meta.update(eot_id=None), "meta.json"),
    ],
)
def test_a_damaged_manifest_is_refused(token_dir, damage, word):
    edit_meta(token_dir, damage)
    assert word in refusal(token_dir)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b'"x"', b"null", b"\xff"])
def test_a_manifest_that_is_no_object_is_refused(token_dir, content):
    (token_dir / "meta.json").write_bytes(content)
    assert "meta.json" in refusal(token_dir)


def test_a_null_text_is_an_empty_document(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": null}\n{"text": "a"}\n')
    assert list(read_texts(tmp_path / "train.jsonl")) == ["", "a"]


def test_a_part_of_train_has_a_digest_of_its_own(token_root: Path) -> None:
    whole = data.load(token_root / "v300", 300)
    part = data.load(token_root / "v300", 300, train_tokens=500)
    assert part.train.tokens.tolist() == whole.train.tokens[:500].tolist()
    assert part.sha256 != whole.sha256 and part.validation.sha256 == whole.validation.sha256
    assert data.Windows(part.train.tokens, batch_size=3, seq_len=16, seed=0).count == 31
    with pytest.raises(ValueError, match="data.train_tokens: found 9,999,999, but train has"):
        data.load(token_root / "v300", 300, train_tokens=9_999_999)
