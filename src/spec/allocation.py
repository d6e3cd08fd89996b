"""From a request (budget, share, expansion) to final integers. Closed form; imports no torch.

Notation: T parameters in all, V vocabulary, d = d_model, a = n_heads * head_dim, L layers,
F = d_ff, E = embedding_dim. Per layer: attention 4 d a, FFN 3 d F, norms. For each (d, heads, L)
the tolerances of total, share and expansion are one interval of F, so the search visits every
multiple of 8 that is allowed: a refusal is a proof (a test compares it with brute force).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from operator import truediv

from src.spec.config import DEFAULT_SHARE, ModelConfig, ModelRequest


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
    """A request and the model that serves it."""

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
        share = self.request.embedding_ratio
        return 0.0 if share is None else abs(self.params.share - share)

    @property
    def glu_error(self) -> float:
        return abs(self.glu_expansion / self.request.glu_expansion - 1)

    @property
    def errors(self) -> tuple[float, float, float]:
        """What is made small, in this order: GLU, then total, then share."""
        return (self.glu_error, self.total_error, self.share_error)


# ------------------------------------------------------------------------------------ the bounds


@dataclass(frozen=True, kw_only=True, slots=True)
class Tolerance:
    """How far a model may be from its request (fractions; share in absolute terms)."""

    total: float
    share: float
    glu: float
    attention: float  # |a / d - 1| where depth absorbs the budget
    layers: int = 128  # no recipe is known for four times the deepest published near this size


STRICT = Tolerance(total=0.005, share=0.0125, glu=0.05, attention=0.10)
WIDE = Tolerance(total=0.005, share=0.015, glu=0.12, attention=0.10)
# With heads of 32, d = 112 has no attention width nearer than 96 or 128.
WIDEST = replace(WIDE, attention=0.15)
# A frame that is stated leaves few expansions where layers are few: d 280 with 8 heads of 32 has
# none between 3.51 (5 layers) and 4.60 (4 layers) in 10M parameters with 16k tokens.
PINNED = replace(WIDEST, glu=0.20)
TIERS = (STRICT, WIDE, WIDEST)  # the first that has a shape is used
ROUNDING = 1e-9  # of the divisions above: a total that is off by exactly 0.5 % is allowed

WIDTH_STEP = 8  # d_model and d_ff are multiples of it
SMALL_MODEL = 3_000_000  # under it heads of 16 are allowed
# MobileLLM-350M and SmolLM2-360M, the deepest published near this size, have half as many layers.
DEEP_LAYERS = 64  # the dry run warns beyond it
MIN_HEADS = 2  # one head is another kind of model: it attends to one thing at a time
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


# ------------------------------------------------------------------------------------ the search


@dataclass(frozen=True, slots=True)
class _Frame:
    """What the experiments of a group share. Depth absorbs the budget (n_layers 0: any), or the
    number of heads does (n_heads 0: any)."""

    d_model: int
    head_dim: int
    n_heads: int
    n_layers: int


def _allocation(request: ModelRequest, frame: _Frame, n_layers: int, d_ff: int) -> Allocation:
    model = ModelConfig(
        d_model=frame.d_model, n_layers=n_layers, n_heads=frame.n_heads, head_dim=frame.head_dim,
        d_ff=d_ff, vocab_size=request.vocab_size, embedding_dim=request.embedding_dim,
        tie_embeddings=request.tie_embeddings, qk_norm=request.qk_norm,
    )  # fmt: skip
    return Allocation(request=request, model=model, params=count_params(model))


def _multiples(low: float, high: float) -> range:
    """The multiples of 8 from `low` to `high`, above 0."""
    first = max(1, math.ceil(low / WIDTH_STEP))
    return range(first * WIDTH_STEP, math.floor(high / WIDTH_STEP) * WIDTH_STEP + 1, WIDTH_STEP)


def _nearest(allowed: range, target: float) -> set[int]:
    """The members of `allowed` that lie nearest to `target`, one on each side."""
    if not allowed:
        return set()
    below = math.floor(target / WIDTH_STEP) * WIDTH_STEP
    return {min(max(width, allowed[0]), allowed[-1]) for width in (below, below + WIDTH_STEP)}


def _widths(request: ModelRequest, tolerance: Tolerance) -> Sequence[int]:
    """All d_model whose embedding keeps the share within tolerance (or the forced one)."""
    if request.d_model is not None:
        return [request.d_model]
    total, rank, share = request.total_params, request.embedding_dim, request.embedding_ratio
    largest = _widest(request, tolerance)
    if rank is not None:
        return _multiples(rank, largest)
    assert share is not None
    low = (share - tolerance.share - ROUNDING) * total * (1 - tolerance.total - ROUNDING)
    high = (share + tolerance.share + ROUNDING) * total * (1 + tolerance.total + ROUNDING)
    return _multiples(low / _column(request), min(high / _column(request), largest))


def _column(request: ModelRequest) -> int:
    """Embedding parameters of one unit of width."""
    return (1 if request.tie_embeddings else 2) * request.vocab_size


def _widest(request: ModelRequest, tolerance: Tolerance) -> float:
    """The d at which the embedding and one narrow layer, c d^2, are the whole budget."""
    attention_is_free = request.allocate == "attention" or request.n_heads is not None
    attention = 0.0 if attention_is_free else 4 * (1 - tolerance.attention)
    c = attention + 3 * request.glu_expansion * (1 - tolerance.glu)
    half = 0.0 if request.embedding_dim else _column(request) / (2 * c)
    return math.sqrt(half**2 + 1.01 * request.total_params / c) - half


def _frames(request: ModelRequest, tolerance: Tolerance, n_layers: int) -> Iterator[_Frame]:
    """Every width with every number of heads; of any number where `n_layers` is given (not 0)."""
    small = request.total_params < SMALL_MODEL
    head_dims = (request.head_dim,) if request.head_dim else (16, 32, 64) if small else (32, 64)
    for width in _widths(request, tolerance):
        for head_dim in head_dims:
            slack = (tolerance.attention + ROUNDING) * width
            low = max(MIN_HEADS, math.ceil((width - slack) / head_dim))
            counts: Sequence[int] = range(low, math.floor((width + slack) / head_dim) + 1)
            if n_layers or (request.n_heads and request.head_dim):  # a width that the user chose
                counts = (request.n_heads or 0,)
            elif request.n_heads:
                counts = [n for n in counts if n == request.n_heads]
            for n_heads in counts:
                yield _Frame(width, head_dim, n_heads, n_layers)


def _budget(request: ModelRequest, embedding: int, tolerance: Tolerance) -> tuple[float, float]:
    """The least and the most parameters in all that total and share allow."""
    slack, share = tolerance.total + ROUNDING, request.embedding_ratio
    least, most = request.total_params * (1 - slack), request.total_params * (1 + slack)
    if share is not None:
        slack = tolerance.share + ROUNDING
        least = max(least, embedding / (share + slack))
        most = min(most, embedding / (share - slack)) if share > slack else most
    return least, most


def _shapes(request: ModelRequest, frame: _Frame, tolerance: Tolerance) -> Iterator[Allocation]:
    """At this frame, the allowed d_ff nearest to the asked one for every depth (and number of
    heads) that leaves an allowed one."""
    if frame.n_layers and not frame.n_heads:
        per_head = frame.n_layers * 4 * frame.d_model * frame.head_dim
        most_heads = math.floor(1.01 * request.total_params / per_head)
        for n_heads in range(MIN_HEADS_AS_SLACK, most_heads + 1):
            yield from _shapes(request, replace(frame, n_heads=n_heads), tolerance)
        return
    empty, one_layer = (_allocation(request, frame, layers, 0).params for layers in (0, 1))
    fixed = one_layer.total - empty.total  # parameters of one layer without its FFN
    unit = 3 * frame.d_model  # of one row of d_ff
    least, most = _budget(request, empty.embedding + empty.projection, tolerance)
    least, most = least - empty.total, most - empty.total
    target = request.glu_expansion * frame.d_model
    slack = (tolerance.glu + ROUNDING) * target
    widths = _multiples(target - slack, target + slack)
    if not widths:
        return
    low = math.ceil(least / (fixed + unit * widths[-1]))
    high = math.floor(most / (fixed + unit * widths[0]))
    forced = frame.n_layers or request.n_layers
    if forced:
        low, high = max(low, forced), min(high, forced)
    for n_layers in range(max(low, 1), min(high, tolerance.layers) + 1):
        if _natural(request, frame.d_model, n_layers):
            bounds = [(total / n_layers - fixed) / unit for total in (least, most)]
            allowed = _multiples(max(bounds[0], widths[0]), min(bounds[1], widths[-1]))
            for d_ff in _nearest(allowed, target):
                yield _allocation(request, frame, n_layers, d_ff)


def _natural(request: ModelRequest, d_model: int, n_layers: int) -> bool:
    """Whether depth suits width, asked only where nothing else fixes the width."""
    if request.embedding_dim is None or request.d_model is not None or request.n_layers is not None:
        return True
    return abs(math.log(d_model) - 5.039 - 0.0555 * n_layers) <= ASPECT_SLACK


def _fit(request: ModelRequest, frame: _Frame, *tolerances: Tolerance) -> Allocation | None:
    """The best shape at this frame, within the first tolerance that has one."""
    fits = (
        min(_shapes(request, frame, tolerance), key=lambda a: a.errors, default=None)
        for tolerance in tolerances
    )
    return next(filter(None, fits), None)


def _ranked(request: ModelRequest, tolerance: Tolerance, n_layers: int) -> list[_Frame]:
    """The frames at which the request has a shape, the best first."""
    fits = {f: fit for f in _frames(request, tolerance, n_layers)
            if (fit := _fit(request, f, tolerance))}  # fmt: skip

    def preference(frame: _Frame) -> tuple[float, ...]:
        """GLU error, then the usual head_dim and d_model % 32 == 0, then total, then share."""
        model, (glu_error, *others) = fits[frame].model, fits[frame].errors
        usual = 16 if request.total_params < SMALL_MODEL else 32 if model.d_model < 512 else 64
        surplus = abs(model.n_heads * model.head_dim - model.d_model)
        return (glu_error, model.head_dim != usual, model.d_model % 32 != 0, *others, surplus)

    return sorted(fits, key=preference)


def _tiers(request: ModelRequest) -> tuple[Tolerance, ...]:
    return (*TIERS, PINNED) if request.d_model and request.n_heads else TIERS


def _solve(group: Sequence[ModelRequest], anchor: ModelRequest) -> list[Allocation] | None:
    """The shapes of experiments that must share a frame: the anchor's best that serves all."""
    for n_layers in _kept_depths(group, anchor) if anchor.allocate == "attention" else (0,):
        possible = _ranked(anchor, _tiers(anchor)[-1], n_layers)
        for tolerance in _tiers(anchor) if possible else ():  # else all tiers are as empty
            for frame in _ranked(anchor, tolerance, n_layers):
                fits = [fit for request in group if (fit := _fit(request, frame, *_tiers(request)))]
                if len(fits) == len(group):
                    return fits
    return None


