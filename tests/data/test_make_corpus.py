"""The generated corpus against theory: its entropy, its statistics, its probes."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from src.data.tasks import load_items, load_tasks
from tests.data import hashes, refused, run, sha256, texts_of

WORDS, SUCCESSORS = 64, 6


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("generated") / "corpus"
    run("make_corpus.py", *small(output))
    return output


def small(output: Path, seed: int = 3, documents: int = 2000) -> tuple[Any, ...]:
    sizes = ("--lexicon", WORDS, "--successors", SUCCESSORS, "--documents", documents)
    return ("--output", output, "--seed", seed, *sizes)


@pytest.fixture(scope="module")
def source(corpus: Path) -> dict[str, Any]:
    return json.loads((corpus / "source.json").read_bytes())


@pytest.fixture(scope="module")
def transition(corpus: Path) -> tuple[dict[str, int], np.ndarray, np.ndarray]:
    """Word numbers, (W, W) transition matrix and (W,) first-word distribution of language.json."""
    language = json.loads((corpus / "language.json").read_bytes())
    matrix = np.zeros((WORDS, WORDS))
    for word, successors in enumerate(language["successors"]):
        assert len(set(successors)) == SUCCESSORS
        matrix[word, successors] = language["weights"]
    number = {word: i for i, word in enumerate(language["lexicon"])}
    return number, matrix, np.array(language["stationary"])


def test_the_stated_entropies_are_those_of_the_chain(
    source: dict[str, Any], transition: tuple[dict[str, int], np.ndarray, np.ndarray]
) -> None:
    _, matrix, first = transition
    np.testing.assert_allclose(matrix.sum(axis=1), 1)
    np.testing.assert_allclose(first @ matrix, first, atol=1e-12)  # stationary
    reached = np.linalg.matrix_power(np.eye(WORDS) + (matrix > 0), WORDS)
    assert (reached > 0).all()  # every word reaches every other: the distribution is unique
    logs = np.log2(np.where(matrix > 0, matrix, 1))
    rate = -(first[:, None] * matrix * logs).sum()
    assert source["entropy_bits_per_word"] == pytest.approx(rate, rel=1e-12)
    assert source["entropy_bits_first_word"] == pytest.approx(-(first * np.log2(first)).sum())
    assert source["entropy_bits_per_byte"] == pytest.approx(rate / 5)  # four letters and a space
    # In closed form for probabilities proportional to 1 / rank.
    total = sum(1 / rank for rank in range(1, SUCCESSORS + 1))
    logs_of_ranks = sum(math.log2(rank) / rank for rank in range(1, SUCCESSORS + 1))
    assert rate == pytest.approx(math.log2(total) + logs_of_ranks / total)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_texts_have_the_probability_that_theory_expects(
    corpus: Path,
    source: dict[str, Any],
    transition: tuple[dict[str, int], np.ndarray, np.ndarray],
    split: str,
) -> None:
    """The true model's cross-entropy on the text, read back, within 4 standard errors."""
    number, matrix, first = transition
    facts = source["splits"][split]
    texts = texts_of(corpus / f"{split}.jsonl")
    rows = [[number[word] for word in text.split(" ")] for text in texts]
    bits = 0.0
    for row in rows:
        steps = matrix[row[:-1], row[1:]]
        assert (steps > 0).all()
        bits -= math.log2(first[row[0]]) + np.log2(steps).sum()
    assert facts["true_bits"] == pytest.approx(bits)

    documents, words = len(rows), sum(map(len, rows))
    assert (facts["documents"], facts["words"]) == (documents, words)
    assert facts["bytes"] == sum(len(text.encode()) for text in texts) == 5 * words - documents
    assert facts["sha256"] == sha256(corpus / f"{split}.jsonl")
    expected = (
        documents * source["entropy_bits_first_word"]
        + (words - documents) * source["entropy_bits_per_word"]
    )
    assert facts["entropy_bits"] == pytest.approx(expected)
    assert facts["entropy_bits_per_byte"] == pytest.approx(expected / facts["bytes"])
    # Ranks are independent draws, so the variance of the sum is the sum of variances.
    weights = np.sort(matrix[0][matrix[0] > 0])
    variance = documents * surprise_variance(first) + (words - documents) * surprise_variance(
        weights
    )
    assert abs(bits - expected) < 4 * math.sqrt(variance)


def surprise_variance(probabilities: np.ndarray) -> float:
    """Variance of -log2 p under p, bits squared."""
    surprise = -np.log2(probabilities)
    mean = (probabilities * surprise).sum()
    return float((probabilities * (surprise - mean) ** 2).sum())


