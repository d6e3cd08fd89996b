"""Draw the fits of src.analysis.science: sweeps, and what was predicted of them.

    python scripts/plot_science.py --science results/science/science.json --output results/science

Makes share_sweeps.png and glu_sweeps.png, each only where science.json has something to draw. Exit
codes: 0, 78 bad input, 74 could not read or write.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from src.analysis import paper
from src.analysis.blocks import kind_text
from src.spec.command_line import Parser, refuse
from src.spec.metric_keys import TOTAL_PARAMS

Content = Mapping[str, Any]
PREDICTION = "#8B5A2B"


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        __doc__.split("\n\n")[0],
        example="python scripts/plot_science.py --science results/science/science.json --output .",
    )
    parser.add_argument(
        "--science", type=Path, required=True, help="what src/analysis/science/report.py wrote"
    )
    parser.add_argument("--output", type=Path, required=True, help="the folder for the figures")
    args = parser.parse_args(argv)
    try:
        content = json.loads(args.science.read_bytes())
        args.output.mkdir(parents=True, exist_ok=True)
        with paper.style():
            drawn = [
                path
                for name, draw in FIGURES.items()
                if draw(content, path := args.output / f"{name}.png")
            ]
    except OSError as error:
        return refuse(error)
    except (ValueError, KeyError, TypeError) as error:
        return refuse(
            ValueError(
                f"{args.science}: found {type(error).__name__} ({error}), expected the "
                "science.json of python -m src.analysis.science.report"
            )
        )
    print("\n".join(map(str, drawn)) or "nothing to draw yet")
    return 0


def _finish(
    figure: Any, handles: Sequence[Any], title: str, parts: Sequence[Content], note: str, path: Path
) -> bool:
    runs = pd.DataFrame(
        [{"corpus": p["corpus"], "device_name": p["device_name"],
          TOTAL_PARAMS.built: p[TOTAL_PARAMS.asked]} for p in parts]
    )  # fmt: skip
    paper.finish(figure, handles, title, runs, {}, note)
    paper.save(figure, path)
    return True


# --- sweeps, fits and depth -----------------------------------------------------------------------


def share_sweeps(content: Content, path: Path) -> bool:
    """Bits per byte against share, all sweeps of a study together, and their depth below."""
    return _sweeps(content, "share", "Embedding share of all parameters", path)


def glu_sweeps(content: Content, path: Path) -> bool:
    """Bits per byte against GLU expansion, and depth below."""
    return _sweeps(content, "glu", "GLU expansion, d_ff / d_model", path)


def _sweeps(content: Content, axis: str, label: str, path: Path) -> bool:
    studies: dict[tuple[Any, ...], list[Content]] = {}
    keys = ("corpus", "tokenizer_sha256", TOTAL_PARAMS.asked, "tokens", "batch_size", "phase")
    for sweep in content["sweeps"]:
        if sweep["axis"] == axis and len(sweep["configurations"]) > 2:
            studies.setdefault(tuple(sweep[key] for key in keys), []).append(sweep)
    if not studies:
        return False
    names = list(dict.fromkeys(_name(sweep) for sweeps in studies.values() for sweep in sweeps))
    looks = {name: paper.look(index) for index, name in enumerate(names)}
    width = paper.COLUMN if len(studies) == 1 else paper.PAGE
    figure, axes = plt.subplots(
        2, len(studies), figsize=(width, 3.3), squeeze=False, height_ratios=(2.2, 1)
    )
    handles: list[Any] = []
    for (top, bottom), sweeps in zip(axes.T, studies.values(), strict=True):
        predicted = [sweep for sweep in sweeps if sweep["prediction"] and axis == "share"]
        configurations = [one for sweep in sweeps for one in sweep["configurations"]]
        paper.hold(bottom, "y", [one["n_layers"] for one in configurations])
        x = [one[axis] for one in configurations]
        if predicted:
            x += [predicted[0]["prediction"][f"{law}_best_share"] for law in ("tao", "levine")]
        for ax in (top, bottom):
            paper.hold(ax, "x", x)
        handles += _draw_sweeps(
            top, axis, sweeps, looks, {id(sweep): _predicted(sweep) for sweep in predicted}
        )
        if predicted:
            handles += _draw_best_shares(top, predicted[0]["prediction"])
        for sweep in sweeps:
            look = looks[_name(sweep)]
            line = sorted((one[axis], one["n_layers"]) for one in sweep["configurations"])
            bottom.plot(*zip(*line, strict=True), color=look.colour, marker=look.marker, lw=0.8)
        top.set_ylabel(f"{sweeps[0]['split'].capitalize()} bits per byte")
        kind = kind_text(sweeps[0]["phase"], sweeps[0]["tokens"])
        size = f"{sweeps[0][TOTAL_PARAMS.asked] / 1e6:.1f} M"
        paper.title(top, f"{kind}, {size}", 92 // max(2, len(studies)))
        bottom.set_ylabel("Layers")
        bottom.set_xlabel(label)
    parts = [sweep for sweeps in studies.values() for sweep in sweeps]
    note = "bar at the bottom: 95 % interval of the optimum, hollow where not inside the range"
    return _finish(figure, handles, f"{label}, sweep by sweep", parts, note, path)


def _name(sweep: Content) -> str:
    rate = "" if sweep["rate"] == "one rate" else f", {sweep['rate']}"
    return f"{Path(sweep['sweep']).stem}{rate}"


def _draw_sweeps(
    ax: Axes,
    axis: str,
    sweeps: Sequence[Content],
    looks: Mapping[str, paper.Look],
    lines: Mapping[int, Sequence[tuple[float, float]]],
) -> list[Any]:
    """Seeds as rings, means as filled markers, the fitted curve with its band and optimum, and
    what Tao et al. predict through each baseline (lines); returns the legend's entries."""
    values = [
        math.exp(v) for sweep in sweeps for one in sweep["configurations"] for v in one["ln_bpb"]
    ]
    values += [y for line in lines.values() for _, y in line]
    values.append(min(values) - 0.06 * len(sweeps) * (max(values) - min(values)))  # for the bars
    paper.hold(ax, "y", values)
    handles: list[Any] = []
    for index, sweep in enumerate(sweeps):
        look, fit = looks[_name(sweep)], sweep["curves"].get(f"ln {axis}", {})
        _draw_fit(ax, fit, look.colour, index)
        for configuration in sweep["configurations"]:
            ln_bpb, x = configuration["ln_bpb"], configuration[axis]
            seeds = np.exp(ln_bpb)
            if len(seeds) > 1:
                ring: dict[str, Any] = {"mfc": "none", "ms": 3.5, "mew": 0.7}
                ax.plot([x] * len(seeds), seeds, "o", color=look.colour, **ring)
                handles.append(paper.point("one seed", "o", **ring))
            face = paper.BLACK if configuration["baseline"] else look.colour
            ax.plot([x], [math.exp(np.mean(ln_bpb))], look.marker, color=face, zorder=4)
        handles.append(paper.line(_name(sweep), color=look.colour, marker=look.marker))
        handles.append(paper.point("black: the baseline", "o", color=paper.BLACK))
        if id(sweep) in lines:
            ax.plot(*zip(*lines[id(sweep)], strict=True), color=PREDICTION, ls=paper.BAR_DASH)
    return handles


