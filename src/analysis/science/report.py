"""What a study's runs say: share curves, best rates, surface, rank agreement, kill replay.

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
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from src.analysis import rankings, repeats, run_table
from src.analysis.run_csv import Row, number, read_csv
from src.analysis.run_joins import each_once
from src.analysis.science import fits
from src.spec import config
from src.spec.command_line import OK, Parser, refuse
from src.spec.config import KillRule
from src.spec.metric_keys import EMBEDDING_RATIO, GLU_EXPANSION, TOTAL_PARAMS
from src.storage.files import read_json

SCHEMA = 1
SHARED = (
    "corpus", "tokenizer_sha256", "tie_embeddings", TOTAL_PARAMS.asked, "tokens", "batch_size",
    "seq_len", "phase",
)  # fmt: skip
RATE_SUFFIX = re.compile(r"-lr[0-9.]+e-?[0-9]+$")  # as src/spec/rates.py spells it
# The kill rule's window is a fifth of a ranking budget (1M of 5M tokens, PRD section 4).
WINDOW = 0.2
GRACES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
MARGINS = (0.25, 0.5, 1.0, 2.0, 4.0)
DEPTH_ARMS = ("share", "share^2", "ln L")
USUAL_ATTENTION = 0.15  # |attention width / d_model - 1| where depth took the slack


def main(argv: Sequence[str] | None = None) -> int:
    """Analyse the runs that were named; returns the exit code."""
    asked = _arguments(argv)
    try:
        predictions = read_json(asked.predictions) if asked.predictions else {}
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


# --- reading ------------------------------------------------------------------------------------


def read_runs(tables: Sequence[Path], log_dirs: Sequence[Path]) -> list[Row]:
    """Finished runs of the tables and below the directories, each once, in the order found.

    Raises ValueError where nothing was found, OSError for what cannot be read.
    """
    found = [*(r for t in tables for r in read_csv(t)), *(r for d in log_dirs for r in _below(d))]
    rows = each_once(row for row in found if _says_enough(row))
    if not rows:
        raise ValueError(
            f"{', '.join(map(str, [*tables, *log_dirs]))}: found no finished run, expected the "
            "table of scripts/aggregate_results.py or directories with metrics.json"
        )
    return rows


def _below(directory: Path) -> list[Row]:
    if not directory.is_dir():
        raise ValueError(f"{directory}: found no such directory, expected run directories")
    return run_table.read_rows(directory)


def _says_enough(row: Row) -> bool:
    """Whether it is a finished run of a sweep whose perplexity was measured: a tuned run's was not,
    nor a run's that scored tasks alone."""
    return (
        row.get("status") == "finished"
        and row.get("phase") in config.PHASES
        and number(row, "dev_bits_per_byte") is not None
    )


def read_curve(row: Row) -> list[tuple[int, float]]:
    """(tokens, dev perplexity) of a run's checks; empty where its directory is not here."""
    curve = run_table.read_curve(Path(str(row["path"]))) if row.get("path") else []
    return [(tokens, perplexity) for tokens, perplexity in curve if tokens > 0]


# --- the analysis -------------------------------------------------------------------------------


