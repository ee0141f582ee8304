"""What running statistics are averages of, and how far from the exact average they may be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from oracle.arrays import Array, Wide, wide
from oracle.bounds import bound_mean, bound_var, unit
from oracle.formulas import moments


class Averaged(NamedTuple):
    """A statistic of each channel: the initial value, and then what each batch has."""

    values: Wide
    """(1 + batches, C)"""
    bound: Wide
    """How far an average of them may be off: as far as the worst of them, and each step rounds to
    the layer's type, after at most eight roundings to float64."""


def averaged(
    batches: Sequence[Array], layout: str, unbiased: bool, dtype: Any
) -> dict[str, Averaged]:
    """Both statistics, as they enter the running ones of a layer of `dtype`."""
    rows = [wide(x, layout) for x in batches]
    means, variances = zip(*map(moments, rows), strict=True)
    bounds = [bound_mean(m, v, 0.0) for m, v in zip(means, variances, strict=True)]
    if unbiased:
        counts = (np.longdouble(x.shape[1]) for x in rows)
        variances = tuple(v * n / (n - 1) for v, n in zip(variances, counts, strict=True))
    return {
        "running_mean": _averaged(0, means, bounds, dtype),
        "running_var": _averaged(1, variances, [bound_var(v) for v in variances], dtype),
    }


def _averaged(initial: int, found: Sequence[Wide], bounds: Sequence[Wide], dtype: Any) -> Averaged:
    values = np.stack([np.full_like(found[0], initial), *found])
    rounding = len(found) * (unit(dtype) / 2 + 8 * 2.0**-53)
    return Averaged(values, np.max(bounds, 0) + rounding * np.abs(values).max(0))


def exponential(new: Any, steps: int) -> Wide:
    """The weights of the initial value and of each batch, where a batch weighs `new` at first."""
    new = np.longdouble(new)
    return np.array([(1 - new) ** steps, *(new * (1 - new) ** np.arange(steps)[::-1])])


def equal(steps: int) -> Wide:
    """The weights where each batch has the same, and the initial value none."""
    return np.array([0, *[np.longdouble(1) / steps] * steps])
