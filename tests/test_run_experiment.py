"""The entry point as its users meet it: exit codes, files, reruns, signals, refusals, the loop."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import run_experiment
from src import train
from src.evaluation import metrics as record
from src.evaluation.trained_run import load_run
from src.spec import metric_keys
from src.storage.run_dir import RunDir, read_rows
from tests.conftest import ROOT, SWEEP, VOCAB
from tests.test_train import assert_same, newest_state, timeless

OK, OUR_FAULT, TRY_AGAIN, BAD_INPUT = 0, 70, 75, 78
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


@pytest.fixture
def main() -> Iterator[Callable[..., int]]:
    """`run_experiment.main` in this process; the signal handlers are put back."""
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def call(*arguments: Any) -> int:
        return run_experiment.main([*map(str, arguments), "--device", "cpu"])

    yield call
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def finished(tiny_sweep: Path, tmp_path_factory: pytest.TempPathFactory, run_cli) -> Path:
    """The log directory of `base`, run as its users run it; not to be written to."""
    logs = tmp_path_factory.mktemp("finished") / "logs"
    done = run_cli("--config", tiny_sweep, "--exp", "base", "--log_dir", logs, "--device", "cpu")
    assert "70,000 parameters" in done.stdout and "dev perplexity" in done.stdout
    return logs


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    return tmp_path / "logs"


def rows(run: Path) -> list[dict[str, Any]]:
    return [timeless(row) for row in read_rows(run / "metrics.jsonl")]


def metrics(run: Path) -> dict[str, Any]:
    return json.loads((run / "metrics.json").read_text())


def fingerprint(folder: Path) -> dict[str, str]:
    """Hashes of all files below a folder, but for locks."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith("lock")
    }


# ---------------------------------------------------------------------------------- a whole run


def test_a_run_leaves_what_the_prd_asks_for(finished):
    run = finished / "base"
    stored = yaml.safe_load((run / "config.yaml").read_text())
    environment = json.loads((run / "environment.json").read_text())
    found = metrics(run)
    assert stored["tokenizer_sha256"] == found["tokenizer_sha256"]
    assert stored["asked"]["total_params_asked"] == 70_000 and stored["model"]["d_model"] == 48
    assert {"git_sha", "git_dirty", "torch", "threads", "device"} <= set(environment)
    assert (found["seed"], found["status"], found["reason"]) == (0, "finished", None)
    assert (found["device"], found["precision"], found["threads"]) == ("cpu", "fp32", 1)
    assert list((run / "checkpoints").glob("step-00000020-*.pt"))
    assert list((run / "tensorboard").glob("events*"))
    assert not (run / "failure.json").exists()


def test_the_config_says_what_every_run_of_the_sweep_is_and_an_edit_shows(finished):
    stored = yaml.safe_load((finished / "base" / "config.yaml").read_text(encoding="utf-8"))
    found, own = metrics(finished / "base"), stored["sweep"]["built"]["base"]
    for key in ("model_digest", "training_digest", "embedding_ratio_built", "total_params_asked"):
        assert own[key] == found[key]
    assert not record.edited(stored)
    assert record.edited({**stored, "sweep": {**stored["sweep"], "baseline": "deep"}})
    stored["training"]["learning_rate"] = 0.1
    assert record.edited(stored)


def test_every_run_has_exactly_the_keys_of_the_list(finished):
    assert set(metrics(finished / "base")) == metric_keys.STORED


