"""Generates a corpus whose entropy is known exactly, with probe tasks of its own."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.data.generated_language import main
from src.spec.command_line import run_script

if __name__ == "__main__":
    run_script(main)
