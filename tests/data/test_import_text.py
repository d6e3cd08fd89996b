"""A user's own files become a corpus: every text once, in the split of its hash, or a refusal."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.data import import_text
from src.data.corpus import check_split, read_source, read_texts
from tests.data import hashes, prose, refused, run

SHARES = ("--validation", "0.2", "--test", "0.2")
TEXTS = [f"{prose(seed, 40)}\n" for seed in range(60)]
DATES = [f"2024-01-{day:02d}" for day in range(1, 11)]  # texts, whatever they look like


def zstd(data: bytes) -> bytes:
    return pa.compress(data, "zstd", asbytes=True)


def lines(texts: list[Any], column: str = "text") -> bytes:
    return "".join(json.dumps({"id": 1, column: text}) + "\n" for text in texts).encode()


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Sixty texts and ten dates in files of every kind, two of the texts twice."""
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    for number in range(10):
        (folder / f"{number}.txt").write_text(TEXTS[number])
    (folder / "deep" / "10.TXT").write_bytes(b"\xef\xbb\xbf" + TEXTS[10].encode())
    (folder / "deep" / "11.txt.gz").write_bytes(gzip.compress(TEXTS[11].encode()))
    (folder / "deep" / "12.txt.zst").write_bytes(zstd(TEXTS[12].encode()))
    (folder / "a.jsonl").write_bytes(lines(TEXTS[13:25]) + b"\n" + lines([None, " \n"]))
    (folder / "b.jsonl.gz").write_bytes(
        gzip.compress(lines(TEXTS[25:30])) + gzip.compress(lines(TEXTS[30:40]))
    )
    (folder / "c.jsonl.zst").write_bytes(zstd(lines(DATES + TEXTS[:2])))
    pq.write_table(pa.table({"text": TEXTS[40:], "n": range(20)}), folder / "d.parquet")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    (folder / ".hidden.txt").write_text("not read")
    return folder


def test_every_text_is_in_the_split_of_its_hash_and_copies_stay_together(
    texts: Path, tmp_path: Path
) -> None:
    output = tmp_path / "new" / "mine"
    arguments = ("--input", texts, "--output", output, *SHARES)
    printed = run("import_text.py", *arguments)
    assert "left out 1 files of other kinds (1 .png)" in printed
    assert "left out 2 documents without a visible character" in printed
    source = read_source(output)
    texts_by_split = {}
    for split, facts in source["splits"].items():
        check_split(output / f"{split}.jsonl", facts["sha256"])
        texts_by_split[split] = list(read_texts(output / f"{split}.jsonl"))
        assert facts["documents"] == len(texts_by_split[split]) > 0
        assert facts["bytes"] == sum(len(text.encode()) for text in texts_by_split[split])
        assert facts["words"] == sum(len(text.split()) for text in texts_by_split[split])
        for text in texts_by_split[split]:
            position = int(hashlib.sha256(text.encode()).hexdigest()[:12], 16) / 2**48
            expected = "validation" if position < 0.2 else "test" if position >= 0.8 else "train"
            assert split == expected
    everything = sum(texts_by_split.values(), [])
    assert sorted(everything) == sorted(TEXTS + TEXTS[:2] + DATES)
    assert str(tmp_path) not in (output / "source.json").read_text()

    before = hashes(output)
    assert "nothing to do" in run("import_text.py", *arguments)
    run("import_text.py", "--input", texts, "--output", tmp_path / "elsewhere" / "mine", *SHARES)
    assert hashes(tmp_path / "elsewhere" / "mine") == before
    # What was printed as the next command, with entries that this little can fill.
    next_command = printed.partition("python scripts/")[2].splitlines()[0].split()
    assert next_command[:3] == ["preprocess_lm.py", "--input", str(output)]
    next_command[4] = "300"
    run(*next_command)

    (texts / "0.txt").write_text(TEXTS[0] + "more")
    assert "--force" in refused("import_text.py", *arguments)
    assert hashes(output) == before
    run("import_text.py", *arguments, "--force")
    assert hashes(output) != before and list((output).glob(".partial")) == []


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.txt", b"fine\nna\xefve", "a.txt: line 2: found the byte 0xef"),
        ("a.txt", "utf 16".encode("utf-16-le"), "a.txt: line 1: found the byte 0x00"),
        ("a.txt.gz", gzip.compress(TEXTS[0].encode())[:-9], "a damaged or cut gzip file"),
        ("a.txt.zst", zstd(TEXTS[0].encode())[:-9], "a damaged or cut zstd file"),
        ("a.jsonl.gz", b"no such thing", "a damaged or cut gzip file"),
        ("a.jsonl", lines(["fine"]) + b"{\n", "a.jsonl: line 2: found no JSON"),
        ("a.jsonl", lines(["fine"]) + b'{"text": "\xff"}', "line 2: found no JSON in UTF-8"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl: line 1: found no JSON"),
        ("a.jsonl", b'["text"]\n', "line 1: found list, expected an object"),
        ("a.jsonl", lines(["fine"] * 20_000 + [7]), "a.jsonl: line 20001: text: found 7"),
        ("a.jsonl", lines(["fine"], "body"), "found the keys id, body"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1: text: found half of a character"),
        ("a.parquet", b"PAR1", "a.parquet, split input: found a damaged file"),
        ("a.parquet", {"body": ["x"]}, "a.parquet: found the columns body"),
        ("a.parquet", {"text": [1]}, "column text: found int64, expected text"),
        ("a.txt", b"the only one", "found 1 documents, none of them for"),
        ("a.json", b"[]", "found no texts in"),
    ],
)  # fmt: skip
def test_what_is_no_text_is_refused_with_file_and_place(
    tmp_path: Path, name: str, data: Any, expected: str
) -> None:
    (tmp_path / "in").mkdir()
    if isinstance(data, dict):
        pq.write_table(pa.table(data), tmp_path / "in" / name)
    else:
        (tmp_path / "in" / name).write_bytes(data)
    message = refused("import_text.py", "--input", tmp_path / "in", "--output", tmp_path / "out")
    assert expected in message
    if "columns" in expected or "keys" in expected:
        assert "--text_column" in message
    assert [path.name for path in tmp_path.glob("out/*") if path.name != ".lock"] == []


