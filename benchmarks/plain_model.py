"""The study's architecture as anyone would write it: the nanoGPT-style peer's model.

Same shapes, norms, RoPE, QK-norm and SwiGLU as src/models/transformer.py (a test holds the two to
the same logits), none of its choices for speed: logits of the whole micro-batch, attention in
the autocast's precision.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.spec.config import ModelConfig


class PlainBlock(nn.Module):
    """(B, T, D) -> (B, T, D)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, width = config.d_model, config.n_heads * config.head_dim
        self.heads, self.head_dim = config.n_heads, config.head_dim
        self.norm1, self.norm2 = (nn.RMSNorm(d, eps=config.norm_eps) for _ in range(2))
        self.q_norm, self.k_norm = (
            nn.RMSNorm(config.head_dim, eps=config.norm_eps) for _ in range(2)
        )
        self.qkv = nn.Linear(d, 3 * width, bias=False)
        self.out = nn.Linear(width, d, bias=False)
        self.gate_up = nn.Linear(d, 2 * config.d_ff, bias=False)
        self.down = nn.Linear(config.d_ff, d, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (
            part.view(b, t, self.heads, self.head_dim).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, dim=-1)
        )
        q, k = (rotate(norm(part), cos, sin) for norm, part in ((self.q_norm, q), (self.k_norm, k)))
        y = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, -1))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE (rotate-half) of (B, H, T, K) with tables (T, K)."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


class PlainModel(nn.Module):
    """Tied, unfactorised, with QK-norm; (B, T) ids and targets -> mean nats."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.tie_embeddings and config.embedding_dim is None and config.qk_norm
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(PlainBlock(config) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def logits(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, V)."""
        c = self.config
        device = tokens.device
        frequency = c.rope_theta ** (-torch.arange(0, c.head_dim, 2, device=device) / c.head_dim)
        angles = torch.outer(torch.arange(tokens.shape[1], device=device), frequency)
        cos, sin = (f(torch.cat((angles, angles), -1)) for f in (torch.cos, torch.sin))
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, cos, sin)
        return F.linear(self.norm(x), self.embedding.weight)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(tokens).flatten(0, 1).float(), targets.flatten())
