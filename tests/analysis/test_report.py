"""REPORT.md: every number of its prose is recomputed from results/study-10m and the configs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from src.analysis import blocks, decisions, intervals, repeats, run_csv
from src.analysis.run_csv import Row
from src.analysis.science import predictions
from src.spec import config
from src.spec.study_file import load_study
from src.study.plan import allocate
from tests import ROOT
from tests.analysis.published import RESULTS, content, lacking, prose, rows, unchecked

PAGE = ROOT / "REPORT.md"
TEN = RESULTS / "study-10m"
STUDY = ROOT / "configs/study_10m.yaml"
SWEEP = ROOT / "configs/embed_ratio.yaml"
SHARES = ("emb25", "emb35", "emb45")
COUNT = {2: "two", 3: "three"}
A100_BF16_FLOPS = 312e12  # NVIDIA's data sheet


def finished() -> list[Row]:
    """The runs that were trained, each once."""
    trained = (row for row in rows(TEN).values() if row.get("same_as") is None)
    return [row for row in trained if row["status"] == "finished"]


def run(block: str, name: str) -> Row:
    return rows(TEN)[f"{block}/{name}-rank"]


def set_up() -> Iterator[str]:
    first = run("prd", "emb35")
    later = [block for block in load_study(STUDY).blocks if block.name.endswith("0m")]
    budgets = [
        next(o for o in block.overrides if o.startswith("training.tokens=")) for block in later
    ]
    sizes = [f"{int(text.partition('=')[2]) // 10**6}M" for text in budgets]
    yield f"the runs of {' and '.join(sizes)} tokens"
    assert {row["total_params_asked"] for row in finished()} == {10_000_000}
    assert max(row["epochs"] for row in finished()) < 1
    yield f"{first['total_params_asked'] / 1e6:.1f}M parameters, V = {first['vocab_size']:,}"
    yield f"heads of {first['head_dim']}"
    sweep = config.load_sweep(SWEEP)
    shapes = allocate(sweep)
    asked = {one.experiment: one.model.embedding_ratio for one in sweep.runs}
    shares = " / ".join(f"{100 * asked[name]:.0f}" for name in SHARES)
    yield f"({shares} %)"
    depths = [shapes[name].model.n_layers for name in SHARES]
    yield f"{' / '.join(map(str, depths))} layers at {shares} %"
    yield f"depth falls from {depths[0]} to {depths[-1]} layers"
    yield f"{first['tokens'] / 1e6:.1f}M tokens of english-50m"
    assert {row["seq_len"] for row in finished()} == {128}
    batches = sorted({int(row["batch_size"]) for row in finished()}, reverse=True)
    yield f"in sequences of 128, {batches[0]} or {batches[1]} a step"
    expansions = config.load_sweep(ROOT / "configs/glu_expansion.yaml").runs
    yield f"({' / '.join(f'{one.model.glu_expansion:g}' for one in expansions)} times d_model)"
    full = sweep.runs[0].training.tokens
    assert first["tokens"] / full == pytest.approx(0.1, rel=0.01)


def ends(name: str) -> dict[float, float]:
    """Dev perplexity of a share by the rates of the block of 611 steps, seed 0."""
    chosen = [
        row for row in finished() if row["run"].startswith(f"rates/{name}-") and not row["seed"]
    ]
    return {row["learning_rate"]: row["dev_perplexity"] for row in chosen}


def seeds(name: str, rate: str) -> list[Row]:
    """The runs of a share at a rate of that block."""
    chosen = [row for row in finished() if row["run"].startswith(f"rates/{name}-lr{rate}-rank")]
    return sorted(chosen, key=lambda row: int(row["seed"]))


def repeated() -> dict[str, list[Row]]:
    """The seeds of each share at its own best rate."""
    best = {"emb25": "2e-3", "emb35": "2e-3", "emb45": "4e-3"}
    return {name: seeds(name, rate) for name, rate in best.items()}


def pooled() -> repeats.Noise:
    losses = {name: [row["dev_loss"] for row in side] for name, side in repeated().items()}
    estimate = repeats.pooled_noise(losses)
    assert estimate is not None
    return estimate


def chance() -> float:
    """Two single runs of one configuration differ by more in one case of twenty."""
    return math.expm1(decisions.by_chance(pooled(), 1, 1))


def gap(ours: str, baseline: str, sweep: str) -> blocks.Gap:
    """Of two configurations of the block of 611 steps of a sweep, each at its own best rate."""
    (block,) = (
        block
        for block in blocks.blocks(run_csv.table(rows(TEN).values()))
        if block.sweep == sweep and block.steps == run("rates", "emb35-lr2e-3")["steps"]
    )
    result = blocks.gap(ours, baseline, blocks.at_own_rates(block.runs), "dev_loss")
    assert result is not None
    return result


def decision() -> Iterator[str]:
    """No winner: of full runs there is none, and no share is ahead by the bar for sure."""
    assert not [row for row in finished() if row["phase"] == "full"]
    gaps = {name: gap(name, "emb35", SWEEP.name) for name in ("emb25", "emb45")}
    below, above = (100 * abs(gaps[name].interval.ratio[1] - 1) for name in ("emb45", "emb25"))
    (pairs,) = {found.pairs for found in gaps.values()}
    assert pairs == 3 and gaps["emb45"].interval.estimate < 0 < gaps["emb25"].interval.low
    assert gaps["emb45"].interval.low < math.log(0.95) < 0 < gaps["emb45"].interval.high
    yield f"emb45 ends {below:.1f} % below the baseline over three pairs of seeds"
    yield f"emb25 ends {above:.1f} % above, further than chance"
    yield "not 25 % in the table; 35 and 45 % are not told apart"
    yield "Measured, 25 % is worse"


def rates() -> Iterator[str]:
    """Of the block of 611 steps, beside that of 153."""
    large = {name: run("prd", name) for name in SHARES}
    tried = {name: ends(name) for name in SHARES}
    small = run("rates", "emb35-lr4e-3")
    yield f"{large['emb35']['batch_size']:.0f} sequences spend a ranking budget on"
    yield f"{large['emb35']['steps']} steps. With {small['batch_size']:.0f}, {small['steps']} steps"
    for name in SHARES:
        half = large[name]["dev_perplexity"] / 2
        assert tried[name][4e-3] == pytest.approx(half, rel=0.2)
    for name in ("emb25", "emb35"):
        assert min(tried[name], key=tried[name].__getitem__) == 2e-3
        assert min(tried[name]) < 2e-3 < max(tried[name])
    assert tried["emb45"][4e-3] == pytest.approx(tried["emb45"][8e-3], rel=0.001)
    assert max(tried["emb45"], key=tried["emb45"].__getitem__) == 2e-3
    yield "at seed 0, is 2e-3 for emb25 and emb35, 4e-3 or 8e-3 for emb45"
    ahead = [tried["emb45"][rate] / tried["emb35"][rate] - 1 for rate in (2e-3, 4e-3)]
    assert ahead[1] < 0 < ahead[0] and max(map(abs, ahead)) < chance()
    for rate in (1e-3, 2e-3, 4e-3):
        there = {name: ppl[rate] for name, ppl in tried.items() if rate in ppl}
        assert max(there, key=there.__getitem__) == "emb25"
    assert max(large, key=lambda name: large[name]["dev_perplexity"]) == "emb25"
    key = "outside_dev_bits_per_byte"
    other = {name: [row[key] for row in side] for name, side in repeated().items()}
    assert all(a < b for a, b in zip(other["emb35"], other["emb45"], strict=True))
    found = intervals.seed_interval(other["emb45"], other["emb35"], paired_seeds=True)
    assert found.low < 0 < found.high
    means = {name: sum(values) / len(values) for name, values in other.items()}
    yield (
        "On WikiText-2 emb35 is ahead of emb45 in all three pairs "
        f"({means['emb35']:.3f} against {means['emb45']:.3f} bits a byte)"
    )


def expansion() -> Iterator[str]:
    """Of the GLU, on the leading share's model, beside it."""
    usual = run("rates", "emb45-lr4e-3")
    wide, narrow = (run("glu", f"glu{x}x-emb45-lr4e-3") for x in (4, 2))
    above = {row["experiment"]: row["dev_perplexity"] / usual["dev_perplexity"] - 1
             for row in (wide, narrow)}  # fmt: skip
    assert min(above.values()) > chance()
    yield f"{usual['glu_expansion_built']:.2f} ({usual['n_layers']} layers) leads"
    for row, it in ((wide, "it ends "), (narrow, "")):
        built = f"built {row['glu_expansion_built']:.2f}, {row['n_layers']} layers"
        percent = 100 * above[row["experiment"]]
        yield f"asked for {row['glu_expansion_asked']:.0f} ({built}) {it}{percent:.1f} % above"
    (left_out,) = (
        decision["numbers"]
        for decision in content(TEN / "study.json")["decisions"]
        if decision["verdict"] == "left out"
    )
    asked, number = re.fullmatch(r".*: asked (.+), built (.+)", left_out).groups()
    yield f"{asked} comes out as {number}: left out"


