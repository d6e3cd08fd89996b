"""Checks that the train split does not hold the held-out splits or SmallBench's items.

    python scripts/check_leakage.py --corpus data/wikitext-2 --smallbench data/smallbench

Writes <smallbench>/leakage-<first 12 digits of the train split's sha256>.json, where evaluation
looks for it: the contaminated rows of every task, which it leaves out, and counts for validation
and test. A text is compared by its words (Unicode NFKC, lower case,
punctuation aside): it is contaminated when 13 words in a row of it stand in one train document; a
text of 5 to 12 words when it stands there whole; a shorter one cannot be judged. An item's texts
are its row's string fields, lists and nested fields included, each on its own; one contaminated
text contaminates the item, and an item without any text of 5 words is unverifiable.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.data.corpus import check_split, read_source, read_texts
from src.data.tasks import check_rows, held_tasks
from src.spec.command_line import Parser, Refusal
from src.spec.progress import Progress
from src.storage.files import make_directory, sha256_of, write_json

if TYPE_CHECKING:
    import numpy as np

SCHEMA = 1
LONGEST, SHORTEST = 13, 5
HELD_OUT = ("validation", "test")
# Vowel signs and other combining marks (category M) continue a word, as do the joiners of Indic and
# Persian script; `\w` has neither. Mark and variation selector after a symbol make no word.
MARKS = "".join(
    chr(code)
    for block in (range(0x300, 0x20000), range(0xE0100, 0xE01F0))
    for code in block
    if unicodedata.category(chr(code))[0] == "M"
)
WORD = re.compile(rf"\w[\w{MARKS}\u200c\u200d]*")
BASE = 0x9E3779B97F4A7C15  # odd, so that n-grams that differ in one word never collide
KNOWN_WORDS = 1_000_000  # about 150 MB a process
BLOCK_BYTES = 8_000_000
WORDS_AT_ONCE = 200_000
# A table of bits answers nearly every look-up of a train n-gram with "no" from one cache line.
BITS_PER_HASH = 16


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
    parser.add_argument(
        "--workers", type=int, default=min(4, os.cpu_count() or 1), help="processes (default: 4)"
    )
    arguments = parser.parse_args()
    if arguments.workers < 1:
        raise Refusal(f"--workers: found {arguments.workers}, expected at least 1")
    corpus: Path = arguments.corpus
    source = read_source(corpus)
    tasks = read_smallbench(arguments.smallbench)
    train_sha256 = source["splits"]["train"]["sha256"]
    output: Path = arguments.output or arguments.smallbench / f"leakage-{train_sha256[:12]}.json"
    make_directory(output.parent)
    for split in ("train", *HELD_OUT):
        check_split(corpus / f"{split}.jsonl", source["splits"][split]["sha256"])
    report = check(corpus, source, tasks, arguments.workers)
    write_json(output, report)
    print_summary(report)
    print(f"{output}: done")


def read_smallbench(folder: Path) -> dict[str, Path]:
    """The rows' file of every task, verified against source.json."""
    files = {}
    for task, facts in sorted(held_tasks(folder).items()):
        files[task] = folder / f"{task}.jsonl"
        check_rows(files[task], facts["sha256"])
    return files


def check(
    corpus: Path, source: Mapping[str, Any], tasks: Mapping[str, Path], workers: int
) -> dict[str, Any]:
    """The whole report. Two passes over what is held out, one over the train documents."""
    hasher = Hasher()
    asked = Asked()
    for split in HELD_OUT:
        for text in read_texts(corpus / f"{split}.jsonl"):
            asked.add(hasher.words(text))
    for file in tasks.values():
        for _, texts in read_items(file):
            for _, text in texts:
                asked.add(hasher.words(text))
    found = search(corpus / "train.jsonl", asked.sorted(), workers)
    facts = source["splits"]
    return {
        "schema": SCHEMA,
        "words": LONGEST,
        "fewest_words": SHORTEST,
        "corpus": {
            "dataset": source.get("dataset"),
            "config": source.get("config"),
            "splits": {split: {"sha256": facts[split]["sha256"]} for split in facts},
        },
        "splits": {
            split: judge_split(corpus / f"{split}.jsonl", hasher, found) for split in HELD_OUT
        },
        "tasks": {task: judge_task(file, hasher, found) for task, file in tasks.items()},
    }


