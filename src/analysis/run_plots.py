"""Figures of runs one by one: learning curves, Pareto fronts, ranking runs against full runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from src.analysis.latency_ratios import side_by_side
from src.analysis.plots import (
    BAR,
    BASELINE_COLOUR,
    COLOURS,
    MARKERS,
    OTHER_COLOUR,
    STYLE,
    bar_of,
    budget_of,
    column_of,
    empty_figure,
    grid_of,
    heading,
    hide_unused,
    save,
    stem,
    sweep_of,
    tokens_text,
    words,
)
from src.analysis.rankings import RankAgreement, rank_agreement
from src.analysis.run_csv import Row, number
from src.analysis.run_table import Curve
from src.evaluation.stability import JUMP_NATS

# --- learning curves ----------------------------------------------------------------------------


def learning_curves(rows: Sequence[Row], curves: dict[str, Curve], output: Path) -> None:
    """Dev perplexity against training tokens, a panel for each sweep, phase and vocabulary.

    curves: by the run's `path`. A panel never holds two tokenizers: their perplexities would not
    compare.
    """
    known = [row for row in rows if curves.get(str(row.get("path")))]
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in known:
        vocabulary = f"V = {row['vocab_size']:,}" if "vocab_size" in row else "V unknown"
        key = (sweep_of(row), str(row.get("phase")), vocabulary)
        groups.setdefault(key, []).append(row)
    with plt.rc_context(STYLE):
        if not groups:
            return empty_figure("No run has a dev check yet.", output)
        figure, axes = plt.subplots(
            len(groups), 2, figsize=(7.4, 0.7 + 2.5 * len(groups)), squeeze=False
        )
        keys = sorted(groups, key=lambda k: (k[0], k[1] != "rank", k[2]))
        for (left, right), key in zip(axes, keys, strict=True):
            styles = _draw_curves(left, groups[key], curves)
            _draw_differences(right, groups[key], curves, styles)
            kind = "Ranking runs" if key[1] == "rank" else "Full runs"
            left.set_title(f"{kind} ({stem(key[0])}, {key[2]})", loc="left", color="#222222")
            right.set_xlabel(left.get_xlabel())
            right.set_xlim(left.get_xlim())
        heading(figure, "Learning curves", known)
        save(figure, output)


def _told_apart(rows: Sequence[Row], curves: dict[str, Curve]) -> tuple[list[str], int]:
    """Experiments that get a colour, and how many do not: the lowest ones where there are many."""
    last: dict[str, float] = {}
    for row in rows:
        if not row.get("baseline"):
            name, curve = str(row.get("experiment")), curves[str(row["path"])]
            last[name] = min(last.get(name, math.inf), curve[-1][1])
    names = sorted(last)
    if len(names) > len(COLOURS):
        names = sorted(sorted(last, key=lambda name: last[name])[:3])
    return names, len(last) - len(names)


def _draw_differences(
    ax: Axes, rows: Sequence[Row], curves: dict[str, Curve], styles: dict[str, tuple[str, Any]]
) -> None:
    """Perplexity over that of the baseline with the same seed, at equal tokens, in per cent."""
    bases = {row.get("seed"): dict(curves[str(row["path"])]) for row in rows if row.get("baseline")}
    if not bases:
        ax.set_yticks([])
        ax.text(0.5, 0.5, "no baseline here", transform=ax.transAxes, ha="center", color="#666666")
        return
    longest = max(curves[str(row["path"])][-1][0] for row in rows)
    factor = 1e6 if longest >= 2e6 else 1e3
    late = [0.0]
    for row in rows:
        base = bases.get(row.get("seed"))
        if base is None or row.get("baseline"):
            continue
        curve = curves[str(row["path"])]
        points = [(t, 100 * (p / base[t] - 1)) for t, p in curve if t in base]
        if not points:
            continue
        colour, dash = styles[str(row.get("experiment"))]
        ax.plot(
            [t / factor for t, _ in points], [d for _, d in points], color=colour, ls=dash, lw=1
        )
        if row.get("status") == "killed":
            ax.plot(
                points[-1][0] / factor, points[-1][1], "x", color=colour, ms=6, mew=1.6, zorder=5
            )
        late += [d for t, d in points if t >= 0.15 * longest] or [points[-1][1]]
    ax.axhline(0.0, color=BASELINE_COLOUR, lw=1.4)
    ax.axhline(100 * (BAR - 1), color="#444444", linestyle=(0, (5, 3)), lw=0.9)
    low, high = min([*late, 100 * (BAR - 1)]), max(late)
    ax.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:+g}" if v else "0"))
    ax.set_ylabel("Dev perplexity against\nthe baseline (%)")
    ax.set_title("same seed, equal tokens; dashed: 5 % lower", loc="left", color="#222222")


def _draw_curves(
    ax: Axes, rows: Sequence[Row], curves: dict[str, Curve]
) -> dict[str, tuple[str, Any]]:
    """Draw every run; returns each experiment's colour and dash."""
    names, others = _told_apart(rows, curves)
    longest = max(curves[str(row["path"])][-1][0] for row in rows)
    unit, factor = ("M", 1e6) if longest >= 2e6 else ("k", 1e3)
    tops, bottoms, jumps = [], [], []
    styles: dict[str, tuple[str, Any]] = {}
    for row in rows:
        curve, name = curves[str(row["path"])], str(row.get("experiment"))
        baseline = bool(row.get("baseline"))
        place = names.index(name) if name in names else -1
        colour = BASELINE_COLOUR if baseline else COLOURS[place] if place >= 0 else OTHER_COLOUR
        done = row.get("status") in ("finished", "killed")
        dash: Any = "-" if done else (0, (1, 1.2))
        if done or name not in styles:
            styles[name] = (colour, dash)
        x, y = [t / factor for t, _ in curve], [p for _, p in curve]
        width, above = (1.4, 3.0) if baseline else (1.0, 2.5) if place >= 0 else (0.4, 2.0)
        ax.plot(x, y, color=colour, lw=width, linestyle=dash, alpha=0.9, zorder=above)
        if row.get("status") == "killed":
            ax.plot(x[-1:], y[-1:], "x", color=colour, ms=6, mew=1.6, zorder=5)
        if (jump := jump_mark(row, curve)) is not None:
            jumps.append((jump[0] / factor, jump[1], colour))
        late = [p for t, p in curve if t >= 0.1 * longest] or [curve[-1][1]]
        tops.append(late[0])
        bottoms.append(min(p for _, p in curve))
        label = f"{name} (baseline)" if baseline else name if place >= 0 else f"{others} others"
        if label not in ax.get_legend_handles_labels()[1]:
            ax.plot([], [], color=colour, lw=1.4, label=label, linestyle="-" if done else dash)
    ax.set_yscale("log")
    ax.set_ylim(min(bottoms) * 0.97, max(tops) * 1.03)
    ax.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_xlim(0, 1.02 * longest / factor)
    ax.set_xlabel(f"Training tokens ({unit})")
    ax.set_ylabel("Dev perplexity per token")
    if any(row.get("status") == "killed" for row in rows):
        ax.plot([], [], "x", color="#444444", ms=6, mew=1.6, label="killed")
    for tokens, perplexity, colour in jumps:  # early ones lie above the axis: at its edge then
        at = min(perplexity, ax.get_ylim()[1])
        ax.plot(tokens, at, "^", color=colour, mfc="none", ms=5, zorder=5, clip_on=False)
    if jumps:
        told = f"train loss jumped > {JUMP_NATS:g} nat"
        ax.plot([], [], "^", color="#444444", mfc="none", ms=5, linestyle="none", label=told)
    if any(row.get("status") in ("failed", "unfinished") for row in rows):
        ax.plot([], [], color="#444444", lw=1.2, linestyle=(0, (1, 1.2)), label="not finished")
    ax.legend(frameon=False, loc="upper right")
    return styles


