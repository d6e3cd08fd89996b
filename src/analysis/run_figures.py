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
from src.analysis.blocks import at_own_rates, tokens_text
from src.analysis.rankings import rank_agreement
from src.analysis.sweep_figures import BAR, bar_of, column_of
from src.evaluation.stability import JUMP_NATS
from src.spec.rates import spelled

Curve = Sequence[tuple[int, float]]
Styles = Mapping[str, paper.Look]

# --- learning curves ----------------------------------------------------------------------------


def learning_curves(
    runs: pd.DataFrame, curves: Mapping[str, Curve], styles: Styles, output: Path
) -> bool:
    """Dev perplexity against training tokens, a line of panels for each sweep, phase, vocabulary
    and batch; beside it the difference from the baseline of the same seed. False without a curve.

    curves: by the run's name. A panel never holds two tokenizers: their perplexities would not
    compare.
    """
    known = runs[runs["run"].map(lambda name: bool(curves.get(name))) & runs["experiment"].notna()]
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
            best = set(at_own_rates(group)["run"])
            handles += _draw_curves(left, group, curves, styles, best)
            if not _draw_differences(right, group, curves, styles, best):
                right.remove()
            else:
                right.set_xlabel(left.get_xlabel())
        paper.finish(figure, handles, "Learning curves", known, styles)
        paper.save(figure, output)
    return True


def _unit(group: pd.DataFrame, curves: Mapping[str, Curve]) -> tuple[str, float]:
    longest = max(curves[name][-1][0] for name in group["run"])
    return ("M", 1e6) if longest >= 2e6 else ("k", 1e3)


def _draw_curves(
    ax: Axes, group: pd.DataFrame, curves: Mapping[str, Curve], styles: Styles, best: set[str]
) -> list[Any]:
    """Draw every run; returns the legend entries of what is shown."""
    unit, factor = _unit(group, curves)
    longest = max(curves[name][-1][0] for name in group["run"])
    judged = _ended(group)
    within = []
    for name in judged["run"]:
        early = next(p for t, p in curves[name] if t >= min(0.1 * longest, curves[name][-1][0]))
        within += [early, curves[name][-1][1], min(p for _, p in curves[name])]
    paper.hold(ax, "y", within, log=True)
    paper.hold(ax, "x", [0, longest / factor])
    handles: list[Any] = []
    rates = sorted(group["learning_rate"].dropna().unique())
    many = (group.groupby("configuration")["learning_rate"].nunique() > 1).any()
    if many:
        handles += [paper.line(f"rate {spelled(r)}", ls=paper.DASHES[i % 4])
                    for i, r in enumerate(rates)]  # fmt: skip
        handles.append(paper.line("thick: at its own best rate", lw=1.4))
    for row in group.itertuples():
        look, curve = styles[row.configuration], curves[row.run]
        x, y = [t / factor for t, _ in curve], [p for _, p in curve]
        chosen = row.run in best
        dash = paper.DASHES[rates.index(row.learning_rate) % 4] if many else look.dash
        ax.plot(x, y, color=look.colour, ls=dash, lw=1.1 if chosen else 0.6,
                alpha=1.0 if chosen else 0.6, zorder=3 if chosen else 2)  # fmt: skip
        handles.append(_curve_entry(row, look, "-" if many else look.dash))
        handles += _mark_end(ax, row.status, x[-1], y[-1], look)
        if (tokens := jump_tokens(row._asdict())) is not None:
            ax.plot([tokens / factor], [0.96], "v", color=look.colour, mfc="none", ms=4, zorder=5,
                    transform=ax.get_xaxis_transform())  # fmt: skip
            told = f"train loss jumped by more than {JUMP_NATS:g} nat here"
            handles.append(paper.point(told, "v", mfc="none", ms=4))
    first = group.iloc[0]
    parts = [] if math.isnan(first["vocab_size"]) else [f"V = {first['vocab_size']:,.0f}"]
    if not math.isnan(first["batch_size"]):
        parts.append(f"{first['batch_size']:.0f} sequences a step")
    if not (group["configuration"] == group["baseline_configuration"]).any():
        parts.append("no run of the baseline")
    kind = "Ranking runs" if first["phase"] == "rank" else "Full runs"
    paper.title(ax, f"{kind}\n{Path(str(first['sweep'])).stem}: {', '.join(parts)}")
    ax.set_xlabel(f"Training tokens ({unit})")
    ax.set_ylabel("Dev perplexity per token")
    return handles


def _curve_entry(row: Any, look: paper.Look, dash: Any) -> Any:
    base = row.configuration == row.baseline_configuration
    label = f"{row.configuration} (baseline)" if base else row.configuration
    return paper.line(label, color=look.colour, ls=dash, lw=1.1)


def _ended(group: pd.DataFrame) -> pd.DataFrame:
    """The runs whose ends the panel must show: finished and killed ones, where there are any."""
    found = group[group["status"].isin(["finished", "killed"])]
    return found if len(found) else group


