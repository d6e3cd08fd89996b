"""The download scripts and the tokenizer script, run as their users run them."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from tokenizers import Tokenizer

from src.data import tokenization
from src.data.tokenizer import load_tokenizer
from tests import ROOT
from tests.tiny_hub import COMMIT, CONVERTED_COMMIT, CONVERTED_FOLDER, tiny_hub
from tests.tiny_mirror import ARTICLES, build_tiny_mirror, write_tiny_tasks

SCRIPTS = ROOT / "scripts"
BAD_INPUT = 78
CLOSED_PORT = "http://127.0.0.1:9"


def start(script: str, *arguments: Any, cwd: Path | None = None, **env: str) -> Any:
    inherited = {k: v for k, v in os.environ.items() if k not in ("HUB_MIRROR", "HF_HUB_OFFLINE")}
    return subprocess.Popen(
        [sys.executable, "-W", "error", str(SCRIPTS / script), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=cwd,
        env={**inherited, "HF_ENDPOINT": CLOSED_PORT, **env},
    )


def run(
    script: str, *arguments: Any, exit_code: int = 0, cwd: Path | None = None, **env: str
) -> str:
    """Run a script, check its exit code, return all it printed."""
    process = start(script, *arguments, cwd=cwd, **env)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == exit_code, printed
    assert "Traceback" not in printed
    return printed


def refused(script: str, *arguments: Any, cwd: Path | None = None, **env: str) -> str:
    return run(script, *arguments, exit_code=BAD_INPUT, cwd=cwd, **env)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in folder.iterdir() if path.is_file()}


def texts_of(file: Path) -> list[str]:
    return [json.loads(line)["text"] for line in file.read_bytes().split(b"\n") if line]


def write_corpus(folder: Path, splits: Mapping[str, Sequence[str]]) -> Path:
    folder.mkdir(parents=True)
    facts = {}
    for split, texts in splits.items():
        file = folder / f"{split}.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        facts[split] = {"sha256": sha256(file)}
    source = {"dataset": "tests/handmade", "config": "default", "splits": facts}
    (folder / "source.json").write_text(json.dumps(source))
    return folder


def prose(seed: int, words: int = 400) -> str:
    rng = random.Random(seed)
    return " ".join("".join(rng.choices("abcdefgh", k=rng.randint(1, 6))) for _ in range(words))


def small_corpus(folder: Path, **replaced: Sequence[str]) -> Path:
    splits: dict[str, Sequence[str]] = {
        "train": [prose(seed) for seed in range(5)],
        "validation": [prose(6)],
        "test": [prose(7)],
    }
    return write_corpus(folder, {**splits, **replaced})


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_mirror(tmp_path_factory.mktemp("mirror"))


@pytest.fixture(scope="module")
def wikitext(tmp_path_factory: pytest.TempPathFactory, mirror: Path) -> Path:
    """The runbook's first command, on the tiny mirror; not to be written to."""
    output = tmp_path_factory.mktemp("data") / "new" / "wikitext-2"
    printed = run("download_wikitext.py", "--output", output, HUB_MIRROR=str(mirror))
    assert "wikitext-2-v1" in printed and "<unk>" in printed
    return output


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory, wikitext: Path) -> Path:
    """The runbook's second command with 600 entries; not to be written to."""
    output = tmp_path_factory.mktemp("data") / "new" / "lm_tokenized"
    run("preprocess_lm.py", "--input", wikitext, "--vocab_size", 600, "--output", output)
    return output / "v600"


# Corpora


def test_wikitext_lines_become_articles_and_nothing_is_lost(wikitext: Path, mirror: Path) -> None:
    source = json.loads((wikitext / "source.json").read_bytes())
    assert (source["dataset"], source["config"]) == ("Salesforce/wikitext", "wikitext-2-v1")
    assert source["mirror"] is True and source["revision"] is None
    assert source["licence"] == "cc0-1.0"
    for split, facts in source["splits"].items():
        file = wikitext / f"{split}.jsonl"
        texts = texts_of(file)
        rows = pq.read_table(
            mirror / "Salesforce/wikitext/wikitext-2-v1" / f"{split}-00000-of-00001.parquet"
        )
        lines = rows.column("text").to_pylist()
        # Sections and lines of formulas that look like titles start no article.
        assert len(texts) == ARTICLES[split] == facts["documents"]
        assert all(text.startswith(" = ") and text.endswith(" \n") for text in texts)
        assert " \n".join(texts).split() == "".join(lines).split()
        assert facts["words"] == sum(len(line.split()) for line in lines)
        assert facts["bytes"] == sum(len(text.encode()) for text in texts)
        assert facts["sha256"] == sha256(file)
    assert "/" not in source["config"] and str(mirror) not in (wikitext / "source.json").read_text()


