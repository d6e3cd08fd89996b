"""The bench that the faults are tried on: tiny tokens, one tiny run, and what "the same" means.

Nothing here imports the code under test: the judge must not share its mistakes, and a mutant's
process must be free to import a mutated copy instead.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests import ROOT

VOCAB = 320
STEPS, SAVE_EVERY = 60, 10
EXPERIMENT = "cut"
# 95,320 parameters in two layers; a checkpoint is 1.2 MB.
CONFIG = f"""
model: {{total_params: 95000, vocab_size: {VOCAB}, embedding_ratio: 0.18, glu_expansion: 2.67,
        n_layers: 2}}
training: {{tokens: {STEPS * 128}, batch_size: 4, seq_len: 32, eval_every_tokens: 1920,
           dev_tokens: 256, checkpoint_every_steps: {SAVE_EVERY}, precision: fp32, compile: 'off',
           threads: 1}}
data: {{dir: TOKENS}}
evaluation: {{metrics: [perplexity], latency: false, test: false, perplexity_tokens: 256}}
experiments: [{{name: {EXPERIMENT}}}, {{name: other}}]
"""
# Keys of rows and of metrics.json that may differ between a resumed and an uninterrupted run.
CLOCKS = ("_s", "_seconds", "_mib", "_percent", "_hours", "_usd", "git_sha", "git_dirty")
# How a run differs from the plain one; each is compared with a reference of its own.
VARIANTS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "noise": (),  # the loss draws from both generators, as dropout would
    "bf16": ("training.precision=bf16",),
    "compile": ("training.compile=on",),
}


@dataclass
class Tally:
    """One line of the table. A trial adds the list of its problems; an empty list is a pass."""

    fault: str
    what: str
    injected: int = 0
    good: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(self, problems: Iterable[str], count: int = 1, trial: str = "") -> None:
        """Record a trial of `count` injected faults."""
        problems = list(problems)
        self.injected += count
        self.good += 0 if problems else count
        self.problems += [f"{trial}: {problem}" if trial else problem for problem in problems]
        if problems:
            say(f"{self.fault} {self.what} {trial}: {'; '.join(problems)[:2000]}")

    @property
    def passed(self) -> bool:
        return self.injected > 0 and self.good == self.injected


@contextmanager
def tally(tallies: list[Tally], fault: str, what: str) -> Iterator[Tally]:
    """A new line of the table, timed."""
    line = Tally(fault, what)
    begun = time.perf_counter()
    tallies.append(line)
    yield line
    line.seconds = time.perf_counter() - begun
    say(f"{fault} {what}: {line.good}/{line.injected} in {line.seconds:.0f} s {line.notes}")


def say(text: str) -> None:
    """Progress, for whoever watches."""
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)


@dataclass
class Bench:
    """One invocation's scratch directory, seed and code under test."""

    work: Path
    seed: int
    quick: bool
    code: Path = ROOT  # a directory with run_experiment.py, src/ and scripts/
    timed: bool = True  # whether seconds are judged
    share: float = 1.0  # of the full counts

    def draw(self, *key: object) -> random.Random:
        """A generator of this invocation's seed and of `key`."""
        return random.Random(f"{self.seed}:{key}")

    def count(self, full: int, quick: int) -> int:
        """How many of something: the sample's number, or the plan's times `share`."""
        return quick if self.quick else max(1, round(full * self.share))

    @property
    def config(self) -> Path:
        return self.work / "faults.yaml"

    @property
    def tokens(self) -> Path:
        return self.work / "tokens" / f"v{VOCAB}"

    def build(self) -> None:
        """Generate and tokenize the corpus, write the experiment file."""
        corpus = self.work / "corpus"
        size = ("--documents", "60", "--lexicon", "64")
        self._script("make_corpus.py", "--output", str(corpus), *size)
        tokens = ("--vocab_size", str(VOCAB), "--output", str(self.tokens.parent))
        self._script("preprocess_lm.py", "--input", str(corpus), *tokens)
        text = CONFIG.replace("TOKENS", str(self.tokens.parent))
        self.config.write_text(text, encoding="utf-8")

    def _script(self, name: str, *arguments: str) -> None:
        command = [sys.executable, str(ROOT / "scripts" / name), *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    def logs(self, *parts: object) -> Path:
        """A new, empty log directory."""
        path = self.work.joinpath("logs", *map(str, parts))
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path

    def argv(
        self, logs: Path, variant: str = "plain", extra: Sequence[str] = (), exp: str = EXPERIMENT
    ) -> list[str]:
        """Arguments of run_experiment.py."""
        sets = [item for value in VARIANTS[variant] for item in ("--set", value)]
        return [
            "--config", str(self.config), "--exp", exp, "--device", "cpu",
            "--log_dir", str(logs), *sets, *extra,
        ]  # fmt: skip

    def reference(self, variant: str = "plain") -> Path:
        """The uninterrupted run of a variant; `make_references` has run it."""
        path = self.work / "reference" / variant / EXPERIMENT
        assert (path / "metrics.json").is_file(), f"no reference of {variant}"
        return path

    def reference_seconds(self, variant: str = "plain") -> float:
        """How long the uninterrupted run trained, as it says itself."""
        metrics = json.loads((self.reference(variant) / "metrics.json").read_text())
        return float(metrics["train_seconds"])


# ------------------------------------------------------------------------------------- the judge


def differences(actual: Path, expected: Path) -> list[str]:
    """What of a finished run is not bit for bit the other's: weights, optimizer, generators,
    rows, results, exported weights. Clocks and memory are not compared."""
    if not (actual / "metrics.json").is_file():
        return ["the run is not finished"]
    problems = [
        f"{name} differs"
        for name, same in (
            ("metrics.jsonl", rows(actual) == rows(expected)),
            ("metrics.json", results(actual) == results(expected)),
            ("final/model.safetensors", exported(actual) == exported(expected)),
        )
        if not same
    ]
    if not rows(actual):
        problems.append("metrics.jsonl has no rows")
    problems += state_differences(last_state(actual), last_state(expected))
    left = [path.name for path in actual.iterdir() if path.name.startswith(".") and path.is_dir()]
    left += [path.name for path in actual.rglob("*.tmp")]
    return problems + [f"left behind: {name}" for name in left]


def rows(path: Path) -> list[dict[str, Any]]:
    """The record, without its clocks; a torn last line is an error here."""
    lines = (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [without_clocks(json.loads(line)) for line in lines]


def without_clocks(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if not key.endswith(CLOCKS)}


def results(path: Path) -> dict[str, Any]:
    return without_clocks(json.loads((path / "metrics.json").read_text(encoding="utf-8")))


def exported(path: Path) -> str:
    return hashlib.sha256((path / "final" / "model.safetensors").read_bytes()).hexdigest()


def last_state(path: Path) -> dict[str, Any]:
    """The newest checkpoint's content, its clock, byte offset and memory left out."""
    manifest = verified(path / "checkpoints")[-1]
    state = torch.load(path / "checkpoints" / manifest["file"], weights_only=True)
    clocks = ("seconds", "metrics_offset", "peak_memory_mib")
    return {key: value for key, value in state.items() if key not in clocks}


def state_differences(actual: Any, expected: Any, where: str = "state") -> list[str]:
    """Paths at which two nested states are not the same bits."""
    if isinstance(actual, torch.Tensor) and isinstance(expected, torch.Tensor):
        return [] if _same_bits(actual, expected) else [f"{where} differs"]
    if isinstance(actual, dict) and isinstance(expected, dict):
        if list(actual) != list(expected):
            return [f"{where} has other keys"]
        pairs = [(f"{where}.{key}", actual[key], expected[key]) for key in actual]
    elif isinstance(actual, list | tuple) and isinstance(expected, list | tuple):
        if len(actual) != len(expected):
            return [f"{where} has another length"]
        pairs = [(f"{where}[{i}]", *pair) for i, pair in enumerate(zip(actual, expected))]  # noqa: B905
    else:
        same = type(actual) is type(expected) and actual == expected
        return [] if same else [f"{where}: {actual!r} is not {expected!r}"]
    return [problem for place, a, b in pairs for problem in state_differences(a, b, place)]


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    flat = (tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b))
    return torch.equal(*flat)


def verified(checkpoints: Path) -> list[dict[str, Any]]:
    """Manifests, oldest first; raises AssertionError where one is not whole or not true."""
    manifests = []
    for path in sorted(checkpoints.glob("step-*.json")):
        manifest = json.loads(path.read_bytes())
        body = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
        digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        assert digest == manifest["manifest_sha256"], f"{path.name} is damaged"
        data = (checkpoints / manifest["file"]).read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        assert digest == manifest["sha256"], f"{path.name} is of another object"
        manifests.append(manifest)
    return manifests


def broken_promises(run: Path) -> list[str]:
    """What must hold after a kill at any instant: every manifest is true, and two are kept as soon
    as two were saved (the newest's step says how many were)."""
    if not (run / "checkpoints").is_dir():
        return []
    try:
        steps = [manifest["step"] for manifest in verified(run / "checkpoints")]
    except (AssertionError, ValueError, OSError) as error:
        return [f"after the kill: {error}"]
    if steps and steps[-1] > 0 and len(steps) < 2:
        return [f"after the kill: only {steps} are kept"]
    return []


def snapshot(path: Path) -> dict[str, tuple[int, str]]:
    """Size and hash of every file below `path`, to see that a refusal changed nothing."""
    if not path.exists():
        return {}
    return {
        str(file.relative_to(path)): (
            file.stat().st_size,
            hashlib.sha256(file.read_bytes()).hexdigest(),
        )
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name not in (".lock", ".choices.lock")
    }


def clean_environment() -> dict[str, str]:
    """This process's environment, one thread, none of a hub's or a store's settings."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "HUB_"))}
    return kept | {"OMP_NUM_THREADS": "1"}
