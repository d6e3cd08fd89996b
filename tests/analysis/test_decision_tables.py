"""Tables of decisions: both readings of the winner's rule, and all predictions."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from src.analysis import aggregate, report_tables
from src.analysis.prediction_table import predictions_table
from src.analysis.run_csv import table

WINNER = {
    "baseline": "emb35", "strict": "a", "margin": "b", "reason": "2 candidates against emb35.",
    "candidates": [
        {"name": "a", "perplexity_ratio": 0.9, "strict": True, "margin": True, "reasons": ["x"]},
        {"name": "b", "perplexity_ratio": 0.85, "strict": False, "margin": True, "reasons": ["y"]},
    ],
}  # fmt: skip


def test_both_readings_of_the_winners_rule_stand_side_by_side() -> None:
    lines = report_tables.winner_table({"winner": WINNER}).splitlines()
    assert "| a | -10.0 % | yes | yes | x |" in lines and "| b | -15.0 % | no | yes | y |" in lines
    assert lines[-1].startswith("| **winner** |  | **a** | **b** |")
    nobody = report_tables.winner_table({"winner": {**WINNER, "strict": None}})
    assert "| **no winner** | **b** |" in nobody


def test_a_report_of_a_study_without_both_readings_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report, summary = tmp_path / "REPORT.md", tmp_path / "results_summary.csv"
    aggregate.write_csv([{"run": "a", "status": "finished", "phase": "full", "seed": 0}], summary)
    study = tmp_path / "study.json"
    study.write_text(json.dumps({"winner": WINNER, "decisions": []}))
    line = ["--from_csv", str(summary), "--study", str(study), "--report", str(report)]
    report.write_text("# A report\n")
    assert aggregate.main(line) == 78
    assert "both readings of the winner's rule belong" in capsys.readouterr().err
    report.write_text("# A report\n<!-- table:winner -->\n<!-- /table:winner -->\n")
    assert aggregate.main(line) == 0
    assert "| **a** | **b** |" in report.read_text()


def row(share: float, seed: int, loss: float, **extra: Any) -> dict[str, Any]:
    name = f"emb{100 * share:.0f}"
    return {
        "run": f"{name}-seed{seed}", "experiment": name, "baseline_name": "emb35", "seed": seed,
        "sweep": "embed.yaml", "phase": "full", "status": "finished", "test_loss": loss,
        "embedding_ratio_built": share, "total_params_asked": 10, "vocab_size": 5,
        "n_layers": 6, **extra,
    }  # fmt: skip


PREDICTIONS = {
    "sweeps": {
        "frontier.yaml": {
            "total_params_asked": 10, "vocab_size": 5, "baseline": "s35",
            "tao_best_share": 0.2, "levine_best_share": 0.5, "levine_best_layers": 3.0,
            "cells": {"s35": {"share": 0.35, "tao_ln_ppl_ratio": 0.0, "embedding_dim": None},
                      "s45": {"share": 0.45, "tao_ln_ppl_ratio": 0.1, "embedding_dim": None},
                      "s25": {"share": 0.25, "tao_ln_ppl_ratio": -0.1, "embedding_dim": None}},
        }
    }
}  # fmt: skip


def test_a_prediction_that_agrees_stands_beside_one_that_does_not() -> None:
    rows = [row(0.35, seed, 6.0) for seed in range(3)]
    rows += [row(0.45, seed, 5.9) for seed in range(3)] + [row(0.25, 0, 6.2)]
    lines = predictions_table(table(rows), PREDICTIONS).splitlines()
    (best,) = (line for line in lines if "best share | 20" in line)
    assert "| 20.0 % | 50.0 % | 45.0 % (an end of those run) | 0, 1, 2 | Levine et al. |" in best
    at_45, at_25 = (next(x for x in lines if f"PPL at {share}.0 %" in x) for share in (45, 25))
    observed = f"{100 * math.expm1(-0.1):+.1f} %"
    assert f"| {100 * math.expm1(0.1):+.1f} % | – | {observed} | 0, 1, 2 | no |" in at_45
    assert at_25.endswith("| 0 of 3 | no |")  # one seed beside three, and it says so
    near = [row(0.35, 0, 6.0), row(0.351, 0, 5.9)]  # a GLU sweep: its share is not what varies
    assert "no prediction on record" in predictions_table(table(near), PREDICTIONS)
    other = [{**r, "vocab_size": 6} for r in rows]
    assert "no prediction on record" in predictions_table(table(other), PREDICTIONS)
