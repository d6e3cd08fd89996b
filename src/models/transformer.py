"""The language model: a pre-norm SwiGLU transformer built from final integers only.

Shapes: B batch, T tokens, D d_model, A attention width (n_heads * head_dim), H heads, K head_dim,
F d_ff, V vocabulary, E embedding_dim. Conventions (rotate-half RoPE, per-head RMSNorm of queries
and keys before RoPE, silu(gate) * up) are those of Qwen3, or Llama without QK-norm, so that
`src.models.export` only has to rename weights.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.spec.config import ModelConfig

# Longest sequence whose attention a CPU computes without PyTorch's bf16 kernel.
CPU_SHORT_SEQUENCE = 512
# Queries of a block of attention written out: half of the scores at most are computed in vain.
QUERY_BLOCK = 128
# (query, key): what is added to a score. A table, because compiled code would compute a condition
# on positions entry by entry.
_CAUSAL = torch.full((CPU_SHORT_SEQUENCE, CPU_SHORT_SEQUENCE), -math.inf).triu(1)


class KVCache:
    """Keys and values of all layers for incremental decoding; `length` tokens are valid."""

    def __init__(
        self, config: ModelConfig, batch: int, max_len: int, dtype: torch.dtype, device: object
    ) -> None:
        shape = (config.n_layers, batch, config.n_heads, max_len, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)  # type: ignore[call-overload]
        self.values = torch.zeros_like(self.keys)
        self.length = 0

    def nbytes(self) -> int:
        return 2 * self.keys.numel() * self.keys.element_size()

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, H, T, K) after the valid part; return everything up to the new end."""
        end = self.length + key.shape[2]
        self.keys[layer, :, :, self.length : end] = key
        self.values[layer, :, :, self.length : end] = value
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


def rope_tables(length: int, head_dim: int, theta: float, device: torch.device) -> Tensor:
    """(2, T, K / 2): cosines and sines of Su et al. 2021 (arXiv 2104.09864)."""
    inverse = theta ** (
        -torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    )
    angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), inverse)
    return torch.stack((angles.cos(), angles.sin()))


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Apply RoPE to (B, H, T, K) with tables (2, T, K / 2)."""
    cos, sin = rope.to(x.dtype)
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang & Sennrich 2019) with a gain; computed in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps).to(x.dtype)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, H, T, K) each -> (B, H, T, K), every position attending to itself and its past.

    The backward pass of PyTorch's bf16 kernel for CPUs is slow on short sequences. There compiled
    code in bf16 writes attention out, in half to two thirds of the time of any kernel; eager code,
    which would lose by that, uses the kernel in float32 (benchmarks/NOTES.md).
    """
    if q.device.type == "cpu" and q.shape[2] <= CPU_SHORT_SEQUENCE:
        if torch.compiler.is_compiling() and v.dtype == torch.bfloat16:
            return blockwise_attention(q.to(v.dtype), k.to(v.dtype), v)
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class _BlockwiseAttention(torch.autograd.Function):
    """The gradients are written out too: left to autograd, compiled code computes the softmax
    twice, keeps the scores beside the weights, and gets the keys' gradient transposed."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outputs, saved = [], []
        for start in range(0, q.shape[2], QUERY_BLOCK):
            end = min(start + QUERY_BLOCK, q.shape[2])
            scores = q[:, :, start:end] @ k[:, :, :end].transpose(2, 3)  # (B, H, block, end)
            scores = scores.float() * q.shape[3] ** -0.5 + _CAUSAL[start:end, :end]
            # Divided by their sum after the product, where they are K wide.
            weights = (scores - scores.amax(dim=-1, keepdim=True)).exp().to(v.dtype)
            total = weights.sum(dim=-1, keepdim=True, dtype=torch.float32)
            outputs.append(((weights @ v[:, :, :end]) / total).to(v.dtype))
            saved += [weights, total]
        ctx.save_for_backward(q, k, v, *saved)
        return torch.cat(outputs, dim=2)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, *saved = ctx.saved_tensors
        grad_q = []
        grad_k, grad_v = (torch.zeros_like(x, dtype=torch.float32) for x in (k, v))
        for start in range(0, q.shape[2], QUERY_BLOCK):
            end = min(start + QUERY_BLOCK, q.shape[2])
            weights, total = saved[2 * (start // QUERY_BLOCK) :][:2]
            grad = (grad_y[:, :, start:end] / total).to(v.dtype)
            grad_v[:, :, :end] += weights.transpose(2, 3) @ grad
            slope = (grad @ v[:, :, :end].transpose(2, 3)).float()
            mean = (weights * slope).sum(dim=-1, keepdim=True) / total
            grad_scores = (weights * (slope - mean) * q.shape[3] ** -0.5).to(v.dtype)
            grad_q.append(grad_scores @ k[:, :, :end])
            grad_k[:, :, :end] += grad_scores.transpose(2, 3) @ q[:, :, start:end]
        return torch.cat(grad_q, dim=2), grad_k.to(k.dtype), grad_v.to(v.dtype)


def blockwise_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention, (B, H, T, K) each, `QUERY_BLOCK` queries at a time against their past;
    products in the inputs' type, softmax in float32. At most `CPU_SHORT_SEQUENCE` tokens."""
    return _BlockwiseAttention.apply(q, k, v)


