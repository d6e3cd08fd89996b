"""The quickstart's last sentence is made of its results."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from tests import python

COLUMNS = ("experiment", "status", "test_perplexity", "test_bits_per_byte")
SHAPE = {"embedding_ratio_built": 0.14, "glu_expansion_built": 2.667}


def last_words(folder: Path, *runs: tuple[str, str, float | str, float | str]) -> str:
    (folder / "corpus").mkdir(exist_ok=True)
    source = {"splits": {"test": {"entropy_bits_per_byte": 0.5}}}
    (folder / "corpus" / "source.json").write_text(json.dumps(source))
    with (folder / "results_summary.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["run", *COLUMNS, *SHAPE])
        writer.writeheader()
        for run in runs:
            writer.writerow({"run": run[0], **dict(zip(COLUMNS, run, strict=True)), **SHAPE})
    done = python("-m", "src.analysis.quickstart", folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_last_sentence_follows_the_results(tmp_path: Path) -> None:
    (tmp_path / "ppl_vs_glu_expansion.png").touch()
    broken = ("broken", "failed", "", "")
    sentence = last_words(
        tmp_path, ("a", "finished", 6.0, 0.7), broken, ("b", "finished", 5.25, 0.55)
    )
    assert sentence.startswith(f"{tmp_path / 'ppl_vs_glu_expansion.png'}: of 2 finished runs")
    assert "lowest test perplexity is b 5.250" in sentence and "highest a 6.000" in sentence
    assert "0.5500 bits a byte, 10.0% more than the 0.5000" in sentence
    second = last_words(tmp_path, ("a", "finished", 5.0, 0.6), ("b", "finished", 5.25, 0.7))
    assert "lowest test perplexity is a 5.000" in second and "20.0% more" in second
    assert "no run finished" in last_words(tmp_path, broken)
