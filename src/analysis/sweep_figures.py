"""The figures of a sweep: perplexity against what was swept, with seeds, intervals and kills.

Ranking runs and full runs never share a panel, nor do runs of different token budgets or batches;
token perplexities of different tokenizers never share a figure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from scipy import stats

from src.analysis import paper, repeats
from src.analysis.blocks import Block, at_own_rates, blocks
from src.spec.metric_keys import EMBEDDING_RATIO, GLU_EXPANSION, Request
from src.spec.rates import spelled

Styles = Mapping[str, paper.Look]
BAR = 0.95  # PRD section 8: a winner's perplexity is at least 5 % below the baseline's


class MixedTokenizers(ValueError):
    """Token perplexities of different tokenizers were asked for in one figure."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One swept quantity, how it is written, and the one that the other sweep varies."""

    quantity: Request
    other: Request
    label: str
    title: str
    scale: float = 1.0


SHARE = Axis(
    EMBEDDING_RATIO, GLU_EXPANSION, "Embedding share of all parameters (%)", "embedding share", 100
)
GLU = Axis(GLU_EXPANSION, EMBEDDING_RATIO, "GLU expansion, d_ff / d_model", "GLU expansion")


# --- choosing runs ------------------------------------------------------------------------------


def varies_vocabulary(runs: pd.DataFrame) -> set[str]:
    """Sweep files whose runs have several vocabularies: compared in bits per byte only."""
    sizes = runs.groupby("sweep")["vocab_size"].nunique()
    return set(sizes.index[sizes > 1])


def runs_of_axis(runs: pd.DataFrame, axis: Axis) -> pd.DataFrame:
    """The finished and killed runs of sweeps that vary this axis.

    A sweep varies an axis if its runs asked for several values of it. A sweep that so far has one
    value of both belongs to both, because nothing yet tells which it will vary.
    """
    done = runs[runs["status"].isin(["finished", "killed"]) & runs[axis.quantity.built].notna()]
    sweep = done["sweep"].fillna("")
    values, other_values = (
        done[q.asked].fillna(done[q.built].round(3)).round(4).groupby(sweep).nunique()
        for q in (axis.quantity, axis.other)
    )
    return done[sweep.isin(values.index[(values > 1) | (other_values <= 1)])]


def refuse_mixed_tokenizers(runs: pd.DataFrame, metric: str) -> None:
    """Token perplexity means nothing across tokenizers: another token count, another task.

    Raises MixedTokenizers, naming the runs of each tokenizer, unless the metric is bits per byte
    or word perplexity, which compare over the same text.
    """
    if not metric.endswith("perplexity") or metric.endswith("word_perplexity"):
        return
    names = runs.groupby("tokenizer_sha256")["run"].agg(sorted)
    if len(names) > 1:
        listing = "; ".join(
            f"{key[:12]}: {', '.join(run_names[:4])}{' ...' * (len(run_names) > 4)}"
            for key, run_names in names.items()
        )
        raise MixedTokenizers(
            f"token perplexities of {len(names)} different tokenizers cannot stand in one figure "
            f"({listing}). Pass --metric bits_per_byte, or aggregate the runs of each tokenizer "
            "apart."
        )


def column_of(metric: str, runs: pd.DataFrame) -> str:
    """The column to draw: "perplexity" is the test set's, or the dev set's where no run has one."""
    if metric.startswith(("test_", "dev_")):
        return metric
    return f"test_{metric}" if runs[f"test_{metric}"].notna().any() else f"dev_{metric}"


# --- drawing ------------------------------------------------------------------------------------


def sweep_figure(runs: pd.DataFrame, axis: Axis, metric: str, styles: Styles, output: Path) -> bool:
    """A panel for each block of these runs: seeds, means, intervals, baseline, kills; False where
    no finished run has the metric, and then nothing is drawn."""
    refuse_mixed_tokenizers(runs, metric)
    shown = [
        block for block in blocks(runs) if block.runs[column_of(metric, block.runs)].notna().any()
    ]
    if not shown:
        return False
    with paper.style():
        figure, axes = paper.grid(len(shown))
        handles: list[Any] = []
        for ax, block in zip(axes, shown, strict=True):
            handles += _draw(ax, block, axis, column_of(metric, block.runs), styles)
        drawn = pd.concat([part for block in shown for part in (block.runs, block.killed)])
        columns = {column_of(metric, block.runs) for block in shown}
        what = columns.pop() if len(columns) == 1 else metric
        heading = f"{paper.words(what)} against {axis.title}"
        paper.finish(figure, handles, heading, drawn, styles)
        paper.save(figure, output)
    return True


