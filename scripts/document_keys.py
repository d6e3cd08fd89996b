"""Write the tables of docs/METRICS.md from the list of keys, src/spec/metric_keys.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.analysis.document_keys import main
from src.spec.command_line import run_script

if __name__ == "__main__":
    run_script(main)
