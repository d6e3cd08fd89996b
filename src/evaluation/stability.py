"""How rough a training run was: the largest rise from one step to the next. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

# A rise of the training loss in one step that figures and tables call a jump, in nats.
JUMP_NATS = 1.0


@dataclass(kw_only=True, slots=True)
class LargestRise:
    """The largest rise of one number from a step to the next; below zero where it only fell.

    Its fields are plain numbers, so that they travel in a checkpoint and a resumed run ends with
    the values of an uninterrupted one. Every step counts, whether metrics.jsonl has its row or not.
    """

    last: float | None = None  # of the step before
    rise: float | None = None  # None until two finite steps in a row
    step: int | None = None  # that the largest rise led to

    def see(self, step: int, value: float) -> None:
        """Take a step's value; one that is not finite (an fp16 step left out) is no rise."""
        if not math.isfinite(value):
            self.last = None
            return
        if self.last is not None and (self.rise is None or value - self.last > self.rise):
            self.rise, self.step = value - self.last, step
        self.last = value


class Stability:
    """The largest one-step rises of a run's training loss and gradient norm (before clipping)."""

    def __init__(self) -> None:
        self.loss, self.norm = LargestRise(), LargestRise()

    def see(self, step: int, loss: float, norm: float) -> None:
        self.loss.see(step, loss)
        self.norm.see(step, norm)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"loss": asdict(self.loss), "norm": asdict(self.norm)}

    def load(self, state: dict[str, Any]) -> None:
        self.loss, self.norm = LargestRise(**state["loss"]), LargestRise(**state["norm"])

    def metrics(self) -> dict[str, float | int | None]:
        """The keys of metrics.json."""
        return {
            "loss_largest_rise_nats": self.loss.rise,
            "loss_largest_rise_step": self.loss.step,
            "grad_norm_largest_rise": self.norm.rise,
            "grad_norm_largest_rise_step": self.norm.step,
        }