def _kept_depths(group: Sequence[ModelRequest], anchor: ModelRequest) -> Sequence[int]:
    """Where attention absorbs the budget: the depth of the largest expansion in the same sweep
    with depth as the slack, then its two next best depths."""
    by_depth = [replace(request, allocate="depth") for request in group]
    widest = max(by_depth, key=lambda request: request.glu_expansion)
    allocations = _solve(by_depth, replace(anchor, allocate="depth")) or []
    depths = [fit.model.n_layers for fit in allocations if fit.request == widest]
    loosest = _tiers(widest)[-1]
    fits = (_fit(widest, frame, loosest) for frame in _ranked(widest, loosest, 0))
    depths += [fit.model.n_layers for fit in fits if fit]
    return list(dict.fromkeys(depths))[:3]


def groups(
    requests: Mapping[str, ModelRequest], baseline: str | None
) -> dict[str, dict[str, ModelRequest]]:
    """Experiments that differ in their expansion alone, by the name of the group's anchor: the
    `baseline` where it belongs to the group, else the group's first."""
    alike: dict[ModelRequest, dict[str, ModelRequest]] = {}
    for name, request in requests.items():
        alike.setdefault(replace(request, glu_expansion=1.0), {})[name] = request
    return {baseline if baseline in group else next(iter(group)): group for group in alike.values()}


