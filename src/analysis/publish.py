"""Copy what is small of a log directory into a folder that can be committed.

    python scripts/publish_results.py --log_dir logs/miniature --output results/miniature
    python scripts/publish_results.py --log_dir logs/prd logs/rates --output results/study-10m

Writes what scripts/aggregate_results.py writes (CSV, bundle, figures), study.json, the speed
comparisons and phase 0's findings, and for every run metrics.json, curve.csv (all dev rows, at most
200 train rows), environment.json and its per-document losses. No weights, no per-item scores, no
paths of this machine. An --output that holds another study is refused; the same one is brought up
to date. Exit codes as the aggregator's.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from src.analysis import aggregate, bundle
from src.analysis.run_csv import read_csv, write_csv
from src.analysis.run_table import read_object
from src.spec.command_line import Parser, Refusal
from src.storage.files import scratch_directory, write_atomic, write_json
from src.storage.run_dir import read_rows

SUMMARY = "results_summary.csv"
ENDED = ("finished", "killed")  # what a study on another machine can go on from
TRAIN_ROWS = 200
STUDY_FILES = ("study.json", "latency/*.json", "**/sanity.json", "**/learning_rates.*")
RUN_FILES = ("metrics.json", "documents_*.npz")


def main() -> None:
    parser = Parser(
        __doc__.partition("\n")[0],
        example="python scripts/publish_results.py --log_dir logs --output results/study",
    )
    parser.add_argument("--log_dir", type=Path, nargs="+", required=True, help="where the runs are")
    parser.add_argument("--output", type=Path, required=True, help="a folder below results/")
    args = parser.parse_args()
    log_dirs, output = args.log_dir, args.output
    for log_dir in log_dirs:
        if not log_dir.is_dir():
            raise Refusal(f"--log_dir {log_dir}: found no such directory; run a study first")
    if output.exists() and any(output.iterdir()) and not (output / bundle.NAME).is_file():
        raise Refusal(
            f"--output {output}: found a folder without {bundle.NAME}, expected none, an empty one "
            "or an earlier publication of this study; name another"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    with scratch_directory(output.with_name(f".{output.name}.part")) as staging:
        gather(log_dirs, staging)
        if (output / bundle.NAME).is_file():
            _replace(output, staging)
        else:
            staging.rename(output)  # where nothing is, or an empty folder
    print(f"{output}: published")


def _replace(output: Path, staging: Path) -> None:
    """Bring an earlier publication up to date; Refusal where it has runs that are not here."""
    before = {row["run"] for row in read_csv(output / SUMMARY)
              if "path" in row and row["status"] in ENDED}  # fmt: skip
    now = {row["run"] for row in read_csv(staging / SUMMARY)}
    if lost := sorted(before - now):
        raise Refusal(
            f"--output {output}: found {len(lost)} published runs that no log directory has "
            f"({', '.join(lost[:3])}), expected an earlier publication of this study; name another "
            "folder, or put those runs back with the study's own command"
        )
    for figure in output.glob("*.png"):  # one that is no longer drawn contradicts the rest
        figure.unlink()
    shutil.copytree(staging, output, dirs_exist_ok=True)


def gather(log_dirs: Sequence[Path], output: Path) -> None:
    """Make the publication in `output`; leaves by SystemExit where the aggregator refuses."""
    for log_dir in log_dirs:
        folder = output / log_dir.resolve().name if len(log_dirs) > 1 else output
        _copy(log_dir, STUDY_FILES, folder)
    table = output / SUMMARY
    if code := aggregate.main(["--log_dir", *map(str, log_dirs), "--output", str(table)]):
        raise SystemExit(code)
    rows = read_csv(table)
    for row in rows:
        if "path" in row:
            folder = Path("runs", str(row["run"]))
            publish_run(Path(row["path"]), output / folder)
            row["path"] = str(folder)
    write_csv([bundle.portable(row) for row in rows], table)


def _copy(source: Path, patterns: Sequence[str], target: Path) -> None:
    for path in (path for pattern in patterns for path in source.glob(pattern)):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)


def publish_run(run: Path, folder: Path) -> None:
    """The small files of one run directory; of an unfinished one, its curve."""
    folder.mkdir(parents=True, exist_ok=True)
    _copy(run, RUN_FILES, folder)
    if environment := read_object(run / "environment.json"):
        write_json(folder / "environment.json", bundle.portable(environment))
    if (run / "metrics.jsonl").is_file():
        write_atomic(folder / "curve.csv", curve(run / "metrics.jsonl").encode())


def curve(metrics_log: Path) -> str:
    """tokens, train_loss, dev_loss (nats a token) of a run's metrics.jsonl as CSV."""
    rows = pd.DataFrame(read_rows(metrics_log))
    # A tuned run's rows have losses of its answers, which stand in its tuning.json.
    rows = rows.reindex(columns=["kind", "step", "tokens", "train_loss", "dev_loss"])
    train, dev = (
        rows[(rows["kind"] == kind) & rows[f"{kind}_loss"].notna()] for kind in ("train", "dev")
    )
    stride = max(1, -(-len(train) // TRAIN_ROWS))
    kept = train[(train["step"] % stride == 0) | (train.index == train.index.max())]
    points = pd.concat([kept, dev]).groupby("tokens")[["train_loss", "dev_loss"]].last()
    return points.reset_index().to_csv(index=False, lineterminator="\n")
