"""The tokenizer script: exact tokens, the same bytes from every call, refusals with their place."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from src.data import tokenization
from src.data.tokenizer import load_tokenizer
from tests.data import hashes, prose, refused, run, run_alone, sha256, small_corpus, start, texts_of


def test_tokens_are_the_tokenizers_own_and_documents_stay_documents(
    tokens: Path, wikitext: Path
) -> None:
    meta = json.loads((tokens / "meta.json").read_bytes())
    tokenizer = Tokenizer.from_file(str(tokens / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == meta["vocab_size"] == 600
    assert tokenizer.token_to_id("<|endoftext|>") == meta["eot_id"] == 0
    assert meta["tokenizer_sha256"] == sha256(tokens / "tokenizer.json")
    assert meta["corpus"] == json.loads((wikitext / "source.json").read_bytes())
    for split, facts in meta["splits"].items():
        assert facts["sha256"] == sha256(tokens / facts["file"])
        assert facts["documents_sha256"] == sha256(tokens / f"{split}_documents.npy")
        stream = np.fromfile(tokens / facts["file"], dtype="<u2")
        documents = np.load(tokens / f"{split}_documents.npy")
        texts = texts_of(wikitext / f"{split}.jsonl")
        expected = [[0, *tokenizer.encode(text, add_special_tokens=False).ids] for text in texts]
        assert stream.tolist() == [token for ids in expected for token in ids]
        assert documents.dtype == np.int64
        offsets = np.cumsum([0] + [len(ids) for ids in expected])
        sizes = [[len(text.encode()), len(text.split())] for text in texts]
        assert documents.tolist() == [[o, *s] for o, s in zip(offsets[:-1], sizes, strict=True)]
        assert facts["documents"] == len(texts) and facts["tokens"] == offsets[-1]
        assert facts["text_tokens"] == facts["tokens"] - len(texts)
        assert [facts["bytes"], facts["words"]] == np.sum(sizes, axis=0).tolist()
        assert tokenizer.decode(expected[0][1:]) == texts[0]


def test_odd_texts_are_tokenized_exactly(tmp_path: Path) -> None:
    """Chunks are joined to what the tokenizer gives for the whole text, whatever is in it."""
    rng = random.Random(3)
    spaces = [" ", "  ", "\n", " \n", "\t", "\r\n", "\u00a0", "\u2028", "\u3000", "\x1c", "\x85"]
    marks = ["a", "Né", "don't", "12", "½", "ⅷ", "!", "'s", "\u200b", "\u180e", "语", "🙂", "\x00"]
    odd = ["".join(rng.choices(spaces + marks, k=60)) for _ in range(150)]
    odd += ["", " ", "\n\n", "x <|endoftext|> y", prose(1, 70_000), "z" * 250_000]
    # No spaces for longer than a piece, then again text.
    odd.append("q" * 210_000 + " " + prose(2, 300))
    corpus = small_corpus(tmp_path / "corpus", test=odd)
    run("preprocess_lm.py", "--input", corpus, "--vocab_size", 400, "--output", tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "v400" / "tokenizer.json"))
    tokenizer.encode_special_tokens = True  # a text that spells it is a text
    expected = [[0, *tokenizer.encode(text, add_special_tokens=False).ids] for text in odd]
    stream = np.fromfile(tmp_path / "v400" / "test.bin", dtype="<u2")
    assert stream.tolist() == [token for ids in expected for token in ids]
    assert np.count_nonzero(stream == 0) == len(odd)


def test_merges_are_learned_from_parts_of_endless_words(tmp_path: Path) -> None:
    """So no token is as long as the word; encoding is the whole word's. Kinds of characters that
    take turns make no endless word."""
    endless = "-" * 2_500 + " " * 1_200 + "x" + "語" * 20_000
    train = ["ab12--" * 400, *(prose(seed) for seed in range(5)), f"{prose(8)} {endless}"]
    corpus = small_corpus(tmp_path / "corpus", train=train)
    printed = run("preprocess_lm.py", "--input", corpus, "--vocab_size", 400, "--output", tmp_path)
    assert "1 documents have runs of 1,000 characters of a kind, the first in line 7" in printed
    _, _, after = printed.partition("are learned from parts")
    assert "merging pairs into a vocabulary" in after
    tokenizer = load_tokenizer(tmp_path / "v400" / "tokenizer.json")
    assert max(map(len, tokenizer.get_vocab())) <= 3 * 1_000  # three bytes a character
    ids = np.fromfile(tmp_path / "v400" / "train.bin", dtype="<u2")
    expected = tokenizer.encode(train[-1], add_special_tokens=False).ids
    assert ids[-len(expected) :].tolist() == expected


def test_chunks_are_forgotten_when_there_are_too_many(
    tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenization, "KNOWN_CHUNKS", 2)
    tokenizer = load_tokenizer(tokens / "tokenizer.json")
    encode = tokenization.encoder(tokenizer)
    for text in ("one two three four", "four three", "", "one two"):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert encode(text) == np.array(ids, dtype="<u2").tobytes()


def test_same_corpus_same_bytes_whatever_the_cores(
    tmp_path: Path, wikitext: Path, tokens: Path
) -> None:
    environment = {"RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "1"}
    arguments = ("--input", wikitext, "--vocab_size", 600, "--output", tmp_path)
    run_alone("preprocess_lm.py", *arguments, **environment)
    assert len(hashes(tokens)) == 8 and hashes(tmp_path / "v600") == hashes(tokens)


def test_the_tokenizer_is_trained_on_the_train_split_only(tmp_path: Path) -> None:
    tokenizers = []
    for name, held_out in (("one", "zzzzzz yyyyyy " * 500), ("two", prose(9))):
        corpus = small_corpus(tmp_path / name, validation=[held_out], test=[held_out])
        run("preprocess_lm.py", "--input", corpus, "--vocab_size", 300, "--output", corpus / "t")
        tokenizers.append(sha256(corpus / "t" / "v300" / "tokenizer.json"))
    assert tokenizers[0] == tokenizers[1]


def test_vocabularies_live_side_by_side_and_a_second_call_changes_nothing(tmp_path: Path) -> None:
    corpus = small_corpus(tmp_path / "corpus")

    def preprocess(size: int) -> str:
        arguments = ("--input", corpus, "--vocab_size", size, "--output", tmp_path / "t")
        return run("preprocess_lm.py", *arguments)

    preprocess(257)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "t" / "v257").iterdir()}
    preprocess(300)
    assert "nothing to do" in preprocess(257)
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "t" / "v257").iterdir()}
    assert before == after
    assert sorted(path.name for path in (tmp_path / "t").glob("v*")) == ["v257", "v300"]


def test_a_vocabulary_the_text_cannot_fill_is_refused_with_the_largest_it_can(
    tmp_path: Path,
) -> None:
    corpus = small_corpus(tmp_path / "corpus", train=["abc abd " * 40])
    common = ("preprocess_lm.py", "--input", corpus, "--output", tmp_path / "t", "--vocab_size")
    message = refused(*common, 5000)
    feasible = int(message.partition("at most ")[2].split()[0])
    assert 257 < feasible < 300 and not (tmp_path / "t" / "v5000").exists()
    refused(*common, feasible + 1)
    run(*common, feasible)
    tokenizer = Tokenizer.from_file(str(tmp_path / "t" / f"v{feasible}" / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == feasible


@pytest.mark.parametrize("size", ["256", "65536", "0", "-5", "16k", "1e4"])
def test_vocabulary_sizes_that_are_none(tmp_path: Path, size: str) -> None:
    corpus = small_corpus(tmp_path / "corpus")
    arguments = ("--input", corpus, "--vocab_size", size, "--output", tmp_path / "t")
    assert size in refused("preprocess_lm.py", *arguments)
    assert not (tmp_path / "t").exists()


def replace_bytes(file: Path, data: bytes, *, seal: bool) -> None:
    """Overwrite a split; `seal` also corrects source.json, so that only the content is wrong."""
    file.write_bytes(data)
    if seal:
        path = file.with_name("source.json")
        source = json.loads(path.read_bytes())
        source["splits"][file.stem]["sha256"] = sha256(file)
        path.write_text(json.dumps(source))


def test_bad_corpora_are_refused_with_file_and_place(tmp_path: Path) -> None:
    start_of_line = b'{"text": "' + "é".encode() * 800_000  # beyond one block of reading
    cases: list[tuple[str, bytes, bool, str]] = [
        ("train", start_of_line + b'\xff"}\n', True, f"byte {len(start_of_line)}"),
        ("test", start_of_line + b'\xff"}\n', False, f"byte {len(start_of_line)}"),
        ("test", b'{"text": "cut \xc3', True, "byte 14"),
        ("validation", b"", True, "empty split"),
        ("test", b'{"text": ""}\n', True, "no text"),
        ("test", b'{"text": "changed"}\n', False, "sha256"),
        ("train", b'{"text": "fine"}\n{"text": 3}\n', True, "line 2"),
        ("train", b'{"text": "fine"}\nno json\n', True, "line 2"),
        ("test", b'{"text": "half \\ud800"}\n', True, "line 1"),
    ]
    for i, (split, data, seal, expected) in enumerate(cases):
        corpus = small_corpus(tmp_path / str(i))
        replace_bytes(corpus / f"{split}.jsonl", data, seal=seal)
        arguments = ("--input", corpus, "--vocab_size", 300, "--output", tmp_path / "t")
        message = refused("preprocess_lm.py", *arguments)
        assert f"{split}.jsonl" in message and expected in message
        assert not list((tmp_path / "t").glob("v*")) and not list(
            (tmp_path / "t").glob(".*partial")
        )


def test_an_unfinished_corpus_and_anothers_tokens_are_refused(tmp_path: Path) -> None:
    corpus = small_corpus(tmp_path / "corpus")
    other = small_corpus(tmp_path / "other", train=[prose(11, 900)])
    common = ("--vocab_size", 300, "--output", tmp_path / "t")
    run("preprocess_lm.py", "--input", corpus, *common)
    before = hashes(tmp_path / "t" / "v300")
    assert "--force" in refused("preprocess_lm.py", "--input", other, *common)
    assert hashes(tmp_path / "t" / "v300") == before
    run("preprocess_lm.py", "--input", other, *common, "--force")
    assert hashes(tmp_path / "t" / "v300") != before

    with (tmp_path / "t" / "v300" / "train.bin").open("r+b") as file:
        file.truncate(100)
    assert "train.bin" in refused("preprocess_lm.py", "--input", other, *common)

    (other / "validation.jsonl").unlink()
    assert "validation.jsonl" in refused("preprocess_lm.py", "--input", other, *common, "--force")
    (other / "source.json").unlink()
    assert "source.json" in refused("preprocess_lm.py", "--input", other, *common)


def test_the_holder_of_the_lock_is_killed_and_the_next_call_starts_clean(
    tmp_path: Path, wikitext: Path
) -> None:
    arguments = ("--input", wikitext, "--vocab_size", 500, "--output", tmp_path / "t")
    process = start("preprocess_lm.py", *arguments)
    while not (tmp_path / "t" / ".v500.partial").exists():
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert not (tmp_path / "t" / "v500").exists()
    run("preprocess_lm.py", *arguments)
    assert (tmp_path / "t" / "v500" / "meta.json").exists()
    assert not (tmp_path / "t" / ".v500.partial").exists()


def test_the_tokenizers_help_says_where_tokens_go_and_what_is_replaced() -> None:
    printed = " ".join(run("preprocess_lm.py", "--help").split())
    assert "tokens go to OUTPUT/v<entries>" in printed
    assert "replace tokens of another corpus, or damaged ones" in printed


def test_what_cannot_be_written_exits_74(tmp_path: Path) -> None:
    corpus = small_corpus(tmp_path / "corpus")
    long_name = tmp_path / ("x" * 300)
    arguments = ("--input", corpus, "--vocab_size", 300, "--output", long_name)
    assert "x" * 300 in run("preprocess_lm.py", *arguments, exit_code=74)
