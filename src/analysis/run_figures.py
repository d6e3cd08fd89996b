"""Figures of runs one by one: learning curves, Pareto fronts, ranking runs against full runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from src.analysis import paper
from src.analysis.blocks import at_own_rates, kind_text, many_rates, tokens_text
from src.analysis.rankings import rank_agreement
from src.analysis.sweep_figures import BAR, Styles, bar_of, column_of
from src.evaluation.stability import JUMP_NATS
from src.spec.rates import spelled

Curves = Mapping[str, Sequence[tuple[float, float]]]
"""(training tokens, dev perplexity) by the run's name."""

# --- learning curves ----------------------------------------------------------------------------


def learning_curves(runs: pd.DataFrame, curves: Curves, styles: Styles, output: Path) -> bool:
    """Dev perplexity against training tokens, a line of panels for each sweep, phase, vocabulary
    and batch; beside it the difference from the baseline of the same seed. False without a curve.

    A panel never holds two tokenizers: their perplexities would not compare.
    """
    sources = runs["same_as"].fillna(runs["run"])  # an equal run's curve stands in its place
    curves = {run: curves.get(source, ()) for run, source in zip(runs["run"], sources, strict=True)}
    known = runs[runs["run"].map(lambda name: bool(curves[name])) & runs["experiment"].notna()]
    if known.empty:
        return False
    keys = ["sweep", "phase", "vocab_size", "batch_size"]
    groups = [group for _, group in known.groupby(keys, dropna=False)]
    groups.sort(key=lambda g: (str(g["sweep"].iloc[0]), g["phase"].iloc[0] != "rank",
                               -g["batch_size"].iloc[0]))  # fmt: skip
    with paper.style():
        figure, axes = plt.subplots(
            len(groups), 2, figsize=(paper.PAGE, 2.2 * len(groups)), squeeze=False
        )
        handles: list[Any] = []
        for (left, right), group in zip(axes, groups, strict=True):
            longest = max(curves[name][-1][0] for name in group["run"])
            unit, factor = ("M", 1e6) if longest >= 2e6 else ("k", 1e3)
            shown = {name: [(t / factor, p) for t, p in curves[name]] for name in group["run"]}
            handles += _draw_curves(left, group, shown, styles, factor)
            left.set_xlabel(f"Training tokens ({unit})")
            if _draw_differences(right, group, shown, styles):
                right.set_xlabel(left.get_xlabel())
            else:
                right.remove()
        paper.finish(figure, handles, "Learning curves", known, styles)
        paper.save(figure, output)
    return True


def _draw_curves(
    ax: Axes, group: pd.DataFrame, curves: Curves, styles: Styles, factor: float
) -> list[Any]:
    """Draw every run (over tokens / factor); returns the legend entries of what is shown."""
    longest = max(curve[-1][0] for curve in curves.values())
    within = []
    for name in _ended(group)["run"]:
        last, lowest = curves[name][-1], min(p for _, p in curves[name])
        early = next(p for t, p in curves[name] if t >= min(0.1 * longest, last[0]))
        within += [early, last[1], lowest]
    paper.hold(ax, "y", within, log=True)
    paper.hold(ax, "x", [0, longest])
    handles: list[Any] = []
    rates, many = sorted(group["learning_rate"].dropna().unique()), many_rates(group)
    if many:
        handles += [paper.line(f"rate {spelled(r)}", ls=paper.DASHES[i % 4])
                    for i, r in enumerate(rates)]  # fmt: skip
        handles.append(paper.line("thick: at its own best rate", lw=1.4))
    best = set(at_own_rates(group)["run"])
    for row in group.itertuples():
        look, (x, y) = styles[row.configuration], zip(*curves[row.run], strict=True)
        dash = paper.DASHES[rates.index(row.learning_rate) % 4] if many else look.dash
        width, alpha, order = (1.1, 1.0, 3) if row.run in best else (0.6, 0.6, 2)
        ax.plot(x, y, color=look.colour, ls=dash, lw=width, alpha=alpha, zorder=order)
        base = paper.BASELINE if row.configuration == row.baseline_configuration else ""
        dash = "-" if many else look.dash
        handles.append(paper.line(f"{row.configuration}{base}", color=look.colour, ls=dash, lw=1.1))
        handles += _mark_end(ax, row.status, x[-1], y[-1], look)
        if row.loss_largest_rise_nats > JUMP_NATS:
            jump = row.loss_largest_rise_step * row.batch_size * row.seq_len
            ax.plot([jump / factor], [0.96], "v", color=look.colour, mfc="none", ms=4, zorder=5,
                    transform=ax.get_xaxis_transform())  # fmt: skip
            label = f"train loss jumped by more than {JUMP_NATS:g} nat here"
            handles.append(paper.point(label, "v", mfc="none", ms=4))
    first = group.iloc[0]
    parts = [] if math.isnan(first["vocab_size"]) else [f"V = {first['vocab_size']:,.0f}"]
    if not math.isnan(first["batch_size"]):
        parts.append(f"{first['batch_size']:.0f} sequences a step")
    if not (group["configuration"] == group["baseline_configuration"]).any():
        parts.append("no run of the baseline")
    paper.title(
        ax, f"{kind_text(first['phase'])}\n{Path(str(first['sweep'])).stem}: {', '.join(parts)}"
    )
    ax.set_ylabel("Dev perplexity per token")
    return handles


