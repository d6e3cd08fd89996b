"""What a study's runs say: curves over share and GLU expansion, and both with depth at once.

    python -m src.analysis.science.report --log_dir logs --output results/science
    python -m src.analysis.science.report --csv results_summary.csv --output results/science

Reads finished runs, from their directories or from the table of scripts/aggregate_results.py, and
writes <output>/science.json, which scripts/plot_science.py draws. Only runs of one corpus,
tokenizer, head, budget, batch and phase stand beside each other; docs/SCIENCE.md explains it all.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from src.analysis import repeats, run_table
from src.analysis.blocks import at_own_rates, each_once, many_rates, own_rates, shared_rates
from src.analysis.run_csv import read_csv, table
from src.analysis.run_joins import each_once as without_copies
from src.analysis.science import fits, surface
from src.spec import config
from src.spec.command_line import OK, Parser, refuse
from src.spec.metric_keys import EMBEDDING_RATIO, GLU_EXPANSION, KEYS, TOTAL_PARAMS
from src.storage.files import read_json, write_json

SCHEMA = 3
SHARED = [
    "corpus", "tokenizer_sha256", "tie_embeddings", TOTAL_PARAMS.asked, "tokens", "batch_size",
    "seq_len", "phase",
]  # fmt: skip
AXES = {"share": (EMBEDDING_RATIO.built, 0.03), "glu": (GLU_EXPANSION.built, 0.3)}
"""What a sweep varies: the column, and by how much at least."""
DEPTH_TERMS = ("share", "share^2", "ln L")
USUAL_ATTENTION = 0.15  # |attention width / d_model - 1| where depth took the slack


def main(argv: Sequence[str] | None = None) -> int:
    """Analyse the runs that were named; returns the exit code."""
    parser = Parser(
        prog="python -m src.analysis.science.report", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--log_dir", nargs="+", type=Path, default=[], help="run directories")
    parser.add_argument("--csv", nargs="+", type=Path, default=[], help="tables of runs")
    parser.add_argument("--predictions", type=Path, help="results/predictions.json, say")
    parser.add_argument("--output", type=Path, required=True, help="the folder for science.json")
    args = parser.parse_args(argv)
    if not args.log_dir and not args.csv:
        parser.error("name run directories with --log_dir, or tables with --csv")
    try:
        predictions = read_json(args.predictions) if args.predictions else {}
        content = analyse(read_runs(args.csv, args.log_dir), predictions)
        args.output.mkdir(parents=True, exist_ok=True)
        write_json(args.output / "science.json", content)
    except (ValueError, OSError) as error:
        return refuse(error)
    print(summary(content))
    return OK


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
    if len(runs) and runs["dev_loss"].isna().any():
        raise ValueError(
            f"{', '.join(map(str, tables))}: found no losses, which stand in the table of details; "
            "put results_details.csv beside it, as scripts/aggregate_results.py does"
        )
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
    sweeps = [
        each_once(sweep) for study in studies for _, sweep in study.groupby("sweep", sort=False)
    ]
    return {
        "schema": SCHEMA,
        "runs": len(runs),
        "predictions_dated": predictions.get("date"),
        "sweeps": [curve for sweep in sweeps for curve in _sweep_curves(sweep, predictions)],
        "surfaces": [fit for study in studies for fit in _surfaces(study)],
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


def _points(runs: pd.DataFrame, what: str, split: str) -> pd.DataFrame:
    """One row for each value of the column `what`: the means of its seeds; `y`: ln bits a byte."""
    numbers = [EMBEDDING_RATIO.built, GLU_EXPANSION.built, "n_layers"]
    seeds = runs.assign(y=_ln_bpb(runs, split)).groupby(what, sort=False)
    return seeds[[*numbers, "y"]].mean()


# --- sweeps: a curve over share or expansion ------------------------------------------------------


def _sweep_curves(runs: pd.DataFrame, predictions: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The sweep's curve; with several rates, one at each configuration's own and one at the best
    shared rate."""
    if not many_rates(runs):
        return [_curve_of(runs, "one rate", predictions)]
    own, rates = own_rates(runs), shared_rates(runs)
    shared = None if rates.empty else float(rates.idxmin())
    best = at_own_rates(runs)
    if set(own.values()) == {shared}:
        return [_curve_of(best, f"own best and shared rate {shared:g}", predictions)]
    curves = [_curve_of(best, "own best rate", predictions)]
    if shared is not None:
        at_shared = runs[runs["learning_rate"] == shared]
        curves.append(_curve_of(at_shared, f"shared rate {shared:g}", predictions))
    return curves


