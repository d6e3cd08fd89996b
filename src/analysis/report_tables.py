"""Markdown tables for REPORT.md, made from the table of runs and put between its markers.

A table named NAME stands between `<!-- table:NAME -->` and `<!-- /table:NAME -->`; everything
outside the markers is a person's prose and is never touched. `<!-- table:decisions -->` comes from
`study.json`, `<!-- table:kill-rule -->` from the runs' curves too, every other table from the CSV.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from src.analysis import kill_table
from src.analysis.run_csv import Row, number
from src.analysis.run_joins import STATUSES
from src.spec.metric_keys import EMBEDDING_RATIO, GLU_EXPANSION, TOTAL_PARAMS, Request

_MARKER = re.compile(r"<!-- table:(?P<name>[\w-]+) -->(?P<body>.*?)<!-- /table:(?P=name) -->", re.S)
_OPEN = re.compile(r"<!-- table:([\w-]+) -->")
_DASH = "–"
_NEEDS = {
    "decisions": " (decisions needs the study's study.json)",
    "kill-rule": " (kill-rule needs the runs, or what was published with them beside the CSV)",
}


def tables(
    rows: Sequence[Row],
    study: Mapping[str, Any] | None = None,
    kills: Sequence[kill_table.Judged] | None = None,
) -> dict[str, str]:
    """Every table by name; `decisions` only with a study, `kill-rule` only where curves are."""
    made = {
        "metrics": metrics_table(rows),
        "metrics-rank": metrics_table([r for r in rows if r.get("phase") == "rank"]),
        "metrics-full": metrics_table([r for r in rows if r.get("phase") != "rank"]),
        "allocation": allocation_table(rows),
        "runs": runs_table(rows),
        "cost": cost_table(rows),
        "environment": environment_table(rows),
    }
    if study is not None:
        made["decisions"] = decisions_table(study)
    if kills is not None:
        made["kill-rule"] = markdown_table(
            *kill_table.table(kills), "no run was judged by a kill rule"
        )
        made["kill-rule"] += f"\n\n{kill_table.summary(kills)}" if kills else ""
    return made


def fill(report: str, made: Mapping[str, str]) -> str:
    """The report with each marked table replaced. Raises ValueError for markers it cannot serve."""
    names = _OPEN.findall(report)
    closed = {match["name"] for match in _MARKER.finditer(report)}
    for name in names:
        if name not in closed:
            raise ValueError(f"<!-- table:{name} --> has no <!-- /table:{name} --> after it.")
        if name not in made:
            raise ValueError(
                f"<!-- table:{name} --> names no table; expected one of {', '.join(sorted(made))}"
                + f"{_NEEDS.get(name, '')}."
            )

    def replaced(match: re.Match[str]) -> str:
        name = match["name"]
        return f"<!-- table:{name} -->\n{made[name]}\n<!-- /table:{name} -->"

    return _MARKER.sub(replaced, report)


def metrics_table(rows: Sequence[Row]) -> str:
    """A line a cell: mean +- sd over its finished seeds; a single seed has no sd.

    V stands beside each cell, because PPL compares only under one tokenizer; bits/byte always.
    """
    head = (
        "phase | cell | V | share (asked) | GLU (asked) | layers | tokens | seeds | test PPL | "
        "dev PPL | test bits/byte | SmallBench % (chance, untrained) | latency L=128 | "
        "latency L=512 | peak MiB | USD"
    )
    body = []
    for runs in _cells([row for row in rows if row.get("status") == "finished"]):
        first = runs[0]
        mark = " **(baseline)**" if first.get("baseline") else ""
        body.append(
            [
                cell_text(first.get("phase")),
                f"{cell_text(first.get('experiment'))}{mark}",
                _count(first, "vocab_size"),
                _built(runs, EMBEDDING_RATIO, 100, "{:.1f} %"),
                _built(runs, GLU_EXPANSION, 1, "{:.2f}"),
                cell_text(first.get("n_layers")),
                _tokens(number(first, "tokens")),
                str(len(runs)),
                _mean_sd(runs, "test_perplexity", 2),
                _mean_sd(runs, "dev_perplexity", 2),
                _mean_sd(runs, "test_bits_per_byte", 4),
                _smallbench(runs),
                _latency(runs, 128),
                _latency(runs, 512),
                _mean_sd(runs, "peak_memory_mib", 1),
                _total(runs, "cost_usd", 2),
            ]
        )
    return markdown_table(head, body, "no finished run")


def _smallbench(runs: Sequence[Row]) -> str:
    """Beside it what guessing and the same model untrained get: at this size that is not far."""
    accuracy = _mean_sd(runs, "smallbench_accuracy", 1, 100)
    beside = [
        _mean_sd(runs[:1], f"smallbench_{name}", 1, 100)
        for name in ("chance", "untrained_accuracy")
    ]
    return accuracy if beside == [_DASH, _DASH] else f"{accuracy} ({', '.join(beside)})"


def _latency(runs: Sequence[Row], length: int) -> str:
    """The ratio to the baseline, interleaved; else how far the seeds' own milliseconds go, which
    what else the machine did has part in."""
    for row in runs:
        ratio, low, high = (
            number(row, f"latency_ratio{end}_l{length}") for end in ("", "_low", "_high")
        )
        if ratio is not None:
            interval = "" if low is None or high is None else f" ({low:.2f} to {high:.2f})"
            return f"x {ratio:.2f}{interval}"
    found = [ms for row in runs if (ms := number(row, f"latency_ms_p50_l{length}")) is not None]
    if not found:
        return _DASH
    least, most = f"{min(found):.1f}", f"{max(found):.1f}"
    return f"{least} ms" if least == most else f"{least} to {most} ms"


def allocation_table(rows: Sequence[Row]) -> str:
    """A line a model: where its parameters lie."""
    head = (
        "cell | V | tied | d | layers | heads x dim | d_ff | attention width / d | total | "
        "embedding | projection | attention | FFN | norms | MFLOPs/token"
    )
    body, seen = [], set()
    for runs in _cells([row for row in rows if number(row, TOTAL_PARAMS.built) is not None]):
        row = runs[0]
        key = (row.get("sweep"), row.get("experiment"))
        if key in seen:
            continue
        seen.add(key)
        flops = number(row, "flops_per_token")
        body.append(
            [
                cell_text(row.get("experiment")),
                _count(row, "vocab_size"),
                cell_text(row.get("tie_embeddings")),
                cell_text(row.get("d_model")),
                cell_text(row.get("n_layers")),
                f"{cell_text(row.get('n_heads'))} x {cell_text(row.get('head_dim'))}",
                cell_text(row.get("d_ff")),
                plain_number(number(row, "attention_width_ratio"), 2),
                _count(row, TOTAL_PARAMS.built),
                *(
                    _count(row, f"params_{part}")
                    for part in ("embedding", "projection", "attention", "ffn", "norm")
                ),
                plain_number(None if flops is None else flops / 1e6, 1),
            ]
        )
    return markdown_table(head, body, "no run whose model is known")


def runs_table(rows: Sequence[Row]) -> str:
    """A line a run, the ones that did not finish with their reason; nothing is left out."""
    order = {status: place for place, status in enumerate(STATUSES)}
    ranked = sorted(
        rows, key=lambda r: (order.get(str(r.get("status")), 9), str(r.get("sweep")), str(r["run"]))
    )
    body = [
        [
            cell_text(row.get("status")),
            cell_text(row.get("run")),
            cell_text(row.get("sweep")),
            cell_text(row.get("seed")),
            _tokens(number(row, "tokens")),
            plain_number(number(row, "test_perplexity"), 2),
            plain_number(number(row, "dev_perplexity"), 2),
            cell_text(row.get("reason")),
        ]
        for row in ranked
    ]
    head = "status | run | sweep | seed | tokens | test PPL | dev PPL | reason"
    return markdown_table(head, body, "no run")


def cost_table(rows: Sequence[Row]) -> str:
    """Runs, hours and dollars by phase and status, and their sum; killed runs cost money too."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.get("status") != "missing":
            key = (cell_text(row.get("phase")), cell_text(row.get("status")))
            groups.setdefault(key, []).append(row)
    body = [[*key, *_costs(runs)] for key, runs in sorted(groups.items())]
    if body:
        body.append(["**all**", "", *_costs([row for runs in groups.values() for row in runs])])
    return markdown_table("phase | status | runs | wall hours | GPU hours | USD", body, "no run")


