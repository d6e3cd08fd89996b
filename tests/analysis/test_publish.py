"""scripts/publish_results.py: what is small, whole, and nothing of this machine."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from tests import ROOT, python
from tests.synthetic_runs import SHARE_SWEEP, write_sweep


def publish(log_dir: Path, output: Path, code: int = 0, cwd: Path = ROOT) -> str:
    line = ("scripts/publish_results.py", "--log_dir", log_dir, "--output", output)
    done = python(*line, cwd=cwd)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_log_directory_becomes_small_files(tiny_sweep: Path, tmp_path: Path) -> None:
    logs, output = tmp_path / "logs", tmp_path / "published"
    experiments = ("--config", tiny_sweep, "--exp", "base", "deep", "--device", "cpu")
    assert python("run_experiment.py", *experiments, "--log_dir", logs).returncode == 0
    (logs / "study.json").write_text("{}")
    publish(Path("logs"), Path("published"), cwd=tmp_path)
    metrics = json.loads((output / "runs/base/metrics.json").read_text())
    record = [json.loads(line) for line in (logs / "base/metrics.jsonl").read_text().splitlines()]
    with (output / "runs/base/curve.csv").open(newline="") as file:
        points = list(csv.DictReader(file))
    dev = {row["tokens"]: row["dev_loss"] for row in record if row["kind"] == "dev"}
    assert {int(p["tokens"]): float(p["dev_loss"]) for p in points if p["dev_loss"]} == dev
    assert int(points[-1]["tokens"]) == metrics["tokens"]
    files = [path for path in output.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"results_summary.csv", "results_bundle.json", "study.json", "documents_test.npz",
            "ppl_vs_glu_expansion.png"} <= names  # fmt: skip
    assert not [name for name in names if name.endswith((".pt", ".safetensors"))]
    text = "".join(path.read_text() for path in files if path.suffix in (".json", ".csv"))
    assert str(tmp_path) not in text
    publish(Path("logs"), Path("published"), cwd=tmp_path)  # brought up to date


def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("")
    assert "found a folder without" in publish(tmp_path, other, code=78)
    assert "found no such directory" in publish(tmp_path / "none", tmp_path / "new", code=78)


def test_a_publication_of_other_runs_is_refused_and_an_old_figure_goes(tmp_path: Path) -> None:
    logs, output = tmp_path / "logs", tmp_path / "published"
    write_sweep(logs, "embed_ratio.yaml", SHARE_SWEEP[:2])
    publish(logs, output)
    (output / "rank_agreement.png").write_bytes(b"of another day")
    write_sweep(logs, "embed_ratio.yaml", SHARE_SWEEP[2:])
    publish(logs, output)
    assert (output / "runs/emb45").is_dir() and not (output / "rank_agreement.png").exists()
    other = tmp_path / "other"
    write_sweep(other, "embed_ratio.yaml", SHARE_SWEEP[:1])
    assert "found 2 published runs that no log" in publish(other, output, code=78)
    assert (output / "runs/emb45").is_dir()


def test_a_tuned_and_a_foreign_directory_and_folders_of_this_machine(tmp_path: Path) -> None:
    logs, output = tmp_path / "logs", tmp_path / "published"
    write_sweep(logs, "embed_ratio.yaml", SHARE_SWEEP)
    for name, rows in {"tuned": {"answer_loss": 1.0}, "other": {}}.items():
        (logs / name).mkdir()
        (logs / name / "metrics.json").write_text(json.dumps({"phase": "tuning"} | rows))
        line = {"kind": "dev", "step": 1, "tokens": 8} | rows
        (logs / name / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    (logs / "emb45/metrics.json").unlink()
    (logs / "emb45/failure.json").write_text(json.dumps({"message": f"no {tmp_path}/data"}))
    publish(logs, output, cwd=tmp_path)
    with (output / "results_details.csv").open(newline="") as file:
        paths = {row["run"]: row["path"] for row in csv.DictReader(file)}
    assert paths["emb25"] == "runs/emb25" and (output / "runs/emb25/metrics.json").is_file()
    for path in output.rglob("*"):
        assert path.is_dir() or str(tmp_path).encode() not in path.read_bytes(), path
    assert not list(tmp_path.glob(".published*"))
