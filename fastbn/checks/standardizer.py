"""What a standardizer is made of."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastbn.checks.vectors import channel_vector, owner_of
from fastbn.checks.words import as_float, described, first_bad, is_number

if TYPE_CHECKING:
    from fastbn._batch import Batch

Vector = NDArray[np.float64]


def vectors(mean: Any, std: Any) -> tuple[Vector, Vector]:
    """As many of both, finite, std above 0."""
    mean = _numbers("mean", mean)
    owner = owner_of(mean)
    both = [channel_vector(n, a, owner) for n, a in (("mean", mean), ("std", _numbers("std", std)))]
    mean, std = (np.asarray(a, np.float64) for a in both)
    _finite("mean", mean, ~np.isfinite(mean), "a finite number")
    _finite("std", std, ~(np.isfinite(std) & (std > 0)), "a finite number above 0")
    return mean, std


def _numbers(name: str, value: Any) -> Any:
    """A list or tuple of numbers as an array; anything else as it came."""
    if not isinstance(value, list | tuple):
        return value
    for channel, number in enumerate(value):
        if not is_number(number):
            raise TypeError(
                f"{name}[{channel}] is {described(number)}, expected a number, one for each "
                "channel; pass a list of floats, or an ndarray"
            )
    return np.array([as_float(number) for number in value])


def _finite(name: str, vector: Vector, bad: NDArray[np.bool_], expected: str) -> None:
    channel = first_bad(bad)
    if channel is not None:
        remedy = "divide a constant channel by 1" if name == "std" else "take NaN out before"
        raise ValueError(
            f"{name} is {vector[channel]} in channel {channel}, expected {expected} in every "
            f"channel; {remedy}"
        )


def divisor(value: Any) -> float:
    """A finite number that is not 0."""
    if not is_number(value):
        raise TypeError(f"divisor is {described(value)}, expected a number; pass one, as 255")
    number = as_float(value)
    if not (number > 0 and math.isfinite(number)):
        raise ValueError(
            f"divisor is {number}, expected a finite number above 0; it is what x is divided by "
            "before mean and std, 1 for nothing"
        )
    return number


def progress(value: Any) -> None:
    """A function, or None."""
    if value is not None and not callable(value):
        raise TypeError(
            f"progress is {described(value)}, expected a function of the number of samples so far, "
            "or None; pass one, as print"
        )


def like_the_first(batch: Batch, first: Batch) -> None:
    """A batch of the first one's type, rank and channels."""
    x, known = batch.array, first.array
    for what, came, expected in (
        ("dtype", x.dtype, known.dtype),
        ("rank", x.ndim, known.ndim),
        ("a number of channels of", batch.channels, first.channels),
    ):
        if came != expected:
            raise ValueError(
                f"{batch.name} has {what} {came}, expected {expected}, as {first.name} has; pass "
                "batches of one kind of data"
            )
