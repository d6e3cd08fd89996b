"""Is one configuration better than another? Paired documents and seeds of finished runs.

    python -m src.analysis.compare --baseline logs/emb35 logs/emb35-seed1 \
        --ours logs/emb45 logs/emb45-seed1

Prints ln PPL's difference as a percentage with its 95 % interval (documents x seeds), the p value
and the equivalence statement at +-1 %; across tokenizers, bits per byte. Exit codes: 0, 78.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from src.analysis import decisions
from src.evaluation import perplexity
from src.spec.command_line import OK, Parser, refuse


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m src.analysis.compare", description=__doc__)
    parser.add_argument("--baseline", type=Path, nargs="+", required=True, metavar="RUN")
    parser.add_argument("--ours", type=Path, nargs="+", required=True, metavar="RUN")
    parser.add_argument("--split", default="test", choices=("test", "validation"))
    parser.add_argument(
        "--measure", default="perplexity", choices=("perplexity", "bits_per_byte"),
        help="bits_per_byte (across tokenizers) or perplexity (default; one tokenizer)",
    )  # fmt: skip
    parser.add_argument("--unpaired", action="store_true", help="the seeds are not the same ones")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args(arguments)
    try:
        found = compare(asked)
    except (ValueError, OSError) as error:
        return refuse(error)
    print(json.dumps(found) if asked.json else found["sentence"])
    return OK


def compare(asked: argparse.Namespace) -> dict[str, Any]:
    """The comparison's numbers and its sentence. Raises ValueError for runs that do not compare."""
    theirs, ours = (_read(paths, asked.split) for paths in (asked.baseline, asked.ours))
    paired = not asked.unpaired
    if paired and [r["seed"] for r in ours] != [r["seed"] for r in theirs]:
        raise ValueError(
            f"--ours: found the seeds {[r['seed'] for r in ours]}, expected the baseline's "
            f"{[r['seed'] for r in theirs]} in this order; or say --unpaired"
        )
    if asked.measure == "perplexity":
        for run in (*ours, *theirs):  # raises across tokenizers
            perplexity.compare_token_perplexity(run["perplexity"], theirs[0]["perplexity"])
    weights = theirs[0]["tokens" if asked.measure == "perplexity" else "bytes"]
    for run in (*ours, *theirs):
        if not np.array_equal(run["bytes"], theirs[0]["bytes"]):
            raise ValueError(f"{run['path']}: scored other documents than {theirs[0]['path']}")
    interval = decisions.paired_bootstrap(
        np.stack([run["nats"] for run in ours]),
        np.stack([run["nats"] for run in theirs]),
        weights,
        measure=asked.measure,
        paired_seeds=paired,
    )
    says = decisions.equivalence(interval)
    low, ratio, high = (100 * (value - 1) for value in interval.ratio)
    name = asked.measure.replace("_", " ")
    return {
        "ours": [str(path) for path in asked.ours],
        "baseline": [str(path) for path in asked.baseline],
        "split": asked.split,
        "measure": asked.measure,
        "percent": ratio,
        "low_percent": low,
        "high_percent": high,
        "p": interval.p,
        "seeds": interval.seeds,
        "documents": interval.documents,
        "verdict": says.verdict,
        "sentence": f"{asked.split} {name} {ratio:+.2f} % ({low:+.2f} to {high:+.2f} %), "
        f"p {interval.p:.4f}, {interval.seeds} seeds, {interval.documents} documents: "
        f"{says.verdict}",
    }


def _read(paths: Sequence[Path], split: str) -> list[dict[str, Any]]:
    return [_run(path, split) for path in paths]


def _run(path: Path, split: str) -> dict[str, Any]:
    try:
        metrics = json.loads((path / "metrics.json").read_bytes())
        with np.load(path / f"documents_{split}.npz") as arrays:
            nats, tokens, size = (
                arrays[f"document_{name}"] for name in ("nats", "tokens", "bytes")
            )
    except FileNotFoundError as error:
        raise ValueError(
            f"{path}: found no {Path(error.filename).name}, expected a finished run with "
            f"per-document losses of {split}"
        ) from None
    return {
        "path": path,
        "seed": metrics["seed"],
        "perplexity": perplexity.TokenPerplexity(
            value=perplexity.perplexity(float(nats.sum()), int(tokens.sum())),
            tokenizer_sha256=metrics["tokenizer_sha256"],
        ),
        "nats": nats,
        "tokens": tokens,
        "bytes": size,
    }


if __name__ == "__main__":
    raise SystemExit(main())
