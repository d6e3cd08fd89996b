"""What the published laws predict for whole sweeps, written down and dated before the runs.

    python -m src.analysis.science.predictions \
        --config configs/frontier.yaml configs/factorised.yaml \
        --date 2026-11-23 --output results/predictions.json
"""

from __future__ import annotations

import datetime
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from src.analysis.science import published_laws
from src.spec import allocation, config
from src.spec.allocation import Allocation
from src.spec.command_line import OK, Parser, refuse
from src.spec.metric_keys import TOTAL_PARAMS
from src.storage.files import write_json

SCHEMA = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Write the predictions; returns the exit code."""
    parser = Parser(
        prog="python -m src.analysis.science.predictions", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--config", nargs="+", type=Path, required=True, help="experiment files")
    parser.add_argument("--date", required=True, help="the day they are made, before any run")
    parser.add_argument("--output", type=Path, required=True, help="the JSON file to write")
    args = parser.parse_args(argv)
    try:
        content = predict(args.config, args.date)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.output, content)
    except (ValueError, OSError) as error:
        return refuse(error)
    print(table(content))
    return OK


def predict(files: Sequence[Path], date: str) -> dict[str, Any]:
    """Predictions for all of `files`, from realised integers. ValueError for a bad file or day."""
    try:
        datetime.date.fromisoformat(date)
    except ValueError:
        raise ValueError(f"--date: found {date!r}, expected a day as 2026-11-23") from None
    return {
        "schema": SCHEMA,
        "date": date,
        "sources": {"tao": published_laws.TAO_SOURCE, "levine": published_laws.LEVINE_SOURCE},
        "sweeps": {file.name: _sweep(file) for file in files},
    }


def _sweep(file: Path) -> dict[str, Any]:
    sweep = config.load_sweep(file)
    if sweep.rates:
        raise ValueError(f"{file}: found a list of learning rates; the laws know of no rate")
    try:
        allocations = allocation.allocate(
            {run.experiment: run.model for run in sweep.runs}, sweep.baseline
        )
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    total, vocabulary = sweep.runs[0].model.total_params, sweep.runs[0].model.vocab_size
    levine = published_laws.levine_best_share(total, vocabulary)
    return {
        "baseline": sweep.baseline,
        TOTAL_PARAMS.asked: total,
        "vocab_size": vocabulary,
        "tao_best_share": published_laws.tao_best_share(total),
        "levine_best_share": levine,
        "levine_best_layers": published_laws.levine_depth(levine * total / vocabulary),
        "configurations": {
            name: _configuration(built, allocations[sweep.baseline])
            for name, built in allocations.items()
        },
    }


def _configuration(built: Allocation, baseline: Allocation) -> dict[str, Any]:
    ours, reference, model = built.params, baseline.params, built.model
    depth = published_laws.levine_depth(model.d_model)
    return {
        **{key: getattr(model, key) for key in ("n_layers", "d_model", "embedding_dim")},
        "share": ours.share,
        "tao_ln_ppl_ratio": published_laws.tao_log_ratio(
            ours.share, reference.share, ours.total, reference.total
        ),
        "levine_layers": depth if depth > 0 else None,  # the law is silent below d = 154
    }


def table(content: dict[str, Any]) -> str:
    """The predictions for people."""
    lines = []
    for name, sweep in content["sweeps"].items():
        lines.append(
            f"{name}: best share {sweep['tao_best_share']:.1%} (Tao et al.), "
            f"{sweep['levine_best_share']:.1%} (Levine et al.)"
        )
        for experiment, built in sorted(
            sweep["configurations"].items(), key=lambda item: item[1]["share"]
        ):
            lines.append(
                f"  {experiment:<16} share {built['share']:6.1%}  {built['n_layers']:2d} layers  "
                f"PPL against {sweep['baseline']} {math.expm1(built['tao_ln_ppl_ratio']):+.1%} "
                "(Tao et al.)"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
