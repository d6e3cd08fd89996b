"""Generates a corpus whose entropy is known exactly, with probe tasks of its own.

    python scripts/make_corpus.py --output data/generated

The language is a first-order Markov chain over a lexicon of four-letter words. Every word has its
own successors, but all share one list of probabilities by rank (1/rank, normalised), so the entropy
rate is the entropy of that list, and the ranks of a text are independent draws. A document starts
from the stationary distribution; its end is not scored. Because all words are equally long, a text
has one reading only, and -log2 of its probability is what no model of any tokenization can beat on
average: per document of n words, entropy_bits_first_word + (n - 1) * entropy_bits_per_word.

Writes a corpus directory (source.json holds the entropies), language.json (the chain itself), and
the probes: smallbench.yaml, a task list, and smallbench/, their rows. Needs no network.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from src.data.corpus import SPLITS, is_finished, write_split
from src.spec.command_line import Parser, Refusal
from src.storage.files import locked, make_directory, publish, sha256_of, workshop, write_json

if TYPE_CHECKING:
    import numpy as np

DATASET = "generated/markov-words"
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
LETTERS = 4  # of every word
WORDS_PER_DOCUMENT = (40, 80)  # uniform, both included, independent of the words
HELD_OUT_SHARE = 10  # validation and test have a tenth of train's documents each
PROBE_ITEMS = 200
PROBE_WORDS = 11  # of a probe's sentence: the leakage check can judge 5 and more
CHOICES = 4


def main() -> None:
    parser = Parser(
        __doc__.partition("\n")[0],
        example="python scripts/make_corpus.py --output data/generated --seed 0",
    )
    parser.add_argument("--output", type=Path, required=True, help="the corpus directory to make")
    parser.add_argument("--seed", type=int, default=0, help="of everything (default 0)")
    parser.add_argument(
        "--documents", type=int, default=4000, help="train documents (default 4000, 1.2 MB)"
    )
    parser.add_argument("--lexicon", type=int, default=96, help="words (default 96)")
    parser.add_argument("--successors", type=int, default=8, help="of each word (default 8)")
    parser.add_argument("--force", action="store_true", help="replace another corpus in --output")
    arguments = parser.parse_args()
    expect("--seed", arguments.seed, 0, 2**32 - 1)
    expect("--documents", arguments.documents, HELD_OUT_SHARE, 10_000_000)
    expect("--lexicon", arguments.lexicon, 16, 4096)
    expect("--successors", arguments.successors, 2, arguments.lexicon // 4)
    output: Path = arguments.output
    make_directory(output)
    config = "seed{seed}-documents{documents}-lexicon{lexicon}-successors{successors}".format(
        **vars(arguments)
    )
    with locked(output / ".lock"):
        if not arguments.force and is_finished(output, DATASET, config):
            print(f"{output}: holds {config}, whole and verified; nothing to do")
            return
        generate(output, config, arguments)


def expect(option: str, value: int, smallest: int, largest: int) -> None:
    """Refusal for a value out of its range."""
    if not smallest <= value <= largest:
        raise Refusal(f"{option}: found {value}, expected {smallest} to {largest:,}")


@dataclass(frozen=True, slots=True)
class Language:
    """The chain: `successors[w, r]` follows word w with probability `weights[r]`."""

    lexicon: list[str]
    successors: np.ndarray  # (W, K) int64
    weights: np.ndarray  # (K,) sums to 1
    stationary: np.ndarray  # (W,) sums to 1

    @property
    def bits_per_word(self) -> float:
        """Entropy rate: of the next word given the one before it."""
        return entropy_bits(self.weights)

    @property
    def bits_first_word(self) -> float:
        """Entropy of a document's first word."""
        return entropy_bits(self.stationary)

    def allows(self, first: int, second: int) -> bool:
        """Whether `second` can follow `first` at all."""
        return bool((self.successors[first] == second).any())