def _mark_end(ax: Axes, status: str, x: float, y: float, look: paper.Look) -> list[Any]:
    """A mark where a run that did not finish ended; an arrow at the frame where that is outside."""
    how: dict[str, Any] = {"color": look.colour, "mfc": "none", "zorder": 5}
    if y > ax.get_ylim()[1]:
        ax.plot([x], [0.96], "^", ms=4, transform=ax.get_xaxis_transform(), **how)
        return [paper.point("ends above the panel", "^", mfc="none", ms=4)]
    if status == "finished":
        return []
    shape, told = ("x", "killed") if status == "killed" else ("o", "not finished")
    ax.plot([x], [y], shape, mew=1.2, **how)
    return [paper.point(told, shape, mfc="none", mew=1.2)]


def _draw_differences(
    ax: Axes, group: pd.DataFrame, curves: Mapping[str, Curve], styles: Styles, best: set[str]
) -> bool:
    """Perplexity over that of the baseline with the same seed, at equal tokens, in per cent; False
    where no run has such a baseline."""
    unit, factor = _unit(group, curves)
    chosen = group[group["run"].isin(best)]
    is_base = chosen["configuration"] == chosen["baseline_configuration"]
    bases = {row.seed: dict(curves[row.run]) for row in chosen[is_base].itertuples()}
    gaps: dict[str, list[tuple[float, float]]] = {}
    for row in chosen[~is_base].itertuples():
        base = bases.get(row.seed, {})
        points = [(t / factor, 100 * (p / base[t] - 1)) for t, p in curves[row.run] if t in base]
        if points:
            gaps[row.run] = points
    if not gaps:
        return False
    longest = max(curves[name][-1][0] for name in group["run"]) / factor
    judged = [gaps[name] for name in _ended(chosen)["run"] if name in gaps] or [*gaps.values()]
    late = [d for points in judged for t, d in points if t >= 0.15 * longest or t == points[-1][0]]
    paper.hold(ax, "y", [0.0, 100 * (BAR - 1), *late])
    paper.hold(ax, "x", [0, longest])
    ax.axhline(0.0, color=paper.BLACK, lw=1.1)
    ax.axhline(100 * (BAR - 1), color="#444444", linestyle=paper.BAR_DASH, lw=0.9)
    for row in chosen.itertuples():
        if row.run in gaps:
            x, y = zip(*gaps[row.run], strict=True)
            look = styles[row.configuration]
            ax.plot(x, y, color=look.colour, ls=look.dash)
            _mark_end(ax, row.status, x[-1], y[-1], look)
    ax.set_ylabel("Dev perplexity against\nthe baseline (%)")
    paper.title(ax, "same seed, equal tokens; dashed: 5 % lower")
    return True


def jump_tokens(row: Mapping[str, Any]) -> float | None:
    """Training tokens at which the training loss jumped in one step, None where it did not."""
    if not row.get("loss_largest_rise_nats", 0.0) > JUMP_NATS:
        return None
    tokens = row["loss_largest_rise_step"] * row["batch_size"] * row["seq_len"]
    return None if math.isnan(tokens) else float(tokens)


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
    finished = runs[runs["status"] == "finished"]
    group = at_own_rates(_largest_comparable(finished))
    if group.empty:
        return False
    column = column_of("bits_per_byte", group)
    group = group.dropna(subset=[column])
    beside = side_by_side(group)
    one_device = group["device_name"].nunique() <= 1
    panels = []
    for key, label, scale in _COSTS:
        shown, length = group, key.rpartition("_l")[2]
        if key.startswith("latency") and beside is not None:
            key, label, scale = (
                f"latency_ratio_l{length}",
                f"Latency over {beside}'s, L = {length}",
                1.0,
            )
            shown = group.assign(**{key: group[key].where(group["latency_ratio_to"] == beside)})
            shown = shown[
                shown["configuration"].isin(shown.loc[shown[key].notna(), "configuration"])
            ]
        elif key.startswith("latency") and not one_device:
            continue
        if shown[key].notna().any():
            panels.append((key, label, scale, shown))
    if not panels:
        return False
    with paper.style():
        figure, axes = paper.grid(len(panels))
        handles = paper.named(
            pd.concat([shown for *_, shown in panels])["configuration"], styles,
            group.loc[group["configuration"] == group["baseline_configuration"], "configuration"],
        )  # fmt: skip
        for ax, (key, label, scale, shown) in zip(axes, panels, strict=True):
            alone = key.startswith("latency_ms")
            handles += (_draw_seeds if alone else _draw_front)(
                ax, shown, key, column, scale, styles
            )
            ax.set_xlabel(label + ("\neach seed, measured alone: no front" if alone else ""))
            ax.set_ylabel(paper.words(column))
        first = group.iloc[0]
        note = f"{len(group)} of {len(finished)} finished runs: "
        note += "ranking" if first["phase"] == "rank" else "full"
        note += f", {tokens_text(first['budget'])} tokens"
        if not one_device and beside is None and group["latency_ms_p50_l128"].notna().any():
            note += "; no latency, for their devices differ"
        paper.finish(figure, handles, f"{paper.words(column)} against cost", group, styles, note)
        paper.save(figure, output)
    return True