def test_the_metrics_agree_with_each_other(finished):
    found = metrics(finished / "base")
    blocks = ("embedding", "projection", "attention", "ffn", "norm")
    assert (
        sum(found[f"params_{block}"] for block in blocks) == found["total_params_built"] == 70_000
    )
    share = (found["params_embedding"] + found["params_projection"]) / 70_000
    assert found["embedding_ratio_built"] == share
    assert found["glu_expansion_built"] == found["d_ff"] / found["d_model"]
    assert (found["steps"], found["tokens"]) == (20, 5_120)
    for split in ("dev", "test"):
        loss = found[f"{split}_loss"]
        assert found[f"{split}_perplexity"] == pytest.approx(2.718281828459045**loss)
        assert found[f"{split}_perplexity_nonoverlapping"] > 1
        assert 0 < found[f"{split}_bits_per_byte"] < 8
    last = [row for row in rows(finished / "base") if row["kind"] == "dev"][-1]
    assert found["dev_perplexity"] == pytest.approx(last["dev_perplexity"], rel=0.25)
    assert found.get("latency_ms_p50_l128") is None  # not asked for: missing, not 0
    assert found["train_seconds"] <= found["wall_seconds"] and found["cost_usd"] != 0.0


def test_a_finished_run_is_not_run_again(finished, tiny_sweep, run_cli):
    before = fingerprint(finished)
    done = run_cli("--config", tiny_sweep, "--exp", "base", "--log_dir", finished)
    assert "nothing to do" in done.stdout
    assert fingerprint(finished) == before


