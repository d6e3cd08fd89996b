"""The plan of a study, on invented results at the PRD's scale."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from src.spec import config, run_identity
from src.storage.documents import Documents
from src.study import blocks, costs, runner
from src.study.plan import Job, Plan, State, Study, allocate
from tests import ROOT
from tests.study.invented import (
    RATE,
    SANE,
    by_share,
    changed,
    finalists,
    gains,
    only,
    readings,
    row,
    rows,
    simulate,
)


def test_a_fresh_study_is_counted_whole_and_begins_with_tokens_and_checks(prd: Study) -> None:
    plan = blocks.plan(prd, State())
    (first,) = plan.ready()
    assert (first.kind, first.name) == ("tokens", "data/lm_tokenized/v16000")
    assert not plan.complete and plan.decisions == []
    assert plan.assumptions == ["emb35 leads block share"]
    trained = [job for job in plan.jobs if job.kind == "train"]
    counts = {stage: [j for j in trained if j.stage == stage] for stage in plan.stages}
    assert [len(counts[s]) for s in ("noise", "share", "glu")] == [5, 2, 4]  # emb35 is among the 5
    full = counts["finals"]
    assert len(full) == 3 * 3 and all(50_000_000 <= job.tokens < 50_040_000 for job in full)
    assert all(job.assumed for job in counts["glu"] + full)
    after = blocks.plan(prd, State(train_tokens={16_000: 2_500_000}))
    assert [job.kind for job in after.ready()][:2] == ["sanity", "train"]


def test_the_whole_runbook_costs_what_the_study_does_and_what_lies_beside_it(prd: Study) -> None:
    plan = blocks.plan(prd, State(others={"tuned": {"cost_usd": 0.5}}))
    name = next(job.name for job in plan.jobs if job.kind == "train")
    plan.state.results[name] = {"cost_usd": 9.0}  # in what its stage has spent
    costs_of = runner.summary(plan, {"share": 2.0})["costs"]
    assert (costs_of["total_usd"], costs_of["runbook_usd"]) == (2.0, 2.5)


def test_the_glu_sweep_is_made_of_the_share_that_leads(prd: Study) -> None:
    plan, order = simulate(prd, by_share)
    assert row(plan, "loss, block share")["verdict"] == "emb25"
    made = plan.sweeps[Path("logs/configs/glu-emb25.yaml")]
    sweep = config.sweep_from(made, Path("made.yaml"), (), "rank")
    assert sweep.baseline == "glu4x-emb25" and len(sweep.names) == 4
    assert {run.model.embedding_ratio for run in sweep.runs} == {0.25}
    assert sorted({run.model.glu_expansion for run in sweep.runs}) == [2.0, 2.66, 3.0, 4.0]
    leader = allocate(config.load_sweep(prd.sources["share"].path))["emb25"].model
    models = [allocation.model for allocation in allocate(sweep).values()]
    for key in ("d_model", "n_heads", "head_dim"):
        assert {getattr(model, key) for model in models} == {getattr(leader, key)}
    assert len({model.n_layers for model in models}) > 1  # depth is what pays for the expansion
    assert plan.aliases["glu266x-emb25-rank"] == "emb25-rank"  # the leader is one of the sweep
    assert row(plan, "loss, block glu")["verdict"] == "glu2x-emb25"
    finals = {
        f"{name}{seed}" for name in ("emb25", "glu2x-emb25") for seed in ("", "-seed1", "-seed2")
    }
    assert plan.complete and finals <= set(order)  # the leading share itself is among them
    # The kill rule needs the curve of the baseline.
    assert order.index("emb35-rank") < order.index("emb25-rank")
    assert order.index("glu4x-emb25-rank") < order.index("glu2x-emb25-rank")


def test_identical_configurations_are_trained_once_but_never_a_sweeps_baseline(prd: Study) -> None:
    plan, order = simulate(prd, gains(emb35=0.2))
    assert plan.aliases["glu266x-rank"] == "emb35-rank"  # the same integers at 35 %
    assert "glu266x-rank" not in order and "glu4x-rank" in order
    assert "glu-emb35.yaml" not in str(plan.sweeps)  # the PRD's own file serves
    assert plan.aliases["emb35-v16k-tied-rank"] == "emb35-rank"
    assert "glu266x 4.8000" in row(plan, "loss, block glu")["numbers"]


def test_the_baseline_is_no_candidate_even_under_another_name(prd: Study) -> None:
    plan, order = simulate(prd, gains(emb35=0.2, glu4x=0.1))  # glu266x is emb35, too
    full = [job.run.experiment for job in plan.jobs if job.stage == "finals"]
    assert set(full) == {"emb35", "glu4x"}  # the next best goes on
    assert row(plan, "winner")["verdict"] == readings("no winner")


def test_a_killed_run_lends_its_result_to_nobody(prd: Study) -> None:
    killed = only("emb25-rank", status="killed")
    plan, order = simulate(prd, gains(emb45=0.3, emb25=0.6), extra=killed)
    share = row(plan, "loss, block share")
    assert share["verdict"] == "emb45" and "emb25 stopped" in share["numbers"]
    assert plan.aliases["emb45-v16k-tied-rank"] == "emb45-rank"
    killed = only("emb45-rank", status="killed")
    plan, order = simulate(changed(prd, "noise", seeds=(0, 1)), gains(emb35=0.2), extra=killed)
    assert "emb45-v16k-tied-rank" in order and "emb45-v16k-tied-rank" not in plan.aliases


def test_a_thin_margin_sends_the_runner_up_share_to_the_finals(prd: Study) -> None:
    loss = gains(emb25=0.2, emb45=0.1995, glu2x=0.1)
    plan, order = simulate(prd, loss)
    assert row(plan, "loss, block share")["verdict"] == "emb25, emb45"
    assert {"emb25", "glu2x-emb25"} <= set(order) and "emb45" not in order  # two, the lowest
    _, order = simulate(finalists(prd, 3), loss)
    assert {"emb25", "emb45", "glu2x-emb25"} <= set(order)
    _, order = simulate(finalists(prd, 1), loss)
    assert not {"emb25", "emb45"} & set(order) and "glu2x-emb25" in order


def test_both_readings_of_the_kill_rule_are_recorded(prd: Study) -> None:
    checks = range(250_000, 5_250_000, 250_000)

    def curve(job: Job) -> Any:  # emb45 is bad for the first 1.25M tokens, inside the grace
        bad = [2.0 if job.run.experiment == "emb45" and t <= 1_250_000 else 0.0 for t in checks]
        return [(t, 100.0 + b) for t, b in zip(checks, bad, strict=True)]

    plan, _ = simulate(prd, by_share, curve=curve)
    (decision,) = [r for r in rows(plan, "kill rule") if r["numbers"].startswith("emb45 against")]
    assert decision["verdict"] == "keep; without grace kill"
    assert "1,250,000" in decision["reason"]


def test_runs_under_a_rule_that_only_records_wait_for_no_baseline(prd: Study) -> None:
    known = {"train_tokens": {16_000: 1, 8_000: 1}, "sanity": {"emb35-sanity": SANE}}
    waiting = blocks.plan(prd, State(**known)).ready()
    overrides = ("kill_rule.action=record", "training.eval_every_tokens=500_000")
    recorded = replace(prd, overrides=overrides)
    free = blocks.plan(recorded, State(**known)).ready()
    assert {job.run.experiment for job in waiting} == {"emb35"}
    assert {job.run.experiment for job in free} == {"emb35", "emb25", "emb45"}


def test_phase_1b_trains_on_equal_bytes_and_compares_equal_documents(prd: Study) -> None:
    rng = np.random.default_rng(0)
    size = rng.integers(80, 120, 40)

    def documents(run: str, split: str) -> Documents:
        bits = 1.5 if "v8k" in run else 1.6
        count = 30 if "v8k" in run else 40  # the first documents with so many tokens
        nats = bits * np.log(2) * size
        nats[30:] *= 9  # what only one side scored must not count
        return Documents(nats=nats[:count], tokens=size[:count] // 4, bytes=size[:count])

    plan, order = simulate(prd, by_share, documents=documents)
    made = plan.sweeps[Path("logs/configs/vocabulary.yaml")]
    budgets = {e["vocab_size"]: e.get("training") for e in made["experiments"]}
    assert budgets[16_000] is None  # the sweep's own budget
    assert budgets[8_000] == {"tokens": 5_500_000, "ranking_tokens": 5_500_000}
    names = {entry["name"] for entry in made["experiments"]}
    assert "emb25-v8k-untied" in names and "emb35-v16k-untied" in names
    assert "emb25-v16k-untied" not in names  # the allocator has no such shape
    assert "emb25-v16k-untied" in row(plan, "allocation")["numbers"]
    assert not any("emb45" in name for name in names)  # no neighbour of 25 %
    best = row(plan, "best share, 8000 untied")
    assert "1.5000 bits/byte at" in best["numbers"] and "layers" in best["numbers"]
    assert "1.6000" in row(plan, "best share, 16000 tied")["numbers"]
    built = [name for name in order if name.endswith("v8000")]
    assert built and order.index(built[0]) < order.index("emb25-v8k-tied-rank")


BITS_8K = 0.2  # a smaller vocabulary's own level: only orders within a variant may count


def planted_bits(gain: Callable[[Job], float]) -> Callable[[Job], dict[str, Any]]:
    """Dev bits per byte of every run, `gain` below its variant's level; a little seed noise."""

    def extra(job: Job) -> dict[str, Any]:
        level = 2.0 + BITS_8K * ("v8k" in job.name) + 0.002 * job.run.seed
        return {"dev_bits_per_byte": level - gain(job)}

    return extra


