"""Checks that the train split does not hold the held-out splits or SmallBench's items."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.data.leakage_check import main
from src.spec.command_line import run_script

if __name__ == "__main__":
    run_script(main)
