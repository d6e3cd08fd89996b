"""How run names spell learning rates; `src.spec.config` makes a run of each rate of a list."""

from __future__ import annotations

import re


def spelled(rate: float) -> str:
    """A rate as run names have it: 0.002 is 2e-3, 0.016 is 1.6e-2."""
    digits, _, exponent = f"{rate:.15e}".partition("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"


def configuration(name: str) -> str:
    """An experiment's name without the rate that a list put behind it: emb35-lr2e-3 is emb35's."""
    return re.sub(r"-lr[0-9.]+e-?[0-9]+$", "", name)
