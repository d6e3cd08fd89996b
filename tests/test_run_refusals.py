"""What the entry point refuses, before anything is written, and odd surroundings that it bears."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import ROOT, run_main
from tests.conftest import SWEEP, VOCAB

OK, IO_FAILED, BAD_INPUT = 0, 74, 78

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
    "a ranking budget under one step": (
        ["--phase", "rank", "--set", "training.ranking_tokens=9"],
        ["training.ranking_tokens: found 9", "lower training.ranking_batch_size"],
    ),
    "a key in the remote": (["--remote", "s3://key:SECRET@bucket/x"], ["holds credentials"]),
    "a store's option that is none": (["--remote", "s3://bucket/x?regoin=a"], ["'regoin'"]),
    "a store without a bucket": (["--remote", "gs:///x"], ["no bucket"]),
    "a store that nobody knows": (["--remote", "http://x/y"], ["--remote", "s3://"]),
    "a kill rule that its default grace keeps from firing": (
        ["--set", "kill_rule.window_tokens=3_700"],
        ["kill_rule", "never fire"],
    ),
    "no CUDA device": (["--device", "cuda"], ["no CUDA device"]),
    "a device of no kind": (["--device", "tpu"], ["expected auto, cpu, cuda or cuda:N"]),
    "no compiler": (["--set", "training.compile=on"], ["no C++ compiler"]),
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
def test_bad_input_is_refused_before_anything_is_written(case, logs, start, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    added, words = REFUSED[case]
    assert start(exp=() if "--exp" in added else ("base",), arguments=added) == BAD_INPUT
    printed = capsys.readouterr()
    for word in words:
        assert word in printed.err
    assert "Traceback" not in printed.err and printed.out == ""
    assert not logs.exists()


NO_REPORT = "none.json: found no readable leakage report"
TASKS = {  # what a task says of its choices, its rows, what evaluation would find, in which words
    "a leakage report that is none": ("choices: [x, y]", [{}], ["leakage=none.json"], NO_REPORT),
    "an empty choice": (
        "choices: {field: o}", [{"o": ["x", "y"]}, {"o": ["x", ""]}], [], "no token of its own"),
    "a lone choice": (
        "choices: {field: o}", [{"o": ["x", "y"]}, {"o": ["x"]}], [], "choices: found 'x' alone"),
    "no BLiMP": ("choices: [x, y]", [{}], ["blimp_full=true"], "blimp_full: found no task"),
}  # fmt: skip


@pytest.mark.parametrize("case", TASKS)
def test_tasks_that_evaluation_would_refuse_are_refused_before_training(
    case, tmp_path, logs, start, capsys
):
    choices, rows, more, says = TASKS[case]
    lines = "".join(json.dumps({**row, "_row": i}) + "\n" for i, row in enumerate(rows)).encode()
    (tmp_path / "toy.jsonl").write_bytes(lines)
    listed = {"toy": {"rows": len(rows), "sha256": hashlib.sha256(lines).hexdigest()}}
    (tmp_path / "source.json").write_text(json.dumps({"tasks": listed}))
    tasks = tmp_path / "tasks.yaml"
    tasks.write_text(
        "tasks:\n- {name: toy, path: p, config: c, split: s, prompt: why, gold: '0',\n"
        f"   target_delimiter: '', {choices}}}\n"
    )
    stated = ("metrics=[smallbench_accuracy]", f"smallbench_dir={tmp_path}",
              f"smallbench_tasks={tasks}", *more)  # fmt: skip
    assert start(*(f"evaluation.{text}" for text in stated)) == BAD_INPUT
    assert says in capsys.readouterr().err and not logs.exists()


def test_an_outside_corpus_without_its_test_split_is_refused_before_training(
    tiny_sweep, tmp_path, logs, start, capsys
):
    shutil.copytree(tiny_sweep.parent / "corpus", tmp_path / "corpus")
    (tmp_path / "corpus" / "test.jsonl").unlink()
    assert start(f"evaluation.outside_dir={tmp_path / 'corpus'}") == BAD_INPUT
    assert "found no sound split 'test'" in capsys.readouterr().err and not logs.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        [], ["--config", "x"], ["--config", "x", "--exp", "a", "--json"], ["--nope"],
        ["--config", "x", "--exp", "a", "--phase", "sanity", "--seed", "5"],
    ],
)  # fmt: skip
def test_a_command_line_that_cannot_be_read_ends_with_78(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        run_main(*arguments)
    assert caught.value.code == BAD_INPUT
    assert "run_experiment.py: " in capsys.readouterr().err


def cut_tokens(tokens: Path) -> None:
    with (tokens / "train.bin").open("r+b") as file:
        file.truncate(100)


def no_corpus(tokens: Path) -> None:
    meta = tokens / "meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"corpus": "x"}))


@pytest.mark.parametrize(
    ("damage", "says"),
    [(cut_tokens, "train.bin: found 100 bytes"), (no_corpus, "meta.json: corpus: found 'x'")],
)
def test_damaged_tokens_are_refused_before_anything_is_written(
    damage, says, token_root, tmp_path, logs, start, capsys
):
    copy = Path(shutil.copytree(token_root, tmp_path / "tokens"))
    sweep = tmp_path / "tiny.yaml"
    sweep.write_text(SWEEP.format(tokens=copy))
    damage(copy / f"v{VOCAB}")
    assert start(sweep=sweep) == BAD_INPUT
    message = capsys.readouterr().err
    assert says in message and "preprocess_lm.py" in message and not logs.exists()


@pytest.mark.parametrize("place", ["file", "file/logs", "link"])
def test_a_log_directory_that_is_a_file_is_refused(place, tmp_path, start, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert start(log_dir=tmp_path / place) == BAD_INPUT
    assert "is no directory" in capsys.readouterr().err


def test_a_store_inside_the_log_directory_itself_is_refused(logs, start, capsys):
    assert start(arguments=("--remote", f"file://{logs}")) == BAD_INPUT
    assert "the log directory itself" in capsys.readouterr().err and not logs.exists()


def test_results_without_a_status_are_not_taken_for_a_finished_run(copied, start, capsys):
    (copied / "metrics.json").write_text("{}")
    assert start() == BAD_INPUT
    assert "found no results of a run" in capsys.readouterr().err


# ------------------------------------------------------------------- what only a process can meet


def under_bash(script: str, sweep: Path, **options: Path) -> subprocess.CompletedProcess[str]:
    """`script` with ENTRY for the entry point on `base`."""
    entry = f"{sys.executable} {ROOT / 'run_experiment.py'} --config {sweep} --exp base"
    command = ["bash", "-c", script.replace("ENTRY", entry)]
    return subprocess.run(command, capture_output=True, text=True, **options)  # type: ignore[call-overload]


def test_a_working_directory_that_is_gone_is_said(tiny_sweep, tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    done = under_bash(f"rmdir {gone}; exec ENTRY --dry_run", tiny_sweep, cwd=gone)
    assert done.returncode == IO_FAILED and "could not read or write" in done.stderr


@pytest.mark.parametrize("streams", ["1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_a_run_needs_no_open_streams(finished, tiny_sweep, streams):
    done = under_bash(f"exec ENTRY --device cpu --log_dir {finished} {streams}", tiny_sweep)
    assert done.returncode == OK and not done.stderr


def test_a_run_whose_reader_has_gone_says_that_it_is_not_finished(tiny_sweep, logs):
    """`run_experiment.py ... | head` ends with 0 for a dry run alone, which has said enough."""
    for more, code in ((f"--device cpu --log_dir {logs}", IO_FAILED), ("--dry_run", OK)):
        script = f"export PYTHONUNBUFFERED=1; set -o pipefail; ENTRY {more} | exec 0<&-"
        done = under_bash(script, tiny_sweep)
        assert done.returncode == code and ("run me again" in done.stderr) == (code == IO_FAILED)
        assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert not (logs / "base" / "metrics.json").exists()
