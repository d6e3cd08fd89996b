"""The section `training` of an experiment file, with its defaults and units. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from src.spec.strict_yaml import key, one_of


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """One run's optimisation. A batch counts sequences; tokens a step = batch_size * seq_len."""

    tokens: int = key(50_000_000, "a number of tokens above 0", lambda v: v > 0)
    ranking_tokens: int = key(5_000_000, "a number of tokens above 0", lambda v: v > 0)
    batch_size: int = key(256, "a number of sequences above 0", lambda v: v > 0)
    # None: batch_size. A short budget needs steps: 5M tokens are 153 steps of 256 x 128.
    ranking_batch_size: int | None = key(
        None, "a number of sequences above 0, or null", lambda v: v > 0
    )
    seq_len: int = key(128, "a number of tokens of at least 2", lambda v: v >= 2)
    learning_rate: float = key(4e-3, "a rate above 0, at most 1", lambda v: 0 < v <= 1)
    # Of the token table's learning rate to that of all other weights.
    embedding_lr_ratio: float = key(1.0, "a ratio above 0, at most 100", lambda v: 0 < v <= 100)
    warmup_fraction: float = key(0.05, "a fraction from 0 to below 1", lambda v: 0 <= v < 1)
    weight_decay: float = key(0.1, "a number from 0 to 10", lambda v: 0 <= v <= 10)
    # Weight of (log of the softmax's sum)^2 in the training loss; no part of any loss reported.
    z_loss: float = key(1e-4, "a number from 0 to 1", lambda v: 0 <= v <= 1)
    grad_clip: float = key(1.0, "a norm above 0", lambda v: v > 0)
    init_seed: int | None = key(None, "a seed from 0 to 2^31, or null", lambda v: 0 <= v < 2**31)
    data_seed: int | None = key(None, "a seed from 0 to 2^31, or null", lambda v: 0 <= v < 2**31)
    # None: a twentieth of the budget, and a hundredth of it within 8,192..131,072 tokens.
    eval_every_tokens: int | None = key(None, "tokens above 0, or null", lambda v: v > 0)
    dev_tokens: int | None = key(None, "tokens above 0, or null", lambda v: v > 0)
    checkpoint_minutes: float = key(15.0, "minutes above 0", lambda v: v > 0)
    checkpoint_every_steps: int | None = key(None, "steps above 0, or null", lambda v: v > 0)
    precision: str = one_of("auto", "auto", "fp32", "bf16", "fp16")
    micro_batch: int | None = key(None, "sequences above 0, or null", lambda v: v > 0)
    loss_chunk: int | None = key(None, "rows of logits above 0, or null", lambda v: v > 0)
    compile: str = one_of("auto", "auto", "on", "off")
    threads: int | None = key(None, "threads above 0, or null", lambda v: 0 < v <= 1024)
    deterministic: bool = key(False, "true or false")

    @property
    def step_tokens(self) -> int:
        """Tokens of one optimizer step."""
        return self.batch_size * self.seq_len

    @property
    def steps(self) -> int:
        """Optimizer steps of the budget, the last one whole."""
        return math.ceil(self.tokens / self.step_tokens)

    @property
    def total_tokens(self) -> int:
        """Tokens of all steps: `tokens`, rounded up to whole steps."""
        return self.steps * self.step_tokens

    @property
    def warmup_steps(self) -> int:
        return math.ceil(self.warmup_fraction * self.steps)

    @property
    def eval_every_steps(self) -> int:
        """Steps between dev evaluations, at least one."""
        every = self.eval_every_tokens or self.tokens / 20
        return max(1, round(every / self.step_tokens))

    @property
    def dev_token_budget(self) -> int:
        """Dev tokens read at each evaluation during training."""
        return self.dev_tokens or min(131_072, max(8_192, self.tokens // 100))

    def check(self, where: str, ranking: str = "") -> None:
        """Refuse (ValueError) values that do not fit each other. ranking: `ranking_` where tokens
        and batch are those of the keys of that name."""
        if self.tokens < self.step_tokens:
            raise ValueError(
                f"{where}training.{ranking}tokens: found {self.tokens:,}, expected at least one "
                f"step of batch_size x seq_len = {self.step_tokens:,} tokens; lower "
                f"training.{ranking}batch_size"
            )
        if self.steps > 1 and self.warmup_steps >= self.steps:
            raise ValueError(
                f"{where}training.warmup_fraction: found {self.warmup_fraction}, which warms up "
                f"for {self.warmup_steps} of {self.steps} steps; expected fewer"
            )
        if self.micro_batch is not None and self.batch_size % self.micro_batch:
            raise ValueError(
                f"{where}training.micro_batch: found {self.micro_batch}, expected a divisor of "
                f"batch_size {self.batch_size}"
            )
