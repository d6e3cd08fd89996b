"""Checks that the train split does not hold the held-out splits or SmallBench's items.

    python scripts/check_leakage.py --corpus data/wikitext-2 --smallbench data/smallbench

Writes <smallbench>/leakage-<first 12 digits of the train split's sha256>.json, where evaluation
looks for it: the contaminated rows of every task, which it leaves out, and the documents of
validation and test. A text is compared by its words (Unicode NFKC, lower case,
punctuation aside): it is contaminated when 13 words in a row of it stand in one train document; a
text of 5 to 12 words when it stands there whole; a shorter one cannot be judged. An item's texts
are its row's string fields, lists and nested fields included, each on its own; one contaminated
text contaminates the item, and an item without any text of 5 words is unverifiable.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from src.data.corpus import check_split, counted_texts, read_source, read_texts, script_parser
from src.data.tasks import check_rows, held_tasks
from src.spec.progress import track
from src.storage.files import make_directory, write_json

SCHEMA = 2
LONGEST, SHORTEST = 13, 5
# Vowel signs and other combining marks (category M) continue a word, as do the joiners of Indic and
# Persian script; `\w` has neither. Mark and variation selector after a symbol make no word.
MARKS = "".join(
    chr(code)
    for block in (range(0x300, 0x20000), range(0xE0100, 0xE01F0))
    for code in block
    if unicodedata.category(chr(code))[0] == "M"
)
WORD = re.compile(rf"\w[\w{MARKS}\u200c\u200d]*")
BASE = np.uint64(0x9E3779B97F4A7C15)  # odd: n-grams that differ in one word never collide
KNOWN_WORDS = 1_000_000  # about 150 MB
WORDS_AT_ONCE = 200_000

# A text to look for: its field, the words in a row that count, and their hashes, (N,) uint64.
Text = tuple[str, int, np.ndarray]
Items = list[tuple[int, list[Text]]]  # the number of a row or document, and its texts
Matches = dict[int, set[int]]  # hashes that stand in train, by the number of words


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--corpus", type=Path, required=True, help="a corpus directory")
    parser.add_argument("--smallbench", type=Path, required=True, help="download_smallbench.py's")
    parser.add_argument("--output", type=Path, help="default: where evaluation looks for it")
    args = parser.parse_args()
    source = read_source(args.corpus)
    tasks = {task: facts["sha256"] for task, facts in sorted(held_tasks(args.smallbench).items())}
    for task, sha256 in tasks.items():
        check_rows(args.smallbench / f"{task}.jsonl", sha256)
    hashes = {split: facts["sha256"] for split, facts in source["splits"].items()}
    output: Path = args.output or args.smallbench / f"leakage-{hashes['train'][:12]}.json"
    make_directory(output.parent)
    for split, sha256 in hashes.items():
        check_split(args.corpus / f"{split}.jsonl", sha256)

    split_items: dict[str, Items] = {}
    for split in ("validation", "test"):
        texts = read_texts(args.corpus / f"{split}.jsonl")
        split_items[split] = [(i, [to_find("text", text)]) for i, text in enumerate(texts)]
    task_items = {
        task: read_items(args.smallbench / f"{task}.jsonl")
        for task in track(tasks, f"{args.smallbench}: reading", "tasks")
    }
    matches = search(args.corpus / "train.jsonl", [*split_items.values(), *task_items.values()])
    report = {
        "schema": SCHEMA,
        "words": LONGEST,
        "fewest_words": SHORTEST,
        "corpus": {
            "dataset": source.get("dataset"),
            "config": source.get("config"),
            "splits": {split: {"sha256": sha256} for split, sha256 in hashes.items()},
        },
        "splits": {split: judge(items, matches) for split, items in split_items.items()},
        "tasks": {
            task: {"sha256": tasks[task], **judge(items, matches)}
            for task, items in task_items.items()
        },
    }
    write_json(output, report)
    print_summary(report)
    print(f"{output}: done")


def read_items(file: Path) -> Items:
    """Row number and texts of every item of a task."""
    rows = [json.loads(line) for line in file.read_bytes().splitlines()]
    return [(row["_row"], [to_find(name, text) for name, text in strings("", row)]) for row in rows]


def strings(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """Every string inside a row, with the dotted name of its field."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from strings(f"{name}.{key}" if name else key, inner)
    elif isinstance(value, list):
        for inner in value:
            yield from strings(name, inner)


