"""Copy what is small of a log directory into a folder that can be committed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.analysis.publish import main
from src.spec.command_line import run_script

if __name__ == "__main__":
    run_script(main)
