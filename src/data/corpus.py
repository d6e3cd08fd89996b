"""The corpus directory: {train,validation,test}.jsonl and source.json, written, read, verified.

docs/CORPUS.md is the format.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from src.spec.command_line import Parser, Refusal
from src.spec.progress import Progress, say
from src.storage.files import (
    locked,
    make_directory,
    publish,
    read_json,
    scratch_directory,
    sha256_of,
    write_json,
)

SPLITS = ("train", "validation", "test")
# What import_text.py reads.
KINDS = (".txt", ".txt.gz", ".txt.zst", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
Make = Callable[[Path], dict[str, Any]]


def script_parser(docstring: str | None) -> Parser:
    """Of a module that says in its first line what it does and in its third how it is called."""
    summary, _, example, *_ = str(docstring).splitlines()
    return Parser(summary, example=example.strip())


def corpus_parser(docstring: str | None) -> Parser:
    """The arguments of every command that makes such a directory."""
    parser = script_parser(docstring)
    parser.add_argument("--output", type=Path, required=True, help="the directory to make")
    parser.add_argument("--force", action="store_true", help="replace what --output holds")
    return parser


def make_once(
    output: Path, dataset: str, config: str | None, splits: Sequence[str], make: Make, force: bool
) -> bool:
    """Have a corpus directory made unless it is there: one process at a time, source.json last.

    `make` writes into the folder `files` of the scratch directory that it is given and returns
    what source.json shall say beside the defaults below. Returns whether anything was made. Raises
    Refusal where `output` holds another corpus (unless `force`), a damaged one, or files of
    somebody else.
    """
    with writing_to(output):
        if not force and is_finished(output, dataset, config, splits):
            print(f"{output}: holds {dataset}, whole and verified; nothing to do")
            return False
        with scratch_directory(output / ".partial") as partial:
            (partial / "files").mkdir()
            source: dict[str, Any] = {"dataset": dataset, "config": config}
            source |= {"revision": None, "mirror": False, "licence": None, **make(partial)}
            write_json(partial / "files" / "source.json", source)
            publish(partial / "files", output, "source.json")
    for split, facts in source["splits"].items():
        counts = (f"{count:,} {name}" for name, count in facts.items() if isinstance(count, int))
        print(f"{split}: {', '.join(counts)}")
    return True


@contextmanager
def writing_to(output: Path) -> Iterator[None]:
    """`output`, made and locked; Refusal where it holds files of somebody else."""
    if output.is_dir() and (names := {path.name for path in output.iterdir()}):
        if not names & {"source.json", ".lock"}:
            raise Refusal(
                f"--output {output}: found files of other origin, expected a free name, an empty "
                "directory, or one that this command has made; choose another"
            )
    make_directory(output)
    with locked(output / ".lock"):
        yield


def is_finished(output: Path, dataset: str, config: str | None, splits: Iterable[str]) -> bool:
    """Whether `output` holds these splits of this corpus, whole; Refusal for another corpus or a
    damaged one."""
    try:
        source = read_json(output / "source.json")
    except FileNotFoundError:
        return False
    if not isinstance(source.get("splits"), dict):
        source = {}
    if source.get("dataset") != dataset or config not in (None, source.get("config")):
        raise Refusal(
            f"{output}: holds {source.get('dataset')}, configuration {source.get('config')}, "
            f"expected {dataset}, configuration {config or 'of any name'}; choose another "
            "--output, or --force"
        )
    for split, facts in source["splits"].items():
        file = output / f"{split}.jsonl"
        if not file.is_file() or sha256_of(file) != facts["sha256"]:
            raise Refusal(f"{file}: is not what source.json says; --force makes it again")
    return set(splits) <= source["splits"].keys()


def write_documents(
    name: str,
    folder: Path,
    splits: Iterable[str],
    documents: Iterable[tuple[str, str]],
    hint: str = "",
) -> dict[str, dict[str, Any]]:
    """Write pairs of split and text; what source.json says of each split, Refusal for an empty one.

    `name` says whose documents they are. Blank texts are left out. Lines end in \\n only (other
    separators stay inside a text).
    """
    files = {split: folder / f"{split}.jsonl" for split in splits}
    facts: dict[str, dict[str, Any]] = {
        split: {"documents": 0, "bytes": 0, "words": 0} for split in files
    }
    blank = 0
    with ExitStack() as stack:
        outputs = {split: stack.enter_context(file.open("wb")) for split, file in files.items()}
        for split, text in documents:
            if not text.strip():
                blank += 1
                continue
            outputs[split].write(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")
            facts[split]["documents"] += 1
            facts[split]["bytes"] += len(text.encode())
            facts[split]["words"] += len(text.split())
    if blank:
        say(name, f"left out {blank:,} documents without a visible character")
    if empty := [split for split in files if not facts[split]["documents"]]:
        count = sum(counts["documents"] for counts in facts.values())
        raise Refusal(
            f"{name}: found {count:,} documents, none of them for {' and '.join(empty)}, "
            f"expected some in every split{hint}"
        )
    return {split: {**facts[split], "sha256": sha256_of(file)} for split, file in files.items()}


def write_rows(file: Path, rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Write JSON Lines; their number and hash."""
    count = 0
    with file.open("wb") as out:
        for row in rows:
            out.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            count += 1
    return {"rows": count, "sha256": sha256_of(file)}


