"""Markdown tables for REPORT.md, made from the table of runs and put between its markers.

A table named NAME stands between `<!-- table:NAME -->` and `<!-- /table:NAME -->`; everything
outside the markers is a person's prose and is never touched. `decisions` and `winner` come from
study.json, `kill-rule` from the runs' curves, every other table from the CSV.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from src.analysis import kill_table
from src.analysis.blocks import (
    Block,
    at_own_rates,
    blocks,
    gap,
    on_common_seeds,
    order_sentences,
    own_rates,
    tokens_text,
)
from src.analysis.run_csv import Row, table
from src.analysis.table_text import DASH, field, fixed, markdown, mean_sd, total, whole
from src.spec.metric_keys import EMBEDDING_RATIO, GLU_EXPANSION, Request
from src.spec.rates import spelled

_MARKER = re.compile(r"<!-- table:(?P<name>[\w-]+) -->(?P<body>.*?)<!-- /table:(?P=name) -->", re.S)
_OPEN = re.compile(r"<!-- table:([\w-]+) -->")
_NEEDS = {
    "decisions": " (decisions needs the study's study.json)",
    "winner": " (winner needs the study's study.json)",
    "kill-rule": " (kill-rule needs the runs, or what was published with them beside the CSV)",
}


def tables(
    rows: Sequence[Row],
    study: Mapping[str, Any] | None = None,
    kills: Sequence[kill_table.JudgedRun] | None = None,
) -> dict[str, str]:
    """Every table by name; those of a study and of curves where there are any."""
    runs = table(rows)
    sentences = [*order_sentences(runs), *processors_differ(runs)]
    by_name = {
        "summary": summary_table(runs),
        "rates": rates_table(runs),
        "order": "\n".join(f"- {sentence}" for sentence in sentences) or "(nothing to order)",
        "metrics": metrics_table(runs),
        "metrics-rank": metrics_table(runs[runs["phase"] == "rank"]),
        "metrics-full": metrics_table(runs[runs["phase"] != "rank"]),
        "cost": cost_table(runs),
    }
    if study is not None:
        by_name |= {"decisions": decisions_table(study), "winner": winner_table(study)}
    if kills is not None:
        by_name["kill-rule"] = kill_table.table(kills)
    return by_name


def fill(report: str, contents: Mapping[str, str]) -> str:
    """The report with each marked table replaced. Raises ValueError for markers it cannot serve."""
    closed = {match["name"] for match in _MARKER.finditer(report)}
    for name in _OPEN.findall(report):
        if name not in closed:
            raise ValueError(f"<!-- table:{name} --> has no <!-- /table:{name} --> after it.")
        if name not in contents:
            raise ValueError(
                f"<!-- table:{name} --> names no table; expected one of "
                f"{', '.join(sorted(contents))}{_NEEDS.get(name, '')}."
            )

    def replaced(match: re.Match[str]) -> str:
        name = match["name"]
        return f"<!-- table:{name} -->\n{contents[name]}\n<!-- /table:{name} -->"

    return _MARKER.sub(replaced, report)


# --- of the comparison: one line a configuration, at its own best rate ----------------------------


def summary_table(runs: pd.DataFrame) -> str:
    """A table a block: perplexity (test in full runs that have it, else dev) against the baseline,
    each configuration at its own best rate; 95 % intervals over seeds, two or more a side."""
    parts = []
    for block in blocks(runs):
        if len(block.runs):
            split = "test" if block.runs["test_loss"].notna().all() else "dev"
            glu = block.runs[GLU_EXPANSION.asked].nunique() > 1
            head = f"configuration | {'GLU' if glu else 'share'} | layers | rate | seeds | "
            head += f"{split} PPL | against {block.baseline or 'the baseline'} | {split} bits/byte"
            body = _comparison(block, split, GLU_EXPANSION if glu else EMBEDDING_RATIO)
            parts.append(f"**{block.title}**\n\n{markdown(head, body, '')}")
    return "\n\n".join(parts) or "(no finished run)"


def _comparison(block: Block, split: str, axis: Request) -> list[list[str]]:
    best = at_own_rates(block.runs)
    body = []
    order = best.groupby("configuration")[axis.built].mean().sort_values()
    for name in order.index:
        group = best[best["configuration"] == name]
        first, mark = group.iloc[0], " **(baseline)**" if name == block.baseline else ""
        share = axis is EMBEDDING_RATIO
        body.append(
            [
                f"{field(name)}{mark}",
                fixed(100 * first[axis.built], 1, " %") if share else fixed(first[axis.built], 2),
                whole(first["n_layers"]),
                DASH if pd.isna(first["learning_rate"]) else spelled(first["learning_rate"]),
                str(len(group)),
                mean_sd(group[f"{split}_perplexity"], 1),
                DASH if mark else _against(block, name, best, f"{split}_loss"),
                mean_sd(group[f"{split}_bits_per_byte"], 4),
            ]
        )
    return body


def _against(block: Block, name: str, best: pd.DataFrame, key: str) -> str:
    """Perplexity against the baseline's, and which runs say so where not all do."""
    difference = gap(name, block.baseline or "", best, key)
    if difference is None:
        return DASH
    pairs, seeds = difference.pairs, difference.seeds
    low, ratio, high = (f"{100 * (value - 1):+.1f}" for value in difference.interval.ratio)
    most = max(int((best["configuration"] == side).sum()) for side in (name, block.baseline))
    if difference.interval.seeds < 2:
        return f"{ratio} %" + f" (seed {seeds[0]})" * (most > len(seeds))
    basis = f", {pairs} pairs" * (pairs < most) if pairs else ", no pairs"
    return f"{ratio} % ({low} to {high}{basis})"


