"""The figures of a sweep: perplexity against what was swept, with seeds, intervals and kills.

Every figure says on itself what corpus, budget and device its runs share. Ranking runs and full
runs never share a panel, nor do runs of different token budgets; token perplexities of different
tokenizers never share a figure. Colours are Okabe and Ito's, which colour-blind readers can tell
apart; markers repeat what colours say.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display on a training machine

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from scipy.special import stdtrit

from src.analysis.run_csv import Row, number
from src.spec.metric_keys import EMBEDDING_RATIO, GLU_EXPANSION, TOTAL_PARAMS

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8B5A2B")
MARKERS = ("o", "s", "^", "v", "P", "X", "<", ">")
BASELINE_COLOUR = "#000000"
OTHER_COLOUR = "#BBBBBB"
KILLED_COLOUR = "#D55E00"
BAR = 0.95  # PRD section 8: a winner's perplexity is at least 5 % below the baseline's
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "savefig.dpi": 200,
    "figure.constrained_layout.use": True,
}


class MixedTokenizers(ValueError):
    """Token perplexities of different tokenizers were asked for in one figure."""


@dataclass(frozen=True)
class Axis:
    """One swept quantity: its realised and asked columns, and how its values are written."""

    key: str
    asked: str
    other: str  # the asked column of the sweep that this axis is not
    label: str
    title: str
    write: Callable[[float], str]


SHARE = Axis(
    key=EMBEDDING_RATIO.built,
    asked=EMBEDDING_RATIO.asked,
    other=GLU_EXPANSION.asked,
    label="Embedding share of all parameters (%), realised (asked)",
    title="embedding share",
    write=lambda value: f"{100 * value:.1f}".removesuffix(".0"),
)
GLU = Axis(
    key=GLU_EXPANSION.built,
    asked=GLU_EXPANSION.asked,
    other=EMBEDDING_RATIO.asked,
    label="GLU expansion d_ff / d_model, realised (asked)",
    title="GLU expansion",
    write=lambda value: f"{value:.2f}",
)


@dataclass
class Panel:
    """Runs that may be compared: one sweep file, one phase, one token budget."""

    sweep: str
    phase: str
    tokens: float
    runs: list[Row] = field(default_factory=list)
    killed: list[Row] = field(default_factory=list)

    @property
    def title(self) -> str:
        kind = "Ranking runs" if self.phase == "rank" else "Full runs"
        file = f" ({stem(self.sweep)})" if self.sweep else ""
        budget = f", {tokens_text(self.tokens)} tokens" if self.tokens else ""
        return f"{kind}{budget}{file}"


# --- choosing runs ------------------------------------------------------------------------------


def varies_vocabulary(rows: Iterable[Row]) -> set[str]:
    """Sweep files whose runs have several vocabularies: compared in bits per byte only."""
    sizes: dict[str, set[Any]] = {}
    for row in rows:
        if row.get("vocab_size") is not None:
            sizes.setdefault(sweep_of(row), set()).add(row["vocab_size"])
    return {sweep for sweep, found in sizes.items() if len(found) > 1}


def rows_of_axis(rows: Sequence[Row], axis: Axis) -> list[Row]:
    """The finished and killed runs of sweeps that vary this axis.

    A sweep varies an axis if its runs asked for several values of it. A sweep that so far has one
    value of both belongs to both, because nothing yet tells which it will vary.
    """
    done = [
        row
        for row in rows
        if row.get("status") in ("finished", "killed") and number(row, axis.key) is not None
    ]
    chosen = []
    for sweep in sorted({sweep_of(row) for row in done}):
        mine = [row for row in done if sweep_of(row) == sweep]
        here = len({_asked(row, axis) for row in mine})
        there = len({row.get(axis.other) for row in mine})
        if here > 1 or there <= 1:
            chosen += mine
    return chosen


def panels_of(rows: Sequence[Row], phases: Sequence[str] = ("rank", "full")) -> list[Panel]:
    """Finished runs by sweep, phase and budget; a killed run joins the panel it was cut from."""
    found: dict[tuple[str, str, float], Panel] = {}
    for row in rows:
        if row.get("status") == "finished":
            key = (sweep_of(row), str(row.get("phase")), budget_of(row))
            found.setdefault(key, Panel(*key)).runs.append(row)
    for row in rows:
        if row.get("status") == "killed":
            own = Panel(sweep_of(row), str(row.get("phase")), budget_of(row))
            homes = [p for p in found.values() if (p.sweep, p.phase) == (own.sweep, own.phase)]
            longer = [p for p in homes if p.tokens >= own.tokens]
            if not homes:
                homes = [found.setdefault((own.sweep, own.phase, own.tokens), own)]
            min(longer or homes, key=lambda p: p.tokens).killed.append(row)
    order = {phase: place for place, phase in enumerate(phases)}
    return sorted(found.values(), key=lambda p: (p.sweep, order.get(p.phase, 9), p.tokens))


def refuse_mixed_tokenizers(rows: Iterable[Row], metric: str) -> None:
    """Token perplexity means nothing across tokenizers: another token count, another task.

    Raises MixedTokenizers, naming the runs of each tokenizer, unless the metric is bits per byte
    or word perplexity, which compare over the same text.
    """
    if not metric.endswith("perplexity") or metric.endswith("word_perplexity"):
        return
    runs: dict[str, list[str]] = {}
    for row in rows:
        if row.get("tokenizer_sha256"):
            runs.setdefault(str(row["tokenizer_sha256"]), []).append(str(row["run"]))
    if len(runs) > 1:
        told = "; ".join(f"{key[:12]}: {_some(sorted(names))}" for key, names in runs.items())
        raise MixedTokenizers(
            f"token perplexities of {len(runs)} different tokenizers cannot stand in one figure "
            f"({told}). Pass --metric bits_per_byte, or aggregate the runs of each tokenizer apart."
        )


def column_of(metric: str, rows: Sequence[Row]) -> str:
    """The column to draw: "perplexity" is the test set's, or the dev set's where no run has one."""
    if metric.startswith(("test_", "dev_")):
        return metric
    test = f"test_{metric}"
    return test if any(number(row, test) is not None for row in rows) else f"dev_{metric}"


# --- perplexity against what was swept ----------------------------------------------------------


def sweep_figure(rows: Sequence[Row], axis: Axis, metric: str, output: Path) -> None:
    """One panel for each sweep, phase and budget: seeds, means, intervals, baseline, kills."""
    refuse_mixed_tokenizers(rows, metric)
    panels = panels_of(rows)
    with plt.rc_context(STYLE):
        if not panels:
            return empty_figure(f"No finished run varies the {axis.title} yet.", output)
        figure, axes = grid_of(len(panels))
        for ax, panel in zip(axes, panels, strict=False):
            _draw_panel(ax, panel, axis, metric)
        _finish(figure, axes, len(panels), f"{words(metric)} against {axis.title}", rows, axis)
        save(figure, output)


def _draw_panel(ax: Axes, panel: Panel, axis: Axis, metric: str) -> None:
    column = column_of(metric, panel.runs)
    drawn = [row for row in panel.runs if number(row, column) is not None]
    series = _series(drawn, axis)
    xs = [number(row, axis.key) or 0.0 for row in [*drawn, *panel.killed]]
    offset = 0.022 * ((max(xs) - min(xs)) or abs(xs[0])) if xs else 0.0
    means: list[tuple[float, float | None]] = []
    for place, (label, cells) in enumerate(series.items()):
        colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
        named = label if len(series) > 1 else None
        means += _draw_series(ax, cells, axis, column, colour, marker, named, offset)
    values = [v for v in (number(row, column) for row in drawn) if v is not None]
    low, high = _limits(values, means) if values else (0.0, 1.0)
    base = [v for row in drawn if row.get("baseline") for v in [number(row, column)] if v]
    bar = bar_of(drawn, column)
    if bar is not None:
        ax.axhline(bar, color="#444444", linestyle=(0, (5, 3)), linewidth=0.9, zorder=1.5)
        low, high = min(low, bar), max(high, bar)
    pad = 0.10 * (high - low) or 0.02 * high or 1.0
    ax.set_ylim(low - pad, high + (2.6 if panel.killed else 1.0) * pad)
    for row in panel.killed:
        x, across = number(row, axis.key) or 0.0, ax.get_xaxis_transform()
        ax.plot([x], [0.95], "x", color=KILLED_COLOUR, ms=6, mew=1.6, transform=across, zorder=5)
        told = f"killed at\n{tokens_text(number(row, 'tokens') or 0)} tokens"
        ax.text(x, 0.91, told, color=KILLED_COLOUR, size=7, ha="center", va="top", transform=across)
    _ticks(ax, [*drawn, *panel.killed], axis)
    seeds = sorted({len(c) for cells in series.values() for c in cells.values()})
    if seeds:
        told = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        title = f"{panel.title}\n{told} seed{'' if seeds == [1] else 's'} a cell"
    else:
        title = f"{panel.title}\nno finished cell"
        ax.set_yticks([])
    if not base:
        title += ", baseline not finished"
    left_out = len(panel.runs) - len(drawn)
    if left_out:
        title += f", {left_out} without {column}"
    ax.set_title(title, loc="left", color="#222222")
    ax.set_ylabel(words(column))
    ax.set_xlabel(axis.label)


def _series(rows: Sequence[Row], axis: Axis) -> dict[str, dict[Any, list[Row]]]:
    """Runs that differ in nothing but the axis and the seed, by a label of what else differs."""
    fields = {
        axis.other: lambda v: f"share {SHARE.write(v)} %" if axis is GLU else f"GLU {GLU.write(v)}",
        "vocab_size": lambda v: f"V = {v:,}",
        "tie_embeddings": lambda v: "tied" if v else "untied",
        "learning_rate": lambda v: f"LR {v:g}",
        "embedding_lr_ratio": lambda v: f"embedding LR x {v:g}",
    }
    varying = [key for key in fields if len({row.get(key) for row in rows}) > 1]
    series: dict[str, dict[Any, list[Row]]] = {}
    for row in rows:
        label = ", ".join(fields[k](row[k]) for k in varying if row.get(k) is not None)
        series.setdefault(label, {}).setdefault(_asked(row, axis), []).append(row)
    return dict(sorted(series.items()))


def _draw_series(
    ax: Axes,
    cells: dict[Any, list[Row]],
    axis: Axis,
    column: str,
    colour: str,
    marker: str,
    label: str | None,
    offset: float,
) -> list[tuple[float, float | None]]:
    """Draw one line of cells; returns each cell's mean and the half width of its interval."""
    means = []
    for runs in cells.values():
        values = [v for v in (number(row, column) for row in runs) if v is not None]
        x = fmean([v for v in (number(row, axis.key) for row in runs) if v is not None])
        means.append((x, fmean(values), t_half_width(values), any(r.get("baseline") for r in runs)))
        if len(values) > 1:  # beside the mean, which would hide the middle seed
            ax.plot(
                [x - offset] * len(values),
                values,
                "o",
                ms=4,
                mfc="none",
                mec=colour,
                mew=0.8,
                zorder=4,
            )
    means.sort()
    ax.plot(
        [m[0] for m in means], [m[1] for m in means], color=colour, lw=1.0, alpha=0.55, zorder=2
    )
    for x, y, half, is_baseline in means:
        face = BASELINE_COLOUR if is_baseline else colour
        if half is not None:
            ax.errorbar([x], [y], yerr=[half], color=face, capsize=2.5, lw=1.0, zorder=3)
        shape, size = ("D", 5.5) if is_baseline else (marker if label else "s", 5)
        ax.plot([x], [y], shape, color=face, ms=size, zorder=5)
    if label:
        ax.plot([], [], marker=marker, color=colour, ms=5, lw=1.0, label=label)
        ax.legend(frameon=False, loc="best")
    return [(y, half) for _, y, half, _ in means]


