"""Tokenizes a corpus directory: byte-level BPE, trained on its train split only.

    python scripts/preprocess_lm.py --input data/wikitext-2 --vocab_size 16000 --output DIR

Writes DIR/v16000/{train,validation,test}.bin (uint16, little endian), <split>_documents.npy (a row
a document: token offset, UTF-8 bytes, words), tokenizer.json and, last, meta.json. The token
<|endoftext|>, id 0, stands before each document. Vocabularies live side by side. The same corpus
gives the same bytes, whatever the number of cores.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.data.corpus import SPLITS, check_split, read_source, read_texts
from src.data.tokenizer import END_OF_TEXT, load_tokenizer
from src.spec.command_line import Parser, Refusal
from src.spec.progress import Progress, say
from src.storage.files import (
    fsync_directory,
    locked,
    make_directory,
    read_json,
    sha256_of,
    workshop,
    write_json,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer

SCHEMA = 1
END_ID = 0
# 256 bytes and the special token; ids have to fit into uint16
SMALLEST, LARGEST = 257, 65_535
BATCH_CHARACTERS = 2_000_000  # keeps the tokenizer's records of a batch to some tens of MB
PIECE_CHARACTERS = 200_000
KNOWN_CHUNKS = 1_000_000  # about 200 MB
# White space and the word after it. A chunk ends only before a space or line feed that follows a
# visible character: there GPT-2's pattern cuts too (no alternative of it joins a visible character
# with white space behind it, and it looks back at nothing). Other white space does not end a chunk,
# because Python and the tokenizer differ on which characters are white space.
CHUNK = re.compile(r"\s*\S+(?:[^\S \n]\s*\S*)*|\s+")

# No language has longer words; the tokenizer's own words are looked for in such stretches alone.
RUN_CHARACTERS = 1_000
LONG_RUN = re.compile(rf"(?<![^ \n])[^ \n]{{{RUN_CHARACTERS},}}|(?<!\s)\s{{{RUN_CHARACTERS},}}")
HALF = RUN_CHARACTERS // 2  # the least of a run that stands between two multiples of itself
HALF_RUN = re.compile(rf"[^ \n]{{{HALF}}}|\s{{{HALF}}}")


def main() -> None:
    parser = Parser(
        __doc__.partition("\n")[0],
        example="python scripts/preprocess_lm.py --input data/wikitext-2 --vocab_size 16000 "
        "--output data/lm_tokenized",
    )
    parser.add_argument(
        "--input", type=Path, required=True, help="a corpus directory of download_wikitext.py"
    )
    parser.add_argument(
        "--vocab_size",
        type=int,
        required=True,
        help=f"entries, {SMALLEST} to {LARGEST:,}, the special token and the 256 bytes among them",
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="tokens go to <output>/v<vocab_size>"
    )
    parser.add_argument(
        "--force", action="store_true", help="replace tokens of another corpus, or damaged ones"
    )
    arguments = parser.parse_args()
    vocab_size: int = arguments.vocab_size
    if not SMALLEST <= vocab_size <= LARGEST:
        raise Refusal(
            f"--vocab_size: found {vocab_size}, expected {SMALLEST} to {LARGEST}: the 256 bytes, "
            "the special token, and ids that fit into 16 bits"
        )
    corpus: Path = arguments.input
    output: Path = arguments.output
    source = read_source(corpus)
    make_directory(output)
    final = output / f"v{vocab_size}"
    with locked(output / f".v{vocab_size}.lock"):
        if not arguments.force and is_finished(final, source):
            print(f"{final}: is there, whole and verified; nothing to do")
            return
        for split in SPLITS:
            check_split(corpus / f"{split}.jsonl", source["splits"][split]["sha256"])
        with workshop(output / f".v{vocab_size}.partial") as partial:
            tokenize(corpus, source, vocab_size, partial)
            replace_directory(partial, final)
    print(f"{final}: done; name it as data.dir: {output} with model.vocab_size: {vocab_size}")


def is_finished(final: Path, source: Mapping[str, Any]) -> bool:
    """Whether `final` holds this corpus' tokens, whole. Refusal for another's or damaged ones."""
    if not final.exists():
        return False
    try:
        meta = read_json(final / "meta.json")
        held = meta["corpus"]
        hashes = {"tokenizer.json": meta["tokenizer_sha256"]}
        for split, facts in meta["splits"].items():
            hashes[facts["file"]] = facts["sha256"]
            hashes[f"{split}_documents.npy"] = facts["documents_sha256"]
        damaged = [name for name, sha256 in hashes.items() if sha256_of(final / name) != sha256]
    except (OSError, KeyError, TypeError) as error:
        held, damaged = source, [f"meta.json or a file that it lists ({error})"]
    if held != source:
        raise Refusal(
            f"{final}: holds tokens of {held.get('dataset')}, configuration {held.get('config')}, "
            f"expected {source.get('dataset')}, configuration {source.get('config')}, with the "
            "hashes of its source.json; choose another --output, or --force"
        )
    if damaged:
        raise Refusal(
            f"{final}: found {', '.join(damaged)} missing or changed, expected what meta.json "
            "says; --force makes the tokens again"
        )
    return True


def pieces(text: str, size: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Cut a long text where CHUNK would cut, so that one endless document stays affordable."""
    start = 0
    while len(text) - start > size:
        cut = start + size
        while cut < len(text) and (text[cut] not in " \n" or text[cut - 1].isspace()):
            cut += 1
        yield text[start:cut]
        start = cut
    yield text[start:]


