"""The leakage check finds what was planted, and nothing else."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from src.data.leakage import contaminated_rows
from src.data.leakage_check import word_hashes
from tests.data import refused, run, sha256, write_corpus

ITEMS = 12


def words(rng: random.Random, count: int) -> str:
    return " ".join("".join(rng.choices("abcdefghij", k=7)) for _ in range(count))


def write_smallbench(folder: Path, tasks: Mapping[str, Sequence[Mapping[str, Any]]]) -> Path:
    folder.mkdir()
    facts = {}
    for task, rows in tasks.items():
        file = folder / f"{task}.jsonl"
        lines = [json.dumps({"_row": 100 + i, **row}) + "\n" for i, row in enumerate(rows)]
        file.write_text("".join(lines))
        facts[task] = {"sha256": sha256(file), "rows": len(rows)}
    (folder / "source.json").write_text(json.dumps({"tasks": facts, "mirror": True}))
    return folder


def check(corpus: Path, smallbench: Path, *more: Any) -> dict[str, Any]:
    run("check_leakage.py", "--corpus", corpus, "--smallbench", smallbench, *more)
    if "--output" in more:
        return json.loads(Path(more[more.index("--output") + 1]).read_bytes())
    train_sha256 = sha256(corpus / "train.jsonl")
    return json.loads((smallbench / f"leakage-{train_sha256[:12]}.json").read_bytes())


def check_task(folder: Path, train: Sequence[str], items: Sequence[Mapping[str, Any]]) -> Any:
    """What the report says of a task with these rows."""
    held_out = {split: [words(random.Random(split), 60)] for split in ("validation", "test")}
    corpus = write_corpus(folder / "corpus", {"train": train, **held_out})
    return check(corpus, write_smallbench(folder / "bench", {"task": items}))["tasks"]["task"]


def sentence_tasks(rng: random.Random, length: int) -> list[dict[str, Any]]:
    return [{"sentence": words(rng, length), "label": i % 2} for i in range(ITEMS)]


def plant(rng: random.Random, text: str) -> str:
    return f"{words(rng, 30)} {text} {words(rng, 30)}"


@pytest.mark.parametrize("length", [5, 7, 12, 13, 40])
def test_a_planted_item_is_found_at_every_length(tmp_path: Path, length: int) -> None:
    rng = random.Random(length)
    items = sentence_tasks(rng, length)
    train = [words(rng, 200) for _ in range(20)]
    train[11] = plant(rng, items[4]["sentence"])
    # All but one word of another item must not be enough, nor all its words in another order.
    partial = items[5]["sentence"].split()
    train[12] = plant(rng, " ".join(partial[: min(length, 13) - 1]))
    train[13] = plant(rng, " ".join(reversed(items[6]["sentence"].split())))
    # Nor its two halves at the end of one document and the start of the next.
    half = items[7]["sentence"].split()
    train[14] = " ".join([words(rng, 20), *half[:3]])
    train[15] = " ".join([*half[3 : min(length, 13)], words(rng, 20)])
    corpus = write_corpus(
        tmp_path / "corpus",
        {"train": train, "validation": [words(rng, 99)], "test": [words(rng, 99)]},
    )
    report = check(corpus, write_smallbench(tmp_path / "bench", {"task": items}))
    task = report["tasks"]["task"]
    assert task["contaminated"] == [104]
    assert (task["items"], task["contaminated_items"], task["unverifiable_items"]) == (ITEMS, 1, 0)
    assert task["contaminated_fields"] == {"sentence": 1}
    assert task["sha256"] == sha256(tmp_path / "bench" / "task.jsonl")
    source = json.loads((corpus / "source.json").read_bytes())
    # Evaluation finds the report by the corpus that the tokens are of.
    assert contaminated_rows(None, tmp_path / "bench", source) == {"task": {104}}
    other = {"splits": {"train": {"sha256": "0" * 64}}}
    assert contaminated_rows(None, tmp_path / "bench", other) is None


def test_a_report_on_other_rows_than_those_here_is_refused(tmp_path: Path) -> None:
    rng = random.Random(7)
    texts = {split: [words(rng, 60)] for split in ("train", "validation", "test")}
    corpus = write_corpus(tmp_path / "corpus", texts)
    tasks = {name: sentence_tasks(rng, 8) for name in ("one", "two")}
    bench = write_smallbench(tmp_path / "bench", tasks)
    report = tmp_path / "report.json"
    check(corpus, bench, "--output", report)
    source = json.loads((corpus / "source.json").read_bytes())
    assert contaminated_rows(str(report), bench, source) == {"one": set(), "two": set()}

    again = write_smallbench(tmp_path / "changed", tasks | {"two": sentence_tasks(rng, 8)})
    with pytest.raises(ValueError, match=r"tasks\.two\.sha256.*check_leakage\.py.* again"):
        contaminated_rows(str(report), again, source)
    more = write_smallbench(tmp_path / "more", tasks | {"three": sentence_tasks(rng, 8)})
    with pytest.raises(ValueError, match=r"found no three.*check_leakage\.py.* again"):
        contaminated_rows(str(report), more, source)
    with pytest.raises(ValueError, match=r"source\.json.*download_smallbench\.py"):
        contaminated_rows(str(report), tmp_path / "absent", source)


def test_a_long_item_is_found_by_any_13_words_of_it(tmp_path: Path) -> None:
    rng = random.Random(1)
    items = sentence_tasks(rng, 50)
    pieces = [items[i]["sentence"].split()[at : at + 13] for i, at in ((0, 0), (3, 20), (9, 37))]
    train = [plant(rng, " ".join(piece)) for piece in pieces]
    assert check_task(tmp_path, train, items)["contaminated"] == [100, 103, 109]


def test_spelling_of_the_same_words_does_not_hide_them(tmp_path: Path) -> None:
    rng = random.Random(2)
    items = [
        {"text": "The Cat's 1,000 Mice — they RAN away, Zoë!"},
        {"text": "ﬁve ﬁne ﬁsh ﬁnd ﬁelds"},
        {"text": "the cat s 1 000 mice they ran away zoe"},  # other words: no accent
    ]
    train = [
        plant(rng, "the cat 's 1 @,@ 000 mice @-@ they ran away , zoe\u0308 .")
        + " five\nfine\tfish find\u00a0fields"
    ]
    assert check_task(tmp_path, train, items)["contaminated"] == [100, 101]


def test_every_string_of_an_item_counts_and_short_ones_are_reported(tmp_path: Path) -> None:
    rng = random.Random(3)
    planted = words(rng, 6)
    items: list[dict[str, Any]] = [
        {"question": words(rng, 9), "choices": {"text": [words(rng, 6), planted]}, "n": 5},
        {"question": words(rng, 9), "choices": {"text": [words(rng, 6), words(rng, 2)]}},
        {"question": words(rng, 4), "choices": {"text": [words(rng, 4), "too short"]}},
        {"question": "", "choices": {"text": []}},
    ]
    held_out = {"validation": [words(rng, 60), words(rng, 4)], "test": [words(rng, 60)]}
    train = [plant(rng, planted), plant(rng, items[2]["question"])]
    corpus = write_corpus(tmp_path / "corpus", {"train": train, **held_out})
    report = check(corpus, write_smallbench(tmp_path / "bench", {"nested": items}))
    task = report["tasks"]["nested"]
    assert task["contaminated"] == [100] and task["contaminated_fields"] == {"choices.text": 1}
    assert task["unverifiable_items"] == 2
    assert report["splits"]["validation"]["unverifiable_items"] == 1


def test_held_out_documents_are_counted(tmp_path: Path) -> None:
    rng = random.Random(4)
    validation = [words(rng, 60) for _ in range(5)]
    test = [words(rng, 60) for _ in range(4)]
    train = [plant(rng, validation[2]), plant(rng, " ".join(test[3].split()[10:24]))]
    corpus = write_corpus(
        tmp_path / "corpus", {"train": train, "validation": validation, "test": test}
    )
    bench = write_smallbench(tmp_path / "bench", {"task": sentence_tasks(rng, 8)})
    report = check(corpus, bench, "--output", tmp_path / "new" / "report.json")
    assert report["splits"]["validation"] == {
        "items": 5,
        "unverifiable_items": 0,
        "ngrams": 5 * 48,
        "contaminated_ngrams": 48,
        "contaminated_items": 1,
        "contaminated_fields": {"text": 1},
        "contaminated": [2],
    }
    assert report["splits"]["test"]["contaminated"] == [3]
    assert report["splits"]["test"]["contaminated_ngrams"] == 2
    assert not list(bench.glob("leakage*"))


def test_documents_joined_to_be_searched_stay_documents(tmp_path: Path) -> None:
    """More words than are searched at once; items at the joints, and one across a border."""
    rng = random.Random(5)
    items = sentence_tasks(rng, 7)
    train = [words(rng, 20_000) for _ in range(11)]
    for item, at in ((0, 0), (1, 9), (2, 10)):
        train[at] = f"{items[item]['sentence']} {train[at]} {items[item + 3]['sentence']}"
    half = items[8]["sentence"].split()
    train[4], train[5] = f"{train[4]} {' '.join(half[:3])}", f"{' '.join(half[3:])} {train[5]}"
    assert check_task(tmp_path, train, items)["contaminated"] == [100, 101, 102, 103, 104, 105]


def test_missing_and_changed_inputs_are_refused(tmp_path: Path) -> None:
    rng = random.Random(6)
    texts = {split: [words(rng, 60)] for split in ("train", "validation", "test")}
    corpus = write_corpus(tmp_path / "corpus", texts)
    bench = write_smallbench(tmp_path / "bench", {"task": sentence_tasks(rng, 8)})
    arguments = ("--corpus", corpus, "--smallbench", bench)
    absent = tmp_path / "absent"
    assert "download_smallbench.py" in refused(
        "check_leakage.py", "--corpus", corpus, "--smallbench", absent
    )
    assert "source.json" in refused("check_leakage.py", "--corpus", absent, "--smallbench", bench)
    with (bench / "task.jsonl").open("a") as file:
        file.write("\n")
    assert "task.jsonl" in refused("check_leakage.py", *arguments)
    (corpus / "train.jsonl").write_bytes(b'{"text": "\xff"}\n')
    bench = write_smallbench(tmp_path / "fine", {"task": sentence_tasks(rng, 8)})
    message = refused("check_leakage.py", "--corpus", corpus, "--smallbench", bench)
    assert "train.jsonl" in message and "byte 10" in message
    assert not list(tmp_path.rglob("leakage*"))


def test_combining_marks_do_not_cut_words(tmp_path: Path) -> None:
    """A label of one word is too short to judge, in every script."""
    rng = random.Random(8)
    labels = [
        "\u0928\u093f\u0930\u092a\u0947\u0915\u094d\u0937\u0924\u093e",  # Devanagari
        "\u0ba8\u0bc7\u0bb0\u0bcd\u0bae\u0bb1\u0bc8\u0baf\u0bbe\u0ba9",  # Tamil
        "\u0645\u064f\u062d\u064e\u0645\u0651\u064e\u062f\u064c",  # Arabic, vowels written
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
    ]  # Persian, with a joiner
    for label in labels:
        assert len(word_hashes(f"{label}, {label}!")) == 2
    assert len(word_hashes("a \u2764\ufe0f b 1\ufe0f\u20e3")) == 3  # a selector is no word
    items = [{"text": words(rng, 7), "label": label} for label in labels]
    items.append({"text": " ".join(labels[i % 4] + str(i) for i in range(6)), "label": "x"})
    train = [plant(rng, " ".join(labels)), plant(rng, items[-1]["text"])]
    assert check_task(tmp_path, train, items)["contaminated"] == [104]