def judge_split(file: Path, hasher: Hasher, found: Mapping[int, np.ndarray]) -> dict[str, Any]:
    """Counts of one held-out split's documents, and which (by number) are contaminated."""
    contaminated, unverifiable, documents = [], 0, 0
    ngrams = shared = 0
    for number, text in enumerate(read_texts(file)):
        documents += 1
        length, hashes = ngrams_to_find(hasher.words(text))
        hits = int(is_among(hashes, found[length]).sum()) if hashes.size else 0
        ngrams, shared = ngrams + hashes.size, shared + hits
        unverifiable += hashes.size == 0
        if hits:
            contaminated.append(number)
    return {
        "documents": documents,
        "contaminated_documents": len(contaminated),
        "unverifiable_documents": unverifiable,
        "ngrams": ngrams,
        "contaminated_ngrams": shared,
        "contaminated": contaminated,
    }


def judge_task(file: Path, hasher: Hasher, found: Mapping[int, np.ndarray]) -> dict[str, Any]:
    """One task's contaminated rows, by `_row`, and in how many items which field is."""
    contaminated, unverifiable, items = [], 0, 0
    fields: dict[str, int] = {}
    for row, texts in read_items(file):
        items += 1
        judged = False
        hit_fields = set()
        for name, text in texts:
            length, hashes = ngrams_to_find(hasher.words(text))
            judged = judged or hashes.size > 0
            if hashes.size and is_among(hashes, found[length]).any():
                hit_fields.add(name)
        unverifiable += not judged
        if hit_fields:
            contaminated.append(row)
        for name in sorted(hit_fields):
            fields[name] = fields.get(name, 0) + 1
    return {
        "items": items,
        "contaminated_items": len(contaminated),
        "unverifiable_items": unverifiable,
        "sha256": sha256_of(file),
        "contaminated_fields": fields,
        "contaminated": contaminated,
    }


