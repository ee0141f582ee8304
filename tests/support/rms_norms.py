"""RMS norm of rows, (R, C), against its oracle and its bounds."""

from __future__ import annotations

import numpy as np

from oracle.arrays import Array, vector
from oracle.bounds import (
    bound_added,
    bound_mean_square,
    bound_rms_dgamma,
    bound_rms_dx,
    bound_rms_y,
    stored,
)
from oracle.formulas import rms_backward, rms_normalize
from support.judge import Judged


def judge_forward(
    y: Array, mean_square: Array, x: Array, gamma: Array | None, eps: float
) -> list[Judged]:
    """What a forward gave for these arguments, beside what it should."""
    of_gamma, wide = np.float32 if gamma is None else gamma.dtype, x.astype(np.longdouble)
    exact = np.square(wide).mean(1)
    of_y = rms_normalize(wide, exact, vector(gamma, 1, x.shape[1]), eps)
    bound = stored(x.dtype, of_y, bound_rms_y(x.dtype, of_gamma, of_y))
    return [
        Judged(mean_square, exact, bound_mean_square(exact), "mean_square"),
        Judged(y, of_y, bound, "y"),
    ]


def judge_backward(
    found: tuple[Array, Array | None],
    dy: Array,
    x: Array,
    mean_square: Array,
    gamma: Array | None,
    eps: float,
    dsum: Array | None = None,
) -> list[Judged]:
    """What a backward gave for these arguments, beside what it should."""
    d, values, m = (a.astype(np.longdouble) for a in (dy, x, mean_square))
    exact = rms_backward(d, values, m, vector(gamma, 1, x.shape[1]), eps)
    expected, bound = exact.dx, bound_rms_dx(x.dtype, exact)
    if dsum is not None:
        expected = exact.dx + dsum.astype(np.longdouble)
        bound = bound_added(x.dtype, expected, bound)
    dx, dgamma = found
    judged = [Judged(dx, expected, stored(x.dtype, expected, bound), "dx")]
    if dgamma is not None:
        bound = bound_rms_dgamma(dgamma.dtype, exact)
        judged.append(Judged(dgamma, exact.dgamma, bound, "dgamma"))
    return judged
