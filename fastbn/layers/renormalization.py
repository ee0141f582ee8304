"""Batch renormalization: what ties a batch's own statistics to the running ones.

Training normalizes by the batch, evaluation by the running statistics; in a small or unlike batch
these are far apart. ``y = gamma * (r * xhat + d) + beta`` with ``r = s_B / s`` and
``d = (mean_B - mean) / s`` is what evaluation gives; clipped, and constants in the gradient, they
let the batch's statistics work as far as the limits say: Ioffe (2017), Algorithm 1. Its running s
is an average of deviations; here s is that of the running variance, by which evaluation goes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastbn import checks
from fastbn.backends.base import inverse_deviation, quiet

Array = NDArray[Any]


class Limits(NamedTuple):
    """r stays within 1 / r_max and r_max, d within -d_max and d_max."""

    r_max: float
    d_max: float


class Correction(NamedTuple):
    """r and d of each channel."""

    r: Array
    d: Array

    @quiet
    def parameters(self, gamma: Array | None, beta: Array | None) -> tuple[Array, Array]:
        """Scale and shift of a renormalized batch, in float64."""
        scale = 1.0 if gamma is None else gamma.astype(np.float64)
        shift = 0.0 if beta is None else beta
        return scale * self.r, scale * self.d + shift

    @quiet
    def gradients(self, dgamma: Array, dbeta: Array, dtype: str) -> dict[str, Array]:
        """The gradients of gamma and beta from those of a renormalized batch's scale and shift."""
        dgamma = self.r * dgamma + self.d * dbeta
        return {"dgamma": dgamma.astype(dtype), "dbeta": dbeta.astype(dtype)}


@dataclass(frozen=True, kw_only=True)
class Renormalization:
    """The limits of a layer's batch renormalization, and when they open.

    Up to `start` batches ``r = 1`` and ``d = 0``, which is batch norm. Then the limits open in
    proportion to the number of batches, up to `r_max` at `r_end` and `d_max` at `d_end`. The
    defaults are those of Ioffe (2017), section 4.

    Parameters
    ----------
    r_max : float
        The most that r ever is, 1 or more; 1 / r_max is the least.
    d_max : float
        The most that d ever is, 0 or more; -d_max is the least.
    start, r_end, d_end : int
        Batches that the running statistics are of; `start` is no more than either end.

    Raises
    ------
    TypeError, ValueError
        An argument has a wrong type or value.

    Examples
    --------
    >>> import fastbn
    >>> limits = fastbn.Renormalization(r_max=3.0, d_max=5.0, start=100, r_end=300, d_end=200)
    >>> limits.at(50), limits.at(200), limits.at(1000)
    (Limits(r_max=1.0, d_max=0.0), Limits(r_max=2.0, d_max=5.0), Limits(r_max=3.0, d_max=5.0))
    """

    r_max: float = 3.0
    d_max: float = 5.0
    start: int = 5000
    r_end: int = 40000
    d_end: int = 25000

    def __post_init__(self) -> None:
        checked = {
            "r_max": checks.layers.limit(
                "r_max", self.r_max, 1, "that r is within 1 / r_max and r_max"
            ),
            "d_max": checks.layers.limit(
                "d_max", self.d_max, 0, "that d is within -d_max and d_max"
            ),
            **checks.layers.schedule(self.start, r_end=self.r_end, d_end=self.d_end),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def at(self, batches: int) -> Limits:
        """The limits after so many batches."""
        r, d = (self._opened(batches, end) for end in (self.r_end, self.d_end))
        return Limits(1 + r * (self.r_max - 1), d * self.d_max)

    def _opened(self, batches: int, end: int) -> float:
        """How far limits that are open at the end are open now."""
        if batches >= end:
            return 1.0
        return 0.0 if batches < self.start else (batches - self.start) / (end - self.start)


@quiet
def correction(
    mean: Array, var: Array, running_mean: Array, running_var: Array, eps: float, limits: Limits
) -> Correction:
    """r and d of a batch; where ``running_var + eps`` is 0 they are 1 / r_max and 0. Closed limits
    ask nothing of the running statistics, which may be NaN."""
    rstd = inverse_deviation(running_var.astype(np.float64), eps)
    r, d = np.ones_like(rstd), np.zeros_like(rstd)
    if limits.r_max > 1:
        r = np.clip(np.sqrt(var + eps) * rstd, 1 / limits.r_max, limits.r_max)
    if limits.d_max > 0:
        d = np.clip((mean - running_mean) * rstd, -limits.d_max, limits.d_max)
    return Correction(r, d)
