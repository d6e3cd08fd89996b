"""results/miniature-complete/README.md: every number of its prose is recomputed from results/."""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from src.analysis import compare, decisions, intervals, kill_table, repeats
from src.analysis.run_table import read_curve
from src.spec import config
from src.study.plan import allocate
from tests import ROOT
from tests.analysis.published import RESULTS, content, lacking, rows, sd, training, unchecked

PAGE = RESULTS / "miniature-complete/README.md"
STUDY, COMPLETE, ARMS = (
    RESULTS / name for name in ("miniature", "miniature-complete", "miniature-arms")
)
EMB35, EMB45, GLU4X = "mini-emb35", "mini-emb45", "mini-glu4x-mini-emb45"
STUDY_EMB45 = "mini-glu266x-mini-emb45"  # the same integers under the study's name
SEEDS = ("", "-seed1", "-seed2")


def compared(folder: Path, ours: Sequence[str], baseline: Sequence[str]) -> dict[str, Any]:
    """What `python -m src.analysis.compare --unlike` finds: no run of these has a digest."""
    sides = {
        name: [folder / "runs" / run for run in runs]
        for name, runs in (("ours", ours), ("baseline", baseline))
    }
    return compare.compare(
        argparse.Namespace(**sides, pool=[], split="test", measure="perplexity", unlike=True)
    )


def metrics(folder: Path, run: str) -> dict[str, Any]:
    section: dict[str, Any] = content(folder / "runs" / run / "metrics.json")
    return section


def seeds_of(name: str) -> list[str]:
    return [name + seed for seed in SEEDS]


def percent(comparison: Mapping[str, Any]) -> str:
    low, high = (f"{comparison[f'{end}_percent']:+.1f}" for end in ("low", "high"))
    return f"{comparison['percent']:+.1f} % ({low} to {high})"


def perplexity(run: str) -> float:
    return float(np.mean([rows(COMPLETE)[one]["test_perplexity"] for one in seeds_of(run)]))


# --- the claims ---------------------------------------------------------------------------------


def set_up() -> Iterator[str]:
    stated = training(STUDY, EMB35)
    row = rows(STUDY)[EMB35]
    names = ("mini-emb25", EMB35, EMB45)
    shares = " / ".join(f"{rows(COMPLETE)[n]['embedding_ratio_asked']:.0%}"[:-1] for n in names)
    yield f"({shares} %)"
    expansions = [config.load_sweep(ROOT / "configs/miniature_glu.yaml").runs]
    asked = sorted(run.model.glu_expansion for run in expansions[0])
    yield f"({' / '.join(f'{value:.3g}' for value in asked)} times d_model)"
    ten = config.load_sweep(ROOT / "configs/embed_ratio.yaml")
    shapes = allocate(ten)
    depths = " / ".join(str(shapes[name].model.n_layers) for name in ("emb25", "emb35", "emb45"))
    ours = " / ".join(str(rows(COMPLETE)[name]["n_layers"]) for name in names)
    yield f"{ours} layers, where the 10M study has {depths}"
    yield f"T = {row['total_params_asked'] / 1e6:.2f}M parameters, V = {row['vocab_size']:,}"
    yield f"({row['total_params_asked'] / 1e6:.1f}M parameters)"
    yield f"heads of {row['head_dim']}"
    yield f"{stated['ranking_tokens']:,} tokens a ranking run and {stated['tokens']:,} a full one"
    steps = stated["tokens"] // (stated["batch_size"] * stated["seq_len"])
    yield f"({steps} steps of {stated['batch_size']} x {stated['seq_len']})"
    with (RESULTS / "science/miniature/runs.csv").open() as lines:
        tried = {
            float(r["learning_rate"]): float(r["dev_bits_per_byte"]) for r in csv.DictReader(lines)
        }
    best = min(tried, key=lambda rate: tried[rate])
    ramp = content(STUDY / "mini-emb35-sanity/learning_rates.json")["suggested"]
    rates = ", ".join(f"{1000 * rate:g}" for rate in sorted(tried))
    assert best == stated["learning_rate"]
    yield (
        f"peak rate {1000 * best:g}e-3 (best of {rates}e-3 for the baseline at half the budget; "
        f"the ramp of phase 0 suggests {1000 * ramp:.1f}e-3)"
    )


