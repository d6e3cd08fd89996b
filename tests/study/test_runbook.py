"""docs/RUNBOOK.md, executed: every command as printed, on tiny sweeps of the same names."""

from __future__ import annotations

import csv
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from src.study import runner
from src.study.processes import Start
from tests import ROOT, python
from tests.study import Ended
from tests.tiny_mirror import build_tiny_mirror, write_tiny_tasks

RUNBOOK = ROOT / "docs" / "RUNBOOK.md"
BLOCK = re.compile(r"(?P<mark><!-- not rehearsed: [^\n]+ -->\n)?```bash\n(?P<text>.*?)```", re.S)
REPLACED = re.compile(r"^\| `(?P<here>[^`]+)` \| `(?P<there>[^`]+)` \|", re.M)

TINY: dict[str, Any] = {
    "model": {"total_params": 98_304, "vocab_size": 304},
    "training": {
        "tokens": 1_024, "ranking_tokens": 512, "batch_size": 4, "seq_len": 32, "dev_tokens": 128,
        "threads": 1, "precision": "fp32",
    },
    "data": {"dir": "data/lm_tokenized"},
    "evaluation": {
        "metrics": ["perplexity", "smallbench_accuracy"], "latency": False,
        "perplexity_tokens": 300, "smallbench_tasks": "configs/smallbench.yaml",
        "smallbench_limit": 2, "latency_repeats": 2, "latency_warmup": 0,
    },
}  # fmt: skip
SWEEPS: dict[str, list[dict[str, Any]]] = {
    "embed_ratio": [
        {"name": "emb35", "embedding_ratio": 0.147},
        # Learns nothing, so that emb35 leads and the study finds its GLU sweep done by hand.
        {"name": "emb25", "embedding_ratio": 0.098, "training": {"learning_rate": 1e-7}},
    ],
    "glu_expansion": [
        {"name": "glu4x", "glu_expansion": 1.5, "embedding_ratio": 0.147},
        {"name": "glu266x", "glu_expansion": 2.66, "embedding_ratio": 0.147},
    ],
    "vocab_tying": [
        {"name": "v16k-tied-emb35", "embedding_ratio": 0.147},
        {"name": "v8k-tied-emb25", "embedding_ratio": 0.098, "vocab_size": 320},
    ],
}
STUDY = {
    "jobs": 2, "corpus": "data/wikitext-2",
    "blocks": [
        {"name": "sanity", "config": "configs/embed_ratio.yaml", "phase": "sanity",
         "experiments": ["emb35"]},
        {"name": "noise", "config": "configs/embed_ratio.yaml", "phase": "rank",
         "experiments": ["emb35"], "seeds": [0, 1]},
        {"name": "share", "config": "configs/embed_ratio.yaml", "phase": "rank"},
        {"name": "glu", "config": "configs/glu_expansion.yaml", "leader_of": "share",
         "phase": "rank"},
        {"name": "finals", "finalists_of": ["share", "glu"]},
    ],
}  # fmt: skip
REPORT = "# Report\n\n<!-- table:decisions --><!-- /table:decisions -->\n"


def commands() -> list[list[str]]:
    """The lines of the runbook's blocks with its own table of replacements applied, as words."""
    text = RUNBOOK.read_text(encoding="utf-8")
    script = "".join(match["text"] for match in BLOCK.finditer(text) if not match["mark"])
    replaced = [(match["here"], match["there"]) for match in REPLACED.finditer(text)]
    assert len(replaced) == 4 and len(script.splitlines()) >= 12
    for here, there in replaced:
        assert re.search(rf"(?<!\w){re.escape(here)}(?!\w)", script), here
        script = re.sub(rf"(?<!\w){re.escape(here)}(?!\w)", there, script)
    assert not set(script) & set("$&;|<>*`\\"), "more than words: a shell has to run it"
    return [shlex.split(line) for line in script.splitlines()]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the configs, a mirror of the hub, and no GPU. A study's commands run in
    this process, too."""
    for name, experiments in SWEEPS.items():
        write_config(tmp_path, name, {**TINY, "experiments": experiments})
    write_config(tmp_path, "study", STUDY)
    write_tiny_tasks(tmp_path / "configs" / "smallbench.yaml")
    (tmp_path / "REPORT.md").write_text(REPORT)

    def start(line: Sequence[str]) -> Ended:
        return Ended(python(*line[1:], cwd=tmp_path).returncode)

    def starter(jobs: int, threads: int) -> Start:
        return start

    monkeypatch.setattr(runner, "starter", starter)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("HUB_MIRROR", str(mirror_with_instructions(tmp_path / "mirror")))
    return tmp_path


def write_config(root: Path, name: str, content: dict[str, Any]) -> None:
    (root / "configs").mkdir(exist_ok=True)
    (root / "configs" / f"{name}.yaml").write_text(yaml.safe_dump(content))


def mirror_with_instructions(root: Path) -> Path:
    folder = build_tiny_mirror(root) / "mosaicml" / "dolly_hhrlhf" / "default"
    folder.mkdir(parents=True)
    columns = {"prompt": [f"say {n}:" for n in range(40)], "response": ["rain"] * 40}
    pq.write_table(pa.table(columns), folder / "train-00000-of-00001.parquet")
    return root


def test_every_command_of_the_runbook_works_as_printed(place: Path) -> None:
    for program, *words in commands():
        assert program == "python"
        done = python(*words, cwd=place)
        assert done.returncode == 0, f"{words}: {done.stdout[-3000:]}{done.stderr[-3000:]}"

    with (place / "results_summary.csv").open(newline="") as file:
        table = {row["run"]: row for row in csv.DictReader(file)}
    finished = {run for run, row in table.items() if row["status"] == "finished"}
    by_hand = {"emb35-rank-seed4", "emb25-rank", "glu4x-rank", "v8k-tied-emb25-rank", "emb25-seed2"}
    assert by_hand <= finished
    assert float(table["emb25-seed2"]["smallbench_accuracy"]) >= 0
    for name in ("ppl_vs_embedding_ratio.png", "ppl_vs_glu_expansion.png"):
        assert (place / name).read_bytes().startswith(b"\x89PNG")
    found = json.loads((place / "logs" / "study.json").read_text())
    assert found["complete"] is True and found["costs"]["runbook_usd"] > 0
    assert "emb25-tuned" in finished
    assert "2 | winner" in re.sub(r" +", " ", (place / "REPORT.md").read_text())


def test_the_runbook_names_only_experiments_that_ship() -> None:
    text = RUNBOOK.read_text(encoding="utf-8")
    for line in text.splitlines():
        match = re.match(r"python run_experiment.py --config (\S+) --exp ([\w ]+?)( --|$)", line)
        if match and match[2] != "all":
            listed = yaml.safe_load((ROOT / match[1]).read_text())["experiments"]
            assert set(match[2].split()) <= {entry["name"] for entry in listed}, line
