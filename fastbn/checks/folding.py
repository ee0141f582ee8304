"""The weights that batch norm is folded into."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn.checks.arrays import ANY, array
from fastbn.checks.vectors import Owner, widened
from fastbn.checks.words import code_of, whole_number
from fastbn.errors import shown


def weight(value: Any) -> NDArray[Any]:
    """The weights of a linear layer or convolution: rank 2 or more; half types are widened."""
    a = array("weight", value, ANY)
    if a.ndim < 2:
        code = code_of("weight", value)
        remedy = f"with {code}[:, None]" if a.ndim else f"with {code}[None, None]"
        raise ValueError(
            f"weight has rank {a.ndim} (shape {a.shape}), expected rank 2 or more: output and "
            f"input channels, then any others; add what is missing {remedy}"
        )
    return widened(a)


def groups(value: Any, layer: NDArray[Any]) -> int:
    """The groups of a convolution: a whole number that divides its weight's first axis."""
    n = whole_number("groups", value, "a whole number", "pass 1 for none")
    if n < 1 or layer.shape[0] % n:
        raise ValueError(
            f"groups is {shown(n)}, expected a divisor of {layer.shape[0]} (axis 0 of weight's "
            f"shape {layer.shape}); pass the groups of the convolution, 1 for none"
        )
    return n


def outputs(layer: NDArray[Any], groups: int, transposed: bool) -> Owner:
    """The output channels of a layer, however its weight has them."""
    axis, in_groups = (1, f", {groups} groups") if transposed else (0, "")
    channels = layer.shape[axis] * (groups if transposed else 1)
    return Owner(
        channels,
        f"weight has {channels} output channels (axis {axis} of shape {layer.shape}{in_groups})",
    )


def inputs(layer: NDArray[Any]) -> Owner:
    """The inputs of a linear layer."""
    if layer.ndim != 2:
        raise ValueError(
            f"weight has rank {layer.ndim} (shape {layer.shape}), expected (out, in) where "
            "before is True; fold each place of a larger kernel by itself, if nothing is padded"
        )
    return Owner(
        layer.shape[1], f"weight has {layer.shape[1]} inputs (axis 1 of shape {layer.shape})"
    )


def folded(name: str, value: NDArray[Any]) -> None:
    """Weights or a bias that batch norm was folded into: all finite."""
    bad = np.argwhere(~np.isfinite(value))
    if bad.size:
        place = tuple(int(i) for i in bad[0])
        raise ValueError(
            f"{name}{list(place)} would be {value[place]}, expected a finite number in "
            f"{value.dtype}; look at this channel's mean, var, gamma and beta, or keep the batch "
            "norm: fastbn.normalize computes from x - mean"
        )
