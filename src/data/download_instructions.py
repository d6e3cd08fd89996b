"""Downloads an instruction set for the light tuning, as prompts and answers.

    python scripts/download_instructions.py --output data/instructions

Writes {train,validation}.jsonl, one {"prompt": ..., "answer": ...} a row, and source.json last.
One row in ten, chosen by the hash of its text, is held out. Datasets with the columns prompt and
response are taken as they are; instruction, input, output get the same Alpaca wording.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from src.data.chat_template import CLOSING, OPENING
from src.data.corpus import is_finished
from src.data.hub import MIRROR_HELP, Split, find_mirror, load
from src.spec.command_line import Parser, Refusal
from src.storage.files import locked, make_directory, publish, sha256_of, workshop, write_json

DATASET = "mosaicml/dolly_hhrlhf"
HELD_OUT_ONE_IN = 10
SPLITS = ("train", "validation")


def main() -> None:
    parser = Parser(
        __doc__.partition("\n")[0],
        example="python scripts/download_instructions.py --output data/instructions",
    )
    parser.add_argument("--output", type=Path, required=True, help="the directory to make")
    parser.add_argument(
        "--dataset", default=DATASET, help=f"<owner>/<name> with a train split (default {DATASET})"
    )
    parser.add_argument("--mirror", help=MIRROR_HELP)
    parser.add_argument("--force", action="store_true", help="replace what --output holds")
    arguments = parser.parse_args()
    mirror = find_mirror(arguments.mirror)
    output: Path = arguments.output
    make_directory(output)
    with locked(output / ".lock"):
        if not arguments.force and is_finished(output, arguments.dataset, None, SPLITS):
            print(f"{output}: holds {arguments.dataset}, whole and verified; nothing to do")
            return
        download(arguments.dataset, mirror, output)


def download(dataset: str, mirror: Path | None, output: Path) -> None:
    """Load the train split and publish it as two files; nothing half-done is ever visible."""
    with workshop(output / ".partial") as partial:
        (partial / "files").mkdir()
        loaded = load(dataset, None, ("train",), mirror, partial / "cache")
        rows = pairs(dataset, loaded.splits["train"])
        kept = [row for row in rows if row["prompt"].strip() and row["answer"].strip()]
        parts = {
            "train": [row for row in kept if not is_held_out(row)],
            "validation": [row for row in kept if is_held_out(row)],
        }
        facts = {
            name: write_rows(partial / "files" / f"{name}.jsonl", part)
            for name, part in parts.items()
        }
        write_json(partial / "files" / "source.json", loaded.source(facts))
        publish(partial / "files", output, "source.json")
    print(f"{output}: {dataset}, " + ", ".join(f"{n} {f['rows']:,} rows" for n, f in facts.items()))


def pairs(dataset: str, split: Split) -> Iterator[dict[str, str]]:
    """The rows as prompt and answer; Refusal where the columns are others."""
    columns = set(split.columns)
    if {"prompt", "response"} <= columns:
        for row in split.texts(["prompt", "response"]):
            yield {"prompt": row["prompt"], "answer": row["response"]}
    elif {"instruction", "output"} <= columns:
        for row in split.texts(["instruction", "output", *({"input"} & columns)]):
            given = f"\n\n### Input:\n{row['input']}" if row.get("input") else ""
            prompt = f"{OPENING}{row['instruction']}{given}{CLOSING}"
            yield {"prompt": prompt, "answer": row["output"]}
    else:
        raise Refusal(
            f"{dataset}: found the columns {', '.join(split.columns)}, expected prompt and "
            "response, or instruction and output; choose another --dataset"
        )


def is_held_out(row: Mapping[str, str]) -> bool:
    """By the prompt's hash: equal prompts never stand on both sides."""
    digest = hashlib.sha256(row["prompt"].encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def write_rows(file: Path, rows: Iterable[Mapping[str, str]]) -> dict[str, Any]:
    """Write one split; Refusal where it is empty."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    if not lines:
        raise Refusal(f"{file.stem}: found no row with a prompt and an answer, expected some")
    file.write_text("".join(lines), encoding="utf-8", newline="\n")
    return {"rows": len(lines), "sha256": sha256_of(file)}