def entropy_bits(probabilities: np.ndarray) -> float:
    """-sum p log2 p of a distribution without zeros."""
    return -math.fsum(p * math.log2(p) for p in probabilities.tolist())


def make_language(rng: np.random.Generator, words: int, successors: int) -> Language:
    """Draw lexicon and successors; word w + 1 is always among w's, so every word is reached."""
    import numpy as np

    syllables = [c + v for c in CONSONANTS for v in VOWELS]
    numbers = rng.choice(len(syllables) ** 2, size=words, replace=False).tolist()
    lexicon = [syllables[n // len(syllables)] + syllables[n % len(syllables)] for n in numbers]
    table = np.empty((words, successors), dtype=np.int64)
    for word in range(words):
        following = (word + 1) % words
        others = rng.permutation(np.delete(np.arange(words), following))[: successors - 1]
        table[word] = rng.permutation(np.append(others, following))
    weights = 1 / np.arange(1, successors + 1)
    weights /= weights.sum()
    return Language(lexicon, table, weights, stationary_distribution(table, weights))


def stationary_distribution(successors: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(W,) the solution of p = p P, sum p = 1; unique, as every word reaches every other."""
    import numpy as np

    words = len(successors)
    transition = np.zeros((words, words))
    np.put_along_axis(transition, successors, np.broadcast_to(weights, successors.shape), axis=1)
    equations = np.vstack([transition.T - np.eye(words), np.ones(words)])
    solution = np.linalg.lstsq(equations, np.append(np.zeros(words), 1.0), rcond=None)[0]
    assert solution.min() > 0 and np.allclose(solution @ transition, solution, atol=1e-12)
    return solution / solution.sum()


def sample(
    language: Language, rng: np.random.Generator, documents: int, words: int
) -> tuple[np.ndarray, np.ndarray]:
    """(D, T) words and (D, T) -log2 probability of each given what stands before it."""
    import numpy as np

    starts = np.searchsorted(np.cumsum(language.stationary)[:-1], rng.random(documents), "right")
    steps = rng.random((documents, words - 1))
    ranks = np.searchsorted(np.cumsum(language.weights)[:-1], steps, side="right")
    drawn = np.empty((documents, words), dtype=np.int64)
    drawn[:, 0] = starts
    for t in range(1, words):
        drawn[:, t] = language.successors[drawn[:, t - 1], ranks[:, t - 1]]
    bits = np.empty((documents, words))
    bits[:, 0] = -np.log2(language.stationary[starts])
    bits[:, 1:] = -np.log2(language.weights[ranks])
    return drawn, bits


def generate(output: Path, config: str, arguments: Any) -> None:
    """Draw everything from the seed and publish it, source.json last."""
    import numpy as np

    rng = np.random.default_rng(arguments.seed)
    language = make_language(rng, arguments.lexicon, arguments.successors)
    held_out = arguments.documents // HELD_OUT_SHARE
    splits = {}
    with workshop(output / ".partial") as partial:
        files = partial / "files"
        for split in SPLITS:
            documents = arguments.documents if split == "train" else held_out
            splits[split] = make_split(language, rng, documents, files / f"{split}.jsonl")
        make_probes(language, rng, files, output)
        write_json(
            files / "language.json",
            {
                "lexicon": language.lexicon,
                "successors": language.successors.tolist(),
                "weights": language.weights.tolist(),
                "stationary": language.stationary.tolist(),
            },
        )
        source = {
            "dataset": DATASET,
            "config": config,
            "revision": None,
            "mirror": False,
            "licence": "CC0-1.0",
            "splits": splits,
            "entropy_bits_per_word": language.bits_per_word,
            "entropy_bits_first_word": language.bits_first_word,
            "entropy_bits_per_byte": language.bits_per_word / (LETTERS + 1),
        }
        write_json(files / "source.json", source)
        publish(files, output, "source.json")
    for split, facts in splits.items():
        print(f"{split}: {facts['documents']:,} documents, {facts['bytes']:,} bytes")
    print(
        f"{output}: {config}, {language.bits_per_word:.4f} bits a word, "
        f"{splits['test']['entropy_bits_per_byte']:.4f} bits a byte of test"
    )


def make_split(
    language: Language, rng: np.random.Generator, documents: int, file: Path
) -> dict[str, Any]:
    """Write one split; its facts, with two totals in bits beside the usual ones.

    `entropy_bits` is expected of texts of these lengths; `true_bits` is -log2 of the probability of
    this very split, which differs by sampling error only.
    """
    import numpy as np

    shortest, longest = WORDS_PER_DOCUMENT
    lengths = rng.integers(shortest, longest, size=documents, endpoint=True)
    drawn, bits = sample(language, rng, documents, longest)
    lexicon = language.lexicon
    texts = (
        " ".join(lexicon[word] for word in row[:length].tolist())
        for row, length in zip(drawn, lengths, strict=True)
    )
    facts = write_split(file, texts)
    inside = np.arange(longest) < lengths[:, None]
    later_words = facts["words"] - documents
    expected = documents * language.bits_first_word + later_words * language.bits_per_word
    return {
        **facts,
        "entropy_bits": expected,
        "entropy_bits_per_byte": expected / facts["bytes"],
        "true_bits": float(bits[inside].sum()),
    }


def make_probes(language: Language, rng: np.random.Generator, files: Path, output: Path) -> None:
    """Write the four probe tasks beside the corpus, in SmallBench's format."""
    train = "\n".join(
        json.loads(line)["text"] for line in (files / "train.jsonl").read_bytes().splitlines()
    )
    labels = label_words(language)
    makers: dict[str, Callable[[list[int], int], dict[str, Any] | None]] = {
        "replaced_word": lambda words, _: replaced(language, rng, words),
        "swapped_words": lambda words, _: swapped(language, rng, words),
        "next_word": lambda words, _: next_word(language, rng, words),
        "next_label": lambda words, i: next_label(language, words, labels, i % 2),
    }
    # A directory of its own, moved in before the corpus' source.json says that all is there.
    folder = files.parent / "smallbench"
    folder.mkdir()
    facts = {}
    for task, maker in makers.items():
        rows = list(probe_rows(language, rng, train, maker))
        lines = [json.dumps({"_row": i, **row}) + "\n" for i, row in enumerate(rows)]
        (folder / f"{task}.jsonl").write_text("".join(lines), encoding="utf-8")
        facts[task] = {
            "path": DATASET,
            "config": task,
            "split": "test",
            "rows": len(rows),
            "sha256": sha256_of(folder / f"{task}.jsonl"),
        }
    write_json(folder / "source.json", {"tasks": facts, "mirror": False})
    make_directory(output / "smallbench")
    publish(folder, output / "smallbench", "source.json")
    names = [language.lexicon[word] for word in labels]
    text = "# The generated corpus' own probes, in the format of configs/smallbench.yaml.\n"
    text += yaml.safe_dump({"seed": 0, "tasks": task_list(names)}, sort_keys=False)
    (files / "smallbench.yaml").write_text(text, encoding="utf-8")


def task_list(labels: Sequence[str]) -> list[dict[str, Any]]:
    """The entries of smallbench.yaml."""
    pair = {
        "prompt": "",
        "choices": ["{{ sentence_good }}", "{{ sentence_bad }}"],
        "gold": "0",
        "chance": 0.5,
        "target_delimiter": "",  # documents start without a space
    }
    asked: dict[str, dict[str, Any]] = {
        "replaced_word": pair,
        "swapped_words": pair,
        "next_word": {
            "prompt": "{{ text }}",
            "choices": {"field": "choices"},
            "gold": "{{ gold }}",
            "chance": 1 / CHOICES,
        },
        "next_label": {
            "balanced": "label",
            "prompt": "{{ text }}",
            "choices": list(labels),
            "gold": "{{ label }}",
            "chance": 0.5,
        },
    }
    return [
        {
            "name": name,
            "path": DATASET,
            "config": name,
            "split": "test",
            "n": PROBE_ITEMS,
            "metrics": ["accuracy"],
            **entry,
        }
        for name, entry in asked.items()
    ]


def probe_rows(
    language: Language,
    rng: np.random.Generator,
    train: str,
    maker: Callable[[list[int], int], dict[str, Any] | None],
) -> Iterator[dict[str, Any]]:
    """PROBE_ITEMS rows made of new sentences; those that stand in train are drawn again."""
    made = 0
    for _ in range(1000):  # rounds, far more than any language needs
        drawn, _bits = sample(language, rng, PROBE_ITEMS, PROBE_WORDS)
        for words in drawn.tolist():
            row = maker(words, made)
            if row is None or any(held in train for held in row.values() if isinstance(held, str)):
                continue
            yield row
            made += 1
            if made == PROBE_ITEMS:
                return
    raise Refusal("--lexicon, --successors: leave no sentence for the probes; ask for more words")


def spell(language: Language, words: Sequence[int]) -> str:
    """The text of a row of words."""
    return " ".join(language.lexicon[word] for word in words)


def replaced(
    language: Language, rng: np.random.Generator, words: list[int]
) -> dict[str, Any] | None:
    """Minimal pair: one word gives way to a word that cannot stand after the one before it."""
    at = int(rng.integers(1, len(words) - 1))
    other = int(rng.integers(len(language.lexicon)))
    if language.allows(words[at - 1], other):
        return None
    bad = [*words[:at], other, *words[at + 1 :]]
    return {"sentence_good": spell(language, words), "sentence_bad": spell(language, bad)}


def swapped(
    language: Language, rng: np.random.Generator, words: list[int]
) -> dict[str, Any] | None:
    """Minimal pair: two neighbours trade places, and what comes first cannot stand there."""
    at = int(rng.integers(1, len(words) - 1))
    if language.allows(words[at - 1], words[at + 1]):
        return None
    bad = [*words[:at], words[at + 1], words[at], *words[at + 2 :]]
    return {"sentence_good": spell(language, words), "sentence_bad": spell(language, bad)}


def next_word(
    language: Language, rng: np.random.Generator, words: list[int]
) -> dict[str, Any] | None:
    """Multiple choice: only one of the choices can come next."""
    *start, right = words
    others = rng.permutation(len(language.lexicon)).tolist()
    wrong = [word for word in others if not language.allows(start[-1], word)][: CHOICES - 1]
    gold = int(rng.integers(CHOICES))
    choices = [language.lexicon[word] for word in [*wrong[:gold], right, *wrong[gold:]]]
    return {"text": spell(language, start), "choices": choices, "gold": gold}


def next_label(
    language: Language, words: list[int], labels: tuple[int, int], wanted: int
) -> dict[str, Any] | None:
    """Classification: which of two fixed words can come next."""
    start = words[:-1]
    right, wrong = labels[wanted], labels[1 - wanted]
    if not language.allows(start[-1], right) or language.allows(start[-1], wrong):
        return None
    return {"text": spell(language, start), "label": wanted}


def label_words(language: Language) -> tuple[int, int]:
    """Two words that follow many words, but not the same ones."""
    import numpy as np

    follows = np.zeros((len(language.lexicon),) * 2)  # [first, second]
    np.put_along_axis(follows, language.successors, 1.0, axis=1)
    # For each pair, the smaller number of words that allow one of the two and not the other.
    only = follows.T @ (1 - follows)
    smaller = np.minimum(only, only.T)
    first, second = np.unravel_index(int(smaller.argmax()), smaller.shape)
    return int(first), int(second)
