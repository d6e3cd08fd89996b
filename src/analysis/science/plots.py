"""Draw the fits of src.analysis.science: arms with predictions, rates, surface, kill replay.

    python scripts/plot_science.py --science results/science/science.json --output results/science

Makes share_arms.png, predictions.png, glu_arms.png, learning_rates.png, surface.png and
kill_replay.png, each only where science.json has something to draw. Exit codes: 0, 78 bad input,
74 could not read or write.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullFormatter

from src.analysis.plots import (
    BASELINE_COLOUR,
    COLOURS,
    MARKERS,
    STYLE,
    grid_of,
    heading,
    hide_unused,
    save,
    stem,
    tokens_text,
)
from src.spec.command_line import BAD_INPUT, IO_FAILED, Parser
from src.spec.metric_keys import TOTAL_PARAMS

Found = Mapping[str, Any]
PREDICTION = "#8B5A2B"
DASH = (0, (5, 3))


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    try:
        found = json.loads(options.science.read_bytes())
        options.output.mkdir(parents=True, exist_ok=True)
        with plt.rc_context(STYLE):
            drawn = [path for figure in FIGURES for path in figure(found, options.output)]
    except OSError as error:
        print(f"plot_science: could not read or write {error}", file=sys.stderr)
        return IO_FAILED
    except (ValueError, KeyError, TypeError) as error:
        print(
            f"plot_science: {options.science}: found {type(error).__name__} ({error}), expected "
            "the science.json of python -m src.analysis.science.report",
            file=sys.stderr,
        )
        return BAD_INPUT
    print("\n".join(map(str, drawn)) or "nothing to draw yet")
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        __doc__.split("\n\n")[0],
        example="python scripts/plot_science.py --science results/science/science.json --output .",
    )
    parser.add_argument(
        "--science", type=Path, required=True, help="what src/analysis/science/report.py wrote"
    )
    parser.add_argument("--output", type=Path, required=True, help="the folder for the figures")
    return parser.parse_args(arguments)


# --- shared pieces ------------------------------------------------------------------------------


def _study(arm: Found) -> tuple[Any, ...]:
    keys = ("corpus", "tokenizer_sha256", TOTAL_PARAMS.asked, "tokens", "batch_size", "phase")
    return tuple(arm[key] for key in keys)


def _studies(arms: Sequence[Found]) -> list[list[Found]]:
    found: dict[tuple[Any, ...], list[Found]] = {}
    for arm in arms:
        found.setdefault(_study(arm), []).append(arm)
    return list(found.values())


def _head(figure: Any, title: str, parts: Sequence[Found], note: str = "") -> None:
    rows = [
        {"corpus": p["corpus"], "device_name": p["device_name"],
         TOTAL_PARAMS.built: p[TOTAL_PARAMS.asked]}
        for p in parts
    ]  # fmt: skip
    budgets = dict.fromkeys(tokens_text(p["tokens"]) for p in parts)
    told = f"{', '.join(budgets)} tokens"
    heading(figure, title, rows, f"{told}; {note}" if note else told)


def _name(arm: Found) -> str:
    rate = "" if arm["rate"] == "one rate" else f", {arm['rate']}"
    return f"{stem(arm['sweep'])}{rate}"


def _percent(ax: Axes, axis: str) -> None:
    getattr(ax, f"{axis}axis").set_major_formatter(
        FuncFormatter(lambda v, _: f"{100 * v:+.3g}" if axis == "y" else f"{100 * v:.3g}")
    )


def _bits(value: float) -> float:
    return math.exp(value)


def _draw_cells(ax: Axes, arm: Found, key: str, colour: str, marker: str) -> None:
    """Seeds as rings, means as filled markers; the baseline's mean is black."""
    for cell in arm["cells"]:
        values = [_bits(v) for v in cell["ln_bpb"]]
        mean = math.exp(sum(cell["ln_bpb"]) / len(values))
        if len(values) > 1:
            ax.plot([cell[key]] * len(values), values, "o", mfc="none", mec=colour, ms=4, mew=0.7)
        face = BASELINE_COLOUR if cell["baseline"] else colour
        ax.plot([cell[key]], [mean], marker, color=face, ms=5.5, zorder=4)


