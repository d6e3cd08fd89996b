"""The last words of `make quickstart`: where the figures are and what they show.

python -m src.analysis.quickstart quickstart
"""

from __future__ import annotations

import sys
from pathlib import Path

from src.analysis.run_csv import read_csv
from src.spec.command_line import run_script
from src.storage.files import read_json


def sentence(folder: Path) -> str:
    """What the finished runs in the folder's CSV say, against the entropy of its corpus."""
    rows = [r for r in read_csv(folder / "results_summary.csv") if r["status"] == "finished"]
    if not rows:
        return "no run finished, so there is nothing to see; the lines above say why"
    rows.sort(key=lambda row: row["test_perplexity"])
    best, worst = (
        f"{row['experiment']} {row['test_perplexity']:.3f} (share "
        f"{row['embedding_ratio_built']:.2f}, GLU x{row['glu_expansion_built']:.2f})"
        for row in (rows[0], rows[-1])
    )
    splits = read_json(folder / "corpus/source.json")["splits"]
    entropy, bits = splits["test"]["entropy_bits_per_byte"], rows[0]["test_bits_per_byte"]
    return (
        f"of {len(rows)} finished runs, one seed each, the lowest test perplexity is {best}, the "
        f"highest {worst}; the best needs {bits:.4f} bits a byte, {bits / entropy - 1:.1%} more "
        f"than the {entropy:.4f} of the language itself, below which no model can be expected"
    )


def main() -> None:
    folder = Path(sys.argv[1])
    figures = sorted(folder.glob("ppl_vs_*.png"))
    print(f"{' and '.join(map(str, figures)) or folder}: {sentence(folder)}")


if __name__ == "__main__":
    run_script(main)
