"""Damaged, incomplete and odd datasets: refused in a sentence, or read as far as needed."""

from __future__ import annotations

import datetime
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from src.data import download_corpus, download_instructions, download_tasks, hub
from src.data.tasks import load_items, load_tasks
from src.spec.command_line import Refusal

ROWS = [{"text": f"text {i}", "prompt": f"prompt {i}", "response": "yes"} for i in range(60)]
MAP = pa.array([[("a", 1)]] * 30, pa.map_(pa.string(), pa.int64()))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The only configuration of the mirror's `a/b`, its train split in two files."""
    folder = tmp_path / "mirror" / "a" / "b" / "default"
    folder.mkdir(parents=True)
    for shard in range(2):
        write(folder / f"train-{shard:05d}-of-00002.parquet", ROWS[30 * shard : 30 * shard + 30])
    return folder


def write(file: Path, rows: list[dict[str, Any]], **columns: Any) -> None:
    table = pa.Table.from_pylist(rows)
    for name, values in columns.items():
        table = table.drop([name]) if name in table.schema.names else table
        table = table.append_column(name, values)
    pq.write_table(table, file)


def corpus(folder: Path, splits: Sequence[str] = ("train",)) -> list[str]:
    mirror, output = folder.parents[2], folder.parents[3] / "corpus"
    output.mkdir()
    download_corpus.download("a/b", splits, mirror, output)
    lines = (output / "train.jsonl").read_bytes().splitlines()
    return [json.loads(line)["text"] for line in lines]


def instructions(folder: Path) -> int:
    mirror, output = folder.parents[2], folder.parents[3] / "instructions"
    output.mkdir()
    download_instructions.download("a/b", mirror, output)
    return sum(len((output / f"{name}.jsonl").read_bytes().splitlines())
               for name in ("train", "validation"))  # fmt: skip


def tasks(folder: Path) -> int:
    mirror, output = folder.parents[2], folder.parents[3] / "tasks"
    output.mkdir()
    path = folder.parents[3] / "tasks.yaml"
    task = {"name": "t", "path": "a/b", "config": "default", "split": "train"}
    task |= {"prompt": "{{ prompt }}", "choices": ["{{ text }}", "no"], "gold": "0"}
    path.write_text(yaml.safe_dump({"tasks": [task]}))
    loaded = load_tasks(path)
    download_tasks.download(loaded, {}, mirror, output)
    return len(load_items(loaded[0], output, full=True) or [])


KINDS: dict[str, Callable[[Path], Any]] = {
    "corpus": corpus, "instructions": instructions, "tasks": tasks,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_whole_splits_are_read(folder: Path, kind: str) -> None:
    rows = KINDS[kind](folder)
    assert (len(rows) if isinstance(rows, list) else rows) == len(ROWS)


def test_a_split_that_is_named_twice_is_written_once(folder: Path) -> None:
    assert len(corpus(folder, ("train", "train"))) == len(ROWS)


def test_a_dataset_without_a_visible_character_is_named(folder: Path) -> None:
    for file in folder.iterdir():
        write(file, [{"text": " \n"}])
    with pytest.raises(Refusal, match="^a/b: found 0 documents, none of them for train"):
        corpus(folder)


def gap(folder: Path) -> None:
    (folder / "train-00000-of-00002.parquet").unlink()


def no_end(folder: Path) -> None:
    (folder / "train-00001-of-00002.parquet").unlink()


def two_generations(folder: Path) -> None:
    write(folder / "train-00000-of-00001.parquet", ROWS)


def doubled(folder: Path) -> None:
    write(folder / "train-00001-of-00002-0a1b2c.parquet", ROWS[30:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spoil", [gap, no_end, two_generations, doubled])
def test_gaps_and_mixtures_of_shards_are_refused(
    folder: Path, kind: str, spoil: Callable[[Path], None]
) -> None:
    spoil(folder)
    with pytest.raises(
        Refusal, match=r"^a/b: .*a/b/default/train: found .*of-0000.*expected each of"
    ):
        KINDS[kind](folder)


def test_a_file_that_cannot_be_counted_is_refused(folder: Path) -> None:
    write(folder / "train-more.parquet", ROWS)
    with pytest.raises(Refusal, match=r"train-more\.parquet: found this name"):
        corpus(folder)


def test_a_split_with_dashes_in_its_name_is_one_of_its_own(folder: Path) -> None:
    for i in range(2):
        write(folder / f"train-small-{i:05d}-of-00002.parquet", ROWS[i : i + 1])
    loaded, _ = hub.load("a/b", None, ("train", "train-small"), folder.parents[2], folder)
    assert [len(loaded[split]) for split in ("train", "train-small")] == [60, 2]


def rows_lost(data: bytes) -> bytes:
    """Zeros for everything but the footer, which lies before its length and the mark at the end."""
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    return b"PAR1" + b"\0" * (footer - 4) + data[footer:]


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda data: LFS, "Git LFS pointer"),
        (lambda data: b"", "empty file"),
        (lambda data: data[:-40], "damaged file"),
        (lambda data: rows_lost(data), "damaged file"),
    ],
)
def test_files_that_are_not_parquet_are_named_with_their_split(
    folder: Path, damage: Callable[[bytes], bytes], expected: str
) -> None:
    file = folder / "train-00001-of-00002.parquet"
    file.write_bytes(damage(file.read_bytes()))
    for read in KINDS.values():
        with pytest.raises(Refusal, match=rf"{file.name}, split train: found .*{expected}"):
            read(folder)