def _costs(runs: Sequence[Row]) -> list[str]:
    seconds = [v for v in (number(row, "wall_seconds") for row in runs) if v is not None]
    return [
        str(len(runs)),
        plain_number(sum(seconds) / 3600 if seconds else None, 2),
        _total(runs, "gpu_hours", 2),
        _total(runs, "cost_usd", 2),
    ]


def environment_table(rows: Sequence[Row]) -> str:
    """What the runs share, and where they differ: corpus, tokenizer, code, device, seeds."""
    body = []
    for key, label in (
        ("corpus", "corpus"),
        ("data_sha256", "token files (sha256)"),
        ("tokenizer_sha256", "tokenizer (sha256)"),
        ("git_sha", "git commit"),
        ("git_dirty", "uncommitted changes"),
        ("device_name", "device"),
        ("precision", "precision"),
        ("seed", "seeds"),
    ):
        values = sorted({cell_text(row[key])[:16] for row in rows if row.get(key) is not None})
        body.append([label, ", ".join(values) or _DASH])
    return markdown_table("what | values", body, "no run")


def decisions_table(study: Mapping[str, Any]) -> str:
    """`study["decisions"]`: a list of flat objects, tabulated under the keys of the first one."""
    decisions = study.get("decisions")
    if not isinstance(decisions, list) or not all(isinstance(d, dict) for d in decisions):
        raise ValueError(
            "study.json has no list of objects under `decisions`; expected one object a decision."
        )
    keys = list(dict.fromkeys(key for decision in decisions for key in decision))
    body = [[_decision(decision.get(key)) for key in keys] for decision in decisions]
    return markdown_table(
        " | ".join(key.replace("_", " ") for key in keys), body, "no decision yet"
    )