def t_half_width(values: Sequence[float], level: float = 0.95) -> float | None:
    """Half width of the t interval of a mean: t_{n-1} sd / sqrt(n); None below two values."""
    n = len(values)
    return float(stdtrit(n - 1, 0.5 + level / 2)) * stdev(values) / math.sqrt(n) if n > 1 else None


def _limits(
    values: Sequence[float], means: Sequence[tuple[float, float | None]]
) -> tuple[float, float]:
    """Range of values and intervals; an interval of two seeds is 13 sd wide and may leave it."""
    low, high = min(values), max(values)
    room = 0.6 * (high - low)
    ends = [end for y, half in means if half is not None for end in (y - half, y + half)]
    return max(min([low, *ends]), low - room), min(max([high, *ends]), high + room)


def bar_of(rows: Sequence[Row], column: str) -> float | None:
    """Where the PRD's 5 % bar lies in this column, from the baseline's mean over seeds."""
    base = [row for row in rows if row.get("baseline") and number(row, column) is not None]
    if not base:
        return None
    level = mean_of(base, column)
    if column.endswith("bits_per_byte"):
        loss = number(base[0], column.replace("bits_per_byte", "loss"))
        return None if loss is None else level * (1 + math.log(BAR) / loss)
    if column.endswith("word_perplexity"):
        return None  # 5 % of token perplexity is another figure in words
    return BAR * level


