"""Runs that may stand beside each other: one sweep, phase, token budget, batch and vocabulary.

A block is what a panel of a figure shows and what a table compares. Where a block has several
learning rates for a configuration, each is judged at its own best rate, chosen on dev.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd

from src.analysis import intervals, repeats
from src.spec import run_identity
from src.spec.rates import spelled

_PROGRAM = ("program_digest", "compute_digest")
_ALIKE = ["sweep", "phase", "batch_size", "seq_len"]


@dataclass(frozen=True, slots=True)
class Block:
    """Runs of one sweep, phase, budget and batch, as rows of `run_csv.table`.

    budget: tokens a run, to two digits. runs: the finished ones, each model at each rate and seed
    once; killed: those that a kill rule stopped.
    """

    sweep: str
    phase: str
    budget: float
    steps: float  # optimizer steps a run; NaN where not recorded
    runs: pd.DataFrame
    killed: pd.DataFrame

    @property
    def kind(self) -> str:
        """Full runs, 1.0 M tokens in 512 steps."""
        steps = f" in {self.steps:,.0f} steps" if self.steps > 0 else ""
        return kind_text(self.phase, self.budget) + steps

    @property
    def file(self) -> str:
        """The sweep's file without its folder and ending."""
        return Path(self.sweep).stem

    @property
    def title(self) -> str:
        """Full runs, 1.0 M tokens in 512 steps (miniature_embed)."""
        return f"{self.kind} ({self.file})" if self.file else self.kind

    @property
    def baseline(self) -> str | None:
        """The configuration that the sweep names as its baseline, finished or not."""
        names = pd.concat([self.runs, self.killed])["baseline_configuration"].dropna()
        return None if names.empty else str(names.mode()[0])

    @property
    def many_rates(self) -> bool:
        return many_rates(self.runs)


def blocks(runs: pd.DataFrame) -> list[Block]:
    """The blocks of a table's finished and killed runs, ranking runs first; a killed run joins the
    block that it was cut from: the least budget that is not below its own tokens."""
    done = runs[runs["status"].isin(["finished", "killed"])]
    result = []
    for _, group in done.groupby(_ALIKE, dropna=False):
        budgets = sorted(group.loc[group["status"] == "finished", "budget"].unique())

        def nearest(budget: float, budgets: Sequence[float] = budgets) -> float:
            above = (b for b in budgets if b >= budget)
            return min(above, default=budgets[0] if budgets else budget)

        own = group["budget"]
        joined = own.where(group["status"] == "finished", own.map(nearest))
        for budget, members in group.groupby(joined.fillna(0.0)):
            finished = members[members["status"] == "finished"]
            first = members.iloc[0]
            result.append(
                Block(
                    sweep=str(first["sweep"]) if pd.notna(first["sweep"]) else "",
                    phase=str(first["phase"]),
                    budget=float(budget),
                    steps=float(finished["steps"].max()),
                    runs=each_once(finished),
                    killed=members[members["status"] == "killed"],
                )
            )
    return sorted(result, key=lambda b: (b.sweep, b.phase != "rank", b.budget, b.steps))


def each_once(runs: pd.DataFrame) -> pd.DataFrame:
    """`emb35` and the run of a list of rates that is the same, `emb35-lr4e-3`, count once."""
    alike = ["configuration", "learning_rate", "seed", "model_digest", "training_digest"]
    return runs.drop_duplicates(alike)


def many_rates(runs: pd.DataFrame) -> bool:
    """Whether some configuration was trained at several learning rates."""
    return bool((runs.groupby("configuration")["learning_rate"].nunique() > 1).any())


def own_rates(runs: pd.DataFrame) -> dict[str, float]:
    """Each configuration's best learning rate: the lowest mean dev loss over the seeds that all of
    its rates have (all of its seeds where there is none such)."""
    best: dict[str, float] = {}
    for name, group in runs.dropna(subset=["dev_loss", "learning_rate"]).groupby("configuration"):
        comparable = on_common_seeds(group, "learning_rate")
        best[str(name)] = float(comparable.groupby("learning_rate")["dev_loss"].mean().idxmin())
    return best


def on_common_seeds(runs: pd.DataFrame, what: str) -> pd.DataFrame:
    """The runs of the seeds that every value of this column has; all where there is none such."""
    counts = runs.groupby("seed")[what].nunique()
    common = runs[runs["seed"].isin(counts.index[counts == runs[what].nunique()])]
    return runs if common.empty else common