def test_the_final_checkpoint_loads_in_transformers_with_equal_logits(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from src.evaluation.trained_run import load_run

    ours = load_run(finished / "base").model
    theirs = AutoModelForCausalLM.from_pretrained(finished / "base" / "final")
    tokens = torch.randint(VOCAB, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, ours(tokens), atol=1e-4, rtol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(finished / "base" / "final")
    assert tokenizer.decode(tokenizer("some text")["input_ids"]) == "some text"


def test_another_config_in_the_same_place_is_refused(finished, tiny_sweep, main, capsys):
    before = fingerprint(finished)
    arguments = ("--config", tiny_sweep, "--exp", "base", "--log_dir", finished)
    assert main(*arguments, "--set", "training.learning_rate=1e-3") == BAD_INPUT
    message = capsys.readouterr().err
    assert "training.learning_rate: 0.004 -> 0.001" in message and "another name" in message
    assert fingerprint(finished) == before
    assert main(*arguments, "--set", "training.checkpoint_minutes=1") == OK  # cosmetic


# ------------------------------------------------------------------------- several runs, one call


def test_several_experiments_and_seeds_in_one_call(tiny_sweep, logs, main, finished):
    short = ("--log_dir", logs, "--set", "training.tokens=512", "--set", "evaluation.test=false")
    arguments = ("--config", tiny_sweep, *short)
    assert main(*arguments, "--exp", "deep", "base", "--seed", "0", "2") == OK
    made = {path.name for path in logs.iterdir() if path.is_dir()}
    assert made == {"base", "base-seed2", "deep", "deep-seed2"}
    order = sorted(made, key=lambda name: (logs / name / "metrics.json").stat().st_mtime_ns)
    assert order[:2] == ["base", "base-seed2"]  # others may be judged by the baseline
    assert metrics(logs / "base")["baseline"] and not metrics(logs / "deep")["baseline"]
    first, second = metrics(logs / "base"), metrics(logs / "base-seed2")
    assert (second["seed"], second["init_seed"], second["data_seed"]) == (2, 2, 2)
    assert first["train_loss"] != second["train_loss"]
    assert first.get("test_perplexity") is None
    assert main(*arguments, "--exp", "all") == OK
    assert metrics(logs / "idle")["status"] == "finished"


def test_ranking_runs_are_shorter_and_judged(tiny_sweep, logs, main):
    rule = [f"kill_rule.{key}" for key in ("window_tokens=512", "grace_tokens=0")]
    arguments = ["--config", tiny_sweep, "--exp", "all", "--phase", "rank", "--log_dir", logs]
    arguments += [
        "--set",
        "training.ranking_tokens=2560",
        "--set",
        "training.eval_every_tokens=512",
    ]
    for text in rule:
        arguments += ["--set", text]
    assert main(*arguments) == OK
    base, idle = metrics(logs / "base-rank"), metrics(logs / "idle-rank")
    assert (base["status"], base["tokens"], base["phase"]) == ("finished", 2_560, "rank")
    assert (idle["status"], idle["kill_verdict"]) == ("killed", "kill")
    assert "above the baseline" in idle["reason"]
    assert idle["tokens"] < 2_560 and idle["dev_perplexity"] > base["dev_perplexity"]
    assert not (logs / "idle-rank" / "final").exists()
    before = fingerprint(logs)
    assert main(*arguments) == OK  # killed is done
    assert fingerprint(logs) == before


def test_the_launch_loop_of_the_prd_under_bash(tiny_sweep, tmp_path):
    """Three at once with `&` and `wait`, a cold log directory, default --log_dir."""
    script = (
        "for cfg in base deep idle; do\n"
        f'  "{sys.executable}" "{ROOT}/run_experiment.py" --config "{tiny_sweep}" --exp $cfg'
        " --set training.tokens=1024 --device cpu &\n"
        "done\nwait\n"
    )
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=180,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    for name in ("base", "deep", "idle"):
        assert metrics(tmp_path / "logs" / name)["status"] == "finished"
    choices = json.loads((tmp_path / "logs" / "choices.json").read_text())
    assert len(choices) == 1  # one of the three decided for all


# ------------------------------------------------------------------------- cuts, signals, holders


def test_a_signal_ends_with_75_and_the_rerun_ends_with_the_same_bits(tiny_sweep, tmp_path, main):
    """INT is ignored by children that a shell starts with `&`: ours listens all the same."""
    arguments = ["--config", str(tiny_sweep), "--exp", "base", "deep", "--device", "cpu"]
    arguments += ["--set", "training.tokens=51_200", "--set", "evaluation.test=false"]
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    process = subprocess.Popen(
        ["bash", "-c", 'trap "" INT; exec "$@"', "_", sys.executable, "-W", "error",
         str(ROOT / "run_experiment.py"), *arguments, "--log_dir", str(cut)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 90
    while len(read_rows(cut / "base" / "metrics.jsonl", "train")) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == TRY_AGAIN, errors
    assert "run the same command again" in errors and "Traceback" not in errors
    state = newest_state(cut / "base")
    assert 3 <= state["step"] < 200 and not (cut / "base" / "metrics.json").exists()
    assert not (cut / "deep").exists()  # the machine goes away: nothing new begins

    assert main(*arguments[:4], *arguments[7:], "--log_dir", cut) == OK
    assert main(*arguments[:4], *arguments[7:], "--log_dir", whole) == OK
    assert rows(cut / "base") == rows(whole / "base")
    assert_same(newest_state(cut / "base"), newest_state(whole / "base"))
    mine, theirs = metrics(cut / "base"), metrics(whole / "base")
    for key in ("train_loss", "dev_loss", "dev_bits_per_byte", "tokens", "config_digest"):
        assert mine[key] == theirs[key]


def test_a_signal_before_training_ends_with_75(tiny_sweep, logs, main, monkeypatch, capsys):
    from src.data import tokens as data

    monkeypatch.setattr(data, "load", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert main("--config", tiny_sweep, "--exp", "base", "--log_dir", logs) == TRY_AGAIN
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


def test_a_held_run_does_not_stop_the_others(tiny_sweep, logs, main):
    arguments = ("--config", tiny_sweep, "--exp", "base", "deep", "--log_dir", logs)
    with RunDir.open(logs, "base"):
        assert main(*arguments, "--set", "training.tokens=512") == TRY_AGAIN
    assert metrics(logs / "deep")["status"] == "finished"


def test_a_diverged_run_ends_with_70_and_its_rerun_with_78(
    tiny_sweep, logs, main, monkeypatch, capsys
):
    update = train.Trainer.update

    def poisoned(self, nats, rate):
        if self.step == 12 and self.run.experiment == "base":
            next(self.model.parameters()).grad[0, 0] = float("nan")
        return update(self, nats, rate)

    monkeypatch.setattr(train.Trainer, "update", poisoned)
    arguments = ["--config", tiny_sweep, "--log_dir", logs, "--exp", "base", "deep"]
    arguments += ["--set", "training.checkpoint_every_steps=5"]
    assert main(*arguments) == OUR_FAULT
    message = capsys.readouterr().err
    assert "step 13" in message and "Traceback" not in message and "learning_rate" in message
    failure = json.loads((logs / "base" / "failure.json").read_text())
    assert failure["kind"] == "NonFinite"
    assert not (logs / "base" / "metrics.json").exists()
    assert newest_state(logs / "base")["step"] == 10
    assert metrics(logs / "deep")["status"] == "finished"  # the others are not held up
    monkeypatch.undo()
    before = fingerprint(logs)
    assert main(*arguments) == BAD_INPUT
    assert "found a run that diverged" in capsys.readouterr().err
    assert fingerprint(logs) == before


def test_a_fault_of_ours_ends_with_70_and_a_rerun_goes_on(
    tiny_sweep, logs, main, monkeypatch, capsys, finished
):
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("planted")

    from src.evaluation import evaluate as evaluation

    arguments = ["--config", tiny_sweep, "--log_dir", logs, "--exp", "base"]
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "evaluate", broken)
        assert main(*arguments) == OUR_FAULT
    assert "Traceback" in capsys.readouterr().err
    assert json.loads((logs / "base" / "failure.json").read_text())["kind"] == "ZeroDivisionError"
    assert main(*arguments) == OK
    assert not (logs / "base" / "failure.json").exists()
    assert rows(logs / "base") == rows(finished / "base")
    assert metrics(logs / "base")["dev_loss"] == metrics(finished / "base")["dev_loss"]


# ------------------------------------------------------------------------------------ bad input

REFUSED: dict[str, tuple[list[str], list[str]]] = {
    "an unknown experiment": (["--exp", "bsae"], ["'bsae'", "did you mean 'base'"]),
    "a negative seed": (["--seed", "-1"], ["--seed", "-1"]),
    "a huge seed": (["--seed", "99999999999999999999"], ["--seed", "2^31"]),
    "an unknown key": (["--set", "training.token=1"], ["training.tokens"]),
    "a budget under one step": (["--set", "training.tokens=10"], ["training.tokens", "256"]),
    "missing tokens": (
        ["--set", "data.dir=nowhere/tokens"],
        ["data.dir nowhere/tokens", "preprocess_lm.py", "--vocab_size 300", "--output nowhere"],
    ),
    "tokens of another vocabulary": (
        ["--set", "model.vocab_size=301"],
        ["vocab_size 301", "--vocab_size 301"],
    ),
    "an impossible budget": (
        ["--set", "model.total_params=20_000"],
        ["tiny.yaml: experiments base", "found total_params 20,000", "is within 0.5% of the total"],
    ),
    "a batch larger than the corpus": (
        ["--set", "training.batch_size=100_000", "--set", "training.tokens=9_000_000"],
        ["training.batch_size: found 100000", "lower batch_size"],
    ),
    "dev tokens under one window": (["--set", "training.dev_tokens=8"], ["training.dev_tokens"]),
    "fp16 on a CPU": (["--set", "training.precision=fp16"], ["precision fp16"]),
    "a kill rule that never fires": (
        ["--set", "kill_rule.window_tokens=5_000"],
        ["kill_rule", "never fire", "5,120"],
    ),
    "a kill window shorter than the checks' spacing": (
        ["--phase", "rank", "--set", "kill_rule.window_tokens=100"],
        ["kill_rule.window_tokens: found 100 ", "eval_every_tokens"],
    ),
    "a stated kill rule that never fires in a ranking run": (
        ["--phase", "rank", "--set", "kill_rule.window_tokens=5_000"],
        ["kill_rule", "never fire"],
    ),
    "a key in the remote": (["--remote", "s3://key:SECRET@bucket/x"], ["holds credentials"]),
    "a store's option that is none": (["--remote", "s3://bucket/x?regoin=a"], ["'regoin'"]),
    "a store without a bucket": (["--remote", "gs:///x"], ["no bucket"]),
    "a store that nobody knows": (["--remote", "http://x/y"], ["--remote", "s3://"]),
    "a kill rule that its default grace keeps from firing": (
        ["--set", "kill_rule.window_tokens=3_700"],
        ["kill_rule", "never fire"],
    ),
    "no SmallBench data": (
        ["--set", "evaluation.metrics=[smallbench_accuracy]",
         "--set", "evaluation.smallbench_dir=nowhere"],
        ["evaluation.smallbench_dir", "download_smallbench.py --output nowhere"],
    ),
    "no SmallBench task list": (
        ["--set", "evaluation.metrics=[smallbench_accuracy]",
         "--set", "evaluation.smallbench_tasks=none.yaml"],
        ["none.yaml"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_before_anything_is_written(case, tiny_sweep, logs, main, capsys):
    added, words = REFUSED[case]
    exp = [] if "--exp" in added else ["--exp", "base"]
    assert main("--config", tiny_sweep, "--log_dir", logs, *exp, *added) == BAD_INPUT
    printed = capsys.readouterr()
    for word in words:
        assert word in printed.err
    assert "Traceback" not in printed.err and printed.out == ""
    assert not logs.exists()


def test_a_leakage_report_that_does_not_fit_is_refused_before_training(
    tiny_sweep, tmp_path, logs, main, capsys
):
    tasks, folder = tmp_path / "tasks.yaml", tmp_path / "smallbench"
    tasks.write_text(
        "tasks:\n- {name: toy, path: p, config: c, split: s, prompt: '', gold: '0',\n"
        "   choices: [a, b]}\n"
    )
    folder.mkdir()
    row = b'{"_row": 0}\n'
    (folder / "toy.jsonl").write_bytes(row)
    listed = {"toy": {"rows": 1, "sha256": hashlib.sha256(row).hexdigest()}}
    (folder / "source.json").write_text(json.dumps({"tasks": listed}))
    arguments = ["--config", tiny_sweep, "--exp", "base", "--log_dir", logs]
    for text in (
        "evaluation.metrics=[smallbench_accuracy]",
        f"evaluation.smallbench_dir={folder}",
        f"evaluation.smallbench_tasks={tasks}",
        f"evaluation.leakage={tmp_path / 'none.json'}",
    ):
        arguments += ["--set", text]
    assert main(*arguments) == BAD_INPUT
    assert "none.json: found no readable leakage report" in capsys.readouterr().err
    assert not logs.exists()


@pytest.mark.parametrize(
    ("task", "rows", "says"),
    [
        ("choices: {field: o}", [{"o": ["x", "y"]}, {"o": ["x", ""]}], "no token of its own"),
        ("choices: {field: o}", [{"o": ["x", "y"]}, {"o": ["x"]}], "choices: found 'x' alone"),
        ("choices: [x, y]", [{}], "evaluation.blimp_full: found no task"),
    ],
)
def test_tasks_that_evaluation_would_refuse_are_refused_before_training(
    task, rows, says, tiny_sweep, tmp_path, logs, main, capsys
):
    lines = "".join(json.dumps({**row, "_row": i}) + "\n" for i, row in enumerate(rows)).encode()
    (tmp_path / "toy.jsonl").write_bytes(lines)
    listed = {"toy": {"rows": len(rows), "sha256": hashlib.sha256(lines).hexdigest()}}
    (tmp_path / "source.json").write_text(json.dumps({"tasks": listed}))
    tasks = tmp_path / "tasks.yaml"
    tasks.write_text(
        "tasks:\n- {name: toy, path: p, config: c, split: s, prompt: why, gold: '0',\n"
        f"   target_delimiter: '', {task}}}\n"
    )
    arguments = ["--config", tiny_sweep, "--exp", "base", "--log_dir", logs]
    for text in (
        "evaluation.metrics=[smallbench_accuracy]",
        f"evaluation.smallbench_dir={tmp_path}",
        f"evaluation.smallbench_tasks={tasks}",
        f"evaluation.blimp_full={str('blimp' in says).lower()}",
    ):
        arguments += ["--set", text]
    assert main(*arguments) == BAD_INPUT
    assert says in capsys.readouterr().err and not logs.exists()


def test_an_outside_corpus_without_its_test_split_is_refused_before_training(
    tiny_sweep, tmp_path, logs, main, capsys
):
    shutil.copytree(tiny_sweep.parent / "corpus", tmp_path / "corpus")
    (tmp_path / "corpus" / "test.jsonl").unlink()
    arguments = ["--config", tiny_sweep, "--exp", "base", "--log_dir", logs]
    arguments += ["--set", f"evaluation.outside_dir={tmp_path / 'corpus'}"]
    assert main(*arguments) == BAD_INPUT
    assert "found no sound split 'test'" in capsys.readouterr().err and not logs.exists()


def test_compiling_without_a_compiler_is_refused(tiny_sweep, logs, main, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    arguments = ("--config", tiny_sweep, "--exp", "base", "--log_dir", logs)
    assert main(*arguments, "--set", "training.compile=on") == BAD_INPUT
    assert "no C++ compiler" in capsys.readouterr().err and not logs.exists()


def test_a_finished_run_comes_back_whole_from_a_store(finished, tiny_sweep, tmp_path, main):
    """A second machine with an empty disk has the results and the weights, without training."""
    arguments = ("--config", tiny_sweep, "--exp", "base", "--remote", f"file://{tmp_path}/store")
    assert main(*arguments, "--log_dir", tmp_path / "one") == OK
    assert main(*arguments, "--log_dir", tmp_path / "two") == OK
    one, two = tmp_path / "one" / "base", tmp_path / "two" / "base"
    assert (two / "metrics.json").read_bytes() == (one / "metrics.json").read_bytes()
    for name in ("final/model.safetensors", "documents_test.npz"):
        assert (two / name).read_bytes() == (one / name).read_bytes()
    assert load_run(two).model.config == load_run(one).model.config


def test_cuda_asked_and_absent_is_refused(tiny_sweep, logs, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    arguments = ["--config", str(tiny_sweep), "--exp", "base", "--log_dir", str(logs)]
    assert run_experiment.main([*arguments, "--device", "cuda"]) == BAD_INPUT
    assert run_experiment.main([*arguments, "--device", "tpu"]) == BAD_INPUT
    for number, handler in before.items():
        signal.signal(number, handler)
    message = capsys.readouterr().err
    assert "no CUDA device" in message and "expected auto, cpu, cuda or cuda:N" in message
    assert not logs.exists()


@pytest.mark.parametrize(
    "arguments", [[], ["--config", "x"], ["--config", "x", "--exp", "a", "--json"], ["--nope"]]
)
def test_a_command_line_that_cannot_be_read_ends_with_78(main, arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(*arguments)
    assert caught.value.code == BAD_INPUT
    assert "run_experiment.py: " in capsys.readouterr().err


def test_damaged_tokens_are_refused_before_anything_is_written(
    token_root, tmp_path, logs, main, capsys
):
    copy = Path(shutil.copytree(token_root, tmp_path / "tokens"))
    sweep = tmp_path / "tiny.yaml"
    sweep.write_text(SWEEP.format(tokens=copy))
    with (copy / f"v{VOCAB}" / "train.bin").open("r+b") as file:
        file.truncate(100)
    assert main("--config", sweep, "--exp", "base", "--log_dir", logs) == BAD_INPUT
    message = capsys.readouterr().err
    assert "train.bin: found 100 bytes" in message and "preprocess_lm.py" in message
    assert not logs.exists()


def test_a_description_of_tokens_without_its_corpus_is_refused(
    token_root, tmp_path, logs, main, capsys
):
    copy = Path(shutil.copytree(token_root, tmp_path / "tokens"))
    meta = copy / f"v{VOCAB}" / "meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"corpus": "x"}))
    (tmp_path / "tiny.yaml").write_text(SWEEP.format(tokens=copy))
    assert main("--config", tmp_path / "tiny.yaml", "--exp", "base", "--log_dir", logs) == BAD_INPUT
    assert "meta.json: corpus: found 'x'" in capsys.readouterr().err and not logs.exists()


def test_a_working_directory_that_is_gone_is_said(tiny_sweep, tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    command = f"rmdir {gone}; exec {sys.executable} {ROOT / 'run_experiment.py'} --dry_run "
    command += f"--config {tiny_sweep}"
    done = subprocess.run(["bash", "-c", command], cwd=gone, capture_output=True, text=True)
    assert done.returncode == 74 and "could not read or write" in done.stderr


@pytest.mark.parametrize("place", ["file", "file/logs", "link"])
def test_a_log_directory_that_is_a_file_is_refused(place, tiny_sweep, tmp_path, main, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    code = main("--config", tiny_sweep, "--exp", "base", "--log_dir", tmp_path / place)
    assert code == BAD_INPUT
    assert "is no directory" in capsys.readouterr().err


def test_a_refusal_by_the_store_takes_the_new_run_directory_away(
    finished, tiny_sweep, tmp_path, main, capsys
):
    """What only the store knows is found after the lock: nothing was learnt, nothing is left."""
    arguments = ("--config", tiny_sweep, "--exp", "base", "--remote", f"file://{tmp_path}/store")
    short = ("--set", "training.tokens=512")
    assert main(*arguments, *short, "--log_dir", tmp_path / "one") == OK
    there = tmp_path / "there"
    there.mkdir()
    for log_dir in (tmp_path / "deep" / "two", there):
        assert main(*arguments, "--log_dir", log_dir) == BAD_INPUT
        assert "digests.config" in capsys.readouterr().err
    assert not (tmp_path / "deep").exists() and list(there.iterdir()) == []


def test_a_deleted_export_is_written_again_by_the_same_command(
    finished, tiny_sweep, tmp_path, main, capsys
):
    shutil.copytree(finished / "base", tmp_path / "base")
    run, command = tmp_path / "base", ("--config", tiny_sweep, "--exp", "base")
    before = fingerprint(run)
    shutil.rmtree(run / "final")
    with pytest.raises(ValueError, match="final: found no whole export"):
        load_run(run)
    assert main(*command, "--log_dir", tmp_path) == OK
    assert "written again" in capsys.readouterr().out
    assert fingerprint(run) == before
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoints")
    assert main(*command, "--log_dir", tmp_path) == OK  # as it comes from another machine's pack
    assert "neither final/ nor a checkpoint" in capsys.readouterr().out


# --------------------------------------------------------- what is measured may change afterwards


@pytest.fixture
def copied(finished, logs) -> Path:
    """A finished run to write to, and the log directory that it stands in."""
    shutil.copytree(finished, logs)
    return logs / "base"


def test_a_finished_run_is_measured_again_where_the_evaluation_changed(
    copied, tiny_sweep, main, capsys
):
    """From its final weights: no step is trained, training keys stay refused, and what the earlier
    evaluation left and this one does not measure is gone."""
    before, curve = metrics(copied), rows(copied)
    weights = (copied / "final" / "model.safetensors").read_bytes()
    again = ("--config", tiny_sweep, "--exp", "base", "--log_dir", copied.parent, "--set")
    assert (copied / "documents_test.npz").exists()
    assert main(*again, "evaluation.test=false") == OK
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
    assert stored["evaluation"]["test"] is False and not record.edited(stored)
    assert stored["evaluation_digest"] == after["evaluation_digest"]
    assert rows(copied) == curve
    assert (copied / "final" / "model.safetensors").read_bytes() == weights
    assert main(*again, "evaluation.test=false") == OK
    assert "nothing to do" in capsys.readouterr().out
    assert main(*again, "evaluation.test=false", "--set", "training.learning_rate=0.1") == BAD_INPUT
    assert "training.learning_rate: 0.004 -> 0.1" in capsys.readouterr().err


def test_a_cut_before_the_second_evaluation_loses_nothing(copied, tiny_sweep, main, monkeypatch):
    again = ("--config", tiny_sweep, "--exp", "base", "--log_dir", copied.parent)
    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "write_config", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        assert main(*again, "--set", "evaluation.perplexity_tokens=300") == TRY_AGAIN
    assert not (copied / "metrics.json").exists()
    assert main(*again, "--set", "evaluation.perplexity_tokens=300") == OK
    assert metrics(copied)["dev_tokens_scored"] == 370  # whole documents


def test_a_run_whose_evaluation_failed_goes_on_with_another_one(
    tiny_sweep, logs, main, monkeypatch, capsys
):
    again = ("--config", tiny_sweep, "--exp", "base", "--log_dir", logs)
    from src.evaluation import evaluate

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "_split", lambda *_: 1 / 0)
        assert main(*again) == OUR_FAULT
    assert main(*again, "--set", "evaluation.test=false") == OK
    assert "evaluation changed (test: True -> False): its training stands" in (
        capsys.readouterr().out
    )


def test_without_final_weights_another_evaluation_is_refused(copied, tiny_sweep, main, capsys):
    shutil.rmtree(copied / "checkpoints")
    before = fingerprint(copied)
    again = ("--config", tiny_sweep, "--exp", "base", "--log_dir", copied.parent)
    assert main(*again, "--set", "evaluation.test=false") == BAD_INPUT
    assert "test: True -> False) and no checkpoint of its last step" in capsys.readouterr().err
    assert fingerprint(copied) == before
    assert main(*again) == OK


def test_a_run_of_an_older_build_keeps_its_one_digest(copied, tiny_sweep, main, capsys):
    """Its config_digest, which its checkpoints carry, covers its evaluation too."""
    path = copied / "config.yaml"
    stored = yaml.safe_load(path.read_text())
    del stored["evaluation_digest"], stored["content_sha256"]
    stored["config_digest"] = record.older_digest(stored)
    path.write_text(yaml.safe_dump(stored, sort_keys=False))
    assert not record.edited(stored)
    again = ("--config", tiny_sweep, "--exp", "base", "--log_dir", copied.parent)
    assert main(*again) == OK
    assert main(*again, "--set", "evaluation.test=false") == BAD_INPUT
    assert "evaluation.test: True -> False" in capsys.readouterr().err
    stored["evaluation"]["test"] = False
    assert record.edited(stored)


# ----------------------------------------------------------------------------- odd surroundings


def test_results_without_a_status_are_not_taken_for_a_finished_run(
    copied, tiny_sweep, main, capsys
):
    (copied / "metrics.json").write_text("{}")
    command = ("--config", tiny_sweep, "--exp", "base", "--log_dir", copied.parent)
    assert main(*command) == BAD_INPUT
    assert "found no results of a run" in capsys.readouterr().err


@pytest.mark.parametrize("streams", ["1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_a_run_needs_no_open_streams(finished, tiny_sweep, streams):
    command = f"exec {sys.executable} {ROOT / 'run_experiment.py'} --config {tiny_sweep} "
    command += f"--exp base --device cpu --log_dir {finished} {streams}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=300)
    assert done.returncode == OK and not done.stderr


def test_a_run_whose_reader_has_gone_says_that_it_is_not_finished(tiny_sweep, logs):
    """`run_experiment.py ... | head` ends with 0 for a dry run alone, which has said enough."""
    command = f"{sys.executable} -u {ROOT / 'run_experiment.py'} --config {tiny_sweep} --exp base "
    for more, code in ((f"--device cpu --log_dir {logs}", 74), ("--dry_run", OK)):
        script = f"set -o pipefail; {command} {more} | exec 0<&-"
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=300)
        assert done.returncode == code and ("run me again" in done.stderr) == (code == 74)
        assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert not (logs / "base" / "metrics.json").exists()


def test_a_store_inside_the_log_directory_itself_is_refused(tiny_sweep, logs, main, capsys):
    command = ("--config", tiny_sweep, "--exp", "base", "--log_dir", logs)
    assert main(*command, "--remote", f"file://{logs}") == BAD_INPUT
    assert "the log directory itself" in capsys.readouterr().err and not logs.exists()
