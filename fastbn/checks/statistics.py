"""Moments, populations, and what they are estimated from."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn.checks.arrays import array, as_ndarray
from fastbn.checks.vectors import statistic
from fastbn.checks.words import described, first_bad, is_number
from fastbn.errors import shown
from fastbn.results import GradientSums

ROUNDING = 2.0**-40
"""How near to 1 an effective number of values tells too little of n - 1."""


def count(name: str, value: Any) -> float:
    """How many values there are, or the sum of their weights: finite, zero or more; also an array
    of it alone, as sums over processes give it."""
    a = as_ndarray(value)
    number = a[()] if a is not None and a.ndim == 0 else value
    if not is_number(number):
        raise TypeError(f"{name} is {described(value)}, expected a number of values; pass an int")
    n = int(number) if isinstance(number, Integral) else float(number)
    if not 0 <= n <= sys.float_info.max:
        raise ValueError(
            f"{name} is {shown(n)}, expected a finite number, zero or more: how many values a "
            "channel has"
        )
    return n


def column_counts(counts: NDArray[Any]) -> None:
    """How many values each column has, or the sums of their weights."""
    column = first_bad(~((counts >= 0) & np.isfinite(counts)))
    if column is not None:
        raise ValueError(
            f"count is {counts[column]} in column {column}, expected a finite number, zero or "
            "more: how many values the column has"
        )


def gradient_sums(
    value: Any, own: float, x_name: str, x: NDArray[Any], layout: str
) -> GradientSums:
    """dgamma, dbeta and count of a whole batch: vectors of float64, and at least x's own count."""
    if not isinstance(value, tuple | list) or len(value) != 3:
        raise TypeError(
            f"sums is {described(value)}, expected (dgamma, dbeta, count) as gradient_sums gives "
            "them, added up over all parts of the batch"
        )
    dgamma, dbeta = (
        statistic(f"sums[{i}]", value[i], x_name, x, layout, is_fixed=False) for i in (0, 1)
    )
    n = count("sums[2]", value[2])
    if n < own * (1 - ROUNDING):  # sums of weights are rounded
        raise ValueError(
            f"sums[2] is {n}, expected the values of a channel in all parts of the batch, at "
            f"least the {own} of {x_name}; add up the counts that gradient_sums gives"
        )
    return GradientSums(dgamma.astype(np.float64), dbeta.astype(np.float64), n)


def flat_moments(name: str, value: Any) -> tuple[float, float, NDArray[Any], NDArray[Any]]:
    """Two numbers about counts and two vectors of a value a channel, from one flat array."""
    a = array(name, value)
    if a.ndim != 1 or a.size % 2 or not a.size:
        raise ValueError(
            f"{name} has shape {a.shape}, expected (2 + 2 * channels,): two numbers and two "
            "vectors, as Moments gives them"
        )
    first, second = a[2:].astype(np.float64).reshape(2, -1)
    n, m = (
        count(f"{name}[{i}]", int(number) if number.is_integer() else number)
        for i, number in enumerate(a[:2].tolist())
    )
    return n, m, first, second


def effective_count(value: Any, total: float) -> float:
    """As many values as these that weigh `total` come to; where not given, they weigh 1 each."""
    if value is None:
        return max(total, 1) if total else 0
    n = count("effective_count", value)
    if n < 1 if total else n:
        raise ValueError(
            f"effective_count is {n}, expected {'1 or more' if total else 0} where count is "
            f"{total}: how many values, if all weighed the same; leave it out if they do"
        )
    return n


def squared_weights(value: float, total: float) -> float:
    """The effective number of values from the sum of their squared weights, and of their weights.

    Parts whose squares are subnormal may be among them.
    """
    if value == total:
        return effective_count(None, total)
    n = total * (float(total) / value) if value >= 2.0**-960 else 0.0
    if not 1 - ROUNDING <= n < math.inf:
        raise ValueError(
            f"sums[1] is {value} where sums[0] is {total}, expected the sum of the squared weights "
            "of values that weigh so much; add up what to_sums gives or, where squares are out of "
            "float64's range, multiply all weights by one number before"
        )
    return max(n, 1.0)


def unbiased_factor(count: float, n: float) -> float:
    """n / (n - 1), for more than one value."""
    if n <= 1 + ROUNDING:
        came = f"count is {n}" if n == count else f"effective_count is {n}"
        raise ValueError(
            f"{came}, expected more than 1: one value has no unbiased variance; "
            "give more values, or use the biased var"
        )
    return n / (n - 1)


def same_channels(mean: NDArray[Any], other: Any, kind: type) -> None:
    """Moments that can be merged."""
    if not isinstance(other, kind):
        raise TypeError(
            f"other is {described(other)}, expected {kind.__name__}; make them with "
            f"fastbn.{kind.__name__}.of(x)"
        )
    channels = len(other.mean)  # type: ignore[attr-defined]  # Moments, which import this module
    if channels != len(mean):
        raise ValueError(
            f"other has {channels} channels, expected {len(mean)}; merge moments of the same layer"
        )


def population(name: str, batches: int) -> None:
    """At least one batch with values."""
    if not batches:
        raise ValueError(
            f"{name} had no batch with values, expected one or more; an iterator is used up by one "
            "walk over it (pass a list), and a layer counts what forward calls it on"
        )


def layers(value: Any, kind: type[Any]) -> None:
    """Layers, each once."""
    if isinstance(value, kind) or not isinstance(value, Sequence) or not value:
        raise TypeError(
            f"layers is {described(value)}, expected a list of {kind.__name__}, in the order in "
            "which forward calls them; pass [layer] for one"
        )
    for i, layer in enumerate(value):
        if not isinstance(layer, kind):
            raise TypeError(
                f"layers[{i}] is {described(layer)}, expected a {kind.__name__}; leave out what "
                "is none"
            )
        if any(layer is other for other in value[:i]):
            raise ValueError(f"layers[{i}] is there twice, expected each layer once; leave it out")


def network(forward: Any) -> None:
    """What takes a batch through a network."""
    if not callable(forward):
        raise TypeError(
            f"forward is {described(forward)}, expected a callable that takes a batch and calls "
            "the layers on it; pass the network"
        )


def reiterable(batches: Any, number: int = 1) -> None:
    """Batches that can be walked over so many times."""
    if not (isinstance(batches, Iterable) or hasattr(type(batches), "__getitem__")):
        raise TypeError(
            f"batches is {described(batches)}, expected an iterable of batches; pass [batch] for "
            "one"
        )
    if number > 1 and isinstance(batches, Iterator):
        raise TypeError(
            f"batches is {described(batches)}, which can be walked over once, expected something "
            f"for {number} walks, one a layer; pass a list, or sequential=False"
        )