def jump_mark(row: Row, curve: Curve) -> tuple[float, float] | None:
    """(tokens, dev perplexity between checks) where the training loss jumped in one step."""
    rise, step = number(row, "loss_largest_rise_nats"), number(row, "loss_largest_rise_step")
    size, length = number(row, "batch_size"), number(row, "seq_len")
    if rise is None or step is None or size is None or length is None or rise <= JUMP_NATS:
        return None
    tokens = step * size * length
    return tokens, float(np.interp(tokens, [t for t, _ in curve], [p for _, p in curve]))


# --- Pareto fronts ------------------------------------------------------------------------------

_MOST_NAMES = 20  # more names than this would be a legend larger than the figure
_COSTS = (
    ("flops_per_token", "Training FLOPs per token (M)", 1e-6),
    ("latency_ms_p50_l128", "Median latency, batch 1, L = 128 (ms)", 1.0),
    ("latency_ms_p50_l512", "Median latency, batch 1, L = 512 (ms)", 1.0),
    ("peak_memory_mib", "Peak memory (MiB)", 1.0),
)


def pareto_figure(rows: Sequence[Row], output: Path) -> None:
    """Bits per byte against FLOPs, latency and memory: a mean over seeds for each experiment.

    Latency as ratios that one process measured in turns; where there are none, a point a seed and
    no front.

    Only runs that share corpus, device, phase and budget are comparable: the largest such group
    is drawn, full runs before ranking runs, and the title says how many runs it holds.
    """
    finished = [row for row in rows if row.get("status") == "finished"]
    group = _largest_comparable(finished)
    with plt.rc_context(STYLE):
        if not group:
            return empty_figure("No finished run to compare yet.", output)
        column = column_of("bits_per_byte", group)
        figure, grid = plt.subplots(2, 2, figsize=(7.0, 6.0))
        cells: dict[tuple[str, str], list[Row]] = {}
        for row in group:
            cells.setdefault((sweep_of(row), str(row.get("experiment"))), []).append(row)
        beside = side_by_side(list(cells.values()))
        for ax, (key, label, scale) in zip(grid.flat, _COSTS, strict=True):
            length = key.rpartition("_l")[2]
            if not key.startswith("latency"):
                _draw_front(ax, cells, key, column, scale)
            elif beside is None:
                _draw_seeds(ax, cells, key, column)
                label += "\neach seed, measured alone: no front"
            else:
                ratio = f"latency_ratio_l{length}"
                _draw_front(ax, _only_beside(cells, beside, ratio), ratio, column, 1.0)
                label = f"Latency, batch 1, L = {length}, over {beside}'s"
            ax.set_xlabel(label)
            ax.set_ylabel(words(column))
        phase = "ranking" if group[0].get("phase") == "rank" else "full"
        note = f"{len(group)} of {len(finished)} finished runs: {phase}, "
        note += f"{tokens_text(budget_of(group[0]))} tokens"
        styles = _cell_styles(cells)
        named = (
            styles if len(styles) <= _MOST_NAMES else [s for s in styles if "(baseline)" in s[0]]
        )
        handles: list[Line2D | Patch] = [
            Line2D([], [], linestyle="none", color=c, marker=m, ms=6, label=name)
            for name, c, m in named
        ]
        handles += [
            Line2D([], [], color="#999999", lw=1.0, label="Pareto front"),
            Line2D([], [], linestyle="none", marker="o", mfc="none", mec="#444444", label="beaten"),
        ]
        if len(named) < len(styles):
            note += "; cells on a front are named beside their points"
        if sum(any(row.get("baseline") for row in runs) for runs in cells.values()) == 1:
            told = "5 % lower PPL at no more cost"
            handles.append(Patch(color="#009E73", alpha=0.13, label=told))
        heading(figure, f"{words(column)} against cost", group, note)
        columns = 5 if max(len(str(one.get_label())) for one in handles) <= 20 else 3
        figure.legend(handles=handles, loc="outside lower center", ncol=columns, frameon=False)
        save(figure, output)