def _ended(group: pd.DataFrame) -> pd.DataFrame:
    """The runs whose ends the panel must show: finished and killed ones, where there are any."""
    ended = group[group["status"].isin(["finished", "killed"])]
    return ended if len(ended) else group


def _mark_end(ax: Axes, status: str, x: float, y: float, look: paper.Look) -> list[Any]:
    """A mark where a run that did not finish ended; an arrow at the frame where that is outside."""
    kwargs: dict[str, Any] = {"color": look.colour, "mfc": "none", "zorder": 5}
    if y > ax.get_ylim()[1]:
        ax.plot([x], [0.96], "^", ms=4, transform=ax.get_xaxis_transform(), **kwargs)
        return [paper.point("ends above the panel", "^", mfc="none", ms=4)]
    if status == "finished":
        return []
    shape, label = ("x", "killed") if status == "killed" else ("o", "not finished")
    ax.plot([x], [y], shape, mew=1.2, **kwargs)
    return [paper.point(label, shape, mfc="none", mew=1.2)]


def _draw_differences(ax: Axes, group: pd.DataFrame, curves: Curves, styles: Styles) -> bool:
    """Perplexity over that of the baseline with the same seed, at equal tokens, in per cent; False
    where no run has such a baseline."""
    chosen = at_own_rates(group)
    is_base = chosen["configuration"] == chosen["baseline_configuration"]
    bases = {row.seed: dict(curves[row.run]) for row in chosen[is_base].itertuples()}
    gaps: dict[str, list[tuple[float, float]]] = {}
    for row in chosen[~is_base].itertuples():
        base = bases.get(row.seed, {})
        points = [(t, 100 * (p / base[t] - 1)) for t, p in curves[row.run] if t in base]
        if points:
            gaps[row.run] = points
    if not gaps:
        return False
    longest = max(curve[-1][0] for curve in curves.values())
    judged = [gaps[name] for name in _ended(chosen)["run"] if name in gaps] or [*gaps.values()]
    late = [d for points in judged for t, d in points if t >= 0.15 * longest or t == points[-1][0]]
    paper.hold(ax, "y", [0.0, 100 * (BAR - 1), *late])
    paper.hold(ax, "x", [0, longest])
    ax.axhline(0.0, color=paper.BLACK, lw=1.1)
    ax.axhline(100 * (BAR - 1), color="#444444", linestyle=paper.BAR_DASH, lw=0.9)
    for row in chosen[chosen["run"].isin(gaps)].itertuples():
        x, y = zip(*gaps[row.run], strict=True)
        look = styles[row.configuration]
        ax.plot(x, y, color=look.colour, ls=look.dash)
        _mark_end(ax, row.status, x[-1], y[-1], look)
    ax.set_ylabel("Dev perplexity against\nthe baseline (%)")
    paper.title(ax, "same seed, equal tokens; dashed: 5 % lower")
    return True


