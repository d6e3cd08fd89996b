"""Downloads an instruction set for the light tuning, as prompts and answers.

    python scripts/download_instructions.py --output data/instructions

Writes {train,validation}.jsonl, one {"prompt": ..., "answer": ...} a row, and source.json last.
One row in ten, chosen by the hash of its text, is held out. Datasets with the columns prompt and
response are taken as they are; instruction, input, output get the same Alpaca wording.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from src.data.chat_template import CLOSING, OPENING
from src.data.corpus import corpus_parser, make_once, write_rows
from src.data.hub import MIRROR_HELP, find_mirror, load, source_name
from src.data.parquet import Split
from src.spec.command_line import Refusal
from src.spec.progress import track

DATASET = "mosaicml/dolly_hhrlhf"
HELD_OUT_ONE_IN = 10
SPLITS = ("train", "validation")


def main() -> None:
    parser = corpus_parser(__doc__)
    dataset_help = f"<owner>/<name> with a train split (default {DATASET})"
    parser.add_argument("--dataset", default=DATASET, help=dataset_help)
    parser.add_argument("--mirror", help=MIRROR_HELP)
    args = parser.parse_args()
    download(args.dataset, find_mirror(args.mirror), args.output, force=args.force)


def download(dataset: str, mirror: Path | None, output: Path, *, force: bool = False) -> None:
    """Have the train split as two files of prompts and answers; nothing half-done is visible."""

    def make(partial: Path) -> dict[str, Any]:
        print(f"{dataset} from {source_name(mirror)}", flush=True)
        loaded, origin = load(dataset, None, ["train"], mirror, partial / "cache")
        train = loaded["train"]
        rows: dict[str, list[dict[str, str]]] = {split: [] for split in SPLITS}
        for row in track(pairs(dataset, train), str(output), "rows", len(train)):
            if row["prompt"].strip() and row["answer"].strip():
                rows["validation" if is_held_out(row["prompt"]) else "train"].append(row)
        files = {split: partial / "files" / f"{split}.jsonl" for split in SPLITS}
        facts = {split: write_rows(file, rows[split]) for split, file in files.items()}
        if not all(rows.values()):
            raise Refusal(f"{dataset}: found too few rows with a prompt and an answer")
        return {**origin, "splits": facts}

    make_once(output, dataset, None, SPLITS, make, force=force)


def pairs(dataset: str, split: Split) -> Iterator[dict[str, str]]:
    """The rows as prompt and answer; Refusal where the columns are others."""
    columns = set(split.columns())
    if {"prompt", "response"} <= columns:
        for row in split.texts(["prompt", "response"]):
            yield {"prompt": row["prompt"], "answer": row["response"]}
    elif {"instruction", "output"} <= columns:
        for row in split.texts(["instruction", "output", *({"input"} & columns)]):
            context = f"\n\n### Input:\n{row['input']}" if row.get("input") else ""
            prompt = f"{OPENING}{row['instruction']}{context}{CLOSING}"
            yield {"prompt": prompt, "answer": row["output"]}
    else:
        raise Refusal(
            f"{dataset}: found the columns {', '.join(split.columns())}, expected prompt and "
            "response, or instruction and output; choose another --dataset"
        )


def is_held_out(prompt: str) -> bool:
    """By its hash: equal prompts never stand on both sides."""
    digest = hashlib.sha256(prompt.encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0