def print_summary(report: Mapping[str, Any]) -> None:
    """A line a split, a line a task that has contaminated items, and the sum."""
    for split, facts in report["splits"].items():
        print(
            f"{split}: {facts['contaminated_documents']} of {facts['documents']} documents share "
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


def read_items(file: Path) -> Iterator[tuple[int, list[tuple[str, str]]]]:
    """Row number and (field, text) pairs of every item."""
    for line in file.read_bytes().splitlines():
        row = json.loads(line)
        yield row["_row"], list(strings("", row))


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


class Hasher:
    """Texts to arrays of 64-bit word hashes, the same on every machine and in every process."""

    def __init__(self) -> None:
        self.known: dict[str, int] = {}

    def words(self, text: str) -> np.ndarray:
        """(W,) uint64, a hash a normalised word."""
        import numpy as np

        words = WORD.findall(unicodedata.normalize("NFKC", text).lower())
        known = self.known
        if len(known) > KNOWN_WORDS:
            known.clear()
        for word in set(words).difference(known):
            digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
            known[word] = int.from_bytes(digest, "little")
        return np.fromiter(map(known.__getitem__, words), dtype=np.uint64, count=len(words))


def ngram_hashes(words: np.ndarray, lengths: Iterable[int]) -> Iterator[tuple[int, np.ndarray]]:
    """(W - n + 1,) uint64 for each n of `lengths`: polynomials in BASE, modulo 2**64."""
    import numpy as np

    wanted = set(lengths)
    hashes = words
    for n in range(1, max(wanted, default=0) + 1):
        if n > len(words):
            return
        if n > 1:
            hashes = hashes[:-1] * np.uint64(BASE) + words[n - 1 :]
        if n in wanted:
            yield n, hashes


def ngrams_to_find(words: np.ndarray) -> tuple[int, np.ndarray]:
    """What a text is looked up by: its 13-grams, or all of it; nothing if it is too short."""
    length = min(LONGEST, len(words))
    if length < SHORTEST:
        return LONGEST, words[:0]
    return next(iter(ngram_hashes(words, (length,))))


@dataclass(slots=True)
class Asked:
    """The hashes to look for, by their number of words; duplicates are dropped now and then."""

    parts: dict[int, list[np.ndarray]] = field(
        default_factory=lambda: {n: [] for n in range(SHORTEST, LONGEST + 1)}
    )

    def add(self, words: np.ndarray) -> None:
        length, hashes = ngrams_to_find(words)
        if hashes.size:
            self.parts[length].append(hashes)

    def sorted(self) -> dict[int, np.ndarray]:
        """Sorted and unique."""
        import numpy as np

        empty = [np.empty(0, dtype=np.uint64)]
        return {n: np.unique(np.concatenate(parts or empty)) for n, parts in self.parts.items()}


def is_among(hashes: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Boolean mask: which hashes stand in the sorted array `among`."""
    import numpy as np

    if not among.size:
        return np.zeros(len(hashes), dtype=bool)
    at = np.minimum(np.searchsorted(among, hashes), len(among) - 1)
    return among[at] == hashes


class Searcher:
    """Finds which of the asked n-grams stand in train documents."""

    def __init__(self, asked: Mapping[int, np.ndarray]) -> None:
        import numpy as np

        self.hasher = Hasher()
        self.asked = {n: hashes for n, hashes in asked.items() if hashes.size}
        self.tables = {}
        self.shifts = {}
        for n, hashes in self.asked.items():
            bits = max(10, (len(hashes) * BITS_PER_HASH - 1).bit_length())
            self.shifts[n] = np.uint64(64 - bits)
            self.tables[n] = np.zeros(1 << bits, dtype=bool)
            self.tables[n][hashes >> self.shifts[n]] = True

    def search(self, file: Path, start: int, end: int) -> dict[int, np.ndarray]:
        """The asked hashes that stand in the documents of the lines between two byte offsets."""
        import numpy as np

        found: dict[int, list[np.ndarray]] = {n: [] for n in self.asked}
        for words in self.joined_documents(file, start, end):
            for n, hashes in ngram_hashes(words, self.asked):
                likely = hashes[self.tables[n][hashes >> self.shifts[n]]]
                found[n].append(np.unique(likely[is_among(likely, self.asked[n])]))
        return {n: np.unique(np.concatenate(parts)) for n, parts in found.items() if parts}

    def joined_documents(self, file: Path, start: int, end: int) -> Iterator[np.ndarray]:
        """Word hashes of many documents at a time; a word that no text has stands between them."""
        import numpy as np

        border = self.hasher.words("border")  # its complement is no word's hash, save by accident
        parts: list[np.ndarray] = []
        words = 0
        for text in lines_between(file, start, end):
            parts += [self.hasher.words(text), ~border]
            words += len(parts[-2])
            if words >= WORDS_AT_ONCE:
                yield np.concatenate(parts)
                parts, words = [], 0
        if parts:
            yield np.concatenate(parts)


def lines_between(file: Path, start: int, end: int) -> Iterator[str]:
    """Texts of the corpus lines that start in [start, end); `start` is a line's start."""
    with file.open("rb") as data:
        data.seek(start)
        while data.tell() < end:
            yield json.loads(data.readline())["text"]


def line_ranges(file: Path, size: int = BLOCK_BYTES) -> list[tuple[int, int]]:
    """Byte ranges of about `size` that begin at line starts and cover the file."""
    ranges = []
    total = file.stat().st_size
    with file.open("rb") as data:
        start = 0
        while start < total:
            data.seek(min(start + size, total))
            data.readline()
            ranges.append((start, data.tell()))
            start = data.tell()
    return ranges


_searcher: Searcher | None = None  # one a worker process


def _start_worker(asked: Mapping[int, np.ndarray]) -> None:
    global _searcher
    _searcher = Searcher(asked)


def _search_range(file: Path, start: int, end: int) -> dict[int, np.ndarray]:
    assert _searcher is not None
    return _searcher.search(file, start, end)


def search(file: Path, asked: Mapping[int, np.ndarray], workers: int) -> dict[int, np.ndarray]:
    """Which asked n-grams stand in the train file, sorted; the same for any number of workers."""
    import numpy as np

    ranges = line_ranges(file)
    found: list[dict[int, np.ndarray]] = []
    with Progress(f"{file}: searching", file.stat().st_size / 1e6, "MB") as progress:
        for (start, end), hits in zip(ranges, _searched(file, ranges, asked, workers), strict=True):
            found.append(hits)
            progress.advance((end - start) / 1e6)
    nothing = np.empty(0, dtype=np.uint64)
    return {
        n: np.unique(np.concatenate([nothing, *(hits.get(n, nothing) for hits in found)]))
        for n in asked
    }


def _searched(
    file: Path,
    ranges: Sequence[tuple[int, int]],
    asked: Mapping[int, np.ndarray],
    workers: int,
) -> Iterator[dict[int, np.ndarray]]:
    if workers == 1 or len(ranges) == 1:
        searcher = Searcher(asked)
        yield from (searcher.search(file, start, end) for start, end in ranges)
        return
    # spawn: forking a process whose libraries run threads is not safe everywhere
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        min(workers, len(ranges)), context, initializer=_start_worker, initargs=(asked,)
    ) as pool:
        starts, ends = zip(*ranges, strict=True)
        yield from pool.map(_search_range, [file] * len(ranges), starts, ends)
