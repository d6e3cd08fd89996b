"""Makes a corpus directory of one's own texts: .txt, .jsonl (both also .gz or .zst) and .parquet.

    python scripts/import_text.py --input texts/ --output data/mine

Every .txt file is one document, unless --separator says where documents end; a .jsonl or parquet
file has one a row, in --text_column. The hash of its text decides which split a document is in, so
equal documents are in one split, and the same texts give the same splits on every machine.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from src.data.corpus import (
    KINDS,
    SPLITS,
    corpus_parser,
    kind_of,
    make_once,
    read_source,
    text_of,
    write_documents,
)
from src.data.parquet import Split
from src.spec.command_line import Refusal
from src.spec.progress import say, track
from src.storage.files import sha256_of

COLUMN_HINT = "; name what holds the texts with --text_column"
MORE_HINT = (
    "; raise --validation and --test, give more files, or cut .txt files into documents with "
    "--separator"
)
BLOCK_BYTES = 32 << 20
FEW_DOCUMENTS = 20  # of a held-out split
# (train bytes from which, a vocabulary that they can fill): what is printed as the next command
VOCABULARIES = ((10_000_000, 16_000), (1_000_000, 4_096), (0, 512))


def main() -> None:
    parser = corpus_parser(__doc__)
    input_help = f"folders (searched through) and files: {', '.join(KINDS)}"
    parser.add_argument("--input", type=Path, nargs="+", required=True, help=input_help)
    parser.add_argument("--text_column", default="text", help="of .jsonl and parquet rows (text)")
    parser.add_argument(
        "--separator",
        help=r"what stands between the documents of a .txt file, such as '\n\n\n' or "
        "'<|endoftext|>' (default: a file is one document)",
    )
    for split in ("validation", "test"):
        share_help = "share of the documents (0.02)"
        parser.add_argument(f"--{split}", type=float, default=0.02, help=share_help)
    args = parser.parse_args()
    if not (0 < args.validation and 0 < args.test and args.validation + args.test < 1):
        raise Refusal(
            f"--validation, --test: found {args.validation} and {args.test}, expected two shares "
            "above 0 that leave some of the documents to train"
        )
    output: Path = args.output
    files = find_files(args.input, output)
    separator = args.separator
    for escape, character in (("\\n", "\n"), ("\\r", "\r"), ("\\t", "\t")):
        separator = separator and separator.replace(escape, character)
    column, shares = args.text_column, (args.validation, args.test)
    tracked = track(files.items(), "--input: hashing", "files", len(files))
    digests = [(name, sha256_of(file)) for name, file in tracked]
    # Twelve digits that stand for these bytes under these names, cut in this way.
    config = hashlib.sha256(
        json.dumps([digests, [column, separator, *shares]]).encode()
    ).hexdigest()[:12]

    def make(partial: Path) -> dict[str, Any]:
        texts = (text for file in files.values() for text in read_texts(file, column, separator))
        tracked = track(texts, "--input: reading", "documents")
        documents = ((split_of(text, *shares), text) for text in tracked)
        folder = partial / "files"
        return {"splits": write_documents("--input", folder, SPLITS, documents, MORE_HINT)}

    dataset = f"own/{output.absolute().name}"
    if make_once(output, dataset, config, SPLITS, make, force=args.force):
        splits = read_source(output)["splits"]
        for split in ("validation", "test"):
            if (count := splits[split]["documents"]) < FEW_DOCUMENTS:
                say(split, f"{count} documents are few to measure on; raise --{split}")
        documents = sum(facts["documents"] for facts in splits.values())
        if separator and documents == len(files):
            say("--separator", f"{separator!r} stands in no file; lines may end in \\r\\n")
        size = splits["train"]["bytes"]
        vocabulary = next(entries for least, entries in VOCABULARIES if size >= least)
        print(
            f"{output}: a corpus of {len(files):,} files; next:\n"
            f"  python scripts/preprocess_lm.py --input {output} --vocab_size {vocabulary} "
            f"--output {output}_tokenized"
        )


def find_files(inputs: Sequence[Path], output: Path) -> dict[str, Path]:
    """The files to read by their names within what was named, sorted; others are counted aloud."""
    files: dict[str, Path] = {}
    seen: set[Path] = set()
    ignored: Counter[str] = Counter()
    for path in inputs:
        if not path.exists():
            raise Refusal(f"--input {path}: found nothing at {path.absolute()}, expected texts")
        if path.is_file() and kind_of(path) is None:
            raise Refusal(f"--input {path}: found another kind, expected {', '.join(KINDS)}")
        if output.resolve().is_relative_to(path.resolve()):
            raise Refusal(f"--output {output}: lies inside --input {path}; choose another place")
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            name = Path(path.resolve().name, file.relative_to(path))
            if not file.is_file() or any(part.startswith(".") for part in name.parts[1:]):
                continue
            if file.resolve() in seen:  # named with the folder that it lies in
                continue
            seen.add(file.resolve())
            if kind_of(file) is None:
                ignored[file.suffix or "without an ending"] += 1
            elif files.setdefault(str(name), file) != file:
                raise Refusal(
                    f"--input: found two files called {name} ({files[str(name)]} and {file}), "
                    "expected different names; name the folder above them"
                )
    if ignored:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in ignored.most_common(5))
        say("--input", f"left out {ignored.total():,} files of other kinds ({kinds})")
    if not files:
        places = ", ".join(str(path.absolute()) for path in inputs)
        raise Refusal(f"--input: found no texts in {places}, expected {', '.join(KINDS)}")
    return dict(sorted(files.items()))


def split_of(text: str, validation: float, test: float) -> str:
    """By where the hash of the text stands between 0 and 1."""
    position = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / (1 << 48)
    if position < validation:
        return "validation"
    return "test" if position >= 1 - test else "train"


def read_texts(file: Path, column: str, separator: str | None) -> Iterator[str]:
    """The documents of one file; Refusal names file, line and what to do."""
    kind = kind_of(file) or ""
    if kind == ".parquet":
        split = Split("input", [file])
        if column not in split.columns():
            raise Refusal(
                f"{file}: found the columns {', '.join(split.columns())}, expected a "
                f"{column}{COLUMN_HINT}"
            )
        yield from (row[column] for row in split.texts([column]))
        return
    import pyarrow as pa

    codec = {".gz": "gzip", ".zst": "zstd"}.get(file.suffix.lower())
    try:
        stream = io.BufferedReader(pa.input_stream(str(file), compression=codec), 1 << 20)
        if kind.startswith(".jsonl"):
            yield from jsonl_texts(file, stream, column)
        else:
            yield from txt_documents(file, stream, separator)
    except OSError as error:
        if error.errno or codec is None:
            raise
        raise Refusal(
            f"{file}: found a damaged or cut {codec} file ({error}); copy it again or leave it out"
        ) from None


def jsonl_texts(file: Path, stream: io.BufferedReader, column: str) -> Iterator[str]:
    """The texts of a .jsonl file, line by line."""
    for number, line in enumerate(stream, 1):
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if line.strip():
            yield text_of(line, f"{file}: line {number}", column, COLUMN_HINT)


def txt_documents(file: Path, stream: io.BufferedReader, separator: str | None) -> Iterator[str]:
    """The documents of a .txt file: all of it, or what stands between separators, without the
    empty lines around it."""
    line = 1
    for data in split_stream(stream, separator.encode() if separator else None):
        try:
            text = data.decode("utf-8")
            bad = data.find(0)
        except UnicodeDecodeError as error:
            bad = error.start
        if bad >= 0:
            raise Refusal(
                f"{file}: line {line + data[:bad].count(10)}: found the byte {data[bad]:#04x}, "
                "expected text in UTF-8; convert the file (iconv -f latin1 or utf-16 -t utf-8), "
                "or leave it out"
            )
        line += data.count(10) + (separator or "").count("\n")
        text = text.removeprefix("\ufeff")
        yield text.strip("\r\n") if separator else text


def split_stream(stream: io.BufferedReader, separator: bytes | None) -> Iterator[bytes]:
    """The stream's bytes between separators, or all of them."""
    if separator is None:
        yield stream.read()
        return
    rest = b""
    while block := stream.read(BLOCK_BYTES):
        *complete, rest = (rest + block).split(separator)
        yield from complete
    yield rest
