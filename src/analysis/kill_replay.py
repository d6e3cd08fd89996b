"""The kill rule over complete curves: what it would have done."""

from __future__ import annotations

from dataclasses import dataclass

from src.spec.kill_rule import Curve, KillRule, verdict


@dataclass(frozen=True, slots=True)
class Replay:
    """One complete run under a kill rule: where it would have died, and how it ended without.

    final_gap_ppl: its perplexity above the baseline's at the end. budget: its tokens.
    """

    killed_at: int | None
    final_gap_ppl: float
    budget: int

    @property
    def false_kill(self) -> bool:
        """Whether the rule stopped a run that was no worse in the end."""
        return self.killed_at is not None and self.final_gap_ppl <= 0

    @property
    def tokens_saved(self) -> int:
        return 0 if self.killed_at is None else self.budget - self.killed_at


def replay(baseline: Curve, run: Curve, rule: KillRule) -> Replay:
    """What a kill rule would have done to a run that was allowed to finish.

    Raises ValueError unless both curves are complete, that is, end at the same token count.
    """
    ends = [curve[-1] for curve in (baseline, run) if curve]
    if len(ends) < 2 or ends[0][0] != ends[1][0]:
        raise ValueError(
            "a replay needs complete curves that end at the same token count, found "
            f"{' and '.join(f'{tokens:,}' for tokens, _ in ends) or 'none'}."
        )
    (tokens, reference), (_, reached) = ends
    return Replay(verdict(rule, baseline, run).tokens, reached - reference, tokens)
