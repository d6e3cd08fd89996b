"""A finished run under another evaluation: measured again from its final weights, never trained."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal

import pytest
import yaml

from src.evaluation import evaluate as evaluation
from src.evaluation import metrics as run_metrics
from src.spec import config
from src.storage.run_dir import RunDir
from tests.evaluation import make_task, toy_rows, write_rows
from tests.runs import fingerprint, metrics, rows

OK, OUR_FAULT, TRY_AGAIN, BAD_INPUT = 0, 70, 75, 78


def test_a_finished_run_is_measured_again_where_the_evaluation_changed(copied, start, capsys):
    """Training keys stay refused, and what the earlier evaluation left and this one does not
    measure is gone."""
    before, curve = metrics(copied), rows(copied)
    weights = (copied / "final" / "model.safetensors").read_bytes()
    assert (copied / "documents_test.npz").exists()
    assert start("evaluation.test=false") == OK
    assert "evaluated again from its final weights" in capsys.readouterr().out
    after = metrics(copied)
    assert before["test_loss"] is not None and after["test_loss"] is None
    assert not (copied / "documents_test.npz").exists()
    assert after["config_digest"] == before["config_digest"]
    assert after["evaluation_digest"] != before["evaluation_digest"]
    same = ("dev_loss", "train_loss", "steps", "compute_digest")
    assert [after[key] for key in same] == [before[key] for key in same]
    peak = "train_peak_memory_mib"  # of the process that trained, until its last checkpoint
    assert after[peak] == pytest.approx(before[peak], rel=0.05)
    stored = yaml.safe_load((copied / "config.yaml").read_text())
    assert stored["evaluation"]["test"] is False and not run_metrics.edited(stored)
    assert stored["evaluation_digest"] == after["evaluation_digest"]
    assert rows(copied) == curve
    assert (copied / "final" / "model.safetensors").read_bytes() == weights
    assert start("evaluation.test=false") == OK
    assert "nothing to do" in capsys.readouterr().out
    assert start("evaluation.test=false", "training.learning_rate=0.1") == BAD_INPUT
    assert "training.learning_rate: 0.004 -> 0.1" in capsys.readouterr().err


def test_what_smallbench_asks_is_part_of_the_evaluation(tiny_sweep, tmp_path):
    tasks, rows_of = tmp_path / "tasks.yaml", tmp_path / "smallbench"
    tasks.write_text(yaml.safe_dump({"tasks": [dataclasses.asdict(make_task())]}))
    write_rows(rows_of, "toy", toy_rows(4))
    stated = [f"evaluation.smallbench_dir={rows_of}", f"evaluation.smallbench_tasks={tasks}"]
    stated.append("evaluation.metrics=[perplexity, smallbench_accuracy]")
    probed, plain = (config.load_sweep(tiny_sweep, o).run("base", 0) for o in (stated, ()))
    corpus = {"splits": {"train": {"sha256": "c" * 64}}}

    def digest(run):
        return run_metrics.evaluation_digest(run, corpus)

    digests, perplexity_alone = [digest(probed)], digest(plain)
    tasks.write_text(tasks.read_text() + "# a remark\n")
    assert digest(probed) == digests[0]
    tasks.write_text(tasks.read_text().replace("{{ q }}", "Q: {{ q }}"))
    digests.append(digest(probed))
    write_rows(rows_of, "toy", toy_rows(5))
    digests.append(digest(probed))
    report = {"tasks": {"toy": {"contaminated": [1]}}}
    (rows_of / f"leakage-{'c' * 12}.json").write_text(json.dumps(report))
    digests.append(digest(probed))
    assert len(set(digests)) == 4 and digest(plain) == perplexity_alone


def test_other_tasks_are_asked_of_a_finished_run(start, monkeypatch, capsys):
    for hashed, says in (("a", "base: "), ("a", "nothing to do"), ("b", "other tasks, rows")):
        monkeypatch.setattr(run_metrics, "_questions", lambda *_, h=hashed: {"questions_sha256": h})
        assert start("training.tokens=512") == OK
        assert says in capsys.readouterr().out
    assert "nothing to do" not in says and start("training.tokens=512") == OK
    assert "nothing to do" in capsys.readouterr().out


def test_a_cut_before_the_second_evaluation_loses_nothing(copied, start, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "write_config", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        assert start("evaluation.perplexity_tokens=300") == TRY_AGAIN
    assert not (copied / "metrics.json").exists()
    assert start("evaluation.perplexity_tokens=300") == OK
    assert metrics(copied)["dev_tokens_scored"] == 370  # whole documents


def test_a_run_whose_evaluation_failed_goes_on_with_another_one(start, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "_split", lambda *_: 1 / 0)
        assert start("training.tokens=512") == OUR_FAULT
    assert start("training.tokens=512", "evaluation.test=false") == OK
    message = "evaluation changed (test: True -> False): its training stands"
    assert message in capsys.readouterr().out


def test_without_final_weights_another_evaluation_is_refused(copied, start, capsys):
    shutil.rmtree(copied / "checkpoints")
    before = fingerprint(copied)
    assert start("evaluation.test=false") == BAD_INPUT
    assert "test: True -> False) and no checkpoint of its last step" in capsys.readouterr().err
    assert fingerprint(copied) == before
    assert start() == OK


def test_a_run_of_an_older_build_keeps_its_one_digest(copied, start, capsys):
    """Its config_digest, which its checkpoints carry, covers its evaluation too."""
    path = copied / "config.yaml"
    stored = yaml.safe_load(path.read_text())
    del stored["evaluation_digest"], stored["content_sha256"]
    stored["config_digest"] = run_metrics.older_digest(stored)
    path.write_text(yaml.safe_dump(stored, sort_keys=False))
    assert not run_metrics.edited(stored)
    assert start() == OK
    assert start("evaluation.test=false") == BAD_INPUT
    assert "evaluation.test: True -> False" in capsys.readouterr().err
    stored["evaluation"]["test"] = False
    assert run_metrics.edited(stored)