def _draw_fit(ax: Axes, fit: Found, colour: str, convert: Callable[[float], float]) -> None:
    """The fitted curve, its band, and along the bottom the optimum with its interval."""
    if "band" not in fit:
        return
    x, y, low, high = zip(*fit["band"], strict=True)
    ax.plot(x, [convert(v) for v in y], color=colour, lw=1.2, zorder=3)
    if low[0] is not None:
        ax.fill_between(
            x, [convert(v) for v in low], [convert(v) for v in high], color=colour, alpha=0.13, lw=0
        )


def _draw_optimum(ax: Axes, fit: Found, colour: str, place: int) -> None:
    """The optimum and its interval along the bottom; hollow where it is not inside the range."""
    if "optimum" not in fit:
        return
    at = fit["optimum"]
    height = 0.03 + 0.035 * place
    transform = ax.get_xaxis_transform()
    if at["low"] is not None:
        ax.plot([at["low"], at["high"]], [height] * 2, color=colour, lw=2.5, alpha=0.5,
                transform=transform, solid_capstyle="butt")  # fmt: skip
    face = colour if fit["verdict"] == "interior" else "none"
    ax.plot([at["value"]], [height], "v", color=colour, mfc=face, ms=5, transform=transform)


# --- share: arms, fits and depth ----------------------------------------------------------------


def share_arms(found: Found, output: Path) -> list[Path]:
    """Bits per byte against share, all arms of a study together, and each cell's depth below."""
    groups = _studies([a for a in found["arms"] if a["axis"] == "share" and len(a["cells"]) > 2])
    if not groups:
        return []
    figure, axes = plt.subplots(
        2, len(groups), figsize=(0.6 + 4.3 * len(groups), 5.4), squeeze=False, sharex="col",
        height_ratios=(2.4, 1),
    )  # fmt: skip
    for column, arms in enumerate(groups):
        top, bottom = axes[0][column], axes[1][column]
        for place, arm in enumerate(arms):
            colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
            fit = arm["curves"].get("ln share", {})
            _draw_fit(top, fit, colour, _bits)
            _draw_cells(top, arm, "share", colour, marker)
            _draw_optimum(top, fit, colour, place)
            cells = sorted(arm["cells"], key=lambda cell: cell["share"])
            shares = [c["share"] for c in cells]
            depths = [c["n_layers"] for c in cells]
            bottom.plot(shares, depths, marker=marker, color=colour, ms=4, lw=0.8)
        _draw_prediction(top, arms)
        top.legend(handles=_arm_handles(arms), frameon=False, loc="best")
        splits = {arm["split"] for arm in arms}
        top.set_ylabel(f"{'/'.join(sorted(splits)).capitalize()} bits per byte")
        kind = "Ranking runs" if arms[0]["phase"] == "rank" else "Full runs"
        top.set_title(f"{kind}, {tokens_text(arms[0]['tokens'])} tokens, "
                      f"{arms[0][TOTAL_PARAMS.asked] / 1e6:.1f} M", loc="left")  # fmt: skip
        bottom.set_ylabel("Layers")
        bottom.set_xlabel("Embedding share of all parameters (%), realised")
        _percent(bottom, "x")
    _head(figure, "Embedding share, arm by arm", [a for g in groups for a in g],
          "bar: 95 % interval of the optimum")  # fmt: skip
    return [_saved(figure, output / "share_arms.png")]