def _decision(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_decision(item) for item in value) or _DASH
    return f"{value:.4g}" if isinstance(value, float) else cell_text(value)


# --- cells of a table ---------------------------------------------------------------------------


def _cells(rows: Sequence[Row]) -> list[list[Row]]:
    """Runs that differ only by seed, ranking runs first, in the sweep's order of asked values."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = (
            0 if row.get("phase") == "rank" else 1,
            str(row.get("sweep")),
            number(row, EMBEDDING_RATIO.asked) or 0.0,
            number(row, GLU_EXPANSION.asked) or 0.0,
            str(row.get("experiment")),
            float(f"{number(row, 'tokens') or 0:.1e}"),
            number(row, "learning_rate") or 0.0,
        )
        groups.setdefault(key, []).append(row)
    return [groups[key] for key in sorted(groups)]


def _mean_sd(rows: Sequence[Row], key: str, digits: int, scale: float = 1.0) -> str:
    values = [v * scale for v in (number(row, key) for row in rows) if v is not None]
    if not values:
        return _DASH
    told = f"{fmean(values):.{digits}f}"
    return told if len(values) == 1 else f"{told} ± {stdev(values):.{digits}f}"


def _built(rows: Sequence[Row], quantity: Request, scale: float, form: str) -> str:
    value, asked = number(rows[0], quantity.built), number(rows[0], quantity.asked)
    if value is None:
        return _DASH
    told = form.format(value * scale)
    return told if asked is None else f"{told} ({form.format(asked * scale)})"


def _total(rows: Sequence[Row], key: str, digits: int) -> str:
    values = [v for v in (number(row, key) for row in rows) if v is not None]
    return f"{sum(values):.{digits}f}" if values else _DASH


def plain_number(value: float | None, digits: int) -> str:
    return _DASH if value is None else f"{value:.{digits}f}"


def _count(row: Row, key: str) -> str:
    value = number(row, key)
    return _DASH if value is None else f"{value:,.0f}"


def _tokens(value: float | None) -> str:
    if value is None:
        return _DASH
    return f"{value / 1e6:.2f} M" if value >= 1e6 else f"{value / 1e3:.0f} k"


def cell_text(value: Any) -> str:
    if value is None:
        return _DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value).replace("|", "\\|").replace("\n", " ")


def markdown_table(head: str, body: Sequence[Sequence[str]], empty: str) -> str:
    if not body:
        return f"({empty})"
    names = [name.strip() for name in head.split(" | ")]
    lines = [names, ["---"] * len(names), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
