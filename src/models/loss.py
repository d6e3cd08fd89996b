"""Next-token cross-entropy that never holds float32 logits of a whole batch.

Shapes: N rows (tokens), E width of the head's input, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _row_gradient(
    logits: Tensor, target: Tensor, z_loss: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(chunk, V) of any type, (chunk, 1) -> unscaled gradient in that type, the float32 scale
    (chunk, 1) of its rows, summed loss, summed log_z^2. Float32 logits are overwritten.

    N * d objective / d logits = softmax * (1 + 2 z log_z) - onehot = scale * unscaled. The caller
    multiplies by the scale where tensors are E wide: one exponential and one pass fewer over the
    chunk, and nothing small to underflow in float16.
    """
    values = logits.float()
    largest = values.amax(dim=-1, keepdim=True)
    picked = values.gather(1, target)
    unscaled = values.sub_(largest).exp_().to(logits.dtype)
    total = unscaled.sum(dim=-1, keepdim=True, dtype=torch.float32)
    log_z = largest + total.log()
    scale = (1 + 2 * z_loss * log_z) / total
    of_target = (picked - largest).exp() - 1 / scale
    unscaled.scatter_(1, target, of_target.to(unscaled.dtype))
    return unscaled, scale, (log_z - picked).sum(), log_z.square().sum()


@cache
def _compiled_row_gradient() -> Callable[
    [Tensor, Tensor, float], tuple[Tensor, Tensor, Tensor, Tensor]
]:
    return torch.compile(_row_gradient, dynamic=False)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes the gradient during the forward pass, one chunk of rows at a time.

    Only the gradients of `hidden` (N, E) and `weight` (V, E) outlive a chunk; the (chunk, V) logits
    are reused buffers. The idea of fusing the head with its loss is Liger's and Cut
    Cross-Entropy's (arXiv 2411.09009).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        z_loss: float,
        chunk: int,
        dtype: torch.dtype,
        compiled: bool,
    ) -> tuple[Tensor, Tensor]:
        n = hidden.shape[0]
        chunk = min(chunk, n)
        weight_low = weight.to(dtype)
        hidden_low = hidden.to(dtype)
        grad_hidden = torch.empty_like(hidden_low)
        grad_weight = torch.empty(0)
        objective = torch.zeros((), device=hidden.device)
        loss = torch.zeros((), device=hidden.device)
        for start in range(0, n, chunk):
            chunk_hidden = hidden_low[start : start + chunk]
            target = targets[start : start + chunk, None]
            # A shorter last chunk runs eager: its shape would be compiled for itself alone.
            full_chunk = compiled and chunk_hidden.shape[0] == chunk
            row_gradient = _compiled_row_gradient() if full_chunk else _row_gradient
            logits = F.linear(chunk_hidden, weight_low)
            unscaled, scale, chunk_loss, squares = row_gradient(logits, target, z_loss)
            loss += chunk_loss
            objective += chunk_loss + z_loss * squares
            grad_hidden[start : start + chunk] = (unscaled @ weight_low) * scale
            product = unscaled.T @ (chunk_hidden * scale).to(dtype)
            grad_weight = grad_weight.add_(product) if start else product.float()
        ctx.save_for_backward(grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype))
        ctx.rows = n
        loss /= n
        ctx.mark_non_differentiable(loss)
        return objective / n, loss

    @staticmethod
    def backward(ctx, grad_objective, _grad_loss):
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grad_objective / ctx.rows
        # In place: the second is as large as the embedding weight. So backward runs once.
        return grad_hidden.mul_(scale), grad_weight.mul_(scale), None, None, None, None, None


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    z_loss: float,
    *,
    chunk: int = 512,
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    """(N, E), (V, E), (N,) -> (objective, mean loss in nats), both scalars in float32.

    objective = mean(loss) + z_loss * mean(logsumexp^2) (PaLM, arXiv 2204.02311), `chunk` rows at a
    time, matrix products in `dtype`.
    compiled: the passes over the logits between the products are one kernel.
    """
    return _ChunkedCrossEntropy.apply(hidden, weight, targets, z_loss, chunk, dtype, compiled)
