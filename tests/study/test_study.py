"""A whole study in miniature: through, cut, killed, without money, and from its publication."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from src.run import Preempted
from src.storage.run_dir import read_curve, read_rows
from src.study import runner, sanity_training
from src.study.processes import Start
from src.study.state import Reader
from tests import ROOT, python
from tests.study import Ended, until
from tests.study.invented import SANE

BASE: dict[str, Any] = {
    "model": {"total_params": 98_192, "vocab_size": 304},
    "training": {
        "tokens": 2_048, "ranking_tokens": 1_024, "batch_size": 8, "seq_len": 32,
        "dev_tokens": 640, "threads": 1, "precision": "fp32",
    },
    "data": {"dir": "tokens"},
    "evaluation": {"metrics": ["perplexity"], "latency": False, "perplexity_tokens": 400},
}  # fmt: skip
BLOCKS: list[dict[str, Any]] = [
    {"name": "sanity", "config": "embed.yaml", "phase": "sanity", "experiments": ["e10"]},
    {"name": "noise", "config": "embed.yaml", "phase": "rank", "experiments": ["e10"],
     "seeds": [0, 1]},
    {"name": "share", "config": "embed.yaml", "phase": "rank"},
    {"name": "glu", "config": "glu.yaml", "leader_of": "share", "phase": "rank"},
    {"name": "vocabulary", "config": "vocab.yaml", "grid_of": "share", "phase": "rank"},
    {"name": "finals", "finalists_of": ["share", "glu"], "seeds": [0, 1]},
]  # fmt: skip


@pytest.fixture
def tiny(tmp_path: Path, token_root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a whole study in miniature. tests/study/test_sanity.py has the
    checks at their real length."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sanity_training, "OVERFIT_LOSS", 5.0)
    monkeypatch.setattr(sanity_training, "RANGE_STEPS", 20)
    sweeps: dict[str, list[dict[str, Any]]] = {
        "embed": [{"name": "e10", "embedding_ratio": 0.098},
                  {"name": "e15", "embedding_ratio": 0.147}],
        "glu": [{"name": "g27", "glu_expansion": 2.66}, {"name": "g15", "glu_expansion": 1.5}],
        "vocab": [{"name": "a"}, {"name": "b", "vocab_size": 312},
                  {"name": "c", "vocab_size": 312, "tie_embeddings": False}],
    }  # fmt: skip
    for name, experiments in sweeps.items():
        content = {**BASE, "experiments": experiments}
        if name != "embed":
            content["model"] = {**BASE["model"], "embedding_ratio": 0.098}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    write_study(tmp_path / "study.yaml", corpus=str(token_root.parent / "corpus"))
    return tmp_path


def write_study(path: Path, **keys: Any) -> None:
    """The study file with further keys, those that it has included."""
    content = yaml.safe_load(path.read_text()) if path.exists() else {"blocks": BLOCKS}
    content |= {"device": "cpu", "tokens_per_s": 10_000, **keys}
    path.write_text(yaml.safe_dump(content))


def in_process(line: Sequence[str]) -> int:
    """A job's command without another import of torch."""
    return python(*line[1:], cwd=Path.cwd()).returncode


def here(execute: Callable[[Sequence[str]], int] = in_process) -> Start:
    return lambda line: Ended(execute(line))


def recorded(begun: list[str]) -> Start:
    """Keeps the command lines that it runs."""

    def execute(line: Sequence[str]) -> int:
        begun.append(" ".join(line))
        return in_process(line)

    return here(execute)


def timeless(path: Path) -> Any:
    content = json.loads(path.read_text())
    content.pop("costs")
    content["decisions"] = [d for d in content["decisions"] if "cost" not in d["rule"]]
    return content


def check_the_csv(tiny: Path) -> None:
    """An alias is a row with its original's numbers and no cost, and is not missing."""
    line = ("scripts/aggregate_results.py", "--log_dir", "whole", "--no_figures")
    assert python(*line, cwd=tiny).returncode == 0
    rows: dict[str, dict[str, str]] = {}
    for name in ("results_summary.csv", "results_details.csv"):
        with (tiny / name).open(newline="") as file:
            for row in csv.DictReader(file):
                rows.setdefault(row["run"], {}).update(row)
    alias, original = rows["e10-v304-tied-rank"], rows["e10-rank"]
    assert alias["dev_loss"] == original["dev_loss"] and alias["status"] == "finished"
    assert (alias["cost_usd"], alias["sweep"]) == ("", "vocabulary.yaml")
    assert original["cost_usd"] and "e10-rank" in alias["reason"]


