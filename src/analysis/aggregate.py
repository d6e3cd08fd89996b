"""Gather run directories into one CSV, the figures beside it and the report's tables.

    python scripts/aggregate_results.py --log_dir logs --output results_summary.csv
    python scripts/aggregate_results.py --log_dir logs --report REPORT.md
    python scripts/aggregate_results.py --from_csv results_summary.csv --report REPORT.md --check

A row a run: finished, killed, failed, unfinished, and the experiments of a sweep that were never
begun (missing). Beside the CSV: results_bundle.json (configs, tokenizer hashes, git SHA, seeds,
versions: what it takes to repeat them), ppl_vs_embedding_ratio.png, ppl_vs_glu_expansion.png,
learning_curves.png, pareto.png, rank_agreement.png where cells have ranking and full runs, and
bits_per_byte_vs_embedding_ratio.png where a sweep compares vocabularies. The CSV's columns are
listed in docs/METRICS.md.
Exit codes: 0 done, 78 bad input (the CSV is still written when only a figure is refused).
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from src.analysis import bundle, decision_tables, kill_table
from src.analysis.report_tables import fill, tables
from src.analysis.run_csv import Row, details_path, read_csv, unlisted, write_csv
from src.analysis.run_joins import STATUSES
from src.analysis.run_table import read_curve, read_rows
from src.spec.command_line import Parser, refuse
from src.storage.files import read_json, write_atomic, write_json

OUTPUT = Path("results_summary.csv")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    try:
        return _run(options)
    except (ValueError, OSError) as error:
        return refuse(error)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        __doc__.split("\n\n")[0],
        example="python scripts/aggregate_results.py --log_dir logs --output results_summary.csv",
    )
    parser.add_argument("--log_dir", type=Path, default=Path("logs"), help="where the runs are")
    parser.add_argument(
        "--output", type=Path, help=f"the CSV to write (default: {OUTPUT}); unused with --from_csv"
    )
    parser.add_argument(
        "--metric",
        default="perplexity",
        help="what the two sweep figures show: perplexity (default), bits_per_byte or "
        "word_perplexity, on the test set where there is one; test_... or dev_... to insist",
    )
    parser.add_argument("--no_figures", action="store_true", help="the CSV and the report only")
    parser.add_argument("--report", type=Path, help="fill the marked tables of this Markdown file")
    parser.add_argument("--study", type=Path, help="default: LOG_DIR/study.json")
    parser.add_argument(
        "--predictions", type=Path, help="results/predictions.json, for the table predictions"
    )
    parser.add_argument("--from_csv", type=Path, help="read this CSV instead of run directories")
    parser.add_argument(
        "--check", action="store_true", help="change nothing: exit 78 if the report is out of date"
    )
    options = parser.parse_args(arguments)
    if options.from_csv is not None and options.report is None:
        parser.error(
            "--from_csv alone makes nothing, since figures and the CSV come from run directories: "
            "name the report to fill with --report"
        )
    options.output = options.output or OUTPUT
    return options


def _run(options: argparse.Namespace) -> int:
    if options.check and options.report is None:
        raise ValueError("--check compares a report with its tables: name it with --report.")
    metrics = _metric_names()
    if options.metric not in metrics:
        raise ValueError(
            f"--metric is {options.metric!r}; expected one of {', '.join(sorted(metrics))}."
        )
    if options.report is not None and not options.report.is_file():
        raise ValueError(f"--report {options.report} is not a file: write the report first.")
    rows = _rows_from_csv(options.from_csv) if options.from_csv else _rows_from_logs(options)
    source = kill_table.publication(options.from_csv) if options.from_csv else kill_table.logs
    kills = None if source is None else kill_table.judged(rows, source)
    filled = None
    if options.report is not None:  # first, so that a bad marker is refused before anything else
        study = _read_study(options.study or options.log_dir / "study.json", options.study)
        made = tables(rows, study, kills)
        if study is not None:
            made["winner"] = decision_tables.winner_table(study)
        if options.predictions is not None:
            on_record = read_json(options.predictions)
            made["predictions"] = decision_tables.predictions_table(rows, on_record)
        filled = _filled(options.report, made, study)
    status = 0
    if options.from_csv is None and not options.check:
        write_csv(rows, options.output)
        write_json(options.output.with_name(bundle.NAME), bundle.bundle(rows, options.log_dir))
        _summarise(rows, options.output)
        for sentence in (
            (kill_table.summary(kills), *kill_table.differences(kills)) if kills else ()
        ):
            print(f"  kill rule: {sentence}")
        if not options.no_figures:
            status = _draw(rows, options.output.parent, options.metric)
    if filled is not None:
        status = _report(options.report, filled, options.check) or status
    return status


def _rows_from_logs(options: argparse.Namespace) -> list[Row]:
    if not options.log_dir.is_dir():
        raise ValueError(
            f"--log_dir {options.log_dir} is not a directory: run an experiment first, such as "
            f"python run_experiment.py --config configs/embed_ratio.yaml --exp all."
        )
    if options.output.suffix != ".csv":
        raise ValueError(f"--output is {str(options.output)!r}; expected a file ending in .csv.")
    rows = read_rows(options.log_dir)
    if not rows:
        raise ValueError(
            f"--log_dir {options.log_dir} holds no run directory (one with config.yaml, "
            f"metrics.jsonl or metrics.json): run an experiment first."
        )
    return rows


def _rows_from_csv(path: Path) -> list[Row]:
    if not path.is_file():
        raise ValueError(f"--from_csv {path} is not a file.")
    rows = read_csv(path)
    if not rows or not all("run" in row and "status" in row for row in rows):
        raise ValueError(f"--from_csv {path} has no rows with a run and a status in it.")
    return rows


def _metric_names() -> set[str]:
    names = ("perplexity", "bits_per_byte", "word_perplexity")
    return {prefix + name for prefix in ("", "test_", "dev_") for name in names}


def _summarise(rows: Sequence[Row], output: Path) -> None:
    counts = Counter(str(row["status"]) for row in rows)
    told = ", ".join(f"{counts[status]} {status}" for status in STATUSES if counts[status])
    print(f"{output}, {details_path(output).name}: {len(rows)} rows ({told})")
    for row in rows:
        if row["status"] != "finished":
            print(f"  {row['status']}: {row['run']}: {row.get('reason', '')}")
    if extra := unlisted(rows):
        print(f"  columns that src/spec/metric_keys.py does not list: {', '.join(extra)}")


def _draw(rows: Sequence[Row], folder: Path, metric: str) -> int:
    """Draw every figure; a refused one is told and drawn not at all. Returns the exit code."""
    from src.analysis import (
        plots,  # here, because matplotlib takes a second that a refusal should not cost
        run_plots,
    )

    status = 0
    vocabularies = plots.varies_vocabulary(rows)
    for axis, name in (
        (plots.SHARE, "ppl_vs_embedding_ratio.png"),
        (plots.GLU, "ppl_vs_glu_expansion.png"),
    ):
        chosen = plots.rows_of_axis(rows, axis)
        single = [row for row in chosen if str(row.get("sweep") or "") not in vocabularies]
        if single and len(single) < len(chosen) and metric.endswith("perplexity"):
            chosen = single  # the others are in the bits-per-byte figure below
        try:
            plots.sweep_figure(chosen, axis, metric, folder / name)
            print(f"{folder / name}")
        except plots.MixedTokenizers as error:
            (folder / name).unlink(missing_ok=True)  # an older figure would contradict the CSV
            status = refuse(ValueError(f"{name}: {error}"))
    if vocabularies:
        name = "bits_per_byte_vs_embedding_ratio.png"
        chosen = [row for row in rows if str(row.get("sweep") or "") in vocabularies]
        done = [row for row in chosen if row["status"] in ("finished", "killed")]
        plots.sweep_figure(done, plots.SHARE, "bits_per_byte", folder / name)
        print(f"{folder / name}")
    curves = {str(row["path"]): read_curve(Path(row["path"])) for row in rows if "path" in row}
    run_plots.learning_curves(rows, curves, folder / "learning_curves.png")
    run_plots.pareto_figure(rows, folder / "pareto.png")
    print(f"{folder / 'learning_curves.png'}\n{folder / 'pareto.png'}")
    if run_plots.rank_agreement_figure(rows, folder / "rank_agreement.png"):
        print(f"{folder / 'rank_agreement.png'}")
    return status


def _read_study(path: Path, asked: Path | None) -> dict[str, Any] | None:
    if asked is None and not path.is_file():
        return None
    return read_json(path)


def _filled(path: Path, made: Mapping[str, str], study: Mapping[str, Any] | None) -> str:
    text = path.read_text(encoding="utf-8")
    judged = study is not None and study.get("winner") is not None
    if judged and not any(f"<!-- table:{name} -->" in text for name in ("winner", "decisions")):
        raise ValueError(
            f"{path}: the study judged finalists, so both readings of the winner's rule belong in "
            "its report: put <!-- table:winner --><!-- /table:winner --> (or decisions) into it."
        )
    try:
        return fill(text, made)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _report(path: Path, filled: str, check_only: bool) -> int:
    if path.read_text(encoding="utf-8") != filled:
        if check_only:
            raise ValueError(f"{path}: its tables differ from the results; run without --check.")
        write_atomic(path, filled.encode())
    print(f"{path}: tables are up to date")
    return 0
