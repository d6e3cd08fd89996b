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
TIMEOUT_SECONDS = 10
# The hub converts datasets that are still defined by a Python script to parquet on this branch.
CONVERTED = "refs/convert/parquet"
# One of a split's files; old ones end in a hash of their own.
SHARD = re.compile(r"(?P<split>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(-[0-9a-f]+)?\.[^/]+")
Loaded = tuple[dict[str, Split], dict[str, Any]]
Configurations = Mapping[str, Mapping[str, Sequence[str]]]  # files by configuration and split


def find_mirror(argument: str | None) -> Path | None:
    """The mirror that `--mirror` or HUB_MIRROR names; Refusal where it is no directory."""
    directory = argument or os.environ.get("HUB_MIRROR")
    mirror = Path(directory) if directory else None
    if mirror and not mirror.is_dir():
        raise Refusal(f"{source_name(mirror)}: found no such directory, expected {MIRROR_HELP}")
    return mirror


def source_name(mirror: Path | None) -> str:
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


def _choose_config(
    path: str, config: str | None, wanted: Sequence[str], configs: Configurations, source: str
) -> str:
    """The configuration asked for, the only or the default one; Refusal where that or a split of it
    is not there, or not whole."""
    available = "; ".join(f"{name} ({', '.join(splits)})" for name, splits in configs.items())
    config = config or (next(iter(configs)) if len(configs) == 1 else "default")
    if config not in configs:
        raise Refusal(f"{path}: {source} has no configuration {config!r}; it has {available}")
    if missing := [split for split in wanted if split not in configs[config]]:
        raise Refusal(
            f"{path}, configuration {config}: {source} lacks the split {', '.join(missing)}; "
            f"complete or not, it has {available}"
        )
    for split in wanted:
        check_shards(path, configs[config][split])
    return config


def check_shards(path: str, files: Iterable[str]) -> None:
    """Refusal where numbered files are missing or doubled: part of a corpus is another corpus."""
    numbered: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for shard in filter(None, map(SHARD.fullmatch, files)):
        numbered[shard["split"]].append((int(shard["number"]), int(shard["count"])))
    for split, shards in numbered.items():
        count = max(count for _, count in shards)
        if sorted(shards) != [(number, count) for number in range(count)]:
            names = ", ".join(f"{i:05d}-of-{count:05d}" for i, count in sorted(shards)[:8])
            raise Refusal(
                f"{path}: {split}: found {len(shards)} files ({names}), expected each of "
                f"00000-of-{count:05d} to {count - 1:05d}-of-{count:05d} once; fetch what is "
                "missing, or remove the files of another version"
            )


def _load_mirrored(path: str, config: str | None, wanted: Sequence[str], mirror: Path) -> Loaded:
    """By the layout alone: a README that `datasets` cannot read is no reason to refuse the data."""
    dataset, source = mirror / path, source_name(mirror)
    configs = {d.name: splits for d in sorted(dataset.glob("*")) if (splits := _mirrored_splits(d))}
    if not configs:
        raise Refusal(f"{path}: {source} does not have this dataset; use another mirror")
    config = _choose_config(path, config, wanted, configs, source)
    loaded = {split: Split(split, [*map(Path, configs[config][split])]) for split in wanted}
    return loaded, _origin(config, None, _licence(dataset))


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
    licences = licence if isinstance(licence, list) else [licence]
    names = ", ".join(name for name in licences if isinstance(name, str)) or None
    return {"config": config, "revision": revision, "mirror": revision is None, "licence": names}


def _licence(folder: Path) -> Any:
    """The licence in the header of a dataset's README; no reason to refuse sound data."""
    try:
        start, header, *_ = (folder / "README.md").read_text(encoding="utf-8").split("---\n")
        # BaseLoader: every scalar is a text, also one that looks like a date
        fields = None if start else yaml.load(header, yaml.BaseLoader)
    except (FileNotFoundError, ValueError, yaml.YAMLError, RecursionError):
        return None
    return fields.get("license") if isinstance(fields, dict) else None


def _load_from_hub(path: str, config: str | None, wanted: Sequence[str], cache: Path) -> Loaded:
    import datasets
    from huggingface_hub import utils

    if not has_terminal():
        datasets.disable_progress_bars()
        utils.disable_progress_bars()
    info = _dataset_info(path)
    revision = str(info.sha)
    try:
        builder = datasets.load_dataset_builder(
            path, config, revision=revision, cache_dir=str(cache)
        )
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        revision, configs = _converted_files(path)
    else:
        config = str(builder.config.name)
        configs = {
            config: {
                str(split): [url.partition(f"@{revision}/")[2] for url in urls]
                for split, urls in (builder.config.data_files or {}).items()
            }
        }
    config = _choose_config(path, config, wanted, configs, "the hub")
    files = configs[config]
    splits = {split: _fetch(path, config, split, files[split], revision, cache) for split in wanted}
    card = info.card_data.to_dict() if info.card_data else {}
    return splits, _origin(config, revision, card.get("license"))


def _dataset_info(path: str, revision: str | None = None) -> Any:
    """What the hub knows of a dataset; Refusal within seconds where there is no hub: other calls
    would retry for minutes."""
    from huggingface_hub import HfApi, errors

    hub = HfApi()
    # Its bases are the HTTP library's own error, whichever library this version uses, and OSError.
    transport_errors: Any = errors.HfHubHTTPError.__bases__
    try:
        return hub.dataset_info(path, revision=revision, timeout=TIMEOUT_SECONDS)
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

    options: Any = {"revision": revision, "cache_dir": str(cache)}
    if all(name.endswith(".parquet") for name in names):
        files = [hf_hub_download(path, name, repo_type="dataset", **options) for name in names]
        return Split(split, [Path(file) for file in files])
    file = cache / f"{split}.parquet"
    datasets.load_dataset(path, config, split=split, **options).to_parquet(str(file))
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