def test_a_study_cut_again_and_again_ends_like_an_uninterrupted_one(tiny: Path) -> None:
    """Cut by a stop of the study between two jobs, and by jobs that are preempted."""
    assert runner.run(runner.load(Path("study.yaml"), log_dir="whole"), start=here()) == 0
    whole = timeless(tiny / "whole" / "study.json")
    assert whole["complete"] is True
    assert [d for d in whole["decisions"] if d["rule"] == "winner"]
    assert {"0", "1", "1b", "2"} <= {d["phase"] for d in whole["decisions"]}
    assert (tiny / "whole" / "configs" / "vocabulary.yaml").is_file()
    assert (tiny / "whole" / "e10-sanity" / "learning_rates.png").is_file()

    check_the_csv(tiny)

    done: list[str] = []
    # A finished step is only read: many need not be done again here.
    for run in [*(tiny / "whole").glob("e1*-sanity"), *(tiny / "whole").glob("e1*-rank*")]:
        shutil.copytree(run, tiny / "cut" / run.name)

    def cut(line: Sequence[str]) -> int:
        """Every third job is preempted before it begins, every fourth stops the study."""
        done.append(" ".join(line))
        if len(done) % 4 == 0:
            raise Preempted("SIGTERM")
        return 75 if len(done) % 3 == 0 else in_process(line)

    codes: list[int] = []
    while not codes or codes[-1] == 75:
        assert len(codes) < 20
        study = runner.load(Path("study.yaml"), log_dir="cut")
        try:
            codes.append(runner.run(study, start=here(cut), pause_s=0.0))
        except Preempted:
            codes.append(75)
    assert codes[-1] == 0 and len(codes) > 2
    assert timeless(tiny / "cut" / "study.json") == whole
    before = len(done)
    assert runner.run(runner.load(Path("study.yaml"), log_dir="cut"), start=here(cut)) == 0
    assert len(done) == before  # nothing left to do


