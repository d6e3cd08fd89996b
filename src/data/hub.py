"""Finds the files of a dataset's splits, on the Hugging Face hub or in a mirror of its layout."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from src.data.parquet import Split
from src.spec.command_line import Refusal
from src.spec.progress import has_terminal

MIRROR_HELP = (
    "a directory laid out like the hub, <owner>/<name>/<config>/<split>-00000-of-00001.parquet "
    "(default: $HUB_MIRROR, else the hub itself)"
)
ANSWER_SECONDS = 10
# The hub converts datasets that are still defined by a Python script to parquet on this branch.
CONVERTED = "refs/convert/parquet"
# One of a split's files; old ones end in a hash of their own.
SHARD = re.compile(r"(?P<split>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(-[0-9a-f]+)?\.[^/]+")


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


def find_mirror(argument: str | None) -> Path | None:
    """The mirror that `--mirror` or HUB_MIRROR names; Refusal where it is no directory."""
    named = argument or os.environ.get("HUB_MIRROR")
    if named and not Path(named).is_dir():
        raise Refusal(f"{where(Path(named))}: found no such directory, expected {MIRROR_HELP}")
    return Path(named) if named else None


def where(mirror: Path | None) -> str:
    """The source as a user knows it: who named a mirror, and which directory that is from here."""
    if mirror is None:
        return "the hub"
    by_environment = os.environ.get("HUB_MIRROR") == str(mirror)
    return f"the mirror {mirror.absolute()}{' (from HUB_MIRROR)' if by_environment else ''}"


def load(
    path: str, config: str | None, wanted: tuple[str, ...], mirror: Path | None, cache: Path
) -> Loaded:
    """The `wanted` splits of hub dataset `path`; `config` None takes its only or default one.

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
    """By the layout alone: a README that `datasets` cannot read is no reason to refuse the data."""
    folder = mirror / path
    found = {f.name: _mirrored_splits(f) for f in sorted(folder.glob("*")) if f.is_dir()}
    if not any(found.values()):
        raise Refusal(f"{path}: {where(mirror)} does not have this dataset; use another mirror")
    shelf = "; ".join(f"{name} ({', '.join(splits)})" for name, splits in found.items() if splits)
    if config is None:
        config = "default" if "default" in found or len(found) > 1 else next(iter(found))
    if config not in found:
        raise Refusal(f"{path}: {where(mirror)} has no configuration {config!r}; it has {shelf}")
    missing = [split for split in wanted if split not in found[config]]
    if missing:
        raise Refusal(
            f"{path}, configuration {config}: {where(mirror)} lacks the split "
            f"{', '.join(missing)}; complete or not, it has {shelf}"
        )
    for split in wanted:
        check_shards(str(folder / config), [file.name for file in found[config][split]])
    splits = {split: Split(split, found[config][split]) for split in wanted}
    licence = _licence(folder)
    return Loaded(splits=splits, dataset=path, config=config, revision=None, licence=licence)


def _mirrored_splits(folder: Path) -> dict[str, list[Path]]:
    """The splits of one configuration's folder, each with its parquet files in order."""
    splits: dict[str, list[Path]] = {}
    for file in sorted(folder.glob("*.parquet")):
        shard = SHARD.fullmatch(file.name)
        if shard is None:
            raise Refusal(f"{file}: found this name, expected {MIRROR_HELP.partition(' (')[0]}")
        splits.setdefault(shard["split"], []).append(file)
    return splits


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
    from huggingface_hub import HfApi, utils

    if not has_terminal():
        datasets.disable_progress_bars()
        utils.disable_progress_bars()
    with _hub_errors(path, config):
        info = HfApi().dataset_info(path, timeout=ANSWER_SECONDS)
        revision = str(info.sha)
        try:
            config, files = _hub_files(path, config, revision, cache)
        except RuntimeError as error:
            if "scripts are no longer supported" not in str(error):
                raise
            config, files, revision = _converted_files(path, config)
        missing = [split for split in wanted if split not in files]
        if missing:
            raise Refusal(
                f"{path}, configuration {config}: the hub lacks the split {', '.join(missing)}; "
                f"it has {', '.join(files)}"
            )
        splits = {}
        for split in wanted:
            check_shards(f"{path} on the hub", files[split])
            splits[split] = _fetch(path, config, split, files[split], revision, cache)
    card = info.card_data.to_dict() if info.card_data else {}
    licence = _licence_text(card.get("license"))
    return Loaded(splits=splits, dataset=path, config=config, revision=revision, licence=licence)


