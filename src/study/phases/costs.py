"""What a plan takes in hours and dollars, and the table that is printed before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from src.study.phases.cells import STAGES, Job, Plan


@dataclass(frozen=True, kw_only=True, slots=True)
class Rate:
    """What a job takes here: training FLOPs a second, seconds around training, dollars an hour."""

    flops_per_s: float
    overhead_s: float
    usd_per_hour: float | None
    source: str


def seconds(job: Job, rate: Rate) -> float:
    """Estimated wall seconds of a job that is not done; 0 for what is done or an alias."""
    if job.done or job.alias_of or job.kind == "tokens":
        return 0.0
    return job.flops / rate.flops_per_s + rate.overhead_s


def dollars(job: Job, rate: Rate) -> float:
    """Estimated cost of a job; 0 where the device has no price."""
    return seconds(job, rate) / 3600 * (rate.usd_per_hour or 0.0)


def table(found: Plan, rate: Rate, spent: Mapping[str, float], budget: float) -> str:
    """The plan for people: a line a stage with runs, tokens, hours and dollars."""
    lines = [f"{'stage':<15} {'runs':>5} {'done':>5} {'alias':>5} {'tokens to go':>14} "
             f"{'hours':>8} {'USD':>8} {'spent':>8}"]  # fmt: skip
    total_h = total_usd = 0.0
    for stage in STAGES:
        jobs = [job for job in found.jobs if job.stage == stage and job.kind != "tokens"]
        if not jobs:
            continue
        open_jobs = [job for job in jobs if not (job.done or job.alias_of)]
        hours = sum(seconds(job, rate) for job in jobs) / 3600
        usd = sum(dollars(job, rate) for job in jobs)
        total_h, total_usd = total_h + hours, total_usd + usd
        lines.append(
            f"{stage:<15} {len(jobs):>5} {sum(job.done for job in jobs):>5} "
            f"{sum(job.alias_of is not None for job in jobs):>5} "
            f"{sum(job.tokens for job in open_jobs):>14,} {hours:>8.2f} {usd:>8.2f} "
            f"{spent.get(stage, 0.0):>8.2f}"
        )
    all_spent = sum(spent.values())
    lines.append(
        f"to go: {total_h:.2f} hours, {total_usd:.2f} USD; spent {all_spent:.2f} USD; together "
        f"{all_spent + total_usd:.2f} of budget_usd {budget:.2f} ({rate.source})"
    )
    lines += [f"assumed until it is decided: {what}" for what in found.assumptions]
    return "\n".join(lines)