def decision() -> Iterator[str]:
    share = compared(COMPLETE, seeds_of(EMB45), seeds_of(EMB35))
    assert share["verdict"] == "different" and share["seeds"] == 3
    yield (
        f"{percent(share)} in test perplexity for mini-emb45 against mini-emb35, three seeds each "
        f"as two groups, {share['documents']} documents"
    )
    two = like_pairs(pooled=False)
    yield f"are two pairs, {percent(two)}"
    pooled = like_pairs(pooled=True)
    low, high = (f"{pooled[f'{end}_percent']:+.1f}" for end in ("low", "high"))
    yield f"({low} to {high} with the noise of all the study's pairs)"
    glu = compared(COMPLETE, seeds_of(GLU4X), seeds_of(EMB45))
    assert glu["verdict"] == "undecided"
    measured = {name: judged(name) for name in (EMB35, EMB45, GLU4X)}
    winner = decisions.winner(
        measured[EMB35], [measured[EMB45], measured[GLU4X]], ties={frozenset((EMB45, GLU4X))}
    )
    assert (winner.winner_strict, winner.winner_margin) == (EMB45, GLU4X)
    yield "strictly it names mini-emb45; with a 3 % margin on cost mini-glu4x-mini-emb45"
    more = rows(COMPLETE)[GLU4X]["peak_memory_mib"] - rows(COMPLETE)[EMB35]["peak_memory_mib"]
    lower = compared(COMPLETE, seeds_of(GLU4X), seeds_of(EMB35))
    yield f"which takes {more:.2f} MiB more memory than the baseline"
    yield f"has {percent(lower)} in perplexity"
    yield f"not told apart from mini-emb45 in it, {percent(glu)}"
    single = compared(COMPLETE, ["mini-emb25"], seeds_of(EMB35))
    assert single["verdict"] == "no verdict"
    yield f"mini-emb25 {single['percent']:+.1f} % against mini-emb35"
    for name, expansion in (("mini-glu2x-mini-emb45", "2.0"), ("mini-glu3x-mini-emb45", "3.0")):
        one = compared(COMPLETE, [name], seeds_of(EMB45))
        yield f"GLU {expansion} {one['percent']:+.1f} %"
    outside = {
        name: [rows(COMPLETE)[run]["outside_test_bits_per_byte"] for run in seeds_of(name)]
        for name in (EMB35, EMB45)
    }
    assert stats.ttest_ind(*outside.values(), equal_var=False).pvalue > 0.05
    levels = [f"{np.mean(values):.3f} (sd {sd(values):.3f})" for values in outside.values()]
    yield f"{levels[0]} bits per byte for mini-emb35 and {levels[1]} for mini-emb45"


def judged(name: str) -> decisions.Measured:
    """For the winner's rule: speeds as ratios to the baseline, measured in turns."""
    runs = [rows(COMPLETE)[run] for run in seeds_of(name)]
    ratio = {
        length: 1.0 if name == EMB35 else latency(name, length)["ratio"] for length in (128, 512)
    }
    return decisions.Measured(
        name=name,
        log_perplexities=tuple(math.log(row["test_perplexity"]) for row in runs),
        latency_ms_l128=ratio[128],
        latency_ms_l512=ratio[512],
        peak_memory_mib=runs[0]["peak_memory_mib"],
    )


def latency(name: str, length: int) -> dict[str, float]:
    run = "mini-glu266x-mini-emb45-seed1" if name == EMB45 else name
    comparison = content(STUDY / f"latency/{run}-against-mini-emb35.json")["comparison"]
    return comparison[f"l{length}"]


