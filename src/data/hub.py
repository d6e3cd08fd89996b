"""Loads datasets through `datasets`, from the Hugging Face hub or from a mirror of its layout."""

from __future__ import annotations

import functools
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from src.spec.progress import has_terminal
from src.storage.files import Refusal

if TYPE_CHECKING:
    from datasets import Dataset

MIRROR_HELP = (
    "a directory laid out like the hub, <owner>/<name>/<config>/<split>-*.parquet "
    "(default: $HUB_MIRROR, else the hub itself)"
)
PROBE_SECONDS = 10
# The hub converts datasets that are still defined by a Python script to parquet on this branch.
CONVERTED = "refs/convert/parquet"


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """Splits of one dataset, memory-mapped, and where they are from."""

    splits: dict[str, Dataset]
    config: str
    revision: str | None  # the hub's commit; None from a mirror
    licence: str | None


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
        return _load_mirrored(path, config, wanted, mirror, cache)
    return _load_from_hub(path, config, wanted, cache)


def mirrored_splits(folder: Path) -> dict[str, list[Path]]:
    """The splits of one configuration's folder, each with its parquet files in order."""
    splits: dict[str, list[Path]] = {}
    for file in sorted(folder.glob("*-*.parquet")):
        splits.setdefault(file.name.split("-")[0], []).append(file)
    return splits


def _load_mirrored(
    path: str, config: str | None, wanted: tuple[str, ...], mirror: Path, cache: Path
) -> Loaded:
    folder = mirror / path
    found = {f.name: mirrored_splits(f) for f in sorted(folder.glob("*")) if f.is_dir()}
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
    os.environ["HF_HUB_OFFLINE"] = "1"  # a mirror asks nobody; must precede the import
    import datasets

    _quiet(datasets)
    files = {split: [str(file) for file in found[config][split]] for split in wanted}
    loaded = datasets.load_dataset("parquet", data_files=files, cache_dir=str(cache))
    return Loaded(splits=dict(loaded), config=config, revision=None, licence=_licence(folder))


def _licence(folder: Path) -> str | None:
    """The licence in the header of a dataset's README."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    parts = text.split("---\n")
    header = yaml.safe_load(parts[1]) if text.startswith("---\n") and len(parts) > 2 else None
    return header.get("license") if isinstance(header, dict) else None


def _quiet(datasets: Any) -> None:
    if not has_terminal():
        datasets.disable_progress_bars()


def _load_from_hub(path: str, config: str | None, wanted: tuple[str, ...], cache: Path) -> Loaded:
    _require_hub(path)
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    _quiet(datasets)
    # The first base is the HTTP library's own error, whichever library this version uses.
    transport_errors: Any = HfHubHTTPError.__bases__
    try:
        info = HfApi().dataset_info(path, timeout=PROBE_SECONDS)
        try:
            loaded = datasets.load_dataset(path, config, revision=info.sha, cache_dir=str(cache))
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
    except (ValueError, FileNotFoundError) as error:  # unknown configuration; no data files
        raise Refusal(f"{path}: the hub cannot give configuration {config}: {error}") from None
    except transport_errors as error:
        raise OSError(f"{path} from the hub: {error}") from error
    missing = [split for split in wanted if split not in loaded]
    if missing:
        raise Refusal(
            f"{path}, configuration {config}: the hub lacks the split {', '.join(missing)}; "
            f"it has {', '.join(loaded)}"
        )
    splits = {split: loaded[split] for split in wanted}
    card = info.card_data.to_dict() if info.card_data else {}
    licence = card.get("license")
    return Loaded(
        splits=splits,
        config=config or splits[wanted[0]].info.config_name,
        revision=revision,
        licence=", ".join(licence) if isinstance(licence, list) else licence,
    )


def _load_converted(
    path: str, config: str | None, wanted: tuple[str, ...], cache: Path
) -> tuple[Any, str, str]:
    """A dataset of the script era, from the hub's own parquet copy: <config>/<split>/*.parquet."""
    import datasets
    from huggingface_hub import HfApi

    info = HfApi().dataset_info(path, revision=CONVERTED, timeout=PROBE_SECONDS)
    names = [file.rfilename for file in info.siblings or []]
    configs = sorted({name.split("/")[0] for name in names if name.endswith(".parquet")})
    if config is None:
        config = configs[0] if len(configs) == 1 else "default"
    files = {}
    for split in wanted:
        files[split] = [
            f"hf://datasets/{path}@{info.sha}/{name}"
            for name in sorted(names)
            if name.startswith(f"{config}/{split}/") and name.endswith(".parquet")
        ]
        if not files[split]:
            raise Refusal(
                f"{path}: the hub has no split {split} of configuration {config}; "
                f"it has the configurations {', '.join(configs)}"
            )
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
