"""Figures hold what they show: on the axes' data, in every study that once drew one wrongly."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from src.analysis import aggregate, paper
from src.analysis.run_table import read_rows
from tests.synthetic_runs import GLU_SWEEP, SHARE_SWEEP, Experiment, write_run, write_sweep

SHARE, GLU = "embed_ratio.yaml", "glu_expansion.yaml"
LONG = tuple(
    Experiment(
        name=f"factorised-embedding-of-rank-{64 + 8 * i}-with-an-untied-head-and-attention-{i}",
        share=0.1 + 0.035 * i, gain=0.02 * math.sin(i), depth=6 + i,
    )
    for i in range(12)
)  # fmt: skip
RATES = {"2e-3": 2e-3, "4e-3": 4e-3, "8e-3": 8e-3}
BEST = {"emb35": "4e-3", "emb25": "2e-3", "emb45": "8e-3"}


def one_run(logs: Path) -> None:
    write_sweep(logs, SHARE, SHARE_SWEEP[:1])


def two_seeds(logs: Path) -> None:
    write_sweep(logs, SHARE, SHARE_SWEEP, seeds=(0, 1))


def one_repeated(logs: Path) -> None:
    write_sweep(logs, SHARE, SHARE_SWEEP)
    unlucky = [replace(e, gain=e.gain - 0.3) for e in SHARE_SWEEP if e.name == "emb35"]
    write_sweep(logs, SHARE, unlucky, seeds=(1,))


def twelve_long_names(logs: Path) -> None:
    write_sweep(logs, SHARE, LONG, seeds=(0, 1))


def killed_and_diverged(logs: Path) -> None:
    write_sweep(logs, SHARE, SHARE_SWEEP, killed={"emb45": 0.5, "emb25": 0.3}, tokens=5_000_000)
    sweep = {"file": SHARE, "experiments": ["emb15"], "baseline": "emb35"}
    far = Experiment(name="emb15", share=0.15, gain=2.5)
    write_run(logs / "emb15", far, sweep=sweep, ran=0.4, failure={"kind": "diverged"})


def no_baseline(logs: Path) -> None:
    names = [exp.name for exp in SHARE_SWEEP]
    write_sweep(
        *(logs, SHARE, SHARE_SWEEP[1:]), baseline="emb35", names=names, seeds=(0, 1, 2),
        loss_largest_rise_nats=2.5,
    )  # fmt: skip


def both_sweeps_and_phases(logs: Path) -> None:
    for phase, tokens in (("rank", 5_000_000), ("full", 50_000_000)):
        write_sweep(logs, SHARE, SHARE_SWEEP, phase=phase, tokens=tokens)
        write_sweep(logs, GLU, GLU_SWEEP, baseline="glu4x", phase=phase, tokens=tokens)


def factorised(logs: Path) -> None:
    shares = [
        Experiment(name=f"share{s}", share=s / 100, gain=(s - 33) ** 2 / 3e3) for s in (25, 35, 45)
    ]
    ranks = [
        Experiment(name=f"rank{s}", share=s / 100, gain=(s - 30) ** 2 / 5e3) for s in (10, 20, 30)
    ]
    write_sweep(logs, "frontier.yaml", shares, baseline="share35")
    write_sweep(logs, "factorised.yaml", ranks, baseline="rank30", embedding_dim=96)


def rates(logs: Path) -> None:
    """Three shares at three rates, each with another best one; at one of them emb45 is far off."""
    names = [f"{exp.name}-lr{rate}" for exp in SHARE_SWEEP for rate in RATES]
    for exp in SHARE_SWEEP:
        for label, rate in RATES.items():
            best = BEST[exp.name] == label
            gain = exp.gain + (0.0 if best else 0.05 if label == "4e-3" else 1.5)
            run = replace(exp, name=f"{exp.name}-lr{label}", gain=gain)
            seeds = (0, 1) if best else (0,)
            write_sweep(
                *(logs, SHARE, [run]), baseline="emb35-lr2e-3", names=names, phase="rank",
                seeds=seeds, learning_rate=rate, batch_size=64,
            )  # fmt: skip


STUDIES: dict[str, Callable[[Path], None]] = {
    study.__name__: study
    for study in (
        one_run, two_seeds, one_repeated, twelve_long_names, killed_and_diverged, no_baseline,
        both_sweeps_and_phases, factorised, rates,
    )
}  # fmt: skip
Drawn = dict[str, Figure]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Drawn]:
    """Every figure of every study by file name, laid out as it would be saved."""
    figures: dict[str, Drawn] = {}
    with pytest.MonkeyPatch.context() as patch:
        for name, write in STUDIES.items():
            logs, kept = tmp_path_factory.mktemp(name), figures.setdefault(name, {})

            def keep(figure: Figure, path: Path, kept: Drawn = kept) -> None:
                figure.draw_without_rendering()
                kept[path.name] = figure
                plt.close(figure)  # pyplot need not keep it

            patch.setattr(paper, "save", keep)
            write(logs)
            assert aggregate._draw(read_rows(logs), logs, "perplexity") == 0
    return figures


def axes_of(figures: Drawn) -> list[tuple[str, Axes]]:
    return [(name, ax) for name, figure in figures.items() for ax in figure.axes]


def points(ax: Axes) -> list[Line2D]:
    """What stands for a run or a mean, apart from curves."""
    return [line for line in ax.lines if line.get_marker() not in (None, "None", "")]


def legend(figure: Figure) -> dict[str, Line2D]:
    return {
        handle.get_label().replace("\n", " "): handle
        for one in figure.legends
        for handle in one.legend_handles
    }


@pytest.mark.parametrize("study", STUDIES)
def test_every_end_and_value_lies_between_labelled_ticks(drawn, study: str) -> None:
    for name, ax in axes_of(drawn[study]):
        for axis, limits in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
            ticks = axis.get_ticklocs()
            labels = [text.get_text() for text in axis.get_ticklabels()]
            assert len(ticks) >= 2 and all(labels), name
            assert limits[0] <= ticks[0] and ticks[-1] <= limits[1], name
        low, *_, high = ax.yaxis.get_ticklocs()
        arrows = {line.get_xdata()[0] for line in points(ax) if line.get_marker() in "^v"}
        for line in ax.lines:
            if line.get_transform() != ax.transData or len(line.get_xdata()) == 0:
                continue
            x, y = line.get_xdata()[-1], line.get_ydata()[-1]
            assert low <= y <= high or x in arrows, (name, line)


@pytest.mark.parametrize("study", STUDIES)
def test_no_marker_is_cut_by_a_frame(drawn, study: str) -> None:
    for name, ax in axes_of(drawn[study]):
        scale = ax.figure.dpi / 72
        for line in points(ax):
            if not line.get_clip_on():  # it stands on the frame
                continue
            half = scale * line.get_markersize() / 2 - 1.0  # a pixel of rounding
            at = line.get_transform().transform(
                np.column_stack([line.get_xdata(), line.get_ydata()])
            )
            for x, y in at:
                assert ax.bbox.x0 + half <= x <= ax.bbox.x1 - half, (name, line)
                assert ax.bbox.y0 + half <= y <= ax.bbox.y1 - half, (name, line)


@pytest.mark.parametrize("study", STUDIES)
def test_no_panel_is_empty_and_no_text_over_another_or_outside(drawn, study: str) -> None:
    for name, figure in drawn[study].items():
        page = figure.bbox
        boxes = [one.get_window_extent() for one in figure.legends]
        for ax in figure.axes:
            assert any(len(line.get_xdata()) for line in ax.lines), name
            title = ax.title if ax.get_title() else ax._left_title
            boxes.append(ax.get_tightbbox())
            assert title.get_window_extent().x1 <= page.x1 + 2, (name, title)
        for place, box in enumerate(boxes):
            assert box.x0 >= page.x0 - 2 and box.x1 <= page.x1 + 2, name
            assert box.y0 >= page.y0 - 2 and box.y1 <= page.y1 + 2, name
            for other in boxes[:place]:
                assert not box.padded(-2).overlaps(other), name
        for ax in figure.axes:  # a panel that is squeezed by names is none
            assert ax.bbox.height / figure.dpi > 1.0, name
        assert figure.get_figwidth() in (paper.COLUMN, paper.PAGE)


@pytest.mark.parametrize("study", STUDIES)
def test_a_configuration_has_one_colour_and_shape_everywhere(drawn, study: str) -> None:
    colours: dict[str, set[str]] = {}
    for figure in drawn[study].values():
        handles = {label: h for label, h in legend(figure).items() if isinstance(h, Line2D)}
        for label, handle in handles.items():
            name = label.removesuffix(" (baseline)")
            colours.setdefault(name, set()).add(to_hex(handle.get_color()))
        shown = {to_hex(line.get_color()) for ax in figure.axes for line in ax.lines}
        explained = {to_hex(handle.get_color()) for handle in handles.values()}
        lines_between_and_bar = {paper.GREY, "#444444"}
        assert shown <= explained | {paper.BLACK, *lines_between_and_bar}
    assert {name: shades for name, shades in colours.items() if len(shades) > 1} == {}


def test_twelve_configurations_look_different(drawn) -> None:
    handles = legend(drawn["twelve_long_names"]["ppl_vs_embedding_ratio.png"])
    looks = {(h.get_color(), h.get_marker()) for name, h in handles.items() if "rank" in name}
    assert len(looks) == 12


def test_legends_name_what_is_drawn_and_nothing_else(drawn) -> None:
    name = "ppl_vs_embedding_ratio.png"
    one, two, killed = (
        set(legend(drawn[study][name])) for study in ("one_run", "two_seeds", "killed_and_diverged")
    )
    assert one == {"emb35 (baseline)", "5 % below the baseline"}
    assert two == one | {"emb25", "emb45", "one seed", "mean, 95 % interval"}
    assert killed == one | {"killed, no final value"}
    curves = set(legend(drawn["killed_and_diverged"]["learning_curves.png"]))
    assert {"killed", "ends above the panel", "emb15"} < curves and "not finished" not in curves
    jump = "train loss jumped by more than 1 nat here"
    curved = {
        study: figures_by_name.get("learning_curves.png")
        for study, figures_by_name in drawn.items()
    }
    jumped = [study for study, figure in curved.items() if figure and jump in legend(figure)]
    assert jumped == ["no_baseline"]
    for figures in drawn.values():
        for figure in figures.values():
            assert not [text for text in labels(figure) if "asked" in text]


def labels(figure: Figure) -> list[str]:
    return [text for ax in figure.axes for text in (ax.get_xlabel(), ax.get_title(loc="left"))]


def test_a_baseline_of_one_panel_alone_stands_once_in_the_legend() -> None:
    figure, _ = paper.grid(1)
    labels = ["emb35 (baseline)", "emb45", "emb45 (baseline)", "rank96"]
    paper.finish(figure, [paper.point(label, "o") for label in labels], "title")
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "emb35 (baseline)",
        "emb45",
        "rank96",
    ]
    plt.close(figure)


def test_an_interval_that_leaves_its_panel_has_an_arrow(drawn) -> None:
    figure = drawn["one_repeated"]["ppl_vs_embedding_ratio.png"]
    assert "interval leaves the panel" in legend(figure)
    (ax,) = figure.axes
    low, high = ax.get_ylim()
    at = {line.get_xdata()[0] for line in points(ax)
          if line.get_marker() in "^v" and line.get_transform() != ax.transData}  # fmt: skip
    cut = {line.get_xdata()[0] for line in ax.lines
           if len(set(line.get_xdata())) == 1 and {low, high} & set(line.get_ydata())}  # fmt: skip
    assert at and at == cut


def test_a_dropped_baseline_is_said_and_its_bar_is_not_drawn(drawn) -> None:
    figures = drawn["no_baseline"]
    sweep = figures["ppl_vs_embedding_ratio.png"]
    assert "baseline emb35 is not finished" in labels(sweep)[1].replace("\n", " ")
    assert "5 % below the baseline" not in legend(sweep)
    curves = figures["learning_curves.png"]
    assert len(curves.axes) == 1, "nothing to compare with, so no second panel"
    assert "no run of the baseline" in labels(curves)[1]


def test_each_share_is_drawn_at_its_own_best_rate_and_the_others_beside_it(drawn) -> None:
    figure = drawn["rates"]["ppl_vs_embedding_ratio.png"]
    (ax,) = figure.axes
    rates = {text for text in legend(figure) if text.startswith("at rate")}
    assert rates == {"at rate 4e-3"}, "the marks that are drawn, and no others"
    means = {round(h.get_xdata()[0]): h.get_ydata()[0] for h in points(ax)
             if h.get_marker() in "Dos" and h.get_markersize() == 5}  # fmt: skip
    assert len(means) == 3 and max(means.values()) < 150
    assert "at another rate, above the panel" in legend(figure)


def test_what_no_run_has_is_not_drawn_and_an_older_figure_goes(tmp_path: Path, capsys) -> None:
    write_sweep(tmp_path / "logs", GLU, GLU_SWEEP, baseline="glu4x")
    (tmp_path / "ppl_vs_embedding_ratio.png").write_text("older")
    command = ["--log_dir", str(tmp_path / "logs"), "--output", str(tmp_path / "r.csv")]
    assert aggregate.main(command) == 0
    assert "ppl_vs_embedding_ratio.png: not drawn" in capsys.readouterr().out
    made = {path.name for path in tmp_path.glob("*.png")}
    assert made == {"ppl_vs_glu_expansion.png", "learning_curves.png", "pareto.png"}