# --- Pareto fronts ------------------------------------------------------------------------------

_COSTS = (
    ("flops_per_token", "Training FLOPs per token (M)", 1e-6),
    ("latency_ms_p50_l128", "Median latency, batch 1, L = 128 (ms)", 1.0),
    ("latency_ms_p50_l512", "Median latency, batch 1, L = 512 (ms)", 1.0),
    ("peak_memory_mib", "Peak memory (MiB)", 1.0),
)


def pareto_figure(runs: pd.DataFrame, styles: Styles, output: Path) -> bool:
    """Bits per byte against FLOPs, latency and memory: a mean over seeds for each configuration.
    False where no finished run has both.

    Latency as ratios that one process measured in turns; where there are none, a point a seed and
    no front, and none at all where the runs' devices differ. Only runs of one corpus, phase,
    budget and batch are comparable: the largest such group is drawn, full runs before ranking runs.
    """
    finished = runs[(runs["status"] == "finished") & runs["same_as"].isna()]
    group = at_own_rates(_largest_comparable(finished))
    if group.empty:
        return False
    column = column_of("bits_per_byte", group)
    group = group.dropna(subset=[column])
    reference, one_device = side_by_side(group), group["device_name"].nunique() <= 1
    panels = []
    for key, label, scale in _COSTS:
        shown = group
        if key.startswith("latency") and reference is not None:
            length = key.rpartition("_l")[2]
            key, label = f"latency_ratio_l{length}", f"Latency over {reference}'s, L = {length}"
            shown = group.assign(**{key: group[key].where(group["latency_ratio_to"] == reference)})
            measured = shown.dropna(subset=[key])["configuration"]
            shown = shown[shown["configuration"].isin(measured)]
        elif key.startswith("latency") and not one_device:
            continue
        if shown[key].notna().any():
            panels.append((key, label, scale, shown))
    if not panels:
        return False
    with paper.style():
        figure, axes = paper.grid(len(panels))
        drawn = pd.concat([shown for *_, shown in panels])["configuration"]
        handles = paper.named(drawn, styles, group["baseline_configuration"])
        for ax, (key, label, scale, shown) in zip(axes, panels, strict=True):
            if key.startswith("latency_ms"):
                _draw_seeds(ax, shown, key, column, scale, styles)
                label += "\neach seed, measured alone: no front"
            else:
                handles += _draw_front(ax, shown, key, column, scale, styles)
            ax.set_xlabel(label)
            ax.set_ylabel(paper.words(column))
        first = group.iloc[0]
        note = f"{len(group)} of {len(finished)} finished runs: "
        note += "ranking" if first["phase"] == "rank" else "full"
        note += f", {tokens_text(first['budget'])} tokens"
        if not one_device and reference is None and group["latency_ms_p50_l128"].notna().any():
            note += "; no latency, for their devices differ"
        paper.finish(figure, handles, f"{paper.words(column)} against cost", group, styles, note)
        paper.save(figure, output)
    return True


def _largest_comparable(runs: pd.DataFrame) -> pd.DataFrame:
    keys = ["phase", "budget", "corpus", "batch_size"]
    groups = [group for _, group in runs.groupby(keys, dropna=False)]
    full = [g for g in groups if g["phase"].iloc[0] == "full" and g["experiment"].nunique() > 1]
    return max(full or groups, key=len, default=runs)


def side_by_side(group: pd.DataFrame) -> str | None:
    """The run beside which most configurations were measured, two at least; None: no ratios."""
    counts = group.groupby("latency_ratio_to")["configuration"].nunique()
    return str(counts.idxmax()) if counts.max() > 1 else None


def _draw_seeds(
    ax: Axes, group: pd.DataFrame, key: str, column: str, scale: float, styles: Styles
) -> None:
    """A point a run: how far the seeds of one configuration lie apart is there to be seen."""
    measured = group.dropna(subset=[key])
    paper.hold(ax, "x", measured[key] * scale)
    paper.hold(ax, "y", measured[column])
    for row in measured.to_dict("records"):
        look = styles[row["configuration"]]
        ax.plot([row[key] * scale], [row[column]], look.marker, color=look.colour, mfc="none")


