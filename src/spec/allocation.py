"""From a request (budget, share, expansion) to final integers. Closed form; imports no torch.

Notation: T parameters in all, V vocabulary, d = d_model, a = n_heads * head_dim, L layers,
F = d_ff, r = F / d, E = embedding_dim. Per layer: attention 4 d a, FFN 3 d F, norms.
The search visits every width and depth within the tolerances, so a refusal is a proof.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from src.spec.config import ModelConfig, ModelRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class Params:
    """Parameters by block; a tied table counts once, an untied head counts as embedding."""

    embedding: int
    projection: int  # the E x d of a factorised table; part of the share
    attention: int
    ffn: int
    norm: int

    @property
    def total(self) -> int:
        return self.embedding + self.projection + self.attention + self.ffn + self.norm

    @property
    def share(self) -> float:
        """Embedding parameters over all parameters."""
        return (self.embedding + self.projection) / self.total


@dataclass(frozen=True, kw_only=True, slots=True)
class Allocation:
    """A request and its answer."""

    request: ModelRequest
    model: ModelConfig
    params: Params

    @property
    def glu_expansion(self) -> float:
        return self.model.d_ff / self.model.d_model

    @property
    def total_error(self) -> float:
        return abs(self.params.total / self.request.total_params - 1)

    @property
    def share_error(self) -> float:
        """Absolute difference of shares; 0 where none was asked."""
        asked = self.request.embedding_ratio
        return 0.0 if asked is None else abs(self.params.share - asked)

    @property
    def glu_error(self) -> float:
        return abs(self.glu_expansion / self.request.glu_expansion - 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tolerance:
    """How far an answer may be from its request (fractions; share in absolute terms)."""

    total: float
    share: float
    glu: float
    attention: float  # |a / d - 1| where depth absorbs the budget


STRICT = Tolerance(total=0.005, share=0.0125, glu=0.05, attention=0.10)
WIDE = Tolerance(total=0.005, share=0.015, glu=0.12, attention=0.10)
# With heads of 32, d = 112 has no attention width nearer than 96 or 128.
WIDEST = replace(WIDE, attention=0.15)
WIDTH_STEP = 8  # d_model and d_ff are multiples of it
SMALL_MODEL = 3_000_000  # under it heads of 16 are allowed
MIN_HEADS_AS_SLACK = 4  # `allocate: attention` may not squeeze attention below this
# A factorised share hardly fixes d. Then ln d stays this close to Levine et al. 2020's
# (arXiv 2006.12467) best width at that depth, ln d = 5.039 + 0.0555 L.
ASPECT_SLACK = 0.15


def count_params(config: ModelConfig) -> Params:
    """Closed form, equal to the built model's count, exactly."""
    width = config.n_heads * config.head_dim
    tables = 1 if config.tie_embeddings else 2
    rank = config.embedding_dim
    qk = 2 * config.head_dim if config.qk_norm else 0
    return Params(
        embedding=tables * config.vocab_size * (rank or config.d_model),
        projection=tables * rank * config.d_model if rank else 0,
        attention=config.n_layers * 4 * config.d_model * width,
        ffn=config.n_layers * 3 * config.d_model * config.d_ff,
        norm=config.n_layers * (2 * config.d_model + qk) + config.d_model,
    )


def flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """Training FLOPs: 6 per weight that is multiplied (the head, not the lookup) plus causal
    attention, 6 L seq_len a (Kaplan et al. 2020's count with half the square)."""
    params = count_params(config)
    tables = 1 if config.tie_embeddings else 2
    head = params.embedding // tables + 2 * params.projection // tables
    attention = config.n_layers * seq_len * config.n_heads * config.head_dim
    return 6 * (head + params.attention + params.ffn + attention)


# ------------------------------------------------------------------------------------- the search


@dataclass(frozen=True, slots=True)
class _Frame:
    """What all cells of a group share: width and heads (attention width where depth is slack)."""

    d_model: int
    head_dim: int
    n_heads: int


