"""Next-token cross-entropy that never holds float32 logits of a whole batch.

Shapes: N rows (tokens), E width of the head's input, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx


def plain_cross_entropy(
    hidden: Tensor, table: Tensor, targets: Tensor, z_loss: float
) -> tuple[Tensor, Tensor]:
    """Reference: (N, E), (V, E), (N,) -> (objective, mean nats), both scalars in float32.

    objective = mean(nats) + z_loss * mean(logsumexp^2) (PaLM, arXiv 2204.02311).
    """
    logits = F.linear(hidden, table).float()  # (N, V)
    log_z = torch.logsumexp(logits, dim=-1)
    nats = (log_z - logits.gather(1, targets[:, None])[:, 0]).mean()
    return nats + z_loss * log_z.square().mean(), nats.detach()


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes the gradient during the forward pass, one chunk of rows at a time.

    Only the gradients of `hidden` (N, E) and `table` (V, E) outlive a chunk; the (chunk, V)
    logits stay in cache on a CPU and are reused buffers on a GPU. The idea of fusing the head
    with its loss is Liger's and Cut Cross-Entropy's (arXiv 2411.09009).
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        table: Tensor,
        targets: Tensor,
        z_loss: float,
        chunk: int,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        n = hidden.shape[0]
        weight = table.to(dtype)
        rows = hidden.to(dtype)
        grad_hidden = torch.empty_like(rows)
        grad_table = torch.zeros_like(table, dtype=torch.float32)
        objective = torch.zeros((), device=hidden.device)
        nats = torch.zeros((), device=hidden.device)
        for start in range(0, n, chunk):
            part = rows[start : start + chunk]
            target = targets[start : start + chunk, None]
            logits = F.linear(part, weight).float()  # (chunk, V)
            log_z = torch.logsumexp(logits, dim=-1, keepdim=True)
            lost = (log_z - logits.gather(1, target)).sum()
            nats += lost
            objective += lost + z_loss * log_z.square().sum()
            # N * d objective / d logits = softmax * (1 + 2 z log_z) - onehot. The division by N
            # waits for `backward`: here it would underflow in float16.
            logits.sub_(log_z).exp_().mul_(1 + 2 * z_loss * log_z)
            logits.scatter_add_(1, target, torch.full_like(log_z, -1.0))
            grad = logits.to(dtype)
            torch.mm(grad, weight, out=grad_hidden[start : start + chunk])
            grad_table += grad.T @ part
        ctx.save_for_backward(grad_hidden.to(hidden.dtype), grad_table.to(table.dtype))
        ctx.rows = n  # type: ignore[attr-defined]
        nats /= n
        ctx.mark_non_differentiable(nats)
        return objective / n, nats

    @staticmethod
    def backward(ctx, grad_objective, _grad_nats):
        grad_hidden, grad_table = ctx.saved_tensors
        scale = grad_objective / ctx.rows
        return grad_hidden * scale, grad_table * scale, None, None, None, None


def chunked_cross_entropy(
    hidden: Tensor,
    table: Tensor,
    targets: Tensor,
    z_loss: float,
    *,
    chunk: int = 256,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """As `plain_cross_entropy`, `chunk` rows at a time, matrix products in `dtype`."""
    return _ChunkedCrossEntropy.apply(hidden, table, targets, z_loss, chunk, dtype)