DAY = datetime.datetime(2024, 1, 2)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (pa.array([1] * 30), "int64"),
        (pa.array([["a"]] * 30), "list"),
        (pa.array([b"a"] * 30), "binary"),
        (pa.array([{"a": "b"}] * 30), "struct"),
        (pa.array([DAY] * 30), "timestamp"),
    ],
)
def test_what_is_read_must_be_text_in_every_file(
    folder: Path, values: pa.Array, dtype: str
) -> None:
    file = folder / "train-00001-of-00002.parquet"
    write(file, ROWS[30:], text=values)
    with pytest.raises(Refusal, match=rf"{file.name}, split train, column text: found {dtype}"):
        corpus(folder)
    write(file, ROWS[30:], response=values)
    with pytest.raises(Refusal, match=rf"{file.name}, split train, column response: found {dtype}"):
        instructions(folder)
    write(file, ROWS[30:], prompt=pa.array([DAY] * 30))
    with pytest.raises(Refusal, match=rf"{file.name}, split train, column prompt: found timestamp"):
        tasks(folder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "unread", [MAP, pa.array([DAY] * 30), pa.array([b"\xff"] * 30)], ids=["map", "time", "bytes"]
)
def test_columns_that_nobody_reads_are_not_in_the_way(
    folder: Path, kind: str, unread: pa.Array
) -> None:
    write(folder / "train-00000-of-00002.parquet", ROWS[:30], unread=unread)
    write(folder / "train-00001-of-00002.parquet", ROWS[30:], other=pa.array([1] * 30))
    rows = KINDS[kind](folder)
    assert (len(rows) if isinstance(rows, list) else rows) == len(ROWS)


def test_other_forms_of_text_are_texts(folder: Path) -> None:
    texts = [f"text {i}" for i in range(30, 59)] + [None]
    expected = [f"text {i}" for i in range(59)]
    for number, dtype in enumerate((pa.large_string(), pa.dictionary(pa.int8(), pa.string()))):
        file = folder / "train-00001-of-00002.parquet"
        write(file, ROWS[30:], text=pa.array(texts, pa.string()).cast(dtype))
        assert corpus(folder) == expected, number
        shutil.rmtree(folder.parents[3] / "corpus")


@pytest.mark.parametrize(
    ("readme", "licence"),
    [
        (b"---\nlicense: cc0-1.0\n---\n", "cc0-1.0"),
        (b"---\nlicense: [mit, 'cc-by-4.0']\n---\n", "mit, cc-by-4.0"),
        (b"---\nlicense: 2024-01-02\n---\n", "2024-01-02"),
        (b"---\nlicense: {a: b}\n---\n", None),
        (b"---\nlicense: [\n---\n", None),
        (b"---\nlicense: \xff\n---\n", None),
        (b"---\nlicense: mit\n", "mit"),
        (b"no header\n", None),
    ],
)
def test_a_readme_never_stands_in_the_way_of_sound_data(
    folder: Path, readme: bytes, licence: str | None
) -> None:
    (folder.parent / "README.md").write_bytes(readme)
    assert len(corpus(folder)) == len(ROWS)
    source = json.loads((folder.parents[3] / "corpus" / "source.json").read_bytes())
    assert source["licence"] == licence