def _largest_comparable(rows: Sequence[Row]) -> list[Row]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = (row.get("phase"), budget_of(row), row.get("corpus"), row.get("device_name"))
        groups.setdefault(key, []).append(row)
    full = [g for k, g in groups.items() if k[0] == "full"]
    many = [g for g in full if len({r.get("experiment") for r in g}) > 1]
    return max(many or list(groups.values()) or [[]], key=len)


def _cell_styles(cells: dict[tuple[str, str], list[Row]]) -> list[tuple[str, str, str]]:
    styles: list[tuple[str, str, str]] = []
    place = 0
    names = [name for _, name in cells]
    for (sweep, name), runs in cells.items():
        label = f"{name} ({stem(sweep)})" if names.count(name) > 1 else name
        if any(row.get("baseline") for row in runs):
            bases = sum("(baseline)" in style[0] for style in styles)
            styles.append((f"{label} (baseline)", BASELINE_COLOUR, "D*p"[bases % 3]))
            continue
        styles.append((label, COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]))
        place += 1
    return styles


def _only_beside(
    cells: dict[tuple[str, str], list[Row]], beside: str, ratio: str
) -> dict[tuple[str, str], list[Row]]:
    """Rows without the ratios that are to another run."""
    return {
        cell: [
            row if row.get("latency_ratio_to") == beside else row | {ratio: None} for row in runs
        ]
        for cell, runs in cells.items()
    }


