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
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.interop.inside import logged
from tests.interop.tools import TOOLS, Tool

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results" / "interop"
PAGE = ROOT / "docs" / "INTEROP.md"
START, END = "<!-- table -->\n", "<!-- end of table -->\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tools", nargs="*", help=f"of {', '.join(TOOLS)} (default: all)")
    parser.add_argument("--document", action="store_true", help="write the table and stop")
    parser.add_argument("--work", type=Path, help="keep models and environments here and go on")
    asked = parser.parse_args(arguments)
    unknown = sorted(set(asked.tools) - set(TOOLS))
    if unknown:
        print(f"found {', '.join(unknown)}, expected some of {', '.join(TOOLS)}", file=sys.stderr)
        return 78
    if not asked.document:
        with tempfile.TemporaryDirectory(prefix="interop-") as temporary:
            work = (asked.work or Path(temporary)).resolve()
            for name in asked.tools or TOOLS:
                try_tool(TOOLS[name], work)
                if asked.work is None:  # one environment at a time: each is gigabytes
                    shutil.rmtree(work / name)
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    PAGE.write_text(head + START + table() + END + rest.partition(END)[2], encoding="utf-8")
    return 0


def try_tool(tool: Tool, work: Path) -> None:
    """Install, run, compare, write results/interop/<tool>.json; what `work` has is used again."""
    from tests.interop import exports

    begun, place = time.monotonic(), work / tool.name
    models, run = work / "models", work / "run" / "logs" / "quick-emb14"
    if tool.reads == "models" and not models.exists():
        exports.make(models)
    if tool.reads == "log" and not (run / "metrics.json").exists():
        exports.make_run(work / "run")
    if not (place / "installed").exists():
        _run([sys.executable, "-m", "venv", "--clear", str(place)])
        _run([str(place / "bin" / "python"), "-m", "pip", "install", "-q", *tool.pins])
        for command in tool.then:
            _run(["bash", "-ec", command], cwd=place)
        (place / "installed").touch()
    source = models if tool.reads == "models" else run
    answers = _answers(tool, source, place)
    found: dict[str, Any] = {"tool": tool.name, "pins": tool.pins}
    if tool.reads == "log":
        found |= curves(logged(run), answers["run"]["curves"])
    else:
        references = {n: json.loads((models / n / "reference.json").read_bytes()) for n in answers}
        found["variants"] = {name: compare(references[name], answers[name]) for name in answers}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{tool.name}.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{path}: {time.monotonic() - begun:.0f} s", flush=True)


def _answers(tool: Tool, source: Path, place: Path) -> dict[str, Any]:
    """What inside.py says; a model that kills the process does not stop the others."""
    inside, out = Path(__file__).with_name("inside.py"), place / "out.json"
    command = [place / "bin" / "python", inside, tool.function or tool.name, source, out]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    said = ""
    for _ in range(3):
        done = subprocess.run(
            list(map(str, command)), env=environment, capture_output=True, text=True
        )
        if done.returncode == 0:
            return json.loads(out.read_bytes())
        said = done.stderr[-2000:]
    raise RuntimeError(f"{tool.name}: exit {done.returncode}: {said}")


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


def _largest(ours: Sequence[list[float]], theirs: Sequence[list[float] | None]) -> float:
    """None for what the tool was not asked; ValueError where it scored another number of tokens."""
    rows = zip(ours, theirs, strict=True)
    pairs = [pair for mine, its in rows if its is not None for pair in zip(mine, its, strict=True)]
    return max(abs(mine - its) for mine, its in pairs)


def curves(logged: dict[str, Any], shown: dict[str, Any]) -> dict[str, Any]:
    """Points that the tool shows of those in metrics.jsonl, and their largest difference."""
    pairs = [
        abs(value - dict(map(tuple, shown[tag]))[step])
        for tag, points in logged.items()
        for step, value in points
        if step in dict(map(tuple, shown[tag]))
    ]
    return {
        "points": sum(map(len, logged.values())),
        "shown": len(pairs),
        "largest_difference": max(pairs),
    }


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
            lines.append(_line(tool, json.loads(path.read_bytes())))
    return "\n".join(lines) + "\n"


def _line(tool: Tool, result: dict[str, Any]) -> str:
    if "variants" not in result:
        shown = f"{result['shown']} of {result['points']} points"
        cells = [shown, "-", f"{result['largest_difference']:.0e}", "-", tool.notes]
        return f"| {tool.title} | " + " | ".join(cells) + " |"
    variants: dict[str, dict[str, Any]] = result["variants"]
    loaded = {name: row for name, row in variants.items() if row["loads"]}
    failed = [name for name in variants if name not in loaded]
    cells = [f"{len(loaded)} of {len(variants)}" + (f", not {', '.join(failed)}" if failed else "")]
    cells.append(_share(loaded, "same_tokens"))
    worst = [row["largest_difference"] for row in loaded.values() if "largest_difference" in row]
    others: dict[str, float] = {}
    for row in loaded.values():
        for name, value in row.get("others", {}).items():
            others[name] = max(value, others.get(name, 0.0))
    differences = [f"{max(worst):.0e}"] if worst else []
    differences += [f"{name}: {value:.0e}" for name, value in others.items()]
    cells += ["; ".join(differences) or "-", _share(loaded, "same_greedy")]
    return f"| {tool.title} | " + " | ".join([*cells, tool.notes]) + " |"


def _share(rows: dict[str, dict[str, Any]], key: str) -> str:
    said = [row[key] for row in rows.values() if key in row]
    if not said:
        return "-"
    no = [name for name, row in rows.items() if not row.get(key, True)]
    return "yes" if not no else f"{len(said) - len(no)} of {len(said)}, not {', '.join(no)}"


if __name__ == "__main__":
    sys.exit(main())