class Attention(nn.Module):
    """Causal multi-head attention of width A, which need not equal D."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_heads, self.head_dim = config.n_heads, config.head_dim
        width = config.n_heads * config.head_dim
        self.qkv = nn.Linear(config.d_model, 3 * width, bias=False)
        self.out = nn.Linear(width, config.d_model, bias=False)
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def forward(self, x: Tensor, rope: Tensor, cache: KVCache | None, layer: int) -> Tensor:
        batch, length, _ = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.n_heads, self.head_dim)
        q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))  # each (B, H, T, K)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, rope), rotate(k, rope)
        past = 0
        if cache is not None:
            past = cache.length
            k, v = cache.extend(layer, k, v)
            q = q.to(k.dtype)
        if past == 0:
            y = causal_attention(q, k, v)
        else:
            # `is_causal` aligns the mask to the top left; new tokens see the whole past.
            seen = torch.ones(length, past + length, dtype=torch.bool, device=x.device)
            mask = seen.tril(past) if length > 1 else None
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).reshape(batch, length, -1).to(x.dtype))


class SwiGLU(nn.Module):
    """Gated feed-forward layer (Shazeer 2020, arXiv 2002.05202), gate and up fused."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.d_model, 2 * config.d_ff, bias=False)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.ffn = SwiGLU(config)

    def forward(self, x: Tensor, rope: Tensor, cache: KVCache | None, layer: int) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope, cache, layer)
        return x + self.ffn(self.ffn_norm(x))


class Embedding(nn.Module):
    """Token table (V, D), or (V, E) and a projection (E, D); serves as input or as head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        rank = config.embedding_dim
        self.table = nn.Parameter(torch.empty(config.vocab_size, rank or config.d_model))
        self.projection = nn.Parameter(torch.empty(rank, config.d_model)) if rank else None

    def embed(self, tokens: Tensor) -> Tensor:
        x = F.embedding(tokens, self.table)
        return x if self.projection is None else x @ self.projection

    def head_input(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., E): what is multiplied with the table to give logits."""
        return hidden if self.projection is None else hidden @ self.projection.T


class Transformer(nn.Module):
    """Decoder-only language model of `config`; parameters are float32.

    The number of parameters equals `src.spec.allocation.count_params(config)` exactly.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.untied_head = None if config.tie_embeddings else Embedding(config)
        self._rope = torch.empty(0)
        self._initialise()

    @property
    def head(self) -> Embedding:
        """The output table: the input's where tied."""
        return self.embedding if self.untied_head is None else self.untied_head

    def _initialise(self) -> None:
        """Normal weights; each residual output is scaled by 1/sqrt(2 L) (GPT-2).

        Matrices: sd sqrt(2 / 5D) (Nguyen & Salazar 2019, arXiv 1910.05895). Tables: sd
        min(0.02, 5/D): with a tied table a token's own logit starts near D * sd, and e^5 is less
        than 1 % of the softmax's sum at V = 16,000, so the first loss stays within 0.1 of ln V.
        """
        config = self.config
        sd = math.sqrt(2 / (5 * config.d_model))
        for name, parameter in self.named_parameters():
            if name.endswith("table"):
                nn.init.normal_(parameter, std=min(0.02, 5 / config.d_model))
            elif name.endswith("projection"):
                nn.init.normal_(parameter, std=parameter.shape[0] ** -0.5)
            elif name.endswith(("out.weight", "down.weight")):
                nn.init.normal_(parameter, std=sd / math.sqrt(2 * config.n_layers))
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=sd)

    def rope(self, start: int, length: int, device: torch.device) -> Tensor:
        """(2, T, K / 2) tables of positions start..start + length, grown for a longer one."""
        end = start + length
        if self._rope.device != device or self._rope.shape[1:2] < (end,):
            size = max(end, 512)
            config = self.config
            self._rope = rope_tables(size, config.head_dim, config.rope_theta, device)
        return self._rope[:, start:end]

    def new_cache(self, batch: int, max_len: int, dtype: torch.dtype = torch.float32) -> KVCache:
        """An empty cache for `max_len` tokens on the model's device."""
        return KVCache(self.config, batch, max_len, dtype, self.norm.weight.device)

    def hidden(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """(B, T) int64 -> (B, T, D) after the final norm; with a cache, T new tokens."""
        start = 0 if cache is None else cache.length
        x = self.embedding.embed(tokens)
        rope = self.rope(start, tokens.shape[1], tokens.device)
        for layer, block in enumerate(self.blocks):
            x = block(x, rope, cache, layer)
        if cache is not None:
            cache.length += tokens.shape[1]
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        return F.linear(self.head.head_input(hidden), self.head.table)

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """(B, T) int64 -> logits (B, T, V)."""
        return self.logits(self.hidden(tokens, cache))