def _draw_prediction(ax: Axes, arms: Sequence[Found]) -> None:
    """Tao et al.'s ratio through each arm's baseline; the best shares of both laws as lines."""
    for arm in arms:
        told = arm["prediction"]
        if not told:
            continue
        base = next((c for c in arm["cells"] if c["baseline"]), None)
        if base is not None:
            level = sum(base["ln_bpb"]) / len(base["ln_bpb"])
            points = sorted(
                (c["share"], level + math.log1p(told["cells"][c["label"]]
                                                / arm["reference_loss"]))
                for c in arm["cells"] if c["label"] in told["cells"]
            )  # fmt: skip
            ax.plot([x for x, _ in points], [_bits(y) for _, y in points], color=PREDICTION,
                    lw=1.0, ls=DASH, zorder=2)  # fmt: skip
    best = [arm["prediction"] for arm in arms if arm["prediction"]]
    if best:
        for key, style in (("tao_best_share", "--"), ("levine_best_share", ":")):
            ax.axvline(best[0][key], color=PREDICTION, lw=0.9, ls=style, zorder=1)


def _arm_handles(arms: Sequence[Found]) -> list[Line2D]:
    handles = [
        Line2D([], [], color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)], ms=5,
               label=_name(arm))
        for i, arm in enumerate(arms)
    ]  # fmt: skip
    told = next((arm["prediction"] for arm in arms if arm["prediction"]), None)
    if told:
        day = told["date"]
        handles += [
            Line2D([], [], color=PREDICTION, ls=DASH, lw=1, label=f"Tao et al., {day}"),
            Line2D([], [], color=PREDICTION, ls="--", lw=0.9, label="its best share"),
            Line2D([], [], color=PREDICTION, ls=":", lw=0.9, label="Levine et al.'s"),
        ]
    return handles


def predictions(found: Found, output: Path) -> list[Path]:
    """Observed perplexity ratios against Tao et al.'s, both to the arm's baseline."""
    arms = [a for a in found["arms"] if a["prediction"] and len(a["cells"]) > 2]
    if not arms:
        return []
    figure, axes = grid_of(len(arms))
    for ax, arm in zip(axes, arms, strict=False):
        told = arm["prediction"]
        points = [
            (math.expm1(told["cells"][c["label"]]), math.expm1(ratio), c)
            for c in arm["cells"] if c["label"] in told["cells"]
            for ratio in c["ln_ppl_ratio"]
        ]  # fmt: skip
        for x, y, cell in points:
            colour = BASELINE_COLOUR if cell["baseline"] else COLOURS[0]
            ax.plot([x], [y], "o", color=colour, ms=5)
        for cell in (c for c in arm["cells"] if c["label"] in told["cells"]):
            x, y = (
                math.expm1(told["cells"][cell["label"]]),
                math.expm1(sum(cell["ln_ppl_ratio"]) / len(cell["ln_ppl_ratio"])),
            )
            ax.annotate(f"{100 * cell['share']:.0f} %", (x, y), (5, 3), size=6.5,
                        textcoords="offset points")  # fmt: skip
        ends = [min(p[0] for p in points), max(p[0] for p in points)]
        ax.plot(ends, ends, color=PREDICTION, ls=DASH, lw=1)
        slope = told["tao_slope"]
        text = slope.get("unavailable") or (
            f"slope {slope['value']:+.2f} ({slope['low']:+.2f} to {slope['high']:+.2f})"
        )
        kind = "ranking, " if arm["phase"] == "rank" else ""
        ax.set_title(f"{_name(arm)}, {kind}{tokens_text(arm['tokens'])}: {text}", loc="left")
        ax.margins(0.12)
        ax.set_xlabel(f"Predicted PPL against {arm['baseline']} (%), {told['date']}")
        ax.set_ylabel(f"Observed {arm['split']} PPL (%)")
        _percent(ax, "x")
        _percent(ax, "y")
    hide_unused(axes, len(arms))
    _head(figure, "Prediction of Tao et al. and the runs", arms, "dashed: as predicted (slope 1)")
    return [_saved(figure, output / "predictions.png")]


# --- GLU expansion ------------------------------------------------------------------------------


