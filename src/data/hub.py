"""Reads splits of datasets, from the Hugging Face hub or from a mirror of its layout.

A mirror's parquet files are read one by one and only in the columns asked for, so that a refusal
can name file, split, column and type, and what nobody reads cannot be in the way.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from src.spec.command_line import Refusal
from src.spec.progress import has_terminal

if TYPE_CHECKING:
    import pyarrow as pa

MIRROR_HELP = (
    "a directory laid out like the hub, <owner>/<name>/<config>/<split>-00000-of-00001.parquet "
    "(default: $HUB_MIRROR, else the hub itself)"
)
PROBE_SECONDS = 10
ROWS_AT_ONCE = 256
# The hub converts datasets that are still defined by a Python script to parquet on this branch.
CONVERTED = "refs/convert/parquet"
# One of a split's files; old ones end in a hash of their own.
SHARD = re.compile(r"(?P<split>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(-[0-9a-f]+)?\.[^/]+")
LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One file of a split. `rows` reads the columns it is given."""

    name: str
    schema: pa.Schema
    length: int
    rows: Callable[[list[str]], Iterator[dict[str, Any]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """The files of one split in order; they may differ in columns that nobody reads."""

    name: str
    parts: list[Part]

    def __len__(self) -> int:
        return sum(part.length for part in self.parts)

    @property
    def columns(self) -> list[str]:
        """What every file has."""
        first, *others = (part.schema.names for part in self.parts)
        return [name for name in first if all(name in other for other in others)]

    def holds(self, column: str, suits: Callable[[pa.DataType], bool]) -> bool:
        """Whether a column that every file has has a suitable type in all of them."""
        return all(suits(part.schema.field(column).type) for part in self.parts)

    def rows(
        self, columns: Sequence[str], suits: Callable[[pa.DataType], bool], expected: str
    ) -> Iterator[dict[str, Any]]:
        """Rows of these columns; Refusal, before the first, names the file that cannot give one."""
        for part in self.parts:
            where = f"{part.name}, split {self.name}"
            for column in columns:
                if part.schema.names.count(column) != 1:
                    raise Refusal(
                        f"{where}: found the columns {', '.join(part.schema.names)}, "
                        f"expected one called {column}"
                    )
                kind = part.schema.field(column).type
                if not suits(kind):
                    raise Refusal(f"{where}, column {column}: found {kind}, expected {expected}")
        return (row for part in self.parts for row in part.rows(list(columns)))

    def texts(self, columns: Sequence[str]) -> Iterator[dict[str, str]]:
        """Rows of columns that hold text; a missing text is empty."""
        for row in self.rows(columns, is_text, "text"):
            yield {column: row[column] or "" for column in columns}


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """Splits of one dataset, and where they are from."""

    splits: dict[str, Split]
    dataset: str
    config: str
    revision: str | None  # the hub's commit; None from a mirror
    licence: str | None

    def source(self, splits: dict[str, Any]) -> dict[str, Any]:
        """source.json's content, `splits` being what was written of them."""
        return {
            "dataset": self.dataset,
            "config": self.config,
            "revision": self.revision,
            "mirror": self.revision is None,
            "licence": self.licence,
            "splits": splits,
        }


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds texts or nothing."""
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return any(
        is_kind(kind)
        for is_kind in (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    )


def is_plain(kind: pa.DataType) -> bool:
    """Whether JSON holds this type as it is: texts, numbers, lists and structs of them."""
    from pyarrow import types

    if types.is_struct(kind):
        return all(is_plain(field.type) for field in kind)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return is_plain(kind.value_type)
    return (
        is_text(kind) or types.is_boolean(kind) or types.is_integer(kind) or types.is_floating(kind)
    )


def find_mirror(argument: str | None) -> Path | None:
    """The mirror that `--mirror` or HUB_MIRROR names; Refusal where it is no directory."""
    named = argument or os.environ.get("HUB_MIRROR")
    if not named:
        return None
    mirror = Path(named)
    if not mirror.is_dir():
        raise Refusal(f"{mirror}: found no such directory, expected {MIRROR_HELP}")
    return mirror


def load(
    path: str, config: str | None, wanted: tuple[str, ...], mirror: Path | None, cache: Path
) -> Loaded:
    """Load the `wanted` splits of hub dataset `path`; `config` None takes its only or default one.

    `cache` is a scratch directory that must outlive the use of the result. Raises Refusal for a
    dataset, configuration or split that is not there, naming what is, and for a hub that cannot be
    reached; OSError where a transfer breaks off.
    """
    if mirror is not None:
        return _load_mirrored(path, config, wanted, mirror)
    return _load_from_hub(path, config, wanted, cache)


def check_shards(where: str, files: Iterable[str]) -> None:
    """Refusal where numbered files are missing or doubled: part of a corpus is another corpus."""
    numbered: dict[str, list[tuple[int, int]]] = {}
    for file in files:
        if shard := SHARD.fullmatch(file):
            numbered.setdefault(shard["split"], []).append(
                (int(shard["number"]), int(shard["count"]))
            )
    for split, found in numbered.items():
        count = max(count for _, count in found)
        if sorted(found) != [(number, count) for number in range(count)]:
            names = ", ".join(f"{number:05d}-of-{count:05d}" for number, count in sorted(found)[:8])
            raise Refusal(
                f"{where}: {split}: found {len(found)} files ({names}), expected each of "
                f"00000-of-{count:05d} to {count - 1:05d}-of-{count:05d} once; fetch what is "
                "missing, or remove the files of another version"
            )


def _load_mirrored(path: str, config: str | None, wanted: tuple[str, ...], mirror: Path) -> Loaded:
    folder = mirror / path
    found = {f.name: _mirrored_splits(f) for f in sorted(folder.glob("*")) if f.is_dir()}
    if not any(found.values()):
        raise Refusal(f"{path}: the mirror {mirror} does not have this dataset; use another mirror")
    shelf = "; ".join(f"{name} ({', '.join(splits)})" for name, splits in found.items() if splits)
    if config is None:
        config = "default" if "default" in found or len(found) > 1 else next(iter(found))
    if config not in found:
        raise Refusal(f"{path}: the mirror has no configuration {config!r}; it has {shelf}")
    missing = [split for split in wanted if split not in found[config]]
    if missing:
        raise Refusal(
            f"{path}, configuration {config}: the mirror lacks the split {', '.join(missing)}; "
            f"complete or not, it has {shelf}"
        )
    splits = {}
    for split in wanted:
        files = found[config][split]
        check_shards(str(folder / config), [file.name for file in files])
        splits[split] = Split(name=split, parts=[_open(file, split) for file in files])
    return Loaded(
        splits=splits, dataset=path, config=config, revision=None, licence=_licence(folder)
    )


def _mirrored_splits(folder: Path) -> dict[str, list[Path]]:
    """The splits of one configuration's folder, each with its parquet files in order."""
    splits: dict[str, list[Path]] = {}
    for file in sorted(folder.glob("*.parquet")):
        shard = SHARD.fullmatch(file.name)
        if shard is None:
            raise Refusal(f"{file}: found this name, expected {MIRROR_HELP.partition(' (')[0]}")
        splits.setdefault(shard["split"], []).append(file)
    return splits


def _open(file: Path, split: str) -> Part:
    import pyarrow.parquet as pq

    with _sound(file, split):
        opened = pq.ParquetFile(file)

    def rows(columns: list[str]) -> Iterator[dict[str, Any]]:
        with _sound(file, split):
            for batch in opened.iter_batches(ROWS_AT_ONCE, columns=columns):
                yield from batch.to_pylist()

    return Part(
        name=str(file), schema=opened.schema_arrow, length=opened.metadata.num_rows, rows=rows
    )


@contextlib.contextmanager
def _sound(file: Path, split: str) -> Iterator[None]:
    """Refusal for a file that is not whole parquet; the disk's own errors pass through."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        with file.open("rb") as data:
            start = data.read(len(LFS_POINTER))
        what = {b"": "an empty file", LFS_POINTER: "a Git LFS pointer"}.get(
            start, f"a damaged file ({' '.join(str(error).split())})"
        )
        raise Refusal(
            f"{file}, split {split}: found {what}, expected parquet; fetch it again"
        ) from None


def _licence(folder: Path) -> str | None:
    """The licence in the header of a dataset's README; no reason to refuse sound data."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
        parts = text.split("---\n")
        # BaseLoader: every scalar is a text, also one that looks like a date
        header = yaml.load(parts[1], yaml.BaseLoader) if text.startswith("---\n") else None
    except (FileNotFoundError, UnicodeDecodeError, yaml.YAMLError, ValueError, RecursionError):
        return None
    return _licence_text(header.get("license")) if isinstance(header, dict) else None


def _licence_text(stated: Any) -> str | None:
    named = stated if isinstance(stated, list) else [stated]
    return ", ".join(name for name in named if isinstance(name, str)) or None


def _load_from_hub(path: str, config: str | None, wanted: tuple[str, ...], cache: Path) -> Loaded:
    _require_hub(path)
    import datasets
    from datasets.exceptions import DatasetsError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    if not has_terminal():
        datasets.disable_progress_bars()
    # The first base is the HTTP library's own error, whichever library this version uses.
    transport_errors: Any = HfHubHTTPError.__bases__
    try:
        info = HfApi().dataset_info(path, timeout=PROBE_SECONDS)
        try:
            kept = {"revision": info.sha, "cache_dir": str(cache)}
            files = datasets.load_dataset_builder(path, config, **kept).config.data_files or {}
            for split in wanted:
                check_shards(f"{path} on the hub", files.get(split, ()))
            loaded = datasets.load_dataset(path, config, **kept)
            revision = info.sha
        except RuntimeError as error:
            if "scripts are no longer supported" not in str(error):
                raise
            loaded, revision, config = _load_converted(path, config, wanted, cache)
    except Refusal:
        raise
    except (RepositoryNotFoundError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise Refusal(f"{path}: the hub has no dataset of this name ({reason})") from None
    except (DatasetsError, ValueError, FileNotFoundError) as error:
        # unknown configuration; no data files; files that are damaged or differ in their columns
        cause = error.__cause__ or error
        if isinstance(cause, (*transport_errors, OSError)) and cause is not error:
            raise OSError(f"{path} from the hub: {cause}") from error
        reason = " ".join(str(cause).split())
        raise Refusal(f"{path}: the hub cannot give configuration {config}: {reason}") from None
    except transport_errors as error:
        raise OSError(f"{path} from the hub: {error}") from error
    missing = [split for split in wanted if split not in loaded]
    if missing:
        raise Refusal(
            f"{path}, configuration {config}: the hub lacks the split {', '.join(missing)}; "
            f"it has {', '.join(loaded)}"
        )
    card = info.card_data.to_dict() if info.card_data else {}
    return Loaded(
        splits={split: _from_dataset(path, split, loaded[split]) for split in wanted},
        dataset=path,
        config=config or loaded[wanted[0]].info.config_name,
        revision=revision,
        licence=_licence_text(card.get("license")),
    )


def _from_dataset(path: str, split: str, dataset: Any) -> Split:
    """What `datasets` loaded, as one part."""

    def rows(columns: list[str]) -> Iterator[dict[str, Any]]:
        tables = dataset.select_columns(columns).with_format("arrow").iter(ROWS_AT_ONCE)
        for table in tables:
            yield from table.to_pylist()

    schema = dataset.features.arrow_schema
    return Split(name=split, parts=[Part(name=path, schema=schema, length=len(dataset), rows=rows)])


def _load_converted(
    path: str, config: str | None, wanted: tuple[str, ...], cache: Path
) -> tuple[Any, str, str]:
    """A dataset of the script era, from the hub's own parquet copy: <config>/<split>/*.parquet."""
    import datasets
    from huggingface_hub import HfApi

    info = HfApi().dataset_info(path, revision=CONVERTED, timeout=PROBE_SECONDS)
    names = sorted(
        file.rfilename for file in info.siblings or [] if file.rfilename.endswith(".parquet")
    )
    configs = sorted({name.split("/")[0] for name in names})
    if config is None:
        config = configs[0] if len(configs) == 1 else "default"
    files = {}
    for split in wanted:
        found = [name for name in names if name.startswith(f"{config}/{split}/")]
        if not found:
            raise Refusal(
                f"{path}: the hub has no split {split} of configuration {config}; "
                f"it has the configurations {', '.join(configs)}"
            )
        if found != [f"{config}/{split}/{number:04d}.parquet" for number in range(len(found))]:
            raise Refusal(f"{path}: found {', '.join(found)}, expected 0000.parquet and so on")
        files[split] = [f"hf://datasets/{path}@{info.sha}/{name}" for name in found]
    loaded = datasets.load_dataset("parquet", data_files=files, cache_dir=str(cache))
    return loaded, str(info.sha), config


@functools.cache
def _require_hub(path: str) -> None:
    """Refusal within seconds where there is no hub: its client would retry for minutes."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    way_out = (
        "connect, or name a mirror with --mirror or HUB_MIRROR, then run the same command again"
    )
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise Refusal(f"{path}: HF_HUB_OFFLINE forbids the hub and no mirror is named; {way_out}")
    try:
        with urllib.request.urlopen(endpoint, timeout=PROBE_SECONDS):
            pass
    except urllib.error.HTTPError:
        pass  # it answers; what it thinks of this page is not the question
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise Refusal(
            f"{path}: the hub {endpoint} cannot be reached ({reason}) and no mirror is named; "
            f"{way_out}"
        ) from None
