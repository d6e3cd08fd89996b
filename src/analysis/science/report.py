"""What a study's runs say: share curves, best rates, surface, kill replay.

    python -m src.analysis.science.report --log_dir logs --output results/science
    python -m src.analysis.science.report --csv results_summary.csv --output results/science

Reads finished runs, from their directories or from the table of scripts/aggregate_results.py, and
writes <output>/science.json, which scripts/plot_science.py draws. Only runs of one corpus,
tokenizer, head, budget, batch and phase stand beside each other; docs/SCIENCE.md explains it all.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from src.analysis import repeats, run_table
from src.analysis.blocks import each_once, own_rates, shared_rate
from src.analysis.kill_replay import kill_grid
from src.analysis.run_csv import read_csv, table
from src.analysis.run_joins import each_once as without_copies
from src.analysis.science import fits, surface
from src.spec import config
from src.spec.command_line import OK, Parser, refuse
from src.spec.metric_keys import EMBEDDING_RATIO, GLU_EXPANSION, KEYS, TOTAL_PARAMS
from src.storage.files import read_json

SCHEMA = 2
SHARED = [
    "corpus", "tokenizer_sha256", "tie_embeddings", TOTAL_PARAMS.asked, "tokens", "batch_size",
    "seq_len", "phase",
]  # fmt: skip
# The kill rule's window is a fifth of a ranking budget (1M of 5M tokens, PRD section 4).
WINDOW = 0.2
GRACES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
MARGINS = (0.25, 0.5, 1.0, 2.0, 4.0)
DEPTH_ARMS = ("share", "share^2", "ln L")
USUAL_ATTENTION = 0.15  # |attention width / d_model - 1| where depth took the slack
AXES = {"share": (EMBEDDING_RATIO.built, 0.03), "glu": (GLU_EXPANSION.built, 0.3)}
"""What a sweep varies: the column, and by how much at least."""


def main(argv: Sequence[str] | None = None) -> int:
    """Analyse the runs that were named; returns the exit code."""
    asked = _arguments(argv)
    try:
        predictions = (read_json(asked.predictions) if asked.predictions else None) or {}
        content = analyse(read_runs(asked.csv, asked.log_dir), predictions)
        asked.output.mkdir(parents=True, exist_ok=True)
        target = asked.output / "science.json"
        target.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except (ValueError, OSError) as error:
        return refuse(error)
    print(summary(content))
    return OK


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m src.analysis.science.report", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--log_dir", nargs="+", type=Path, default=[], help="run directories")
    parser.add_argument("--csv", nargs="+", type=Path, default=[], help="tables of runs")
    parser.add_argument("--predictions", type=Path, help="results/predictions.json, say")
    parser.add_argument("--output", type=Path, required=True, help="the folder for science.json")
    asked = parser.parse_args(argv)
    if not asked.log_dir and not asked.csv:
        parser.error("name run directories with --log_dir, or tables with --csv")
    return asked


def read_runs(tables: Sequence[Path], log_dirs: Sequence[Path]) -> pd.DataFrame:
    """Finished runs of the tables and below the directories, each once, in the order found: those
    of a sweep whose perplexity was measured, which a tuned run's was not.

    Raises ValueError where nothing was found, OSError for what cannot be read.
    """
    for directory in log_dirs:
        if not directory.is_dir():
            raise ValueError(f"{directory}: found no such directory, expected run directories")
    rows = [row for path in tables for row in read_csv(path)]
    rows += run_table.read_rows(*log_dirs) if log_dirs else []
    runs = table(without_copies(row for row in rows if row.get("status") == "finished"))
    runs = runs[runs["phase"].isin(config.PHASES) & runs["dev_bits_per_byte"].notna()]
    if runs.empty:
        raise ValueError(
            f"{', '.join(map(str, [*tables, *log_dirs]))}: found no finished run, expected the "
            "table of scripts/aggregate_results.py or directories with metrics.json"
        )
    return runs


# --- the analysis -------------------------------------------------------------------------------


def analyse(runs: pd.DataFrame, predictions: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that `runs` allow, as plain JSON-ready values."""
    studies = [study for _, study in runs.groupby(SHARED, dropna=False, sort=False)]
    arms = [each_once(arm) for study in studies for _, arm in study.groupby("sweep", sort=False)]
    return {
        "schema": SCHEMA,
        "runs": len(runs),
        "predictions_dated": predictions.get("date"),
        "arms": [found for arm in arms for found in _arm(arm, predictions)],
        "learning_rates": [_learning_rates(arm) for arm in arms if _many_rates(arm)],
        "surfaces": [found for study in studies for found in _surfaces(study)],
        "kill_replay": [found for arm in arms if (found := _kill_replay(arm))],
    }


