"""The analysis of run directories finds what was planted in them, and says what it cannot know."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from src.analysis.run_csv import write_csv
from src.analysis.run_table import read_rows
from src.analysis.science import fits
from src.analysis.science import report as science
from tests import ROOT, planted_study


def sweep_of(analysis, sweep, phase="full", rate="one rate"):
    return next(
        a for a in analysis["sweeps"] if (a["sweep"], a["phase"], a["rate"]) == (sweep, phase, rate)
    )


def test_the_factorised_sweep_shows_the_planted_optimum_and_the_frontier_one_that_depth_moved(
    analysis,
):
    """Depth falls as the frontier's share grows, so its optimum is not the share's own."""
    factorised, frontier = (
        sweep_of(analysis, f"{name}.yaml") for name in ("factorised", "frontier")
    )
    for shape in (factorised, frontier):
        assert shape["axis"] == "share" and len(shape["configurations"]) == 6
        assert [len(configuration["seeds"]) for configuration in shape["configurations"]] == [3] * 6
        assert shape["seed_noise"]["df"] == 12
        assert 0.002 < shape["seed_noise"]["sd"] < 0.008
    own = frontier["curves"]["share"]["optimum"]
    assert own["high"] < planted_study.BEST_SHARE  # where depth pays, the frontier leans to depth
    assert factorised["curves"]["share"]["verdict"] in ("edge", "undecided")  # 36 % is its end


def test_the_seeds_of_a_configuration_are_one_point(tmp_path):
    """Seeds share what a curve does not fit: they add no degrees of freedom."""
    planted_study.write(tmp_path, ["frontier"], seeds=(0, 1, 2))
    runs = science.read_runs([], [tmp_path])
    (sweep,) = science.analyse(runs, {})["sweeps"]
    y = np.log(runs["test_bits_per_byte"]).groupby(runs["experiment"], sort=False).mean()
    share = runs.groupby("experiment", sort=False)["embedding_ratio_built"].first()
    prediction, alone = sweep["curves"]["share"], fits.quadratic(share, y)
    assert (prediction["points"], prediction["df"]) == (6, 3)
    assert prediction["optimum"]["value"] == pytest.approx(alone.optimum.value)
    assert prediction["sd"] == pytest.approx(alone.sd)


def test_the_surface_over_both_sweeps_separates_share_from_depth(analysis):
    both = next(s for s in analysis["surfaces"] if s["terms"] == ["share", "share^2", "ln L"])
    assert both["sweep"] == ["factorised.yaml", "frontier.yaml"]
    depth, bowl = both["coefficients"]["ln L"], both["coefficients"]["share^2"]
    assert depth["low"] <= planted_study.DEPTH <= depth["high"] < 0
    assert bowl["low"] <= planted_study.BOWL <= bowl["high"] and bowl["low"] > 0
    best = both["best_share"]
    assert best["low"] <= planted_study.BEST_SHARE <= best["high"]
    assert best["high"] - best["low"] < 0.05
    assert max(both["inflation"].values()) < 10 and not both["warnings"]
    whole = next(s for s in analysis["surfaces"] if s["configurations"] == "all configurations")
    for term, truth in (("share^2", planted_study.BOWL), ("glu^2", 0.01), ("share*glu", 0.0)):
        estimate = whole["coefficients"][term]
        assert estimate["low"] - 0.5 * (estimate["high"] - estimate["low"]) <= truth, term
        assert truth <= estimate["high"] + 0.5 * (estimate["high"] - estimate["low"]), term


def test_a_prediction_stands_beside_its_sweep(analysis):
    prediction = sweep_of(analysis, "frontier.yaml")["prediction"]
    assert prediction["date"] == "2026-11-23" and prediction["tao_best_share"] == pytest.approx(
        0.2, abs=0.01
    )
    labels = [
        configuration["label"]
        for configuration in sweep_of(analysis, "frontier.yaml")["configurations"]
    ]
    assert (
        list(prediction["configurations"]) == labels
        and len(set(prediction["configurations"].values())) == 6
    )
    assert sweep_of(analysis, "depth_control.yaml")["prediction"] is None


def test_the_glu_sweeps_are_curves_over_expansion(analysis):
    control = sweep_of(analysis, "depth_control.yaml")
    assert control["axis"] == "glu" and set(control["curves"]) == {"glu", "ln glu"}
    assert {configuration["n_layers"] for configuration in control["configurations"]} == {9}


def test_each_configuration_is_judged_at_its_own_best_rate_and_at_the_shared_one(analysis):
    own, shared = (a for a in analysis["sweeps"] if a["sweep"] == "miniature_lr.yaml")
    assert (own["rate"], shared["rate"].partition(" rate ")[0]) == ("own best rate", "shared")
    one = {configuration["learning_rate"] for configuration in shared["configurations"]}
    assert one == {float(shared["rate"].rpartition(" ")[2])}
    assert {configuration["learning_rate"] for configuration in own["configurations"]} != one
    for shape in (own, shared):
        assert shape["baseline"] == "mini-tune35"
        assert [
            configuration["label"]
            for configuration in shape["configurations"]
            if configuration["baseline"]
        ] == ["mini-tune35"]
    for configuration in own["configurations"]:  # near the planted rate
        assert (
            0.5
            <= configuration["learning_rate"] / planted_study.best_rate(configuration["share"])
            <= 2
        )


def test_a_rate_is_chosen_on_dev_and_not_on_test(tmp_path):
    planted_study.write(tmp_path, ["miniature_lr"])
    runs = science.read_runs([], [tmp_path])
    name, rates = runs["configuration"].iloc[0], sorted(runs["learning_rate"].unique())
    mine = runs["configuration"] == name
    for key, best in (("dev", rates[0]), ("test", rates[1])):
        worse = mine & (runs["learning_rate"] != best)
        for number in ("loss", "bits_per_byte"):
            runs.loc[worse, f"{key}_{number}"] += 1
    (own, *_) = science.analyse(runs, {})["sweeps"]
    (chosen,) = {
        configuration["learning_rate"]
        for configuration in own["configurations"]
        if configuration["label"] == name
    }
    assert chosen == rates[0]


def test_a_table_without_its_details_is_refused(tmp_path, capsys):
    planted_study.write(tmp_path / "logs", ["embed_ratio"])
    summary = tmp_path / "results_summary.csv"
    write_csv(read_rows(tmp_path / "logs"), summary)
    (tmp_path / "results_details.csv").unlink()
    assert science.main(["--csv", str(summary), "--output", str(tmp_path)]) == 78
    assert "results_details.csv" in capsys.readouterr().err


def test_a_run_and_its_twin_of_a_list_of_rates_count_once(tmp_path):
    planted_study.write(tmp_path / "one", ["embed_ratio"])
    rates = ["training.learning_rate=[4e-3, 2e-3, 8e-3]"]
    planted_study.write(tmp_path / "list", ["embed_ratio"], overrides=rates)
    content = science.analyse(science.read_runs([], [tmp_path]), {})
    assert content["runs"] == 12
    for shape in content["sweeps"]:
        assert [len(configuration["seeds"]) for configuration in shape["configurations"]] == [
            1,
            1,
            1,
        ]


def test_a_prediction_is_of_a_configuration_at_any_rate(tmp_path):
    planted_study.write(tmp_path, ["frontier"], overrides=["training.learning_rate=[4e-3, 2e-3]"])
    prediction = json.loads((ROOT / "results" / "predictions.json").read_text())
    content = science.analyse(science.read_runs([], [tmp_path]), prediction)
    for shape in content["sweeps"]:
        assert set(shape["prediction"]["configurations"]) == {
            configuration["label"] for configuration in shape["configurations"]
        }


def test_ranking_runs_are_judged_on_dev(analysis):
    assert sweep_of(analysis, "frontier.yaml", "rank")["split"] == "dev"
    assert sweep_of(analysis, "frontier.yaml", "full")["split"] == "test"


def test_the_table_of_the_aggregator_says_the_same(planted, analysis, tmp_path):
    table = tmp_path / "results_summary.csv"
    write_csv(read_rows(planted), table)
    assert science.main(["--csv", str(table), "--output", str(tmp_path)]) == 0
    again = json.loads((tmp_path / "science.json").read_text())
    assert again["runs"] == analysis["runs"]
    key = ("sweep", "phase", "rate")
    here, there = (
        {tuple(a[k] for k in key): a["curves"] for a in content["sweeps"]}
        for content in (again, analysis)
    )
    assert here.keys() == there.keys()
    for which, curves in here.items():
        for scale, fit in curves.items():
            assert fit["optimum"]["value"] == pytest.approx(there[which][scale]["optimum"]["value"])


def test_what_cannot_be_fitted_says_why(tmp_path, capsys):
    planted_study.write(tmp_path / "logs", ["embed_ratio"])
    shutil.rmtree(tmp_path / "logs" / "emb25")
    assert science.main(["--log_dir", str(tmp_path / "logs"), "--output", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "science.json").read_text())
    assert "three different x, found 2" in content["sweeps"][0]["curves"]["share"]["unavailable"]
    assert "not fitted" in capsys.readouterr().out


def test_other_budgets_and_unfinished_runs_do_not_mix(tmp_path):
    planted_study.write(tmp_path, ["embed_ratio"])
    planted_study.write(
        tmp_path / "long", ["embed_ratio"], overrides=["training.tokens=100_000_000"]
    )
    killed = tmp_path / "emb45" / "metrics.json"
    killed.write_text(killed.read_text().replace('"finished"', '"killed"'))
    content = science.analyse(science.read_runs([], [tmp_path]), {})
    assert content["runs"] == 5
    assert sorted(len(a["configurations"]) for a in content["sweeps"]) == [2, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name run directories with --log_dir"),
        (("--log_dir", "missing"), "missing: found no such directory"),
        (("--log_dir", "."), "found no finished run"),
        (("--csv", "missing.csv"), "could not read or write missing.csv"),
    ],
)
def test_bad_input_is_refused(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    try:
        code = science.main([*arguments, "--output", "out"])
    except SystemExit as stopped:
        code = stopped.code
    assert code in (74, 78) and message in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_planted_share_of_36_percent_is_what_the_formula_says():
    losses = {s: planted_study.truth(s, 3.0, 10, 4e-3) for s in (0.3, 0.36)}
    assert losses[0.36] == pytest.approx(0.2)
    assert losses[0.3] == pytest.approx(0.2 + 1.2 * 0.06**2) and math.isfinite(losses[0.3])
