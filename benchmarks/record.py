"""What every benchmark writes beside its numbers: when, on what, under which load.

JSON, and where it has a title a page of Markdown. Written again after each result, so that a
benchmark that is cut leaves what it had found.
"""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from src.compute.cores import available_cores
from src.spec.command_line import Parser, at_least
from src.storage.files import write_atomic, write_json

OUTPUT = Path("results/benchmarks")


def add_arguments(parser: Parser) -> None:
    """--device, --threads and --output, which all benchmarks of the model take."""
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=at_least(1), default=available_cores())
    parser.add_argument("--output", type=Path, default=OUTPUT)


def facts(device: str, threads: int, **more: Any) -> dict[str, Any]:
    """The conditions of a measurement that begins now."""
    import torch

    from src.compute.runtime import device_name

    module = f"benchmarks.{Path(sys.argv[0]).stem}"
    return {
        "date": date.today().isoformat(),
        "device": device_name(torch.device(device)),
        "threads": threads,
        "cores": available_cores(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load_average": round(os.getloadavg()[0], 2),
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        **more,
    }


def write(
    path: Path,
    conditions: Mapping[str, Any],
    results: Mapping[str, Any],
    *,
    title: str | None = None,
    text: str = "",
) -> None:
    """`path` (.json) with both, and a page beside it where it has a title."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**conditions, **results})
    if title is not None:
        head = "\n".join(f"- {key}: {value}" for key, value in conditions.items())
        page = f"# {title}\n\n{head}\n\n{text}\n"
        write_atomic(path.with_suffix(".md"), page.encode())
