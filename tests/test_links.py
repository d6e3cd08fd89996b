"""Every relative link and image of the pages resolves to something in the repository."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

import pytest

from tests import ROOT, python

PAGES = sorted(
    [ROOT / "README.md", ROOT / "REPORT.md", *ROOT.glob("docs/*.md"), *ROOT.glob("results/**/*.md")]
)
# [text](target), ![text](target "title"), [label]: target and <img src="target">
LINK = re.compile(
    r'\]\(\s*<?([^)\s>]+)>?(?:\s+"[^"]*")?\s*\)|^\[[^\]]+\]:\s*(\S+)|\b(?:src|href)="([^"]+)"', re.M
)
CODE = re.compile(r"^(`{3,}|~{3,}).*?^\1|`[^`\n]*`", re.M | re.S)


def relative_links(text: str) -> list[str]:
    """Targets without their anchors; other sites' and the page's own anchors are left out."""
    targets = [next(filter(None, found)) for found in LINK.findall(CODE.sub("", text))]
    local = [target for target in targets if not re.match(r"[a-z][a-z0-9+.-]*:|#|//", target)]
    return [unquote(target.partition("#")[0]) for target in local]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_resolves(page: Path) -> None:
    broken = []
    for target in relative_links(page.read_text(encoding="utf-8")):
        path = (page.parent / target).resolve()
        if not path.is_relative_to(ROOT) or not path.exists():
            broken.append(target)
    assert not broken, f"{page.relative_to(ROOT)}: found links to nothing: {', '.join(broken)}"


@pytest.mark.parametrize(
    ("page", "folder"),
    [
        ("REPORT.md", "results/study-10m"),
        ("results/study-10m/README.md", "results/study-10m"),
        ("results/miniature-complete/README.md", "results/miniature-complete"),
        ("results/miniature/DECISIONS.md", "results/miniature"),
    ],
)
def test_the_tables_of_the_report_are_those_of_the_published_csv(page: str, folder: str) -> None:
    summary, study = f"{folder}/results_summary.csv", f"{folder}/study.json"
    line = ["--report", page, "--check", "--from_csv", summary]
    if not (ROOT / study).is_file():
        line += ["--study", "results/miniature/study.json"]
    done = python("scripts/aggregate_results.py", *line)
    assert done.returncode == 0, done.stderr
