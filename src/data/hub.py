"""Finds the files of a dataset's splits, on the Hugging Face hub or in a mirror of its layout."""

from __future__ import annotations

import contextlib
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
Loaded = tuple[dict[str, Split], dict[str, Any]]
Configurations = Mapping[str, Mapping[str, Sequence[str]]]  # files by configuration and split


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
    path: str, config: str | None, wanted: Sequence[str], mirror: Path | None, cache: Path
) -> Loaded:
    """The `wanted` splits of hub dataset `path`, and what source.json says of where they are from;
    `config` None takes its only or default one.

    `cache` is a scratch directory that must outlive the use of the result. Raises Refusal for a
    dataset, configuration or split that is not there, naming what is, and for a hub that cannot be
    reached; OSError where a transfer breaks off.
    """
    if mirror is not None:
        return _load_mirrored(path, config, wanted, mirror)
    with _hub_errors(path, config):
        return _load_from_hub(path, config, wanted, cache)


def _choose(
    path: str, config: str | None, wanted: Sequence[str], found: Configurations, place: str
) -> str:
    """The configuration asked for, the only or the default one; Refusal where that or a split of it
    is not there, or not whole."""
    shelf = "; ".join(f"{name} ({', '.join(splits)})" for name, splits in found.items())
    config = config or (next(iter(found)) if len(found) == 1 else "default")
    if config not in found:
        raise Refusal(f"{path}: {place} has no configuration {config!r}; it has {shelf}")
    if missing := [split for split in wanted if split not in found[config]]:
        raise Refusal(
            f"{path}, configuration {config}: {place} lacks the split {', '.join(missing)}; "
            f"complete or not, it has {shelf}"
        )
    for split in wanted:
        check_shards(path, found[config][split])
    return config


def check_shards(path: str, files: Iterable[str]) -> None:
    """Refusal where numbered files are missing or doubled: part of a corpus is another corpus."""
    numbered: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for shard in filter(None, map(SHARD.fullmatch, files)):
        numbered[shard["split"]].append((int(shard["number"]), int(shard["count"])))
    for split, found in numbered.items():
        count = max(count for _, count in found)
        if sorted(found) != [(number, count) for number in range(count)]:
            names = ", ".join(f"{number:05d}-of-{count:05d}" for number, count in sorted(found)[:8])
            raise Refusal(
                f"{path}: {split}: found {len(found)} files ({names}), expected each of "
                f"00000-of-{count:05d} to {count - 1:05d}-of-{count:05d} once; fetch what is "
                "missing, or remove the files of another version"
            )


def _load_mirrored(path: str, config: str | None, wanted: Sequence[str], mirror: Path) -> Loaded:
    """By the layout alone: a README that `datasets` cannot read is no reason to refuse the data."""
    folder = mirror / path
    found = {f.name: held for f in sorted(folder.glob("*")) if (held := _mirrored_splits(f))}
    if not found:
        raise Refusal(f"{path}: {where(mirror)} does not have this dataset; use another mirror")
    config = _choose(path, config, wanted, found, where(mirror))
    files = {split: [Path(file) for file in found[config][split]] for split in wanted}
    splits = {split: Split(split, files[split]) for split in wanted}
    return splits, _origin(config, None, _licence(folder))


def _mirrored_splits(folder: Path) -> dict[str, list[str]]:
    """The splits of one configuration's folder, each with its parquet files in order."""
    splits: dict[str, list[str]] = defaultdict(list)
    for file in sorted(folder.glob("*.parquet")):
        shard = SHARD.fullmatch(file.name)
        if shard is None:
            raise Refusal(f"{file}: found this name, expected {MIRROR_HELP.partition(' (')[0]}")
        splits[shard["split"]].append(str(file))
    return splits


def _origin(config: str, revision: str | None, licence: Any) -> dict[str, Any]:
    stated = licence if isinstance(licence, list) else [licence]
    named = ", ".join(name for name in stated if isinstance(name, str)) or None
    return {"config": config, "revision": revision, "mirror": revision is None, "licence": named}


def _licence(folder: Path) -> Any:
    """The licence in the header of a dataset's README; no reason to refuse sound data."""
    try:
        start, header, *_ = (folder / "README.md").read_text(encoding="utf-8").split("---\n")
        # BaseLoader: every scalar is a text, also one that looks like a date
        stated = None if start else yaml.load(header, yaml.BaseLoader)
    except (FileNotFoundError, ValueError, yaml.YAMLError, RecursionError):
        return None
    return stated.get("license") if isinstance(stated, dict) else None


def _load_from_hub(path: str, config: str | None, wanted: Sequence[str], cache: Path) -> Loaded:
    import datasets
    from huggingface_hub import utils

    if not has_terminal():
        datasets.disable_progress_bars()
        utils.disable_progress_bars()
    info = _dataset_info(path)
    revision = str(info.sha)
    try:
        found = datasets.load_dataset_builder(
            path, config, revision=revision, cache_dir=str(cache)
        ).config
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        revision, configs = _converted_files(path)
    else:
        config, listed = str(found.name), found.data_files or {}
        configs = {
            config: {
                str(split): [url.partition(f"@{revision}/")[2] for url in urls]
                for split, urls in listed.items()
            }
        }
    config = _choose(path, config, wanted, configs, "the hub")
    files = configs[config]
    splits = {split: _fetch(path, config, split, files[split], revision, cache) for split in wanted}
    card = info.card_data.to_dict() if info.card_data else {}
    return splits, _origin(config, revision, card.get("license"))


def _dataset_info(path: str, revision: str | None = None) -> Any:
    """The hub's answer; Refusal within seconds where there is no hub: other calls would retry for
    minutes."""
    from huggingface_hub import HfApi, errors

    hub = HfApi()
    # Its bases are the HTTP library's own error, whichever library this version uses, and OSError.
    transport_errors: Any = errors.HfHubHTTPError.__bases__
    try:
        return hub.dataset_info(path, revision=revision, timeout=ANSWER_SECONDS)
    except errors.HfHubHTTPError:
        raise  # it answers
    except transport_errors as error:
        raise Refusal(
            f"{path}: the hub {hub.endpoint} cannot be reached ({error}) and no mirror is named; "
            "connect, or name a mirror with --mirror or HUB_MIRROR, then run the same command again"
        ) from None


def _converted_files(path: str) -> tuple[str, Configurations]:
    """Commit and files of the hub's own parquet copy of a dataset of the script era:
    <config>/<split>/*.parquet."""
    info = _dataset_info(path, CONVERTED)
    configs: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in sorted(file.rfilename for file in info.siblings or []):
        if name.endswith(".parquet"):
            config, split, _ = name.split("/")
            configs[config][split].append(name)
    return str(info.sha), configs


def _fetch(
    path: str, config: str, split: str, names: Sequence[str], revision: str, cache: Path
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
    try:
        from datasets.exceptions import DatasetsError
        from huggingface_hub import errors
    except ValueError as error:
        endpoint = os.environ.get("HF_ENDPOINT")
        raise Refusal(f"HF_ENDPOINT: found {endpoint}, expected an address ({error})") from None
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
        if isinstance(cause, transport_errors) and cause is not error:
            raise OSError(f"{path} from the hub: {cause}") from error
        reason = " ".join(str(cause).split())
        raise Refusal(f"{path}: the hub cannot give configuration {config}: {reason}") from None
    except transport_errors as error:
        raise OSError(f"{path} from the hub: {error}") from error