def _draw_seeds(ax: Axes, cells: dict[tuple[str, str], list[Row]], key: str, column: str) -> None:
    """A point a run: how far the seeds of one configuration lie apart is there to be seen."""
    styles = _cell_styles(cells)
    for (_, colour, marker), runs in zip(styles, cells.values(), strict=True):
        if len(styles) > _MOST_NAMES and not any(row.get("baseline") for row in runs):
            colour, marker = OTHER_COLOUR, "o"
        both = [(number(row, key), number(row, column)) for row in runs]
        points = [(x, y) for x, y in both if x is not None and y is not None]
        for x, y in points:
            ax.plot([x], [y], marker, color=colour, mfc="none", ms=6, mew=1.2)
    if not ax.lines:
        ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, ha="center", color="#666666")
    ax.margins(0.12)


def _draw_front(
    ax: Axes, cells: dict[tuple[str, str], list[Row]], key: str, column: str, scale: float
) -> None:
    points = []
    for (name, colour, marker), runs in zip(_cell_styles(cells), cells.values(), strict=True):
        xs = [v * scale for v in (number(row, key) for row in runs) if v is not None]
        ys = [v for v in (number(row, column) for row in runs) if v is not None]
        if xs and ys:
            base = any(row.get("baseline") for row in runs)
            points.append((fmean(xs), fmean(ys), colour, marker, base, runs, name))
    if not points:
        ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, ha="center", color="#666666")
        return
    front = [p for p in points if not any(_beats(q, p) for q in points)]
    for point in points:
        x, y, colour, marker, base, _, name = point
        if len(cells) > _MOST_NAMES and not base:
            colour, marker = ("#0072B2", "o") if point in front else (OTHER_COLOUR, "o")
            if point in front:
                ax.annotate(name, (x, y), (4, 3), textcoords="offset points", size=6)
        face = colour if point in front else "none"
        ax.plot([x], [y], marker, color=colour, mfc=face, ms=7 if base else 6, mew=1.2, zorder=4)
    edge = sorted((p[0], p[1]) for p in front)
    ax.plot(
        [x for x, _ in edge],
        [y for _, y in edge],
        color="#999999",
        lw=1.0,
        drawstyle="steps-post",
        zorder=2,
    )
    ax.margins(0.12)
    _shade_winners(ax, [p for p in points if p[4]], column)


