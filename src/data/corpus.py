"""The corpus directory: {train,validation,test}.jsonl and source.json, written, read, verified."""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from src.spec.command_line import Refusal
from src.storage.files import read_json, sha256_of

SPLITS = ("train", "validation", "test")
READ_BYTES = 1 << 20


def is_finished(
    output: Path, path: str, config: str | None, splits: Iterable[str] = SPLITS
) -> bool:
    """Whether `output` holds these splits of this corpus, whole; Refusal for another corpus or a
    damaged one."""
    try:
        source = read_json(output / "source.json")
    except FileNotFoundError:
        return False
    held = source if isinstance(source.get("splits"), dict) else {}
    if held.get("dataset") != path or config not in (None, held.get("config")):
        raise Refusal(
            f"{output}: holds {held.get('dataset')}, configuration {held.get('config')}, expected "
            f"{path}, configuration {config or 'of any name'}; choose another --output, or --force"
        )
    for split, facts in held["splits"].items():
        file = output / f"{split}.jsonl"
        if not file.is_file() or sha256_of(file) != facts["sha256"]:
            raise Refusal(f"{file}: is not what source.json says; --force downloads it again")
    return set(splits) <= held["splits"].keys()


def write_split(file: Path, documents: Iterable[str]) -> dict[str, Any]:
    """Write one split; return its documents, UTF-8 bytes and whitespace words, and the sha256.

    Empty documents are left out. Lines end in \\n only (other separators stay inside a text).
    """
    file.parent.mkdir(exist_ok=True)
    digest = hashlib.sha256()
    counts = {"documents": 0, "bytes": 0, "words": 0}
    with file.open("wb") as out:
        for text in documents:
            if not text.strip():
                continue
            line = json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"
            out.write(line)
            digest.update(line)
            counts["documents"] += 1
            counts["bytes"] += len(text.encode())
            counts["words"] += len(text.split())
    return {**counts, "sha256": digest.hexdigest()}


def read_source(corpus: Path) -> dict[str, Any]:
    """The corpus' source.json; Refusal where it is missing or says too little."""
    way_out = f"run python scripts/download_wikitext.py --output {corpus}"
    try:
        source = read_json(corpus / "source.json")
    except (FileNotFoundError, NotADirectoryError):
        raise Refusal(
            f"{corpus / 'source.json'}: found no such file, expected a whole corpus; {way_out}"
        ) from None
    splits = source.get("splits")
    for split in SPLITS:
        facts = splits.get(split) if isinstance(splits, dict) else None
        if not isinstance(facts, dict) or not isinstance(facts.get("sha256"), str):
            raise Refusal(
                f"{corpus / 'source.json'}: splits.{split}.sha256: found none, expected the hash "
                f"of {split}.jsonl; {way_out} --force"
            )
    return source


def check_split(file: Path, sha256: str) -> None:
    """Refusal for a missing, empty, not UTF-8 (with the byte offset) or changed file."""
    digest = hashlib.sha256()
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    try:
        with file.open("rb") as data:
            while block := data.read(READ_BYTES):
                digest.update(block)
                kept = len(decoder.getstate()[0])  # a character's bytes cut by the block's end
                decoder.decode(block)
                offset += len(block)
            kept, block = len(decoder.getstate()[0]), b""
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise Refusal(
            f"{file}: byte {offset - kept + error.start}: found {error.object[error.start]:#04x}, "
            f"expected UTF-8 ({error.reason}); mend the file or download the corpus again"
        ) from None
    except (FileNotFoundError, IsADirectoryError):
        raise Refusal(
            f"{file}: found no such file, expected a split of the corpus; download it again"
        ) from None
    if offset == 0:
        raise Refusal(f"{file}: found an empty split, expected documents; download it again")
    if digest.hexdigest() != sha256:
        raise Refusal(
            f"{file}: found sha256 {digest.hexdigest()}, expected {sha256} as in source.json; "
            "download the corpus again with --force"
        )


def read_texts(file: Path) -> Iterator[str]:
    """The documents of one split, streamed; Refusal names the line of what is not a text."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                text = json.loads(line)["text"]
                text.encode()  # JSON can escape halves of characters, which UTF-8 cannot hold
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise Refusal(
                    f"{file}: line {number}: expected a JSON object with a text ({error})"
                ) from None
            yield text
