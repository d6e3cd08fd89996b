"""The entry point as its users meet it: what runs leave, reruns, signals, faults, stores."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
import torch
import yaml

from src import train
from src.evaluation import evaluate as evaluation
from src.evaluation import metrics as run_metrics
from src.evaluation.trained_run import load_run
from src.spec import metric_keys
from src.storage.remote import Remote
from src.storage.run_dir import RunDir, read_rows
from tests import ROOT
from tests.conftest import VOCAB
from tests.runs import fingerprint, metrics, newest_state, rows

OK, OUR_FAULT, TRY_AGAIN, BAD_INPUT = 0, 70, 75, 78


# ---------------------------------------------------------------------------------- a whole run


def test_a_run_leaves_what_the_prd_asks_for(finished):
    run = finished / "base"
    stored = yaml.safe_load((run / "config.yaml").read_text())
    environment = json.loads((run / "environment.json").read_text())
    values = metrics(run)
    assert stored["tokenizer_sha256"] == values["tokenizer_sha256"]
    assert stored["asked"]["total_params_asked"] == 70_000 and stored["model"]["d_model"] == 48
    assert {"git_sha", "git_dirty", "torch", "threads", "device"} <= set(environment)
    assert (values["seed"], values["status"], values["reason"]) == (0, "finished", None)
    assert (values["device"], values["precision"], values["threads"]) == ("cpu", "fp32", 1)
    assert list((run / "checkpoints").glob("step-00000020-*.pt"))
    assert list((run / "tensorboard").glob("events*"))
    assert not (run / "failure.json").exists()


def test_the_config_says_what_every_run_of_the_sweep_is_and_an_edit_shows(finished):
    stored = yaml.safe_load((finished / "base" / "config.yaml").read_text(encoding="utf-8"))
    values, own = metrics(finished / "base"), stored["sweep"]["built"]["base"]
    for key in ("model_digest", "training_digest", "embedding_ratio_built", "total_params_asked"):
        assert own[key] == values[key]
    assert not run_metrics.edited(stored)
    assert run_metrics.edited({**stored, "sweep": {**stored["sweep"], "baseline": "deep"}})
    stored["training"]["learning_rate"] = 0.1
    assert run_metrics.edited(stored)


def test_every_run_has_exactly_the_keys_of_the_list(finished):
    assert set(metrics(finished / "base")) == metric_keys.STORED


def test_the_metrics_agree_with_each_other(finished):
    values = metrics(finished / "base")
    blocks = ("embedding", "projection", "attention", "ffn", "norm")
    assert (
        sum(values[f"params_{block}"] for block in blocks) == values["total_params_built"] == 70_000
    )
    share = (values["params_embedding"] + values["params_projection"]) / 70_000
    assert values["embedding_ratio_built"] == share
    assert values["glu_expansion_built"] == values["d_ff"] / values["d_model"]
    assert (values["steps"], values["tokens"]) == (20, 5_120)
    for split in ("dev", "test"):
        loss = values[f"{split}_loss"]
        assert values[f"{split}_perplexity"] == pytest.approx(2.718281828459045**loss)
        assert values[f"{split}_perplexity_nonoverlapping"] > 1
        assert 0 < values[f"{split}_bits_per_byte"] < 8
    last = [row for row in rows(finished / "base") if row["kind"] == "dev"][-1]
    assert values["dev_perplexity"] == pytest.approx(last["dev_perplexity"], rel=0.25)
    assert values.get("latency_ms_p50_l128") is None  # not asked for: missing, not 0
    assert values["train_seconds"] <= values["wall_seconds"] and values["cost_usd"] != 0.0


def test_a_finished_run_is_not_run_again(finished, start, capsys):
    before = fingerprint(finished)
    assert start(log_dir=finished) == OK
    assert "nothing to do" in capsys.readouterr().out
    assert fingerprint(finished) == before


def test_the_final_checkpoint_loads_in_transformers_with_equal_logits(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ours = load_run(finished / "base").model
    theirs = AutoModelForCausalLM.from_pretrained(finished / "base" / "final")
    tokens = torch.randint(VOCAB, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, ours(tokens), atol=1e-4, rtol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(finished / "base" / "final")
    assert tokenizer.decode(tokenizer("some text")["input_ids"]) == "some text"


def test_another_config_in_the_same_place_is_refused(finished, start, capsys):
    before = fingerprint(finished)
    assert start("training.learning_rate=1e-3", log_dir=finished) == BAD_INPUT
    message = capsys.readouterr().err
    assert "training.learning_rate: 0.004 -> 0.001" in message and "another name" in message
    assert fingerprint(finished) == before
    assert start("training.checkpoint_minutes=1", log_dir=finished) == OK  # cosmetic


# ------------------------------------------------------------------------- several runs, one call


def test_several_experiments_and_seeds_in_one_call(logs, start):
    short = ("training.tokens=512", "evaluation.test=false")
    assert start(*short, exp=("deep", "base"), arguments=("--seed", "0", "2")) == OK
    names = {path.name for path in logs.iterdir() if path.is_dir()}
    assert names == {"base", "base-seed2", "deep", "deep-seed2"}
    order = sorted(names, key=lambda name: (logs / name / "metrics.json").stat().st_mtime_ns)
    assert order[:2] == ["base", "base-seed2"]  # others may be judged by the baseline
    assert metrics(logs / "base")["baseline"] and not metrics(logs / "deep")["baseline"]
    first, second = metrics(logs / "base"), metrics(logs / "base-seed2")
    assert (second["seed"], second["init_seed"], second["data_seed"]) == (2, 2, 2)
    assert first["train_loss"] != second["train_loss"]
    assert first.get("test_perplexity") is None
    assert start(*short, exp=("all",)) == OK
    assert metrics(logs / "idle")["status"] == "finished"


def test_ranking_runs_are_shorter_and_judged(logs, start):
    stated = [f"training.{text}" for text in ("ranking_tokens=2560", "eval_every_tokens=512")]
    stated += [f"kill_rule.{text}" for text in ("window_tokens=512", "grace_tokens=0")]
    assert start(*stated, exp=("all",), arguments=("--phase", "rank")) == OK
    base, idle = metrics(logs / "base-rank"), metrics(logs / "idle-rank")
    assert (base["status"], base["tokens"], base["phase"]) == ("finished", 2_560, "rank")
    assert (idle["status"], idle["kill_verdict"]) == ("killed", "kill")
    assert "above the baseline" in idle["reason"]
    assert idle["tokens"] < 2_560 and idle["dev_perplexity"] > base["dev_perplexity"]
    assert not (logs / "idle-rank" / "final").exists()
    before = fingerprint(logs)
    assert start(*stated, exp=("all",), arguments=("--phase", "rank")) == OK  # killed is done
    assert fingerprint(logs) == before
    # Begun with another config: refused before the runs that stand before it in the list.
    shutil.rmtree(logs / "base-rank")
    changed = (*stated, "training.learning_rate=0.1")
    assert start(*changed, exp=("all",), arguments=("--phase", "rank")) == BAD_INPUT
    assert not (logs / "base-rank").exists()


def test_the_launch_loop_of_the_prd_under_bash(tiny_sweep, tmp_path):
    """Several at once with `&` and `wait`, a cold log directory, default --log_dir."""
    script = (
        "for cfg in base deep; do\n"
        f'  "{sys.executable}" "{ROOT}/run_experiment.py" --config "{tiny_sweep}" --exp $cfg'
        " --set training.tokens=1024 --device cpu &\n"
        "done\nwait\n"
    )
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=180,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    for name in ("base", "deep"):
        assert metrics(tmp_path / "logs" / name)["status"] == "finished"
    choices = json.loads((tmp_path / "logs" / "choices.json").read_text())
    assert len(choices) == 1  # one of them decided for all


# ------------------------------------------------------------------------- cuts, signals, holders


def test_a_signal_ends_with_75_and_nothing_new_begins(tiny_sweep, logs):
    """INT is ignored by children that a shell starts with `&`: ours listens all the same."""
    arguments = ["--config", str(tiny_sweep), "--exp", "base", "deep", "--device", "cpu"]
    arguments += ["--set", "training.tokens=51_200", "--log_dir", str(logs)]
    process = subprocess.Popen(
        ["bash", "-c", 'trap "" INT; exec "$@"', "_", sys.executable, "-W", "error",
         str(ROOT / "run_experiment.py"), *arguments],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while len(read_rows(logs / "base" / "metrics.jsonl", "train")) < 3:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == TRY_AGAIN, errors
    assert "run the same command again" in errors and "Traceback" not in errors
    assert 3 <= newest_state(logs / "base")["step"] < 200
    assert not (logs / "base" / "metrics.json").exists() and not (logs / "deep").exists()


def test_a_signal_before_training_ends_with_75(logs, start, monkeypatch, capsys):
    from src.data import tokens as data

    monkeypatch.setattr(data, "load", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert start() == TRY_AGAIN
    assert "SIGTERM" in capsys.readouterr().err and not logs.exists()


def test_a_held_run_ends_with_75_without_torch(tiny_sweep, logs):
    code = (
        "import sys, run_experiment\n"
        "code = run_experiment.main(sys.argv[1:])\n"
        "assert 'torch' not in sys.modules\n"
        "sys.exit(code)"
    )
    with RunDir.open(logs, "base"):
        done = subprocess.run(
            [sys.executable, "-c", code, "--config", str(tiny_sweep), "--exp", "base",
             "--log_dir", str(logs)],
            cwd=ROOT, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
    assert done.returncode == TRY_AGAIN, done.stderr
    assert f"held by process {os.getpid()}" in done.stderr
    assert not (logs / "base" / "config.yaml").exists()


def test_a_held_run_does_not_stop_the_others(logs, start):
    with RunDir.open(logs, "base"):
        assert start("training.tokens=512", exp=("base", "deep")) == TRY_AGAIN
    assert metrics(logs / "deep")["status"] == "finished"


def test_a_diverged_run_ends_with_70_and_its_rerun_with_78(logs, start, monkeypatch, capsys):
    update = train.Trainer.update

    def poisoned(self, nats, rate):
        if self.step == 12 and self.run.experiment == "base":
            next(self.model.parameters()).grad[0, 0] = float("nan")
        return update(self, nats, rate)

    def both() -> int:
        return start("training.checkpoint_every_steps=5", exp=("base", "deep"))

    monkeypatch.setattr(train.Trainer, "update", poisoned)
    assert both() == OUR_FAULT
    message = capsys.readouterr().err
    assert "step 13" in message and "Traceback" not in message and "learning_rate" in message
    failure = json.loads((logs / "base" / "failure.json").read_text())
    assert failure["kind"] == "NonFinite"
    assert not (logs / "base" / "metrics.json").exists()
    assert newest_state(logs / "base")["step"] == 10
    assert metrics(logs / "deep")["status"] == "finished"  # the others are not held up
    monkeypatch.undo()
    before = fingerprint(logs)
    assert both() == BAD_INPUT
    assert "found a run that diverged" in capsys.readouterr().err
    assert fingerprint(logs) == before


def test_a_fault_of_ours_ends_with_70_and_a_rerun_goes_on(
    logs, start, monkeypatch, capsys, finished
):
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("planted")

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "evaluate", broken)
        assert start() == OUR_FAULT
    assert "Traceback" in capsys.readouterr().err
    assert json.loads((logs / "base" / "failure.json").read_text())["kind"] == "ZeroDivisionError"
    assert start() == OK
    assert not (logs / "base" / "failure.json").exists()
    assert rows(logs / "base") == rows(finished / "base")
    assert metrics(logs / "base")["dev_loss"] == metrics(finished / "base")["dev_loss"]


# ------------------------------------------------------------------------ stores and lost exports


def test_a_finished_run_comes_back_whole_from_a_store(tmp_path, start, capsys):
    """A second machine with an empty disk has the results and the weights, without training. What
    only the store knows is found after the lock: that refusal takes the new directory away."""
    remote = ("--remote", f"file://{tmp_path}/store")
    for name in ("one", "two"):
        assert start("training.tokens=512", log_dir=tmp_path / name, arguments=remote) == OK
    one, two = tmp_path / "one" / "base", tmp_path / "two" / "base"
    for name in ("metrics.json", "final/model.safetensors", "documents_test.npz"):
        assert (two / name).read_bytes() == (one / name).read_bytes()
    assert load_run(two).model.config == load_run(one).model.config

    # A run that ended before its upload did: the same command brings the store up to date.
    (tmp_path / "store" / "base" / "final.json").unlink()
    assert start("training.tokens=512", log_dir=tmp_path / "one", arguments=remote) == OK
    assert "nothing to do" in capsys.readouterr().out
    assert (tmp_path / "store" / "base" / "final.json").is_file()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Remote, "drain", lambda *_: False)
        assert start("training.tokens=512", log_dir=tmp_path / "one", arguments=remote) == TRY_AGAIN
    assert "its store has not got all of it" in capsys.readouterr().err

    (tmp_path / "there").mkdir()
    for log_dir in (tmp_path / "deep" / "three", tmp_path / "there"):
        assert start(log_dir=log_dir, arguments=remote) == BAD_INPUT
        assert "digests.config" in capsys.readouterr().err
    assert not (tmp_path / "deep").exists() and list((tmp_path / "there").iterdir()) == []


def test_a_deleted_export_is_written_again_by_the_same_command(copied, start, capsys):
    before = fingerprint(copied)
    shutil.rmtree(copied / "final")
    with pytest.raises(ValueError, match="final: found no whole export"):
        load_run(copied)
    assert start() == OK
    assert "written again" in capsys.readouterr().out
    assert fingerprint(copied) == before
    shutil.rmtree(copied / "final")
    shutil.rmtree(copied / "checkpoints")
    assert start() == OK  # as it comes from another machine's pack
    assert "neither final/ nor a checkpoint" in capsys.readouterr().out