def test_the_blank_lines_of_an_article_get_their_source_bytes_back(wikitext: Path) -> None:
    first = texts_of(wikitext / "test.jsonl")[0].split("\n")
    assert first[0].startswith(" = ") and first[1] == " " and first[2].endswith(" <unk> – @-@ . ")


def test_a_finished_corpus_is_verified_kept_and_replaced_only_by_force(
    tmp_path: Path, mirror: Path
) -> None:
    output = tmp_path / "corpus"
    ours = ("download_wikitext.py", "--output", output, "--mirror", mirror)
    run(*ours)
    before = hashes(output)
    # Without hub and mirror: what is there whole needs neither.
    assert "nothing to do" in run("download_wikitext.py", "--output", output)
    message = refused(*ours, "--dataset", "tiny/prose")
    assert "Salesforce/wikitext" in message and "--force" in message
    assert hashes(output) == before

    with (output / "test.jsonl").open("ab") as file:
        file.write(b"\n")
    assert "test.jsonl" in refused(*ours)
    run(*ours, "--force")
    assert hashes(output) == before

    run(*ours, "--dataset", "tiny/prose", "--force")
    assert json.loads((output / "source.json").read_bytes())["dataset"] == "tiny/prose"
    assert not (output / ".partial").exists()


def test_a_cut_download_is_not_taken_for_a_whole_one(tmp_path: Path, mirror: Path) -> None:
    output = tmp_path / "corpus"
    (output / ".partial").mkdir(parents=True)
    (output / "train.jsonl").write_text('{"text": "half"}\n')
    assert "other origin" in refused("download_wikitext.py", "--output", output, "--mirror", mirror)
    (output / ".lock").touch()  # a command of ours was here
    (output / ".partial" / "left").write_text("over")
    run("download_wikitext.py", "--output", output, "--mirror", mirror)
    assert len(texts_of(output / "train.jsonl")) == ARTICLES["train"]


def test_a_missing_split_is_named_and_never_replaced(tmp_path: Path, mirror: Path) -> None:
    output = tmp_path / "raw"
    message = refused(
        "download_wikitext.py",
        *("--output", output, "--mirror", mirror, "--dataset", "wikitext-2-raw-v1"),
    )
    assert "lacks the split train" in message
    assert "wikitext-2-v1 (test, train, validation)" in message
    assert not list(output.glob("*.json*"))
    splits = ["--splits", "validation", "test"]  # a corpus to evaluate on
    arguments = ["--output", output, "--mirror", mirror, "--dataset", "wikitext-2-raw-v1", *splits]
    run("download_wikitext.py", *arguments)
    assert sorted(path.name for path in output.glob("*.jsonl")) == [
        "test.jsonl",
        "validation.jsonl",
    ]
    assert "nothing to do" in run("download_wikitext.py", *arguments)
    assert "splits.train" in refused(
        "preprocess_lm.py", "--input", output, "--vocab_size", "300", "--output", tmp_path / "t"
    )


def test_any_text_dataset_of_the_hub_layout(tmp_path: Path, mirror: Path) -> None:
    run(
        "download_wikitext.py",
        *("--output", tmp_path / "prose", "--mirror", mirror, "--dataset", "tiny/prose:default"),
    )
    shards = sorted((mirror / "tiny/prose/default").glob("train-*.parquet"))
    rows = [text for shard in shards for text in pq.read_table(shard).column("text").to_pylist()]
    assert len(shards) == 2 and texts_of(tmp_path / "prose" / "train.jsonl") == rows


