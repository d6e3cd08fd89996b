"""The search over shapes: properties of every allocation, and brute force finds nothing better."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.spec.allocation import allocate
from src.spec.config import ModelRequest
from tests.spec import (
    assert_sound,
    built_params,
    integers,
    one,
    request,
    way_out,
)

REQUESTS = st.builds(
    ModelRequest,
    total_params=st.floats(5.31, 7.7).map(lambda exponent: int(10**exponent)),
    vocab_size=st.floats(2.41, 5.1).map(lambda exponent: int(10**exponent)),
    embedding_ratio=st.floats(0.02, 0.8),
    glu_expansion=st.one_of(st.sampled_from([2.0, 2.66, 8 / 3, 3.0, 4.0]), st.floats(1.0, 6.0)),
    tie_embeddings=st.booleans(),
    qk_norm=st.booleans(),
    allocate=st.sampled_from(["depth", "attention"]),
)


def check_shape_or_way_out(request: ModelRequest) -> None:
    try:
        shape = one(request)
    except ValueError as error:
        changes = way_out(str(error))["x"]
        assert_sound(one(replace(request, **changes)))  # type: ignore[arg-type]
    else:
        assert_sound(shape)
        assert built_params(shape.model) == shape.params.total or shape.model.n_layers > 60


@settings(max_examples=20)
@given(asked=REQUESTS)
def test_a_shape_is_within_tolerance_and_a_refusal_names_a_way_out(asked):
    check_shape_or_way_out(asked)


@settings(max_examples=15)
@given(
    asked=REQUESTS,
    force=st.sampled_from(["n_layers", "d_model", "embedding_dim", "n_heads"]),
    size=st.integers(1, 40),
)
def test_the_same_holds_for_forced_shapes(asked, force, size):
    value = 8 * size if force in ("d_model", "embedding_dim") else size
    check_shape_or_way_out(replace(asked, **{force: value}))


@settings(max_examples=8)
@given(asked=REQUESTS, factors=st.sets(st.sampled_from([1.5, 2.0, 2.66, 3.0, 4.0]), min_size=2))
def test_experiments_of_one_sweep_share_their_frame_or_are_refused(asked, factors):
    requests = {f"g{f}": replace(asked, glu_expansion=f) for f in factors}
    first = next(iter(requests))
    try:
        shapes = allocate(requests, first)
    except ValueError as error:
        changes = way_out(str(error))
        assert changes.keys() == requests.keys()
        assert allocate({name: replace(r, **changes[name]) for name, r in requests.items()}, first)  # type: ignore[arg-type]
        return
    assert len({(a.model.d_model, a.model.head_dim) for a in shapes.values()}) == 1
    fixed = "n_heads" if asked.allocate == "depth" else "n_layers"
    assert len({getattr(a.model, fixed) for a in shapes.values()}) == 1
    for shape in shapes.values():
        assert_sound(shape)


def brute_force(request: ModelRequest) -> float | None:
    """The smallest GLU error of all multiples of 8, or None: the search told by its definition."""
    embedding_ratio = request.embedding_ratio
    tables = 1 if request.tie_embeddings else 2
    dims = (16, 32, 64) if request.total_params < 3_000_000 else (32, 64)
    column = tables * request.vocab_size
    top = request.total_params * 1.01
    for share, glu, attention in ((0.0125, 0.05, 0.10), (0.015, 0.12, 0.10), (0.015, 0.12, 0.15)):
        best = math.inf
        # Smaller tables have a smaller share; with larger ones not even one layer is left.
        first = max(8, int((embedding_ratio - share) * 0.99 * request.total_params / column))
        for d in range(first // 8 * 8 or 8, int(math.sqrt(top / 3)) + 8, 8):
            if column * d > top * (embedding_ratio + share):
                break
            for head_dim in dims:
                for heads in range(2, 2 * d // head_dim + 2):
                    a = heads * head_dim
                    if abs(a / d - 1) > attention + 1e-9:
                        continue
                    qk = 2 * head_dim if request.qk_norm else 0
                    for layers in range(1, 129):
                        rest = column * d + d + layers * (4 * d * a + 2 * d + qk)
                        for d_ff in range(8, int(request.glu_expansion * d * (1.01 + glu)) + 9, 8):
                            total = rest + layers * 3 * d * d_ff
                            if total > top:
                                break
                            error = abs(d_ff / d / request.glu_expansion - 1)
                            if (
                                abs(total / request.total_params - 1) <= 0.005 + 1e-9
                                and abs(column * d / total - embedding_ratio) <= share + 1e-9
                                and error <= glu + 1e-9
                            ):
                                best = min(best, error)
                        if rest > top:
                            break
        if best < math.inf:
            return best
    return None


def searched(
    total: float, share: float, glu: float, width: int, tied: bool, qk_norm: bool
) -> ModelRequest:
    """A request whose share means about `width`, so that many are feasible and none is slow."""
    column = share * 10**total / width
    return ModelRequest(
        total_params=int(10**total),
        vocab_size=max(257, int(column if tied else column / 2)),
        embedding_ratio=share,
        glu_expansion=glu,
        tie_embeddings=tied,
        qk_norm=qk_norm,
    )


SEARCHED = st.builds(
    searched,
    total=st.one_of(st.sampled_from([6.0, 7.0]), st.floats(5.5, 7.3)),
    share=st.one_of(st.sampled_from([0.1, 0.25, 0.35, 0.45]), st.floats(0.08, 0.6)),
    glu=st.one_of(st.sampled_from([2.0, 2.66, 8 / 3, 3.0, 4.0]), st.floats(1.0, 6.0)),
    width=st.integers(60, 500),
    tied=st.booleans(),
    qk_norm=st.booleans(),
)


def assert_equals_brute_force(request: ModelRequest) -> bool:
    """Whether the request is feasible, which the allocator and brute force agree about."""
    best = brute_force(request)
    try:
        shape = one(request)
    except ValueError:
        assert best is None, f"refused, but a GLU error of {best} is possible"
        return False
    assert best is not None and shape.glu_error == best
    return True


@settings(max_examples=100)
@given(asked=SEARCHED)
def test_the_search_finds_what_brute_force_finds(asked):
    assert_equals_brute_force(asked)


@pytest.mark.parametrize(
    ("values", "shape"),
    [
        ({"vocab_size": 8_000, "embedding_ratio": 0.393, "glu_expansion": 2.0},
         (472, 3, "14x32", 864)),
        ({"embedding_ratio": 0.435}, (264, 7, "8x32", 696)),
        ({"total_params": 5_000_000, "vocab_size": 8_000, "embedding_ratio": 0.521,
          "glu_expansion": 2.0}, None),
    ],
)  # fmt: skip
def test_shapes_that_lie_far_from_the_asked_expansion_are_found(values, shape):
    allocation = one(request(**values))
    assert shape is None or integers(allocation) == shape
    assert_sound(allocation)
    assert assert_equals_brute_force(allocation.request)
