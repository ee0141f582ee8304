"""Activations that are computed while y is still in a register, and their gradients.

1. One family: v from 0 to `top` stays, below 0 it is multiplied by `slope`, above `top` it becomes
   `top`. Their gradients need y alone, because slope > 0 keeps the sign (Rota Bulo et al. 2018,
   section 3.2) and slope = 0 lets nothing through where y is 0. At a kink the gradient is that of
   the negative side or, at the top, of the flat one.
2. Curves, for inference alone: several v have the same y, so that no slope follows from it.
"""

from __future__ import annotations

from math import inf
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Activation(NamedTuple):
    """y = v <= 0 ? slope * v : min(v, top), where slope = 0 gives 0 and NaN stays NaN."""

    slope: float
    top: float
    curve: int = 0
    """Which of CURVES it is instead, counted from 1."""


LINEAR = Activation(1.0, inf)
NAMED = {"relu": Activation(0.0, inf), "relu6": Activation(0.0, 6.0)}
HARD_SIGMOID, HARD_SWISH, SILU = "hard_sigmoid", "hard_swish", "silu"
CURVES = {
    name: Activation(1.0, inf, number + 1)
    for number, name in enumerate((HARD_SIGMOID, HARD_SWISH, SILU))
}
LEAKY = "leaky_relu"


def of(value: Any) -> Activation | None:
    """The activation that a public argument asks for; None if there is no such."""
    if value is None:
        return LINEAR
    if isinstance(value, str):
        name = str.__str__(value)
        return NAMED.get(name) or CURVES.get(name)
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str):
        name, slope = str.__str__(value[0]), value[1]
        is_number = isinstance(slope, Real) and not isinstance(slope, bool)
        if name == LEAKY and is_number and 0 < slope < 1 and 0 < float(slope) < 1:
            return Activation(float(slope), inf)
    return None


def apply_curve(activation: Activation, v: NDArray[Any]) -> NDArray[Any]:
    """A curve of float32 or float64: hard_sigmoid and hard_swish of Howard et al. (2019), silu of
    Elfwing, Uchibe & Doya (2018)."""
    share: NDArray[Any]
    if activation == CURVES[SILU]:
        e = np.exp(-np.abs(v))
        share = np.where(v < 0, e, v.dtype.type(1)) / (1 + e)
    else:
        share = np.clip(v + 3, 0, 6) / 6
    if activation == CURVES[HARD_SIGMOID]:
        return share
    y: NDArray[Any] = np.where(v == -inf, v.dtype.type(0), v * share)
    return y
