"""Activations that are computed while y is still in a register, and their gradients.

One family: v from 0 to `top` stays, below 0 it is multiplied by `slope`, above `top` it becomes
`top`. Their gradients need y alone, because slope > 0 keeps the sign (Rota Bulo et al. 2018,
section 3.2) and slope = 0 lets nothing through where y is 0. At a kink the gradient is that of the
negative side or, at the top, of the flat one.
"""

from __future__ import annotations

from math import inf
from numbers import Real
from typing import Any, NamedTuple


class Activation(NamedTuple):
    """y = v <= 0 ? slope * v : min(v, top), where slope = 0 gives 0 and NaN stays NaN."""

    slope: float
    top: float


LINEAR = Activation(1.0, inf)
NAMED = {"relu": Activation(0.0, inf), "relu6": Activation(0.0, 6.0)}
LEAKY = "leaky_relu"


def of(value: Any) -> Activation | None:
    """The activation that a public argument asks for; None if there is no such."""
    if value is None:
        return LINEAR
    if isinstance(value, str):
        return NAMED.get(str.__str__(value))
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str):
        name, slope = str.__str__(value[0]), value[1]
        is_number = isinstance(slope, Real) and not isinstance(slope, bool)
        if name == LEAKY and is_number and 0 < slope < 1 and 0 < float(slope) < 1:
            return Activation(float(slope), inf)
    return None
