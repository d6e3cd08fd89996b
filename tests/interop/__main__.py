"""Try exported models in other programs, each pinned and in an environment of its own.

    python -m tests.interop                     # every tool, one after the other
    python -m tests.interop vllm llama_cpp      # some
    python -m tests.interop --document          # docs/INTEROP.md's table from results/interop/

Needs a package registry; not part of the tests. A tool's result is results/interop/<tool>.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.interop.tools import TOOLS, Tool

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results" / "interop"
PAGE = ROOT / "docs" / "INTEROP.md"
START, END = "<!-- table -->\n", "<!-- end of table -->\n"
TIMEOUT = 3600  # seconds for one tool's models


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tools", nargs="*", help=f"of {', '.join(TOOLS)} (default: all)")
    parser.add_argument("--document", action="store_true", help="write the table and stop")
    asked = parser.parse_args(arguments)
    unknown = sorted(set(asked.tools) - set(TOOLS))
    if unknown:
        print(f"found {', '.join(unknown)}, expected some of {', '.join(TOOLS)}", file=sys.stderr)
        return 78
    if not asked.document:
        try_tools([TOOLS[name] for name in asked.tools or TOOLS])
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    tail = rest.partition(END)[2]
    PAGE.write_text(head + START + table() + END + tail, encoding="utf-8")
    return 0


def try_tools(tools: Sequence[Tool]) -> None:
    """One environment at a time, deleted after use."""
    from tests.interop.exports import make

    with tempfile.TemporaryDirectory(prefix="interop-") as work:
        models = Path(work) / "models"
        make(models)
        RESULTS.mkdir(exist_ok=True)
        for tool in tools:
            begun = time.monotonic()
            with tempfile.TemporaryDirectory(prefix=f"{tool.name}-", dir=work) as place:
                found = _result(tool, models, Path(place))
            path = RESULTS / f"{tool.name}.json"
            path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            print(f"{tool.name}: {time.monotonic() - begun:.0f} s, {path}", flush=True)


def _result(tool: Tool, models: Path, place: Path) -> dict[str, Any]:
    """Install, run, compare; a variant that kills the process does not stop the others."""
    python = place / "venv" / "bin" / "python"
    _run([sys.executable, "-m", "venv", str(place / "venv")])
    _run([str(python), "-m", "pip", "install", "-q", *tool.pins])
    for command in tool.then:
        _run(["bash", "-ec", command], cwd=place / "venv")
    inside, out = Path(__file__).with_name("inside.py"), place / "out.json"
    for _ in range(3):
        command = [str(python), str(inside), tool.function or tool.name, str(models), str(out)]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, env=environment, timeout=TIMEOUT, capture_output=True, text=True
        )
        if done.returncode == 0:
            break
    if not out.exists():
        raise RuntimeError(f"{tool.name}: found no result; {done.stderr[-2000:]}")
    answers = json.loads(out.read_bytes())
    references = {n: json.loads((models / n / "reference.json").read_bytes()) for n in answers}
    return {
        "tool": tool.name,
        "pins": tool.pins,
        "variants": {name: compare(references[name], answers[name]) for name in answers},
    }


def _run(command: list[str], **options: Any) -> None:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}: {done.stderr[-2000:]}")


def compare(reference: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    """What the tool said of one model beside what the native model says; nats."""
    if "error" in answer:
        return {"loads": False, "error": answer["error"]}
    texts, prompts = reference["texts"], reference["prompts"]
    said = [entry["log_probabilities"] for entry in texts]
    sums = [sum(row) for row in said]
    found: dict[str, Any] = {"loads": True}
    if "ids" in answer:
        found["same_tokens"] = answer["ids"] == [entry["ids"] for entry in texts]
    if "log_probabilities" in answer:
        found["largest_difference"] = _largest(said, answer["log_probabilities"])
    if "sums" in answer:
        found["largest_difference"] = _largest([sums], [answer["sums"]])
    if "greedy" in answer:
        found["same_greedy"] = answer["greedy"] == [entry["greedy"] for entry in prompts]
    if "greedy_texts" in answer:
        found["same_greedy"] = answer["greedy_texts"] == [
            entry["continued_alone"] for entry in prompts
        ]
    others = {name: _largest(said, rows) for name, rows in answer.get("others", {}).items()}
    for name, row in answer.get("other_sums", {}).items():
        others[name] = _largest([sums], [row])
    return found | ({"others": others} if others else {}) | answer.get("facts", {})


def _largest(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> float:
    """Raises ValueError where the tool scored another number of tokens."""
    pairs = [
        pair for mine, its in zip(ours, theirs, strict=True) for pair in zip(mine, its, strict=True)
    ]
    return max(abs(mine - its) for mine, its in pairs)


def table() -> str:
    """A line for each tool that has a result, in the order of TOOLS."""
    lines = [
        "| tool | loads | same tokens | largest difference, nats | same greedy text "
        "| what one has to know |",
        "|---|---|---|---|---|---|",
    ]
    for tool in TOOLS.values():
        path = RESULTS / f"{tool.name}.json"
        if path.exists():
            lines.append(_line(tool, json.loads(path.read_bytes())["variants"]))
    return "\n".join(lines) + "\n"


def _line(tool: Tool, variants: dict[str, dict[str, Any]]) -> str:
    loaded = {name: row for name, row in variants.items() if row["loads"]}
    failed = [name for name in variants if name not in loaded]
    cells = [f"{len(loaded)} of {len(variants)}" + (f", not {', '.join(failed)}" if failed else "")]
    cells.append(_share(loaded, "same_tokens"))
    differences = [r["largest_difference"] for r in loaded.values() if "largest_difference" in r]
    worst = f"{max(differences):.0e}" if differences else "-"
    others: dict[str, float] = {}
    for row in loaded.values():
        for name, value in row.get("others", {}).items():
            others[name] = max(value, others.get(name, 0.0))
    cells.append("; ".join([worst, *(f"{name} {value:.0e}" for name, value in others.items())]))
    cells.append(_share(loaded, "same_greedy"))
    return f"| {tool.title} | " + " | ".join([*cells, tool.notes]) + " |"


def _share(rows: dict[str, dict[str, Any]], key: str) -> str:
    said = [row[key] for row in rows.values() if key in row]
    if not said:
        return "-"
    no = [name for name, row in rows.items() if not row.get(key, True)]
    return "yes" if not no else f"{len(said) - len(no)} of {len(said)}, not {', '.join(no)}"


if __name__ == "__main__":
    sys.exit(main())