def analyse(rows: Sequence[Row], predictions: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that `rows` allow, as plain JSON-ready values."""
    studies = _groups(rows, SHARED)
    arms = [_once(arm) for study in studies for arm in _groups(study, ("sweep",))]
    return {
        "schema": SCHEMA,
        "runs": len(rows),
        "predictions_dated": predictions.get("date"),
        "arms": [found for arm in arms for found in _arm(arm, predictions)],
        "learning_rates": [found for arm in arms if (found := _learning_rates(arm))],
        "surfaces": [found for study in studies for found in _surfaces(study)],
        "rank_agreement": _rank_agreement(rows),
        "kill_replay": [found for arm in arms if (found := _kill_replay(arm))],
    }


def _groups(rows: Sequence[Row], keys: Sequence[str]) -> list[list[Row]]:
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    return list(found.values())


def _split(rows: Sequence[Row]) -> str:
    """Ranking runs never touch the test set; full runs are judged on it where all have it."""
    full = rows[0].get("phase") == "full"
    return "test" if full and all(row.get("test_bits_per_byte") for row in rows) else "dev"


def _ln_bpb(row: Row, split: str) -> float:
    return math.log(row[f"{split}_bits_per_byte"])


def _label(row: Row) -> str:
    """The experiment without the rate that a list of rates put behind it."""
    return RATE_SUFFIX.sub("", str(row["experiment"]))


def _facts(rows: Sequence[Row]) -> dict[str, Any]:
    keys = ("sweep", *SHARED, "vocab_size", "device_name")
    return {key: rows[0].get(key) for key in keys}


def _many_rates(rows: Sequence[Row]) -> bool:
    """Whether some model was trained at several learning rates."""
    return any(len({row.get("learning_rate") for row in cell}) > 1 for cell in _cells(rows))


def _once(rows: Sequence[Row]) -> list[Row]:
    """`emb35` and the run of a list of rates that is the same, `emb35-lr4e-3`, count once."""
    cells = _groups(rows, ("model_digest", "embedding_lr_ratio", "learning_rate", "seed"))
    kept = [next((r for r in cell if _label(r) != r["experiment"]), cell[0]) for cell in cells]
    listed = {id(row) for row in kept}
    plain = len({_label(row) for row in rows}) == len({row["experiment"] for row in rows})
    return list(rows) if plain else [row for row in rows if id(row) in listed]


def _cells(rows: Sequence[Row]) -> list[list[Row]]:
    return _groups(rows, ("model_digest", "embedding_lr_ratio"))


def _rates(rows: Sequence[Row]) -> dict[str, dict[float, list[float]]]:
    """ln dev BPB by cell and rate: a rate is chosen on dev, and judged on test."""
    found: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        cell = found.setdefault(_label(row), {})
        cell.setdefault(float(row["learning_rate"]), []).append(_ln_bpb(row, "dev"))
    return found


# --- arms: a curve over share or expansion ------------------------------------------------------


def _arm(rows: Sequence[Row], predictions: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The arm's curve; with several rates a cell, one at the shared rate and one at each own."""
    if not _many_rates(rows):
        return [_curve_of(rows, "one rate", predictions)]
    cells = _rates(rows)
    shared = fits.shared_rate(cells)
    own = {name: fit.lowest_rate for name, fit in fits.best_rates(cells).items()}
    best = [r for r in rows if r["learning_rate"] == own[_label(r)]]
    if set(own.values()) == {shared}:
        return [_curve_of(best, f"own best and shared rate {shared:g}", predictions)]
    found = [_curve_of(best, "own best rate", predictions)]
    if shared is not None:
        at = [r for r in rows if r["learning_rate"] == shared]
        found.append(_curve_of(at, f"shared rate {shared:g}", predictions))
    return found


def _curve_of(rows: Sequence[Row], rate: str, predictions: Mapping[str, Any]) -> dict[str, Any]:
    split, axis = _split(rows), _axis(rows)
    y = [_ln_bpb(row, split) for row in rows]
    baseline = RATE_SUFFIX.sub("", str(rows[0].get("baseline_name")))
    if baseline not in {_label(row) for row in rows}:
        baseline = _label(rows[0])
    base = [row for row in rows if _label(row) == baseline]
    reference = sum(r[f"{split}_loss"] for r in base) / len(base)
    curves: dict[str, Any] = {}
    if axis is not None:
        x = [row[_COLUMNS[axis]] for row in rows]
        for name, log in ((axis, False), (f"ln {axis}", True)):
            curves[name] = _or_why(
                functools.partial(fits.quadratic, x, y, log=log, blocks=_blocks(rows))
            )
    noise = repeats.pooled_noise(_by_cell(rows, y))
    return {
        **_facts(rows),
        "rate": rate,
        "split": split,
        "axis": axis,
        "baseline": baseline,
        "reference_loss": reference,  # the baseline's, nats a token
        "cells": [
            _cell(cell, split, reference, baseline) for cell in _groups(rows, ("experiment",))
        ],
        "curves": curves,
        "seed_noise": None if noise is None else dataclasses.asdict(noise),
        "prediction": _prediction(rows, split, predictions),
    }


_COLUMNS = {"share": EMBEDDING_RATIO.built, "glu": GLU_EXPANSION.built}


def _axis(rows: Sequence[Row]) -> str | None:
    """What the arm varies: the share (by more than 3 points), else the expansion, else nothing."""
    for name, least in (("share", 0.03), ("glu", 0.3)):
        values = [row[_COLUMNS[name]] for row in rows]
        if max(values) - min(values) > least:
            return name
    return None


def _blocks(rows: Sequence[Row]) -> list[int] | None:
    """Seeds, where every cell has the same several: a data order moves all its runs alike."""
    seeds = {tuple(sorted(r["seed"] for r in cell)) for cell in _groups(rows, ("experiment",))}
    same = len(seeds) == 1 and len(next(iter(seeds))) > 1
    return [int(row["seed"]) for row in rows] if same else None


def _by_cell(rows: Sequence[Row], values: Sequence[float]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for row, value in zip(rows, values, strict=True):
        found.setdefault(str(row["experiment"]), []).append(value)
    return found


def _cell(rows: Sequence[Row], split: str, reference: float, baseline: str) -> dict[str, Any]:
    first = rows[0]
    return {
        "experiment": str(first["experiment"]),
        "label": _label(first),
        "baseline": _label(first) == baseline,
        **{k: first.get(k) for k in ("n_layers", "d_model", "embedding_dim", "learning_rate")},
        "share": first[EMBEDDING_RATIO.built],
        "glu": first[GLU_EXPANSION.built],
        "attention_width_ratio": first.get("attention_width_ratio"),
        "seeds": [row["seed"] for row in rows],
        "ln_bpb": [_ln_bpb(row, split) for row in rows],
        "ln_ppl_ratio": [row[f"{split}_loss"] - reference for row in rows],
    }


def _prediction(
    rows: Sequence[Row], split: str, predictions: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The dated prediction of this arm beside what was found; None where there is none."""
    sweep = predictions.get("sweeps", {}).get(rows[0].get("sweep"))
    if sweep is None:
        return None
    known = [row for row in rows if _label(row) in sweep["cells"]]
    expected = [sweep["cells"][_label(row)]["tao_ln_ppl_ratio"] for row in known]
    observed = [row[f"{split}_loss"] for row in known]
    return {
        "date": predictions.get("date"),
        "sources": predictions.get("sources"),
        **{key: value for key, value in sweep.items() if key != "cells"},
        "cells": {_label(row): value for row, value in zip(known, expected, strict=True)},
        "tao_slope": _or_why(lambda: fits.calibration(expected, observed)),
    }


def _or_why(fit: Callable[[], Any]) -> dict[str, Any]:
    """A fit as plain values, or why there is none."""
    try:
        return dataclasses.asdict(fit())
    except ValueError as error:
        return {"unavailable": str(error)}


# --- learning rates -----------------------------------------------------------------------------


def _learning_rates(rows: Sequence[Row]) -> dict[str, Any] | None:
    if not _many_rates(rows):
        return None
    cells = _rates(rows)
    return {
        **_facts(rows),
        "split": "dev",
        "shared_rate": fits.shared_rate(cells),
        "cells": {
            name: {
                "share": next(r[EMBEDDING_RATIO.built] for r in rows if _label(r) == name),
                "tried": [[rate, losses] for rate, losses in sorted(cells[name].items())],
                **dataclasses.asdict(fit),
            }
            for name, fit in fits.best_rates(cells).items()
        },
    }


# --- the surface --------------------------------------------------------------------------------


def _surfaces(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """All terms over every cell of the study, and share against depth where depth is the slack."""
    rate = Counter(row.get("learning_rate") for row in rows).most_common(1)[0][0]
    at = [row for row in rows if row.get("learning_rate") == rate]
    alike = [r for r in at if abs(r.get("attention_width_ratio", 1.0) - 1) <= USUAL_ATTENTION]
    common = Counter(row.get(GLU_EXPANSION.asked) for row in alike).most_common(1)
    depth = [row for row in alike if row.get(GLU_EXPANSION.asked) == common[0][0]]
    found = []
    for name, terms, used in (
        ("all cells", fits.TERMS, at),
        ("cells whose slack is depth, one expansion", DEPTH_ARMS, depth),
    ):
        used = [cell[0] for cell in _groups(used, ("model_digest", "seed"))]  # each run once
        if len({row.get("sweep") for row in used}) < 2:
            continue  # one sweep alone moves one thing
        found.append(_surface(name, terms, used, rate))
    return found


def _surface(name: str, terms: Sequence[str], rows: Sequence[Row], rate: Any) -> dict[str, Any]:
    split = _split(rows)
    return {
        **_facts(rows),
        "sweep": sorted({str(row.get("sweep")) for row in rows}),
        "cells": name,
        "terms": list(terms),
        "learning_rate": rate,
        "split": split,
        "runs": len(rows),
        **_or_why(
            lambda: fits.response_surface(
                [r[EMBEDDING_RATIO.built] for r in rows],
                [r[GLU_EXPANSION.built] for r in rows],
                [r["n_layers"] for r in rows],
                [_ln_bpb(r, split) for r in rows],
                terms=terms,
            )
        ),
    }


# --- short against long -------------------------------------------------------------------------


def _rank_agreement(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Each shorter budget of a sweep against its longest, by mean dev loss over equal seeds."""
    found = []
    alike = ("sweep", "corpus", "tokenizer_sha256", TOTAL_PARAMS.asked)
    for sweep in _groups(rows, alike):
        budgets = sorted(_groups(sweep, ("tokens", "phase")), key=lambda runs: runs[0]["tokens"])
        for short in budgets[:-1]:
            a, b = (_by_seed(runs) for runs in (short, budgets[-1]))
            both = [name for name in a if set(a[name]) & set(b.get(name, ()))]
            if short[0]["tokens"] == budgets[-1][0]["tokens"] or len(both) < 2:
                continue
            budget = {
                **_facts(short),
                "short_tokens": short[0]["tokens"],
                "full_tokens": budgets[-1][0]["tokens"],
            }
            agreement = _or_why(functools.partial(rankings.rank_agreement, a, b))
            if "unavailable" not in agreement:
                agreement["n"] = len(agreement["names"])
                short_means, full_means = agreement.pop("short"), agreement.pop("full")
                agreement["cells"] = {
                    name: means
                    for name, *means in zip(
                        agreement["names"], short_means, full_means, strict=True
                    )
                }
            found.append({**budget, **agreement})
    return found


def _by_seed(rows: Sequence[Row]) -> dict[str, dict[int, float]]:
    """Dev loss by experiment and seed."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        found.setdefault(str(row["experiment"]), {})[int(row["seed"])] = float(row["dev_loss"])
    return found


# --- the kill rule, replayed --------------------------------------------------------------------


def _kill_replay(rows: Sequence[Row]) -> dict[str, Any] | None:
    """Grace times margin over complete curves; None without a baseline's curve and another's, and
    for lists of rates, which no rule kills."""
    if _many_rates(rows):
        return None
    studies = []
    for seed in _groups(rows, ("seed",)):
        curves = {str(row["experiment"]): read_curve(row) for row in seed}
        base = [str(row["experiment"]) for row in seed if row.get("baseline")]
        ends = {curve[-1][0] for curve in curves.values() if curve}
        if len(base) != 1 or len(ends) != 1 or not curves[base[0]]:
            continue
        others = {n: c for n, c in curves.items() if c and n != base[0]}
        if others:
            studies.append((curves[base[0]], others))
    if not studies:
        return None
    tokens = studies[0][0][-1][0]

    def rule(grace: float, margin: float) -> KillRule:
        return KillRule(
            margin_ppl=margin,
            window_tokens=int(WINDOW * tokens),
            grace_tokens=int(grace * tokens),
        )

    grid = fits.kill_grid(studies, rule, GRACES, MARGINS)
    return {
        **_facts(rows),
        "window_fraction": WINDOW,
        "seeds": len(studies),
        "grid": [dataclasses.asdict(cell) for cell in grid],
    }


# --- for people ---------------------------------------------------------------------------------


def summary(content: Mapping[str, Any]) -> str:
    """One line a finding."""
    lines = [f"{content['runs']} finished runs"]
    for arm in content["arms"]:
        where = f"{arm['sweep']}, {arm['phase']}, {arm['tokens']:,} tokens, {arm['rate']}"
        for scale, fit in arm["curves"].items():
            lines.append(f"{where}: {scale}: {_said(fit)}")
        told = (arm["prediction"] or {}).get("tao_slope", {})
        if "value" in told:
            ends = f" ({told['low']:+.2f} to {told['high']:+.2f})"
            lines.append(f"{where}: slope on Tao et al.'s prediction {told['value']:+.2f}{ends}")
    for arm in content["learning_rates"]:
        lines += [f"{arm['sweep']}: {n}: {c['statement']}" for n, c in arm["cells"].items()]
    for surface in content["surfaces"]:
        lines.append(f"surface, {surface['cells']}: {_said(surface)}")
        best = surface.get("best_share")
        if best:
            ends = f"{best['low']:.1%} to {best['high']:.1%}"
            lines.append(f"  best share, all else equal: {best['value']:.1%} ({ends})")
        lines += [f"  {warning}" for warning in surface.get("warnings", ())]
    for found in content["rank_agreement"]:
        where = (
            f"{found['sweep']}: {found['short_tokens']:,} against {found['full_tokens']:,} tokens"
        )
        if "unavailable" in found:
            lines.append(f"{where}: not ranked: {found['unavailable']}")
            continue
        rho = "unknown" if found["spearman"] is None else f"{found['spearman']:+.2f}"
        lines.append(
            f"{where}: rank correlation {rho} over {found['n']} cells of "
            f"{len(found['seeds'])} seeds, top-1 regret {found['top1_regret']:.4f} nats"
        )
        lines += [f"  left out: {what}" for what in found["missing"]]
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