def rates_table(runs: pd.DataFrame) -> str:
    """Mean dev perplexity of each configuration at each rate tried, its best in bold, over the
    seeds that all of its rates have."""
    parts = []
    for block in blocks(runs):
        if block.many_rates:
            best = own_rates(block.runs)
            groups = block.runs.groupby("configuration", group_keys=False)
            comparable = pd.concat([on_common_seeds(group, "learning_rate") for _, group in groups])
            means = comparable.pivot_table(
                index="configuration", columns="learning_rate", values="dev_perplexity"
            )
            head = f"configuration | {' | '.join(spelled(rate) for rate in means.columns)}"
            body = [
                [field(name), *(f"**{fixed(ppl, 1)}**" if rate == best.get(name) else fixed(ppl, 1)
                                for rate, ppl in line.items())]
                for name, line in means.iterrows()
            ]  # fmt: skip
            parts.append(
                f"**{block.title}: dev PPL by learning rate**\n\n{markdown(head, body, '')}"
            )
    return "\n\n".join(parts) or "(no configuration was trained at several rates)"


def processors_differ(runs: pd.DataFrame) -> list[str]:
    """Sentences for each block whose runs were computed on different processors, or by different
    programs: they stand beside each other all the same."""
    sentences = []
    for block in blocks(runs):
        programs = block.runs["program_digest"].nunique()
        counts = block.runs["processors"].value_counts().sort_index()
        if programs > 1:
            sentences.append(
                f"{block.title}: computed by {programs} programs (code, versions or "
                "settings, program_digest): a difference between such runs may come from that."
            )
        if len(counts) > 1:
            names = ", ".join(f"{name}: {n}" for name, n in counts.items())
            sentences.append(
                f"{block.title}: on {len(counts)} kinds of processor ({names} runs): compared all "
                "the same; rounding differs, which acts like another seed."
            )
    return sentences


# --- of all numbers -------------------------------------------------------------------------------


def metrics_table(runs: pd.DataFrame) -> str:
    """A line a configuration: mean +- sd over its finished seeds; a single seed has no sd.

    V stands beside each, because PPL compares only under one tokenizer; bits/byte always.
    """
    head = (
        "phase | configuration | V | share (asked) | GLU (asked) | layers | tokens | seeds | "
        "test PPL | dev PPL | test bits/byte | SmallBench % (chance, untrained) | latency L=128 | "
        "latency L=512 | peak MiB | USD"
    )
    body = []
    for group in _configurations(runs[runs["status"] == "finished"]):
        first = group.iloc[0]
        body.append(
            [
                field(first["phase"]),
                field(first["experiment"]) + (" **(baseline)**" if first["baseline"] else ""),
                whole(first["vocab_size"]),
                _built(first, EMBEDDING_RATIO, lambda value: f"{100 * value:.1f} %"),
                _built(first, GLU_EXPANSION, lambda value: f"{value:.2f}"),
                whole(first["n_layers"]),
                _tokens(first["tokens"]),
                str(len(group)),
                mean_sd(group["test_perplexity"], 2),
                mean_sd(group["dev_perplexity"], 2),
                mean_sd(group["test_bits_per_byte"], 4),
                _smallbench(group),
                _latency(group, 128),
                _latency(group, 512),
                mean_sd(group["peak_memory_mib"], 1),
                total(group["cost_usd"], 2),
            ]
        )
    return markdown(head, body, "no finished run")