def _draw_front(
    ax: Axes, group: pd.DataFrame, key: str, column: str, scale: float, styles: Styles
) -> list[Any]:
    means = group.groupby("configuration")[[key, column]].mean().dropna()
    points = [(name, x * scale, y) for name, x, y in means.itertuples()]
    base = group[group["configuration"] == group["baseline_configuration"]]
    bar = bar_of(base, column) if base["configuration"].nunique() == 1 else None
    paper.hold(ax, "x", [x for _, x, _ in points])
    paper.hold(ax, "y", [*(y for *_, y in points), *([] if bar is None else [bar])])
    front = [p for p in points if not any(_beats(q, p) for q in points)]
    for point in points:
        name, x, y = point
        face = styles[name].colour if point in front else "none"
        ax.plot([x], [y], styles[name].marker, color=styles[name].colour, mfc=face, zorder=4)
    handles: list[Any] = []
    if len(front) > 1:
        edge = sorted((x, y) for _, x, y in front)
        ax.plot(*zip(*edge, strict=True), color="#999999", drawstyle="steps-post", zorder=2)
        handles.append(paper.line("Pareto front", color="#999999"))
    if len(front) < len(points):
        handles.append(paper.point("hollow: another mean is lower in both", "o", mfc="none"))
    if bar is not None:
        kwargs: dict[str, Any] = {"color": "#009E73", "alpha": 0.13}
        ends = [ax.get_xlim()[0], base[key].mean() * scale]
        ax.fill_between(ends, ax.get_ylim()[0], bar, lw=0, zorder=0, **kwargs)
        handles.append(Patch(label="5 % lower PPL at no more cost", **kwargs))
    return handles


def _beats(a: tuple[str, float, float], b: tuple[str, float, float]) -> bool:
    return a[1] <= b[1] and a[2] <= b[2] and a[1:] != b[1:]


# --- ranking runs against full runs -------------------------------------------------------------


def rank_agreement_figure(runs: pd.DataFrame, styles: Styles, output: Path) -> bool:
    """Dev perplexity after the ranking and the full budget; False if no configuration has both.

    Means are over equal seeds of both budgets; Spearman's correlation stands in each panel's title.
    """
    done = runs[(runs["status"] == "finished") & runs["dev_perplexity"].notna()]
    panels = []
    for sweep, sweep_runs in done.groupby("sweep"):
        short, full = (
            {name: dict(zip(group["seed"], group["dev_perplexity"], strict=True))
             for name, group in sweep_runs[sweep_runs["phase"] == phase].groupby("experiment")}
            for phase in ("rank", "full")
        )  # fmt: skip
        try:
            agreement = rank_agreement(short, full)
        except ValueError:
            continue
        if agreement.n >= 2:
            panels.append((str(sweep), sweep_runs, agreement))
    if not panels:
        return False
    with paper.style():
        figure, axes = paper.grid(len(panels))
        handles: list[Any] = []
        for ax, (sweep, sweep_runs, agreement) in zip(axes, panels, strict=True):
            configuration_of = dict(
                zip(sweep_runs["experiment"], sweep_runs["configuration"], strict=True)
            )
            names = [configuration_of[name] for name in agreement.names]
            paper.hold(ax, "x", agreement.short)
            paper.hold(ax, "y", agreement.full)
            for name, x, y in zip(names, agreement.short, agreement.full, strict=True):
                ax.plot([x], [y], styles[name].marker, color=styles[name].colour)
            handles += paper.named(names, styles, sweep_runs["baseline_configuration"])
            title = f"{Path(sweep).stem}: {agreement.n} configurations"
            title += "" if agreement.spearman is None else f", Spearman {agreement.spearman:+.2f}"
            title += f"\n{agreement.left_out} runs without a partner" if agreement.left_out else ""
            paper.title(ax, title)
            ax.set_xlabel("Dev perplexity, ranking budget")
            ax.set_ylabel("Dev perplexity, full budget")
        drawn = pd.concat([sweep_runs for _, sweep_runs, _ in panels])
        paper.finish(figure, handles, "Do short rankings foretell full ones?", drawn, styles)
        paper.save(figure, output)
    return True
