"""Writes a run's final/ as a float32 GGUF file for llama.cpp, without llama.cpp's converter."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.models.export_gguf import main
from src.spec.command_line import run_script

if __name__ == "__main__":
    run_script(main)
