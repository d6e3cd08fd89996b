"""The sweep files of later blocks: GLU on the leader, factorised tables, a vocabulary grid. Pure.

`raw` and `entry` are an experiment file's values and one of its experiments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from src.spec import rates
from src.spec.config import ModelConfig
from src.study.plan import Configuration

Raw = Mapping[str, Any]
Variant = tuple[int, bool]  # vocabulary, tied


def model_keys(entry: Raw) -> dict[str, Any]:
    """What an experiment states of its model."""
    return {key: value for key, value in entry.items() if key not in ("name", "training")}


def width_and_heads(model: ModelConfig) -> dict[str, int]:
    """What is kept of the leading share's model; depth takes up the difference."""
    return {"d_model": model.d_model, "n_heads": model.n_heads, "head_dim": model.head_dim}


def experiment(raw: Raw, name: str) -> dict[str, Any]:
    """An experiment by its name, with what the file says of all models and rates; `emb45-lr2e-3`
    is `emb45` at that rate."""
    stated = {entry["name"]: entry for entry in raw["experiments"]}
    own_name = name if name in stated else rates.configuration(name)
    entry = stated[own_name]
    shared = {k: v for k, v in (raw.get("model") or {}).items() if k not in entry}
    training = dict(entry.get("training") or {})
    if own_name != name:
        training["learning_rate"] = float(name.removeprefix(f"{own_name}-lr"))
    elif "learning_rate" in (raw.get("training") or {}):
        training.setdefault("learning_rate", raw["training"]["learning_rate"])
    content = {**shared, **model_keys(entry), "name": name}
    return {**content, "training": training} if training else content


def of_entries(raw: Raw, baseline: str, entries: Sequence[Raw]) -> dict[str, Any]:
    """A share sweep's file with these experiments instead."""
    kept = {key: value for key, value in raw.items() if key not in ("kill_rule", "model")}
    model = raw.get("model") or {}
    sizes = {k: v for k, v in model.items() if k in ("total_params", "vocab_size")}
    return {**kept, "model": sizes, "baseline": baseline, "experiments": list(entries)}


def on_model_of(glu: Raw, entry: Raw, leader: Configuration) -> dict[str, Any]:
    """The GLU sweep on the leading experiment's width and heads, at its share and with its
    training; names say whose model it is."""
    pinned = width_and_heads(leader.allocation.model)
    if leader.run.model.allocate == "attention":  # the heads absorb the budget
        pinned = {"d_model": pinned["d_model"]}
    left_out = ("glu_expansion", "total_params", "vocab_size")
    own = {key: value for key, value in model_keys(entry).items() if key not in left_out}
    if not any(own.get(key) for key in ("embedding_dim", "d_model")):
        share = leader.run.model.embedding_ratio or leader.allocation.params.share
        own.setdefault("embedding_ratio", share)
    baseline = glu.get("baseline", glu["experiments"][0]["name"])
    return {
        **glu,
        "model": {**(glu.get("model") or {}), **own, **pinned},
        "training": {**(glu.get("training") or {}), **(entry.get("training") or {})},
        "baseline": f"{baseline}-{entry['name']}",
        "experiments": [{**e, "name": f"{e['name']}-{entry['name']}"} for e in glu["experiments"]],
    }


def factorised(entry: Raw, leader: Configuration, share: float) -> dict[str, Any]:
    """The leader's width, heads and expansion with a table V x E and a projection E x d_model that
    hold about `share` of all parameters."""
    model, request = leader.allocation.model, leader.run.model
    width = share * request.total_params / (model.vocab_size + model.d_model)
    rank = max(8, 8 * round(width / 8))
    kept = {key: value for key, value in entry.items() if key != "embedding_ratio"}
    name = f"rank{rank}-{entry['name']}"
    return {**kept, **width_and_heads(model), "embedding_dim": rank, "name": name}


def vocabulary_grid(
    template: Raw, shares: Sequence[Raw], variants: Sequence[Variant], budget: Mapping[int, int]
) -> dict[str, Any]:
    """Each variant at each of the `shares` (experiments of the share sweep).

    budget: ranking tokens by vocabulary where they differ from the template's, so that all
    variants train on equal bytes.
    """
    experiments = []
    for vocab, tied in variants:
        size = f"{vocab // 1000}k" if vocab % 1000 == 0 else str(vocab)
        equal_bytes = (
            {"tokens": budget[vocab], "ranking_tokens": budget[vocab]} if vocab in budget else {}
        )
        for share in shares:
            name = f"{share['name']}-v{size}-{'tied' if tied else 'untied'}"
            variant = {"name": name, "vocab_size": vocab, "tie_embeddings": tied}
            training = {**(share.get("training") or {}), **equal_bytes}
            own = {"training": training} if training else {}
            experiments.append({**model_keys(share), **variant, **own})
    kept = {key: value for key, value in template.items() if key != "baseline"}
    return {**kept, "experiments": experiments}
