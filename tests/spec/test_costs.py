"""A device finds its price, and a table that cannot be used is refused with what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

import run_experiment
from src.spec import costs
from tests import ROOT

GOOD = "{match: [H100], usd_per_hour: 2.69, kind: spot, read_on: null, source: a}"


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "prices.yaml"
    monkeypatch.setattr(costs, "TABLE", path)
    return path


@pytest.mark.parametrize(
    ("device", "name", "price"),
    [
        ("cpu", "AMD EPYC 7B12", 0.0279),
        ("cpu", "Intel(R) Xeon(R) with an H100 beside it", 0.0279),
        ("cuda", "NVIDIA H200", 3.59),
        ("cuda", "NVIDIA H100 80GB HBM3", 2.69),
        ("cuda", "nvidia a100-sxm4-80gb", 1.39),
        ("cuda", "NVIDIA A100 80GB PCIe", 1.39),
        ("cuda", "NVIDIA A100-SXM4-40GB", 1.00),
        ("cuda", "Tesla V100-SXM2-16GB", 0.74),
        ("cuda", "NVIDIA L40S", 0.79),
        ("cuda", "NVIDIA L4", 0.80),
        ("cuda", "NVIDIA GeForce RTX 4090", 2.69),  # the entry that every device matches
    ],
)
def test_a_device_finds_its_shipped_price(device: str, name: str, price: float) -> None:
    costs.check()
    assert costs.price_per_hour(device, name) == price


def test_device_type_and_name_are_matched_together_in_the_order_of_the_table(table: Path) -> None:
    table.write_text(
        f"devices:\n  mine: {{match: ['CUDA nvidia h100 nvl'], usd_per_hour: 1}}\n  H100: {GOOD}\n"
    )
    costs.check()
    assert costs.price_per_hour("cuda", "NVIDIA H100 NVL") == 1.0
    assert costs.price_per_hour("cuda", "NVIDIA H100 80GB HBM3") == 2.69
    assert costs.price_per_hour("cpu", "AMD EPYC") is None  # no entry that every device matches


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("devices: [", "prices.yaml"),
        ("- 1", "expected a mapping"),
        ("prices: {}", "prices.yaml: prices: found an unknown key"),
        ("currency: EUR\ndevices: {a: " + GOOD + "}", "currency: found 'EUR', expected USD"),
        ("devices: {}", "devices: found none"),
        ("as_of: x", "devices: found None"),
        ("devices: {a: 3}", "devices.a: found 3"),
        ("devices: {a: {usd_per_hour: 1}}", "devices.a.match: found None"),
        ("devices: {a: {match: H100, usd_per_hour: 1}}", "devices.a.match: found 'H100'"),
        ("devices: {a: {match: [H100]}}", "devices.a.usd_per_hour: found None"),
        ("devices: {a: {match: [x], usd_per_hour: '2'}}", "usd_per_hour: found '2', expected a"),
        ("devices: {a: {match: [x], usd_per_hour: -1}}", "usd_per_hour: found -1"),
        ("devices: {a: {match: [x], usd_per_hour: .nan}}", "usd_per_hour: found nan"),
        ("devices: {a: {match: [x], usd_per_hour: true}}", "usd_per_hour: found True"),
        ("devices: {a: {match: [x], usd_per_hour: 1, tflops: 0}}", "devices.a.tflops: found 0"),
        ("devices: {a: {match: [x], usd_per_hour: 1, kind: gift}}", "kind: found 'gift'"),
        ("devices: {a: {match: [x], usd_per_hour: 1, prize: 2}}", "devices.a.prize: found an"),
        (f"devices:\n  a: {GOOD}\n  a: {GOOD}", "'a' is there twice"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused(table: Path, text: str, told: str) -> None:
    table.write_text(text)
    for use in (costs.check, lambda: costs.price_per_hour("cuda", "NVIDIA H100")):
        with pytest.raises(ValueError, match="prices.yaml") as refused:
            use()
        assert told in str(refused.value)


def test_no_table_is_refused(table: Path) -> None:
    with pytest.raises(ValueError, match="prices.yaml: found no such file, expected a table"):
        costs.check()


def test_a_lower_bound_is_flops_at_half_of_peak_at_the_hour_s_price(table: Path) -> None:
    table.write_text(
        "devices:\n"
        "  fast: {match: [fast], tflops: 200, usd_per_hour: 2}\n"
        "  slow: {match: [slow], usd_per_hour: 1}\n"
    )
    assert costs.lower_bounds(3.6e17) == [("fast", 1.0, 2.0)]  # 3.6e17 / 1e14 = 3,600 s


def test_the_dry_run_of_the_transfer_shows_what_it_costs_at_least(capsys) -> None:
    command = ["--config", str(ROOT / "configs/transfer_100m.yaml"), "--dry_run"]
    assert run_experiment.main(command) == 0
    whole = capsys.readouterr().out
    assert "runs: 4, tokens: 8,000," in whole
    h100 = next(line.split() for line in whole.splitlines() if line.split()[:1] == ["H100"])
    # 6 FLOPs a multiplied weight and token, on about 100M weights: at least 4.8e18 in all.
    assert 4.8e18 / (0.5 * 989e12) / 3600 < float(h100[1]) < 1.3 * 4.8e18 / (0.5 * 989e12) / 3600
    assert run_experiment.main([*command, "--exp", "big-share25", "--seed", "0"]) == 0
    assert "runs: 1, tokens: 2,000," in capsys.readouterr().out