def tokenize(corpus: Path, source: Mapping[str, Any], vocab_size: int, folder: Path) -> None:
    """Train the tokenizer, encode the splits, and write everything into `folder`."""
    train_tokenizer(corpus / "train.jsonl", vocab_size).save(str(folder / "tokenizer.json"))
    encoder = Encoder(load_tokenizer(folder / "tokenizer.json"))
    splits = {split: encode_split(encoder, corpus, split, folder) for split in SPLITS}
    for split, facts in splits.items():
        print(f"{split}: {facts['tokens']:,} tokens, {facts['documents']:,} documents", flush=True)
    meta = {
        "schema": SCHEMA,
        "vocab_size": vocab_size,
        "tokenizer_sha256": sha256_of(folder / "tokenizer.json"),
        "eot_id": END_ID,
        "corpus": source,
        "splits": splits,
    }
    write_json(folder / "meta.json", meta)


def train_tokenizer(file: Path, vocab_size: int) -> Tokenizer:
    """Byte-level BPE with exactly `vocab_size` entries; Refusal if the text has too few merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=1,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = learned_from(file, tokenizer.pre_tokenizer)
    tokenizer.train_from_iterator(batches(texts, file), trainer)
    size = tokenizer.get_vocab_size()
    if size != vocab_size:
        raise Refusal(
            f"{file}: gives a vocabulary of at most {size} entries, expected {vocab_size}; "
            f"ask for --vocab_size {size} or less, or take a larger corpus"
        )
    assert tokenizer.token_to_id(END_OF_TEXT) == END_ID
    return tokenizer


def learned_from(file: Path, pre_tokenizer: PreTokenizer) -> Iterator[str]:
    """The documents, in pieces that merges can be learned from in bearable time.

    A run of letters, of spaces or of dashes is one word to the tokenizer, and every merge reads
    the words that it touches from end to end. Only what merges are learned from is cut, and named.
    """
    documents, longest, where = 0, 0, 0
    for number, text in enumerate(read_texts(file), 1):
        runs = long_words(text, pre_tokenizer)
        documents += bool(runs)
        start = 0
        for begin, end in runs:
            if end - begin > longest:
                longest, where = end - begin, number
            for cut in range(begin, end, RUN_CHARACTERS):
                yield from pieces(text[start:cut])
                start = cut
            yield text[start:end]
            start = end
        yield from pieces(text[start:])
    if documents:
        say(
            f"{file}",
            f"{documents:,} documents have runs of more than {RUN_CHARACTERS:,} characters of one "
            f"kind (letters, spaces, dashes), the longest with {longest:,} in line {where:,}; "
            "merges are learned from parts of such runs",
        )


def long_words(text: str, pre_tokenizer: PreTokenizer) -> list[tuple[int, int]]:
    """Where the tokenizer's words of more than RUN_CHARACTERS stand."""
    if not any(HALF_RUN.match(text, at) for at in range(0, len(text), HALF)):
        return []  # 20 times faster than the search, and the answer for nearly every text
    return [
        (run.start() + begin, run.start() + end)
        for run in LONG_RUN.finditer(text)
        for _, (begin, end) in pre_tokenizer.pre_tokenize_str(run[0])
        if end - begin > RUN_CHARACTERS
    ]


