"""The shipped sweeps that separate share from shape are built as their files say."""

from __future__ import annotations

import math

import pytest
import torch

from src.models.transformer import Transformer
from src.spec.allocation import Allocation
from tests.spec import shapes_of, shipped

SWEEPS = ("frontier", "factorised", "depth_control", "transfer_100m")
MINIATURES = ("miniature_frontier", "miniature_factorised", "miniature_depth_control",
              "miniature_lr")  # fmt: skip


def built(name: str) -> list[Allocation]:
    return list(shapes_of(shipped(name)).values())


@pytest.mark.parametrize("name", SWEEPS + MINIATURES)
def test_every_configuration_meets_its_request_and_the_built_model_its_count(name):
    allocations = built(name)
    for allocation in allocations:
        assert allocation.total_error <= 0.005 and allocation.share_error <= 0.0125
        assert allocation.glu_error <= 0.07
        with torch.device("meta"):
            model = Transformer(allocation.model)
        assert sum(p.numel() for p in model.parameters()) == allocation.params.total
    # One head dimension a sweep: no difference between configurations hides there.
    assert len({allocation.model.head_dim for allocation in allocations}) == 1


@pytest.mark.parametrize(
    ("name", "unit", "head_dim"), [("frontier", 640, 32), ("miniature_frontier", 320, 16)]
)
def test_the_frontier_is_an_exact_grid_from_25_to_50_percent(name, unit, head_dim):
    allocations = sorted(built(name), key=lambda allocation: allocation.model.d_model)
    widths = [unit * share // 100 for share in (25, 30, 35, 40, 45, 50)]
    assert [a.model.d_model for a in allocations] == widths
    assert {a.model.head_dim for a in allocations} == {head_dim}
    for allocation in allocations:
        model, request = allocation.model, allocation.request
        exact = model.vocab_size * model.d_model / request.total_params
        assert exact == model.d_model / unit == request.embedding_ratio
        assert abs(model.n_heads * head_dim / model.d_model - 1) <= 0.10 + 1e-9
    depths = [a.model.n_layers for a in allocations]
    assert depths == [26, 17, 11, 8, 6, 4]  # the confound: depth is a function of share


@pytest.mark.parametrize("name", ["factorised", "miniature_factorised"])
def test_the_factorised_sweep_moves_share_at_one_width_and_nearly_one_depth(name):
    allocations = sorted(built(name), key=lambda allocation: allocation.params.share)
    shares = [a.params.share for a in allocations]
    assert len(allocations) == 6 and shares[0] < 0.11 and shares[-1] >= 0.35
    assert len({(a.model.d_model, a.model.n_heads) for a in allocations}) == 1
    assert {a.model.n_layers for a in allocations} <= {9, 10, 11, 12}
    for allocation in allocations:
        model = allocation.model
        assert allocation.params.embedding == model.vocab_size * model.embedding_dim
        assert allocation.params.projection == model.embedding_dim * model.d_model


@pytest.mark.parametrize("name", ["depth_control", "miniature_depth_control"])
def test_depth_control_trades_ffn_for_attention_alone(name):
    allocations = built(name)
    models = [a.model for a in allocations]
    assert len({(m.d_model, m.n_layers, m.head_dim) for m in models}) == 1
    assert [m.d_ff for m in models] == sorted(m.d_ff for m in models)
    assert [m.n_heads for m in models] == sorted((m.n_heads for m in models), reverse=True)
    assert min(m.n_heads for m in models) >= 4


def test_the_transfer_keeps_the_study_s_depths_at_ten_times_its_size():
    small = {round(a.params.share, 2): a.model.n_layers for a in built("frontier")}
    sweep = shipped("transfer_100m")
    assert sweep.seeds == (0, 1) and len(sweep.runs) == 2
    for allocation in built("transfer_100m"):
        near = min(small, key=lambda share: abs(share - allocation.params.share))
        assert abs(math.log(allocation.model.n_layers / small[near])) < 0.11
        assert allocation.request.vocab_size <= 65_535  # tokens are two bytes


def test_full_sweeps_share_tokens_batch_and_length():
    runs = [run for name in SWEEPS[:3] for run in shipped(name).runs]
    assert {(r.training.tokens, r.training.batch_size, r.training.seq_len) for r in runs} == {
        (50_000_000, 64, 512)
    }
    runs = [run for name in MINIATURES for run in shipped(name).runs]
    assert {(r.training.tokens, r.training.batch_size, r.training.seq_len) for r in runs} == {
        (524_288, 16, 128)
    }
    names = [run.experiment for run in runs]
    assert len(set(names)) == len(names) and all(name.startswith("mini-") for name in names)
