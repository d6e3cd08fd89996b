"""Score a finished run on SmallBench: python -m src.eval_smallbench --run logs/emb35

The command of `src.evaluation.smallbench`, under the name that the study's order gives it.
"""

from __future__ import annotations

import sys

from src.evaluation.smallbench import main

if __name__ == "__main__":
    sys.exit(main())
