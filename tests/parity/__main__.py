"""Compare a run's SmallBench items with lm-evaluation-harness; exit 0 only if all are equal.

    python -m tests.parity --run logs/emb35 --smallbench data/smallbench
    python -m tests.parity --run logs/emb35 --smallbench data/smallbench --tasks sst2 piqa

To compare every row, first write them all, then name that file:

    python -m src.eval_smallbench --run logs/emb35 --full --items all.jsonl
    python -m tests.parity --run logs/emb35 --smallbench data/smallbench --items all.jsonl
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from src.data.tasks import TASKS_FILE, load_tasks
from tests.parity.harness import Row, compare, read_items, template

# Several BLiMP paradigms of each field, and every other task that the harness has too.
DEFAULT = (
    "blimp_anaphor_gender_agreement", "blimp_determiner_noun_agreement_1",
    "blimp_regular_plural_subject_verb_agreement_1", "blimp_adjunct_island",
    "blimp_wh_questions_subject_gap", "blimp_transitive", "blimp_npi_present_1",
    "blimp_superlative_quantifiers_1", "blimp_principle_A_c_command",
    "blimp_existential_there_subject_raising",
    "sst2", "rte", "arc_easy", "sciq", "piqa", "hellaswag", "lambada",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="directory of a finished run")
    parser.add_argument("--smallbench", type=Path, required=True, help="the downloaded rows")
    parser.add_argument("--items", type=Path, help="default: the run's smallbench_items.jsonl")
    parser.add_argument("--task_list", type=Path, default=TASKS_FILE)
    parser.add_argument("--tasks", nargs="+", default=list(DEFAULT), help="names, or all")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--output", type=Path, help="write the table as JSON here")
    args = parser.parse_args(arguments)
    recorded = read_items(args.items or args.run / "smallbench_items.jsonl")
    known = {task.name: task for task in load_tasks(args.task_list) if template(task)}
    names = list(known) if args.tasks == ["all"] else args.tasks
    for name in names:
        if name not in known or name not in recorded:
            print(f"--tasks: found {name!r}, which the harness or the run lacks", file=sys.stderr)
            return 78
    with tempfile.TemporaryDirectory(prefix="parity-") as work:
        rows = compare(
            args.run / "final",
            recorded,
            [known[name] for name in names],
            args.smallbench,
            Path(work),
            batch_size=args.batch_size,
        )
    print(table(rows))
    if args.output is not None:
        content = [dataclasses.asdict(row) | {"equal": row.equal} for row in rows]
        args.output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0 if all(row.equal for row in rows) else 1


def table(rows: Sequence[Row]) -> str:
    """Markdown, for people and reports."""
    lines = [
        "| task | n | same prediction | largest difference, nats | accuracy ours / harness "
        "| acc_norm ours / harness | equal |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        norm = ""
        if row.accuracy_norm is not None:
            norm = f"{row.accuracy_norm} / {row.harness_accuracy_norm}"
        n = f"{row.n} (+{row.skipped} too long)" if row.skipped else str(row.n)
        lines.append(
            f"| {row.task} | {n} | {row.same_predictions} | {row.largest_difference:.1e} "
            f"| {row.accuracy} / {row.harness_accuracy} | {norm} | {'yes' if row.equal else 'NO'} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