def _shade_winners(ax: Axes, baselines: Sequence[tuple[Any, ...]], column: str) -> None:
    """The corner a winner must be in: no costlier than the baseline, perplexity 5 % lower."""
    if len(baselines) != 1:
        return  # several sweeps, several baselines: no one corner
    x, runs = baselines[0][0], baselines[0][5]
    bar = bar_of(runs, column)
    if bar is None:
        return
    low_x, high_x = ax.get_xlim()
    low_y, high_y = ax.get_ylim()
    low_y = min(low_y, bar - 0.15 * (high_y - bar))
    ax.set_ylim(low_y, high_y)
    ax.set_xlim(low_x, high_x)
    ax.fill_between([low_x, x], low_y, bar, color="#009E73", alpha=0.13, lw=0, zorder=0)


def _beats(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return a[0] <= b[0] and a[1] <= b[1] and (a[0] < b[0] or a[1] < b[1])


# --- ranking runs against full runs -------------------------------------------------------------


def rank_agreement_figure(rows: Sequence[Row], output: Path) -> bool:
    """Dev perplexity of cells after the ranking and the full budget; False if none has both.

    Means are over equal seeds of both budgets; Spearman's correlation stands in each panel's title.
    """
    runs: dict[str, dict[str, dict[str, dict[int, Row]]]] = {}
    for row in rows:
        if row.get("status") == "finished" and number(row, "dev_perplexity") is not None:
            phases = runs.setdefault(sweep_of(row), {})
            cells = phases.setdefault(str(row.get("phase")), {})
            cells.setdefault(str(row.get("experiment")), {})[int(row["seed"])] = row
    found = {sweep: _agreement(phases) for sweep, phases in sorted(runs.items())}
    both = {sweep: one for sweep, one in found.items() if one is not None and one.n >= 2}
    if not both:
        return False
    with plt.rc_context(STYLE):
        figure, axes = grid_of(len(both))
        used = []
        for ax, (sweep, one) in zip(axes, both.items(), strict=False):
            short, full = runs[sweep]["rank"], runs[sweep]["full"]
            kept = {name: [full[name][seed] for seed in one.seeds] for name in one.names}
            styles = _cell_styles({(sweep, name): group for name, group in kept.items()})
            for (label, colour, marker), x, y in zip(styles, one.short, one.full, strict=True):
                told = label if one.n <= 10 or "(baseline)" in label else "_hidden"
                ax.plot(x, y, marker, color=colour, ms=6, label=told, linestyle="none")
            title = f"{stem(sweep)}: {one.n} cells"
            title += "" if one.spearman is None else f", Spearman {one.spearman:+.2f}"
            title += f", {len(one.missing)} runs without partner" if one.missing else ""
            ax.set_title(title, loc="left", color="#222222")
            ax.set_xlabel("Dev perplexity after the ranking budget")
            ax.set_ylabel("Dev perplexity after the full budget")
            ax.margins(0.15)
            ax.legend(loc="best", edgecolor="#CCCCCC", framealpha=1.0)
            used += [r for name in one.names for s in one.seeds
                     for r in (short[name][s], full[name][s])]  # fmt: skip
        hide_unused(axes, len(both))
        heading(figure, "Do short rankings foretell full ones?", used)
        save(figure, output)
    return True


def _agreement(phases: Mapping[str, Mapping[str, Mapping[int, Row]]]) -> RankAgreement | None:
    """Dev perplexity of ranking against full runs over equal seeds; None where none are equal."""
    short, full = (
        {
            name: {seed: float(row["dev_perplexity"]) for seed, row in cells.items()}
            for name, cells in phases.get(phase, {}).items()
        }
        for phase in ("rank", "full")
    )
    try:
        return rank_agreement(short, full)
    except ValueError:
        return None