def _curve_of(runs: pd.DataFrame, rate: str, predictions: Mapping[str, Any]) -> dict[str, Any]:
    split = _split(runs)
    axis = next((a for a, (key, least) in AXES.items() if np.ptp(runs[key]) > least), "")
    points = _points(runs, "experiment", split)
    baseline = runs["baseline_configuration"].iloc[0]
    if baseline not in set(runs["configuration"]):
        baseline = runs["configuration"].iloc[0]
    reference = float(runs.loc[runs["configuration"] == baseline, f"{split}_loss"].mean())
    curves = {}
    for name, log in ((axis, False), (f"ln {axis}", True)) if axis else ():
        try:
            fit = fits.quadratic(points[AXES[axis][0]], points["y"], log=log)
            curves[name] = dataclasses.asdict(fit)
        except ValueError as error:
            curves[name] = {"unavailable": str(error)}
    by_name = _ln_bpb(runs, split).groupby(runs["experiment"]).agg(list).to_dict()
    noise = repeats.pooled_noise(by_name)
    return {
        **_facts(runs),
        "rate": rate,
        "split": split,
        "axis": axis or None,
        "baseline": baseline,
        "reference_loss": reference,  # the baseline's, nats a token
        "configurations": [
            _configuration(one, split, reference, baseline)
            for _, one in runs.groupby("experiment", sort=False)
        ],
        "curves": curves,
        "seed_noise": None if noise is None else dataclasses.asdict(noise),
        "prediction": _prediction(runs, predictions),
    }


def _configuration(
    runs: pd.DataFrame, split: str, reference: float, baseline: str
) -> dict[str, Any]:
    first = runs.iloc[0]
    shape = ("n_layers", "d_model", "embedding_dim", "learning_rate", "attention_width_ratio")
    return {
        "experiment": first["experiment"],
        "label": first["configuration"],
        "baseline": first["configuration"] == baseline,
        **{key: _plain(runs, key) for key in shape},
        "share": first[EMBEDDING_RATIO.built],
        "glu": first[GLU_EXPANSION.built],
        "seeds": runs["seed"].astype(int).tolist(),
        "ln_bpb": _ln_bpb(runs, split).tolist(),
        "ln_ppl_ratio": (runs[f"{split}_loss"] - reference).tolist(),
    }


def _prediction(runs: pd.DataFrame, predictions: Mapping[str, Any]) -> dict[str, Any] | None:
    """The dated prediction of this sweep's configurations; None where there is none."""
    sweep = predictions.get("sweeps", {}).get(runs["sweep"].iloc[0])
    if sweep is None:
        return None
    ratios = {name: one["tao_ln_ppl_ratio"] for name, one in sweep["configurations"].items()}
    names = [name for name in runs["configuration"].unique() if name in ratios]
    about = {key: predictions.get(key) for key in ("date", "sources")}
    return {**about, **sweep, "configurations": {name: ratios[name] for name in names}}


# --- the surface --------------------------------------------------------------------------------


def _surfaces(runs: pd.DataFrame) -> list[dict[str, Any]]:
    """All terms over every run of the study, and share against depth where depth is the slack."""
    rate = runs["learning_rate"].mode().iloc[0]
    at_rate = runs[runs["learning_rate"] == rate]
    width = at_rate["attention_width_ratio"].fillna(1.0)
    alike = at_rate[(width - 1).abs() <= USUAL_ATTENTION]
    usual = alike[GLU_EXPANSION.asked].mode()
    depth = alike[alike[GLU_EXPANSION.asked] == usual.iloc[0]] if len(usual) else alike
    result = []
    for name, terms, used in (
        ("all configurations", surface.TERMS, at_rate),
        ("configurations whose slack is depth, one expansion", DEPTH_TERMS, depth),
    ):
        used = used.drop_duplicates(["model_digest", "seed"])  # each run once
        if used["sweep"].nunique() < 2:
            continue  # one sweep alone moves one thing
        split = _split(used)
        models = _points(used, "model_digest", split)
        share, glu = models[EMBEDDING_RATIO.built], models[GLU_EXPANSION.built]
        try:
            fit = dataclasses.asdict(
                surface.response_surface(share, glu, models["n_layers"], models["y"], terms=terms)
            )
        except ValueError as error:
            fit = {"unavailable": str(error)}
        result.append(
            {
                **_facts(used),
                "sweep": sorted(used["sweep"].unique()),
                "configurations": name,
                "terms": list(terms),
                "learning_rate": rate,
                "split": split,
                "runs": len(used),
                **fit,
            }
        )
    return result


# --- for people ---------------------------------------------------------------------------------


def summary(content: Mapping[str, Any]) -> str:
    """One line a finding."""
    lines = [f"{content['runs']} finished runs"]
    for sweep in content["sweeps"]:
        where = f"{sweep['sweep']}, {sweep['phase']}, {sweep['tokens']:,} tokens, {sweep['rate']}"
        for scale, fit in sweep["curves"].items():
            statement = fit.get("statement") or f"not fitted: {fit['unavailable']}"
            lines.append(f"{where}: {scale}: {statement}")
    for fit in content["surfaces"]:
        terms = [
            f"{term} {c['value']:+.3f} ({c['low']:+.3f} to {c['high']:+.3f})"
            for term, c in fit.get("coefficients", {}).items()
        ]
        statement = fit.get("unavailable") or f"{fit['points']} models, {', '.join(terms[1:])}"
        lines.append(f"surface, {fit['configurations']}: {statement}")
        if best := fit.get("best_share"):
            ends = f"{best['low']:.1%} to {best['high']:.1%}"
            lines.append(f"  best share, all else equal: {best['value']:.1%} ({ends})")
        lines += [f"  {warning}" for warning in fit.get("warnings", ())]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