def test_train_text_follows_the_chain_and_starts_stationary(
    corpus: Path, transition: tuple[dict[str, int], np.ndarray, np.ndarray]
) -> None:
    """Pearson's statistic of transitions and of first words, within 5 sd of its mean."""
    number, matrix, first = transition
    rows = [[number[word] for word in text.split()] for text in texts_of(corpus / "train.jsonl")]
    pairs = Counter(pair for row in rows for pair in zip(row, row[1:], strict=False))
    counts = np.zeros_like(matrix)
    for (before, after), count in pairs.items():
        counts[before, after] = count
    expected = counts.sum(axis=1, keepdims=True) * matrix
    possible = expected > 0
    statistic = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    freedom = WORDS * (SUCCESSORS - 1)
    assert abs(statistic - freedom) < 5 * math.sqrt(2 * freedom)

    starts = np.bincount([row[0] for row in rows], minlength=WORDS)
    statistic = ((starts - len(rows) * first) ** 2 / (len(rows) * first)).sum()
    assert abs(statistic - (WORDS - 1)) < 5 * math.sqrt(2 * (WORDS - 1))
    lengths = [len(row) for row in rows]
    assert (min(lengths), max(lengths)) == (40, 80)


def test_a_text_has_one_reading_only(transition: Any) -> None:
    """All words are equally long: none begins another, so ends of words carry no information."""
    lexicon = transition[0]
    assert len(lexicon) == WORDS and {len(word) for word in lexicon} == {4}


def test_the_same_seed_gives_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    run("make_corpus.py", *small(tmp_path / "again"))
    assert hashes(tmp_path / "again") == hashes(corpus)
    assert hashes(tmp_path / "again" / "smallbench") == hashes(corpus / "smallbench")
    assert "nothing to do" in run("make_corpus.py", *small(tmp_path / "again"))
    assert "--force" in refused("make_corpus.py", *small(tmp_path / "again", seed=4))
    assert hashes(tmp_path / "again") == hashes(corpus)
    run("make_corpus.py", *small(tmp_path / "again", seed=4), "--force")
    changed = hashes(tmp_path / "again")
    assert all(changed[name] != digest for name, digest in hashes(corpus).items() if "json" in name)


def test_sizes_out_of_range_are_refused(tmp_path: Path) -> None:
    for option, value in (
        ("--successors", 1),
        ("--lexicon", 5),
        ("--documents", 0),
        ("--seed", -1),
        ("--successors", 25),
        ("--lexicon", 4_097),
        ("--documents", 10_000_001),
        ("--seed", 2**32),
    ):
        assert option in refused("make_corpus.py", "--output", tmp_path / "x", option, value)
    assert not (tmp_path / "x").exists()


def test_the_quickstarts_vocabulary_can_be_filled(tmp_path: Path) -> None:
    run("make_corpus.py", "--output", tmp_path / "corpus")
    arguments = ("--input", tmp_path / "corpus", "--vocab_size", 512, "--output", tmp_path / "t")
    run("preprocess_lm.py", *arguments)
    meta = json.loads((tmp_path / "t" / "v512" / "meta.json").read_bytes())
    train = meta["splits"]["train"]
    assert train["text_tokens"] < 1.2 * train["words"]  # nearly every word is one token
    assert meta["corpus"]["entropy_bits_per_word"] > 2


def test_probes_load_as_smallbench_and_their_answers_follow_from_the_chain(
    corpus: Path, transition: tuple[dict[str, int], np.ndarray, np.ndarray]
) -> None:
    number, matrix, _ = transition
    train = texts_of(corpus / "train.jsonl")

    def possible(text: str) -> bool:
        words = [number[word] for word in text.split()]
        return bool((matrix[words[:-1], words[1:]] > 0).all())

    tasks = load_tasks(corpus / "smallbench.yaml")
    assert [task.name for task in tasks] == ["replaced_word", "next_word"]
    entries = yaml.safe_load((corpus / "smallbench.yaml").read_text())["tasks"]
    for task, entry in zip(tasks, entries, strict=True):
        items = load_items(task, corpus / "smallbench")
        assert items is not None and len(items) == entry["n"] == 200
        for item in items:
            texts = [(item.prompt + item.delimiter + choice).strip() for choice in item.choices]
            assert [possible(text) for text in texts] == [
                i == item.gold for i in range(len(item.choices))
            ]
            correct = item.prompt or item.choices[item.gold]
            assert len(correct.split()) >= 5 and not any(correct in text for text in train)
    answers = Counter(item.gold for item in load_items(tasks[1], corpus / "smallbench") or [])
    assert set(answers) == {0, 1, 2, 3} and max(answers.values()) < 80
