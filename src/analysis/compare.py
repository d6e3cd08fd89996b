"""Is one configuration better than another? Paired documents and seeds of finished runs.

    python -m src.analysis.compare --baseline logs/emb35 logs/emb35-seed1 \
        --ours logs/emb45 logs/emb45-seed1

Runs pair where their seed and the program (`program_digest`: code, versions, settings) are equal;
that a pair was computed on two kinds of processor is said. Runs without such a partner are refused,
or with --unlike compared as two groups. Prints the difference
as a percentage with its 95 % interval (documents x seeds), the p value and the equivalence
statement at +-1 %; one seed gets no verdict. Across tokenizers: --measure bits_per_byte, over the
documents that all runs scored. Exit codes: 0, 78.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from src.analysis import intervals, repeats
from src.analysis.run_table import computed
from src.spec import run_identity
from src.spec.command_line import OK, Parser, refuse
from src.storage import documents
from src.storage.files import read_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A finished run: its metrics.json, and nats, tokens and bytes by document (D)."""

    path: Path
    metrics: Mapping[str, Any]
    nats: intervals.Floats
    tokens: intervals.Floats
    bytes: intervals.Floats

    @property
    def label(self) -> repeats.Label:
        return self.metrics["seed"], run_identity.computed_as(self.metrics)


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m src.analysis.compare", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--baseline", type=Path, nargs="+", required=True, metavar="RUN")
    parser.add_argument("--ours", type=Path, nargs="+", required=True, metavar="RUN")
    parser.add_argument(
        "--pool", type=Path, nargs="+", default=[], metavar="RUN",
        help="other runs of the study, whose pairs help to tell the seed noise",
    )  # fmt: skip
    parser.add_argument("--split", default="test", choices=("test", "validation"))
    parser.add_argument(
        "--measure", default="perplexity", choices=("perplexity", "bits_per_byte"),
        help="bits_per_byte (across tokenizers) or perplexity (default; one tokenizer)",
    )  # fmt: skip
    parser.add_argument(
        "--unlike", action="store_true",
        help="other seeds, or computed otherwise: compare as two groups, without pairs",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    try:
        result = compare(args)
    except (ValueError, OSError) as error:
        return refuse(error)
    print(json.dumps(result) if args.json else result["sentence"])
    return OK


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """The comparison's numbers and its sentence. Raises ValueError for runs that do not compare."""
    notes: list[str] = []
    runs = [read_run(path, args.split) for path in (*args.baseline, *args.ours, *args.pool)]
    runs, weights = _same_documents(runs, args.measure)
    start, end = len(args.baseline), len(args.baseline) + len(args.ours)
    baseline, ours = (_by_label(side, notes) for side in (runs[:start], runs[start:end]))
    if args.unlike:
        baseline, ours = (_one_a_seed(side, notes) for side in (baseline, ours))
        runs = [*baseline.values(), *ours.values(), *runs[end:]]
    noise = _noise(runs, args.measure, args.unlike)
    sides: Sequence[Sequence[Run]] = [list(ours.values()), list(baseline.values())]
    if not args.unlike:
        pairs = repeats.pair(ours, baseline)
        if pairs.left_out:
            raise ValueError(
                f"--ours and --baseline: found runs without a like one ({'; '.join(pairs.left_out)}"
                "), expected pairs of equal seed and program_digest; leave these out, or say "
                "--unlike to compare the two groups without pairs"
            )
        sides = list(zip(*pairs.pairs, strict=True))
        notes += _other_processors(pairs.pairs)
    a, b = (np.stack([run.nats for run in side]) for side in sides)
    interval = intervals.paired_bootstrap(
        a, b, weights, measure=args.measure, paired_seeds=not args.unlike, noise=noise
    )
    equivalence = intervals.equivalence(interval)
    low, ratio, high = (100 * (value - 1) for value in interval.ratio)
    certainty = ", document noise only)" if interval.p is None else f"), p {interval.p:.4f}"
    sentence = (
        f"{args.split} {args.measure.replace('_', ' ')} {ratio:+.2f} % "
        f"({low:+.2f} to {high:+.2f} %{certainty}, "
        f"{interval.seeds} {'seed' if interval.seeds == 1 else 'seeds'}"
        f"{' without pairs' if args.unlike else ''}, {interval.documents} documents: "
        f"{equivalence.verdict}"
    )
    return {
        "ours": [str(path) for path in args.ours],
        "baseline": [str(path) for path in args.baseline],
        "split": args.split,
        "measure": args.measure,
        "paired": not args.unlike,
        "percent": ratio,
        "low_percent": low,
        "high_percent": high,
        "p": interval.p,
        "seeds": interval.seeds,
        "documents": interval.documents,
        "seed_noise": None if noise is None else noise.sd,
        "seed_noise_df": None if noise is None else noise.df,
        "verdict": equivalence.verdict,
        "notes": notes,
        "sentence": "; ".join([sentence, *notes]),
    }


def _same_documents(runs: Sequence[Run], measure: str) -> tuple[list[Run], intervals.Floats]:
    """The runs over the documents that all of them scored, and those documents' weights.

    A limit in tokens (`evaluation.perplexity_tokens`) keeps fewer documents under a finer
    tokenizer; the first ones are common to all. Token perplexities of two tokenizers, even of
    equal size, are refused (ValueError).
    """
    first, count = runs[0], min(len(run.bytes) for run in runs)
    hashes = list(dict.fromkeys(run.metrics["tokenizer_sha256"] for run in runs))
    if measure == "perplexity" and len(hashes) > 1:
        raise ValueError(
            "token perplexities of two tokenizers cannot be compared: found tokenizer hashes "
            f"{' and '.join(digest[:12] for digest in hashes)}, expected the same one; compare "
            "bits per byte instead"
        )
    for run in runs:
        if not np.array_equal(run.bytes[:count], first.bytes[:count]):
            raise ValueError(f"{run.path}: scored other documents than {first.path}")
    shortened = [
        replace(run, nats=run.nats[:count], tokens=run.tokens[:count], bytes=run.bytes[:count])
        for run in runs
    ]
    return shortened, shortened[0].tokens if measure == "perplexity" else shortened[0].bytes


def _by_label(runs: Sequence[Run], notes: list[str]) -> dict[repeats.Label, Run]:
    """Runs by seed and digest; one run found twice is one run."""
    by_label: dict[repeats.Label, Run] = {}
    for run in runs:
        first = by_label.setdefault(run.label, run)
        if first is run:
            continue
        if not np.array_equal(run.nats, first.nats):
            raise ValueError(
                f"{run.path}: found seed {run.label[0]} again (it is {first.path}'s) with other "
                "losses, expected each seed once; name one of them"
            )
        notes.append(f"{run.path} is {first.path} again and counts once")
    return by_label


def _one_a_seed(side: dict[repeats.Label, Run], notes: list[str]) -> dict[repeats.Label, Run]:
    """A seed that two programs computed is no second seed."""
    kept: dict[int, repeats.Label] = {}
    for label, run in side.items():
        if kept.setdefault(label[0], label) != label:
            notes.append(f"{run.path} is seed {label[0]} again and does not count")
    return {label: side[label] for label in kept.values()}


def _other_processors(pairs: Sequence[tuple[Run, Run]]) -> list[str]:
    """A sentence where the sides of a pair are not equal to the bit: the same program on two kinds
    of processor rounds otherwise, which acts like another seed on one side."""
    mixed = [pair for pair in pairs if len({run.metrics.get("compute_digest") for run in pair}) > 1]
    if not mixed:
        return []
    kinds = {run.metrics.get("processors") or "not recorded" for pair in mixed for run in pair}
    return [
        f"{len(mixed)} of {len(pairs)} pairs computed on two kinds of processor "
        f"({' / '.join(sorted(kinds))}), whose rounding is part of the difference"
    ]


def _noise(runs: Sequence[Run], measure: str, unlike: bool) -> repeats.Noise | None:
    """The seed noise that all given runs tell together, in the unit of the comparison."""
    losses: dict[str, dict[repeats.Label, float]] = {}
    for run in runs:
        nats = run.nats.sum()
        value = nats / run.tokens.sum() if measure == "perplexity" else math.log(nats)
        name = str(run_identity.configuration(run.metrics))
        losses.setdefault(name, {})[run.label] = float(value)
    if unlike:
        return repeats.pooled_noise({name: list(s.values()) for name, s in losses.items()})
    return repeats.paired_noise(losses)


def read_run(path: Path, split: str) -> Run:
    """A run directory's losses, published ones too; raises ValueError where it has none."""
    losses = documents.read(path, split)
    if losses is None or not (path / "metrics.json").is_file():
        raise ValueError(
            f"{path}: expected a finished run with metrics.json and documents_{split}.npz, its "
            f"per-document losses of {split}"
        )
    metrics = read_json(path / "metrics.json")
    nats, tokens, size = (
        part.astype(np.float64) for part in (losses.nats, losses.tokens, losses.bytes)
    )
    return Run(
        path=path,
        metrics=computed(path) | {k: v for k, v in metrics.items() if v is not None},
        nats=nats,
        tokens=tokens,
        bytes=size,
    )


if __name__ == "__main__":
    raise SystemExit(main())