def _widths(request: ModelRequest, tolerance: Tolerance) -> list[int]:
    """All multiples of 8 whose table keeps the share within tolerance (or the forced width)."""
    if request.d_model is not None:
        return [request.d_model]
    tables = 1 if request.tie_embeddings else 2
    total, rank, asked = request.total_params, request.embedding_dim, request.embedding_ratio
    # One layer, even with the narrowest FFN, must fit: 4 d (0.85 d) < T.
    largest = int(math.sqrt(total / 3)) + WIDTH_STEP
    if rank is not None:
        low, high = rank, largest
    else:
        assert asked is not None
        low = int((asked - tolerance.share) * total * (1 - tolerance.total))
        high = int((asked + tolerance.share) * total * (1 + tolerance.total))
        low, high = low // (tables * request.vocab_size), high // (tables * request.vocab_size)
    first = max(WIDTH_STEP, math.ceil(low / WIDTH_STEP) * WIDTH_STEP)
    return list(range(first, min(high, largest) + 1, WIDTH_STEP))


def _head_dims(total: int) -> tuple[int, ...]:
    return (32, 64, 16) if total < SMALL_MODEL else (32, 64)


def _frames(request: ModelRequest, tolerance: Tolerance) -> Iterator[_Frame]:
    for width in _widths(request, tolerance):
        for head_dim in _head_dims(request.total_params):
            nearest = round(width / head_dim)
            for n_heads in range(max(1, nearest - 1), nearest + 2):
                if abs(n_heads * head_dim / width - 1) <= tolerance.attention + 1e-9:
                    yield _Frame(width, head_dim, n_heads)


def _answer(request: ModelRequest, frame: _Frame, n_layers: int, d_ff: int) -> Allocation:
    model = ModelConfig(
        vocab_size=request.vocab_size,
        d_model=frame.d_model,
        n_layers=n_layers,
        n_heads=frame.n_heads,
        head_dim=frame.head_dim,
        d_ff=d_ff,
        embedding_dim=request.embedding_dim,
        tie_embeddings=request.tie_embeddings,
        qk_norm=request.qk_norm,
    )
    return Allocation(request=request, model=model, params=count_params(model))


def _key(answer: Allocation) -> tuple[float, ...]:
    """Smallest GLU error, then total, then share."""
    return (answer.glu_error, answer.total_error, answer.share_error)


def _allowed(answer: Allocation, tolerance: Tolerance) -> bool:
    return (
        answer.total_error <= tolerance.total
        and answer.share_error <= tolerance.share
        and answer.glu_error <= tolerance.glu
    )


def _body(request: ModelRequest, frame: _Frame) -> int:
    """Parameters left for the layers."""
    empty = _answer(request, frame, 0, 0)
    return request.total_params - empty.params.total


def _ffn_widths(exact: float, room: float, asked: float) -> list[int]:
    """The multiples of 8 within `room` of `exact` that lie nearest to `asked` (one a side);
    where none lies within, the two around `exact`."""
    low = max(1, math.ceil((exact - room) / WIDTH_STEP))
    high = math.floor((exact + room) / WIDTH_STEP)
    if low > high:
        low = max(1, math.floor(exact / WIDTH_STEP))
        high = low + 1
    nearest = math.floor(asked / WIDTH_STEP)
    return [WIDTH_STEP * step for step in {min(max(n, low), high) for n in (nearest, nearest + 1)}]


def _at_depth(
    request: ModelRequest, frame: _Frame, n_layers: int, tolerance: Tolerance
) -> Iterator[Allocation]:
    """The best d_ff at this frame and depth: within the budget, or just missing it."""
    bare = _answer(request, frame, n_layers, 0).params.total
    per_unit = 3 * frame.d_model * n_layers
    exact = (request.total_params - bare) / per_unit
    room = tolerance.total * request.total_params / per_unit
    for d_ff in _ffn_widths(exact, room, request.glu_expansion * frame.d_model):
        yield _answer(request, frame, n_layers, d_ff)


