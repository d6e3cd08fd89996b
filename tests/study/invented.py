"""Invented results at the PRD's scale, and a study that follows its plan on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from src.storage.documents import Documents
from src.study import blocks
from src.study.costs import Rate
from src.study.plan import Job, Plan, State, Study

RATE = Rate(flops_per_s=1e12, overhead_s=10.0, usd_per_hour=3.6, source="the test")
Losses = Callable[[Job], float]


def measured(job: Job, loss: float, **extra: Any) -> dict[str, Any]:
    """metrics.json of a finished run, as far as the plan reads it."""
    return {
        "status": "finished", "dev_loss": loss, "dev_bits_per_byte": loss / 3, "test_loss": loss,
        "compute_digest": "alike",
        "latency_ms_p50_l128": 4.0, "latency_ms_p50_l512": 9.0, "peak_memory_mib": 50.0, **extra,
    }  # fmt: skip


def comparison(ratio: float) -> dict[str, Any]:
    """What src.evaluation.latency --compare leaves, as far as the plan reads it."""
    row = {"ratio": ratio, "ratio_low": ratio - 0.01, "ratio_high": ratio + 0.01}
    return {"comparison": {"l128": row, "l512": row}}


def changed(study: Study, name: str, **keys: Any) -> Study:
    """The study with a block changed."""
    assert any(block.name == name for block in study.config.blocks)
    blocks = [replace(b, **keys) if b.name == name else b for b in study.config.blocks]
    return replace(study, config=replace(study.config, blocks=tuple(blocks)))


def finalists(study: Study, count: int) -> Study:
    return changed(study, "finals", finalists=count)


SANE = {
    "passed": True, "checks": {"overfits": True}, "initial_loss": 9.68, "ln_vocab": 9.68,
    "overfit_loss": 0.09, "overfit_steps": 80, "overfit_tokens": 1024, "reason": "limits",
    "suggested_learning_rate": 3e-3, "learning_rate": 4e-3, "learning_rate_rule": "steepest",
}  # fmt: skip


def simulate(
    study: Study,
    loss: Losses,
    *,
    extra: Callable[[Job], dict[str, Any]] = lambda job: {},
    documents: Callable[[str, str], Documents | None] = lambda run, split: None,
    curve: Callable[[Job], Any] = lambda job: (),
    speed: float = 1.0,
) -> tuple[Plan, list[str]]:
    """Follow the plan with invented results; returns the last plan and the jobs in order."""
    results: dict[str, Any] = {}
    curves: dict[str, Any] = {}
    tokens: dict[int, int] = {}
    compared: dict[str, Any] = {}
    checks: dict[str, Any] = {}
    order: list[str] = []
    state = State(results=results, curves=curves, documents=documents, train_tokens=tokens,
                  sanity=checks, latency=compared)  # fmt: skip
    while ready := (plan := blocks.plan(study, state)).ready():
        if any(job.alone for job in ready):  # tokens and comparisons of speed
            assert len(ready) == 1 and not plan.ready({"something runs"})
        order += [job.name for job in ready]
        for job in ready:
            if job.kind == "tokens":
                vocab = job.run.model.vocab_size
                tokens[vocab] = {16_000: 2_500_000, 8_000: 2_750_000}[vocab]
            elif job.kind == "sanity":
                checks[job.name] = SANE
            elif job.kind == "latency":
                compared[job.name] = comparison(speed)
            else:
                results[job.name] = measured(job, loss(job), **extra(job))
                curves[job.name] = curve(job)
    return plan, order


def gains(**gain: float) -> Losses:
    """5 nats, less the gain of what stands in the experiment's name, with a little seed noise;
    longer runs end lower."""

    def loss(job: Job) -> float:
        gained = sum(value for part, value in gain.items() if part in job.run.experiment)
        return 5.0 - gained - 1.0 * (job.run.phase == "full") + 0.001 * job.run.seed

    return loss


by_share = gains(emb25=0.2, glu2x=0.1)  # 25 % leads clearly, then 2x


def only(*names: str, **values: Any) -> Callable[[Job], dict[str, Any]]:
    """What these runs alone have in metrics.json."""
    return lambda job: values if job.name in names else {}


def rows(plan: Plan, rule: str) -> list[dict[str, str]]:
    return [row for row in plan.decisions if rule in row["rule"]]


def row(plan: Plan, rule: str) -> dict[str, str]:
    (found,) = rows(plan, rule)
    return found


def readings(strict: str, margin: str | None = None) -> str:
    """The winner under both readings; the same one where `margin` is left out."""
    return f"strict: {strict}; with the 3 % margin: {margin or strict}"
