"""A finished run is read back whole, or refused with what is wrong."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from src import eval_smallbench
from src.data.tasks import TASKS_FILE
from src.evaluation import latency as eval_latency
from src.evaluation.trained_run import load_run
from src.models.export import export
from src.models.transformer import Transformer
from src.storage import checkpoint
from tests.evaluation import toy_rows, write_rows
from tests.models import small_model

TASK = (
    "tasks:\n- {name: toy, path: p, config: c, split: s, prompt: '{{ q }}', choices: [a, b],"
    " gold: '{{ label }}'}\n"
)


@pytest.fixture
def run(tmp_path: Path, tokenizer_json: Path) -> tuple[Path, Transformer]:
    """What training leaves, as far as evaluation reads it."""
    path, model = tmp_path / "logs" / "toy", small_model()
    export(model, tokenizer_json, path / "final", max_position_embeddings=32)
    digests = {
        "config": "c" * 64,
        "tokenizer": hashlib.sha256(tokenizer_json.read_bytes()).hexdigest(),
        "data": "d" * 64,
    }
    (tmp_path / "tasks.yaml").write_text(TASK)
    write_rows(tmp_path / "smallbench", "toy", toy_rows(10))
    resolved: dict[str, Any] = {
        "config_digest": digests["config"],
        "tokenizer_sha256": digests["tokenizer"],
        "data_sha256": digests["data"],
        "data_dir": str(tmp_path / "tokens"),
        "model": dataclasses.asdict(model.config),
        "training": {"seq_len": 32, "init_seed": 3},
        "evaluation": {
            "smallbench_dir": str(tmp_path / "smallbench"),
            "smallbench_tasks": str(tmp_path / "tasks.yaml"),
            "leakage": None,
        },
    }
    (path / "config.yaml").write_text(yaml.safe_dump(resolved))
    state = {"model": model.state_dict()}
    checkpoint.save(path / "checkpoints", state, step=5, digests=digests, environment={})
    return path, model


def test_weights_tokenizer_and_context_come_back(run: tuple[Path, Transformer]) -> None:
    path, model = run
    before = torch.get_rng_state()
    loaded = load_run(path)
    assert torch.equal(torch.get_rng_state(), before)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value)
    assert loaded.context == 32
    assert loaded.tokenizer.token_to_id("<|endoftext|>") == 0
    assert loaded.contaminated_rows(path) is None


def test_another_tokenizer_or_no_run_is_refused(run: tuple[Path, Transformer]) -> None:
    path, _ = run
    tokenizer = path / "final" / "tokenizer.json"
    tokenizer.write_bytes(tokenizer.read_bytes() + b"\n")
    with pytest.raises(ValueError, match="found the hash"):
        load_run(path)
    tokenizer.unlink()
    with pytest.raises(ValueError, match="final: found no whole export"):
        load_run(path)
    (path / "metrics.json").write_text('{"status": "killed", "steps": 5}')
    with pytest.raises(ValueError, match="the kill rule stopped this run"):
        load_run(path)
    (path / "config.yaml").unlink()
    with pytest.raises(ValueError, match="expected the directory of a finished run"):
        load_run(path)


def test_an_earlier_checkpoint_is_not_taken_for_the_final_model(
    run: tuple[Path, Transformer],
) -> None:
    path, _ = run
    (path / "metrics.json").write_text('{"status": "finished", "steps": 9}')
    with pytest.raises(ValueError, match="found step 5 .*expected that of the last step, 9"):
        load_run(path)


def test_smallbench_command(
    run: tuple[Path, Transformer],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, _ = run
    # the command pins threads: to as many as there are, for the tests that follow
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    items = path / "again.jsonl"
    command = ["--run", str(path), "--device", "cpu"]
    assert eval_smallbench.main([*command, "--limit", "6", "--items", str(items)]) == 0
    trained = json.loads(capsys.readouterr().out)
    assert trained["tasks"]["toy"]["n"] == len(items.read_text().splitlines()) == 6
    assert eval_smallbench.main([*command, "--limit", "6", "--random_init"]) == 0
    untrained = json.loads(capsys.readouterr().out)
    assert untrained["tasks"]["toy"]["items_sha256"] == trained["tasks"]["toy"]["items_sha256"]
    assert untrained["tasks"]["toy"]["gold_margin"] != trained["tasks"]["toy"]["gold_margin"]
    assert eval_smallbench.main([*command, "--tasks", str(TASKS_FILE)]) == 78
    assert "download_smallbench.py" in capsys.readouterr().err

    # By default the items that the run itself was evaluated on.
    resolved = yaml.safe_load((path / "config.yaml").read_text())
    resolved["evaluation"]["smallbench_limit"] = 4
    (path / "config.yaml").write_text(yaml.safe_dump(resolved))
    for more, items_used in ([], 4), (["--full"], 10), (["--limit", "7"], 7):
        assert eval_smallbench.main([*command, *more]) == 0
        assert json.loads(capsys.readouterr().out)["tasks"]["toy"]["n"] == items_used
    unwritable = ["--items", str(path / "absent" / "items.jsonl")]
    assert eval_smallbench.main([*command, *unwritable]) == 74
    stderr = capsys.readouterr().err
    assert stderr.startswith("could not read or write") and stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("main", "wrong"),
    [
        (eval_smallbench.main, []),
        (eval_smallbench.main, ["--run", "x", "--limit", "-3"]),
        (eval_latency.main, ["--run", "x", "--precision", "fp8"]),
        (eval_latency.main, ["--run", "x", "--repeats", "1"]),
        (eval_latency.main, ["--run", "x", "--unknown"]),
    ],
)
def test_wrong_arguments_are_one_sentence(
    main: Callable[[list[str]], int], wrong: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(wrong)
    stderr = capsys.readouterr().err
    assert caught.value.code == 78
    assert stderr.endswith("; see --help\n") and stderr.count("\n") == 1


def test_latency_command(run: tuple[Path, Transformer], capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = run
    options = ["--device", "cpu", "--warmup", "1", "--repeats", "3", "--lengths", "4", "8"]
    threads = ["--threads", str(torch.get_num_threads())]
    assert eval_latency.main(["--run", str(path), *options, *threads]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert alone["latency_ms_p50_l8"] > 0 and alone["environment"]["threads"] > 0
    assert eval_latency.main(["--compare", str(path), str(path), *options, *threads]) == 0
    pair = json.loads(capsys.readouterr().out)
    assert pair["comparison"]["decode"]["ratio_low"] <= pair["comparison"]["decode"]["ratio_high"]
    assert pair["margin"] == 1.03
    assert pair["precision"] == "fp32"  # metrics.json is not there to say another

    (path / "metrics.json").write_text('{"precision": "bf16"}')
    assert eval_latency.main(["--run", str(path), *options, *threads]) == 0
    assert json.loads(capsys.readouterr().out)["precision"] == "bf16"
    stated = ["--precision", "fp32"]
    assert eval_latency.main(["--run", str(path), *options, *threads, *stated]) == 0
    assert json.loads(capsys.readouterr().out)["precision"] == "fp32"
    other = path.with_name("other")
    shutil.copytree(path, other)
    (other / "metrics.json").write_text('{"precision": "fp32"}')
    assert eval_latency.main(["--compare", str(path), str(other), *options, *threads]) == 78
    assert "state it with --precision" in capsys.readouterr().err


def test_speeds_are_compared_without_the_weights(
    run: tuple[Path, Transformer], capsys: pytest.CaptureFixture[str]
) -> None:
    """On another machine there is what was published: shapes, no weights."""
    path, _ = run
    log_dir, moved = path.parent, path.parent / "20m" / "toy"
    moved.mkdir(parents=True)
    shutil.copy(path / "config.yaml", moved)
    output = log_dir / "latency" / "a.json"
    command = "--device cpu --warmup 1 --repeats 3 --lengths 4 --threads 1".split()
    command += ["--compare", str(path), str(moved), "--output", str(output)]
    assert eval_latency.main(command) == 78, "no finished run"
    assert "found no whole export" in capsys.readouterr().err
    (moved / "metrics.json").write_text('{"status": "killed"}')
    assert eval_latency.main(command) == 78
    assert "the kill rule stopped this run" in capsys.readouterr().err
    (moved / "metrics.json").write_text('{"status": "finished"}')
    assert eval_latency.main(command) == 0
    result = json.loads(output.read_text())
    assert (result["baseline"], result["ours"]) == ("toy", "20m/toy"), "as a study names its runs"
    assert result["trained_weights"] is False


@pytest.mark.parametrize("content", ["config_digest: x\n", "- 1\n", "a: [\n", "\0"])
def test_a_config_that_no_run_wrote_is_refused(run: tuple[Path, Transformer], content: str) -> None:
    path, _ = run
    (path / "config.yaml").write_text(content)
    with pytest.raises(ValueError, match="config.yaml"):
        load_run(path)


def test_a_tuned_run_is_scored_by_the_default_evaluation(run: tuple[Path, Transformer]) -> None:
    path, _ = run
    config = yaml.safe_load((path / "config.yaml").read_text())
    del config["evaluation"], config["data_dir"]
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    loaded = load_run(path)
    assert loaded.evaluation["smallbench_dir"] == "data/smallbench"
    assert loaded.contaminated_rows(path) is None
