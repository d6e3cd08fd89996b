"""Markdown tables of what was decided and foretold, nothing left out: both readings of the winner's
rule, and every prediction on record beside what was observed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from src.analysis.report_tables import cell_text, markdown_table, plain_number
from src.analysis.run_csv import Row, number
from src.spec.metric_keys import EMBEDDING_RATIO, TOTAL_PARAMS

NOT_RUN = "not run"
SAME_SHARE = 0.002  # built shares this near are the same prediction's
SWEPT = 0.02  # a sweep whose built shares lie nearer is of something else


def winner_table(study: Mapping[str, Any]) -> str:
    """`study["winner"]`: each candidate and the outcome, strict and with the margin."""
    found = study.get("winner")
    if found is None:
        return "(no finalist was judged)"
    body = [
        [
            cell_text(candidate["name"]),
            f"{100 * (candidate['perplexity_ratio'] - 1):+.1f} %",
            cell_text(candidate["strict"]),
            cell_text(candidate["margin"]),
            cell_text("; ".join(candidate["reasons"])),
        ]
        for candidate in found["candidates"]
    ]
    outcome = [found[key] or "no winner" for key in ("strict", "margin")]
    body.append(
        ["**winner**", "", *(f"**{cell_text(name)}**" for name in outcome), found["reason"]]
    )
    head = (
        f"configuration | perplexity against {found['baseline']} | strict: latency and memory not "
        "above the baseline's | with 3 % above allowed | why"
    )
    return markdown_table(head, body, "")


def predictions_table(rows: Sequence[Row], predictions: Mapping[str, Any]) -> str:
    """Every prediction for a size and vocabulary that was run at the full budget, agreeing or not.

    Observed ratios are over the seeds that both sides have, which stand beside them.
    """
    body: list[list[str]] = []
    full = [r for r in rows if r.get("status") == "finished" and r.get("phase") == "full"]
    for (sweep, total, vocab), runs in _groups(full).items():
        laws = [
            law
            for law in predictions.get("sweeps", {}).values()
            if (law[TOTAL_PARAMS.asked], law["vocab_size"]) == (total, vocab)
        ]
        built = [r[EMBEDDING_RATIO.built] for r in runs]
        base = {r["seed"]: r for r in runs if r.get("experiment") == r.get("baseline_name")}
        if laws and base and max(built) - min(built) > SWEPT:
            body += _of_sweep(sweep, runs, base, laws)
    head = "sweep | what | Tao et al. | Levine et al. | observed | seeds | agree in direction"
    return markdown_table(head, body, "no prediction on record for a sweep that was run")


def _groups(rows: Sequence[Row]) -> dict[tuple[str, Any, Any], list[Row]]:
    found: dict[tuple[str, Any, Any], list[Row]] = {}
    for row in rows:
        key = (str(row.get("sweep")), row.get(TOTAL_PARAMS.asked), row.get("vocab_size"))
        found.setdefault(key, []).append(row)
    return found


def _of_sweep(
    sweep: str, runs: Sequence[Row], base: Mapping[Any, Row], laws: Sequence[Mapping[str, Any]]
) -> list[list[str]]:
    shares: dict[float, dict[Any, Row]] = {}
    for row in runs:
        shares.setdefault(row[EMBEDDING_RATIO.built], {})[row["seed"]] = row
    own = next(iter(base.values()))[EMBEDDING_RATIO.built]
    gaps = {share: _gap(seeds, base) for share, seeds in shares.items() if share != own}
    known = {share: gap for share, (gap, _) in gaps.items() if gap is not None} | {own: 0.0}
    best = min(known, key=lambda share: known[share])
    end = " (an end of those run)" if best in (min(shares), max(shares)) else ""
    law = laws[0]
    told = [("Tao et al.", law["tao_best_share"]), ("Levine et al.", law["levine_best_share"])]
    agree = [name for name, share in told if (share > own) == (best > own) and best != own]
    layers = next(iter(shares[best].values())).get("n_layers")
    lines = [
        [sweep, "best share", *(f"{100 * share:.1f} %" for _, share in told),
         f"{100 * best:.1f} %{end}", _seeds(shares[best]), ", ".join(agree) or "neither"],
        [sweep, "layers at the best share", "–", plain_number(law["levine_best_layers"], 1),
         cell_text(layers), _seeds(shares[best]), "–"],
    ]  # fmt: skip
    for share in sorted(gaps):
        gap, seeds = gaps[share]
        tao = next(
            (
                math.expm1(c["tao_ln_ppl_ratio"])
                for found in laws
                for c in found["cells"].values()
                if abs(c["share"] - share) < SAME_SHARE
                and abs(found["cells"][found["baseline"]]["share"] - own) < SAME_SHARE
                and c["embedding_dim"] is None
            ),
            None,
        )
        observed = NOT_RUN if gap is None else f"{100 * math.expm1(gap):+.1f} %"
        agrees = "–" if tao is None or gap is None else cell_text((tao > 0) == (gap > 0))
        lines.append(
            [sweep, f"PPL at {100 * share:.1f} % against {100 * own:.1f} %",
             "–" if tao is None else f"{100 * tao:+.1f} %", "–", observed, seeds, agrees]
        )  # fmt: skip
    return lines


def _gap(ours: Mapping[Any, Row], theirs: Mapping[Any, Row]) -> tuple[float | None, str]:
    """ln of the perplexity ratio over common seeds, and which those are."""
    common = sorted(seed for seed in ours if seed in theirs)
    pairs = [(_loss(ours[seed]), _loss(theirs[seed])) for seed in common]
    known = [a - b for a, b in pairs if a is not None and b is not None]
    told = ", ".join(map(str, common))
    if len(common) < len(theirs):
        told += f" of {len(theirs)}"
    return (fmean(known) if known else None), told or "none in common"


def _loss(row: Row) -> float | None:
    found = number(row, "test_loss")
    return number(row, "dev_loss") if found is None else found


def _seeds(rows: Mapping[Any, Row]) -> str:
    return ", ".join(str(seed) for seed in sorted(rows))
