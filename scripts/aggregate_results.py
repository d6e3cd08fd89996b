"""Gather run directories into one CSV, the figures beside it and the report's tables."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.analysis.aggregate import main

if __name__ == "__main__":
    sys.exit(main())