def judge(items: Items, matches: Matches) -> dict[str, Any]:
    """Counts of a split's documents or a task's rows, and which of them are contaminated."""
    counts = {"items": len(items)}
    counts |= dict.fromkeys(("unverifiable_items", "ngrams", "contaminated_ngrams"), 0)
    contaminated = []
    fields: Counter[str] = Counter()
    for number, texts in items:
        hits: Counter[str] = Counter()
        for name, length, hashes in texts:
            hits[name] += sum(hash in matches[length] for hash in hashes.tolist())
            counts["ngrams"] += hashes.size
        counts["unverifiable_items"] += not any(hashes.size for _, _, hashes in texts)
        counts["contaminated_ngrams"] += hits.total()
        fields.update(name for name, count in hits.items() if count)
        if hits.total():
            contaminated.append(number)
    return {
        **counts,
        "contaminated_items": len(contaminated),
        "contaminated_fields": dict(sorted(fields.items())),
        "contaminated": contaminated,
    }


def print_summary(report: Mapping[str, Any]) -> None:
    """A line a split, a line a task that has contaminated items, and the sum."""
    for name, facts in {**report["splits"], **report["tasks"]}.items():
        if facts["contaminated"] or name in report["splits"]:
            print(f"{name}: {facts['contaminated_items']} of {facts['items']} contaminated")
    tasks = report["tasks"].values()
    print(
        f"{len(tasks)} tasks, {sum(task['items'] for task in tasks):,} items: "
        f"{sum(task['contaminated_items'] for task in tasks):,} contaminated, "
        f"{sum(task['unverifiable_items'] for task in tasks):,} too short to judge"
    )


@functools.lru_cache(KNOWN_WORDS)
def word_hash(word: str) -> int:
    """64 bits, the same on every machine."""
    digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def word_hashes(text: str) -> np.ndarray:
    """(W,) uint64, a hash a normalised word."""
    words = WORD.findall(unicodedata.normalize("NFKC", text).lower())
    return np.fromiter(map(word_hash, words), dtype=np.uint64, count=len(words))


def to_find(field: str, text: str) -> Text:
    """What a text is looked up by: its 13-grams, or all of it; nothing if it is too short."""
    words = word_hashes(text)
    length = min(LONGEST, len(words))
    if length < SHORTEST:
        return field, LONGEST, words[:0]
    return field, length, next(ngram_hashes(words, {length}))[1]


def ngram_hashes(words: np.ndarray, lengths: set[int]) -> Iterator[tuple[int, np.ndarray]]:
    """(W - n + 1,) uint64 for each n of `lengths`: polynomials in BASE, modulo 2**64."""
    hashes = words
    for n in range(1, min(max(lengths), len(words)) + 1):
        if n > 1:
            hashes = hashes[:-1] * BASE + words[n - 1 :]
        if n in lengths:
            yield n, hashes


def search(file: Path, groups: Iterable[Items]) -> Matches:
    """Which n-grams that the texts of `groups` are looked up by stand in documents of the file."""
    by_length: dict[int, list[np.ndarray]] = defaultdict(list)
    for _, texts in chain.from_iterable(groups):
        for _, length, hashes in texts:
            by_length[length].append(hashes)
    queries = {n: pd.Index(np.concatenate(hashes)).unique() for n, hashes in by_length.items()}
    matches: Matches = {n: set() for n in queries}
    for words in joined_documents(file):
        for n, hashes in ngram_hashes(words, set(queries)):
            matches[n].update(hashes[queries[n].get_indexer(hashes) >= 0].tolist())
    return matches


def joined_documents(file: Path) -> Iterator[np.ndarray]:
    """Word hashes of many documents at a time; a word that no text has stands between them."""
    border = ~word_hashes("border")  # no word's hash, save by accident
    parts: list[np.ndarray] = []
    words = 0
    for text in counted_texts(file, "searching"):
        parts += [word_hashes(text), border]
        words += len(parts[-2])
        if words >= WORDS_AT_ONCE:
            yield np.concatenate(parts)
            parts, words = [], 0
    if parts:
        yield np.concatenate(parts)
