"""The tests mirror the rooms of `src`; files beside the folders are for what spans them."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
