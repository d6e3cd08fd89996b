"""Downloads the pretraining corpus: WikiText, or any hub dataset of texts.

    python scripts/download_wikitext.py --output data/wikitext-2

Writes a corpus directory (docs/CORPUS.md). WikiText's lines are joined into articles.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

from src.data.corpus import SPLITS, corpus_parser, make_once, write_documents
from src.data.hub import MIRROR_HELP, find_mirror, load, source_name
from src.spec.command_line import Refusal
from src.spec.progress import track
from src.storage.files import read_json

WIKITEXT = "Salesforce/wikitext"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*(:[A-Za-z0-9._-]+)?")
# ` = Title = `, not ` = = Section = = `
HEADING = re.compile(r" = (?!= ).*(?<! =) = \n")
BLANK_LINES_AROUND = re.compile(r"\A( \n)+|(?<=\n)( \n)+\Z")


def main() -> None:
    parser = corpus_parser(__doc__)
    parser.add_argument(
        "--dataset",
        default="wikitext-2-v1",
        help="wikitext-2-v1 (default: words outside its vocabulary of 33,278 read <unk>), "
        "wikitext-2-raw-v1, wikitext-103-v1, wikitext-103-raw-v1, or any hub dataset "
        "<owner>/<name>[:<config>] with train, validation, test and a text column",
    )
    partial = "fewer than all: a corpus to evaluate on (evaluation.outside_dir), not to train on"
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=SPLITS, help=partial)
    parser.add_argument("--mirror", help=MIRROR_HELP)
    args = parser.parse_args()
    mirror = find_mirror(args.mirror)
    download(args.dataset, args.splits, mirror, args.output, force=args.force)


def parse_dataset(name: str) -> tuple[str, str | None]:
    """Hub path and configuration of a `--dataset` argument; Refusal for other forms."""
    if re.fullmatch(r"wikitext-(2|103)(-raw)?-v1", name):
        return WIKITEXT, name
    if not NAME.fullmatch(name):
        raise Refusal(
            f"--dataset: found {name!r}, expected wikitext-2-v1, wikitext-2-raw-v1, "
            "wikitext-103-v1, wikitext-103-raw-v1 or <owner>/<name>[:<config>]"
        )
    path, _, config = name.partition(":")
    return path, config or None


def download(
    dataset: str, splits: Sequence[str], mirror: Path | None, output: Path, *, force: bool = False
) -> None:
    """Have the dataset as a corpus directory; nothing half-done is ever visible."""
    path, config = parse_dataset(dataset)
    stored = _stored_splits(output, path, config)
    splits = [split for split in SPLITS if split in {*splits, *stored}]

    def make(partial: Path) -> dict[str, Any]:
        source = source_name(mirror)
        print(f"{path}, configuration {config or 'default'}, from {source}", flush=True)
        loaded, origin = load(path, config, splits, mirror, partial / "cache")

        def documents() -> Iterator[tuple[str, str]]:
            for split in splits:
                rows = loaded[split]
                tracked = track(rows.texts(["text"]), f"{output}: {split}", "rows", len(rows))
                texts = (row["text"] for row in tracked)
                for text in articles(texts) if path == WIKITEXT else texts:
                    yield split, text

        return {**origin, "splits": write_documents(path, partial / "files", splits, documents())}

    is_new = make_once(output, path, config, splits, make, force=force)
    if is_new and path == WIKITEXT and config and "raw" not in config:
        print("rare words read <unk>; --dataset wikitext-2-raw-v1 is the text without it")


def _stored_splits(output: Path, path: str, config: str | None) -> Collection[str]:
    """Splits of this dataset that were downloaded before: they stay, whatever is asked now."""
    file = output / "source.json"
    source = read_json(file) if file.is_file() else {}
    same_corpus = source.get("dataset") == path and config in (None, source.get("config"))
    return tuple(source["splits"]) if same_corpus else ()


def articles(lines: Iterable[str]) -> Iterator[str]:
    """Join WikiText's lines into articles; a blank row gets its source bytes, ` \\n`, back.

    A level-one heading starts an article, but only between two blank lines: lines of formulas and
    table keys look like headings too (29 of WikiText-2's 629 train candidates; with this rule the
    splits have the published 600, 60 and 60 articles).
    """
    article: list[str] = []
    for line, next_line in pairwise(chain(lines, ["no blank line"])):
        between_blanks = not next_line.strip() and not (article and article[-1].strip())
        if between_blanks and HEADING.fullmatch(line):
            yield from joined(article)
            article = []
        article.append(line if line.strip() else " \n")
    yield from joined(article)


def joined(lines: Sequence[str]) -> Iterator[str]:
    """One article, if there is anything in it, without the blank lines around it."""
    text = "".join(lines)
    if text.strip():
        yield BLANK_LINES_AROUND.sub("", text)
