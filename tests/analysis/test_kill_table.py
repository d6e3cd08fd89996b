"""The kill rule's live verdicts beside those of whole curves, as the aggregator prints them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from src.analysis import aggregate, kill_table

TOKENS = (10, 20, 30, 40)
BASE = (50.0, 40.0, 30.0, 25.0)
BAD = (60.0, 50.0, 40.0, 35.0)  # 10 above it at every check: killed at 20
LATE = (60.0, 50.0, 29.0, 24.0)  # so is this one, and it ends lower


def write_run(
    folder: Path, name: str, perplexities: tuple[float, ...], *, model: str = "", **metrics: Any
) -> None:
    """A run at the full budget that the rule judged as `metrics` say; one that ends early was
    stopped."""
    run = folder / name
    run.mkdir(parents=True)
    training = {"tokens": 40, "batch_size": 1, "seq_len": 10}
    config = {
        "experiment": name,
        "baseline": "base",
        "phase": "full",
        "seed": 0,
        "data_sha256": metrics.pop("data", "one"),
        "training": {**training, "eval_every_tokens": 10, "dev_tokens": None},
        "kill_rule": {"action": metrics.get("kill_action", "stop"), "margin_ppl": 5.0,
                      "window_tokens": 10, "grace_tokens": 0},
    }  # fmt: skip
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    rows = [
        {"kind": "dev", "step": t // 10, "tokens": t, "dev_perplexity": ppl, "dev_loss": 1.0}
        for t, ppl in zip(TOKENS, perplexities, strict=False)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    known = {
        "run": name, "experiment": name, "phase": "full", "seed": 0, "baseline_name": "base",
        "baseline": name == "base", "model_digest": model or name, "tokens": rows[-1]["tokens"],
        "status": "finished" if len(rows) == len(TOKENS) else "killed", **metrics,
    }  # fmt: skip
    (run / "metrics.json").write_text(json.dumps(known))


def printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[list[str], str]:
    """What the aggregator says of the rule, and its table."""
    report = folder / "report.md"
    report.write_text("<!-- table:kill-rule --><!-- /table:kill-rule -->\n")
    arguments = ["--log_dir", str(folder / "logs"), "--output", str(folder / "runs.csv")]
    assert aggregate.main([*arguments, "--report", str(report), "--no_figures"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "kill rule" in line]
    return lines, report.read_text()


def test_a_run_that_began_before_its_baseline_is_named(tmp_path: Path, capsys) -> None:
    logs = tmp_path / "logs"
    write_run(logs, "base", BASE)
    write_run(logs, "early", BAD, kill_verdict="none", kill_checks_without_baseline=4)
    write_run(logs, "fine", BASE, kill_verdict="keep")
    write_run(logs, "stopped", BAD[:2], kill_verdict="kill", kill_tokens=20)
    lines, report = printed(tmp_path, capsys)
    assert "3 runs judged, 1 otherwise" in lines[0]
    assert len(lines) == 2 and "early: live none, over the whole curves kill at 20" in lines[1]
    assert "| early | base | stop | none | **kill at 20** | +10.00 | 20 |" in report
    assert "| fine | base | stop | keep | keep | +0.00 | 0 |" in report
    assert "| stopped | base | stop | kill at 20 | kill at 20 | – | 20 |" in report


def test_what_recorded_verdicts_would_have_saved_and_cost(tmp_path: Path, capsys) -> None:
    """Both were let go on: one kill would have been right, the other would have cost the best."""
    logs = tmp_path / "logs"
    recorded: dict[str, Any] = {"kill_verdict": "kill", "kill_tokens": 20, "kill_action": "record"}
    write_run(logs, "base", BASE)
    write_run(logs, "bad", BAD, **recorded)
    write_run(logs, "late", LATE, **recorded)
    lines, report = printed(tmp_path, capsys)
    assert len(lines) == 1, "the live verdicts are those of the whole curves"
    wrong = "kills 2, 1 of which ended no worse than the baseline (1 of 1 such, 95 % interval 3 to "
    assert f"the rule {wrong}100 %); it saves 40 of 80 tokens" in lines[0]
    assert f"its literal reading (no grace) {wrong}" in lines[0]
    assert (
        "| late | base | record | kill at 20 | kill at 20 | -1.00, killed wrongly | 20 |" in report
    )


def test_a_baseline_under_another_name_or_none_at_all(tmp_path: Path, capsys) -> None:
    """`twin` is the same model as `base`, which the study did not train; other data is no peer."""
    logs = tmp_path / "logs"
    write_run(logs, "twin", BASE, model="b")
    write_run(logs, "early", BAD, kill_verdict="none")
    write_run(logs, "other", BAD, kill_verdict="none", data="two")
    _, alone = printed(tmp_path, capsys)
    assert "| early | – | stop | none | no finished baseline | – | – |" in alone
    alias = {"run": "base", "alias_of": "twin", "experiment": "base", "sweep": "s.yaml"}
    (logs / "study.json").write_text(json.dumps({"aliases": [alias], "decisions": []}))
    lines, report = printed(tmp_path, capsys)
    assert "| early | twin | stop | none | **kill at 20** | +10.00 | 20 |" in report
    assert "| other | twin | stop | none | none | – | – |" in report and len(lines) == 2


def test_a_kill_that_came_late_or_unfounded_is_named(tmp_path: Path, capsys) -> None:
    logs = tmp_path / "logs"
    write_run(logs, "base", BASE)
    write_run(logs, "behind", BAD, kill_verdict="kill", kill_tokens=40)
    write_run(logs, "wrong", BASE[:2], kill_verdict="kill", kill_tokens=20)
    lines, _ = printed(tmp_path, capsys)
    assert any("behind: live kill at 40, over the whole curves kill at 20" in s for s in lines)
    assert any("wrong: live kill at 20, over the whole curves keep" in s for s in lines)


def test_an_unfinished_baseline_is_no_whole_curve() -> None:
    row = {"run": "a", "path": "a", "status": "finished", "phase": "full", "seed": 0,
           "baseline_name": "base", "kill_verdict": "keep", "tokens": 40}  # fmt: skip
    base = {"run": "base", "path": "base", "status": "unfinished"}
    config = {"kill_rule": {"margin_ppl": 1.0}, "training": {"tokens": 40}}
    (run,) = kill_table.judge_runs([row, base], {"a": config})
    assert (run.baseline, run.whole, run.replayed) == (None, None, None)
