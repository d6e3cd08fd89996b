"""Copy what is small of a log directory into a folder that can be committed.

    python scripts/publish_results.py --log_dir logs/miniature --output results/miniature

Writes what scripts/aggregate_results.py writes (CSV, bundle, figures), study.json, the speed
comparisons and phase 0's findings, and for every run metrics.json, curve.csv (all dev rows, at most
200 train rows) and its per-document losses. No weights, no per-item scores, no paths of this
machine. An --output that holds another study is refused; the same one is brought up to date.
Exit codes as the aggregator's.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

from src.analysis import aggregate as aggregate_results
from src.analysis.bundle import portable
from src.analysis.run_csv import read_csv, write_csv
from src.spec.command_line import Parser, Refusal
from src.storage.files import workshop, write_atomic

TRAIN_ROWS = 200
MARK = "results_bundle.json"
WHOLE = ("study.json", "latency/*.json", "*/sanity.json", "*/learning_rates.*")
OF_A_RUN = ("metrics.json", "documents_*.npz")


def main() -> None:
    parser = Parser(
        __doc__.partition("\n")[0],
        example="python scripts/publish_results.py --log_dir logs --output results/study",
    )
    parser.add_argument("--log_dir", type=Path, required=True, help="where the runs are")
    parser.add_argument("--output", type=Path, required=True, help="a folder below results/")
    arguments = parser.parse_args()
    log_dir, output = arguments.log_dir, arguments.output
    if not log_dir.is_dir():
        raise Refusal(f"--log_dir {log_dir}: found no such directory; run a study first")
    if output.exists() and any(output.iterdir()) and not (output / MARK).is_file():
        raise Refusal(
            f"--output {output}: found a folder without {MARK}, expected none, an empty one or an "
            "earlier publication of this study; name another"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    with workshop(output.with_name(f".{output.name}.part")) as made:  # all of it, or nothing
        gather(log_dir, made)
        if (output / MARK).is_file():
            shutil.copytree(made, output, dirs_exist_ok=True)
        else:
            made.rename(output)  # where nothing is, or an empty folder
    print(f"{output}: published")


def gather(log_dir: Path, output: Path) -> None:
    """Make the publication in `output`; leaves by SystemExit where the aggregator refuses."""
    for pattern in WHOLE:
        for path in sorted(log_dir.glob(pattern)):
            place = output / path.relative_to(log_dir)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
    table = output / "results_summary.csv"
    if code := aggregate_results.main(["--log_dir", str(log_dir), "--output", str(table)]):
        raise SystemExit(code)
    rows = read_csv(table)
    for row in rows:
        if "path" in row:
            place = Path("runs", str(row["run"]))
            publish_run(Path(row["path"]), output / place)
            row["path"] = str(place)
    write_csv([portable(row) for row in rows], table)


def publish_run(run: Path, place: Path) -> None:
    """The small files of one run directory; of an unfinished one, its curve."""
    place.mkdir(parents=True, exist_ok=True)
    for pattern in OF_A_RUN:
        for path in sorted(run.glob(pattern)):
            shutil.copyfile(path, place / path.name)
    if (run / "metrics.jsonl").is_file():
        write_atomic(place / "curve.csv", curve(run / "metrics.jsonl").encode())


def curve(record: Path) -> str:
    """tokens, train_loss, dev_loss (nats a token) of a run's record as CSV."""
    rows: list[dict[str, Any]] = []
    for line in record.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break  # cut in the middle of its last line: the run is still going
    # A tuned run's rows have losses of its answers, which stand in its tuning.json.
    rows = [row for row in rows if {"tokens", "step", f"{row.get('kind')}_loss"} <= set(row)]
    train = [row for row in rows if row["kind"] == "train"]
    every = max(1, -(-len(train) // TRAIN_ROWS))
    kept = [row for row in train if row["step"] % every == 0 or row is train[-1]]
    points: dict[int, dict[str, object]] = {}
    for row in [*kept, *(row for row in rows if row["kind"] == "dev")]:
        point = points.setdefault(row["tokens"], {"tokens": row["tokens"]})
        point[f"{row['kind']}_loss"] = row[f"{row['kind']}_loss"]
    text = io.StringIO()
    writer = csv.DictWriter(text, ["tokens", "train_loss", "dev_loss"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(points[tokens] for tokens in sorted(points))
    return text.getvalue()
