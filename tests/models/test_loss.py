"""The chunked loss: the plain one's value and gradients, in a fraction of its memory."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from src.models.loss import chunked_cross_entropy

N, E, V = 37, 24, 101


def plain_cross_entropy(hidden, table, targets, z_loss):
    """torch's own, over logits held whole."""
    logits = F.linear(hidden, table).float()
    nats = F.cross_entropy(logits, targets)
    return nats + z_loss * logits.logsumexp(-1).square().mean(), nats.detach()


def problem(n: int = N, e: int = E, v: int = V, scale: float = 1.0):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, e, generator=generator)
    table = scale * torch.randn(v, e, generator=generator)
    return hidden, table, torch.randint(v, (n,), generator=generator)


def run(loss, problem, z_loss, upstream=1.0, **options):
    """(objective, nats, d hidden, d table) of `upstream` * objective."""
    hidden, table, targets = problem
    hidden, table = hidden.clone().requires_grad_(), table.clone().requires_grad_()
    objective, nats = loss(hidden, table, targets, z_loss, **options)
    assert objective.ndim == nats.ndim == 0 and objective.dtype == nats.dtype == torch.float32
    assert not nats.requires_grad  # a number to look at, nothing to train on
    (upstream * objective).backward()
    return objective.detach(), nats, hidden.grad, table.grad


@pytest.mark.parametrize("z_loss", [0.0, 1e-4, 0.3])
@pytest.mark.parametrize("chunk", [1, 5, 36, 37, 38, 1000])
def test_value_and_gradients_equal_the_plain_loss(chunk, z_loss):
    expected = run(plain_cross_entropy, problem(), z_loss)
    found = run(chunked_cross_entropy, problem(), z_loss, chunk=chunk)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_rows_equal_eager_ones(dtype):
    """Chunks of 16: two compiled, the last 5 rows eager. Compiled, sums in bf16 are of values that
    are not rounded yet."""
    eager = run(chunked_cross_entropy, problem(), 1e-2, chunk=16, dtype=dtype)
    compiled = run(chunked_cross_entropy, problem(), 1e-2, chunk=16, dtype=dtype, compiled=True)
    for ours, theirs in zip(compiled, eager, strict=True):
        bound = 2e-5 if dtype.itemsize > 2 else 3e-3
        assert float((ours - theirs).norm()) <= bound * float(theirs.norm())


def test_the_gradient_is_the_derivative():
    hidden, table, targets = problem(5, 3, 7)

    def objective(h, t):
        return chunked_cross_entropy(h, t, targets, 0.2, chunk=2, dtype=torch.float32)[0]

    hidden.requires_grad_()
    table.requires_grad_()
    objective(hidden, table).backward()
    step = 1e-2
    for tensor in (hidden, table):
        for index in [(0, 0), (2, 1), (4, 2)]:
            with torch.no_grad():
                tensor[index] += step
                up = objective(hidden, table)
                tensor[index] -= 2 * step
                down = objective(hidden, table)
                tensor[index] += step
            slope = float((up - down) / (2 * step))
            assert slope == pytest.approx(float(tensor.grad[index]), abs=2e-4)


def test_the_upstream_gradient_scales_ours():
    one = run(chunked_cross_entropy, problem(), 1e-4, chunk=8)
    many = run(chunked_cross_entropy, problem(), 1e-4, 1024.0, chunk=8)
    for ours, theirs in zip(one[2:], many[2:], strict=True):
        assert torch.equal(1024 * ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_stays_near_float32(dtype):
    """Tolerance: 8 (11) bits of a product are 0.4 % (0.05 %) each, and errors average out."""
    exact = run(plain_cross_entropy, problem(), 1e-4)
    rough = run(chunked_cross_entropy, problem(), 1e-4, chunk=8, dtype=dtype)
    bound = {torch.bfloat16: 0.01, torch.float16: 0.002}[dtype]
    assert float(rough[0] / exact[0]) == pytest.approx(1.0, abs=bound)
    for ours, theirs in zip(rough[2:], exact[2:], strict=True):
        assert ours.dtype == torch.float32
        assert float((ours - theirs).norm() / theirs.norm()) < bound


def test_float16_keeps_the_gradient_of_a_large_batch():
    """p / N is 1e-8 here, less than float16 can hold: the division has to wait."""
    large = problem(4096, 8, 16_000, scale=0.02)
    exact = run(chunked_cross_entropy, large, 0.0)
    rough = run(chunked_cross_entropy, large, 0.0, 65536.0, dtype=torch.float16)
    for ours, theirs in zip(rough[2:], exact[2:], strict=True):
        assert float((ours / 65536 - theirs).norm() / theirs.norm()) < 0.01


def test_uniform_logits_cost_ln_v():
    hidden, table, targets = problem()
    objective, nats = chunked_cross_entropy(0 * hidden, table, targets, 0.5)
    assert float(nats) == pytest.approx(math.log(V), rel=1e-6)
    assert float(objective) == pytest.approx(math.log(V) + 0.5 * math.log(V) ** 2, rel=1e-6)


def test_large_logits_stay_finite_and_nan_is_seen():
    hidden, table, targets = problem(scale=1e4)
    found = run(chunked_cross_entropy, (hidden, table, targets), 1e-4)
    assert all(torch.isfinite(value).all() for value in found)
    hidden[3, 2] = float("nan")
    objective, nats = chunked_cross_entropy(hidden, table, targets, 1e-4)
    assert math.isnan(float(objective)) and math.isnan(float(nats))
