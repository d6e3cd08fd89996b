"""What all figures share: style, sizes, one look per configuration, axes that hold their data.

`paper.mplstyle` is the one style. Colours are Okabe and Ito's, which colour-blind readers tell
apart; markers repeat what colours say. Import this before any other part of matplotlib.
"""

from __future__ import annotations

import contextlib
import math
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib

matplotlib.use("Agg")  # no display on a training machine

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from src.spec.metric_keys import EMBEDDING_RATIO, GLU_EXPANSION, TOTAL_PARAMS

COLUMN, PAGE = 3.3, 6.9  # inches: one column of a paper, and both
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8B5A2B")
MARKERS = ("o", "s", "^", "v", "P", "X", "<", ">")
BASELINE_MARKERS = ("D", "*", "p")
DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)))
BASELINE = " (baseline)"  # behind its name in a legend
BLACK, GREY = "#000000", "#777777"
BAR_DASH = (0, (5, 3))
PAD = 0.06  # of an axis, kept free at both ends: a marker's size


@contextlib.contextmanager
def style() -> Iterator[None]:
    """The style of every figure made inside."""
    with plt.style.context(Path(__file__).with_name("paper.mplstyle")):
        yield


@dataclass(frozen=True, slots=True)
class Look:
    """How one configuration is drawn, in every panel of every figure."""

    colour: str
    marker: str
    dash: Any = "-"


def looks(runs: pd.DataFrame) -> dict[str, Look]:
    """A look for each configuration of a whole table, in black what is the baseline wherever it
    stands; by what was asked for and name, so that equal tables give equal looks."""
    sort_keys = [EMBEDDING_RATIO.asked, GLU_EXPANSION.asked, "configuration"]
    known = runs.dropna(subset=["configuration"]).sort_values(sort_keys)
    names = known["configuration"].drop_duplicates()
    other = known.loc[known["configuration"] != known["baseline_configuration"], "configuration"]
    is_base = names.isin(runs["baseline_configuration"]) & ~names.isin(other)
    return {name: _baseline_look(index) for index, name in enumerate(names[is_base])} | {
        name: look(index) for index, name in enumerate(names[~is_base])
    }


def _baseline_look(index: int) -> Look:
    markers, dashes = BASELINE_MARKERS, DASHES
    return Look(BLACK, markers[index % len(markers)], dashes[index % len(dashes)])


