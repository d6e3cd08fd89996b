"""What a dry run shows of a sweep's allocations: the table, its JSON, and what to know of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import combinations
from typing import Any

from src.spec import costs
from src.spec.allocation import DEEP_LAYERS, STRICT, Allocation, allocate, flops_per_token, groups
from src.spec.config import ModelConfig, ModelRequest, RunConfig
from src.spec.metric_keys import EMBEDDING_RATIO, GLU_EXPANSION, REQUESTS, TOTAL_PARAMS

NOT_ALLOCATED = ("rope_theta", "norm_eps")  # of ModelConfig: the same in every model


def asked_and_built(allocation: Allocation) -> tuple[dict[str, Any], dict[str, Any]]:
    """The quantities that are asked for and what became of them, under their metric keys."""
    request = allocation.request
    requested = {quantity.asked: getattr(request, quantity.request) for quantity in REQUESTS}
    return requested, {
        TOTAL_PARAMS.built: allocation.params.total,
        EMBEDDING_RATIO.built: allocation.params.share,
        GLU_EXPANSION.built: allocation.glu_expansion,
    }


def _json(name: str, allocation: Allocation) -> str:
    """One machine-readable object an experiment: asked, built, model, parameters by block."""
    requested, built = asked_and_built(allocation)
    model = {k: v for k, v in asdict(allocation.model).items() if k not in NOT_ALLOCATED}
    params = asdict(allocation.params)
    content = {"name": name, "asked": requested, "built": built, "model": model, "params": params}
    return json.dumps(content)


def print_sweep(
    allocations: Mapping[str, Allocation],
    baseline: str,
    runs: Sequence[RunConfig],
    as_json: bool = False,
) -> None:
    """The table, its notes, and what the asked runs cost at least, device by device where that is
    a dollar anywhere; or one JSON object an experiment."""
    if as_json:
        for name, allocation in allocations.items():
            print(_json(name, allocation))
        return
    print(table(allocations))
    for note in notes(allocations, baseline):
        print(f"note: {note}")
    tokens = flops = 0
    for run in runs:
        model, training = allocations[run.experiment].model, run.training
        tokens += training.total_tokens
        flops += training.total_tokens * flops_per_token(model, training.seq_len)
    print(f"\nruns: {len(runs)}, tokens: {tokens:,}, training FLOPs: {flops:.2e}")
    bounds = costs.lower_bounds(flops)
    if max((usd for _, _, usd in bounds), default=0.0) < 1:
        print("under 1 USD of training on every device of configs/prices.yaml at half its peak; "
              "small models reach a few per cent of it")  # fmt: skip
        return
    print(f"training alone, at {costs.UTILISATION:.0%} of each device's peak, so at least:")
    for device, hours, usd in bounds:
        print(f"  {device:<8} {hours:10.2f} h {usd:10.2f} USD")


def table(allocations: Mapping[str, Allocation]) -> str:
    """Asked and realised values and parameters by block, one line an experiment."""
    width = max(14, *map(len, allocations))
    lines = [
        f"{'experiment':<{width}} {'share asked -> real':>19} {'GLU asked -> real':>17} "
        f"{'d_model':>7} {'layers':>6} {'heads':>6} {'a/d':>5} {'d_ff':>5} {'embedding':>10} "
        f"{'projection':>10} {'attention':>10} {'ffn':>10} {'norm':>7} {'total':>11} {'error':>7}"
    ]
    for name, allocation in allocations.items():
        request, model, params = allocation.request, allocation.model, allocation.params
        asked = "-" if request.embedding_ratio is None else f"{request.embedding_ratio:.4f}"
        share = f"{asked} -> {params.share:.4f}"
        glu = f"{request.glu_expansion:.3f} -> {allocation.glu_expansion:.3f}"
        heads = f"{model.n_heads}x{model.head_dim}"
        attention_ratio = model.n_heads * model.head_dim / model.d_model
        error = params.total / request.total_params - 1
        lines.append(
            f"{name:<{width}} {share:>19} {glu:>17} {model.d_model:>7} {model.n_layers:>6} "
            f"{heads:>6} {attention_ratio:>5.2f} {model.d_ff:>5} {params.embedding:>10,} "
            f"{params.projection:>10,} {params.attention:>10,} {params.ffn:>10,} "
            f"{params.norm:>7,} {params.total:>11,} {error:>+7.2%}"
        )
    return "\n".join(lines)


def notes(allocations: Mapping[str, Allocation], baseline: str) -> list[str]:
    """A sentence for each thing that a reader of the table should know before paying for it."""
    sentences = [*_unusual(allocations), *_alike(allocations), *_moved(allocations, baseline)]
    head_dims = sorted({allocation.model.head_dim for allocation in allocations.values()})
    if len(head_dims) > 1:
        sentences.append(
            f"the sweep mixes heads of {' and '.join(map(str, head_dims))}: a difference between "
            "its experiments may be that; model.head_dim holds it"
        )
    return sentences


def _unusual(allocations: Mapping[str, Allocation]) -> Iterator[str]:
    for name, allocation in allocations.items():
        if allocation.model.n_layers > DEEP_LAYERS:
            yield (
                f"{name}: {allocation.model.n_layers} layers, more than twice those of any "
                "published decoder near this size; latency grows with each, and the best learning "
                "rate falls"
            )
        if allocation.model.n_layers == 1:
            yield f"{name}: one layer, whose attention sees nothing but embeddings"
        if allocation.glu_error > STRICT.glu or allocation.share_error > STRICT.share:
            yield (
                f"{name}: built with a GLU expansion of {allocation.glu_expansion:.3f} and a share "
                f"of {allocation.params.share:.4f}, further from its request than "
                f"{STRICT.glu:.0%} or {100 * STRICT.share} points"
            )


def _alike(allocations: Mapping[str, Allocation]) -> Iterator[str]:
    """Expansions that were asked further apart than the integers allow: few layers, big steps."""
    for (one, a), (other, b) in combinations(allocations.items(), 2):
        if replace(a.request, glu_expansion=1.0) == replace(b.request, glu_expansion=1.0):
            requested_gap = math.log(a.request.glu_expansion / b.request.glu_expansion)
            built_gap = math.log(a.glu_expansion / b.glu_expansion)
            if abs(built_gap) < abs(requested_gap) / 2:
                yield (
                    f"{one} and {other} are nearly one model: {_text(a.model)}, and "
                    f"{_text(b.model)}"
                )


def _moved(allocations: Mapping[str, Allocation], baseline: str) -> Iterator[str]:
    """Experiments that do not stand at the shape they would have beside their anchor alone (see
    `allocate`), and which others move the anchor too."""
    requests = {name: allocation.request for name, allocation in allocations.items()}
    for anchor, group in groups(requests, baseline).items():
        pairs = {name: _models({anchor: group[anchor], name: group[name]}) for name in group}
        alone = pairs[anchor].get(anchor)
        causes = [name for name in group if pairs[name].get(anchor) != alone]
        for name in group:
            now = allocations[name].model
            before = pairs[name].get(name, now)
            others = " and ".join(cause for cause in causes if cause != name)
            if others and before != now:
                yield (
                    f"{name}: {_text(now)}; without {others} it would be {_text(before)} (the keys "
                    "d_model, n_heads and n_layers hold a shape)"
                )


def _models(requests: Mapping[str, ModelRequest]) -> dict[str, ModelConfig]:
    """The shapes of a smaller sweep, its first experiment the baseline; none where it has none."""
    try:
        allocations = allocate(requests, next(iter(requests)))
    except ValueError:
        return {}
    return {name: allocation.model for name, allocation in allocations.items()}


def _text(model: ModelConfig) -> str:
    return (
        f"d_model {model.d_model}, {model.n_layers} layers, {model.n_heads} heads of "
        f"{model.head_dim}, d_ff {model.d_ff}"
    )
