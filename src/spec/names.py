"""Names of experiments and of their runs' directories."""

from __future__ import annotations

import re
from typing import Any

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# What `run_name` and phase 0 put behind an experiment.
RUN_SUFFIX = re.compile(r"(-rank|-sanity|-seed[0-9]+)$")


def run_name(experiment: str, phase: str, seed: int) -> str:
    """`<exp>[-rank][-seed<k>]`: the full budget and seed 0 carry no suffix."""
    return experiment + ("-rank" if phase == "rank" else "") + (f"-seed{seed}" if seed else "")


def check(where: str, name: Any) -> None:
    """Refuse (ValueError) what cannot be an experiment's name."""
    if not isinstance(name, str) or not NAME_PATTERN.fullmatch(name):
        raise ValueError(
            f"{where}: found {name!r}, expected 1 to 64 letters, digits, '.', '_' or "
            "'-', the first a letter or digit"
        )
    if name == "all":
        raise ValueError(f"{where}: found 'all', which --exp keeps for every experiment")
    if _is_retyped(name):
        raise ValueError(
            f"{where}: found {name!r}, expected a name that readers of tables (pandas' "
            "read_csv, say) do not take for a number or a missing value"
        )
    if RUN_SUFFIX.search(name):
        raise ValueError(
            f"{where}: found {name!r}, expected a name that does not end like the "
            "directory of another experiment's ranking run or seed (-rank, -seed1)"
        )


def _is_retyped(name: str) -> bool:
    """Whether a reader of tables turns the name into something else: 007, 1e5, NA, true."""
    try:
        float(name)  # nan, inf and 1_000 too
    except ValueError:
        return name.casefold() in ("na", "null", "none", "true", "false")
    return True