def test_a_named_column_and_a_separator(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS[:20], "body"))
    (tmp_path / "b.txt").write_text("\n<|end|>\n".join(TEXTS[20:]) + "<|end|>\n")
    run(
        "import_text.py",
        *("--input", tmp_path / "a.jsonl", tmp_path / "b.txt", "--output", tmp_path / "mine"),
        *("--text_column", "body", "--separator", "<|end|>", *SHARES),
    )
    written = [
        text for split in ("train", "validation", "test")
        for text in read_texts(tmp_path / "mine" / f"{split}.jsonl")
    ]  # fmt: skip
    assert sorted(t.strip("\n") for t in TEXTS) == sorted(t.strip("\n") for t in written)


def test_a_separator_in_no_file_is_said_and_a_file_named_twice_is_read_once(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_bytes(text.encode() + b"\r\n\r\nand more")
    twice = ("import_text.py", "--input", folder, folder / "5.txt", *SHARES)
    printed = run(*twice, "--output", tmp_path / "one", "--separator", r"\n\n")
    assert r"'\n\n' stands in no file" in printed
    splits = read_source(tmp_path / "one")["splits"]
    assert sum(facts["documents"] for facts in splits.values()) == len(TEXTS)
    printed = run(*twice, "--output", tmp_path / "two", "--separator", r"\r\n\r\n")
    assert "stands in no file" not in printed


@given(
    st.lists(st.text("ab\n", max_size=6)), st.sampled_from(["--", "\n\n", "-"]), st.integers(1, 9)
)
def test_separators_are_found_wherever_blocks_end(pieces: list[str], separator: str, block: int):
    data = separator.join(pieces).encode()
    expected = data.split(separator.encode())
    stream = io.BufferedReader(io.BytesIO(data))
    with mock.patch.object(import_text, "BLOCK_BYTES", block):
        assert list(import_text.split_stream(stream, separator.encode())) == expected


def test_shares_that_leave_a_split_empty_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS[:12]))
    arguments = ("--input", tmp_path / "a.jsonl", "--output", tmp_path / "mine")
    message = refused("import_text.py", *arguments, "--validation", 0.001, "--test", 0.001)
    assert "12 documents, none of them for" in message
    assert "raise --validation and --test" in message
    for wrong in ("0", "1", "nan", "-0.1"):
        assert "--validation" in refused("import_text.py", *arguments, "--validation", wrong)


def test_few_held_out_documents_are_said(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS))
    shares = ("--validation", 0.1, "--test", 0.6)
    printed = run(
        "import_text.py", "--input", tmp_path / "a.jsonl", "--output", tmp_path / "x", *shares
    )
    assert re.findall(r"(\w+): \d+ documents are few", printed) == ["validation"]


def test_nothing_of_the_users_is_written_over(texts: Path, tmp_path: Path) -> None:
    before = hashes(texts)
    for script, arguments in {
        "import_text.py": ("--input", texts / "a.jsonl"),
        "download_wikitext.py": ("--mirror", tmp_path),
        "make_corpus.py": (),
        "download_smallbench.py": ("--mirror", tmp_path),
    }.items():
        message = refused(script, *arguments, "--output", texts, "--force")
        assert "files of other origin" in message
    inside = refused("import_text.py", "--input", texts, "--output", texts / "new")
    assert "lies inside" in inside
    assert "found nothing at" in refused("import_text.py", "--input", "no", "--output", "x")
    both = (texts / "a.jsonl", texts / "picture.png")
    other = refused("import_text.py", "--input", *both, "--output", tmp_path / "x")
    assert "picture.png: found another kind" in other
    assert hashes(texts) == before and not (texts / "new").exists()


def test_preprocessing_a_folder_of_texts_names_the_command_that_imports_it(texts: Path) -> None:
    arguments = ("--vocab_size", 300, "--output", texts.parent / "t")
    for given_path in (texts, texts / "a.jsonl"):
        message = refused("preprocess_lm.py", "--input", given_path, *arguments)
        assert f"import_text.py --input {given_path} --output data/mine" in message
        assert "download_wikitext" not in message
