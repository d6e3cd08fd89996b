"""Downloads an instruction set for the light tuning, as prompts and answers."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.data.download_instructions import main
from src.spec.command_line import run_script

if __name__ == "__main__":
    run_script(main)