def glu_arms(found: Found, output: Path) -> list[Path]:
    """Bits per byte against GLU expansion; the number beside a cell is its depth."""
    groups = _studies([a for a in found["arms"] if a["axis"] == "glu" and len(a["cells"]) > 2])
    if not groups:
        return []
    figure, axes = grid_of(len(groups))
    for ax, arms in zip(axes, groups, strict=False):
        for place, arm in enumerate(arms):
            colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
            _draw_fit(ax, arm["curves"].get("ln glu", {}), colour, _bits)
            _draw_cells(ax, arm, "glu", colour, marker)
            _draw_optimum(ax, arm["curves"].get("ln glu", {}), colour, place)
            for cell in arm["cells"]:
                at = (cell["glu"], math.exp(sum(cell["ln_bpb"]) / len(cell["ln_bpb"])))
                ax.annotate(str(cell["n_layers"]), at, (4, 4), size=6.5, color=colour,
                            textcoords="offset points")  # fmt: skip
        ax.legend(handles=_arm_handles(arms), frameon=False)
        ax.set_xlabel("GLU expansion d_ff / d_model, realised")
        ax.set_ylabel(f"{arms[0]['split'].capitalize()} bits per byte")
        ax.set_title(f"{tokens_text(arms[0]['tokens'])} tokens, "
                     f"{arms[0][TOTAL_PARAMS.asked] / 1e6:.1f} M", loc="left")  # fmt: skip
    hide_unused(axes, len(groups))
    _head(figure, "GLU expansion against depth or attention", [a for g in groups for a in g],
          "numbers: layers")  # fmt: skip
    return [_saved(figure, output / "glu_arms.png")]


# --- learning rates -----------------------------------------------------------------------------


def learning_rates(found: Found, output: Path) -> list[Path]:
    """Dev bits per byte over learning rates, a curve a cell, each cell's own best rate below."""
    arms = found["learning_rates"]
    if not arms:
        return []
    figure, axes = grid_of(len(arms))
    for ax, arm in zip(axes, arms, strict=False):
        cells = sorted(arm["cells"].items(), key=lambda item: item[1]["share"])
        handles = []
        for place, (name, cell) in enumerate(cells):
            colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
            for rate, losses in cell["tried"]:
                ax.plot([rate] * len(losses), [_bits(v) for v in losses], marker, color=colour,
                        ms=5)  # fmt: skip
            if cell["curve"]:
                _draw_fit(ax, cell["curve"], colour, _bits)
                _draw_optimum(ax, cell["curve"], colour, place)
            label = f"{name}, share {cell['share']:.0%}"
            handles.append(Line2D([], [], color=colour, marker=marker, ms=5, label=label))
        if arm["shared_rate"]:
            ax.axvline(arm["shared_rate"], color=BASELINE_COLOUR, lw=0.9, ls=":")
            handles.append(Line2D([], [], color=BASELINE_COLOUR, ls=":", label="best shared rate"))
        ax.set_xscale("log")
        rates = sorted({rate for cell in arm["cells"].values() for rate, _ in cell["tried"]})
        ax.set_xticks(rates, [f"{rate:g}" for rate in rates])
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set_xlabel("Peak learning rate")
        ax.set_ylabel("Dev bits per byte")
        ax.set_title(stem(arm["sweep"]), loc="left")
        ax.legend(handles=handles, frameon=False)
    hide_unused(axes, len(arms))
    _head(figure, "Learning rate, cell by cell", arms,
          "bar: 95 % interval of the best rate, hollow: not inside")  # fmt: skip
    return [_saved(figure, output / "learning_rates.png")]


# --- the surface --------------------------------------------------------------------------------


