"""Instruction tuning: loss on answers alone, resumable, with its record; and its download."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from src import instruction_tuning as tuning
from src.compute.compute_config import ComputeConfig
from src.data.instructions import Batches, Example
from src.evaluation.trained_run import TrainedRun, load_run
from tests import python

CPU = ComputeConfig(
    device=torch.device("cpu"), precision="fp32", micro_batch=8, compile=False, threads=1
)


def rows(count: int, seed: int) -> list[dict[str, str]]:
    """Prompts whose answer is always the same few words: easy to learn."""
    rng = random.Random(seed)
    return [
        {"prompt": "say " + "".join(rng.choices("abcde", k=6)) + ":", "answer": "rain and snow"}
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("instructions")
    for name, count in (("train", 40), ("validation", 10)):
        lines = "".join(json.dumps(row) + "\n" for row in rows(count, len(name)))
        (folder / f"{name}.jsonl").write_text(lines)
    return folder


@pytest.fixture(scope="module")
def base_path(finished: Path) -> Path:
    return finished / "base"


@pytest.fixture(scope="module")
def base(base_path: Path) -> TrainedRun:
    return load_run(base_path)


def tune(base_path: Path, data: Path, log_dir: Path, *more: str) -> int:
    arguments = ["--run", str(base_path), "--data", str(data), "--log_dir", str(log_dir)]
    return tuning.main([*arguments, "--device", "cpu", "--batch_size", "8", *more])


# --- examples and losses ---------------------------------------------------------------------


def test_only_answer_tokens_are_targets() -> None:
    short = Example(np.array([0, 5, 6, 7, 0]), 3)  # answer: 7 and the end
    long = Example(np.array([0, 5, 6, 8, 9, 7, 0]), 2)
    tokens, answers = tuning.collate([short, long])
    assert tokens.shape == (2, 7) and answers.shape == (2, 6)
    assert tokens[:, 1:][answers].tolist() == [7, 0, 6, 8, 9, 7, 0]


def test_the_loss_is_the_mean_over_answer_tokens_and_padding_changes_nothing(
    base: TrainedRun,
) -> None:
    examples = [Example(np.array([0, 5, 6, 7, 9, 0]), 3), Example(np.array([0, 5, 8, 0]), 2)]
    nats, count = tuning.answer_nats(base.model, examples, CPU)
    expected = []
    for example in examples:  # one by one, without padding
        logits = base.model(torch.from_numpy(example.ids[None, :-1]))
        steps = torch.log_softmax(logits[0].float(), dim=-1)
        targets = torch.from_numpy(example.ids[1:])
        expected += (-steps[range(len(targets)), targets])[example.answer_start - 1 :].tolist()
    assert count == len(expected) == 5
    assert float(nats.detach()) == pytest.approx(np.mean(expected), rel=1e-4)
    apart = tuning.held_out_loss(base.model, examples, CPU, batch_size=1)
    assert apart == pytest.approx(np.mean(expected), rel=1e-4)


def test_long_texts_are_cut_so_that_the_answer_follows_its_prompts_end(base: TrainedRun) -> None:
    prompt, answer = "a b c d e " * 30, "x y z " * 30
    cut = tuning.encode(base.tokenizer, prompt, answer, 32)
    assert len(cut.ids) == 33 and cut.answer_start == 33 - 16
    head = base.tokenizer.encode(prompt, add_special_tokens=False).ids
    tail = base.tokenizer.encode(answer, add_special_tokens=False).ids
    assert cut.ids[: cut.answer_start].tolist() == head[-17:]
    assert cut.ids[cut.answer_start :].tolist() == tail[:16]
    fits = tuning.encode(base.tokenizer, "a", "x y z " * 4, 32)
    assert fits.ids[-1] == tuning.END and len(fits.ids) - fits.answer_start > 16
    whole = tuning.encode(base.tokenizer, "a", "b", 32)
    assert whole.ids[0] == whole.ids[-1] == tuning.END


def test_the_end_token_stands_at_the_ends_alone_whatever_texts_spell(base: TrainedRun) -> None:
    example = tuning.encode(
        base.tokenizer, "say <|endoftext|> twice", "<|endoftext|><|endoftext|>", 200
    )
    assert (example.ids == tuning.END).nonzero()[0].tolist() == [0, len(example.ids) - 1]
    answer = base.tokenizer.decode(example.ids[example.answer_start : -1].tolist())
    assert answer == "<|endoftext|><|endoftext|>"


def test_a_batch_depends_on_seed_and_step_alone_and_an_epoch_holds_each_example_once() -> None:
    examples = [Example(np.array([0, n]), 1) for n in range(12)]
    one, two = Batches(examples, 4, seed=3), Batches(examples, 4, seed=3)
    assert [e.ids[1] for e in one[4]] == [e.ids[1] for e in two[4]]
    epoch = [int(e.ids[1]) for step in range(3) for e in one[step]]
    assert sorted(epoch) == list(range(12)) and one.per_epoch == 3
    assert [e.ids[1] for e in one[0]] != [e.ids[1] for e in Batches(examples, 4, seed=4)[0]]


def test_greedy_generation_with_the_cache_equals_generation_without(base: TrainedRun) -> None:
    prompt = [0, 40, 41, 42]
    generated = tuning.generate(base.model, prompt, context=32, limit=12)
    ids = list(prompt)
    with torch.no_grad():
        for token in generated:
            assert token == int(base.model(torch.tensor([ids]))[0, -1].argmax())
            ids.append(token)
    assert 0 < len(generated) <= 12
    assert 0 < len(tuning.generate(base.model, prompt * 20, context=32, limit=12)) <= 12


# --- whole runs -----------------------------------------------------------------------------


def test_a_tuned_run_learns_the_answers_and_leaves_its_record(
    base_path: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fast = ("--learning_rate", "4e-3")
    assert tune(base_path, data, tmp_path, "--epochs", "6", *fast) == 0
    folder = tmp_path / "base-tuned"
    result = json.loads((folder / "tuning.json").read_text())
    assert result["answer_loss_after"] < 0.7 * result["answer_loss_before"]
    assert len(result["answer_loss_by_epoch"]) == 7 and len(result["samples"]) == tuning.SAMPLES
    assert {"prompt", "expected", "before", "after"} == set(result["samples"][0])
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (metrics["phase"], metrics["status"], metrics["steps"]) == ("tuning", "finished", 30)
    assert metrics["cost_usd"] > 0 and metrics["wall_seconds"] >= metrics["train_seconds"]
    base_metrics = json.loads((base_path / "metrics.json").read_text())
    assert metrics["total_params_built"] == base_metrics["total_params_built"]
    assert "before" in capsys.readouterr().out
    from transformers import AutoModelForCausalLM

    exported = AutoModelForCausalLM.from_pretrained(folder / "final")
    assert sum(p.numel() for p in exported.parameters()) == metrics["total_params_built"]
    weights = (folder / "final" / "model.safetensors").read_bytes()
    settings = (folder / "final" / "tokenizer_config.json").read_bytes()
    assert "message.content" in json.loads(settings)["chat_template"]
    shutil.rmtree(folder / "final")
    assert tune(base_path, data, tmp_path, "--epochs", "6", *fast) == 0
    stdout = capsys.readouterr().out
    assert "nothing to do" in stdout and "written again" in stdout
    assert (folder / "final" / "model.safetensors").read_bytes() == weights
    assert (folder / "final" / "tokenizer_config.json").read_bytes() == settings
    assert tune(base_path, data, tmp_path, "--epochs", "5", *fast) == 78
    assert "tuning.epochs: 6 -> 5" in capsys.readouterr().err


def test_a_cut_tuning_goes_on_to_the_same_bits(
    base_path: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tune(base_path, data, tmp_path / "whole", "--epochs", "2") == 0
    get_batch = Batches.__getitem__

    def cut(self: Batches, step: int) -> list[Example]:
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return get_batch(self, step)

    monkeypatch.setattr(Batches, "__getitem__", cut)
    assert tune(base_path, data, tmp_path / "cut", "--epochs", "2") == 75
    assert not (tmp_path / "cut" / "base-tuned" / "metrics.json").exists()
    monkeypatch.setattr(Batches, "__getitem__", get_batch)
    assert tune(base_path, data, tmp_path / "cut", "--epochs", "2") == 0
    whole, resumed = (
        json.loads((tmp_path / name / "base-tuned" / "tuning.json").read_text())
        for name in ("whole", "cut")
    )
    assert resumed == whole


def test_what_is_missing_is_said_in_one_sentence(
    base_path: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune(base_path, tmp_path / "none", tmp_path) == 78
    assert "download_instructions.py" in capsys.readouterr().err
    assert tune(tmp_path / "norun", data, tmp_path) == 78
    assert "expected the directory of a finished run" in capsys.readouterr().err
    bad = tmp_path / "bad"
    shutil.copytree(data, bad)
    (bad / "train.jsonl").write_text('{"text": "no"}\n')
    assert tune(base_path, bad, tmp_path) == 78
    assert "found no instructions" in capsys.readouterr().err


# --- the download ---------------------------------------------------------------------------


def download(*arguments: object, code: int = 0) -> str:
    result = python("scripts/download_instructions.py", *arguments)
    output = result.stdout + result.stderr
    assert result.returncode == code, output
    return output


def test_both_kinds_of_columns_become_prompts_and_answers(tmp_path: Path) -> None:
    sets = {
        "acme/plain": {"prompt": [f"q{n}" for n in range(60)], "response": ["yes"] * 60},
        "acme/alpaca": {
            "instruction": [f"do {n}" for n in range(60)],
            "input": ["" if n % 2 else f"with {n}" for n in range(60)],
            "output": ["done"] * 59 + [""],
        },
        "acme/other": {"text": ["x"]},
    }
    mirror = tmp_path / "mirror"
    for name, columns in sets.items():
        folder = mirror / name / "default"
        folder.mkdir(parents=True)
        pq.write_table(pa.table(columns), folder / "train-00000-of-00001.parquet")
    downloaded = {}
    for name, rows_kept in (("plain", 60), ("alpaca", 59)):
        output = tmp_path / name
        arguments = ("--output", output, "--dataset", f"acme/{name}", "--mirror", mirror)
        download(*arguments)
        parts = [tuning.read_rows(output / f"{s}.jsonl") for s in ("train", "validation")]
        assert len(parts[0]) + len(parts[1]) == rows_kept and len(parts[0]) > len(parts[1])
        prompts = [{row["prompt"] for row in part} for part in parts]
        assert not prompts[0] & prompts[1]
        assert "nothing to do" in download(*arguments)
        source = json.loads((output / "source.json").read_text())
        assert source["dataset"] == f"acme/{name}" and str(mirror) not in json.dumps(source)
        downloaded[name] = parts[0] + parts[1]
    assert {row["prompt"] for row in downloaded["plain"]} == {f"q{n}" for n in range(60)}
    zero = next(row for row in downloaded["alpaca"] if "do 0\n" in row["prompt"])
    assert "### Input:\nwith 0" in zero["prompt"] and zero["prompt"].endswith("### Response:\n")
    for folder, dataset, message in (
        ("o", "acme/other", "found the columns text"),
        ("plain", "acme/alpaca", "holds acme/plain"),
    ):
        arguments = ("--output", tmp_path / folder, "--dataset", dataset, "--mirror", mirror)
        assert message in download(*arguments, code=78)


@pytest.mark.parametrize(
    "arguments",
    [("--seed", "-1"), ("--batch_size", "0.5"), ("--epochs", "0"), ("--nope",)],
)
def test_wrong_arguments_exit_as_bad_input(arguments, base_path, data, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        tune(base_path, data, tmp_path, *arguments)
    assert caught.value.code == 78 and "see --help" in capsys.readouterr().err


@pytest.mark.parametrize("rate", ["inf", "nan", "0", "2"])
def test_a_rate_that_is_none_is_refused(rate, base_path, data, tmp_path, capsys) -> None:
    assert tune(base_path, data, tmp_path, "--learning_rate", rate) == 78
    assert "--learning_rate: found" in capsys.readouterr().err


@pytest.mark.parametrize(
    "row", ['{"prompt": 3, "answer": "x"}', '{"prompt": "a", "answer": null}', "[1]", '{"a": 1}']
)
def test_rows_that_are_no_texts_are_refused(row, base_path, tmp_path, capsys) -> None:
    for name in ("train", "validation"):
        (tmp_path / f"{name}.jsonl").write_text(f"{row}\n" * 8)
    assert tune(base_path, tmp_path, tmp_path) == 78
    assert "found no instructions" in capsys.readouterr().err
