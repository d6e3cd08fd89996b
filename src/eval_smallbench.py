"""Score a finished run on SmallBench.

python -m src.eval_smallbench --run logs/emb35            # as the run itself was evaluated
python -m src.eval_smallbench --run logs/emb35 --limit 20
python -m src.eval_smallbench --run logs/emb35 --random_init
python -m src.eval_smallbench --run logs/emb35 --full     # every row of every task
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from src.compute import runtime
from src.data.tasks import TASKS_FILE, load_tasks
from src.evaluation.smallbench import evaluate, evaluate_untrained
from src.evaluation.trained_run import load_run
from src.spec import command_line


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_line.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="directory of a finished run")
    parser.add_argument("--smallbench", type=Path, help="downloaded rows (default: the run's)")
    parser.add_argument("--tasks", type=Path, help="task list (default: the run's)")
    parser.add_argument(
        "--limit",
        type=command_line.at_least(1),
        help="at most so many items a task (default: evaluation.smallbench_limit of the run)",
    )
    parser.add_argument(
        "--full", action="store_true", help="every row of every task, capped by --limit alone"
    )
    parser.add_argument("--random_init", action="store_true", help="the same model, untrained")
    parser.add_argument("--items", type=Path, help="write one JSON line an item here")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(arguments)
    try:
        result = _evaluate_run(args)
    except (ValueError, OSError) as error:
        return command_line.refuse(error)
    print(json.dumps(result, indent=2, allow_nan=False))
    return 0


def _evaluate_run(args: argparse.Namespace) -> dict[str, Any]:
    """In float32, as a run's own SmallBench is, on the items that the run was evaluated on."""
    device = runtime.choose_device(args.device)
    runtime.pin_threads()
    run = load_run(args.run, device)
    evaluation = run.evaluation
    data_dir = args.smallbench or Path(evaluation["smallbench_dir"])
    task_list = args.tasks or Path(evaluation["smallbench_tasks"] or TASKS_FILE)
    limit = args.limit
    if limit is None and not args.full:
        limit = evaluation.get("smallbench_limit")
    options: dict[str, Any] = {
        "context": run.context, "device": device, "autocast_dtype": None, "limit": limit,
        "full": args.full, "exclude": run.contaminated_rows(data_dir), "items_path": args.items,
    }  # fmt: skip
    tasks = load_tasks(task_list)
    if args.random_init:
        config, seed = run.model.config, run.resolved["training"]["init_seed"]
        return evaluate_untrained(config, run.tokenizer, tasks, data_dir, seed=seed, **options)
    return evaluate(run.model, run.tokenizer, tasks, data_dir, **options)


if __name__ == "__main__":
    sys.exit(main())
