"""Every prediction on record beside what was observed, agreeing or not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from src.analysis.table_text import DASH, field, fixed, markdown, whole
from src.spec.metric_keys import EMBEDDING_RATIO, TOTAL_PARAMS

SAME_SHARE = 0.002  # built shares this near are the same prediction's
SWEPT = 0.02  # a sweep whose built shares lie nearer is of something else


def predictions_table(runs: pd.DataFrame, predictions: Mapping[str, Any]) -> str:
    """Every prediction for a size and vocabulary that was run at the full budget.

    Observed ratios are over the seeds that both sides have, which stand beside them.
    """
    body: list[list[str]] = []
    full = runs[(runs["status"] == "finished") & (runs["phase"] == "full")]
    full = full.assign(loss=full["test_loss"].fillna(full["dev_loss"]))
    keys = ["sweep", TOTAL_PARAMS.asked, "vocab_size"]
    for (sweep, size, vocabulary), mine in full.groupby(keys, sort=False):
        laws = [
            law
            for law in predictions.get("sweeps", {}).values()
            if (law[TOTAL_PARAMS.asked], law["vocab_size"]) == (size, vocabulary)
        ]
        built = mine[EMBEDDING_RATIO.built]
        base = mine[mine["experiment"] == mine["baseline_name"]]
        if laws and len(base) and built.max() - built.min() > SWEPT:
            body += _of_sweep(sweep, mine, base, laws)
    head = "sweep | what | Tao et al. | Levine et al. | observed | seeds | agree in direction"
    return markdown(head, body, "no prediction on record for a sweep that was run")


def _of_sweep(
    sweep: str, mine: pd.DataFrame, base: pd.DataFrame, laws: Sequence[Mapping[str, Any]]
) -> list[list[str]]:
    own = base[EMBEDDING_RATIO.built].iloc[0]
    losses = mine.pivot_table(index=EMBEDDING_RATIO.built, columns="seed", values="loss")
    gaps = (losses - losses.loc[own]).mean(axis="columns")  # over common seeds
    best = float(gaps.fillna(math.inf).idxmin())
    end = " (an end of those run)" if best in (gaps.index.min(), gaps.index.max()) else ""
    law = laws[0]
    told = [("Tao et al.", law["tao_best_share"]), ("Levine et al.", law["levine_best_share"])]
    agree = [name for name, share in told if (share > own) == (best > own) and best != own]
    layers = mine.loc[mine[EMBEDDING_RATIO.built] == best, "n_layers"].iloc[0]
    ran = {
        share: [whole(seed) for seed in line.dropna().index] for share, line in losses.iterrows()
    }
    lines = [
        [sweep, "best share", *(f"{100 * share:.1f} %" for _, share in told),
         f"{100 * best:.1f} %{end}", ", ".join(ran[best]), ", ".join(agree) or "neither"],
        [sweep, "layers at the best share", DASH, fixed(law["levine_best_layers"], 1),
         whole(layers), ", ".join(ran[best]), DASH],
    ]  # fmt: skip
    for share, gap in gaps.drop(own).items():
        tao = _tao(laws, float(share), own)
        common = [seed for seed in ran[share] if seed in ran[own]]
        seeds = ", ".join(common) or "none in common"
        seeds += f" of {len(ran[own])}" if len(common) < len(ran[own]) else ""
        lines.append([
            sweep, f"PPL at {100 * share:.1f} % against {100 * own:.1f} %",
            DASH if tao is None else f"{100 * tao:+.1f} %", DASH,
            "not run" if pd.isna(gap) else f"{100 * math.expm1(gap):+.1f} %", seeds,
            DASH if tao is None or pd.isna(gap) else field((tao > 0) == (gap > 0)),
        ])  # fmt: skip
    return lines


def _tao(laws: Sequence[Mapping[str, Any]], share: float, own: float) -> float | None:
    """The law's perplexity of a whole table of this share over the baseline's, less one."""
    return next(
        (
            math.expm1(cell["tao_ln_ppl_ratio"])
            for law in laws
            for cell in law["cells"].values()
            if abs(cell["share"] - share) < SAME_SHARE
            and abs(law["cells"][law["baseline"]]["share"] - own) < SAME_SHARE
            and cell["embedding_dim"] is None
        ),
        None,
    )
