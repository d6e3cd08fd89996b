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

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from src.data.corpus import check_split, read_source, read_texts
from src.data.tasks import check_rows, held_tasks
from src.spec.command_line import Parser
from src.spec.progress import Progress, track
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
# A table of bits answers nearly every look-up of a train n-gram with "no" from one cache line.
BITS_PER_HASH = 16

# A text to look for: its field, the words in a row that count, and their hashes, (N,) uint64.
Text = tuple[str, int, np.ndarray]
Hashes = dict[int, np.ndarray]  # by the number of words, sorted and unique


def main() -> None:
    parser = Parser(
        __doc__.partition("\n")[0],
        example="python scripts/check_leakage.py --corpus data/wikitext-2 "
        "--smallbench data/smallbench",
    )
    parser.add_argument("--corpus", type=Path, required=True, help="a corpus directory")
    parser.add_argument(
        "--smallbench", type=Path, required=True, help="a directory of download_smallbench.py"
    )
    parser.add_argument(
        "--output", type=Path, help="default: <smallbench>/leakage-<train sha256, 12 digits>.json"
    )
    asked = parser.parse_args()
    corpus: Path = asked.corpus
    source = read_source(corpus)
    tasks = {task: facts["sha256"] for task, facts in sorted(held_tasks(asked.smallbench).items())}
    for task, sha256 in tasks.items():
        check_rows(asked.smallbench / f"{task}.jsonl", sha256)
    hashes = {split: facts["sha256"] for split, facts in source["splits"].items()}
    output: Path = asked.output or asked.smallbench / f"leakage-{hashes['train'][:12]}.json"
    make_directory(output.parent)
    for split, sha256 in hashes.items():
        check_split(corpus / f"{split}.jsonl", sha256)

    hasher = Hasher()
    held_out = {
        split: [(i, [hasher.to_find("text", text)]) for i, text in enumerate(read_texts(file))]
        for split, file in ((s, corpus / f"{s}.jsonl") for s in ("validation", "test"))
    }
    items = {
        task: list(read_items(asked.smallbench / f"{task}.jsonl", hasher))
        for task in track(tasks, f"{asked.smallbench}: reading", "tasks")
    }
    every = [*held_out.values(), *items.values()]
    found = search(corpus / "train.jsonl", hasher, wanted_hashes(every))
    report = {
        "schema": SCHEMA,
        "words": LONGEST,
        "fewest_words": SHORTEST,
        "corpus": {
            "dataset": source.get("dataset"),
            "config": source.get("config"),
            "splits": {split: {"sha256": sha256} for split, sha256 in hashes.items()},
        },
        "splits": {split: judge(texts, found) for split, texts in held_out.items()},
        "tasks": {
            task: {"sha256": sha256, **judge(items[task], found)} for task, sha256 in tasks.items()
        },
    }
    write_json(output, report)
    print_summary(report)
    print(f"{output}: done")


def read_items(file: Path, hasher: Hasher) -> Iterator[tuple[int, list[Text]]]:
    """Row number and texts of every item of a task."""
    for line in file.read_bytes().splitlines():
        row = json.loads(line)
        yield row["_row"], [hasher.to_find(name, text) for name, text in strings("", row)]


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


def judge(items: Iterable[tuple[int, list[Text]]], found: Hashes) -> dict[str, Any]:
    """Counts of a split's documents or a task's rows, and which of them are contaminated."""
    counts = dict.fromkeys(("items", "unverifiable_items", "ngrams", "contaminated_ngrams"), 0)
    contaminated = []
    fields: Counter[str] = Counter()
    for number, texts in items:
        hits: dict[str, int] = {}
        for name, length, hashes in texts:
            hits[name] = hits.get(name, 0) + int(is_among(hashes, found[length]).sum())
        counts["items"] += 1
        counts["unverifiable_items"] += not any(hashes.size for _, _, hashes in texts)
        counts["ngrams"] += sum(hashes.size for _, _, hashes in texts)
        counts["contaminated_ngrams"] += sum(hits.values())
        fields.update(name for name, count in hits.items() if count)
        if any(hits.values()):
            contaminated.append(number)
    return {
        **counts,
        "contaminated_items": len(contaminated),
        "contaminated_fields": dict(sorted(fields.items())),
        "contaminated": contaminated,
    }


