"""The chunked loss: the plain one's value and gradients, in a fraction of its memory."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from src.models.loss import chunked_cross_entropy

N, E, V = 37, 24, 101


def plain_cross_entropy(hidden, weight, targets, z_loss):
    """torch's own, over logits held whole."""
    logits = F.linear(hidden, weight).float()
    loss = F.cross_entropy(logits, targets)
    return loss + z_loss * logits.logsumexp(-1).square().mean(), loss.detach()


def problem(n: int = N, e: int = E, v: int = V, scale: float = 1.0):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, e, generator=generator)
    weight = scale * torch.randn(v, e, generator=generator)
    return hidden, weight, torch.randint(v, (n,), generator=generator)


def run(loss_function, problem, z_loss, upstream=1.0, **options):
    """(objective, nats, d hidden, d table) of `upstream` * objective."""
    hidden, weight, targets = problem
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    objective, loss = loss_function(hidden, weight, targets, z_loss, **options)
    assert objective.ndim == loss.ndim == 0 and objective.dtype == loss.dtype == torch.float32
    assert not loss.requires_grad  # a number to look at, nothing to train on
    (upstream * objective).backward()
    return objective.detach(), loss, hidden.grad, weight.grad


@pytest.mark.parametrize("z_loss", [0.0, 1e-4, 0.3])
@pytest.mark.parametrize("chunk", [1, 5, 36, 37, 38, 1000])
def test_value_and_gradients_equal_the_plain_loss(chunk, z_loss):
    references = run(plain_cross_entropy, problem(), z_loss)
    results = run(chunked_cross_entropy, problem(), z_loss, chunk=chunk)
    for actual, expected in zip(results, references, strict=True):
        torch.testing.assert_close(actual, expected, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_rows_equal_eager_ones(dtype):
    """Chunks of 16: two compiled, the last 5 rows eager. Compiled, sums in bf16 are of values that
    are not rounded yet."""
    eager = run(chunked_cross_entropy, problem(), 1e-2, chunk=16, dtype=dtype)
    compiled = run(chunked_cross_entropy, problem(), 1e-2, chunk=16, dtype=dtype, compiled=True)
    for actual, expected in zip(compiled, eager, strict=True):
        bound = 2e-5 if dtype.itemsize > 2 else 3e-3
        assert float((actual - expected).norm()) <= bound * float(expected.norm())


def test_the_gradient_is_the_derivative():
    hidden, weight, targets = problem(5, 3, 7)

    def objective(h, w):
        return chunked_cross_entropy(h, w, targets, 0.2, chunk=2)[0]

    hidden.requires_grad_()
    weight.requires_grad_()
    objective(hidden, weight).backward()
    step = 1e-2
    for tensor in (hidden, weight):
        for index in [(0, 0), (2, 1), (4, 2)]:
            with torch.no_grad():
                tensor[index] += step
                up = objective(hidden, weight)
                tensor[index] -= 2 * step
                down = objective(hidden, weight)
                tensor[index] += step
            slope = float((up - down) / (2 * step))
            assert slope == pytest.approx(float(tensor.grad[index]), abs=2e-4)


def test_the_upstream_gradient_scales_ours():
    one = run(chunked_cross_entropy, problem(), 1e-4, chunk=8)
    many = run(chunked_cross_entropy, problem(), 1e-4, 1024.0, chunk=8)
    for once, scaled in zip(one[2:], many[2:], strict=True):
        assert torch.equal(1024 * once, scaled)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_stays_near_float32(dtype):
    """Tolerance: 8 (11) bits of a product are 0.4 % (0.05 %) each, and errors average out."""
    exact = run(plain_cross_entropy, problem(), 1e-4)
    rough = run(chunked_cross_entropy, problem(), 1e-4, chunk=8, dtype=dtype)
    bound = {torch.bfloat16: 0.01, torch.float16: 0.002}[dtype]
    assert float(rough[0] / exact[0]) == pytest.approx(1.0, abs=bound)
    for actual, expected in zip(rough[2:], exact[2:], strict=True):
        assert actual.dtype == torch.float32
        assert float((actual - expected).norm() / expected.norm()) < bound


def test_float16_keeps_the_gradient_of_a_large_batch():
    """p / N is 1e-8 here, less than float16 can hold: the division has to wait."""
    large = problem(4096, 8, 16_000, scale=0.02)
    exact = run(chunked_cross_entropy, large, 0.0)
    rough = run(chunked_cross_entropy, large, 0.0, 65536.0, dtype=torch.float16)
    for actual, expected in zip(rough[2:], exact[2:], strict=True):
        assert float((actual / 65536 - expected).norm() / expected.norm()) < 0.01


def test_uniform_logits_cost_ln_v():
    hidden, weight, targets = problem()
    objective, loss = chunked_cross_entropy(0 * hidden, weight, targets, 0.5)
    assert float(loss) == pytest.approx(math.log(V), rel=1e-6)
    assert float(objective) == pytest.approx(math.log(V) + 0.5 * math.log(V) ** 2, rel=1e-6)


def test_large_logits_stay_finite_and_nan_is_seen():
    hidden, weight, targets = problem(scale=1e4)
    results = run(chunked_cross_entropy, (hidden, weight, targets), 1e-4)
    assert all(torch.isfinite(value).all() for value in results)
    hidden[3, 2] = float("nan")
    objective, loss = chunked_cross_entropy(hidden, weight, targets, 1e-4)
    assert math.isnan(float(objective)) and math.isnan(float(loss))
