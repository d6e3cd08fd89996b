"""Tables of decisions: both readings of the winner's rule."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from src.analysis import aggregate, report_tables

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


@pytest.mark.parametrize("content", [{"complete": True}, {"decisions": {"a": "b"}}])
def test_a_file_that_is_no_study_leaves_the_page_alone(
    content: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report, summary = tmp_path / "REPORT.md", tmp_path / "results_summary.csv"
    aggregate.write_csv([{"run": "a", "status": "finished", "phase": "full", "seed": 0}], summary)
    (tmp_path / "x.json").write_text(json.dumps(content))
    page = "<!-- table:decisions -->\nas they were\n<!-- /table:decisions -->\n"
    report.write_text(page)
    line = ["--from_csv", str(summary), "--study", str(tmp_path / "x.json")]
    assert aggregate.main([*line, "--report", str(report)]) == 78
    assert "no list of objects under `decisions`" in capsys.readouterr().err
    assert report.read_text() == page