def batches(texts: Iterator[str], file: Path) -> Iterator[list[str]]:
    """Group texts up to about BATCH_CHARACTERS, and say how far they are (characters for bytes)."""
    batch: list[str] = []
    size = 0
    with Progress(f"{file}: reading", file.stat().st_size / 1e6, "MB") as progress:
        for text in texts:
            batch.append(text)
            size += len(text)
            if size >= BATCH_CHARACTERS:
                yield batch
                progress.advance(size / 1e6)
                batch, size = [], 0
        yield batch
    say(f"{file}", "merging pairs into a vocabulary")


def encode_split(encoder: Encoder, corpus: Path, split: str, folder: Path) -> dict[str, Any]:
    """Write <split>.bin and <split>_documents.npy; return what meta.json says of them."""
    import numpy as np

    file = corpus / f"{split}.jsonl"
    rows: list[tuple[int, int, int]] = []
    tokens = 0
    with ExitStack() as stack:
        out = stack.enter_context((folder / f"{split}.bin").open("wb"))
        progress = stack.enter_context(
            Progress(f"{file}: encoding", file.stat().st_size / 1e6, "MB")
        )
        for text in read_texts(file):
            ids = encoder.encode(text)
            rows.append((tokens, len(text.encode()), len(text.split())))
            tokens += 1 + len(ids) // 2
            out.write(as_uint16([END_ID]) + ids)
            progress.advance(len(text) / 1e6)
        out.flush()
        os.fsync(out.fileno())
    if tokens == len(rows):
        raise Refusal(f"{file}: found no text in this split, expected documents; download it again")
    documents = np.array(rows, dtype="<i8")
    np.save(folder / f"{split}_documents.npy", documents)
    return {
        "file": f"{split}.bin",
        "tokens": tokens,
        "text_tokens": tokens - len(rows),
        "documents": len(rows),
        "bytes": int(documents[:, 1].sum()),
        "words": int(documents[:, 2].sum()),
        "sha256": sha256_of(folder / f"{split}.bin"),
        "documents_sha256": sha256_of(folder / f"{split}_documents.npy"),
    }


class Encoder:
    """Texts to token ids, each distinct chunk tokenized once.

    CHUNK's pieces are small enough to repeat and cut only where the pre-tokenizer cuts, so joining
    their ids gives the tokenizer's own answer for the whole text, several times faster.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.known: dict[str, bytes] = {}

    def encode(self, text: str) -> bytes:
        """The ids of a text, little-endian uint16."""
        return b"".join(self._encode(piece) for piece in pieces(text))

    def _encode(self, text: str) -> bytes:
        chunks = CHUNK.findall(text)
        new = list(set(chunks).difference(self.known))  # in any order: only the ids matter
        if len(self.known) + len(new) > KNOWN_CHUNKS:
            self.known.clear()
            new = list(set(chunks))
        encoded = self.tokenizer.encode_batch_fast(new, add_special_tokens=False)
        self.known.update(zip(new, (as_uint16(entry.ids) for entry in encoded), strict=True))
        return b"".join(map(self.known.__getitem__, chunks))


def as_uint16(ids: list[int]) -> bytes:
    """Ids as little-endian uint16; numpy's cast would wrap 70,000 to 4,464 without a word."""
    assert not ids or 0 <= min(ids) <= max(ids) <= LARGEST
    return struct.pack(f"<{len(ids)}H", *ids)


def replace_directory(new: Path, final: Path) -> None:
    """Rename a finished directory to its name; one that has the name already gives way whole."""
    for path in new.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    fsync_directory(new)
    if final.exists():
        with workshop(final.with_name(f".{final.name}.replaced")) as old:
            os.rename(final, old / final.name)
            os.rename(new, final)
    else:
        os.rename(new, final)
    fsync_directory(final.parent)
