"""The predictions' command: every cell of a sweep, from realised integers, with its day."""

from __future__ import annotations

import json
import math

import pytest

from src.analysis.science import predictions, published_laws
from tests import ROOT

FILES = [ROOT / "configs" / f"{name}.yaml" for name in ("frontier", "miniature_frontier")]


def test_every_configuration_has_its_prediction_and_the_file_its_day(tmp_path, capsys):
    output = tmp_path / "made" / "predictions.json"
    command = ["--config", *map(str, FILES), "--date", "2026-11-23", "--output", str(output)]
    assert predictions.main(command) == 0
    content = json.loads(output.read_text())
    assert content["date"] == "2026-11-23" and set(content["sources"]) == {"tao", "levine"}
    frontier = content["sweeps"]["frontier.yaml"]
    assert list(frontier["configurations"]) == [f"share{s}" for s in (35, 25, 30, 40, 45, 50)]
    assert frontier["configurations"]["share35"]["tao_ln_ppl_ratio"] == 0
    # SCIENCE.md's +5.0 % is of 45.0 against 35.0 % of 10M; the built cells are 44.8 and 35.2 %.
    built = math.expm1(frontier["configurations"]["share45"]["tao_ln_ppl_ratio"])
    assert 0.04 < built < 0.05
    assert frontier["levine_best_share"] == published_laws.levine_best_share(10_485_760, 16_384)
    assert f"PPL against share35 {built:+.1%}" in capsys.readouterr().out
    silent = content["sweeps"]["miniature_frontier.yaml"]["configurations"]
    assert silent["mini-share45"]["levine_layers"] is None  # d = 144, below the law's 154
    assert 0 < silent["mini-share50"]["levine_layers"] < 1


def test_the_published_predictions_are_what_the_command_writes():
    published = json.loads((ROOT / "results" / "predictions.json").read_text())
    files = [ROOT / "configs" / name for name in published["sweeps"]]
    assert json.loads(json.dumps(predictions.predict(files, published["date"]))) == published


@pytest.mark.parametrize(
    ("config", "date", "message"),
    [
        ("frontier", "today", "--date: found 'today', expected a day"),
        ("miniature_lr", "2026-11-23", "found a list of learning rates"),
        ("missing", "2026-11-23", "found no such file"),
    ],
)
def test_bad_input_is_refused(tmp_path, capsys, config, date, message):
    file = str(ROOT / "configs" / f"{config}.yaml")
    output = tmp_path / "p.json"
    assert predictions.main(["--config", file, "--date", date, "--output", str(output)]) == 78
    assert message in capsys.readouterr().err and not output.exists()
