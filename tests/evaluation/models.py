"""A model small enough to be read token by token."""

from __future__ import annotations

import torch

from src.models.transformer import Transformer
from src.spec.config import ModelConfig


def small_transformer(vocab_size: int, scale: float = 4.0) -> Transformer:
    """Its weights `scale` times as large as at first, so that it prefers some tokens."""
    torch.manual_seed(0)
    sizes = {"d_model": 16, "n_layers": 2, "n_heads": 2, "head_dim": 8, "d_ff": 32}
    model = Transformer(ModelConfig(vocab_size=vocab_size, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model