def _ticks(ax: Axes, rows: Sequence[Row], axis: Axis) -> None:
    """A tick at each realised value with the asked one in brackets, merged where they collide."""
    cells: dict[Any, list[Row]] = {}
    for row in rows:
        cells.setdefault((_asked(row, axis), str(row.get("experiment") or row["run"])), []).append(
            row
        )
    spots = sorted(
        (fmean([number(r, axis.key) or 0.0 for r in runs]), asked, name)
        for (asked, name), runs in cells.items()
    )
    if not spots:
        return
    span = (spots[-1][0] - spots[0][0]) or abs(spots[0][0]) or 1.0
    ticks: list[tuple[float, str]] = []
    names = len(spots) <= 5
    for x, asked, name in spots:
        label = "\n" + textwrap.fill(name, 14)  # else neighbours run into each other
        text = f"{axis.write(x)}\n({axis.write(asked)})" + (label if names else "")
        if ticks and x - ticks[-1][0] < 0.13 * span:
            if names and f"{label}\n" not in f"{ticks[-1][1]}\n":
                ticks[-1] = (ticks[-1][0], ticks[-1][1] + label)
            continue
        ticks.append((x, text))
    ax.set_xticks([x for x, _ in ticks], [text for _, text in ticks])
    ax.set_xlim(spots[0][0] - 0.12 * span, spots[-1][0] + 0.12 * span)
    ax.yaxis.set_major_locator(MaxNLocator(6))


