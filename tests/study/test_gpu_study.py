"""scripts/gpu_study.sh, rehearsed on the CPU: stages, packs, and going on from packs elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT, SWEEP

SWEEPS = {
    "embed_ratio": [{"name": "emb35"}, {"name": "emb25", "glu_expansion": 1.5}],
    "frontier": [{"name": "share40"}],
    "factorised": [{"name": "rank96", "glu_expansion": 1.5}],
    "depth_control": [{"name": "fixed"}],
}


@pytest.fixture
def place(tmp_path: Path, token_root: Path) -> Path:
    """A directory like the repository's root, with tiny sweeps."""
    for name in ("scripts", "src", "run_experiment.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "configs").mkdir()
    base = yaml.safe_load(SWEEP.format(tokens=token_root))
    for name, experiments in SWEEPS.items():
        content = {**base, "experiments": experiments}
        (tmp_path / "configs" / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return tmp_path


def session(place: Path, *stages: str, code: int = 0, **changes: str) -> str:
    """One machine's call of the script."""
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "DEVICE": "cpu", "PYTHON": sys.executable,
        "SET": "training.tokens=768", "LIMIT": "0", **changes,
    }  # fmt: skip
    done = subprocess.run(
        ["bash", "scripts/gpu_study.sh", *stages],
        cwd=place, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout + done.stderr


def test_a_vanished_machine_goes_on_from_its_packs(place: Path) -> None:
    session(place, "shares")
    with tarfile.open(place / "gpu" / "shares.tar.gz") as pack:
        names = pack.getnames()
    assert {"logs/gpu/emb35/metrics.json", "logs/gpu/emb25/metrics.jsonl"} <= set(names)
    assert "gpu/results_summary.csv" in names and "gpu/shares.log" in names
    assert not [name for name in names if "checkpoints" in name or "/final/" in name]
    first = (place / "logs/gpu/emb35/metrics.json").read_bytes()

    shutil.rmtree(place / "logs")  # the machine is gone; the packs were brought along
    said = session(place, "shares", "arms")
    assert (place / "logs/gpu/emb35/metrics.json").read_bytes() == first
    assert said.count("dev perplexity") >= 3  # the arms ran
    rows = (place / "gpu/results_summary.csv").read_text().splitlines()
    assert sum(",finished," in row for row in rows) == 5


def test_a_stage_that_fails_is_packed_named_and_passes_its_code_on(place: Path) -> None:
    (place / "configs" / "embed_ratio.yaml").write_text("experiments: 3\n")
    said = session(place, "shares", code=78)
    assert "=== shares: exit 78" in said and (place / "gpu/shares.tar.gz").is_file()
    assert "found the stage 'sharse'" in session(place, "sharse", code=78)