def test_a_publication_is_enough_to_go_on_elsewhere(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The machine is lost with all logs; what was published counts as finished: by the plan, by a
    run of the same name, and by the next publication."""
    folder = [{**BLOCKS[0], "folder": "a"}, {**BLOCKS[1], "folder": "a"}]
    later = {**BLOCKS[2], "folder": "b"}
    write_study(tiny / "study.yaml", blocks=folder, published="published")
    first = runner.load(Path("study.yaml"), log_dir="lost")
    assert runner.run(first, start=here()) == 0
    publish = ("scripts/publish_results.py", "--output", "published", "--log_dir")
    assert python(*publish, "lost", cwd=tiny).returncode == 0
    run = Path("a", "e10-rank")
    small = sorted(path.name for path in (tiny / "published" / "runs" / run).iterdir())
    assert {"curve.csv", "documents_validation.npz", "metrics.json"} <= set(small)
    assert not {"checkpoints", "final", "config.yaml", "metrics.jsonl"} & set(small)
    old = tiny / "lost" / run
    losses, curve = Reader(first).documents(str(run), "validation"), read_curve(old)
    old_result = (old / "metrics.json").read_bytes()
    shutil.rmtree(tiny / "lost")

    write_study(tiny / "study.yaml", blocks=[*folder, later])
    capsys.readouterr()
    # A machine on which this run was cut goes on with its own, whatever was published of it.
    (tiny / "cut" / run / "checkpoints").mkdir(parents=True)
    assert runner.run(runner.load(Path("study.yaml"), log_dir="cut"), dry_run=True) == 0
    assert "next: a/e10-rank" in capsys.readouterr().out
    second = runner.load(Path("study.yaml"), log_dir="new")
    assert runner.run(second, dry_run=True) == 0
    assert "next: b/e10-rank (share)" in capsys.readouterr().out and not (tiny / "new").exists()
    begun: list[str] = []
    assert runner.run(second, start=recorded(begun)) == 0
    assert len(begun) == 2 and all("--log_dir new/b" in line for line in begun)
    assert (tiny / "new" / run / "metrics.json").read_bytes() == old_result
    found = Reader(second).documents(str(run), "validation")
    assert losses is not None and found is not None and (found.nats == losses.nats).all()
    restored = read_curve(tiny / "new" / run)
    assert [t for t, _ in restored] == [t for t, _ in curve]
    assert [p for _, p in restored] == pytest.approx([p for _, p in curve])
    line = ("--config", "embed.yaml", "--exp", "e10", "--phase", "rank", "--log_dir", "new/a")
    again = python("run_experiment.py", *line, "--device", "cpu", cwd=tiny)
    assert again.returncode == 0 and "finished before, nothing to do" in again.stdout
    assert python(*publish, "new", cwd=tiny).returncode == 0
    with (tiny / "published" / "results_summary.csv").open(newline="") as file:
        rows = {row["run"]: row["status"] for row in csv.DictReader(file)}
    assert rows["a/e10-rank"] == rows["a/e10-rank-seed1"] == rows["b/e15-rank"] == "finished"
    assert len((tiny / "published" / "runs" / run / "curve.csv").read_text().splitlines()) > 2


def test_a_killed_study_can_be_started_again_at_once(tiny: Path, token_root: Path) -> None:
    """What it left behind saves and ends, is waited for, and is gone on with; the whole story is
    `python -m tests.study_kills`."""
    (tiny / "logs" / "e10-sanity").mkdir(parents=True)
    (tiny / "logs" / "e10-sanity" / "sanity.json").write_text(json.dumps(SANE))
    longer = ["training.ranking_tokens=40000", "training.checkpoint_every_steps=10"]
    write_study(tiny / "study.yaml", overrides=longer, jobs=1)
    tokens = ("--input", token_root.parent / "corpus", "--vocab_size", 304, "--output", "tokens")
    assert python("scripts/preprocess_lm.py", *tokens, cwd=tiny).returncode == 0
    line = [sys.executable, "-W", "error", str(ROOT / "run_experiment.py"), "--study", "study.yaml"]
    run = tiny / "logs" / "e10-rank"

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            line, cwd=tiny, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    first = start()
    until(lambda: any((run / "checkpoints").glob("step-*.json")), first)
    first.kill()
    with first:  # wait for it, close its pipe
        pass
    second = start()
    try:
        until(lambda: (run / "metrics.json").is_file(), second)
    finally:
        second.terminate()
        output, _ = second.communicate(timeout=120)
    assert second.returncode == 75, output
    assert "to go on: python run_experiment.py --study" in output
    steps = [row["step"] for row in read_rows(run / "metrics.jsonl", "train")]
    assert steps == sorted(set(steps))


def test_the_study_stops_before_the_money_is_spent(tiny: Path) -> None:
    write_study(tiny / "study.yaml", budget_usd=1e-9)
    begun: list[str] = []
    with pytest.raises(ValueError, match="stopped before e10-sanity: .* budget_usd"):
        runner.run(runner.load(Path("study.yaml")), start=recorded(begun))
    assert len(begun) == 1 and "preprocess_lm" in begun[0]  # making tokens costs nothing


def test_an_error_of_a_job_is_the_studys(tiny: Path) -> None:
    assert runner.run(runner.load(Path("study.yaml")), start=here(lambda line: 74)) == 74


def test_failed_checks_end_the_study(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tiny / "logs" / "e10-sanity").mkdir(parents=True)
    failed = {**SANE, "passed": False, "reason": "it does not overfit"}
    (tiny / "logs" / "e10-sanity" / "sanity.json").write_text(json.dumps(failed))
    assert runner.run(runner.load(Path("study.yaml")), start=here()) == 70
    assert "it does not overfit" in capsys.readouterr().err


def test_the_command_line_prints_the_plan_and_touches_nothing(tiny: Path) -> None:
    line = ("run_experiment.py", "--study", "study.yaml")
    done = python(*line, "--dry_run", cwd=tiny)
    assert done.returncode == 0, done.stderr
    assert "finals" in done.stdout and "stated 10,000 tokens/s" in done.stdout
    assert "next: tokens/v304 (sanity)" in done.stdout
    assert not list((tiny / "logs").glob("*/metrics.json"))
    refused = python(*line, "--exp", "e10", cwd=tiny)
    assert refused.returncode == 78 and "--study: takes no --exp" in refused.stderr


def test_damaged_losses_of_documents_and_failures_are_named(tiny: Path) -> None:
    run = tiny / "logs" / "e10"
    run.mkdir(parents=True)
    reader = Reader(runner.load(Path("study.yaml")))
    assert reader.documents("e10", "validation") is None
    (run / "documents_test.npz").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(ValueError, match="documents_test.npz: found a damaged file.*metrics.json"):
        reader.documents("e10", "test")
    (run / "failure.json").write_text("{")
    with pytest.raises(ValueError, match="failure.json: found no JSON"):
        reader.state()