def _depths(request: ModelRequest, frame: _Frame, tolerance: Tolerance) -> Sequence[int]:
    """The depths at which the asked expansion meets the budget within tolerance."""
    if request.n_layers is not None:
        return (request.n_layers,)
    empty, one = (_answer(request, frame, layers, 0).params.total for layers in (0, 1))
    ffn = 3 * frame.d_model**2 * request.glu_expansion
    body, fixed = request.total_params - empty, one - empty
    low = math.floor(body / (fixed + ffn * (1 + tolerance.glu)))
    high = math.ceil(body / (fixed + ffn * max(0.0, 1 - tolerance.glu)))
    return range(max(1, low), high + 1)


def _depth_slack(
    request: ModelRequest, frame: _Frame, tolerance: Tolerance
) -> Iterator[Allocation]:
    """Answers at this frame in which depth absorbs the budget."""
    for n_layers in _depths(request, frame, tolerance):
        yield from _at_depth(request, frame, n_layers, tolerance)


def _attention_slack(
    request: ModelRequest, frame: _Frame, n_layers: int, tolerance: Tolerance
) -> Iterator[Allocation]:
    """Answers at this width and depth in which the number of heads absorbs the budget."""
    per_head = n_layers * 4 * frame.d_model * frame.head_dim
    headless = _answer(request, replace(frame, n_heads=0), n_layers, 0).params.total
    ffn = n_layers * 3 * frame.d_model**2 * request.glu_expansion
    left = request.total_params - headless
    low = math.floor((left - ffn * (1 + tolerance.glu)) / per_head)
    high = math.ceil((left - ffn * (1 - tolerance.glu)) / per_head)
    for n_heads in range(max(MIN_HEADS_AS_SLACK, low), high + 1):
        yield from _at_depth(request, replace(frame, n_heads=n_heads), n_layers, tolerance)


def _best(answers: Iterator[Allocation], tolerance: Tolerance) -> Allocation | None:
    allowed = [a for a in answers if _allowed(a, tolerance) and _natural(a)]
    return min(allowed, key=_key, default=None)


def _natural(answer: Allocation) -> bool:
    """Whether depth suits width, asked only where nothing else fixes the width."""
    request, model = answer.request, answer.model
    if request.embedding_dim is None or request.d_model is not None or request.n_layers is not None:
        return True
    return abs(math.log(model.d_model) - 5.039 - 0.0555 * model.n_layers) <= ASPECT_SLACK


def _group_at(
    group: Sequence[ModelRequest], frame: _Frame, tolerance: Tolerance, n_layers: int = 0
) -> list[Allocation] | None:
    """The whole group at one frame, or None where some cell has no answer.

    `n_layers` is the depth to keep where attention is the slack; 0: the one that suits the frame.
    """
    if group[0].allocate == "attention" and not n_layers:
        widest = max(group, key=lambda request: request.glu_expansion)
        reference = _best(_depth_slack(widest, frame, tolerance), tolerance)
        if reference is None:
            return None
        n_layers = reference.model.n_layers
    answers = []
    for request in group:
        shapes = (
            _attention_slack(request, frame, n_layers, tolerance)
            if n_layers
            else _depth_slack(request, frame, tolerance)
        )
        best = _best(shapes, tolerance)
        if best is None:
            return None
        answers.append(best)
    return answers


def _group_key(answers: Sequence[Allocation]) -> tuple[float, ...]:
    """The worst cell decides. Errors are rounded (GLU to 1 %, total to 0.1 %) so that a width
    which is a multiple of 32, which hardware likes, wins where it costs nothing else."""
    worst = [max(errors) for errors in zip(*map(_key, answers), strict=True)]
    model = answers[0].model
    width = model.n_heads * model.head_dim
    return (
        round(worst[0], 2),
        round(worst[1], 3),
        model.head_dim != _usual_head_dim(answers[0]),
        model.d_model % 32 != 0,
        *worst,
        abs(width - model.d_model),
    )


def _usual_head_dim(answer: Allocation) -> int:
    if answer.request.total_params < SMALL_MODEL:
        return 16
    return 32 if answer.model.d_model < 512 else 64


