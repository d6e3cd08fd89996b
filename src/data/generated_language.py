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

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from src.data.corpus import (
    SPLITS,
    corpus_parser,
    make_once,
    read_texts,
    write_documents,
    write_rows,
)
from src.spec.command_line import Refusal, at_least
from src.storage.files import make_directory, publish, write_json

Rng = np.random.Generator

DATASET = "generated/markov-words"
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
LETTERS = 4  # of every word
WORDS_PER_DOCUMENT = (40, 80)  # uniform, both included, independent of the words
HELD_OUT_SHARE = 10  # validation and test have a tenth of train's documents each
PROBE_ITEMS = 200
PROBE_WORDS = 11  # of a probe's sentence: the leakage check can judge 5 and more
CHOICES = 4
# The probes in the format of configs/smallbench.yaml; a document starts without a space.
PROBES: dict[str, dict[str, Any]] = {
    "replaced_word": {
        "prompt": "",
        "choices": ["{{ sentence_good }}", "{{ sentence_bad }}"],
        "gold": "0",
        "chance": 0.5,
        "target_delimiter": "",
    },
    "next_word": {
        "prompt": "{{ text }}",
        "choices": {"field": "choices"},
        "gold": "{{ gold }}",
        "chance": 1 / CHOICES,
    },
}


def main() -> None:
    parser = corpus_parser(__doc__)
    parser.add_argument("--seed", type=at_least(0), default=0, help="of everything (0)")
    parser.add_argument("--documents", type=at_least(10), default=4000, help="of train (4000)")
    parser.add_argument("--lexicon", type=at_least(16), default=96, help="words (96)")
    parser.add_argument("--successors", type=at_least(2), default=8, help="of each word (8)")
    args = parser.parse_args()
    limits = {"seed": 2**32 - 1, "documents": 10_000_000, "lexicon": 4096}
    limits["successors"] = args.lexicon // 4
    for option, limit in limits.items():
        if (value := getattr(args, option)) > limit:
            raise Refusal(f"--{option}: found {value}, expected at most {limit:,}")
    output: Path = args.output
    config = "-".join(f"{option}{getattr(args, option)}" for option in limits)

    def make(partial: Path) -> dict[str, Any]:
        rng = np.random.default_rng(args.seed)
        language = make_language(rng, args.lexicon, args.successors)
        files = partial / "files"
        splits = {}
        for split in SPLITS:
            count = args.documents // (1 if split == "train" else HELD_OUT_SHARE)
            splits[split] = make_split(language, rng, count, files, split)
        write_probes(language, rng, partial, output)
        arrays = ("successors", "weights", "stationary")
        chain = {name: getattr(language, name).tolist() for name in arrays}
        write_json(files / "language.json", {"lexicon": language.lexicon, **chain})
        print(
            f"{output}: {config}, {language.bits_per_word:.4f} bits a word, "
            f"{splits['test']['entropy_bits_per_byte']:.4f} bits a byte of test"
        )
        return {
            "licence": "CC0-1.0",
            "splits": splits,
            "entropy_bits_per_word": language.bits_per_word,
            "entropy_bits_first_word": language.bits_first_word,
            "entropy_bits_per_byte": language.bits_per_word / (LETTERS + 1),
        }

    make_once(output, DATASET, config, SPLITS, make, force=args.force)


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
        return entropy_bits(self.stationary)

    def allows(self, first: int, second: int) -> bool:
        return bool((self.successors[first] == second).any())

    def spell(self, words: Sequence[int]) -> str:
        return " ".join(self.lexicon[word] for word in words)


def entropy_bits(probabilities: np.ndarray) -> float:
    """-sum p log2 p of a distribution without zeros."""
    return -math.fsum(p * math.log2(p) for p in probabilities.tolist())


