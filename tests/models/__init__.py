"""A model and a tokenizer to be exported."""

from __future__ import annotations

import torch

from src.models.transformer import Transformer
from src.spec.config import ModelConfig

EOT = "<|endoftext|>"


def small_model(seed: int = 0, **changes: object) -> Transformer:
    values: dict[str, object] = {
        "vocab_size": 300,
        "d_model": 24,
        "n_layers": 2,
        "n_heads": 2,
        "head_dim": 16,  # attention width 32, not d_model
        "d_ff": 40,
    }
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(**(values | changes)))  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        # gains away from 1 and weights large enough that a swapped matrix shows
        with torch.no_grad():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif "table" in name:
                parameter.mul_(10)
            else:
                parameter.mul_(2)
    return model
