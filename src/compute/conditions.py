"""What changes a run's bits besides its configuration: code, versions, device, how it computes.

Their hash is the `compute_digest` of metrics.json. Runs of one digest, configuration and seed are
equal to the last bit; a difference between runs of two may come from either, so comparisons pair
equal digests only.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

import src
from src.compute import runtime
from src.compute.compute_config import ComputeConfig

ENTRY = "src.train"  # what it imports, directly or not, is what training runs through


def current(compute: ComputeConfig, processes: int) -> dict[str, Any]:
    """Everything that decides bits and is not in the configuration, as plain JSON values.

    The source is a hash of the files' bytes, not the commit: a commit of the docs changes no bits.
    """
    on_gpu = compute.device.type == "cuda"
    return {
        "source_sha256": source_sha256(Path(src.__path__[0])),
        "torch": str(torch.__version__),  # not a plain string, which checkpoints refuse
        "numpy": np.__version__,
        "cuda": torch.version.cuda if on_gpu else None,
        "device": compute.device.type,
        "device_name": runtime.device_name(compute.device),
        "cpu_capability": None if on_gpu else torch.backends.cpu.get_cpu_capability(),
        # oneDNN multiplies bf16 with it where it is there, in another order
        "amx": None if on_gpu else sorted(f for f in runtime.cpu_flags() if f.startswith("amx")),
        "precision": compute.precision,
        "micro_batch": compute.micro_batch,
        "loss_chunk": compute.loss_chunk,
        "compile": compute.compile,
        "threads": compute.threads,
        "processes": processes,
    }


@functools.cache  # of what this process began with
def source_sha256(folder: Path) -> str:
    """Over the files of `folder` (the package) that `ENTRY` imports, functions' imports included.

    The order is the modules' names'; a file that training does not reach may change freely.
    """
    waiting, files = [ENTRY], dict[str, bytes]()
    while waiting:
        module = waiting.pop()
        file = folder.joinpath(*module.split(".")[1:]).with_suffix(".py")
        if module in files or not file.is_file():
            continue
        files[module] = file.read_bytes()
        for node in ast.walk(ast.parse(files[module])):
            if isinstance(node, ast.Import):
                waiting += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                waiting += [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
        waiting = [name for name in waiting if name.startswith("src.")]
    total = hashlib.sha256()
    for module, content in sorted(files.items()):
        total.update(f"{module} {len(content)}\n".encode() + content)
    return total.hexdigest()