def _draw_best_shares(ax: Axes, prediction: Content) -> list[Any]:
    """Where the published laws put the best share; also the entry of the predicted curve."""
    handles = [paper.line(f"Tao et al., {prediction['date']}", color=PREDICTION, ls=paper.BAR_DASH)]
    for law, label, dash in (("tao", "their best share", "--"), ("levine", "Levine et al.'s", ":")):
        kwargs: dict[str, Any] = {"color": PREDICTION, "ls": dash, "lw": 0.9}
        ax.axvline(prediction[f"{law}_best_share"], zorder=1, **kwargs)
        handles.append(paper.line(label, **kwargs))
    return handles


def _predicted(sweep: Content) -> list[tuple[float, float]]:
    """Tao et al.'s bits per byte by share, through the sweep's baseline; in order of share."""
    ratios = sweep["prediction"]["configurations"]
    level = next(np.mean(c["ln_bpb"]) for c in sweep["configurations"] if c["baseline"])
    return sorted(
        (c["share"], math.exp(level + math.log1p(ratios[c["label"]] / sweep["reference_loss"])))
        for c in sweep["configurations"]
        if c["label"] in ratios
    )


def _draw_fit(ax: Axes, fit: Content, colour: str, index: int) -> None:
    """A fitted curve with its band, and along the bottom the optimum with its interval, hollow
    where that is not inside the range."""
    if "band" not in fit:
        return
    x, y, low, high = zip(*fit["band"], strict=True)
    ax.plot(x, np.exp(y), color=colour, lw=1.2, zorder=3)
    if low[0] is not None:
        ax.fill_between(x, np.exp(low), np.exp(high), color=colour, alpha=0.13, lw=0)
    optimum, transform = fit["optimum"], ax.get_xaxis_transform()
    height = 0.04 + 0.04 * index
    if optimum["low"] is not None:
        ax.plot([optimum["low"], optimum["high"]], [height] * 2, color=colour, lw=2.5, alpha=0.5,
                transform=transform, solid_capstyle="butt")  # fmt: skip
    face = colour if fit["verdict"] == "interior" else "none"
    ax.plot([optimum["value"]], [height], "v", color=colour, mfc=face, ms=4, transform=transform)


FIGURES = {draw.__name__: draw for draw in (share_sweeps, glu_sweeps)}
