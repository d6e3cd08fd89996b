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


def asked_and_built(found: Allocation) -> tuple[dict[str, Any], dict[str, Any]]:
    """The quantities that are asked for and what became of them, under their metric keys."""
    asked = {quantity.asked: getattr(found.request, quantity.request) for quantity in REQUESTS}
    return asked, {
        TOTAL_PARAMS.built: found.params.total,
        EMBEDDING_RATIO.built: found.params.share,
        GLU_EXPANSION.built: found.glu_expansion,
    }


def _json(name: str, found: Allocation) -> str:
    """One machine-readable object an experiment: asked, built, model, parameters by block."""
    asked, built = asked_and_built(found)
    model = {key: v for key, v in asdict(found.model).items() if key not in NOT_ALLOCATED}
    params = asdict(found.params)
    content = {"name": name, "asked": asked, "built": built, "model": model, "params": params}
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
        for name, found in allocations.items():
            print(_json(name, found))
        return
    print(table(allocations))
    for note in notes(allocations, baseline):
        print(f"note: {note}")
    tokens = flops = 0
    for run in runs:
        model, training = allocations[run.experiment].model, run.training
        tokens += training.steps * training.step_tokens
        flops += training.steps * training.step_tokens * flops_per_token(model, training.seq_len)
    print(f"\nruns: {len(runs)}, tokens: {tokens:,}, training FLOPs: {flops:.2e}")
    least = costs.floors(flops)
    if max((usd for _, _, usd in least), default=0.0) < 1:
        print("under 1 USD of training on every device of configs/prices.yaml at half its peak; "
              "small models reach a few per cent of it")  # fmt: skip
        return
    print(f"training alone, at {costs.UTILISATION:.0%} of each device's peak, so at least:")
    for device, hours, usd in least:
        print(f"  {device:<8} {hours:10.2f} h {usd:10.2f} USD")


def table(allocations: Mapping[str, Allocation]) -> str:
    """Asked and realised values and parameters by block, one line an experiment."""
    wide = max(14, *map(len, allocations))
    lines = [
        f"{'experiment':<{wide}} {'share asked -> real':>19} {'GLU asked -> real':>17} "
        f"{'d_model':>7} {'layers':>6} {'heads':>6} {'a/d':>5} {'d_ff':>5} {'embedding':>10} "
        f"{'projection':>10} {'attention':>10} {'ffn':>10} {'norm':>7} {'total':>11} {'error':>7}"
    ]
    for name, found in allocations.items():
        m, p, asked = found.model, found.params, found.request.embedding_ratio
        share = f"{'-' if asked is None else f'{asked:.4f}'} -> {p.share:.4f}"
        glu = f"{found.request.glu_expansion:.3f} -> {found.glu_expansion:.3f}"
        heads = f"{m.n_heads}x{m.head_dim}"
        error = p.total / found.request.total_params - 1
        lines.append(
            f"{name:<{wide}} {share:>19} {glu:>17} {m.d_model:>7} {m.n_layers:>6} {heads:>6} "
            f"{m.n_heads * m.head_dim / m.d_model:>5.2f} {m.d_ff:>5} {p.embedding:>10,} "
            f"{p.projection:>10,} {p.attention:>10,} {p.ffn:>10,} {p.norm:>7,} {p.total:>11,} "
            f"{error:>+7.2%}"
        )
    return "\n".join(lines)


def notes(allocations: Mapping[str, Allocation], baseline: str) -> list[str]:
    """A sentence for each thing that a reader of the table should know before paying for it."""
    found = [*_unusual(allocations), *_alike(allocations), *_moved(allocations, baseline)]
    head_dims = sorted({a.model.head_dim for a in allocations.values()})
    if len(head_dims) > 1:
        found.append(
            f"the sweep mixes heads of {' and '.join(map(str, head_dims))}: a difference between "
            "its experiments may be that; model.head_dim holds it"
        )
    return found


def _unusual(allocations: Mapping[str, Allocation]) -> Iterator[str]:
    for name, a in allocations.items():
        if a.model.n_layers > DEEP_LAYERS:
            yield (
                f"{name}: {a.model.n_layers} layers, more than twice those of any published "
                "decoder near this size; latency grows with each, and the best learning rate falls"
            )
        if a.model.n_layers == 1:
            yield f"{name}: one layer, whose attention sees nothing but embeddings"
        if a.glu_error > STRICT.glu or a.share_error > STRICT.share:
            yield (
                f"{name}: built with a GLU expansion of {a.glu_expansion:.3f} and a share of "
                f"{a.params.share:.4f}, further from its request than {STRICT.glu:.0%} or "
                f"{100 * STRICT.share} points"
            )


def _alike(allocations: Mapping[str, Allocation]) -> Iterator[str]:
    """Expansions that were asked further apart than the integers allow: few layers, big steps."""
    for (one, a), (other, b) in combinations(allocations.items(), 2):
        if replace(a.request, glu_expansion=1.0) == replace(b.request, glu_expansion=1.0):
            asked = math.log(a.request.glu_expansion / b.request.glu_expansion)
            built = math.log(a.glu_expansion / b.glu_expansion)
            if abs(built) < abs(asked) / 2:
                yield (
                    f"{one} and {other} are nearly one model: {_text(a.model)}, and "
                    f"{_text(b.model)}"
                )


def _moved(allocations: Mapping[str, Allocation], baseline: str) -> Iterator[str]:
    """Experiments that do not stand at the shape they would have beside their anchor alone (see
    `allocate`), and which others move the anchor too."""
    requests = {name: a.request for name, a in allocations.items()}
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
        return {name: a.model for name, a in allocate(requests, next(iter(requests))).items()}
    except ValueError:
        return {}


def _text(model: ModelConfig) -> str:
    return (
        f"d_model {model.d_model}, {model.n_layers} layers, {model.n_heads} heads of "
        f"{model.head_dim}, d_ff {model.d_ff}"
    )