def factorised() -> Iterator[str]:
    """Of tables at the leading share's width, heads and rate."""
    leader = run("rates", "emb45-lr4e-3")
    for rank in (152, 96):
        row = run("factorised", f"rank{rank}-emb45-lr4e-3")
        assert (row["d_model"], row["n_heads"]) == (leader["d_model"], leader["n_heads"])
        share = f"{100 * row['embedding_ratio_built']:.1f}"
        yield f"{share} % with {row['n_layers']} layers {row['dev_perplexity']:.1f}"
    deep = run("rates", "emb25-lr2e-3")
    yield f"emb45 with {leader['n_layers']} {leader['dev_perplexity']:.1f}"
    yield f"emb25 with {deep['n_layers']} {deep['dev_perplexity']:.1f}"
    wide = run("factorised", "rank152-emb45-lr4e-3")
    assert wide["embedding_ratio_built"] == pytest.approx(deep["embedding_ratio_built"], abs=0.01)
    below = 1 - wide["dev_perplexity"] / deep["dev_perplexity"]
    assert 1 / (1 - below) > 1 + chance()
    yield f"At one share of 25 %, the wide shape is {100 * below:.1f} % below the deep one"
    assert wide["dev_perplexity"] == pytest.approx(leader["dev_perplexity"], rel=0.01)
    yield "at one width, 25 and 45 % end alike"


