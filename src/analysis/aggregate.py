"""Gather run directories into one CSV, the figures beside it and the report's tables.

    python scripts/aggregate_results.py --log_dir logs --output results_summary.csv
    python scripts/aggregate_results.py --log_dir logs/prd logs/rates --report REPORT.md
    python scripts/aggregate_results.py --from_csv results_summary.csv --report REPORT.md --check
    python scripts/aggregate_results.py --from_csv results/x/results_summary.csv --figures results/x

A row a run: finished, killed, failed, unfinished, and the experiments of a sweep that were never
begun (missing). Beside the CSV: results_bundle.json (configs, tokenizer hashes, git SHA, seeds,
versions: what it takes to repeat them), ppl_vs_embedding_ratio.png, ppl_vs_glu_expansion.png,
learning_curves.png, pareto.png, rank_agreement.png where configurations have ranking and full runs,
and bits_per_byte_vs_embedding_ratio.png where a sweep compares vocabularies; a figure without a run
to show is not drawn, and that is said. Of several directories, a run's name begins with its own.
--from_csv reads what scripts/publish_results.py wrote. The CSV's columns are listed in
docs/METRICS.md. Exit codes: 0 done, 78 bad input (the CSV is still written when only a figure is
refused).
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from src.analysis import bundle, kill_table, report_tables
from src.analysis.blocks import order_sentences
from src.analysis.run_csv import Row, details_path, read_csv, table, unlisted, write_csv
from src.analysis.run_joins import STATUSES
from src.analysis.run_table import read_curves, read_object, read_rows
from src.spec.command_line import Parser, refuse
from src.storage.files import read_json, write_atomic, write_json

OUTPUT = Path("results_summary.csv")
METRICS = [
    prefix + name
    for name in ("perplexity", "bits_per_byte", "word_perplexity")
    for prefix in ("", "test_", "dev_")
]


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    try:
        return _run(args)
    except (ValueError, OSError) as error:
        return refuse(error)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        __doc__.split("\n\n")[0],
        example="python scripts/aggregate_results.py --log_dir logs --output results_summary.csv",
    )
    parser.add_argument(
        "--log_dir", type=Path, nargs="+", default=[Path("logs")], help="where the runs are"
    )
    parser.add_argument(
        "--output", type=Path, default=OUTPUT,
        help=f"the CSV to write (default: {OUTPUT}); unused with --from_csv",
    )  # fmt: skip
    parser.add_argument(
        "--metric", default="perplexity", choices=METRICS, metavar="METRIC",
        help="what the two sweep figures show: perplexity (default), bits_per_byte or "
        "word_perplexity, on the test set where there is one; test_... or dev_... to insist",
    )  # fmt: skip
    parser.add_argument(
        "--figures", type=Path, help="their folder (default: the CSV's; with --from_csv none)"
    )
    parser.add_argument("--no_figures", action="store_true", help="the CSV and the report only")
    parser.add_argument("--report", type=Path, help="fill the marked tables of this Markdown file")
    parser.add_argument(
        "--study", type=Path, help="default: study.json in LOG_DIR, or beside the CSV"
    )
    parser.add_argument("--from_csv", type=Path, help="read this CSV instead of run directories")
    parser.add_argument(
        "--check", action="store_true", help="change nothing: exit 78 if the report is out of date"
    )
    args = parser.parse_args(argv)
    if args.from_csv is None:
        args.figures = args.figures or args.output.parent
    elif args.report is None and args.figures is None:
        parser.error("--from_csv alone makes nothing: name a report with --report, or a folder "
                     "for the figures with --figures")  # fmt: skip
    if args.check and args.report is None:
        parser.error("--check compares a report with its tables: name it with --report")
    return args


def _run(args: argparse.Namespace) -> int:
    if args.report is not None and not args.report.is_file():
        raise ValueError(f"--report {args.report} is not a file: write the report first.")
    kills = None
    if args.from_csv is None:
        rows = _rows_from_logs(args)
        kills = kill_table.judge_runs(rows)
    else:
        rows = _rows_from_csv(args.from_csv)
        published = read_object(args.from_csv.with_name(bundle.NAME))
        if published is not None:
            kills = kill_table.judge_runs(rows, published.get("runs") or {})
    # The report first, so that a bad marker is refused before anything else.
    filled = None if args.report is None else _filled_report(args, rows, kills)
    status = 0
    if not args.check:
        if args.from_csv is None:
            write_csv(rows, args.output)
            write_json(args.output.with_name(bundle.NAME), bundle.bundle(rows, args.log_dir))
            _summarise(rows, args.output, kills)
        if args.figures is not None and not args.no_figures:
            args.figures.mkdir(parents=True, exist_ok=True)
            status = _draw(rows, args.figures, args.metric)
    if filled is not None:
        if args.report.read_text(encoding="utf-8") != filled:
            if args.check:
                raise ValueError(
                    f"{args.report}: its tables differ from the results; run without --check."
                )
            write_atomic(args.report, filled.encode())
        print(f"{args.report}: tables are up to date")
    return status


def _rows_from_logs(args: argparse.Namespace) -> list[Row]:
    for log_dir in args.log_dir:
        if not log_dir.is_dir():
            raise ValueError(
                f"--log_dir {log_dir} is not a directory: run an experiment first, such as "
                f"python run_experiment.py --config configs/embed_ratio.yaml --exp all."
            )
    if args.output.suffix != ".csv":
        raise ValueError(f"--output is {str(args.output)!r}; expected a file ending in .csv.")
    rows = read_rows(*args.log_dir)
    if not rows:
        raise ValueError(
            f"--log_dir {', '.join(map(str, args.log_dir))} holds no run directory (one with "
            "config.yaml, metrics.jsonl or metrics.json): run an experiment first."
        )
    return rows


def _rows_from_csv(path: Path) -> list[Row]:
    if not path.is_file():
        raise ValueError(f"--from_csv {path} is not a file.")
    rows = read_csv(path)
    if not rows or not all("run" in row and "status" in row for row in rows):
        raise ValueError(f"--from_csv {path} has no rows with a run and a status in it.")
    return rows


def _summarise(
    rows: Sequence[Row], output: Path, kills: Sequence[kill_table.JudgedRun] | None
) -> None:
    counts = Counter(str(row["status"]) for row in rows)
    by_status = ", ".join(f"{counts[status]} {status}" for status in STATUSES if counts[status])
    print(f"{output}, {details_path(output).name}: {len(rows)} rows ({by_status})")
    for row in rows:
        if row["status"] != "finished":
            print(f"  {row['status']}: {row['run']}: {row.get('reason', '')}")
    if extra := unlisted(rows):
        print(f"  columns that src/spec/metric_keys.py does not list: {', '.join(extra)}")
    runs = table(rows)
    for sentence in (*order_sentences(runs), *report_tables.processors_differ(runs)):
        print(f"  {sentence}")
    for sentence in (kill_table.summary(kills), *kill_table.differences(kills)) if kills else ():
        print(f"  kill rule: {sentence}")


def _draw(rows: Sequence[Row], folder: Path, metric: str) -> int:
    """Draw every figure; what cannot be drawn is said, and an older figure of it removed, since it
    would contradict the CSV. Returns the exit code."""
    # Here, because matplotlib takes a second that a refusal should not cost.
    from src.analysis import paper, run_figures, sweep_figures

    runs = table(rows)
    curves, styles = read_curves(rows), paper.looks(runs)
    vocabularies = runs["sweep"].isin(sweep_figures.varies_vocabulary(runs))

    def draw_sweep(axis: sweep_figures.Axis, path: Path) -> bool:
        chosen = sweep_figures.runs_of_axis(runs, axis)
        single = chosen[~vocabularies.reindex(chosen.index)]
        if metric.endswith("perplexity") and len(single):
            chosen = single  # the others are in the figure of bits per byte
        return sweep_figures.sweep_figure(chosen, axis, metric, styles, path)

    def draw_vocabularies(path: Path) -> bool:
        chosen = runs[vocabularies & runs["status"].isin(["finished", "killed"])]
        share = sweep_figures.SHARE
        return sweep_figures.sweep_figure(chosen, share, "bits_per_byte", styles, path)

    status = 0
    for name, draw in {
        "ppl_vs_embedding_ratio.png": lambda path: draw_sweep(sweep_figures.SHARE, path),
        "ppl_vs_glu_expansion.png": lambda path: draw_sweep(sweep_figures.GLU, path),
        "bits_per_byte_vs_embedding_ratio.png": draw_vocabularies,
        "learning_curves.png": lambda path: run_figures.learning_curves(runs, curves, styles, path),
        "pareto.png": lambda path: run_figures.pareto_figure(runs, styles, path),
        "rank_agreement.png": lambda path: run_figures.rank_agreement_figure(runs, styles, path),
    }.items():
        try:
            drawn = draw(folder / name)
        except sweep_figures.MixedTokenizers as error:
            drawn, status = False, refuse(ValueError(f"{name}: {error}"))
        if not drawn:
            (folder / name).unlink(missing_ok=True)
        print(folder / name if drawn else f"{name}: not drawn, for no run has what it shows")
    return status


def _filled_report(
    args: argparse.Namespace, rows: Sequence[Row], kills: Sequence[kill_table.JudgedRun] | None
) -> str:
    """The report with its tables, made from the runs and the study."""
    folder = args.log_dir[0] if args.from_csv is None else args.from_csv.parent
    study_file = args.study or folder / "study.json"
    study = read_json(study_file) if args.study is not None or study_file.is_file() else None
    text = args.report.read_text(encoding="utf-8")
    judged = study is not None and study.get("winner") is not None
    if judged and not any(f"<!-- table:{name} -->" in text for name in ("winner", "decisions")):
        raise ValueError(
            f"{args.report}: the study judged finalists, so both readings of the winner's rule "
            "belong in its report: put <!-- table:winner --><!-- /table:winner --> (or decisions) "
            "into it."
        )
    try:
        return report_tables.fill(text, report_tables.tables(rows, study, kills))
    except ValueError as error:
        raise ValueError(f"{args.report}: {error}") from error
