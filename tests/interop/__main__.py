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

from tests import ROOT
from tests.interop.inside import logged
from tests.interop.tools import TOOLS, Tool

RESULTS = ROOT / "results" / "interop"
PAGE = ROOT / "docs" / "INTEROP.md"
START, END = "<!-- table -->\n", "<!-- end of table -->\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tools", nargs="*", help=f"of {', '.join(TOOLS)} (default: all)")
    parser.add_argument("--document", action="store_true", help="write the table and stop")
    parser.add_argument("--work", type=Path, help="keep models and environments here and go on")
    args = parser.parse_args(arguments)
    unknown = sorted(set(args.tools) - set(TOOLS))
    if unknown:
        print(f"found {', '.join(unknown)}, expected some of {', '.join(TOOLS)}", file=sys.stderr)
        return 78
    if not args.document:
        with tempfile.TemporaryDirectory(prefix="interop-") as temporary:
            work = (args.work or Path(temporary)).resolve()
            for name in args.tools or TOOLS:
                try_tool(TOOLS[name], work)
                if args.work is None:  # one environment at a time: each is gigabytes
                    shutil.rmtree(work / name)
    before, _, after = PAGE.read_text(encoding="utf-8").partition(START)
    PAGE.write_text(before + START + table() + END + after.partition(END)[2], encoding="utf-8")
    return 0


def try_tool(tool: Tool, work: Path) -> None:
    """Install, run, compare, write results/interop/<tool>.json; what `work` has is used again."""
    from tests.interop import exports

    started, folder = time.monotonic(), work / tool.name
    models, run = work / "models", work / "run" / "logs" / "quick-emb14"
    if tool.reads == "models" and not models.exists():
        exports.make(models)
    if tool.reads == "log" and not (run / "metrics.json").exists():
        exports.make_run(work / "run")
    if not (folder / "installed").exists():
        _run([sys.executable, "-m", "venv", "--clear", str(folder)])
        _run([str(folder / "bin" / "python"), "-m", "pip", "install", "-q", *tool.pins])
        for command in tool.then:
            _run(["bash", "-ec", command], cwd=folder)
        (folder / "installed").touch()
    source = models if tool.reads == "models" else run
    outputs = _outputs(tool, source, folder)
    result: dict[str, Any] = {"tool": tool.name, "pins": tool.pins}
    if tool.reads == "log":
        result |= curves(logged(run), outputs["run"]["curves"])
    else:
        result["variants"] = {}
        for variant, output in outputs.items():
            reference = json.loads((models / variant / "reference.json").read_bytes())
            result["variants"][variant] = compare(reference, output)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{tool.name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{path}: {time.monotonic() - started:.0f} s", flush=True)


def _outputs(tool: Tool, source: Path, folder: Path) -> dict[str, Any]:
    """What inside.py says; a model that kills the process does not stop the others."""
    program, out = Path(__file__).with_name("inside.py"), folder / "out.json"
    command = [folder / "bin" / "python", program, tool.function or tool.name, source, out]
    variables = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    error = ""
    for _ in range(3):
        process = subprocess.run(
            list(map(str, command)), env=variables, capture_output=True, text=True
        )
        if process.returncode == 0:
            return json.loads(out.read_bytes())
        error = process.stderr[-2000:]
    raise RuntimeError(f"{tool.name}: exit {process.returncode}: {error}")


def _run(command: list[str], **options: Any) -> None:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}: {done.stderr[-2000:]}")


def compare(reference: dict[str, Any], output: dict[str, Any]) -> dict[str, Any]:
    """What the tool said of one model beside what the native model says; nats."""
    if "error" in output:
        return {"loads": False, "error": output["error"]}
    texts, prompts = reference["texts"], reference["prompts"]
    expected = [entry["log_probabilities"] for entry in texts]
    sums = [sum(row) for row in expected]
    result: dict[str, Any] = {"loads": True}
    if "ids" in output:
        result["same_tokens"] = output["ids"] == [entry["ids"] for entry in texts]
    if "log_probabilities" in output:
        result["largest_difference"] = _largest(expected, output["log_probabilities"])
    if "sums" in output:
        result["largest_difference"] = _largest([sums], [output["sums"]])
    if "greedy" in output:
        result["same_greedy"] = output["greedy"] == [entry["greedy"] for entry in prompts]
    if "greedy_texts" in output:
        result["same_greedy"] = output["greedy_texts"] == [
            entry["continued_alone"] for entry in prompts
        ]
    others = {name: _largest(expected, rows) for name, rows in output.get("others", {}).items()}
    for name, row in output.get("other_sums", {}).items():
        others[name] = _largest([sums], [row])
    return result | ({"others": others} if others else {}) | output.get("facts", {})


def _largest(expected: Sequence[list[float]], actual: Sequence[list[float] | None]) -> float:
    """Over the texts that the tool was asked (not None); ValueError where it scored another number
    of tokens."""
    texts = zip(expected, actual, strict=True)
    pairs = [pair for e, a in texts if a is not None for pair in zip(e, a, strict=True)]
    return max(abs(e - a) for e, a in pairs)


def curves(logged: dict[str, Any], displayed: dict[str, Any]) -> dict[str, Any]:
    """Points that the tool shows of those in metrics.jsonl, and their largest difference."""
    differences = []
    for tag, points in logged.items():
        values = dict(map(tuple, displayed[tag]))
        differences += [abs(value - values[step]) for step, value in points if step in values]
    return {
        "points": sum(map(len, logged.values())),
        "shown": len(differences),
        "largest_difference": max(differences),
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
        points = f"{result['shown']} of {result['points']} points"
        difference = f"{result['largest_difference']:.0e}"
        return f"| {tool.title} | {points} | - | {difference} | - | {tool.notes} |"
    variants: dict[str, dict[str, Any]] = result["variants"]
    loaded = {name: row for name, row in variants.items() if row["loads"]}
    failed = [name for name in variants if name not in loaded]
    loads = f"{len(loaded)} of {len(variants)}" + (f", not {', '.join(failed)}" if failed else "")
    worst = [row["largest_difference"] for row in loaded.values() if "largest_difference" in row]
    others: dict[str, float] = {}
    for row in loaded.values():
        for name, value in row.get("others", {}).items():
            others[name] = max(value, others.get(name, 0.0))
    differences = [f"{max(worst):.0e}"] if worst else []
    differences += [f"{name}: {value:.0e}" for name, value in others.items()]
    columns = [
        *(tool.title, loads, _share(loaded, "same_tokens"), "; ".join(differences) or "-"),
        *(_share(loaded, "same_greedy"), tool.notes),
    ]
    return f"| {' | '.join(columns)} |"


def _share(rows: dict[str, dict[str, Any]], key: str) -> str:
    values = [row[key] for row in rows.values() if key in row]
    if not values:
        return "-"
    failed = [name for name, row in rows.items() if not row.get(key, True)]
    if not failed:
        return "yes"
    return f"{len(values) - len(failed)} of {len(values)}, not {', '.join(failed)}"


if __name__ == "__main__":
    sys.exit(main())
