"""The figures of science.json: what is drawn stands where the numbers are."""

from __future__ import annotations

import json

import pytest
from matplotlib import pyplot as plt

from src.analysis import paper
from src.analysis.science import figures as plot_science


@pytest.fixture(scope="module")
def analysis(analysis):
    """Of the full runs alone: the titles of two panels a row fit on it whole."""
    return {**analysis, "sweeps": [one for one in analysis["sweeps"] if one["phase"] == "full"]}


@pytest.fixture
def figures(monkeypatch):
    """Figures as they are saved, by file name."""
    kept = {}
    monkeypatch.setattr(paper, "save", lambda figure, path: kept.update({path.name: figure}))
    with paper.style():
        yield kept
    plt.close("all")


def test_every_figure_of_a_whole_study_is_made(analysis, tmp_path, capsys):
    file = tmp_path / "science.json"
    file.write_text(json.dumps(analysis))
    assert plot_science.main(["--science", str(file), "--output", str(tmp_path / "out")]) == 0
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert made == {f"{name}.png" for name in plot_science.FIGURES}
    assert all((tmp_path / "out" / name).read_bytes()[:4] == b"\x89PNG" for name in made)
    assert "glu_sweeps.png" in capsys.readouterr().out


def test_share_sweeps_draws_means_fit_optimum_and_both_laws(analysis, figures, tmp_path):
    assert plot_science.share_sweeps(analysis, tmp_path / "share_sweeps.png")
    figure = figures["share_sweeps.png"]
    titles = [ax.get_title(loc="left") for ax in figure.axes[:2]]
    top = figure.axes[titles.index("Full runs, 50.0 M tokens, 10.5 M")]
    lines = [line for line in top.get_lines() if line.get_xydata().size]
    frontier = next(a for a in analysis["sweeps"] if a["sweep"] == "frontier.yaml")
    at = frontier["curves"]["ln share"]["optimum"]
    bars = [tuple(line.get_xdata()) for line in lines if len(line.get_xdata()) == 2]
    assert (at["low"], at["high"]) in bars
    upright = {line.get_xdata()[0] for line in lines if len(set(line.get_xdata())) == 1}
    prediction = frontier["prediction"]
    assert {prediction["tao_best_share"], prediction["levine_best_share"]} <= upright
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert {"factorised", "frontier", "Tao et al., 2026-11-23"} < set(labels)


def test_markers_of_the_sweeps_are_inside_their_panels(analysis, figures, tmp_path):
    for draw in (plot_science.share_sweeps, plot_science.glu_sweeps):
        assert draw(analysis, tmp_path / f"{draw.__name__}.png")
        for ax in figures[f"{draw.__name__}.png"].axes:
            (left, right), (low, high) = ax.get_xlim(), ax.get_ylim()
            ticks = ax.yaxis.get_ticklocs()
            for line in ax.lines:
                if line.get_marker() != "None" and line.get_transform() == ax.transData:
                    assert left < min(line.get_xdata()) and max(line.get_xdata()) < right
                    assert low < min(line.get_ydata()) and max(line.get_ydata()) < high
                    assert ticks[0] <= min(line.get_ydata()) and max(line.get_ydata()) <= ticks[-1]


def test_nothing_to_draw_and_what_is_no_science(tmp_path, capsys):
    file = tmp_path / "science.json"
    file.write_text('{"sweeps": []}')
    command = ["--science", str(file), "--output", str(tmp_path / "out")]
    assert plot_science.main(command) == 0
    assert "nothing to draw yet" in capsys.readouterr().out
    for text in ("{}", "[1", "[]"):
        file.write_text(text)
        assert plot_science.main(command) == 78
        assert (
            "expected the science.json of python -m src.analysis.science.report"
            in capsys.readouterr().err
        )
    assert plot_science.main(["--science", str(tmp_path / "none"), *command[2:]]) == 74