def like_pairs(*, pooled: bool) -> dict[str, float]:
    """mini-emb45 against mini-emb35 over the pairs of one commit and one micro-batch."""
    sides: dict[str, dict[repeats.Label, Any]] = {}
    for folder, row in ((f, row) for f in (STUDY, COMPLETE) for row in rows(f).values()):
        if "path" in row and row["status"] == "finished" and row["phase"] == "full":
            alike = f"{row['git_sha']} {row['micro_batch']}"
            read = compare.read_run(folder / "runs" / row["run"], "test")
            sides.setdefault(row["model_digest"], {})[row["seed"], alike] = read
    digest = {name: rows(COMPLETE)[name]["model_digest"] for name in (EMB35, EMB45)}
    pairs = repeats.pair(sides[digest[EMB45]], sides[digest[EMB35]]).pairs
    assert len(pairs) == 2
    losses = {
        model: {label: float(run.nats.sum() / run.tokens.sum()) for label, run in runs.items()}
        for model, runs in sides.items()
    }
    interval = intervals.paired_bootstrap(
        np.stack([ours.nats for ours, _ in pairs]),
        np.stack([theirs.nats for _, theirs in pairs]),
        pairs[0][0].tokens,
        noise=repeats.paired_noise(losses) if pooled else None,
    )
    names = ("low_percent", "percent", "high_percent")
    return {name: 100 * (value - 1) for name, value in zip(names, interval.ratio, strict=True)}


def discussion() -> Iterator[str]:
    (sweep,) = (
        sweep for sweep in content(RESULTS / "science/miniature-complete/science.json")["sweeps"]
        if sweep["axis"] == "share"
    )  # fmt: skip
    optimum = sweep["curves"]["share"]["optimum"]
    tried = max(
        row["embedding_ratio_built"]
        for row in rows(COMPLETE).values()
        if row["sweep"] == sweep["sweep"]
    )
    assert optimum["value"] == pytest.approx(tried) and optimum["high"] is None
    yield "Perplexity falls with the share all the way (three shares: the best one has no interval"
    wide, deep, small = (
        rows(ARMS)[name] for name in ("mini-rank82", "mini-share25", "mini-rank34")
    )
    assert training(ARMS, "mini-rank82")["tokens"] * 2 == training(STUDY, EMB35)["tokens"]
    shape = compared(ARMS, ["mini-rank82"], ["mini-share25"])
    table = compared(ARMS, ["mini-rank34"], ["mini-rank82"])
    low, high = (100 * row["embedding_ratio_built"] for row in (deep, wide))
    yield f"At {low:.0f} to {high:.0f} % of the parameters in the table"
    yield f"d = {wide['d_model']} with {wide['n_layers']} layers behind a factorised table"
    less = f"{-shape['percent']:.1f} % less perplexity"
    yield f"{less} than d = {deep['d_model']} with {deep['n_layers']}"
    yield (
        f"an {100 * small['embedding_ratio_built']:.0f} % table at the same width "
        f"{table['percent']:.1f} % more than that"
    )
    commands = rows(RESULTS / "wikitext2-commands")
    order = [commands[name]["test_perplexity"] for name in ("emb25", "emb35", "emb45")]
    assert order == sorted(order, reverse=True)
    yield f"10M models after {commands['emb35']['tokens']:,} tokens"