def allocate(
    requests: Mapping[str, ModelRequest], baseline: str | None = None
) -> dict[str, Allocation]:
    """The shapes of one sweep's experiments; `baseline` where they share what they ask for.

    A group (see `groups`) has one d_model and, where depth absorbs the budget, one attention width.
    Its anchor chooses them as if it were alone, so that an experiment which is added changes no
    other, unless it has no shape there; then all stand at the anchor's next best frame that serves
    them, and the dry run says which experiment moved which. Raises ValueError, naming the
    experiments, with what came nearest and the way out as YAML.
    """
    allocations: dict[str, Allocation] = {}
    refused: list[dict[str, ModelRequest]] = []
    for anchor, group in groups(requests, baseline).items():
        assert baseline or len(set(group.values())) == 1, "name the sweep's baseline"
        solved = _solve(list(group.values()), group[anchor])
        if solved is None:
            refused.append(group)
        else:
            allocations.update(zip(group, solved, strict=True))
    if refused:
        raise ValueError(_refusal(refused))
    return {name: allocations[name] for name in requests}


# -------------------------------------------------------------------------------------- refusals

PINS = ("n_layers", "d_model", "n_heads", "head_dim", "embedding_dim")
NUMBERS = ("total_params", "vocab_size", "embedding_ratio", "glu_expansion")
NEAR = Tolerance(total=0.005, share=0.05, glu=0.9, attention=0.3, layers=1_000)  # worth showing