# --- shared pieces ------------------------------------------------------------------------------


def grid_of(count: int) -> tuple[Figure, list[Axes]]:
    columns = 1 if count == 1 else 2
    lines = math.ceil(count / columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4.4 if columns == 1 else 7.4, 0.9 + 3.0 * lines), squeeze=False
    )
    return figure, list(axes.flat)


def hide_unused(axes: Sequence[Axes], used: int) -> None:
    for ax in axes[used:]:
        ax.set_visible(False)


def _finish(
    figure: Figure, axes: Sequence[Axes], used: int, title: str, rows: Sequence[Row], axis: Axis
) -> None:
    hide_unused(axes, used)
    heading(figure, title, rows)
    handles = [
        Line2D([], [], linestyle="none", marker="o", mfc="none", mec=COLOURS[0], label="one seed"),
        Line2D([], [], color=COLOURS[0], marker="s", ms=5, lw=1.0, label="mean, 95 % t interval"),
        Line2D([], [], linestyle="none", color=BASELINE_COLOUR, marker="D", ms=5, label="baseline"),
        Line2D([], [], color="#444444", lw=0.9, linestyle=(0, (5, 3)), label="5 % lower PPL (bar)"),
    ]
    if any(row.get("status") == "killed" for row in rows):
        handles.append(
            Line2D(
                [],
                [],
                linestyle="none",
                marker="x",
                color=KILLED_COLOUR,
                mew=1.6,
                label="killed (no final value)",
            )
        )
    figure.legend(
        handles=handles, loc="outside lower center", ncol=3 if used == 1 else 5, frameon=False
    )