def noise() -> Iterator[str]:
    assert all(len(side) == 3 for side in repeated().values())
    yield f"Three seeds of each share have a pooled sd of {pooled().sd:.3f} nats"
    yield f"closer than {100 * chance():.1f} % are not told apart"
    again = run("rates", "emb45-lr4e-3")
    with np.load(TEN / "runs" / again["run"] / "documents_validation.npz") as documents:
        yield f"{len(documents['document_nats'])} dev documents"


def speed() -> Iterator[str]:
    """Interleaved, batch 1, two cores, prompts of 128 tokens."""
    ratio = {}
    for name in ("emb45-lr4e-3", "emb25-lr2e-3"):
        measured = content(TEN / f"latency/{name}.json")
        assert measured["baseline"].startswith("rates/emb35-lr2e-3-rank")
        ratio[name[:5]] = measured["comparison"]["l128"]["ratio"]
    yield f"emb45 takes {ratio['emb45']:.2f} of emb35's time at L = 128, emb25 {ratio['emb25']:.2f}"


def cost() -> Iterator[str]:
    runs = finished()
    hours = sum(row["wall_seconds"] for row in runs) / 3600
    yield f"{len(runs)} runs, {sum(row['tokens'] for row in runs) / 1e6:.0f}M tokens"
    yield f"{hours:.1f} hours of wall time"
    yield f"{sum(row['cost_usd'] for row in runs):.2f} dollars"
    first = run("prd", "emb35")
    seconds = 3 * first["flops_per_token"] * first["tokens"] / A100_BF16_FLOPS
    yield f"of emb35 in {seconds:.0f} seconds"


def laws() -> Iterator[str]:
    sweep = predictions.predict([SWEEP], "2026-11-23")["sweeps"][SWEEP.name]
    tao = {
        name: 100 * math.expm1(one["tao_ln_ppl_ratio"])
        for name, one in sweep["configurations"].items()
    }
    yield (
        f"the best share at {100 * sweep['tao_best_share']:.0f} %, and perplexity against emb35 "
        f"{tao['emb25']:+.1f} % at 25 and {tao['emb45']:+.1f} % at 45 %"
    )
    yield f"the best share at {100 * sweep['levine_best_share']:.0f} %"


CLAIMS = (set_up, decision, rates, expansion, factorised, noise, speed, cost, laws)


@pytest.mark.parametrize("claims", CLAIMS, ids=lambda claims: claims.__name__)
def test_the_report_says_what_the_results_say(claims: Callable[[], Iterator[str]]) -> None:
    assert not lacking(PAGE, claims)


def test_the_readme_s_status_is_the_report_s() -> None:
    above, below = (gap(name, "emb35", SWEEP.name).interval.ratio[1] for name in SHARES[::2])
    text = prose(ROOT / "README.md")
    assert f"25 % in the table ends {100 * (above - 1):.1f} % above 35 %" in text
    assert f"45 % ends {100 * (1 - below):.1f} % below" in text


def test_no_number_of_the_report_is_unchecked() -> None:
    assert not unchecked(PAGE, CLAIMS)


def test_the_report_is_a_page() -> None:
    assert len(prose(PAGE).split()) <= 600
