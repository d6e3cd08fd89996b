"""Corpora made here, and the data scripts: in this process, or as their users start them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from tests import ROOT, python
from tests.tiny_hub import tiny_hub

BAD_INPUT = 78
CLOSED_PORT = "http://127.0.0.1:9"


def start(script: str, *arguments: Any, **env: str) -> subprocess.Popen[str]:
    """A script as a process of its own."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("HUB_MIRROR", "HF_HUB_OFFLINE")}
    return subprocess.Popen(
        [sys.executable, "-W", "error", str(ROOT / "scripts" / script), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**inherited, "HF_ENDPOINT": CLOSED_PORT, **env},
    )


def run_alone(script: str, *arguments: Any, exit_code: int = 0, **env: str) -> str:
    """A whole run in a process of its own; all that it printed."""
    process = start(script, *arguments, **env)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == exit_code, printed
    return printed


def run(script: str, *arguments: Any, exit_code: int = 0, cwd: Path = ROOT, **env: str) -> str:
    """Run a script in this process, check its exit code, return all it printed."""
    with mock.patch.dict(os.environ, env):
        for variable in {"HUB_MIRROR", "HF_HUB_OFFLINE"} - env.keys():
            os.environ.pop(variable, None)
        process = python(f"scripts/{script}", *arguments, cwd=cwd)
    printed = process.stdout + process.stderr
    assert process.returncode == exit_code, printed
    assert "Traceback" not in printed
    return printed


def refused(script: str, *arguments: Any, **env: Any) -> str:
    return run(script, *arguments, exit_code=BAD_INPUT, **env)


@contextlib.contextmanager
def asking(address: str, offline: bool = False) -> Iterator[None]:
    """The hub's client of this process asks `address`; it reads HF_ENDPOINT at its import only."""
    import datasets
    from huggingface_hub import constants

    files = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    with (
        mock.patch.multiple(
            constants, ENDPOINT=address, HUGGINGFACE_CO_URL_TEMPLATE=files, HF_HUB_OFFLINE=offline
        ),
        mock.patch.object(datasets.config, "HF_ENDPOINT", address),
    ):
        yield


@contextlib.contextmanager
def hub(root: Path, **options: bool) -> Iterator[str]:
    """A hub that serves `root`, asked by this process; its address."""
    with tiny_hub(root, **options) as address, asking(address):
        yield address


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in folder.iterdir() if path.is_file()}


def texts_of(file: Path) -> list[str]:
    return [json.loads(line)["text"] for line in file.read_bytes().split(b"\n") if line]


def write_corpus(folder: Path, splits: Mapping[str, Sequence[str]]) -> Path:
    folder.mkdir(parents=True)
    facts = {}
    for split, texts in splits.items():
        file = folder / f"{split}.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        facts[split] = {"sha256": sha256(file)}
    source = {"dataset": "tests/handmade", "config": "default", "splits": facts}
    (folder / "source.json").write_text(json.dumps(source))
    return folder


def prose(seed: int, words: int = 400) -> str:
    rng = random.Random(seed)
    return " ".join("".join(rng.choices("abcdefgh", k=rng.randint(1, 6))) for _ in range(words))


def small_corpus(folder: Path, **replaced: Sequence[str]) -> Path:
    splits: dict[str, Sequence[str]] = {
        "train": [prose(seed) for seed in range(5)],
        "validation": [prose(6)],
        "test": [prose(7)],
    }
    return write_corpus(folder, {**splits, **replaced})
