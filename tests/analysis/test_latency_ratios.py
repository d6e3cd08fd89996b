"""Latency ratios: only what one process measured in turns is compared, in table and figure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib import pyplot as plt

from src.analysis import paper, run_figures
from src.analysis.report_tables import metrics_table
from src.analysis.run_csv import table
from src.analysis.run_figures import side_by_side
from src.analysis.run_table import read_ratios


def write(log_dir: Path, ours: str, baseline: str, ratio: float) -> None:
    row = {"ratio": ratio, "ratio_low": ratio - 0.01, "ratio_high": ratio + 0.01}
    content = {"ours": ours, "baseline": baseline, "comparison": {"l128": row, "l512": row}}
    (log_dir / "latency").mkdir(exist_ok=True)
    path = log_dir / "latency" / f"{ours}-against-{baseline}.json"
    path.write_text(json.dumps(content))


def test_ratios_are_to_the_baseline_of_most_comparisons(tmp_path: Path) -> None:
    write(tmp_path, "a", "base", 0.8)
    write(tmp_path, "b", "base", 1.1)
    write(tmp_path, "b", "a", 1.4)
    for name, other in (("empty", {}), ("notes", {"comparison": "of two cards"})):
        (tmp_path / "latency" / f"{name}.json").write_text(json.dumps(other))
    ratios = read_ratios(tmp_path)
    assert {run: row["latency_ratio_l128"] for run, row in ratios.items()} == {
        "a": 0.8,
        "b": 1.1,
        "base": 1.0,
    }
    assert ratios["b"]["latency_ratio_to"] == ratios["a"]["latency_ratio_to"] == "base"
    assert (ratios["b"]["latency_ratio_low_l512"], ratios["b"]["latency_ratio_high_l512"]) == (
        pytest.approx(1.09),
        pytest.approx(1.11),
    )
    runs = [{"experiment": name, **row} for name, row in ratios.items()]
    assert side_by_side(table([*runs, {"experiment": "c"}])) == "base"
    assert side_by_side(table([runs[0], {"experiment": "c"}])) is None


def rows(with_ratio: bool) -> list[dict[str, Any]]:
    """The slow model measured on an idle machine, the fast one's seeds beside other runs."""
    common = {"status": "finished", "phase": "full", "sweep": "s", "tokens": 1000, "corpus": "c",
              "device_name": "d"}  # fmt: skip
    result: list[dict[str, Any]] = [
        common | {"experiment": name, "seed": seed, "run": f"{name}-{seed}", "baseline": base,
                  "test_bits_per_byte": bits, "latency_ms_p50_l128": ms,
                  "latency_ms_p50_l512": 2 * ms}
        for name, base, bits, times in (
            ("slow", True, 1.2, (10.0, 10.1)), ("fast", False, 1.0, (8.5, 27.8)))
        for seed, ms in enumerate(times)
    ]  # fmt: skip
    if with_ratio:
        for place, ratio in ((0, 1.0), (2, 0.7)):
            result[place] |= {"latency_ratio_to": "slow-0", "latency_ratio_l128": ratio,
                            "latency_ratio_l512": ratio}  # fmt: skip
    return result


def drawn(run_rows: list[dict[str, Any]], path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    kept = []
    monkeypatch.setattr(paper, "save", lambda figure, _: kept.append(figure))
    runs = table(run_rows)
    assert run_figures.pareto_figure(runs, paper.looks(runs), path)
    return kept[0].axes[0]


def test_the_front_is_of_ratios(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ax = drawn(rows(True), tmp_path / "x.png", monkeypatch)
    points = {
        (line.get_xdata()[0], line.get_ydata()[0]): line.get_markerfacecolor() for line in ax.lines
    }
    assert set(points) == {(1.0, 1.2), (0.7, 1.0)}
    assert points[1.0, 1.2] == "none" != points[0.7, 1.0]  # the slow one is beaten in both
    plt.close("all")


def test_without_ratios_every_seed_is_a_point_and_there_is_no_front(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ax = drawn(rows(False), tmp_path / "x.png", monkeypatch)
    assert sorted(line.get_xdata()[0] for line in ax.lines) == [8.5, 10.0, 10.1, 27.8]
    assert all(line.get_marker() != "None" for line in ax.lines)
    assert "no front" in ax.get_xlabel()
    plt.close("all")


def test_the_table_shows_ratios_and_else_the_range() -> None:
    measured, alone = (
        next(line for line in metrics_table(table(rows(ratio))).splitlines() if "| fast |" in line)
        for ratio in (True, False)
    )
    assert "x 0.70" in measured and "ms" not in measured
    assert "8.5 to 27.8 ms" in alone and "17.0 to 55.6 ms" in alone