def _configurations(runs: pd.DataFrame) -> list[pd.DataFrame]:
    """Runs that differ only by seed, ranking runs first, in the sweep's order of asked values."""
    keys = [
        runs["phase"] != "rank",
        runs["sweep"].fillna("None"),
        *(runs[q.asked].fillna(0.0) for q in (EMBEDDING_RATIO, GLU_EXPANSION)),
        runs["experiment"].fillna("None"),
        *(runs[key].fillna(0.0) for key in ("budget", "learning_rate", "batch_size")),
    ]
    return [group for _, group in runs.groupby(keys)]


def _smallbench(group: pd.DataFrame) -> str:
    """Beside it what guessing and the same model untrained get: at this size that is not far."""
    accuracy, first = mean_sd(100 * group["smallbench_accuracy"], 1), group.iloc[0]
    beside = [
        fixed(100 * first[f"smallbench_{name}"], 1) for name in ("chance", "untrained_accuracy")
    ]
    return accuracy if beside == [DASH, DASH] else f"{accuracy} ({', '.join(beside)})"


def _latency(group: pd.DataFrame, length: int) -> str:
    """The ratio to the baseline, interleaved; else how far the seeds' own milliseconds go, which
    what else the computer did has part in."""
    measured = group.dropna(subset=[f"latency_ratio_l{length}"])
    if len(measured):
        ratio, low, high = (
            measured[f"latency_ratio{end}_l{length}"].iloc[0] for end in ("", "_low", "_high")
        )
        interval = "" if pd.isna(low) or pd.isna(high) else f" ({low:.2f} to {high:.2f})"
        return f"x {ratio:.2f}{interval}"
    milliseconds = group[f"latency_ms_p50_l{length}"]
    if milliseconds.isna().all():
        return DASH
    least, most = f"{milliseconds.min():.1f}", f"{milliseconds.max():.1f}"
    return f"{least} ms" if least == most else f"{least} to {most} ms"


def _built(run: pd.Series, quantity: Request, write: Callable[[float], str]) -> str:
    built, requested = run[quantity.built], run[quantity.asked]
    if pd.isna(built):
        return DASH
    return write(built) if pd.isna(requested) else f"{write(built)} ({write(requested)})"


def _tokens(tokens: float) -> str:
    if pd.isna(tokens):
        return DASH
    return f"{tokens / 1e6:.2f} M" if tokens >= 1e6 else tokens_text(tokens)


def cost_table(runs: pd.DataFrame) -> str:
    """Runs, hours and dollars by phase and status, and their sum; killed runs cost money too."""
    paid = runs[(runs["status"] != "missing") & runs["same_as"].isna()]
    groups = paid.groupby([paid["phase"].map(field), paid["status"].map(field)])
    body = [[*map(str, key), *_costs(group)] for key, group in groups]
    if body:
        body.append(["**all**", "", *_costs(paid)])
    return markdown("phase | status | runs | wall hours | GPU hours | USD", body, "no run")


def _costs(group: pd.DataFrame) -> list[str]:
    hours = group["wall_seconds"] / 3600
    return [str(len(group)), *(total(x, 2) for x in (hours, group["gpu_hours"], group["cost_usd"]))]


# --- of the study ---------------------------------------------------------------------------------


def decisions_table(study: Mapping[str, Any]) -> str:
    """`study["decisions"]`: a list of flat objects, tabulated under all their keys."""
    decisions = study.get("decisions")
    if not isinstance(decisions, list) or not all(isinstance(d, dict) for d in decisions):
        raise ValueError(
            "study.json has no list of objects under `decisions`; expected one object a decision."
        )
    keys = list(dict.fromkeys(key for decision in decisions for key in decision))
    body = [[_decision_text(decision.get(key)) for key in keys] for decision in decisions]
    return markdown(" | ".join(key.replace("_", " ") for key in keys), body, "no decision yet")


def _decision_text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_decision_text(item) for item in value) or DASH
    return f"{value:.4g}" if isinstance(value, float) else field(value)


def winner_table(study: Mapping[str, Any]) -> str:
    """`study["winner"]`: each candidate and the outcome, strict and with the margin."""
    winner = study.get("winner")
    if winner is None:
        return "(no finalist was judged)"
    body = [
        [
            field(candidate["name"]),
            f"{100 * (candidate['perplexity_ratio'] - 1):+.1f} %",
            field(candidate["strict"]),
            field(candidate["margin"]),
            field("; ".join(candidate["reasons"])),
        ]
        for candidate in winner["candidates"]
    ]
    outcome = [f"**{field(winner[key] or 'no winner')}**" for key in ("strict", "margin")]
    body.append(["**winner**", "", *outcome, winner["reason"]])
    head = (
        f"configuration | perplexity against {winner['baseline']} | strict: latency and memory not "
        "above the baseline's | with 3 % above allowed | why"
    )
    return markdown(head, body, "")
