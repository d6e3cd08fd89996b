"""Whether this machine can compile a model; no torch."""

from __future__ import annotations

import shutil


def compiler() -> str | None:
    """The C++ compiler that torch.compile would find on this machine."""
    return shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