def _plain(runs: pd.DataFrame, key: str) -> Any:
    """The first run's value as JSON has it."""
    value = runs[key].iloc[0]
    if pd.isna(value):
        return None
    return int(value) if key in KEYS and KEYS[key].kind == "integer" else value


def _facts(runs: pd.DataFrame) -> dict[str, Any]:
    return {key: _plain(runs, key) for key in ("sweep", *SHARED, "vocab_size", "device_name")}


def _split(runs: pd.DataFrame) -> str:
    """Ranking runs never touch the test set; full runs are judged on it where all have it."""
    full = (runs["phase"] == "full").all() and runs["test_bits_per_byte"].notna().all()
    return "test" if full else "dev"


def _ln_bpb(runs: pd.DataFrame, split: str) -> pd.Series:
    return np.log(runs[f"{split}_bits_per_byte"])


def _many_rates(runs: pd.DataFrame) -> bool:
    """Whether some model was trained at several learning rates."""
    alike = runs.groupby(["model_digest", "embedding_lr_ratio"], dropna=False)
    return bool((alike["learning_rate"].nunique() > 1).any())


def _or_why(fit: Callable[[], Any]) -> dict[str, Any]:
    """A fit as plain values, or why there is none."""
    try:
        return dataclasses.asdict(fit())
    except ValueError as error:
        return {"unavailable": str(error)}


# --- arms: a curve over share or expansion ------------------------------------------------------


