"""What two published scaling laws predict for the share of the embedding table: pure formulas.

Both were fitted far from here (33M to 3B parameters on billions of tokens; depths of 6 to 48): read
at 10M parameters they are extrapolations, made so that they can be wrong.
"""

from __future__ import annotations

import math

from scipy.optimize import brentq, minimize_scalar

# --- Tao et al. 2024, arXiv 2407.13623, approach 3 ----------------------------------------------
# Constants as the authors' release prints them: github.com/sail-sg/scaling-with-vocab,
# optimal_Nv_predict.py at 8a59af1. Parameters count in millions, tokens in billions.
TAO_SOURCE = "Tao et al. 2024, arXiv 2407.13623, approach 3"
TAO_E = 5.5327846803337435
TAO_A1, TAO_ALPHA1 = 1.8313851559554126, 0.44660634152009615  # parameters outside the table
TAO_A2, TAO_ALPHA2 = 0.19584238398665638, 0.6707374679896795  # parameters of the table
TAO_B, TAO_BETA = 2.1241123120064955, 0.44660634152009615  # tokens


def tao_loss(table: float, rest: float, tokens: float) -> float:
    """Unigram-normalised loss in nats a token: -E + A1 / N_nv^a1 + A2 / N_v^a2 + B / D^b.

    table: parameters V d; rest: all others; tokens: training tokens. At one vocabulary and one D a
    difference of two such losses is a difference of plain losses, ln of a perplexity ratio.
    """
    body = TAO_A1 / (rest / 1e6) ** TAO_ALPHA1
    words = TAO_A2 / (table / 1e6) ** TAO_ALPHA2
    return -TAO_E + body + words + TAO_B / (tokens / 1e9) ** TAO_BETA


def tao_log_ratio(share: float, reference: float, total: float, other_total: float) -> float:
    """ln(PPL / PPL of the reference): shares of `total` and of `other_total` parameters.

    Tokens and vocabulary are the same on both sides and cancel.
    """
    ours = tao_loss(share * total, (1 - share) * total, 1e9)
    return ours - tao_loss(reference * other_total, (1 - reference) * other_total, 1e9)


def tao_best_share(total: float) -> float:
    """The share of `total` parameters at which the law's loss is lowest."""
    result = minimize_scalar(
        lambda share: tao_loss(share * total, (1 - share) * total, 1e9),
        bounds=(1e-3, 1 - 1e-3),
        method="bounded",
    )
    return float(result.x)


# --- Levine et al. 2020, arXiv 2006.12467 -------------------------------------------------------
# ln d = a + b L is the width at which a depth L stops paying. The two constants are from memory:
# no text that we could read prints them. They are held to the abstract's one number, a width of 30K
# for 10^12 parameters (the test), which the pair gives within 2 %.
LEVINE_SOURCE = "Levine et al. 2020, arXiv 2006.12467 (constants from memory)"
LEVINE_A, LEVINE_B = 5.039, 0.0555


def levine_depth(d_model: float) -> float:
    """Layers that suit a width: (ln d - a) / b. Negative below d = 154, where the law is silent."""
    return (math.log(d_model) - LEVINE_A) / LEVINE_B


def levine_best_share(total: float, vocab_size: int) -> float:
    """The share of a tied table V d when depth suits width: V d + 12 L d^2 = total.

    Layers of 12 d^2 are 4 d^2 of attention and 8 d^2 of a SwiGLU at expansion 8/3.
    """
    smallest = math.exp(LEVINE_A)
    width = brentq(
        lambda d: vocab_size * d + 12 * levine_depth(d) * d * d - total,
        smallest, max(2 * smallest, math.sqrt(total)),
    )  # fmt: skip
    return vocab_size * float(width) / total
