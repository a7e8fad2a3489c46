"""The critical dimension of LongRoPE2 (arXiv 2502.20082): which pairs turn less than once in the trained window.

Pairs from the critical one on never saw a whole period in training. They must be rescaled by at least s, so a search
in this space looks for their factors alone. The pairs below follow NTK: RoPE of a larger base theta', under which
lambda_i = (theta' / theta)^(2i/d). Where theta' is chosen such that the critical pair r gets its searched factor,

    theta' = theta * lambda_r^(d / 2r),   so   lambda_i = lambda_r^(i / r)   for i < r.
"""

from __future__ import annotations

import math

from searcher.errors import LongRopeError
from searcher.rope import RopeSpec

AUTO = "auto"


def critical_pair(spec: RopeSpec) -> int:
    """ceil((d/2) log_theta(L0 / 2 pi)), the first pair whose period exceeds L0; the paper's d_tcd is twice it.

    Clipped to the pairs there are: 0 where every period exceeds L0, the last pair where none does.
    """
    index = math.ceil(spec.pairs * math.log(spec.original_length / (2 * math.pi)) / math.log(spec.theta))
    return min(max(index, 0), spec.pairs - 1)


def practical_pair(choice: str | int, spec: RopeSpec) -> int:
    """The critical pair a user asks for: ``auto`` is the theoretical one, a number is itself.

    The paper's own practical ones lie below the theoretical (LLaMA3-8B 30 for 35, Phi3-mini 25 for 31), since high
    dimensions are under-trained.

    Raises
    ------
    LongRopeError
        Neither ``auto`` nor the index of a pair.
    """
    if choice == AUTO:
        return critical_pair(spec)
    try:
        index = int(choice)
    except ValueError:
        index = -1
    if not 0 <= index < spec.pairs:
        raise LongRopeError(
            f"The critical pair is auto ({critical_pair(spec)} for this model) or a whole number from 0 to "
            f"{spec.pairs - 1}, not {choice!r}."
        )
    return index


def ntk_below(critical_lambda: float, critical: int) -> list[float]:
    """Factors of the pairs below the critical one, highest frequency first: lambda_r^(i / r)."""
    return [critical_lambda ** (i / critical) for i in range(critical)]