@pytest.mark.parametrize(
    ("dataset", "named"),
    [
        ("wikitext-3", "--dataset"),
        ("../../etc", "--dataset"),
        ("tiny/absent", "tiny/absent"),
        ("tiny/prose:other", "default (test, train, validation)"),
        ("nyu-mll/glue:sst2", "validation"),
        ("wikitext-103-raw-v1", "wikitext-103-raw-v1"),
    ],
)
def test_datasets_that_cannot_be_had(
    tmp_path: Path, mirror: Path, dataset: str, named: str
) -> None:
    arguments = ("--output", tmp_path / "x", "--mirror", mirror, "--dataset", dataset)
    assert named in refused("download_wikitext.py", *arguments)


def test_a_dataset_without_texts_is_refused_by_its_columns(tmp_path: Path, mirror: Path) -> None:
    for split in ("train", "validation", "test"):
        table = pq.read_table(mirror / "nyu-mll/glue/sst2/validation-00000-of-00001.parquet")
        folder = tmp_path / "mirror" / "tiny" / "labels" / "default"
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    message = refused(
        "download_wikitext.py",
        *("--output", tmp_path / "x", "--dataset", "tiny/labels"),
        HUB_MIRROR=str(tmp_path / "mirror"),
    )
    assert "sentence, label, idx" in message


