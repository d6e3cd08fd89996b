"""Runs are joined by what was built: other names, copies, and what nobody provides."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from src.analysis import bundle, paper, report_tables, run_csv, run_figures, run_table
from src.spec import config, run_identity
from src.spec.config import TrainingConfig
from tests.synthetic_runs import GLU_SWEEP, SHARE_SWEEP, write_sweep

GLU, SHARE = "glu_expansion.yaml", "embed_ratio.yaml"
MODEL, TRAINING = "m" * 64, "t" * 64


def by_name(logs: Path) -> dict[str, dict[str, Any]]:
    rows = run_table.read_rows(logs)
    assert len({row["run"] for row in rows}) == len(rows)
    return {row["run"]: row for row in rows}


def state_built(logs: Path, **digests: str) -> None:
    """Let every config.yaml of the GLU sweep say what glu266x would be."""
    facts = {"vocab_size": 16_000, "embedding_ratio_asked": 0.35, "glu_expansion_asked": 2.66}
    for path in logs.glob("glu*/config.yaml"):
        content = yaml.safe_load(path.read_text())
        content["sweep"]["built"] = {"glu266x": facts | digests}
        path.write_text(yaml.safe_dump(content))


@pytest.fixture
def both(tmp_path: Path) -> Path:
    """emb35 at three seeds, and a GLU sweep of which glu266x was never begun."""
    same = {"model_digest": MODEL, "training_digest": TRAINING}
    write_sweep(tmp_path, SHARE, SHARE_SWEEP[:1], seeds=(0, 1, 2), planned_seeds=(0,), **same)
    rest = [experiment for experiment in GLU_SWEEP if experiment.name != "glu266x"]
    names = [experiment.name for experiment in GLU_SWEEP]
    write_sweep(tmp_path, GLU, rest, baseline="glu4x", names=names, planned_seeds=(0,))
    return tmp_path


def test_a_model_under_two_names_is_in_both_sweeps_without_a_study(both: Path) -> None:
    state_built(both, model_digest=MODEL, training_digest=TRAINING)
    rows = by_name(both)
    row, other = rows["glu266x"], rows["emb35"]
    assert (row["status"], row["sweep"], row["glu_expansion_asked"]) == ("finished", GLU, 2.66)
    assert row["test_perplexity"] == other["test_perplexity"] and not row["baseline"]
    assert "cost_usd" not in row and "path" not in row and row["same_as"] == "emb35"
    assert "glu266x-seed1" not in rows  # a seed that no run of this sweep has


def test_a_run_under_a_second_name_costs_nothing_and_is_one_point(
    both: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state_built(both, model_digest=MODEL, training_digest=TRAINING)
    rows = run_table.read_rows(both)
    runs, curves = run_csv.table(rows), run_table.read_curves(rows)
    assert "| 6 |" in report_tables.cost_table(runs), "three seeds of emb35 and three of the GLU"
    styles = paper.looks(runs)
    assert (styles["emb35"].colour, styles["glu266x"].colour != paper.BLACK) == (paper.BLACK, True)
    shown: list[str] = []
    drawn = run_figures._draw_curves
    monkeypatch.setattr(
        run_figures, "_draw_curves",
        lambda ax, group, *rest: shown.extend(group["run"]) or drawn(ax, group, *rest),
    )  # fmt: skip
    assert run_figures.learning_curves(runs, curves, styles, both / "curves.png")
    assert "glu266x" in shown, "with the curve of emb35"


def test_seeds_given_by_hand_are_joined_too(both: Path) -> None:
    write_sweep(both, GLU, GLU_SWEEP[:1], baseline="glu4x", seeds=(1, 3), planned_seeds=(0,))
    state_built(both, model_digest=MODEL, training_digest=TRAINING)
    rows = by_name(both)
    assert rows["glu266x-seed1"]["test_loss"] == rows["emb35-seed1"]["test_loss"]
    assert "glu266x-seed3" not in rows and "glu4x-seed1" not in rows  # nobody's plan


@pytest.mark.parametrize("other", ["model_digest", "training_digest"])
def test_another_model_or_training_is_not_joined(both: Path, other: str) -> None:
    same = {"model_digest": MODEL, "training_digest": TRAINING}
    state_built(both, **(same | {other: "x" * 64}))
    row = by_name(both)["glu266x"]
    assert row["status"] == "missing" and "none is the same" in row["reason"]


def test_a_copied_directory_is_one_run_and_the_furthest_copy_counts(tmp_path: Path) -> None:
    write_sweep(tmp_path / "logs", SHARE, SHARE_SWEEP)
    shutil.copytree(tmp_path / "logs/emb25", tmp_path / "logs/backup/emb25")
    (tmp_path / "logs/backup/emb25/metrics.json").unlink()
    rows = by_name(tmp_path / "logs")
    assert set(rows) == {"emb35", "emb25", "emb45"}
    assert rows["emb25"]["status"] == "finished" and "backup/emb25" in rows["emb25"]["reason"]


def test_an_edited_config_is_not_believed(tmp_path: Path) -> None:
    write_sweep(tmp_path, SHARE, SHARE_SWEEP[:2], names=["emb35", "emb25", "emb45"])
    assert by_name(tmp_path)["emb45"]["status"] == "missing"
    (tmp_path / "emb25/metrics.json").unlink()
    file = tmp_path / "emb25/config.yaml"
    file.write_text(file.read_text().replace("learning_rate: 0.004", "learning_rate: 0.4"))
    row = by_name(tmp_path)["emb25"]
    assert "learning_rate" not in row and "digest differs" in row["reason"]


@pytest.mark.parametrize("content", ['{"status": "finished"}', '{"status": "finished", "run": 1}'])
def test_a_foreign_metrics_file_is_a_failed_row(tmp_path: Path, content: str) -> None:
    write_sweep(tmp_path, SHARE, SHARE_SWEEP)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/metrics.json").write_text(content)
    row = by_name(tmp_path)["elsewhere"]
    assert row["status"] == "failed" and "no run of this project" in row["reason"]


def test_only_what_is_learned_from_counts_as_training() -> None:
    base = TrainingConfig(init_seed=0)
    digest = run_identity.training_digest(base)
    for change in ({"init_seed": 1}, {"micro_batch": 4}, {"dev_tokens": 9}, {"threads": 2}):
        other = TrainingConfig(**(config.to_dict(base) | change))
        assert run_identity.training_digest(other) == digest
    for change in ({"tokens": 1}, {"weight_decay": 0.2}, {"warmup_fraction": 0.1}):
        other = TrainingConfig(**(config.to_dict(base) | change))
        assert run_identity.training_digest(other) != digest


def test_two_conditions_are_neither_of_them() -> None:
    first, second = {"torch": "1"}, {"torch": "2"}
    both = run_identity.compute_digest([first, second])
    one, two = (run_identity.compute_digest([condition]) for condition in (first, second))
    assert both == f"{one}+{two}" and one != two


def test_a_processor_is_no_other_program() -> None:
    here = {"torch": "1", "device_name": "a", "cpu_capability": "AVX512", "amx": ["amx_bf16"]}
    there = {"torch": "1", "device_name": "b", "cpu_capability": "AVX2", "amx": []}
    newer = here | {"torch": "2"}
    one, moved, other = (
        run_identity.program_digest(conditions) for conditions in ([here], [here, there], [newer])
    )
    assert one == moved != other
    assert run_identity.compute_digest([here]) != run_identity.compute_digest([there])
    assert run_identity.processors([here, there]) == "a AVX512 amx_bf16; b AVX2"


@pytest.mark.parametrize(
    "foreign",
    [
        {"seed": "${oc.env:SEED}"},
        {"sweep": {"file": SHARE, "built": ["no mapping"]}},
        {"sweep": {"file": SHARE, "experiments": "emb35", "seeds": 3}},
    ],
)
def test_a_foreign_config_is_a_row_and_no_failure(both: Path, foreign: dict[str, Any]) -> None:
    (both / "theirs").mkdir()
    (both / "theirs/config.yaml").write_text(yaml.safe_dump(foreign))
    rows = run_table.read_rows(both)
    assert by_name(both)["theirs"]["status"] == "unfinished"
    assert bundle.bundle(rows, [both])["runs"]