def _draw(ax: Axes, block: Block, axis: Axis, column: str, styles: Styles) -> list[Any]:
    """Draw one block; returns the legend entries of what it shows."""
    runs = block.runs.dropna(subset=[column])
    best = at_own_rates(runs)
    others = runs.drop(best.index)
    best = best.assign(series=_series(best, axis, block.many_rates))
    points = _points(best, axis, column)
    base = best[best["configuration"] == block.baseline]
    bar = bar_of(base, column)
    low, high = best[column].min(), best[column].max()
    room = (high - low) or 0.05 * high
    near = others[column][others[column] <= high + 1.5 * room]
    y_values = [low, high, *near, *([] if bar is None else [bar])]
    ends = pd.concat([points["low"], points["high"]]).dropna()
    y_values += [*ends.clip(low - room, high + room)]
    if len(block.killed):
        y_values.append(max(y_values) + 0.2 * (max(y_values) - min(y_values) or room))
    paper.hold(ax, "y", y_values)
    paper.hold(ax, "x", axis.scale * pd.concat([runs, block.killed])[axis.quantity.built])
    handles = _draw_rates(ax, others, axis, column, styles) if len(others) else []
    handles += _draw_points(ax, points, best, column, styles)
    handles += paper.named(points["configuration"], styles, [block.baseline or ""])
    if bar is not None:
        ax.axhline(bar, color="#444444", linestyle=paper.BAR_DASH, linewidth=0.9, zorder=1.5)
        handles.append(paper.line("5 % below the baseline", color="#444444", ls=paper.BAR_DASH))
    for x in axis.scale * block.killed[axis.quantity.built]:
        ax.plot([x], [0.94], "x", color=paper.BLACK, mew=1.4, transform=ax.get_xaxis_transform())
        handles.append(paper.point("killed, no final value", "x", color=paper.BLACK, mew=1.4))
    paper.title(ax, _title(block, runs, best, base, column))
    ax.set_xlabel(axis.label)
    ax.set_ylabel(paper.words(column))
    return handles


def _title(
    block: Block, runs: pd.DataFrame, best: pd.DataFrame, base: pd.DataFrame, column: str
) -> str:
    seeds = best.groupby("configuration")["seed"].nunique()
    least, most = seeds.min(), seeds.max()
    parts = [f"{least if least == most else f'{least} to {most}'} seed{'s' * bool(most > 1)}"]
    if base.empty and block.baseline is not None:
        gone = (block.killed["configuration"] == block.baseline).any()
        parts.append(f"baseline {block.baseline} {'was killed' if gone else 'is not finished'}")
    if len(block.runs) > len(runs):
        parts.append(f"{len(block.runs) - len(runs)} runs without {column}")
    return f"{block.kind}\n{block.file}: {'; '.join(parts)}"


def _series(best: pd.DataFrame, axis: Axis, many_rates: bool) -> pd.Series:
    """What else differs between runs, in words: each such kind is a line of its own."""
    names: dict[str, Callable[[Any], str]] = {
        "table": str,
        axis.other.asked: lambda v: f"share {100 * v:.3g} %" if axis is GLU else f"GLU {v:.3g}",
        "vocab_size": lambda v: f"V = {v:,.0f}",
        "tie_embeddings": lambda v: "tied" if v else "untied",
        "embedding_lr_ratio": lambda v: f"embedding rate x {v:g}",
    }
    if not many_rates:
        names["learning_rate"] = lambda v: f"rate {spelled(v)}"
    table = best["embedding_dim"].notna().map({True: "factorised table", False: "whole table"})
    frame, label = best.assign(table=table), pd.Series("", index=best.index)
    for key, write in names.items():
        if frame[key].nunique() > 1:
            label += frame[key].map(lambda v, write=write: "" if pd.isna(v) else f", {write(v)}")
    return label.str.removeprefix(", ")