@pytest.mark.parametrize("script", ["download_wikitext.py", "download_smallbench.py"])
def test_without_hub_and_mirror_the_way_out_is_named(tmp_path: Path, script: str) -> None:
    message = refused(script, "--output", tmp_path / "x")
    assert "HUB_MIRROR" in message and CLOSED_PORT in message
    offline = refused(script, "--output", tmp_path / "x", HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE" in offline
    no_address = refused(script, "--output", tmp_path / "x", HF_ENDPOINT="http://[::1")
    assert "HF_ENDPOINT: found http://[::1, expected an address" in no_address
    absent = refused(script, "--output", tmp_path / "x", HUB_MIRROR=str(tmp_path / "absent"))
    assert str(tmp_path / "absent") in absent


def test_the_hub_and_its_mirror_give_the_same_corpus(
    tmp_path: Path, mirror: Path, wikitext: Path
) -> None:
    output = tmp_path / "wikitext-2"
    with tiny_hub(mirror) as address:
        hub: dict[str, Any] = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home")}
        run("download_wikitext.py", "--output", output, **hub)
        raw = ("--output", tmp_path / "raw", "--dataset", "wikitext-2-raw-v1")
        assert "lacks the split train" in refused("download_wikitext.py", *raw, **hub)
        for name, named in (("tiny/absent", "no dataset"), ("tiny/prose:other", "'default'")):
            arguments = ("--output", tmp_path / "x", "--dataset", name)
            assert named in refused("download_wikitext.py", *arguments, **hub)
    source = json.loads((output / "source.json").read_bytes())
    of_mirror = json.loads((wikitext / "source.json").read_bytes())
    assert source == {**of_mirror, "mirror": False, "revision": COMMIT}


def test_datasets_of_the_script_era_come_from_the_hubs_own_parquet(
    tmp_path: Path, mirror: Path
) -> None:
    dataset = tmp_path / "hub" / "old" / "script"
    for split in ("train", "validation", "test"):
        folder = dataset / CONVERTED_FOLDER / "plain_text" / split
        folder.mkdir(parents=True)
        shutil.copy(
            mirror / "tiny/prose/default" / "test-00000-of-00001.parquet", folder / "0000.parquet"
        )
    (dataset / "script.py").write_text("raise SystemExit('never run')\n")
    with tiny_hub(tmp_path / "hub") as address:
        hub: dict[str, Any] = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home")}
        arguments = ("--output", tmp_path / "corpus", "--dataset", "old/script")
        run("download_wikitext.py", *arguments, **hub)
        assert "plain_text" in refused(
            "download_wikitext.py",
            *("--output", tmp_path / "x", "--dataset", "old/script:other"),
            **hub,
        )
    source = json.loads((tmp_path / "corpus" / "source.json").read_bytes())
    assert (source["config"], source["revision"]) == ("plain_text", CONVERTED_COMMIT)
    assert source["splits"]["test"]["documents"] == ARTICLES["test"]


def test_smallbench_from_the_hub_leaves_out_what_only_mirrors_have(
    tmp_path: Path, mirror: Path
) -> None:
    tasks_file, output = write_tiny_tasks(tmp_path / "tasks.yaml"), tmp_path / "smallbench"
    with tiny_hub(mirror) as address:
        hub: dict[str, Any] = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home")}
        arguments = ("--output", output, "--tasks", tasks_file)
        printed = run("download_smallbench.py", *arguments, **hub)
    assert "left out" in printed and "subj" in printed
    source = json.loads((output / "source.json").read_bytes())
    assert source["mirror"] is False and "subj" not in source["tasks"]
    assert len(source["tasks"]) == 4
    assert {task["revision"] for task in source["tasks"].values()} == {COMMIT}


def test_a_transfer_that_breaks_off_exits_74_and_leaves_nothing(
    tmp_path: Path, mirror: Path
) -> None:
    output = tmp_path / "corpus"
    with tiny_hub(mirror, cut_files=True) as address:
        hub: dict[str, Any] = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home")}
        arguments = ("--output", output, "--dataset", "tiny/prose")
        printed = run("download_wikitext.py", *arguments, exit_code=74, **hub)
    assert "tiny/prose" in printed
    assert [path.name for path in output.iterdir()] == [".lock"]


def test_incomplete_and_damaged_datasets_of_the_hub_are_refused(
    tmp_path: Path, mirror: Path
) -> None:
    cases = {"gap": None, "pointer": b"version https://git-lfs.github.com/spec/v1\n"}
    for name, content in cases.items():
        shutil.copytree(mirror / "tiny/prose", tmp_path / "hub" / "tiny" / name)
        file = tmp_path / "hub" / "tiny" / name / "default" / "train-00001-of-00002.parquet"
        file.write_bytes(content) if content else file.unlink()
    with tiny_hub(tmp_path / "hub") as address:
        hub: dict[str, Any] = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home")}
        for name, named in (("gap", "tiny/gap: default/train: found 1"), ("pointer", "arquet")):
            arguments = ("--output", tmp_path / name, "--dataset", f"tiny/{name}")
            assert named in refused("download_wikitext.py", *arguments, **hub)


# Tokens


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
    said = run("preprocess_lm.py", "--input", corpus, "--vocab_size", 400, "--output", tmp_path)
    assert "1 documents have runs of 1,000 characters of a kind, the first in line 7" in said
    assert said.index("are learned from parts") < said.index("merging pairs into a vocabulary")
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


def test_same_corpus_same_bytes_whatever_the_cores(tmp_path: Path, wikitext: Path) -> None:
    found = []
    for threads in ("1", "4"):
        folder = tmp_path / threads
        run(
            "preprocess_lm.py",
            *("--input", wikitext, "--vocab_size", 700, "--output", folder),
            RAYON_NUM_THREADS=threads,
            PYTHONHASHSEED=threads,
        )
        found.append(hashes(folder / "v700"))
    assert len(found[0]) == 8 and found[0] == found[1]


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
    for i, (split, data, seal, named) in enumerate(cases):
        corpus = small_corpus(tmp_path / str(i))
        replace_bytes(corpus / f"{split}.jsonl", data, seal=seal)
        arguments = ("--input", corpus, "--vocab_size", 300, "--output", tmp_path / "t")
        message = refused("preprocess_lm.py", *arguments)
        assert f"{split}.jsonl" in message and named in message
        assert not list((tmp_path / "t").glob("v*")) and not list(
            (tmp_path / "t").glob(".*partial")
        )


def test_an_unfinished_corpus_and_anothers_tokens_are_refused(tmp_path: Path) -> None:
    corpus = small_corpus(tmp_path / "corpus")
    other = small_corpus(tmp_path / "other", train=[prose(11, 900)])
    common = ("--vocab_size", 300, "--output", tmp_path / "t")
    run("preprocess_lm.py", "--input", corpus, *common)
    made = hashes(tmp_path / "t" / "v300")
    assert "--force" in refused("preprocess_lm.py", "--input", other, *common)
    assert hashes(tmp_path / "t" / "v300") == made
    run("preprocess_lm.py", "--input", other, *common, "--force")
    assert hashes(tmp_path / "t" / "v300") != made

    with (tmp_path / "t" / "v300" / "train.bin").open("r+b") as file:
        file.truncate(100)
    assert "train.bin" in refused("preprocess_lm.py", "--input", other, *common)

    (other / "validation.jsonl").unlink()
    assert "validation.jsonl" in refused("preprocess_lm.py", "--input", other, *common, "--force")
    (other / "source.json").unlink()
    assert "source.json" in refused("preprocess_lm.py", "--input", other, *common)


@pytest.mark.parametrize("kill", [False, True])
def test_seven_at_once_on_a_cold_directory_make_one_result(
    tmp_path: Path, wikitext: Path, kill: bool
) -> None:
    arguments = ("--input", wikitext, "--vocab_size", 500, "--output")
    run("preprocess_lm.py", *arguments, tmp_path / "alone")
    output = tmp_path / "shared"
    processes = [start("preprocess_lm.py", *arguments, output) for _ in range(7)]
    final, partial = output / "v500", output / ".v500.partial"
    deadline = time.monotonic() + 100
    victim = None
    while any(process.poll() is None for process in processes):
        assert time.monotonic() < deadline
        # A reader that sees the directory sees all of it.
        if final.exists():
            assert len(list(final.iterdir())) == 8
        elif kill and victim is None and partial.exists():
            victim = processes[0]  # the holder of the lock, or one who waits for it
            victim.kill()
        time.sleep(0.002)
    for process in processes:
        printed = process.communicate()[0]
        assert process.returncode == 0 or process is victim, printed
    assert kill == (victim is not None)
    assert hashes(final) == hashes(tmp_path / "alone" / "v500")
    assert [path.name for path in output.iterdir() if path.name != ".v500.lock"] == ["v500"]


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


# SmallBench


def test_smallbench_keeps_raw_rows_with_their_numbers(tmp_path: Path, mirror: Path) -> None:
    tasks_file = write_tiny_tasks(tmp_path / "tasks.yaml")
    output = tmp_path / "new" / "smallbench"
    arguments = ("--output", output, "--tasks", tasks_file, "--mirror", mirror)
    run("download_smallbench.py", *arguments)
    source = json.loads((output / "source.json").read_bytes())
    listed = {task["name"]: task for task in yaml.safe_load(tasks_file.read_text())["tasks"]}
    assert source["mirror"] is True and source["tasks"].keys() == listed.keys()
    for name, facts in source["tasks"].items():
        task = listed[name]
        assert all(facts[key] == task[key] for key in ("path", "config", "split"))
        folder = mirror / task["path"] / task["config"]
        rows = pq.read_table(folder / f"{task['split']}-00000-of-00001.parquet").to_pylist()
        lines = (output / f"{name}.jsonl").read_bytes().splitlines()
        expected = [{"_row": i, **row} for i, row in enumerate(rows)]
        assert [json.loads(line) for line in lines] == expected
        assert facts["rows"] == len(rows) and facts["sha256"] == sha256(output / f"{name}.jsonl")


def test_smallbench_downloads_only_what_the_list_gained(tmp_path: Path, mirror: Path) -> None:
    listed = yaml.safe_load(write_tiny_tasks(tmp_path / "all.yaml").read_text())["tasks"]
    tasks_file, output = tmp_path / "tasks.yaml", tmp_path / "smallbench"
    common = ("--output", output, "--tasks", tasks_file, "--mirror", mirror)

    def held() -> set[str]:
        return {path.name for path in output.glob("*.jsonl")}

    tasks_file.write_text(yaml.safe_dump({"tasks": listed[:2]}))
    run("download_smallbench.py", *common)
    kept = {name: (output / name).stat().st_mtime_ns for name in held()}
    assert "nothing to do" in run("download_smallbench.py", *common)
    tasks_file.write_text(yaml.safe_dump({"tasks": listed[:3]}))
    assert "1 tasks from" in run("download_smallbench.py", *common)
    assert held() == {f"{task['name']}.jsonl" for task in listed[:3]}
    assert all((output / name).stat().st_mtime_ns == time for name, time in kept.items())
    # A damaged file is fetched again; a task that left the list leaves the directory.
    damaged = output / f"{listed[1]['name']}.jsonl"
    before = damaged.read_bytes()
    damaged.write_bytes(before[:-5])
    tasks_file.write_text(yaml.safe_dump({"tasks": listed[1:3]}))
    run("download_smallbench.py", *common)
    assert damaged.read_bytes() == before
    assert held() == {f"{task['name']}.jsonl" for task in listed[1:3]}
    assert json.loads((output / "source.json").read_bytes())["tasks"].keys() == {
        task["name"] for task in listed[1:3]
    }
    tasks_file.write_text(yaml.safe_dump({"tasks": listed[1:2]}))
    assert "0 tasks from" in run("download_smallbench.py", *common)
    assert held() == {damaged.name}
    assert "nothing to do" in run("download_smallbench.py", *common)


def test_smallbench_default_list_is_found_from_any_directory(tmp_path: Path, mirror: Path) -> None:
    message = refused("download_smallbench.py", "--output", "x", "--mirror", mirror, cwd=tmp_path)
    assert "nyu-mll/blimp" in message and "no configuration" in message
    assert not list((tmp_path / "x").glob("*.json*"))


def test_bad_task_lists_are_refused_by_task_and_key(tmp_path: Path, mirror: Path) -> None:
    good = {
        **{"name": "a", "path": "nyu-mll/glue", "config": "sst2", "split": "validation"},
        **{"prompt": "", "choices": ["x", "y"], "gold": "0"},
    }
    cases: list[tuple[Any, str]] = [
        ({"tasks": [good, {**good, "name": "b", "config": 3}]}, "task 2 (b): config"),
        ({"tasks": [{k: v for k, v in good.items() if k != "split"}]}, "task 1 (a): split"),
        ({"tasks": [{**good, "name": "../a"}]}, "task 1 (../a): name"),
        ({"tasks": [{**good, "path": ""}]}, "task 1 (a): path"),
        ({"tasks": [{**good, "gold": "{{ oops"}]}, "task a: a template"),
        ({"tasks": [good, good]}, "'a'"),
        ({"tasks": []}, "tasks"),
        ([good], "tasks"),
    ]
    for content, named in cases:
        (tmp_path / "tasks.yaml").write_text(yaml.safe_dump(content))
        arguments = ("--output", tmp_path / "x", "--tasks", tmp_path / "tasks.yaml")
        assert named in refused("download_smallbench.py", *arguments, "--mirror", mirror)
    (tmp_path / "tasks.yaml").write_text("tasks: [")
    assert "YAML" in refused("download_smallbench.py", *arguments, "--mirror", mirror)
    assert not (tmp_path / "x").exists()


# Arguments


@pytest.mark.parametrize(
    "script",
    [
        "download_wikitext.py",
        "preprocess_lm.py",
        "download_smallbench.py",
        "make_corpus.py",
        "check_leakage.py",
    ],
)
def test_arguments(tmp_path: Path, script: str) -> None:
    printed = run(script, "--help")
    assert f"python scripts/{script}" in printed
    assert "required" in refused(script)
    # A file where a directory belongs is the user's mistake as well.
    (tmp_path / "file").write_text("")
    corpus = small_corpus(tmp_path / "corpus")
    also = {
        "preprocess_lm.py": ("--input", corpus, "--vocab_size", 300),
        "check_leakage.py": ("--corpus", corpus, "--smallbench", tmp_path / "file"),
        "download_smallbench.py": ("--mirror", tmp_path),
    }
    arguments = ("--output", tmp_path / "file", *also.get(script, ()))
    assert str(tmp_path / "file") in refused(script, *arguments)
    assert "--no_such" in refused(script, *arguments, "--no_such")


def test_the_tokenizers_help_says_where_tokens_go_and_what_is_replaced() -> None:
    printed = " ".join(run("preprocess_lm.py", "--help").split())
    assert "tokens go to OUTPUT/v<entries>" in printed
    assert "replace tokens of another corpus, or damaged ones" in printed


def test_what_cannot_be_written_exits_74(tmp_path: Path) -> None:
    corpus = small_corpus(tmp_path / "corpus")
    long_name = tmp_path / ("x" * 300)
    arguments = ("--input", corpus, "--vocab_size", 300, "--output", long_name)
    assert "x" * 300 in run("preprocess_lm.py", *arguments, exit_code=74)
