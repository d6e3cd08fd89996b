"""python -m src.analysis.compare: the paired comparison of finished runs, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from src.analysis import compare
from src.spec.command_line import BAD_INPUT, OK

DOCUMENTS = 40


def write_run(
    path: Path,
    seed: int,
    gain: float = 0.0,
    *,
    tokenizer: str = "a",
    compute: str | None = "here",
    documents: int = DOCUMENTS,
    sd: float = 0.001,
) -> Path:
    """A finished run whose documents cost `gain` nats a token less than 5."""
    rng = np.random.default_rng([seed, int(1e6 * gain)])
    tokens = np.arange(100, 100 + DOCUMENTS)
    noise = np.random.default_rng(99).normal(0, 0.2, DOCUMENTS) + rng.normal(0, sd)
    path.mkdir(parents=True)
    losses = {"nats": tokens * (5 - gain + noise), "tokens": tokens, "bytes": 4 * tokens}
    kept = {f"document_{name}": values[:documents] for name, values in losses.items()}
    np.savez(path / "documents_test.npz", **kept)
    metrics = {"seed": seed, "tokenizer_sha256": tokenizer * 64, "model_digest": str(gain)}
    metrics |= {} if compute is None else {"compute_digest": compute}
    (path / "metrics.json").write_text(json.dumps(metrics))
    return path


def sides(folder: Path, seeds: int, gain: float = 0.1, **stated: Any) -> list[str]:
    """Arguments that compare `seeds` runs with a gain against as many without."""
    runs = {
        name: [str(write_run(folder / f"{name}{seed}", seed, g, **stated)) for seed in range(seeds)]
        for name, g in (("baseline", 0.0), ("ours", gain))
    }
    return ["--baseline", *runs["baseline"], "--ours", *runs["ours"]]


def compared(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert compare.main([*arguments, "--json"]) == OK
    return json.loads(capsys.readouterr().out)


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert compare.main(arguments) == BAD_INPUT
    return capsys.readouterr().err


@pytest.mark.parametrize("measure", ["perplexity", "bits_per_byte"])
def test_a_known_gain_is_found(tmp_path: Path, measure: str, capsys) -> None:
    result = compared([*sides(tmp_path, 3), "--measure", measure], capsys)
    truth = 100 * (np.exp(-0.1) - 1) if measure == "perplexity" else -2.0
    assert result["percent"] == pytest.approx(truth, abs=0.15)
    assert result["low_percent"] <= result["percent"] <= result["high_percent"] < 0
    assert (result["seeds"], result["documents"], result["verdict"]) == (3, DOCUMENTS, "different")
    assert result["paired"] and result["seed_noise_df"] == 2


def test_one_seed_gets_no_verdict(tmp_path: Path, capsys) -> None:
    """However far apart: the same model at two micro-batches used to be "different, p 0.001"."""
    arguments = sides(tmp_path, 1)
    result = compared(arguments, capsys)
    assert (result["verdict"], result["p"], result["seeds"]) == ("no verdict", None, 1)
    assert compare.main(arguments) == OK
    message = capsys.readouterr().out
    assert "document noise only" in message and "different" not in message and ", p " not in message


def test_runs_computed_otherwise_are_refused_or_compared_without_pairs(
    tmp_path: Path, capsys
) -> None:
    arguments = sides(tmp_path, 2)
    other = write_run(tmp_path / "elsewhere", 2, 0.1, compute="elsewhere")
    there = write_run(tmp_path / "here", 2)
    arguments = [*arguments[:3], str(there), *arguments[3:], str(other)]
    message = refused(arguments, capsys)
    assert "ours seed 2 (compute elsewher)" in message and "--unlike" in message
    result = compared([*arguments, "--unlike"], capsys)
    assert not result["paired"] and result["seeds"] == 3
    assert "without pairs" in result["sentence"]


def test_runs_that_do_not_say_how_they_were_computed_are_no_pairs(tmp_path: Path, capsys) -> None:
    arguments = sides(tmp_path, 2, compute=None)
    assert "not recorded" in refused(arguments, capsys)
    assert compared([*arguments, "--unlike"], capsys)["seeds"] == 2


def test_one_run_named_twice_counts_once(tmp_path: Path, capsys) -> None:
    arguments = sides(tmp_path, 2)
    plain = compared(arguments, capsys)
    copy = write_run(tmp_path / "copy", 1, 0.1)
    again = compared([*arguments, str(copy)], capsys)
    assert again["seeds"] == 2 and again["p"] == plain["p"]
    assert str(copy) in again["notes"][0] and "counts once" in again["sentence"]
    other = write_run(tmp_path / "other", 1, 0.2)
    assert "seed 1 again" in refused([*arguments, str(other)], capsys)
    silent = write_run(tmp_path / "silent", 2, 0.1, compute=None)  # of an older build
    twice = write_run(tmp_path / "silent again", 2, 0.1, compute=None)
    unlike = compared([*arguments, str(silent), str(twice), "--unlike"], capsys)
    assert len(unlike["notes"]) == 1 and str(twice) in unlike["notes"][0]


def test_other_pairs_of_the_study_tell_the_seed_noise(tmp_path: Path, capsys) -> None:
    arguments = sides(tmp_path, 2, sd=0.01)
    more = [str(write_run(tmp_path / f"c{g}{seed}", seed, g / 100, sd=0.01))
            for g in (3, 4, 5) for seed in range(2)]  # fmt: skip
    alone, pooled = compared(arguments, capsys), compared([*arguments, "--pool", *more], capsys)
    assert (alone["seed_noise_df"], pooled["seed_noise_df"]) == (1, 4)
    assert pooled["percent"] == alone["percent"] and pooled["seeds"] == 2
    assert pooled["seed_noise"] != alone["seed_noise"]


def test_bits_per_byte_compares_the_documents_that_both_scored(tmp_path: Path, capsys) -> None:
    """A limit in tokens keeps fewer documents under another tokenizer."""
    runs = [str(write_run(tmp_path / f"base{seed}", seed)) for seed in range(2)]
    fewer = [str(write_run(tmp_path / f"ours{seed}", seed, 0.1, tokenizer="b", documents=25))
             for seed in range(2)]  # fmt: skip
    arguments = ["--baseline", *runs, "--ours", *fewer]
    assert "two tokenizers cannot be compared" in refused(arguments, capsys)
    result = compared([*arguments, "--measure", "bits_per_byte"], capsys)
    assert result["documents"] == 25 and result["percent"] == pytest.approx(-2.0, abs=0.15)


def test_what_is_no_finished_run_or_scored_other_documents_is_refused(
    tmp_path: Path, capsys
) -> None:
    base, other = write_run(tmp_path / "base", 0), write_run(tmp_path / "other", 0)
    (tmp_path / "cut").mkdir()
    cut = ["--baseline", str(base), "--ours", str(tmp_path / "cut")]
    assert "expected a finished run" in refused(cut, capsys)
    seed = ["--baseline", str(base), "--ours", str(write_run(tmp_path / "seed", 1))]
    assert "no run of this seed" in refused(seed, capsys)
    with np.load(other / "documents_test.npz") as arrays:
        shuffled = {name: values[::-1] for name, values in arrays.items()}
    np.savez(other / "documents_test.npz", **shuffled)
    message = refused(["--baseline", str(base), "--ours", str(other)], capsys)
    assert "scored other documents" in message
    whole = (base / "documents_test.npz").read_bytes()
    (other / "documents_test.npz").write_bytes(whole[: len(whole) // 2])
    damaged = ["--baseline", str(base), "--ours", str(other)]
    assert "documents_test.npz: found a damaged file" in refused(damaged, capsys)


def test_the_same_program_on_another_processor_pairs_and_that_is_said(
    tmp_path: Path, capsys
) -> None:
    """A study that moves: one side's second seed was computed with other instructions."""
    sides_of = sides(tmp_path, 2)
    conditions = {"source_sha256": "s", "torch": "2.13.0", "device_name": "AMD EPYC"}
    for run in sides_of[1:3] + sides_of[4:]:
        there = run.endswith("ours1")
        one = conditions | {"cpu_capability": "AVX2" if there else "AVX512"}
        metrics = json.loads((Path(run) / "metrics.json").read_text())
        metrics["compute_digest"] = "there" if there else "here"
        (Path(run) / "metrics.json").write_text(json.dumps(metrics))
        (Path(run) / "environment.json").write_text(json.dumps({"computed": [one]}))
    result = compared(sides_of, capsys)
    assert result["paired"] and result["seeds"] == 2 and result["verdict"] == "different"
    assert "1 of 2 pairs computed on two kinds of processor" in result["sentence"]
    assert "AMD EPYC AVX2 / AMD EPYC AVX512" in result["sentence"]
    other = {"computed": [conditions | {"torch": "2.12.0", "cpu_capability": "AVX512"}]}
    (tmp_path / "ours1/environment.json").write_text(json.dumps(other))
    assert "ours seed 1" in refused(sides_of, capsys)
    # One seed by two programs is one seed.
    copy = Path(shutil.copytree(tmp_path / "ours1", tmp_path / "again"))
    (copy / "environment.json").write_text(json.dumps({"computed": [conditions]}))
    result = compared([*sides_of, str(copy), "--unlike"], capsys)
    assert result["seeds"] == 2 and f"{copy} is seed 1 again" in result["sentence"]
