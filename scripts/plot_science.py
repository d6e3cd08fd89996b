"""Draw the fits of src.analysis.science: sweeps, and what was predicted of them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.analysis.science.figures import main

if __name__ == "__main__":
    sys.exit(main())