def surface(found: Found, output: Path) -> list[Path]:
    """Each term's effect of one standard deviation of its own, with interval and inflation."""
    fitted = [s for s in found["surfaces"] if "coefficients" in s]
    if not fitted:
        return []
    figure, axes = grid_of(len(fitted))
    for ax, one in zip(axes, fitted, strict=False):
        for place, term in enumerate(one["terms"]):
            estimate, effect = one["coefficients"][term], one["standardised"][term]
            spread = effect / estimate["value"] if estimate["value"] else 0.0
            low, high = (end * spread for end in (estimate["low"], estimate["high"]))
            sure = low > 0 or high < 0
            colour = COLOURS[0] if sure else "#888888"
            ax.plot([low, high], [place, place], color=colour, lw=1.6)
            ax.plot([effect], [place], "s", color=colour, mfc=colour if sure else "none", ms=5)
        ax.axvline(0, color=BASELINE_COLOUR, lw=0.9)
        labels = [f"{term} (x{one['inflation'][term]:.1f})" for term in one["terms"]]
        ax.set_yticks(range(len(labels)), labels)
        ax.set_ylim(len(one["terms"]) - 0.5, -0.5)
        ax.set_xlabel("Effect on bits per byte of one sd of the term (%)")
        _percent(ax, "x")
        title = f"{one['cells']}: {one['points']} runs\nfrom "
        title += ", ".join(stem(s) for s in one["sweep"])
        best = one["best_share"]
        if best is not None:
            title += f"\nbest share, all else equal: {best['value']:.1%}"
            if best["low"] is not None:
                title += f" ({best['low']:.1%} to {best['high']:.1%})"
        ax.set_title(title, loc="left")
    hide_unused(axes, len(fitted))
    _head(figure, "Response surface", fitted,
          "95 % t intervals; in brackets: variance inflation by the other terms")  # fmt: skip
    return [_saved(figure, output / "surface.png")]


# --- the kill rule ------------------------------------------------------------------------------


def kill_replay(found: Found, output: Path) -> list[Path]:
    """Tokens saved (shade) and false kills (text) over grace and margin."""
    replays = found["kill_replay"]
    if not replays:
        return []
    figure, axes = grid_of(len(replays))
    for ax, replay in zip(axes, replays, strict=False):
        graces = sorted({cell["grace"] for cell in replay["grid"]})
        margins = sorted({cell["margin"] for cell in replay["grid"]})
        cells = {(cell["grace"], cell["margin"]): cell for cell in replay["grid"]}
        saved = [[cells[g, m]["saved"] for g in graces] for m in margins]
        ax.imshow(saved, cmap="Blues", vmin=0, vmax=1, aspect="auto", origin="lower")
        for row, margin in enumerate(margins):
            for column, grace in enumerate(graces):
                cell = cells[grace, margin]
                dark = cell["saved"] > 0.55
                text = f"{cell['saved']:.0%}"
                if cell["kills"]:
                    text += f"\n{cell['false_kills']}/{cell['innocent']}"
                bad = cell["false_kills"] > 0
                colour = "white" if dark else "#D55E00" if bad else "#222222"
                ax.text(column, row, text, ha="center", va="center", size=6.5, color=colour,
                        weight="bold" if bad else "normal")  # fmt: skip
        ax.set_xticks(range(len(graces)), [f"{grace:.0%}" for grace in graces])
        ax.set_yticks(range(len(margins)), [f"{margin:g}" for margin in margins])
        ax.set_xlabel("Grace, share of the budget")
        ax.set_ylabel("Margin (PPL)")
        ax.grid(False)
        kind = "ranking" if replay["phase"] == "rank" else "full"
        runs = replay["grid"][0]["runs"]
        ax.set_title(f"{stem(replay['sweep'])}, {kind} runs, n = {runs}", loc="left")
    hide_unused(axes, len(replays))
    _head(figure, "Kill rule replayed on complete runs", replays,
          f"window {replays[0]['window_fraction']:.0%} of the budget")  # fmt: skip
    figure.legend(
        handles=[
            Patch(color="#4292C6", label="tokens saved (shade, %)"),
            Line2D([], [], ls="none", label="k/n: false kills among runs that end no worse"),
        ],
        loc="outside lower center", ncol=2, frameon=False,
    )  # fmt: skip
    return [_saved(figure, output / "kill_replay.png")]


def _saved(figure: Any, path: Path) -> Path:
    save(figure, path)
    return path


FIGURES = (share_arms, predictions, glu_arms, learning_rates, surface, kill_replay)
