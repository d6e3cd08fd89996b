"""The decision procedure on a few simulated studies, and its command."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from src.spec.command_line import OK
from tests import ROOT
from tests import simulated_decisions as simulate


def test_a_clear_effect_is_named_and_no_effect_is_not() -> None:
    clear = simulate.rates(0.12, 3, 0.005, 20)
    assert clear.better_promoted == clear.named_rightly == clear.named_and_different == 1.0
    null = simulate.rates(0.0, 3, 0.005, 20)
    assert null.winner_named == null.named_rightly == 0.0


def test_one_seed_names_nobody_where_its_point_alone_would() -> None:
    rates = simulate.rates(0.0, 1, 0.04, 40)
    assert rates.winner_named == 0.0 and rates.coverage_of_winner is None
    assert rates.named_by_point_alone > 0.1
    assert rates.coverage < 0.6  # document noise only


def test_the_intervals_cover_and_equals_are_seldom_told_apart() -> None:
    """150 studies, two standard errors and a half around 95 % and below 5 %."""
    rates = simulate.rates(0.0, 3, 0.02, 150)
    assert 0.9 <= rates.coverage <= 0.99
    assert rates.equal_told_apart <= 0.1


@pytest.mark.parametrize("run_sd", [0.005, 0.04])
def test_of_two_equal_models_the_faster_wins(run_sd: float) -> None:
    """By the old rule, a tie by proof, the faster one is chosen about as often as a coin says."""
    rates = simulate.ties(run_sd, 40)
    assert rates.not_told_apart >= 0.9
    assert rates.equivalent <= 0.8


def test_equal_seeds_write_equal_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, values in (("EFFECTS", (0.08,)), ("SEEDS", (1, 2)), ("RUN_SDS", (0.02,)),
                         ("TIE_SDS", (0.005,))):  # fmt: skip
        monkeypatch.setattr(simulate, name, values)
    for folder in ("a", "b"):
        arguments = ["--studies", "3", "--output", str(tmp_path / folder)]
        assert simulate.main(arguments) == OK
    for table in ("procedure.csv", "ties.csv"):
        assert (tmp_path / "a" / table).read_bytes() == (tmp_path / "b" / table).read_bytes()
    with (tmp_path / "a" / "procedure.csv").open(newline="") as file:
        one, two = csv.DictReader(file)
    assert (one["seeds"], one["winner_named"], one["coverage_of_winner"]) == ("1", "0.0", "")
    assert two["effect"] == "0.08"


def test_the_published_tables_are_of_this_code() -> None:
    """The columns, and the whole plan of 1,000 studies each."""
    folder = ROOT / "results" / "decisions"
    with (folder / "procedure.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(simulate.Rates.__slots__)
    kinds = {(float(r["effect"]), int(r["seeds"]), float(r["run_sd"])) for r in rows}
    assert len(kinds) == len(rows) == 48 and {r["studies"] for r in rows} == {"1000"}
    with (folder / "ties.csv").open(newline="") as file:
        tied = list(csv.DictReader(file))
    assert [float(row["run_sd"]) for row in tied] == list(simulate.TIE_SDS)
    page = (folder / "README.md").read_text(encoding="utf-8")
    assert simulate.named_table(rows) in page and simulate.ties_table(tied) in page