def test_no_shift_is_claimed_from_a_variant_with_one_share(prd: Study) -> None:
    """45 % is 0.05 bits/byte better wherever both exist; 8k tied has a result at 35 % alone."""

    def extra(job: Job) -> dict[str, Any]:
        alone = only("emb45-v8k-tied-rank", status="failed")(job)
        return planted_bits(lambda j: 0.05 * ("emb45" in j.name))(job) | alone

    plan, _ = simulate(prd, gains(emb45=0.2), extra=extra)
    decision = row(plan, "shift of the best share")
    assert decision["verdict"] == "no shift; not decided for 8000 tied"
    undecided = "8000 tied against 16000 tied: not decided, one share, emb35, is in common"
    assert undecided in decision["numbers"]
    assert row(plan, "best share, 8000 tied")["verdict"].startswith("not decided")
    assert row(plan, "best share, 8000 untied")["verdict"] == "emb45-v8k-untied"


def test_a_shift_needs_two_leaders_beyond_the_noise(prd: Study) -> None:
    def verdict(gain_of_35: float) -> dict[str, str]:
        def gain(job: Job) -> float:
            at_8k = gain_of_35 * ("emb35" in job.name and "v8k-untied" in job.name)
            return max(at_8k, 0.05 * ("emb45" in job.name))

        plan, _ = simulate(prd, gains(emb45=0.2), extra=planted_bits(gain))
        return row(plan, "shift of the best share")

    assert verdict(0.10)["verdict"].startswith("shift at 8000 untied")
    assert "emb35 leads instead of emb45" in verdict(0.10)["numbers"]
    close = verdict(0.051)  # ahead by less than seeds differ
    assert "8000 untied" in close["verdict"].partition("not decided for ")[2]
    assert "emb35 and emb45 are not separable" in close["numbers"]