def kills() -> Iterator[str]:
    full = [row for row in rows(STUDY).values() if row["phase"] == "full"]
    stopped = [row for row in full if row["status"] == "killed"]
    budget = training(STUDY, EMB35)["tokens"]
    assert (len(stopped), len(full)) == (4, 13)
    assert [row["seed"] for row in stopped if row["experiment"] == STUDY_EMB45] == [0, 2]
    lowest = min(rows(COMPLETE).values(), key=lambda row: row.get("test_loss", math.inf))
    assert rows(STUDY)[f"{lowest['experiment']}-rank"]["status"] == "killed"
    at = sorted(100 * row["tokens"] / budget for row in stopped)
    window = content(STUDY / "results_bundle.json")["runs"][EMB45]["kill_rule"]["window_tokens"]
    yield f"its window scaled to {window:,} tokens"
    yield f"stopped four of the thirteen full runs at {at[0]:.0f} to {at[-1]:.0f} % of their budget"
    twin, theirs = (
        dict(read_curve(folder / "runs" / run))
        for folder, run in ((COMPLETE, EMB45), (STUDY, GLU4X))
    )
    died = rows(STUDY)[STUDY_EMB45]["tokens"]
    yield (
        f"at {died:,} tokens it was {twin[died] - theirs[died]:.1f} PPL behind, "
        f"at the end {theirs[budget] - twin[budget]:.1f} ahead"
    )
    yield f"0.5 PPL is {0.5 / perplexity(EMB45):.1%} at these perplexities".replace("%", " %")
    configs = content(STUDY / "results_bundle.json")["runs"]
    judged = kill_table.judge_runs(list(rows(STUDY).values()), configs)
    late = [(one.live, one.whole) for one in judged if one.differs]
    assert {(live, whole.kind) for live, whole in late} == {("none", "kill")} and len(late) == 2
    yield f"kills both at {late[0][1].tokens:,} tokens"
    both = [
        (rows(STUDY)[f"{n}-rank"]["dev_loss"], rows(STUDY)[n]["dev_loss"])
        for n in (EMB35, EMB45, GLU4X)
    ]
    rho = stats.spearmanr(*zip(*both, strict=True)).statistic
    yield f"Spearman {rho:.2f} over the three configurations"


def noise() -> Iterator[str]:
    ranked = [r["dev_loss"] for r in rows(STUDY).values()
              if r["experiment"] == EMB35 and r["phase"] == "rank"]  # fmt: skip
    full = [rows(COMPLETE)[run]["test_loss"] for run in seeds_of(EMB35)]
    assert len(ranked) == 5
    yield f"spread by {sd(ranked):.3f} nats (sd), three at the full budget by {sd(full):.3f}"
    with (RESULTS / "recipe/miniature.csv").open() as lines:
        tried = list(csv.DictReader(lines))
    plain = [row for row in tried if row["remedy"] == "none"]
    jumps = [row for row in plain if float(row["loss_largest_rise_nats"]) > 0.5]
    rises = [float(row["loss_largest_rise_nats"]) for row in jumps]
    steps = [int(row["loss_largest_rise_step"]) for row in jumps]
    assert (len(jumps), len(plain)) == (4, 10)
    yield (
        f"Four of ten runs jump by {min(rises):.1f} to {max(rises):.1f} nats in one step, "
        f"at steps {min(steps)} to {max(steps)}"
    )
    centred = [row for row in tried if row["remedy"] == "center"]
    still = [float(row["loss_largest_rise_nats"]) for row in centred]
    assert len(centred) == 6 and sum(rise > 0.5 for rise in still) == 1
    yield f"one of six runs still jumps ({max(still):.1f} nats)"
    remedied = {(row["experiment"], row["seed"]): float(row["dev_loss"]) for row in centred}
    before = [float(r["dev_loss"]) for r in plain if (r["experiment"], r["seed"]) in remedied]
    yield f"all six end {np.mean([*remedied.values()]) - np.mean(before):.2f} nats worse on average"
    pair = (rows(STUDY)["mini-glu266x-mini-emb45-seed1"], rows(COMPLETE)["mini-emb45-seed1"])
    ends = [
        f"at {row['test_perplexity']:.1f} in micro-batches of {row['micro_batch']}" for row in pair
    ]
    yield f"end {ends[0]} sequences and {ends[1]}"


def speed() -> Iterator[str]:
    for name in (EMB45, GLU4X):
        parts = []
        for length in (128, 512):
            ratio = latency(name, length)
            value, low, high = (
                f"{100 * (ratio[key] - 1):.0f}" for key in ("ratio", "ratio_low", "ratio_high")
            )
            parts.append(f"{value} % ({low} to {high})")
        yield f"{name} {parts[0]} at L = 128 and {parts[1]} at 512"