def heading(figure: Figure, title: str, rows: Sequence[Row], note: str = "") -> None:
    """Title, and under it what the runs share: corpus, parameters, device."""
    sizes = [v for v in (number(row, TOTAL_PARAMS.built) for row in rows) if v]
    shared = [_shared(rows, "corpus"), _shared(rows, "device_name")]
    if sizes:
        low, high = f"{min(sizes) / 1e6:.2f}", f"{max(sizes) / 1e6:.2f}"
        shared.insert(1, f"{low} M parameters" if low == high else f"{low} to {high} M parameters")
    parts = [part for part in [*shared, note] if part]
    width = 62 if figure.get_figwidth() < 5 else 110
    figure.suptitle(
        f"$\\bf{{{title[0].upper() + title[1:]}}}$".replace(" ", "\\ ")
        + "\n"
        + _wrap(parts, width),
        x=0.01,
        ha="left",
        fontsize=8.5,
    )


def _wrap(parts: Sequence[str], width: int) -> str:
    """Join with middle dots, breaking lines between parts only."""
    lines = [""]
    for part in parts:
        joined = f"{lines[-1]} · {part}" if lines[-1] else part
        if len(joined) > width and lines[-1]:
            lines.append(part)
        else:
            lines[-1] = joined
    return "\n".join(lines)


def _shared(rows: Sequence[Row], key: str) -> str:
    values = sorted({str(row[key]) for row in rows if row.get(key)})
    return _some(values, 2)


def _some(values: Sequence[str], most: int = 4) -> str:
    rest = len(values) - most
    return ", ".join(values[:most]) + (f" and {rest} more" if rest > 0 else "")


def empty_figure(sentence: str, output: Path) -> None:
    figure = plt.figure(figsize=(4.4, 1.6))
    figure.text(0.5, 0.5, sentence, ha="center", va="center", color="#444444")
    save(figure, output)


def save(figure: Figure, output: Path) -> None:
    figure.savefig(output, format="png")
    plt.close(figure)


def tokens_text(tokens: float) -> str:
    """5e6 -> "5.0 M", 160000 -> "160 k"."""
    if tokens >= 1e9:
        return f"{tokens / 1e9:.1f} B"
    return f"{tokens / 1e6:.1f} M" if tokens >= 1e6 else f"{tokens / 1e3:.0f} k"


def budget_of(row: Row) -> float:
    """Trained tokens to two significant digits: what makes runs comparable in a panel."""
    tokens = number(row, "tokens")
    return float(f"{tokens:.1e}") if tokens else 0.0


def _asked(row: Row, axis: Axis) -> float:
    """What was asked, to four digits; the realised value where the table decided the share."""
    asked = number(row, axis.asked)
    return round(number(row, axis.key) or 0.0, 3) if asked is None else round(asked, 4)


def mean_of(rows: Sequence[Row], key: str) -> float:
    return fmean([v for v in (number(row, key) for row in rows) if v is not None])


def sweep_of(row: Row) -> str:
    return str(row.get("sweep") or "")


def stem(sweep: str) -> str:
    return Path(sweep).stem


def words(column: str) -> str:
    names = {
        "perplexity": "perplexity per token",
        "word_perplexity": "perplexity per word",
        "bits_per_byte": "bits per byte",
    }
    split, _, rest = (
        column.partition("_") if column.startswith(("test_", "dev_")) else ("", "", column)
    )
    text = names.get(rest, rest.replace("_", " "))
    text = f"{split} {text}" if split else text
    return text[0].upper() + text[1:]
