"""Tokenizes a corpus directory: byte-level BPE, trained on its train split only.

    python scripts/preprocess_lm.py --input data/wikitext-2 --vocab_size 16000 --output DIR

Writes DIR/v16000/{train,validation,test}.bin (uint16, little endian), <split>_documents.npy (a row
a document: token offset, UTF-8 bytes, words), tokenizer.json and, last, meta.json. The token
<|endoftext|>, id 0, stands before each document. Vocabularies live side by side. The same corpus
gives the same bytes, whatever the number of cores.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from src.data import tokens
from src.data.corpus import SPLITS, check_split, counted_texts, read_source, script_parser
from src.data.tokenizer import END_OF_TEXT, load_tokenizer
from src.spec.command_line import Refusal
from src.spec.progress import say
from src.storage.files import (
    locked,
    make_directory,
    replace_directory,
    scratch_directory,
    sha256_of,
    write_json,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer

SCHEMA = 1
END_ID = 0
# 256 bytes and the special token; ids have to fit into uint16
SMALLEST, LARGEST = 257, 65_535
KNOWN_CHUNKS = 1_000_000  # about 200 MB
# White space and the word after it. A chunk ends only before a space or line feed that follows a
# visible character: there GPT-2's pattern cuts too (no alternative of it joins a visible character
# with white space behind it, and it looks back at nothing). Other white space does not end a chunk,
# because Python and the tokenizer differ on which characters are white space.
CHUNK = re.compile(r"\s*\S+(?:[^\S \n]\s*\S*)*|\s+")

# A run of letters, of digits, of dashes or of spaces is one word to the tokenizer, and every merge
# reads the words that it touches from end to end. Merges are learned from parts of such runs; no
# language has words of that length.
ENDLESS_WORD = r" ?\p{L}{1000}| ?\p{N}{1000}| ?[^\s\p{L}\p{N}]{1000}|\s{1000}"
# Where a text may hold one: looked for at every 500th character, which is much faster.
HALF_RUN = re.compile(r"\S{500}|\s{500}")


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--input", type=Path, required=True, help="a corpus directory")
    parser.add_argument("--output", type=Path, required=True, help="tokens go to OUTPUT/v<entries>")
    force_help = "replace tokens of another corpus, or damaged ones"
    parser.add_argument("--force", action="store_true", help=force_help)
    vocab_help = f"entries, {SMALLEST} to {LARGEST:,}: the special token, the 256 bytes and merges"
    parser.add_argument("--vocab_size", type=int, required=True, help=vocab_help)
    args = parser.parse_args()
    vocab_size: int = args.vocab_size
    if not SMALLEST <= vocab_size <= LARGEST:
        raise Refusal(
            f"--vocab_size: found {vocab_size}, expected {SMALLEST} to {LARGEST}: the 256 bytes, "
            "the special token, and ids that fit into 16 bits"
        )
    corpus: Path = args.input
    output: Path = args.output
    source = read_source(corpus)
    make_directory(output)
    final = output / f"v{vocab_size}"
    with locked(output / f".v{vocab_size}.lock"):
        if not args.force and is_finished(final, vocab_size, source):
            print(f"{final}: is there, whole and verified; nothing to do")
            return
        for split in SPLITS:
            check_split(corpus / f"{split}.jsonl", source["splits"][split]["sha256"])
        with scratch_directory(output / f".v{vocab_size}.partial") as partial:
            tokenize(corpus, source, vocab_size, partial)
            replace_directory(partial, final)
    print(f"{final}: done; name it as data.dir: {output} with model.vocab_size: {vocab_size}")


def is_finished(final: Path, vocab_size: int, source: Mapping[str, Any]) -> bool:
    """Whether `final` holds this corpus' tokens, whole. Refusal for another's or damaged ones."""
    if not final.exists():
        return False
    try:
        corpus = tokens.load(final, vocab_size).corpus
    except ValueError as error:
        raise Refusal(f"{error}, or say --force") from None
    if corpus != source:
        raise Refusal(
            f"{final}: holds tokens of {corpus.get('dataset')}, configuration "
            f"{corpus.get('config')}, expected {source.get('dataset')}, configuration "
            f"{source.get('config')}, with the hashes of its source.json; choose another --output, "
            "or --force"
        )
    return True


def tokenize(corpus: Path, source: Mapping[str, Any], vocab_size: int, folder: Path) -> None:
    """Train the tokenizer, encode the splits, and write everything into `folder`."""
    train_tokenizer(corpus / "train.jsonl", vocab_size).save(str(folder / "tokenizer.json"))
    encode = encoder(load_tokenizer(folder / "tokenizer.json"))
    splits = {split: encode_split(encode, corpus, split, folder) for split in SPLITS}
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
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=1,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    splitter = pre_tokenizers.Split(Regex(ENDLESS_WORD), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([splitter, words])
    tokenizer.train_from_iterator(_training_texts(file, splitter), trainer)
    tokenizer.pre_tokenizer = words
    size = tokenizer.get_vocab_size()
    if size != vocab_size:
        raise Refusal(
            f"{file}: gives a vocabulary of at most {size} entries, expected {vocab_size}; "
            f"ask for --vocab_size {size} or less, or take a larger corpus"
        )
    assert tokenizer.token_to_id(END_OF_TEXT) == END_ID
    return tokenizer


def _training_texts(file: Path, splitter: PreTokenizer) -> Iterator[str]:
    """The documents; says which of them merges are learned from in `parts`, and when all are read:
    the merging itself is long and says nothing."""
    lines = []
    for line, text in enumerate(counted_texts(file, "reading"), 1):
        halves = (HALF_RUN.match(text, start) for start in range(0, len(text), 500))
        if any(halves) and len(splitter.pre_tokenize_str(text)) > 1:
            lines.append(line)
        yield text
    if lines:
        say(
            f"{file}",
            f"{len(lines):,} documents have runs of 1,000 characters of a kind, the first in line "
            f"{lines[0]:,}; merges are learned from parts of them",
        )
    say(f"{file}", "merging pairs into a vocabulary")


def encode_split(
    encode: Callable[[str], bytes], corpus: Path, split: str, folder: Path
) -> dict[str, Any]:
    """Write <split>.bin and <split>_documents.npy; return what meta.json says of them."""
    file = corpus / f"{split}.jsonl"
    rows: list[tuple[int, int, int]] = []
    count = 0
    with (folder / f"{split}.bin").open("wb") as out:
        for text in counted_texts(file, "encoding"):
            ids = struct.pack("<H", END_ID) + encode(text)
            rows.append((count, len(text.encode()), len(text.split())))
            count += len(ids) // 2
            out.write(ids)
    if count == len(rows):
        raise Refusal(f"{file}: found no text in this split, expected documents; download it again")
    documents = np.array(rows, dtype="<i8")
    np.save(folder / f"{split}_documents.npy", documents)
    return {
        "file": f"{split}.bin",
        "tokens": count,
        "text_tokens": count - len(rows),
        "documents": len(rows),
        "bytes": int(documents[:, 1].sum()),
        "words": int(documents[:, 2].sum()),
        "sha256": sha256_of(folder / f"{split}.bin"),
        "documents_sha256": sha256_of(folder / f"{split}_documents.npy"),
    }


def encoder(tokenizer: Tokenizer) -> Callable[[str], bytes]:
    """A text to its ids, little-endian uint16, each distinct chunk tokenized once.

    CHUNK's pieces are small enough to repeat and cut only where the pre-tokenizer cuts, so joining
    their ids gives the tokenizer's own answer for the whole text, several times faster.
    """

    ids_of: dict[str, bytes] = {}

    def encode(text: str) -> bytes:
        chunks = CHUNK.findall(text)
        if len(ids_of) > KNOWN_CHUNKS:
            ids_of.clear()
        new = list({*chunks}.difference(ids_of))  # in any order: only the ids matter
        encoded = tokenizer.encode_batch_fast(new, add_special_tokens=False)
        for chunk, ids in zip(new, (entry.ids for entry in encoded), strict=True):
            ids_of[chunk] = struct.pack(f"<{len(ids)}H", *ids)
        return b"".join(map(ids_of.__getitem__, chunks))

    return encode