def smallbench() -> Iterator[str]:
    runs = [run for run, row in rows(COMPLETE).items() if "path" in row]
    scores = [metrics(COMPLETE, run)["smallbench_accuracy"] for run in runs]
    errors = {f"{metrics(COMPLETE, run)['smallbench_accuracy_se']:.2f}" for run in runs}
    tasks = metrics(COMPLETE, EMB45)["smallbench"]
    groups = sorted(task["n"] for name, task in tasks.items() if name.startswith("blimp"))
    (others,) = {task["n"] for name, task in tasks.items() if not name.startswith("blimp")}
    (error,) = errors
    yield (
        f"{len(tasks)} tasks, {others} items scored each, {groups[0]} to {groups[-1]} in the four "
        "groups of BLiMP"
    )
    assert len(groups) == 4
    yield f"{min(scores):.3f} to {max(scores):.3f} with a standard error of {error}"
    yield f"chance is {np.mean([task['chance'] for task in tasks.values()]):.3f}"
    untrained = content(RESULTS / "smallbench/mini-glu2x-random.json")
    assert {t["n"] for n, t in untrained["tasks"].items() if n in ("sst2", "rte", "snli")} == {100}
    yield f"{untrained['accuracy']:.3f} ({untrained['accuracy_se']:.3f})"


def rest() -> Iterator[str]:
    costs = content(STUDY / "study.json")["costs"]["total_usd"]
    added = [
        row
        for row in rows(COMPLETE).values()
        if "path" in row and row["git_sha"] != rows(STUDY)[EMB35]["git_sha"]
    ]
    assert len(added) == 4
    yield f"{costs:.3f} dollars of a rented CPU for the study"
    yield f"{sum(row['cost_usd'] for row in added):.3f} for the four runs that complete it"
    sweeps = content(RESULTS / "predictions.json")["sweeps"]["miniature_frontier.yaml"]
    tao = {n: 100 * math.expm1(c["tao_ln_ppl_ratio"]) for n, c in sweeps["configurations"].items()}
    yield (
        f"the best share at {100 * sweeps['tao_best_share']:.0f} %, and against 35 % in perplexity "
        f"{tao['mini-share25']:+.1f} % at 25 and {tao['mini-share45']:+.1f} % at 45 %"
    )
    best, layers = sweeps["levine_best_share"], sweeps["levine_best_layers"]
    yield f"the best share at {100 * best:.0f} % ({layers:.1f} layers)"
    seen = [
        compared(COMPLETE, ours, seeds_of(EMB35))["percent"]
        for ours in (["mini-emb25"], seeds_of(EMB45))
    ]
    yield f"Observed: {seen[0]:+.1f} % (one seed) and {seen[1]:+.1f} %"
    ten = config.load_sweep(ROOT / "configs/embed_ratio.yaml").runs[0].training.tokens
    part = 100 * training(STUDY, EMB35)["tokens"] / ten
    yield f"{part:.0f} % of the full budget of the 10M study"


CLAIMS = (set_up, decision, discussion, kills, noise, speed, smallbench, rest)


@pytest.mark.parametrize("claims", CLAIMS, ids=lambda claims: claims.__name__)
def test_the_page_says_what_the_results_say(claims: Callable[[], Iterator[str]]) -> None:
    assert not lacking(PAGE, claims)


def test_no_number_of_the_page_is_unchecked() -> None:
    assert not unchecked(PAGE, CLAIMS)


def test_the_science_page_says_the_same_of_the_headline() -> None:
    text = (RESULTS / "science/README.md").read_text(encoding="utf-8")
    found = percent(compared(COMPLETE, seeds_of(EMB45), seeds_of(EMB35))).rstrip(")")
    assert f"the runs say {found}; three seeds each as two groups" in text
    arms = percent(compared(ARMS, ["mini-rank82"], ["mini-share25"])).rstrip(")")
    assert f"{arms.replace('% (', '% perplexity (').replace('+', '')}, document noise only" in text
