"""Finalists and the winner, on invented results at the PRD's scale."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from src.storage.documents import Documents
from src.study import blocks, runner
from src.study.plan import Job, Plan, Study
from tests.study.invented import by_share, finalists, only, readings, row, rows, simulate


def loss(job: Job) -> float:
    """A finalist of the GLU sweep gains 0.1 nats at the full budget."""
    return by_share(job) - 0.1 * (job.run.phase == "full" and "glu" in job.run.experiment)


def documents(run: str, split: str) -> Documents:
    tokens, rng = np.full(200, 50), np.random.default_rng(7)  # the same documents for everyone
    nats = tokens * (4.0 + 0.2 * rng.standard_normal(200) - 0.1 * run.startswith("glu"))
    seed = int(run.rpartition("-seed")[2]) if "-seed" in run else 0
    return Documents(nats=nats + 0.01 * seed, tokens=tokens, bytes=tokens * 4)


def follow(study: Study, **results: Any) -> tuple[Plan, list[str]]:
    """With one finalist."""
    return simulate(finalists(study, 1), loss, **results)


def test_a_clear_winner_wins_with_interval_and_holm(prd: Study) -> None:
    plan, _ = follow(prd, documents=documents)
    assert row(plan, "winner")["verdict"] == readings("glu2x-emb25")
    decision = row(plan, "equivalence")
    assert decision["verdict"] == "different" and "after Holm" in decision["reason"]
    assert "3 seeds, 200 documents" in decision["reason"]
    assert row(plan, "short against full")["verdict"] == "same leader"
    assert plan.winner is not None and plan.winner["strict"] == plan.winner["margin"]
    (judged,) = plan.winner["candidates"]
    assert judged["name"] == "glu2x-emb25" and judged["strict"] and judged["margin"]


def test_runs_computed_otherwise_are_no_pairs(prd: Study) -> None:
    """Two of the baseline's seeds come from another machine: one pair, so no verdict."""

    moved = only("emb35-seed1", "emb35-seed2", compute_digest="elsewhere")
    plan, _ = follow(prd, extra=moved, documents=documents)
    decision = row(plan, "equivalence")
    assert decision["verdict"] == "no verdict" and "document noise only" in decision["numbers"]
    unpaired = "seed 1 (compute alike): the other side's run of this seed was computed"
    assert unpaired in decision["reason"]
    assert "seed 1 (compute alike)" in row(plan, "every seed computed alike")["reason"]
    assert row(plan, "winner")["verdict"] == "no winner" and plan.winner is None


def test_intervals_do_not_wait_for_the_comparison_of_speeds(prd: Study) -> None:
    plan, order = follow(prd, documents=documents)
    (latency,) = (job for job in plan.jobs if job.kind == "latency")
    state = replace(plan.state, latency={})
    before = blocks.plan(plan.study, state)
    assert order[-1] == latency.name == before.ready()[0].name
    assert row(before, "equivalence") == row(plan, "equivalence")
    assert not rows(before, "winner") and before.winner is None


def test_seeds_of_another_processor_pair_and_that_is_said(prd: Study) -> None:
    """The study moved to another machine; the program is the same."""

    def extra(job: Job) -> dict[str, Any]:
        moved = job.name in ("emb35-seed1", "emb35-seed2")
        return {
            "compute_digest": "there" if moved else "here",
            "program_digest": "one",
            "processors": "AMD EPYC AVX2" if moved else "AMD EPYC AVX512",
        }

    plan, _ = follow(prd, extra=extra, documents=documents)
    decision = row(plan, "equivalence")
    assert decision["verdict"] != "no verdict" and "left out" not in decision["reason"]
    assert "2 kinds of processor (AMD EPYC AVX2, AMD EPYC AVX512)" in decision["reason"]


def test_no_winner_is_a_result(prd: Study) -> None:
    plan, _ = follow(prd, speed=1.11)
    assert row(plan, "winner")["verdict"] == readings("no winner")
    assert "latency at L=512 +11.00%" in row(plan, "5 % lower PPL")["reason"]
    within, _ = follow(prd, speed=1.02)
    assert row(within, "winner")["verdict"] == readings("no winner", "glu2x-emb25")


def test_speed_is_compared_in_one_process_and_decides_instead_of_the_runs_own(prd: Study) -> None:
    def slow_hour(job: Job) -> dict[str, Any]:  # every finalist's own medians are 30 % up
        return (
            {"latency_ms_p50_l128": 5.2, "latency_ms_p50_l512": 11.7} if "glu" in job.name else {}
        )

    plan, order = follow(prd, extra=slow_hour, speed=0.9)
    assert order[-1] == "latency/glu2x-emb25-against-emb35.json"
    assert row(plan, "winner")["verdict"] == readings("glu2x-emb25")
    decision = row(plan, "interleaved")
    assert decision["verdict"] == "faster"
    assert "l128 -10.00 % (-11.00 % to -9.00 %)" in decision["numbers"]
    (job,) = (job for job in plan.jobs if job.kind == "latency")
    line = runner.command(prd, job)
    assert line[line.index("--compare") + 1 :][:2] == ["logs/emb35", "logs/glu2x-emb25"]
    assert line[line.index("--repeats") + 1] == "200"


@pytest.mark.parametrize(("seed", "compared"), [("", "-seed1"), ("-seed1", "")])
def test_a_finalist_with_a_stopped_seed_is_not_judged_on_the_others(
    prd: Study, seed: str, compared: str
) -> None:
    """The rule stops bad seeds: what is left of a finalist would be its good ones. Its speed is
    that of the first seed that finished."""
    killed = only(f"glu2x-emb25{seed}", status="killed")
    plan, order = follow(prd, extra=killed)
    out = row(plan, "every seed finished")
    assert out["verdict"] == "out" and "2 of 3 seeds finished" in out["reason"]
    assert row(plan, "winner")["verdict"] == "no winner"
    assert order[-1] == f"latency/glu2x-emb25{compared}-against-emb35.json"


def test_every_configuration_at_the_full_budget_ranks_the_short_runs(prd: Study) -> None:
    plan, order = simulate(prd, by_share)
    assert "emb45" not in order
    assert "over 3 experiments" in row(plan, "short against full")["reason"]
    whole = runner.load(Path("configs/english_study.yaml"), ["data.dir=data/lm_tokenized"], "logs")
    plan, order = simulate(whole, by_share)
    full = {"emb25", "emb35", "emb45", *(f"glu{f}-emb25" for f in ("2x", "266x", "3x", "4x"))}
    assert full <= set(order) | set(plan.aliases)
    agreement = row(plan, "short against full")
    assert "over 6 experiments" in agreement["reason"] and "by chance" in agreement["reason"]
    assert order[-1].startswith("latency/")
    seeds = [job for job in plan.jobs if job.stage in ("shares-full", "glu-full")]
    assert {job.run.seed for job in seeds} == {0}