def _points(best: pd.DataFrame, axis: Axis, column: str) -> pd.DataFrame:
    """A row a configuration and series: x, the mean over seeds and its 95 % interval, by the noise
    of all of them together: on a scale of logarithms it is taken to be the same."""
    grouped, x = best.groupby(["series", "configuration"]), (axis.quantity.built, "mean")
    points = grouped.agg(x=x, mean=(column, "mean"), n=(column, "size")).reset_index()
    points["x"] *= axis.scale
    logs = {str(key): np.log(seeds).tolist() for key, seeds in grouped[column]}
    noise, half = repeats.pooled_noise(logs), float("nan")
    if noise is not None:
        half = float(stats.t.ppf(0.975, noise.df)) * noise.sd
    factor = np.exp(half / points["n"] ** 0.5)
    return points.assign(low=points["mean"] / factor, high=points["mean"] * factor)


def _draw_points(
    ax: Axes, points: pd.DataFrame, best: pd.DataFrame, column: str, styles: Styles
) -> list[Any]:
    handles = []
    many = points["series"].nunique() > 1
    aside = 0.018 * (ax.get_xlim()[1] - ax.get_xlim()[0])
    for index, (label, line) in enumerate(points.groupby("series")):
        kwargs = {"color": paper.GREY, "lw": 0.8, "ls": paper.DASHES[index % len(paper.DASHES)]}
        line = line.sort_values("x")
        ax.plot(line["x"], line["mean"], zorder=2, **kwargs)
        if many:
            handles.append(paper.line(str(label), **kwargs))
        for point in line.itertuples():
            look = styles[point.configuration]
            if point.n > 1:
                seeds = best[(best["configuration"] == point.configuration)
                             & (best["series"] == label)][column]  # fmt: skip
                beside = [point.x - aside] * len(seeds)  # else the mean would hide the middle seed
                ring: dict[str, Any] = {"ms": 3.5, "mfc": "none", "mew": 0.7}
                ax.plot(beside, seeds, "o", color=look.colour, zorder=4, **ring)
                handles.append(paper.point("one seed", "o", **ring))
            if not math.isnan(point.low):
                leaves = paper.draw_interval(ax, point.x, point.low, point.high, look.colour)
                handles.append(paper.point("mean, 95 % interval", "_", ms=8))
                if leaves:
                    handles.append(paper.point("interval leaves the panel", "^", ms=3.5))
            ax.plot([point.x], [point.mean], look.marker, color=look.colour, zorder=5)
    return handles


def _draw_rates(
    ax: Axes, others: pd.DataFrame, axis: Axis, column: str, styles: Styles
) -> list[Any]:
    """Means at the rates that are not a configuration's best; those above the panel, on its top."""
    handles: list[Any] = [paper.line("each at its own best rate", lw=0.8)]
    top = ax.get_ylim()[1]
    rates = sorted(others["learning_rate"].unique())
    for (rate, name), group in others.groupby(["learning_rate", "configuration"]):
        x, y = axis.scale * group[axis.quantity.built].mean(), group[column].mean()
        colour, shape = styles[str(name)].colour, "1234"[rates.index(rate) % 4]
        if y > top:
            hollow: dict[str, Any] = {"mfc": "none", "ms": 4}
            ax.plot([x], [1.02], "^", color=colour, transform=ax.get_xaxis_transform(),
                    clip_on=False, **hollow)  # fmt: skip
            handles.append(paper.point("at another rate, above the panel", "^", **hollow))
        else:
            ax.plot([x], [y], shape, color=colour, ms=6, mew=0.9, zorder=3)
            handles.append(paper.point(f"at rate {spelled(rate)}", shape, ms=6))
    return handles


def bar_of(base: pd.DataFrame, column: str) -> float | None:
    """Where the PRD's 5 % bar lies in this column, from the baseline's mean over seeds."""
    level = base[column].mean()
    if math.isnan(level) or column.endswith("word_perplexity"):
        return None  # 5 % of token perplexity is another figure in words
    if column.endswith("bits_per_byte"):
        loss = base[column.replace("bits_per_byte", "loss")].mean()
        return None if math.isnan(loss) else level * (1 + math.log(BAR) / loss)
    return BAR * level