def with_rates(study: Study, follows: str = "share") -> Study:
    """The shares at three rates each; later blocks follow the block `follows`."""
    for name, key in (("glu", "leader_of"), ("vocabulary", "grid_of")):
        study = changed(study, name, **{key: follows})
    study = changed(study, "finals", finalists_of=(follows, "glu"))
    (share,) = (block for block in study.config.blocks if block.name == "share")
    rates = replace(share, name="rates", overrides=("training.learning_rate=[2e-3, 4e-3, 8e-3]",))
    extended: list[Any] = []
    for block in study.config.blocks:
        extended += [block, rates] if block is share else [block]
    return replace(
        study,
        config=replace(study.config, blocks=tuple(extended)),
        sources={**study.sources, "rates": study.sources["share"]},
    )


def by_rate(job: Job) -> float:
    """At 4e-3 45 % leads; at each one's own best 25 % does, whose best is the lowest rate."""
    at_rate = {
        "emb25": {"2e-3": 4.5, "4e-3": 5.1, "8e-3": 5.6},
        "emb35": {"2e-3": 5.1, "4e-3": 5.0, "8e-3": 5.2},
        "emb45": {"2e-3": 5.2, "4e-3": 4.9, "8e-3": 4.8},
    }
    share = next(name for name in at_rate if name in job.run.experiment)
    rate = next((r for r in at_rate[share] if f"lr{r}" in job.run.experiment), "4e-3")
    return at_rate[share][rate] + 0.001 * job.run.seed - (job.run.phase == "full")


