"""What a plan takes in hours and dollars, and the table that is printed before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from src.study.plan import Job, Plan


@dataclass(frozen=True, kw_only=True, slots=True)
class Rate:
    """What a job takes here: training FLOPs a second, seconds around training, dollars an hour."""

    flops_per_s: float
    overhead_s: float
    usd_per_hour: float | None
    source: str


def seconds(job: Job, rate: Rate) -> float:
    """Estimated wall seconds of a job that is not done; 0 for what is done or an alias."""
    if not job.open or job.kind == "tokens":
        return 0.0
    return job.flops / rate.flops_per_s + rate.overhead_s


def dollars(job: Job, rate: Rate) -> float:
    """Estimated cost of a job; 0 where the device has no price."""
    return seconds(job, rate) / 3600 * (rate.usd_per_hour or 0.0)


def table(plan: Plan, rate: Rate, spent: Mapping[str, float], budget: float) -> str:
    """The plan for people: a line a stage with runs, tokens, hours and dollars."""
    width = max(15, *map(len, plan.stages))
    lines = [f"{'stage':<{width}} {'runs':>5} {'done':>5} {'alias':>5} {'tokens to go':>14} "
             f"{'hours':>8} {'USD':>8} {'spent':>8}"]  # fmt: skip
    jobs = [job for job in plan.jobs if job.kind != "tokens"]
    for stage in plan.stages:
        stage_jobs = [job for job in jobs if job.stage == stage]
        if not stage_jobs:
            continue
        lines.append(
            f"{stage:<{width}} {len(stage_jobs):>5} {sum(job.done for job in stage_jobs):>5} "
            f"{sum(job.alias_of is not None for job in stage_jobs):>5} "
            f"{sum(job.tokens for job in stage_jobs if job.open):>14,} "
            f"{sum(seconds(job, rate) for job in stage_jobs) / 3600:>8.2f} "
            f"{sum(dollars(job, rate) for job in stage_jobs):>8.2f} {spent.get(stage, 0.0):>8.2f}"
        )
    hours = sum(seconds(job, rate) for job in jobs) / 3600
    usd, total_spent = sum(dollars(job, rate) for job in jobs), sum(spent.values())
    lines.append(
        f"to go: {hours:.2f} run hours, {usd:.2f} USD; spent {total_spent:.2f} USD; together "
        f"{total_spent + usd:.2f} of budget_usd {budget:.2f} ({rate.source})"
    )
    lines += [f"assumed until it is decided: {what}" for what in plan.assumptions]
    return "\n".join(lines)
