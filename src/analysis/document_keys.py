"""Write the tables of docs/METRICS.md from the list of keys, src/spec/metric_keys.py.

    python scripts/document_keys.py [--check]

Exit codes: 0 done, 78 with --check where the page is out of date.
"""

from __future__ import annotations

from pathlib import Path

from src.analysis.report_tables import fill
from src.spec import metric_keys
from src.spec.command_line import Parser, Refusal
from src.storage.files import write_atomic

PAGE = Path(__file__).resolve().parents[2] / "docs" / "METRICS.md"


def main() -> None:
    parser = Parser(__doc__.partition("\n")[0], example="python scripts/document_keys.py")
    parser.add_argument("--check", action="store_true", help="change nothing, only compare")
    page = PAGE.read_text(encoding="utf-8")
    tables = {name: metric_keys.table(keys) for name, keys in metric_keys.SECTIONS.items()}
    filled = fill(page, tables | {"summary": metric_keys.reading()})
    if not parser.parse_args().check:
        write_atomic(PAGE, filled.encode())
    elif filled != page:
        raise Refusal(f"{PAGE}: not as src/spec/metric_keys.py has it; run without --check")
