"""Makes a corpus directory of your own texts: .txt, .jsonl (also .gz, .zst) and .parquet."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.data.import_text import main
from src.spec.command_line import run_script

if __name__ == "__main__":
    run_script(main)