def _solve(group: Sequence[ModelRequest]) -> list[Allocation] | None:
    """The best answers for cells that must share a frame, strict tolerances first."""
    if group[0].allocate == "attention":
        # The depth of the widest cell of the same sweep with depth as the slack, if it can be kept.
        by_depth = _solve([replace(request, allocate="depth") for request in group])
        widest = max(by_depth or (), key=lambda a: a.request.glu_expansion, default=None)
        kept = widest and _solve_at(group, widest.model.n_layers)
        if kept:
            return kept
    return _solve_at(group, 0)


def _solve_at(group: Sequence[ModelRequest], n_layers: int) -> list[Allocation] | None:
    for tolerance in (STRICT, WIDE, WIDEST):
        found = []
        for frame in _frames(group[0], tolerance):
            answers = _group_at(group, frame, tolerance, n_layers)
            if answers is not None:
                found.append(answers)
        if found:
            return min(found, key=_group_key)
    return None


def allocate(requests: Mapping[str, ModelRequest]) -> dict[str, Allocation]:
    """Answer the cells of one sweep together.

    Cells that ask for the same budget, vocabulary, share and table get the same d_model and (where
    depth absorbs the budget) the same heads. Raises ValueError, naming the experiments, with the
    table of what was tried and the nearest feasible request, where there is no answer.
    """
    groups: dict[ModelRequest, list[str]] = {}
    for name, request in requests.items():
        groups.setdefault(replace(request, glu_expansion=1.0), []).append(name)
    answers: dict[str, Allocation] = {}
    for names in groups.values():
        solved = _solve([requests[name] for name in names])
        if solved is None:
            raise ValueError(_refusal({name: requests[name] for name in names}))
        answers.update(zip(names, solved, strict=True))
    return {name: answers[name] for name in requests}


# -------------------------------------------------------------------------------------- refusals


def _refusal(requests: Mapping[str, ModelRequest]) -> str:
    alone = [name for name, request in requests.items() if _solve([request]) is None]
    names = ", ".join(alone or requests)
    first = requests[alone[0]] if alone else next(iter(requests.values()))
    why = "no shape" if alone else "no d_model and heads common to these cells"
    asked = "decided by the table" if first.embedding_ratio is None else f"{first.embedding_ratio}"
    way_out = _nearest_request(first) if alone else "each is feasible in a sweep of its own"
    return (
        f"experiments {names}: found total_params {first.total_params:,}, vocab_size "
        f"{first.vocab_size:,}, embedding_ratio {asked}, glu_expansion {first.glu_expansion:.4g}, "
        f"for which {why} is within {WIDE.total:.1%} of the total, {100 * WIDE.share:.1f} points "
        f"of the share and {WIDE.glu:.0%} of the expansion; {way_out}.\n"
        f"{_tried(first)}"
    )


def _tried(request: ModelRequest, rows: int = 8) -> str:
    """The shapes that came nearest, as a table."""
    loose = Tolerance(total=0.25, share=0.05, glu=0.9, attention=0.3)
    shapes: list[Allocation] = []
    for frame in _frames(request, loose):
        shapes += list(_depth_slack(request, frame, replace(loose, total=0.0, glu=0.5)))[:64]
        if len(shapes) > 4_000:
            break
    if not shapes:
        return "Tried: nothing; no table of this share leaves room for one layer."
    shapes.sort(
        key=lambda a: (
            a.glu_error / WIDE.glu + a.total_error / WIDE.total + a.share_error / WIDE.share
        )
    )
    lines = ["Tried: d_model n_layers heads d_ff |  total error  share error  GLU error"]
    for a in shapes[:rows]:
        heads = f"{a.model.n_heads}x{a.model.head_dim}"
        lines.append(
            f"       {a.model.d_model:7d} {a.model.n_layers:8d} {heads:>5s} {a.model.d_ff:4d} | "
            f"{a.total_error:12.2%} {100 * a.share_error:9.2f} pt {a.glu_error:10.1%}"
        )
    return "\n".join(lines)