def make_language(rng: Rng, words: int, successors: int) -> Language:
    """Draw lexicon and successors; word w + 1 is always among w's, so every word is reached."""
    syllables = [consonant + vowel for consonant in CONSONANTS for vowel in VOWELS]
    numbers = rng.choice(len(syllables) ** 2, size=words, replace=False).tolist()
    lexicon = [syllables[n // len(syllables)] + syllables[n % len(syllables)] for n in numbers]
    followers = np.empty((words, successors), dtype=np.int64)
    for word in range(words):
        certain = (word + 1) % words
        others = rng.permutation(np.delete(np.arange(words), certain))[: successors - 1]
        followers[word] = rng.permutation(np.append(others, certain))
    weights = 1 / np.arange(1, successors + 1)
    weights /= weights.sum()
    return Language(lexicon, followers, weights, stationary_distribution(followers, weights))


def stationary_distribution(successors: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(W,) the solution of p = p P, sum p = 1; unique, as every word reaches every other."""
    words = len(successors)
    transition = np.zeros((words, words))
    np.put_along_axis(transition, successors, np.broadcast_to(weights, successors.shape), axis=1)
    equations = np.vstack([transition.T - np.eye(words), np.ones(words)])
    solution = np.linalg.lstsq(equations, np.append(np.zeros(words), 1.0), rcond=None)[0]
    assert solution.min() > 0 and np.allclose(solution @ transition, solution, atol=1e-12)
    return solution / solution.sum()


def sample(
    language: Language, rng: Rng, documents: int, words: int
) -> tuple[np.ndarray, np.ndarray]:
    """(D, T) words and (D, T) -log2 probability of each given what stands before it."""
    starts = np.searchsorted(np.cumsum(language.stationary)[:-1], rng.random(documents), "right")
    steps = rng.random((documents, words - 1))
    ranks = np.searchsorted(np.cumsum(language.weights)[:-1], steps, side="right")
    drawn = np.empty((documents, words), dtype=np.int64)
    drawn[:, 0] = starts
    for position in range(1, words):
        drawn[:, position] = language.successors[drawn[:, position - 1], ranks[:, position - 1]]
    bits = np.empty((documents, words))
    bits[:, 0] = -np.log2(language.stationary[starts])
    bits[:, 1:] = -np.log2(language.weights[ranks])
    return drawn, bits


def make_split(
    language: Language, rng: Rng, documents: int, folder: Path, split: str
) -> dict[str, Any]:
    """Write one split. Among its facts, `entropy_bits` is expected of texts of these lengths;
    `true_bits` is -log2 of this very split's probability, which differs by sampling error only."""
    shortest, longest = WORDS_PER_DOCUMENT
    lengths = rng.integers(shortest, longest, size=documents, endpoint=True)
    drawn, bits = sample(language, rng, documents, longest)
    texts = (language.spell(row[:n].tolist()) for row, n in zip(drawn, lengths, strict=True))
    pairs = ((split, text) for text in texts)
    facts = write_documents(DATASET, folder, [split], pairs)[split]
    in_document = np.arange(longest) < lengths[:, None]
    later_words = facts["words"] - documents
    expected = documents * language.bits_first_word + later_words * language.bits_per_word
    return {
        **facts,
        "entropy_bits": expected,
        "entropy_bits_per_byte": expected / facts["bytes"],
        "true_bits": float(bits[in_document].sum()),
    }


def write_probes(language: Language, rng: Rng, partial: Path, output: Path) -> None:
    """Write the probe tasks beside the corpus, in SmallBench's format."""
    train = "\n".join(read_texts(partial / "files" / "train.jsonl"))
    # A directory of its own, moved in before the corpus' source.json says that all is there.
    folder = partial / "smallbench"
    folder.mkdir()
    tasks, facts = [], {}
    for (task, entry), make_row in zip(PROBES.items(), (replaced, next_word), strict=True):
        rows = probe_rows(language, rng, train, make_row)
        numbered = ({"_row": number, **row} for number, row in enumerate(rows))
        source = {"path": DATASET, "config": task, "split": "test"}
        tasks.append({"name": task, **source, "n": PROBE_ITEMS, "metrics": ["accuracy"], **entry})
        facts[task] = {**source, **write_rows(folder / f"{task}.jsonl", numbered)}
    write_json(folder / "source.json", {"tasks": facts, "mirror": False})
    make_directory(output / "smallbench")
    publish(folder, output / "smallbench", "source.json")
    text = "# The generated corpus' own probes, in the format of configs/smallbench.yaml.\n"
    text += yaml.safe_dump({"seed": 0, "tasks": tasks}, sort_keys=False)
    (partial / "files" / "smallbench.yaml").write_text(text, encoding="utf-8")


MakeRow = Callable[[Language, Rng, list[int]], dict[str, Any] | None]


def probe_rows(language: Language, rng: Rng, train: str, make_row: MakeRow) -> list[dict[str, Any]]:
    """PROBE_ITEMS rows made of new sentences; those that stand in train are drawn again."""
    rows: list[dict[str, Any]] = []
    for _ in range(1000):  # rounds, far more than any language needs
        drawn, _ = sample(language, rng, PROBE_ITEMS, PROBE_WORDS)
        for words in drawn.tolist():
            row = make_row(language, rng, words)
            if row and not any(text in train for text in row.values() if isinstance(text, str)):
                rows.append(row)
            if len(rows) == PROBE_ITEMS:
                return rows
    raise Refusal("--lexicon, --successors: leave no sentence for the probes; ask for more words")


def replaced(language: Language, rng: Rng, words: list[int]) -> dict[str, Any] | None:
    """Minimal pair: one word gives way to a word that cannot stand after the one before it."""
    position = int(rng.integers(1, len(words) - 1))
    word = int(rng.integers(len(language.lexicon)))
    if language.allows(words[position - 1], word):
        return None
    bad = [*words[:position], word, *words[position + 1 :]]
    return {"sentence_good": language.spell(words), "sentence_bad": language.spell(bad)}


def next_word(language: Language, rng: Rng, words: list[int]) -> dict[str, Any] | None:
    """Multiple choice: only one of the choices can come next."""
    *start, correct = words
    others = rng.permutation(len(language.lexicon)).tolist()
    wrong = [word for word in others if not language.allows(start[-1], word)][: CHOICES - 1]
    gold = int(rng.integers(CHOICES))
    choices = [language.lexicon[word] for word in [*wrong[:gold], correct, *wrong[gold:]]]
    return {"text": language.spell(start), "choices": choices, "gold": gold}