def print_summary(report: Mapping[str, Any]) -> None:
    """A line a split, a line a task that has contaminated items, and the sum."""
    for split, facts in report["splits"].items():
        print(
            f"{split}: {facts['contaminated_items']} of {facts['items']} documents share "
            f"{facts['contaminated_ngrams']} of {facts['ngrams']} sequences with train"
        )
    tasks = report["tasks"]
    for task, facts in tasks.items():
        if facts["contaminated"]:
            print(f"{task}: {facts['contaminated_items']} of {facts['items']} items contaminated")
    print(
        f"{len(tasks)} tasks, {sum(t['items'] for t in tasks.values()):,} items: "
        f"{sum(t['contaminated_items'] for t in tasks.values()):,} contaminated, "
        f"{sum(t['unverifiable_items'] for t in tasks.values()):,} too short to judge"
    )


class Hasher:
    """Texts to arrays of 64-bit word hashes, the same on every machine."""

    def __init__(self) -> None:
        self.known: dict[str, int] = {}

    def words(self, text: str) -> np.ndarray:
        """(W,) uint64, a hash a normalised word."""
        words = WORD.findall(unicodedata.normalize("NFKC", text).lower())
        known = self.known
        if len(known) > KNOWN_WORDS:
            known.clear()
        for word in set(words).difference(known):
            digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
            known[word] = int.from_bytes(digest, "little")
        return np.fromiter(map(known.__getitem__, words), dtype=np.uint64, count=len(words))

    def to_find(self, field: str, text: str) -> Text:
        """What a text is looked up by: its 13-grams, or all of it; nothing if it is too short."""
        words = self.words(text)
        length = min(LONGEST, len(words))
        if length < SHORTEST:
            return field, LONGEST, words[:0]
        return field, length, next(ngram_hashes(words, {length}))[1]


def ngram_hashes(words: np.ndarray, lengths: Iterable[int]) -> Iterator[tuple[int, np.ndarray]]:
    """(W - n + 1,) uint64 for each n of `lengths`: polynomials in BASE, modulo 2**64."""
    wanted = set(lengths)
    hashes = words
    for n in range(1, min(max(wanted, default=0), len(words)) + 1):
        if n > 1:
            hashes = hashes[:-1] * BASE + words[n - 1 :]
        if n in wanted:
            yield n, hashes


def wanted_hashes(groups: Iterable[Iterable[tuple[int, list[Text]]]]) -> Hashes:
    """What all texts of all items are looked up by."""
    parts: dict[int, list[np.ndarray]] = {n: [] for n in range(SHORTEST, LONGEST + 1)}
    for group in groups:
        for _, texts in group:
            for _, length, hashes in texts:
                parts[length].append(hashes)
    return {n: merged(hashes) for n, hashes in parts.items()}


def merged(parts: list[np.ndarray]) -> np.ndarray:
    return np.unique(np.concatenate([np.empty(0, dtype=np.uint64), *parts]))


def is_among(hashes: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Boolean mask: which hashes stand in the sorted array `among`."""
    if not among.size:
        return np.zeros(len(hashes), dtype=bool)
    at = np.minimum(np.searchsorted(among, hashes), len(among) - 1)
    return among[at] == hashes


def search(file: Path, hasher: Hasher, wanted: Hashes) -> Hashes:
    """Which of the wanted n-grams stand in documents of the train file."""
    tables = {}
    for n, hashes in wanted.items():
        if hashes.size:
            bits = max(10, (len(hashes) * BITS_PER_HASH - 1).bit_length())
            shift = np.uint64(64 - bits)
            table = np.zeros(1 << bits, dtype=bool)
            table[hashes >> shift] = True
            tables[n] = shift, table
    found: dict[int, list[np.ndarray]] = {n: [] for n in wanted}
    for words in joined_documents(file, hasher):
        for n, hashes in ngram_hashes(words, tables):
            shift, table = tables[n]
            likely = hashes[table[hashes >> shift]]
            found[n].append(np.unique(likely[is_among(likely, wanted[n])]))
    return {n: merged(parts) for n, parts in found.items()}


def joined_documents(file: Path, hasher: Hasher) -> Iterator[np.ndarray]:
    """Word hashes of many documents at a time; a word that no text has stands between them."""
    border = ~hasher.words("border")  # no word's hash, save by accident
    parts: list[np.ndarray] = []
    words = 0
    with Progress(f"{file}: searching", file.stat().st_size / 1e6, "MB") as progress:
        for text in read_texts(file):
            parts += [hasher.words(text), border]
            words += len(parts[-2])
            progress.advance(len(text) / 1e6)
            if words >= WORDS_AT_ONCE:
                yield np.concatenate(parts)
                parts, words = [], 0
    if parts:
        yield np.concatenate(parts)