def _hub_files(
    path: str, config: str | None, revision: str, cache: Path
) -> tuple[str, dict[str, list[str]]]:
    """The configuration and its splits' files in the repository, as `datasets` resolves them."""
    import datasets

    found = datasets.load_dataset_builder(path, config, revision=revision, cache_dir=str(cache))
    listed = found.config.data_files or {}
    return str(found.config.name), {
        str(split): [url.partition(f"@{revision}/")[2] for url in urls]
        for split, urls in listed.items()
    }


def _converted_files(path: str, config: str | None) -> tuple[str, dict[str, list[str]], str]:
    """The same, and the commit, of a dataset of the script era: the hub's own parquet copy of it,
    <config>/<split>/*.parquet."""
    from huggingface_hub import HfApi

    info = HfApi().dataset_info(path, revision=CONVERTED, timeout=ANSWER_SECONDS)
    configs: dict[str, dict[str, list[str]]] = {}
    for name in sorted(file.rfilename for file in info.siblings or []):
        if name.endswith(".parquet"):
            configuration, split, _ = name.split("/")
            configs.setdefault(configuration, {}).setdefault(split, []).append(name)
    config = config or (next(iter(configs)) if len(configs) == 1 else "default")
    if config not in configs:
        raise Refusal(
            f"{path}: the hub has no configuration {config!r}; it has {', '.join(configs)}"
        )
    return config, configs[config], str(info.sha)


def _fetch(
    path: str, config: str, split: str, names: list[str], revision: str, cache: Path
) -> Split:
    """Download one split; what is not parquet, `datasets` reads first."""
    import datasets
    from huggingface_hub import hf_hub_download

    kept: Any = {"revision": revision, "cache_dir": str(cache)}
    if all(name.endswith(".parquet") for name in names):
        files = [hf_hub_download(path, name, repo_type="dataset", **kept) for name in names]
        return Split(split, [Path(file) for file in files])
    file = cache / f"{split}.parquet"
    datasets.load_dataset(path, config, split=split, **kept).to_parquet(str(file))
    return Split(split, [file])


@contextlib.contextmanager
def _hub_errors(path: str, config: str | None) -> Iterator[None]:
    """What the hub's client raises, as a Refusal, or as an OSError where a transfer broke off."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub import errors

    # The first base is the HTTP library's own error, whichever library this version uses.
    transport_errors: Any = errors.HfHubHTTPError.__bases__
    try:
        yield
    except Refusal:
        raise
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise Refusal(f"{path}: the hub has no dataset of this name ({reason})") from None
    except (DatasetsError, ValueError, FileNotFoundError) as error:
        # unknown configuration; no data files; files that are damaged
        cause = error.__cause__ or error
        if isinstance(cause, (*transport_errors, OSError)) and cause is not error:
            raise OSError(f"{path} from the hub: {cause}") from error
        reason = " ".join(str(cause).split())
        raise Refusal(f"{path}: the hub cannot give configuration {config}: {reason}") from None
    except transport_errors as error:
        raise OSError(f"{path} from the hub: {error}") from error


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
        with urllib.request.urlopen(endpoint, timeout=ANSWER_SECONDS):
            pass
    except urllib.error.HTTPError:
        pass  # it answers; what it thinks of this page is not the question
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise Refusal(
            f"{path}: the hub {endpoint} cannot be reached ({reason}) and no mirror is named; "
            f"{way_out}"
        ) from None