def _largest_comparable(runs: pd.DataFrame) -> pd.DataFrame:
    groups = [
        group
        for _, group in runs.groupby(["phase", "budget", "corpus", "batch_size"], dropna=False)
    ]
    full = [g for g in groups if g["phase"].iloc[0] == "full" and g["experiment"].nunique() > 1]
    return max(full or groups, key=len) if groups else runs


def side_by_side(group: pd.DataFrame) -> str | None:
    """The run beside which most configurations were measured, two at least; None: no ratios."""
    counts = group.dropna(subset=["latency_ratio_to"]).groupby("latency_ratio_to")["configuration"]
    found = counts.nunique()
    return str(found.idxmax()) if len(found) and found.max() > 1 else None


def _draw_seeds(
    ax: Axes, group: pd.DataFrame, key: str, column: str, scale: float, styles: Styles
) -> list[Any]:
    """A point a run: how far the seeds of one configuration lie apart is there to be seen."""
    measured = group.dropna(subset=[key])
    paper.hold(ax, "x", measured[key] * scale)
    paper.hold(ax, "y", measured[column])
    for row in measured.to_dict("records"):
        look = styles[row["configuration"]]
        ax.plot([row[key] * scale], [row[column]], look.marker, color=look.colour, mfc="none")
    return []


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
    for name, x, y in points:
        look = styles[name]
        face = look.colour if (name, x, y) in front else "none"
        ax.plot([x], [y], look.marker, color=look.colour, mfc=face, zorder=4)
    handles: list[Any] = []
    if len(front) > 1:
        edge = sorted((x, y) for _, x, y in front)
        ax.plot(*zip(*edge, strict=True), color="#999999", drawstyle="steps-post", zorder=2)
        handles.append(paper.line("Pareto front", color="#999999"))
    if len(front) < len(points):
        handles.append(paper.point("hollow: beaten in both", "o", mfc="none"))
    if bar is not None:
        left, x = ax.get_xlim()[0], base[key].mean() * scale
        ax.fill_between(
            [left, x], ax.get_ylim()[0], bar, color="#009E73", alpha=0.13, lw=0, zorder=0
        )
        handles.append(Patch(color="#009E73", alpha=0.13, label="5 % lower PPL at no more cost"))
    return handles


def _beats(a: tuple[str, float, float], b: tuple[str, float, float]) -> bool:
    return a[1] <= b[1] and a[2] <= b[2] and a[1:] != b[1:]


# --- ranking runs against full runs -------------------------------------------------------------


def rank_agreement_figure(runs: pd.DataFrame, styles: Styles, output: Path) -> bool:
    """Dev perplexity after the ranking and the full budget; False if no configuration has both.

    Means are over equal seeds of both budgets; Spearman's correlation stands in each panel's title.
    """
    done = runs[(runs["status"] == "finished") & runs["dev_perplexity"].notna()]
    found = []
    for sweep, mine in done.groupby("sweep"):
        by_seed = {
            phase: {name: dict(zip(cell["seed"], cell["dev_perplexity"], strict=True))
                    for name, cell in part.groupby("experiment")}
            for phase, part in mine.groupby("phase")
        }  # fmt: skip
        try:
            one = rank_agreement(by_seed.get("rank", {}), by_seed.get("full", {}))
        except ValueError:
            continue
        if one.n >= 2:
            found.append((str(sweep), mine, one))
    if not found:
        return False
    with paper.style():
        figure, axes = paper.grid(len(found))
        handles: list[Any] = []
        for ax, (sweep, mine, one) in zip(axes, found, strict=True):
            names = dict(zip(mine["experiment"], mine["configuration"], strict=True))
            paper.hold(ax, "x", one.short)
            paper.hold(ax, "y", one.full)
            for name, x, y in zip(one.names, one.short, one.full, strict=True):
                look = styles[names[name]]
                ax.plot([x], [y], look.marker, color=look.colour)
            handles += paper.named(
                [names[n] for n in one.names], styles, mine["baseline_configuration"]
            )
            told = f"{Path(sweep).stem}: {one.n} configurations"
            told += "" if one.spearman is None else f", Spearman {one.spearman:+.2f}"
            told += f"\n{len(one.missing)} runs without a partner" if one.missing else ""
            paper.title(ax, told)
            ax.set_xlabel("Dev perplexity, ranking budget")
            ax.set_ylabel("Dev perplexity, full budget")
        drawn = pd.concat([mine for _, mine, _ in found])
        paper.finish(figure, handles, "Do short rankings foretell full ones?", drawn, styles)
        paper.save(figure, output)
    return True