def _arm(runs: pd.DataFrame, predictions: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The sweep's curve; with several rates, one at each configuration's own and one at the best
    shared rate."""
    if not _many_rates(runs):
        return [_curve_of(runs, "one rate", predictions)]
    own, shared = own_rates(runs), shared_rate(runs)
    best = runs[runs["learning_rate"] == runs["configuration"].map(own)]
    if set(own.values()) == {shared}:
        return [_curve_of(best, f"own best and shared rate {shared:g}", predictions)]
    found = [_curve_of(best, "own best rate", predictions)]
    if shared is not None:
        at = runs[runs["learning_rate"] == shared]
        found.append(_curve_of(at, f"shared rate {shared:g}", predictions))
    return found


def _curve_of(runs: pd.DataFrame, rate: str, predictions: Mapping[str, Any]) -> dict[str, Any]:
    split = _split(runs)
    axis = next((a for a, (key, least) in AXES.items() if np.ptp(runs[key]) > least), None)
    y = _ln_bpb(runs, split)
    baseline = runs["baseline_configuration"].iloc[0]
    if baseline not in set(runs["configuration"]):
        baseline = runs["configuration"].iloc[0]
    reference = float(runs.loc[runs["configuration"] == baseline, f"{split}_loss"].mean())
    curves = {}
    if axis is not None:
        x = runs[AXES[axis][0]]
        for name, log in ((axis, False), (f"ln {axis}", True)):
            curves[name] = _or_why(
                functools.partial(fits.quadratic, x, y, log=log, blocks=_blocks(runs))
            )
    by_name = y.groupby(runs["experiment"]).agg(list).to_dict()
    noise = repeats.pooled_noise(by_name)
    return {
        **_facts(runs),
        "rate": rate,
        "split": split,
        "axis": axis,
        "baseline": baseline,
        "reference_loss": reference,  # the baseline's, nats a token
        "cells": [
            _cell(cell, split, reference, baseline)
            for _, cell in runs.groupby("experiment", sort=False)
        ],
        "curves": curves,
        "seed_noise": None if noise is None else dataclasses.asdict(noise),
        "prediction": _prediction(runs, predictions),
    }


def _blocks(runs: pd.DataFrame) -> list[int] | None:
    """Seeds, where every configuration has the same several: a data order moves all runs alike."""
    seeds = set(runs.groupby("experiment")["seed"].agg(lambda s: tuple(sorted(s))))
    same = len(seeds) == 1 and len(next(iter(seeds))) > 1
    return runs["seed"].astype(int).tolist() if same else None


def _cell(runs: pd.DataFrame, split: str, reference: float, baseline: str) -> dict[str, Any]:
    label = runs["configuration"].iloc[0]
    shape = ("n_layers", "d_model", "embedding_dim", "learning_rate", "attention_width_ratio")
    return {
        "experiment": runs["experiment"].iloc[0],
        "label": label,
        "baseline": label == baseline,
        **{key: _plain(runs, key) for key in shape},
        "share": runs[EMBEDDING_RATIO.built].iloc[0],
        "glu": runs[GLU_EXPANSION.built].iloc[0],
        "seeds": runs["seed"].astype(int).tolist(),
        "ln_bpb": _ln_bpb(runs, split).tolist(),
        "ln_ppl_ratio": (runs[f"{split}_loss"] - reference).tolist(),
    }


def _prediction(runs: pd.DataFrame, predictions: Mapping[str, Any]) -> dict[str, Any] | None:
    """The dated prediction of this sweep's configurations; None where there is none."""
    sweep = predictions.get("sweeps", {}).get(runs["sweep"].iloc[0])
    if sweep is None:
        return None
    return {
        "date": predictions.get("date"),
        "sources": predictions.get("sources"),
        **{key: value for key, value in sweep.items() if key != "cells"},
        "cells": {
            name: sweep["cells"][name]["tao_ln_ppl_ratio"]
            for name in runs["configuration"].unique()
            if name in sweep["cells"]
        },
    }


# --- learning rates -----------------------------------------------------------------------------


def _learning_rates(runs: pd.DataFrame) -> dict[str, Any]:
    """ln dev BPB by configuration and rate: a rate is chosen on dev, and judged on test."""
    tried = {
        name: _ln_bpb(mine, "dev").groupby(mine["learning_rate"]).agg(list).to_dict()
        for name, mine in runs.groupby("configuration", sort=False)
    }
    shares = runs.groupby("configuration")[EMBEDDING_RATIO.built].first()
    return {
        **_facts(runs),
        "split": "dev",
        "shared_rate": shared_rate(runs),
        "cells": {
            name: {
                "share": shares[name],
                "tried": [[rate, losses] for rate, losses in sorted(tried[name].items())],
                **dataclasses.asdict(fit),
            }
            for name, fit in fits.best_rates(tried).items()
        },
    }


# --- the surface --------------------------------------------------------------------------------


def _surfaces(runs: pd.DataFrame) -> list[dict[str, Any]]:
    """All terms over every run of the study, and share against depth where depth is the slack."""
    rate = runs["learning_rate"].mode().iloc[0]
    at = runs[runs["learning_rate"] == rate]
    width = at["attention_width_ratio"].fillna(1.0)
    alike = at[(width - 1).abs() <= USUAL_ATTENTION]
    usual = alike[GLU_EXPANSION.asked].mode()
    depth = alike[alike[GLU_EXPANSION.asked] == usual.iloc[0]] if len(usual) else alike
    found = []
    for name, terms, used in (
        ("all configurations", surface.TERMS, at),
        ("configurations whose slack is depth, one expansion", DEPTH_ARMS, depth),
    ):
        used = used.drop_duplicates(["model_digest", "seed"])  # each run once
        if used["sweep"].nunique() < 2:
            continue  # one sweep alone moves one thing
        split = _split(used)
        columns = (EMBEDDING_RATIO.built, GLU_EXPANSION.built, "n_layers")
        numbers = [*(used[key] for key in columns), _ln_bpb(used, split)]
        found.append(
            {
                **_facts(used),
                "sweep": sorted(used["sweep"].unique()),
                "cells": name,
                "terms": list(terms),
                "learning_rate": rate,
                "split": split,
                "runs": len(used),
                **_or_why(functools.partial(surface.response_surface, *numbers, terms=terms)),
            }
        )
    return found


# --- the kill rule, replayed --------------------------------------------------------------------


def _kill_replay(runs: pd.DataFrame) -> dict[str, Any] | None:
    """Grace times margin over complete curves; None without a baseline's curve and another's, and
    for lists of rates, which no rule kills."""
    if _many_rates(runs):
        return None
    studies = []
    for _, seed in runs.dropna(subset=["path"]).groupby("seed"):
        curves = {
            name: [point for point in run_table.read_curve(Path(path)) if point[0] > 0]
            for name, path in zip(seed["experiment"], seed["path"], strict=True)
        }
        base = seed.loc[seed["baseline"], "experiment"]
        ends = {curve[-1][0] for curve in curves.values() if curve}
        if len(base) != 1 or len(ends) != 1 or not curves[base.iloc[0]]:
            continue
        others = {n: c for n, c in curves.items() if c and n != base.iloc[0]}
        if others:
            studies.append((curves[base.iloc[0]], others))
    if not studies:
        return None
    return {
        **_facts(runs),
        "window_fraction": WINDOW,
        "seeds": len(studies),
        "grid": kill_grid(studies, GRACES, MARGINS, WINDOW),
    }


# --- for people ---------------------------------------------------------------------------------


def summary(content: Mapping[str, Any]) -> str:
    """One line a finding."""
    lines = [f"{content['runs']} finished runs"]
    for arm in content["arms"]:
        where = f"{arm['sweep']}, {arm['phase']}, {arm['tokens']:,} tokens, {arm['rate']}"
        lines += [f"{where}: {scale}: {_said(fit)}" for scale, fit in arm["curves"].items()]
    for arm in content["learning_rates"]:
        lines += [f"{arm['sweep']}: {n}: {c['statement']}" for n, c in arm["cells"].items()]
    for one in content["surfaces"]:
        lines.append(f"surface, {one['cells']}: {_said(one)}")
        if best := one.get("best_share"):
            ends = f"{best['low']:.1%} to {best['high']:.1%}"
            lines.append(f"  best share, all else equal: {best['value']:.1%} ({ends})")
        lines += [f"  {warning}" for warning in one.get("warnings", ())]
    for replay in content["kill_replay"]:
        shipped = next(c for c in replay["grid"] if (c["grace"], c["margin"]) == (0.3, 0.5))
        lines.append(
            f"{replay['sweep']}: kill rule of 0.5 PPL after 30 %: {shipped['kills']} of "
            f"{shipped['runs']} killed, {shipped['false_kills']} of {shipped['innocent']} that end "
            f"no worse, {shipped['saved']:.0%} of tokens saved"
        )
    return "\n".join(lines)


def _said(fit: Mapping[str, Any]) -> str:
    if "unavailable" in fit:
        return f"not fitted: {fit['unavailable']}"
    if "statement" in fit:
        return str(fit["statement"])
    terms = (
        f"{term} {c['value']:+.3f} ({c['low']:+.3f} to {c['high']:+.3f})"
        for term, c in fit["coefficients"].items()
        if term != "mean"
    )
    return f"{fit['points']} runs, {', '.join(terms)}"


if __name__ == "__main__":
    sys.exit(main())
