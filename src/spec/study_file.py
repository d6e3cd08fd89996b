"""The study file: which runs, block by block, where, how many side by side, and for how much.

Strict YAML as in `src.spec.config`; paths are relative to the working directory. No torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.spec.config import PHASES
from src.spec.names import NAME_PATTERN
from src.spec.strict_yaml import build, key, one_of, read_yaml

SANITY = "sanity"  # phase 0's checks, as a block's phase
# Where a block's runs come from: these keys, alone or together.
_SOURCES = (
    ("config",), ("best_of",), ("finalists_of",), ("config", "leader_of"), ("config", "grid_of"),
    ("leader_of", "factorised"),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Runs that belong together, and how they follow from the blocks before.

    best_of: the runs of that block, each experiment at its own best rate.
    leader_of: `config` on the model (width, heads) and rate of that block's leading experiment;
        with `factorised`, that model with tables of these shares instead.
    grid_of: the vocabularies and heads of `config` at that block's leading share and its
        neighbours, on equal training bytes.
    finalists_of: the baseline and the best `finalists` configurations that these blocks promoted;
        the first of them ranks the shares.
    """

    name: str = key("", "letters, digits, '.', '_' or '-'", NAME_PATTERN.fullmatch)
    config: str | None = key(None, "an experiment file, or null")
    phase: str = one_of("full", *PHASES, SANITY)
    experiments: tuple[str, ...] = key(
        ("all",), "a list of experiments, or [all]", lambda v: v and all(v)
    )
    seeds: tuple[int, ...] = key(
        (0,), "a list of different seeds from 0 to 2^31",
        lambda v: v and len(set(v)) == len(v) and all(0 <= seed < 2**31 for seed in v),
    )  # fmt: skip
    overrides: tuple[str, ...] = key((), "a list of section.key=value, beside the study's", all)
    folder: str = key("", "a folder below log_dir", NAME_PATTERN.fullmatch)  # "": log_dir itself
    best_of: str | None = key(None, "an earlier block, or null")
    leader_of: str | None = key(None, "an earlier block, or null")
    factorised: tuple[float, ...] = key(
        (), "a list of shares between 0 and 1", lambda v: all(0 < share < 1 for share in v)
    )
    grid_of: str | None = key(None, "an earlier block, or null")
    finalists_of: tuple[str, ...] = key((), "a list of earlier blocks", all)
    finalists: int = key(1, "a number of configurations of at least 1", lambda v: v >= 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class SlurmConfig:
    """What an array job asks Slurm for."""

    gpu: str = key("1", 'what --gres=gpu: takes, such as 1 or a100:1, or "none"')
    cpus: int = key(4, "cores a run, above 0", lambda v: v > 0)
    time: str = key("04:00:00", "a limit D-HH:MM:SS; a longer run is requeued")
    at_once: int | None = key(None, "runs at a time above 0, or null", lambda v: v > 0)
    options: tuple[str, ...] = key((), "a list of further #SBATCH options", all)


@dataclass(frozen=True, kw_only=True, slots=True)
class SkyConfig:
    """What a managed job asks SkyPilot for."""

    gpu: str = key("A100:1", 'a GPU and a number, or "none"')
    spot: bool = key(True, "true or false")


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyConfig:
    """A study on one corpus, budget and device."""

    corpus: str | None = key(None, "the corpus that missing tokens are made from, or null")
    log_dir: str = key("logs", "a directory")
    # Runs that lie here with their small files alone are finished runs on every machine.
    published: str | None = key(None, "a folder of scripts/publish_results.py, or null")
    device: str = key("auto", "auto, cpu, cuda or cuda:N")
    overrides: tuple[str, ...] = key((), "a list of section.key=value, as for --set", all)
    jobs: int | str = key(
        1,
        "auto (a run a GPU, a run a CPU core), or runs at a time, from 1 to 64",
        lambda v: v == "auto" or isinstance(v, int) and 1 <= v <= 64,
    )
    budget_usd: float = key(50.0, "dollars above 0", lambda v: v > 0)
    runbook_budget_usd: float = key(150.0, "dollars above 0", lambda v: v > 0)
    # None: from earlier runs of log_dir, else from a short probe on the device.
    tokens_per_s: float | None = key(None, "tokens a second above 0, or null", lambda v: v > 0)

    blocks: tuple[Block, ...] = ()
    slurm: SlurmConfig = SlurmConfig()
    sky: SkyConfig = SkyConfig()


def load_study(path: Path) -> StudyConfig:
    """Read a study file; raises ValueError (one sentence) for what a user can get wrong."""
    raw, where = read_yaml(path, "a study file"), f"{path}: "
    if not isinstance(raw, Mapping):
        raise ValueError(f"{where}found {raw!r}, expected a mapping with the key blocks")
    nested: dict[str, Any] = {"blocks": _blocks(where, raw.get("blocks"))}
    for name, kind in (("slurm", SlurmConfig), ("sky", SkyConfig)):
        if name in raw:
            nested[name] = build(kind, f"{where}{name}.", raw[name])
    plain = {name: value for name, value in raw.items() if name not in nested}
    return dataclasses.replace(build(StudyConfig, where, plain), **nested)


def _blocks(where: str, entries: Any) -> tuple[Block, ...]:
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{where}blocks: found {entries!r}, expected a list with a name each")
    blocks: list[Block] = []
    for number, entry in enumerate(entries):
        block = build(Block, f"{where}blocks[{number}].", entry)
        here, known = f"{where}blocks.{block.name or number}", [block.name for block in blocks]
        if not block.name or block.name in known:
            raise ValueError(
                f"{here}.name: found {block.name or None!r}, expected a name of its own"
            )
        parents = (block.best_of, block.leader_of, block.grid_of, *block.finalists_of)
        for name in filter(None, parents):
            if name not in known:
                raise ValueError(
                    f"{here}: found {name!r}, expected an earlier block: {', '.join(known) or '-'}"
                )
        keys = dict.fromkeys(key for source in _SOURCES for key in source)
        stated = tuple(key for key in keys if getattr(block, key))
        if stated not in _SOURCES:
            raise ValueError(
                f"{here}: found {' and '.join(stated) or 'no source of runs'}, expected config, "
                "best_of, finalists_of, grid_of with config, or leader_of with config or factorised"
            )
        blocks.append(block)
    return tuple(blocks)
