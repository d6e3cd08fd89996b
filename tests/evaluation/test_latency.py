"""Latency and memory: the right work is timed, in the right order, and the numbers add up."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from src.evaluation import latency as eval_latency
from src.evaluation.latency import compare, measure, ratio_interval
from src.evaluation.memory import PeakMemory
from src.models.transformer import Transformer
from src.spec.config import ModelConfig

CPU = torch.device("cpu")
CONFIG = ModelConfig(vocab_size=2001, d_model=16, n_layers=2, n_heads=2, head_dim=16, d_ff=24)


def small_model(seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(CONFIG)


def test_keys_and_memory_that_can_be_computed() -> None:
    model = small_model()
    metrics = measure(
        model, device="cpu", autocast_dtype=None, lengths=(8, 32), warmup=1, repeats=5
    )
    for key in ("latency_ms_p50_l8", "latency_ms_p95_l32", "decode_ms_per_token_p95"):
        assert metrics[key] > 0
    assert metrics["latency_ms_p50_l8"] <= metrics["latency_ms_p95_l8"]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert metrics["weights_mib"] == parameters * 4 / 2**20
    keys_and_values = 2 * CONFIG.n_layers * CONFIG.n_heads * CONFIG.head_dim * 32
    assert metrics["kv_cache_mib"] == keys_and_values * 4 / 2**20
    # all logits at once would dwarf the body's activations here, and the last token's do not
    logits = 32 * CONFIG.vocab_size * 4 / 2**20
    assert 0 < metrics["activations_mib"] < 0.5 * logits
    parts = metrics["weights_mib"] + metrics["kv_cache_mib"] + metrics["activations_mib"]
    assert metrics["peak_memory_mib"] == parts
    assert metrics["process_peak_memory_mib"] > parts
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics


def test_bfloat16_halves_the_cache() -> None:
    options = {"device": "cpu", "lengths": (8, 16), "warmup": 0, "repeats": 2}
    exact = measure(small_model(), autocast_dtype=None, **options)  # type: ignore[arg-type]
    low = measure(small_model(), autocast_dtype=torch.bfloat16, **options)  # type: ignore[arg-type]
    assert low["kv_cache_mib"] == exact["kv_cache_mib"] / 2
    assert low["weights_mib"] == exact["weights_mib"]


@torch.no_grad()
def test_every_timed_step_does_the_work_it_is_named_after() -> None:
    model = small_model()
    steps = eval_latency._steps(model, CPU, torch.float32, (8, 32))
    prompt = eval_latency._prompt(model, 32, CPU)
    torch.testing.assert_close(steps["l32"](), model(prompt)[:, -1])
    past = eval_latency._prompt(model, 31, CPU)
    whole = torch.cat((past, eval_latency._prompt(model, 1, CPU)), dim=1)
    expected = model(whole)[:, -1]
    for _ in range(3):  # the cache is rewound: every repeat decodes the same token
        torch.testing.assert_close(steps["decode"](), expected)


def test_repeats_are_interleaved_after_the_warm_up() -> None:
    called: list[str] = []

    def step(name: str) -> torch.Tensor:
        called.append(name)
        return torch.empty(0)

    steps = {name: (lambda name=name: step(name)) for name in ("a", "b")}
    times = eval_latency.time_interleaved(steps, device=CPU, warmup=2, repeats=3)
    assert called == ["a", "b"] * 5
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}


def test_one_process_of_a_machine_measures_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two measurements started together: the second's first step comes after the first's last."""
    monkeypatch.setattr(eval_latency.tempfile, "gettempdir", lambda: str(tmp_path))
    called: list[str] = []
    others: list[threading.Thread] = []

    def measured(name: str) -> None:
        def step() -> torch.Tensor:
            called.append(name)
            if name == "first" and not others:
                others.append(threading.Thread(target=measured, args=("second",)))
                others[0].start()
                others[0].join(0.3)  # long enough to be done, were it not for the lock
            return torch.empty(0)

        eval_latency.time_interleaved({name: step}, device=CPU, warmup=1, repeats=3)

    measured("first")
    others[0].join()
    assert called == ["first"] * 4 + ["second"] * 4


def test_interval_of_the_ratio_covers_it() -> None:
    """200 experiments of known ratio: a 95 % interval misses about 10; 25 is beyond 1 in 10^4."""
    rng = np.random.default_rng(0)
    missed = 0
    for experiment in range(200):
        ours, baseline = 1.2 * rng.lognormal(0.0, 0.3, 60), rng.lognormal(0.0, 0.3, 60)
        low, high = ratio_interval(ours, baseline, seed=experiment)
        missed += not low <= 1.2 <= high
    assert 1 <= missed <= 25


def test_ratio_cancels_drift_that_both_models_share() -> None:
    drift = np.linspace(1.0, 3.0, 100)
    assert ratio_interval(1.25 * drift, drift) == pytest.approx((1.25, 1.25))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.90, 0.95, "not slower"),
        (0.99, 1.03, "not slower"),
        (1.00, 1.04, "undecided"),
        (1.04, 1.06, "slower"),
    ],
)
def test_verdict(low: float, high: float, expected: str) -> None:
    assert eval_latency.verdict(low, high) == expected


def test_a_deeper_model_is_told_from_a_shallow_one() -> None:
    """Sixteen times the layers, so that no noise can turn the verdict."""
    torch.manual_seed(0)
    values = {name: getattr(CONFIG, name) for name in ("vocab_size", "d_model", "n_heads",
              "head_dim", "d_ff")}  # fmt: skip
    shallow = Transformer(ModelConfig(n_layers=1, **values))
    deep = Transformer(ModelConfig(n_layers=16, **values))
    comparison = compare(
        deep, shallow, device="cpu", autocast_dtype=None, lengths=(8, 16), warmup=2, repeats=21
    )
    assert set(comparison) == {"l8", "l16", "decode"}
    longest = comparison["l16"]
    assert longest["verdict"] == "slower"
    assert longest["ratio_low"] <= longest["ratio"] <= longest["ratio_high"]


def test_peak_memory_counts_what_is_alive_together() -> None:
    x = torch.zeros(1000, 250)  # 1e6 bytes, made outside: not counted
    with PeakMemory() as memory:
        a = x + 1
        b = a * 2
        del a
        c = b.view(-1)  # a view holds no storage of its own
        d = torch.relu(c)
        del b, c
        total = d.sum()
    assert memory.peak == 2_000_000
    assert memory.now == 1_000_000 + total.element_size()


def test_measuring_leaves_model_and_generator_alone() -> None:
    model = small_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    measure(model, device="cpu", autocast_dtype=None, lengths=(4,), warmup=0, repeats=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_run_that_is_not_there_is_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert eval_latency.main(["--run", str(tmp_path / "none"), "--device", "cpu"]) == 78
    assert "expected the directory of a finished run" in capsys.readouterr().err


def test_an_output_of_other_runs_is_refused_and_of_the_same_ones_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "latency" / "emb45.json"
    output.parent.mkdir()
    output.write_text('{"baseline": "rates/emb35", "ours": "rates/emb45"}')
    runs = [str(tmp_path / "rates" / name) for name in ("emb35", "emb45", "emb25")]
    options = ["--output", str(output), "--device", "cpu", "--compare"]
    assert eval_latency.main([*options, runs[0], runs[1]]) == 0
    assert "measured before, nothing to do" in capsys.readouterr().out
    assert eval_latency.main([*options, runs[0], runs[2]]) == 78
    assert (
        "found the latency of rates/emb35 and rates/emb45, expected rates/emb35 and rates/emb25"
        in capsys.readouterr().err
    )