def test_shares_are_ranked_at_their_own_best_rate_and_at_the_shared_one(prd: Study) -> None:
    plan, order = simulate(with_rates(prd), by_rate)
    assert plan.aliases["emb35-lr4e-3-rank"] == "emb35-rank"  # trained once
    assert {"emb25-lr2e-3-rank", "emb45-lr8e-3-rank"} <= set(order)
    decision = row(plan, "at each one's own best rate")
    assert decision["verdict"] == "own best: emb25; shared: emb45"
    lowest = "emb25: 4.5000 at its best, 2e-3, the lowest tried: its best may lie below; 5.1000"
    assert lowest in decision["numbers"]
    assert "emb45: 4.8000 at its best, 8e-3, the highest tried" in decision["numbers"]
    assert "emb35: 5.0000 at its best, 4e-3; 5.0000 at the shared 4e-3" in decision["numbers"]
    assert "another order" in decision["reason"]
    assert "glu4x-emb45-rank" in order and not any("glu4x-emb25" in name for name in order)
    assert plan.complete and "emb45" in order


def test_later_stages_train_at_each_ones_own_best_rate_where_the_study_says_so(prd: Study) -> None:
    plan, order = simulate(with_rates(prd, "rates"), by_rate)
    made = plan.sweeps[Path("logs/configs/glu-emb25-lr2e-3.yaml")]
    made_runs = config.sweep_from(made, Path("made.yaml")).runs
    assert {run.training.learning_rate for run in made_runs} == {2e-3}
    assert {"emb35-lr4e-3", "emb25-lr2e-3"} <= set(order)  # baseline and leader at full budget
    assert not {"emb35", "emb25", "emb45"} & set(order)
    grid = plan.sweeps[Path("logs/configs/vocabulary.yaml")]["experiments"]
    rates = {e["name"].partition("-v")[0]: e["training"]["learning_rate"] for e in grid}
    assert rates == {"emb25-lr2e-3": 2e-3, "emb35-lr4e-3": 4e-3}
    assert plan.complete and row(plan, "winner")


def test_a_rate_that_diverges_is_no_best_rate(prd: Study) -> None:
    failed = only("emb45-lr8e-3-rank", "emb25-lr2e-3-rank", status="failed")
    plan, _ = simulate(with_rates(prd), by_rate, extra=failed)
    decision = row(plan, "at each one's own best rate")
    assert "emb45: 4.9000 at its best, 4e-3; 4.9000" in decision["numbers"]


def test_more_seeds_of_a_vocabulary_pool_and_reuse_the_seed_noise(prd: Study) -> None:
    plan, order = simulate(changed(prd, "vocabulary", seeds=(0, 1)), gains(emb35=0.2))
    assert plan.aliases["emb35-v16k-tied-rank-seed1"] == "emb35-rank-seed1"
    assert "emb35-v8k-tied-rank-seed1" in order
    assert "2 seeds a configuration" in row(plan, "shift of the best share")["reason"]
    best = row(plan, "best share, 8000 tied")
    assert "sqrt(1/2 + 1/2)" in best["reason"]


# --- several at a time ----------------------------------------------------------------------


def test_what_may_run_at_the_same_time(prd: Study) -> None:
    def names(plan: Plan, *running: str) -> list[str]:
        return [job.name for job in plan.ready(running)]

    def plan_of(**known: Any) -> Plan:
        return blocks.plan(prd, State(**known))

    tokens, checked = {16_000: 2_500_000, 8_000: 2_750_000}, {"emb35-sanity": SANE}
    assert [j.kind for j in plan_of().ready()] == ["tokens"]
    assert plan_of(train_tokens=tokens).ready()[0].kind == "sanity"
    begun = plan_of(train_tokens=tokens, sanity=checked)
    seeds = ["emb35-rank", *(f"emb35-rank-seed{k}" for k in range(1, 5))]
    assert names(begun) == seeds  # the shares wait for their baseline's curve
    assert names(begun, "emb35-rank") == seeds[1:]
    results = {"emb35-rank": {"status": "finished", "dev_loss": 5.0}}
    shares = plan_of(train_tokens=tokens, sanity=checked, results=results)
    assert names(shares) == [*seeds[1:], "emb25-rank", "emb45-rank"]
    # All shares are there, the noise is not: nobody knows yet whether a margin is thin.
    results |= {f"emb{share}-rank": {"status": "finished", "dev_loss": 4.9} for share in (25, 45)}
    waiting = plan_of(train_tokens=tokens, sanity=checked, results=results)
    assert names(waiting) == seeds[1:] and not rows(waiting, "lowest dev loss")


def test_a_diverged_configuration_is_a_result_and_a_diverged_baseline_an_end(prd: Study) -> None:
    diverged = {"status": "failed", "reason": "NaN"}
    plan, _ = simulate(prd, by_share, extra=only("emb45-rank", **diverged))
    assert plan.complete and row(plan, "diverged")["verdict"] == "out"
    assert "emb45 stopped" in row(plan, "loss, block share")["numbers"]
    with pytest.raises(ValueError, match="emb35-rank: the baseline diverged"):
        simulate(prd, by_share, extra=only("emb35-rank", **diverged))