def _refusal(refused: Sequence[Mapping[str, ModelRequest]]) -> str:
    """What was found and came nearest, group by group, and one way out for all of them."""
    messages, changes = [], []
    for group in refused:
        infeasible = {name: r for name, r in group.items() if _solve([r], r) is None}
        why = f"no shape of at most {WIDE.layers} layers"
        if not infeasible:
            why = "each has a shape in a sweep of its own, but no d_model and heads common to all"
        failing = infeasible or group
        first = next(iter(failing.values()))
        messages.append(
            f"experiments {', '.join(failing)}: {_requested(list(failing.values()))}: {why} is "
            f"within {WIDE.total:.1%} of the total, {100 * WIDE.share:.1f} points of the share and "
            f"{_tiers(first)[-1].glu:.0%} of the expansion\n{_nearest_shapes(first)}"
        )
        if way_out := _way_out(list(group.values())):
            keys = [f"    {key}: {'null' if v is None else v}" for key, v in way_out.items()]
            changes += [line for name in group for line in (f"  - name: {name}", *keys)]
    if changes:
        messages += ["The way out, to add to the keys of these experiments:", "experiments:"]
        messages += changes
    return "\n".join(messages)


def _requested(requests: Sequence[ModelRequest]) -> str:
    """What the file asks for, apart from values that are the defaults and may not stand in it."""
    default_request = replace(ModelRequest(), embedding_ratio=DEFAULT_SHARE)
    stated, defaults = list[str](), list[str]()
    for key in (*NUMBERS, "tie_embeddings", "allocate", *PINS):
        values = sorted({getattr(request, key) for request in requests} - {None})
        if values and (key in NUMBERS or values != [getattr(default_request, key)]):
            texts = [f"{v:,}" if type(v) is int else f"{v:.4g}" if type(v) is float else
                     str(v).lower() for v in values]  # fmt: skip
            listed = stated if values != [getattr(default_request, key)] else defaults
            listed.append(f"{key} {' and '.join(texts)}")
    by_default = f" (by default {', '.join(defaults)})" if defaults else ""
    return f"found {', '.join(stated)}{by_default}"


def _nearest_shapes(request: ModelRequest) -> str:
    """The shapes that came nearest, as a table."""
    widest = (WIDE.glu, WIDE.total, WIDE.share)
    frames = _frames(replace(request, allocate="depth"), NEAR, 0)
    near = (shape for frame in frames for shape in _shapes(request, frame, NEAR))
    shapes = sorted(islice(near, 4_000), key=lambda a: sum(map(truediv, a.errors, widest)))
    lines = ["Nearest: d_model n_layers heads d_ff |  total error  share error  GLU error"]
    for shape in shapes[:5]:
        model = shape.model
        heads = f"{model.n_heads}x{model.head_dim}"
        lines.append(
            f"         {model.d_model:7d} {model.n_layers:8d} {heads:>5s} {model.d_ff:4d} | "
            f"{shape.total_error:12.2%} {100 * shape.share_error:9.2f} pt {shape.glu_error:10.1%}"
        )
    return "\n".join(lines) if shapes else "No shape comes near: none has room for one whole layer."


def _way_out(group: Sequence[ModelRequest]) -> dict[str, object] | None:
    """Keys that make the group feasible: without what forces its shape, else at the d_model of the
    nearest share (with a usual depth, if any), else in the nearest larger budget."""
    first = group[0]
    forced: dict[str, object] = {key: None for key in PINS if getattr(first, key) is not None}
    share = first.embedding_ratio or DEFAULT_SHARE

    def solved(changes: Mapping[str, object]) -> list[Allocation] | None:
        changed = [replace(request, **changes) for request in group]  # type: ignore[arg-type]
        return _solve(changed, changed[0])

    unforced = {**forced, "embedding_ratio": share} if forced else forced
    relaxations: tuple[dict[str, object], ...] = ({"n_layers": None}, {"n_heads": None})
    for changes in (*relaxations, unforced):
        if changes.keys() & forced.keys() and solved(changes):
            return changes
    unit = _column(first) / first.total_params
    widths = _multiples(0, _widest(replace(first, embedding_dim=None), WIDEST))
    fallback: dict[str, object] | None = None
    for width in sorted(widths, key=lambda width: abs(width * unit - share)):
        changes = {**forced, "embedding_ratio": None, "d_model": width}
        if shapes := solved(changes):
            changes["embedding_ratio"] = max(round(shapes[0].params.share, 4), 0.0001)
            if all(2 <= a.model.n_layers <= DEEP_LAYERS for a in shapes):
                return changes
            fallback = fallback or changes
    total = first.total_params
    while fallback is None and (total := int(total * 1.1) + 1) <= 10**10:
        changes = {**unforced, "total_params": total}
        fallback = changes if solved(changes) else None
    return fallback