def _nearest_request(request: ModelRequest) -> str:
    """The nearest share that works at this budget, else the nearest larger budget."""
    free = replace(request, n_layers=None, d_model=None, embedding_dim=None)
    without = ""
    if (request.n_layers, request.d_model, request.embedding_dim) != (None, None, None):
        without = " without the forced n_layers, d_model or embedding_dim"
    if free != request and _solve([replace(free, embedding_ratio=request.embedding_ratio or 0.35)]):
        return f"it is feasible{without}"
    tables = 1 if request.tie_embeddings else 2
    asked = request.embedding_ratio or 0.35
    unit = tables * request.vocab_size / request.total_params
    widths = _widths(replace(free, embedding_dim=WIDTH_STEP), WIDE)
    for width in sorted(widths, key=lambda width: abs(width * unit - asked)):
        answers = _solve([replace(free, embedding_ratio=None, d_model=width)])
        if answers:
            share = max(answers[0].params.share, 0.0001)
            return f"the nearest feasible request is embedding_ratio {share:.4f}{without}"
    total = request.total_params
    for _ in range(200):
        total = int(total * 1.1) + 1
        if _solve([replace(free, embedding_ratio=asked, total_params=total)]):
            return f"the nearest feasible request found is total_params {total:,}{without}"
    return "no nearby request is feasible"


# ------------------------------------------------------------------------------------- the report


def as_json(name: str, answer: Allocation) -> dict[str, object]:
    """One machine-readable object a cell: asked, realised, model, parameters by block."""
    request, model, params = answer.request, answer.model, answer.params
    return {
        "name": name,
        "asked": {
            "total_params": request.total_params,
            "embedding_ratio": request.embedding_ratio,
            "glu_expansion": request.glu_expansion,
        },
        "realised": {
            "total_params": params.total,
            "embedding_ratio": params.share,
            "glu_expansion": answer.glu_expansion,
        },
        "model": {
            "vocab_size": model.vocab_size,
            "d_model": model.d_model,
            "n_layers": model.n_layers,
            "n_heads": model.n_heads,
            "head_dim": model.head_dim,
            "d_ff": model.d_ff,
            "embedding_dim": model.embedding_dim,
            "tie_embeddings": model.tie_embeddings,
            "qk_norm": model.qk_norm,
        },
        "params": {
            "embedding": params.embedding,
            "projection": params.projection,
            "attention": params.attention,
            "ffn": params.ffn,
            "norm": params.norm,
        },
    }


def table(answers: Mapping[str, Allocation]) -> str:
    """Asked and realised values and parameters by block, one line a cell."""
    lines = [
        f"{'experiment':<14} {'share asked -> real':>19} {'GLU asked -> real':>17} "
        f"{'d_model':>7} {'layers':>6} {'heads':>6} {'a/d':>5} {'d_ff':>5} {'embedding':>10} "
        f"{'projection':>10} {'attention':>10} {'ffn':>10} {'norm':>7} {'total':>11} {'error':>7}"
    ]
    for name, answer in answers.items():
        m, p, asked = answer.model, answer.params, answer.request.embedding_ratio
        share = f"{'-' if asked is None else f'{asked:.4f}'} -> {p.share:.4f}"
        glu = f"{answer.request.glu_expansion:.3f} -> {answer.glu_expansion:.3f}"
        heads = f"{m.n_heads}x{m.head_dim}"
        error = p.total / answer.request.total_params - 1
        lines.append(
            f"{name:<14} {share:>19} {glu:>17} {m.d_model:>7} {m.n_layers:>6} {heads:>6} "
            f"{m.n_heads * m.head_dim / m.d_model:>5.2f} {m.d_ff:>5} {p.embedding:>10,} "
            f"{p.projection:>10,} {p.attention:>10,} {p.ffn:>10,} {p.norm:>7,} {p.total:>11,} "
            f"{error:>+7.2%}"
        )
    return "\n".join(lines)