def test_a_run_made_with_another_config_is_refused(prd: Study) -> None:
    foreign = {"status": "finished", "n_layers": 99, "dev_loss": 1.0}
    with pytest.raises(ValueError, match=r"emb35-rank: found a run with n_layers 99, expected 11"):
        blocks.plan(prd, State(results={"emb35-rank": foreign}))
    run = next(job.run for job in blocks.plan(prd, State()).jobs if job.name == "emb35-rank")
    other = {"status": "finished", "training_digest": run_identity.training_digest(run.training)}
    blocks.plan(prd, State(results={"emb35-rank": other}))
    decayed = replace(prd, overrides=("training.weight_decay=0.5",))
    with pytest.raises(ValueError, match="emb35-rank: found a run with other training settings"):
        blocks.plan(decayed, State(results={"emb35-rank": other}))


def test_a_kill_rule_that_no_run_could_meet_is_refused_by_the_plan(prd: Study) -> None:
    short = replace(prd, overrides=(*prd.overrides, "kill_rule.window_tokens=5_000_000"))
    with pytest.raises(ValueError, match="found a rule that can never fire in 5,000,000 tokens"):
        blocks.plan(short, State())


def test_estimates_count_only_what_is_left(prd: Study) -> None:
    plan = blocks.plan(prd, State())
    job = next(job for job in plan.jobs if job.name == "emb25-rank")
    assert costs.seconds(job, RATE) == pytest.approx(job.flops / 1e12 + 10)
    assert costs.dollars(job, RATE) == pytest.approx(costs.seconds(job, RATE) / 1000)
    assert costs.seconds(replace(job, done=True), RATE) == 0
    assert costs.seconds(replace(job, alias_of="emb35-rank"), RATE) == 0
    table = costs.table(plan, RATE, {"sanity": 1.25}, 50.0)
    assert "budget_usd 50.00" in table and "spent 1.25 USD" in table and "assumed" in table
    assert all(f"\n{stage}" in table for stage in plan.stages)


BLOCK = "{name: a, config: configs/embed_ratio.yaml}"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("budget: 50", "blocks: found None, expected a list"),
        (f"budget: 50\nblocks: [{BLOCK}]", "unknown key.*did you mean 'budget_usd'"),
        (f"jobs: 0\nblocks: [{BLOCK}]", "jobs: found 0, expected auto .*from 1 to 64"),
        (f"jobs: 1.5\nblocks: [{BLOCK}]", "jobs: found 1.5, expected auto"),
        ("blocks: [{name: a, config: nowhere.yaml}]", "nowhere.yaml: found no such file"),
        ("blocks: [{config: a.yaml}]", "blocks.0.name: found None, expected a name of its own"),
        (f"blocks: [{BLOCK}, {BLOCK}]", "blocks.a.name: found 'a', expected a name of its own"),
        ("blocks: [{name: a, best_of: b}]", "blocks.a: found 'b', expected an earlier block: -"),
        ("blocks: [{name: a}]", "blocks.a: found no source of runs, expected config"),
        (f"blocks: [{BLOCK}, {{name: b, leader_of: a}}]", "b: found leader_of, expected config"),
        (f"blocks: [{BLOCK}, {{name: b, config: x, best_of: a}}]", "found config and best_of"),
        ("blocks: [{name: a, config: x, seeds: [1, 1]}]", r"seeds: found \[1, 1\], expected"),
        ("blocks: [{name: a, config: x, folder: ../b}]", "folder: found '../b', expected"),
        (f"slurm: {{cores: 4}}\nblocks: [{BLOCK}]", "slurm.cores: found an unknown key"),
        (f"slurm: {{options: ['']}}\nblocks: [{BLOCK}]", r"options: found \[''\], expected a list"),
        (f"overrides: ['']\nblocks: [{BLOCK}]", r"overrides: found \[''\], expected a list"),
        ("blocks: [{name: a, config: x, experiments: ['']}]", r"found \[''\], expected a list"),
        ("blocks: [{name: a, config: x, overrides: ['']}]", r"found \[''\], expected a list"),
        ("blocks: [{name: a, finalists_of: ['']}]", r"found \[''\], expected a list"),
    ],
)
def test_a_wrong_study_file_is_refused_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, says: str
) -> None:
    monkeypatch.chdir(ROOT)
    (tmp_path / "study.yaml").write_text(text)
    with pytest.raises(ValueError, match=says):
        runner.load(tmp_path / "study.yaml")
