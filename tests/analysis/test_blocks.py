"""Blocks of several learning rates and directories: what the report of a study needs of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from src.analysis import blocks, report_tables, run_csv, run_table
from tests.synthetic_runs import GLU_SWEEP, SHARE_SWEEP, write_sweep

SHARE = "embed_ratio.yaml"
RATES = {"2e-3": 2e-3, "4e-3": 4e-3, "8e-3": 8e-3}
BEST = {"emb35": "4e-3", "emb25": "8e-3", "emb45": "4e-3"}
HERE = {"program_digest": "p" * 64, "processors": "AMD EPYC AVX512"}


@pytest.fixture
def logs(tmp_path: Path) -> list[Path]:
    """prd/: three shares at one rate and batch; rates/: each at three rates and a smaller batch,
    three seeds at the best. emb25 leads prd/ and, at its own best rate alone, comes second here."""
    prd, rates = tmp_path / "prd", tmp_path / "rates"
    write_sweep(prd, SHARE, SHARE_SWEEP, phase="rank", tokens=5_000_000, **HERE)
    names = [f"{exp.name}-lr{rate}" for exp in SHARE_SWEEP for rate in RATES]
    for exp in SHARE_SWEEP:
        for label, rate in RATES.items():
            best = BEST[exp.name] == label
            gain = {"emb35": -0.1, "emb25": -0.05, "emb45": 0.0}[exp.name] + (not best) * 0.2
            write_sweep(
                rates, SHARE, [replace(exp, name=f"{exp.name}-lr{label}", gain=gain)],
                baseline="emb35-lr2e-3", names=names, phase="rank", tokens=5_000_000,
                seeds=(0, 1, 2) if best else (0,), learning_rate=rate, batch_size=64, steps=611,
                **(HERE | ({"processors": "AMD EPYC AVX2"} if exp.name == "emb45" else {})),
            )  # fmt: skip
    return [prd, rates]


def test_directories_are_read_together_and_batches_are_blocks(logs: list[Path]) -> None:
    rows = run_table.read_rows(*logs)
    assert {row["run"].partition("/")[0] for row in rows} == {"prd", "rates"}
    assert {row["status"] for row in rows} == {"finished"}, "no sweep's plan is the other's"
    first, second = blocks.blocks(run_csv.table(rows))
    assert (first.many_rates, second.many_rates) == (False, True)
    assert (len(first.runs), len(second.runs), second.baseline) == (3, 15, "emb35")
    assert "in 152 steps" in first.title and "in 611 steps" in second.title
    with pytest.raises(ValueError, match="two directories called prd"):
        run_table.read_rows(logs[0], logs[0])


def test_who_leads_at_its_own_rate_and_whether_blocks_agree(logs: list[Path]) -> None:
    runs = run_csv.table(run_table.read_rows(*logs))
    _, second = blocks.blocks(runs)
    assert blocks.own_rates(second.runs) == {n: RATES[rate] for n, rate in BEST.items()}
    prd, rates, against = blocks.order_sentences(runs)
    assert prd.index("emb25") < prd.index("emb35") < prd.index("emb45") and "one seed" in prd
    assert rates.index("emb35") < rates.index("emb25") < rates.index("emb45")
    assert "emb25's is the highest rate tried" in rates and "emb35's" not in rates
    assert "At the shared rate 4e-3: another order, emb35 < emb45 < emb25." in rates
    assert "At the shared rate 2e-3" in rates and "not told apart" not in rates
    assert against.endswith("another order.")


def test_the_compact_tables(logs: list[Path]) -> None:
    runs = run_csv.table(run_table.read_rows(*logs))
    summary = report_tables.summary_table(runs)
    heads = [line for line in summary.splitlines() if line.startswith("| configuration")]
    assert len(heads) == 2 and all(head.count(" | ") == 7 for head in heads)
    (line,) = [line for line in summary.splitlines() if "| 8e-3 | 3 |" in line]
    assert line.startswith("| emb25 |") and " % (" in line and "no pairs" not in line
    single_seed = [line for line in summary.splitlines() if "| 4e-3 | 1 |" in line]
    assert len(single_seed) == 3 and not any(" to " in line for line in single_seed), (
        "one seed: no interval"
    )
    rates = report_tables.rates_table(runs)
    assert "configuration | 2e-3 | 4e-3 | 8e-3 |" in rates and rates.count("**") == 2 * 4


def test_runs_of_two_processors_are_compared_and_that_is_said(logs: list[Path]) -> None:
    runs = run_csv.table(run_table.read_rows(*logs))
    (sentence,) = report_tables.processors_differ(runs)
    assert "in 611 steps" in sentence and "2 kinds of processor" in sentence
    assert "AMD EPYC AVX2: 5" in sentence and "compared all the same" in sentence
    other = runs["program_digest"].where(runs["experiment"] != "emb25", "q" * 64)
    (sentence, _) = report_tables.processors_differ(runs.assign(program_digest=other))
    assert "computed by 2 programs" in sentence


def test_a_table_says_which_seeds_and_pairs_it_rests_on(logs: list[Path]) -> None:
    """One seed of one rate is lost, and a third one was computed by another program."""
    runs = run_csv.table(run_table.read_rows(*logs))
    here = (runs["experiment"] == "emb45-lr4e-3") & (runs["batch_size"] == 64)
    fewer = runs[~(here & (runs["seed"] == 2))]
    (sentence,) = (
        line for line in blocks.order_sentences(fewer) if "611 steps" in line and "<" in line
    )
    assert "dev perplexity over seeds 0, 1 emb35" in sentence
    moved = runs["program_digest"].where(~(here & (runs["seed"] == 0)), "q" * 64)
    summary = report_tables.summary_table(runs.assign(program_digest=moved))
    (line,) = (
        line for line in summary.splitlines() if "| emb45 |" in line and "| 4e-3 | 3 |" in line
    )
    assert ", 2 pairs)" in line
    beside = (runs["experiment"] == "emb35-lr4e-3") & (runs["batch_size"] == 64)
    first = blocks.gap("emb45", "emb35", runs[here | beside], "dev_loss")
    second = blocks.gap("emb45", "emb35", fewer[fewer["seed"] == 0], "dev_loss")
    assert first is not None and second is not None and (first.pairs, second.pairs) == (3, 0)
    assert second.interval.seeds == 1 and second.seeds == (0,)
    more = runs["dev_perplexity"].where(~(here & (runs["seed"] > 0)), 999.0)
    (rates,) = (line for line in report_tables.rates_table(
        runs.assign(dev_perplexity=more)).splitlines() if line.startswith("| emb45"))  # fmt: skip
    assert "999" not in rates, "the other rates have seed 0 alone"


def test_two_configurations_that_seeds_do_not_part_are_not_ordered(logs: list[Path]) -> None:
    runs = run_csv.table(run_table.read_rows(*logs))
    noisy = runs["dev_loss"] + 0.3 * ((runs["seed"] == 1) & (runs["configuration"] == "emb35"))
    sentences = blocks.order_sentences(runs.assign(dev_loss=noisy))
    assert any("emb35 and emb25 are not told apart" in line for line in sentences)


def test_a_glu_sweep_is_in_the_order_of_what_was_built(tmp_path: Path) -> None:
    write_sweep(tmp_path, "glu_expansion.yaml", GLU_SWEEP, phase="rank", tokens=5_000_000)
    summary = report_tables.summary_table(run_csv.table(run_table.read_rows(tmp_path)))
    head, _, *lines = summary.splitlines()[2:]
    assert "| GLU |" in head and "| share |" not in head
    built = [float(line.split(" | ")[1]) for line in lines]
    assert len(built) > 2 and built == sorted(built)