def at_own_rates(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs at their configuration's best rate; those without a rate or a dev loss stay."""
    best = runs["configuration"].map(own_rates(runs))
    return runs[best.isna() | (runs["learning_rate"] == best)]


def shared_rates(runs: pd.DataFrame) -> pd.Series:
    """Mean dev loss over the configurations by rate, of the rates that all were trained at."""
    means = runs.pivot_table(index="configuration", columns="learning_rate", values="dev_loss")
    return means.dropna(axis="columns").mean()


def ranking(runs: pd.DataFrame) -> pd.Series:
    """Mean dev perplexity by configuration, or bits per byte where vocabularies differ, the best
    first, over the seeds that all have (all seeds where there is none such)."""
    comparable = on_common_seeds(runs, "configuration")
    measure = "perplexity" if comparable["vocab_size"].nunique() < 2 else "bits_per_byte"
    return comparable.groupby("configuration")[f"dev_{measure}"].mean().dropna().sort_values()


@dataclass(frozen=True, slots=True)
class Gap:
    """ln of one configuration's perplexity over another's; of pairs where `pairs` is above 0."""

    interval: intervals.Interval
    pairs: int
    seeds: tuple[int, ...]  # of the first configuration that count


def gap(first: str, second: str, runs: pd.DataFrame, key: str) -> Gap | None:
    """Of two configurations among `runs` (each at one rate), `key` being a loss in nats a token:
    over the pairs of runs alike in seed and program where there are two or more, else over all
    seeds, with one on a side over the common ones; None without a loss on both sides. The noise is
    that of all of `runs`."""
    losses = {
        str(name): {
            (int(row["seed"]), _program(row)): float(row[key])
            for row in group.dropna(subset=[key]).to_dict("records")
        }
        for name, group in runs.groupby("configuration")
    }
    left, right = losses.get(first, {}), losses.get(second, {})
    if not left or not right:
        return None
    alike = repeats.pair(left, right)
    if len(alike.pairs) > 1:
        interval = intervals.seed_interval(
            *zip(*alike.pairs, strict=True), noise=repeats.paired_noise(losses)
        )
        return Gap(interval, len(alike.pairs), tuple(seed for seed, _ in alike.labels))
    if common := {seed for seed, _ in left} & {seed for seed, _ in right}:
        if min(len(left), len(right)) == 1:
            left, right = ({k: v for k, v in x.items() if k[0] in common} for x in (left, right))
    noise = repeats.pooled_noise({name: [*of.values()] for name, of in losses.items()})
    a, b = [*left.values()], [*right.values()]
    interval = intervals.seed_interval(a, b, paired_seeds=False, noise=noise)
    return Gap(interval, 0, tuple(seed for seed, _ in left))


def _program(row: Mapping[str, Any]) -> str | None:
    """What computed a run of a table; None where that is not known, which equals nothing."""
    known = {name: row[name] for name in _PROGRAM if pd.notna(row.get(name))}
    return run_identity.computed_as(known)


def order_sentences(runs: pd.DataFrame) -> list[str]:
    """Which configuration leads each block, at its own best rate and at every shared one, and
    whether two blocks of the same sweep order them otherwise."""
    sentences: list[str] = []
    orders: dict[str, list[tuple[str, tuple[str, ...]]]] = {}
    for block in blocks(runs):
        chosen = at_own_rates(block.runs)
        means = ranking(chosen)
        if len(means) < 2:
            continue
        order = tuple(map(str, means.index))
        sentences.append(f"{block.title}: {_ordered(block, chosen, means)}.")
        for rate in shared_rates(block.runs).index if block.many_rates else ():
            there = tuple(ranking(block.runs[block.runs["learning_rate"] == rate]).index)
            agreement = (
                "the same order" if there == order else f"another order, {' < '.join(there)}"
            )
            sentences[-1] += f" At the shared rate {spelled(rate)}: {agreement}."
        orders.setdefault(block.sweep, []).append((block.title, order))
    for neighbours in orders.values():
        for (title, order), (other_title, other_order) in pairwise(neighbours):
            if set(order) == set(other_order):
                agreement = "the same order" if order == other_order else "another order"
                sentences.append(f"{title} against {other_title}: {agreement}.")
    return sentences


def _ordered(block: Block, chosen: pd.DataFrame, means: pd.Series) -> str:
    """The configurations of a block in order, and what speaks against it."""
    rates, measure = own_rates(block.runs), str(means.name)
    digits = 1 if measure == "dev_perplexity" else 3
    entries = [
        f"{name} {value:.{digits}f}" + (f" at {spelled(rates[name])}" if block.many_rates else "")
        for name, value in means.items()
    ]
    seeds = sorted(on_common_seeds(chosen, "configuration")["seed"].unique())
    over = ""
    if len(seeds) < chosen["seed"].nunique():
        over = f" over seed{'s' * (len(seeds) > 1)} {', '.join(f'{s:.0f}' for s in seeds)}"
    parts = [f"{measure.replace('_', ' ')}{over} {' < '.join(entries)}"]
    tried = block.runs.groupby("configuration")["learning_rate"].agg(["min", "max", "nunique"])
    for name, ends in tried[tried["nunique"] > 1].iterrows():
        if rates[str(name)] in (ends["min"], ends["max"]):
            end = "lowest" if rates[str(name)] == ends["min"] else "highest"
            parts.append(f"{name}'s is the {end} rate tried, its best may lie beyond")
    if chosen.groupby("configuration")["seed"].nunique().min() == 1:
        parts.append("one seed of some, so their order is not sure")
    for a, b in pairwise(map(str, means.index)) if measure == "dev_perplexity" else ():
        difference = gap(a, b, chosen, "dev_loss")
        interval = None if difference is None else difference.interval
        if interval is not None and interval.seeds > 1 and interval.low <= 0 <= interval.high:
            parts.append(f"{a} and {b} are not told apart")
    return "; ".join(parts)


def kind_text(phase: str, tokens: float = 0.0) -> str:
    """Full runs, 1.0 M tokens."""
    kind = "Ranking runs" if phase == "rank" else "Full runs"
    return f"{kind}, {tokens_text(tokens)} tokens" if tokens else kind


def tokens_text(tokens: float) -> str:
    """5e6 -> "5.0 M", 160000 -> "160 k"."""
    if tokens >= 1e9:
        return f"{tokens / 1e9:.1f} B"
    return f"{tokens / 1e6:.1f} M" if tokens >= 1e6 else f"{tokens / 1e3:.0f} k"