def kind_of(file: Path) -> str | None:
    """The ending by which import_text.py reads a file; None for other files."""
    return next((kind for kind in KINDS if file.name.lower().endswith(kind)), None)


def read_source(corpus: Path, splits: Iterable[str] = SPLITS) -> dict[str, Any]:
    """The corpus' source.json; Refusal where it is missing or says too little of `splits`."""
    way_out = f"run python scripts/download_wikitext.py --output {corpus}"
    try:
        source = read_json(corpus / "source.json")
    except (FileNotFoundError, NotADirectoryError):
        if corpus.is_file() or any(map(kind_of, corpus.rglob("*"))):
            way_out = (
                "make one of these texts: python scripts/import_text.py "
                f"--input {corpus} --output data/mine"
            )
        raise Refusal(
            f"{(corpus / 'source.json').absolute()}: found no such file, expected a whole corpus; "
            f"{way_out}"
        ) from None
    recorded = source.get("splits")
    for split in splits:
        facts = recorded.get(split) if isinstance(recorded, dict) else None
        if not isinstance(facts, dict) or not isinstance(facts.get("sha256"), str):
            raise Refusal(
                f"{corpus / 'source.json'}: splits.{split}.sha256: found none, expected the hash "
                f"of {split}.jsonl; {way_out} --force"
            )
    return source


def check_split(file: Path, sha256: str) -> None:
    """Refusal for a missing, empty, not UTF-8 (with the byte offset) or changed file."""
    digest, offset = hashlib.sha256(), 0
    try:
        with file.open("rb") as lines:
            for line in lines:
                line.decode("utf-8")
                digest.update(line)
                offset += len(line)
    except UnicodeDecodeError as error:
        raise Refusal(
            f"{file}: byte {offset + error.start}: found {error.object[error.start]:#04x}, "
            f"expected UTF-8 ({error.reason}); mend the file or make the corpus again"
        ) from None
    except (FileNotFoundError, IsADirectoryError):
        raise Refusal(
            f"{file}: found no such file, expected a split of the corpus; make the corpus again"
        ) from None
    if offset == 0:
        raise Refusal(f"{file}: found an empty split, expected documents; make the corpus again")
    if digest.hexdigest() != sha256:
        raise Refusal(
            f"{file}: found sha256 {digest.hexdigest()}, expected {sha256} as in source.json; "
            "make the corpus again with --force"
        )


def read_texts(file: Path) -> Iterator[str]:
    """The documents of one split, streamed; Refusal names the line of what is not a text."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            yield text_of(line, f"{file}: line {number}")


def counted_texts(file: Path, what: str) -> Iterator[str]:
    """`read_texts`, saying how far it is in `what` (characters for bytes)."""
    with Progress(f"{file}: {what}", file.stat().st_size / 1e6, "MB") as progress:
        for text in read_texts(file):
            yield text
            progress.advance(len(text) / 1e6)


def text_of(line: bytes, where: str, column: str = "text", hint: str = "") -> str:
    """The text in a line of JSON, null being an empty one; Refusal for another line."""
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise Refusal(f"{where}: found no JSON in UTF-8 ({error}), expected an object") from None
    if not isinstance(row, dict) or column not in row:
        actual = f"the keys {', '.join(row)}" if isinstance(row, dict) else type(row).__name__
        raise Refusal(f"{where}: found {actual}, expected an object with a {column}{hint}")
    text = row[column]
    if not isinstance(text, str | None):
        actual = json.dumps(text)[:40]
        raise Refusal(f"{where}: {column}: found {actual}, expected a text{hint}")
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:  # JSON can escape halves of characters
        raise Refusal(f"{where}: {column}: found half of a character ({error})") from None
    return text or ""