def look(index: int) -> Look:
    """The look of the index-th configuration that is no baseline; 56 differ."""
    return Look(
        COLOURS[index % len(COLOURS)],
        MARKERS[index % len(MARKERS)],
        DASHES[index // len(COLOURS) % len(DASHES)],
    )


# --- axes that hold their data ------------------------------------------------------------------


def hold(ax: Axes, which: Literal["x", "y"], values: Iterable[float], *, log: bool = False) -> None:
    """Limits and labelled ticks such that every value lies between two labelled ticks and a
    marker's width inside the frame. log: a logarithmic axis, for values above 0."""
    known = [float(v) for v in values if math.isfinite(v)]
    low, high = min(known), max(known)
    if low == high:
        low, high = (low * 0.98, high * 1.02) if low else (-1.0, 1.0)
    ticks = _decades(low, high) if log and high / low > 3 else _steps(low, high)
    if log:
        room = (high / low) ** PAD
        ends = min(ticks[0], low / room), max(ticks[-1], high * room)
    else:
        room = PAD * (high - low)
        ends = min(ticks[0], low - room), max(ticks[-1], high + room)
    axis = ax.xaxis if which == "x" else ax.yaxis
    ax.set(**{f"{which}scale": "log" if log else "linear"})
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
    axis.set_ticks(ticks)
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    ax.set(**{f"{which}lim": ends})


def _steps(low: float, high: float) -> list[float]:
    """Even ticks from at or below `low` to at or above `high`."""
    ticks = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    return [float(f"{tick:.10g}") for tick in ticks]


def _decades(low: float, high: float) -> list[float]:
    """Round ticks for a logarithmic axis: the coarsest of some sets with four of them at least."""
    ticks: list[float] = []
    for digits in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        values = [float(f"{digit * 10.0**power:.6g}") for power in powers for digit in digits]
        first = max(index for index, tick in enumerate(values) if tick <= low)
        last = next((index for index, tick in enumerate(values) if tick >= high), len(values) - 1)
        ticks = values[first : last + 1]
        if len(ticks) >= 4:
            break
    return ticks


def draw_interval(ax: Axes, x: float, low: float, high: float, colour: str) -> bool:
    """An interval of y at x; where it leaves the panel, an arrow at the frame. After `hold`.

    Returns whether it leaves."""
    bottom, top = ax.get_ylim()
    ax.plot([x, x], [max(low, bottom), min(high, top)], color=colour, lw=1.0, zorder=3)
    for end, edge, height, arrow in ((low, bottom, 0.02, "v"), (high, top, 0.98, "^")):
        if bottom <= end <= top:
            ax.plot([x], [end], "_", color=colour, ms=5, mew=1.0, zorder=3)
        elif (end < edge) == (arrow == "v"):
            ax.plot([x], [height], arrow, color=colour, ms=3.5, zorder=3,
                    transform=ax.get_xaxis_transform())  # fmt: skip
    return low < bottom or high > top


# --- figures ------------------------------------------------------------------------------------


def grid(count: int) -> tuple[Figure, list[Axes]]:
    """`count` panels: one in a column's width, more in two columns over a page's."""
    columns, rows = min(count, 2), math.ceil(count / 2)
    size = (COLUMN if columns == 1 else PAGE, 2.3 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for ax in axes.flat[count:]:
        ax.remove()
    return figure, list(axes.flat[:count])


def finish(
    figure: Figure,
    handles: Sequence[Any],
    title: str,
    runs: pd.DataFrame | None = None,
    styles: Mapping[str, Look] | None = None,
    note: str = "",
) -> None:
    """Title, what the runs share, and one legend below the panels; the figure grows for both.

    handles: of what was drawn, by label each once, configurations first; the baseline of one panel
    alone is named without the word. Long labels are broken, never cut."""
    wide = figure.get_figwidth() > COLUMN + 1
    width = 118 if wide else 54  # characters of the title's size
    texts = (title, "" if runs is None else facts(runs), note)
    head = "\n".join(line for text in texts for line in textwrap.wrap(text, width))
    figure.suptitle(head, x=0.01, ha="left")
    by_label = {handle.get_label(): handle for handle in handles}
    for label in [f"{label}{BASELINE}" for label in by_label]:
        by_label.pop(label, None)
    unique = list(by_label.values())
    order = {name: index for index, name in enumerate(styles or ())}
    unique.sort(key=lambda h: order.get(h.get_label().removesuffix(BASELINE), len(order)))
    for handle in unique:
        handle.set_label("\n".join(textwrap.wrap(handle.get_label(), 50)))
    longest = max((len(h.get_label().split("\n")[0]) for h in unique), default=1)
    columns = max(1, min(len(unique), (130 if wide else 60) // (longest + 8)))
    extra = sum(h.get_label().count("\n") for h in unique)
    height = 0.155 * math.ceil(len(unique) / columns) + 0.115 * extra / columns
    height += 0.14 * (head.count("\n") + 1)
    figure.set_figheight(figure.get_figheight() + height)
    if unique:
        figure.legend(handles=unique, loc="outside lower center", ncol=columns)


def facts(runs: pd.DataFrame) -> str:
    """What the drawn runs share: parameters, corpus, device."""
    ends = (runs[TOTAL_PARAMS.built] / 1e6).agg(["min", "max"]).dropna()
    sizes = " to ".join(dict.fromkeys(f"{end:.2f}" for end in ends))
    parts = [f"{sizes} M parameters"] if sizes else []
    for key in ("corpus", "device_name"):
        values = sorted(runs[key].dropna().astype(str).unique())
        rest = f" and {len(values) - 2} more" if len(values) > 2 else ""
        parts += [", ".join(values[:2]) + rest] if values else []
    return " · ".join(part.replace(" ", "\u00a0") for part in parts)  # broken between parts only


def title(ax: Axes, text: str, width: int = 46) -> None:
    """A panel's title, broken where the panel is too narrow for it; width in characters."""
    lines = [part for line in text.split("\n") for part in textwrap.wrap(line, width)]
    ax.set_title("\n".join(lines))


def point(label: str, shape: Look | str, **kwargs: Any) -> Line2D:
    """A legend's entry: a marker without a line."""
    if isinstance(shape, Look):
        kwargs = {"color": shape.colour, **kwargs}
        shape = shape.marker
    return Line2D([], [], linestyle="none", marker=shape, label=label, **{"color": GREY, **kwargs})


def line(label: str, **kwargs: Any) -> Line2D:
    """A legend's entry: a line."""
    return Line2D([], [], label=label, **{"color": GREY, **kwargs})


def named(
    shown: Iterable[str], styles: Mapping[str, Look], baseline: Iterable[str]
) -> list[Line2D]:
    """Legend entries of the configurations that were drawn, in the looks' order."""
    drawn, bases = set(shown), set(baseline)
    return [
        point(f"{name}{BASELINE if name in bases else ''}", look)
        for name, look in styles.items()
        if name in drawn
    ]


def save(figure: Figure, output: Path) -> None:
    figure.savefig(output, format="png")
    plt.close(figure)


def words(column: str) -> str:
    """An axis' label: test_perplexity is "Test perplexity per token"."""
    split = next((s for s in ("test", "dev") if column.startswith(f"{s}_")), "")
    rest = column.removeprefix(f"{split}_")
    names = {"perplexity": "perplexity per token", "word_perplexity": "perplexity per word"}
    label = f"{split} {names.get(rest, rest.replace('_', ' '))}".strip()
    return label[0].upper() + label[1:]
