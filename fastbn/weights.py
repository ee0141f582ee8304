"""How much counts: of places that a mask selects, and of what samples weigh.

1. Weights are used times a power of two by which the largest that counts is from 1 to 2. No
   statistic, y or dx depends on their scale; but sums of weights near the ends of float64 would
   be lost, and in float32 such weights themselves.
2. How much a variance is biased follows from the effective number of values, n = (sum w)**2 /
   sum w**2 (Kish 1965, Survey Sampling): it does not change with the scale of the weights, and is
   the number of values where they weigh the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn import checks
from fastbn.backends.base import quiet

Array = NDArray[Any]

BLOCK = 16384
"""Samples whose weights are added up at a time."""
SEVERAL = 1 + 2.0**-52
"""The least effective number of several values; 1 is that of a single one."""


class Weights:
    """What samples weigh, times a power of two."""

    def __init__(self, values: NDArray[np.float64], exponent: int, places: int | Array) -> None:
        """`exponent` is the power's; `places` are the values of a channel that count in each
        sample, a number where these are the same."""
        self.values, self.exponent, self.places = values, exponent, places

    @property
    @quiet
    def count(self) -> float:
        """The sum of the weights, as they were given."""
        total = math.fsum((places * weights).sum() for places, weights in self._blocks())
        return checks.arrays.total_weight(times_power(total, -self.exponent))

    @property
    @quiet
    def effective(self) -> float:
        """The effective number of values, of which there are some."""
        largest, sums = self.values.max(), []
        for places, weights in self._blocks():
            ratios = weights / largest  # all 1 where they are equal
            each = places * ratios
            sums.append((each.sum(), (each * ratios).sum()))
        total, squares = map(math.fsum, zip(*sums, strict=True))
        n = total * (total / squares)
        return n if n > 1 or self._is_one else SEVERAL

    @property
    def _is_one(self) -> bool:
        """Whether just one value weighs anything."""
        weighing = ((places * (weights > 0)).sum() for places, weights in self._blocks())
        return sum(map(int, weighing)) == 1

    def _blocks(self) -> Iterator[tuple[int | Array, Array]]:
        """Places and weights of as many samples as stay in cache: a sample may be a few values."""
        for i in range(0, len(self.values), BLOCK):
            some = slice(i, i + BLOCK)
            places = self.places if isinstance(self.places, int) else self.places[some]
            yield places, self.values[some]


@quiet
def scale(weights: Array, x: Array, channels: int, where: Array | None) -> Weights:
    """Checked weights for the kernels."""
    places = _places(x, channels, where)
    given = np.require(weights, np.float64, ["C_CONTIGUOUS", "ALIGNED"])
    largest = given.max(initial=0.0)
    if not isinstance(places, int) and not places[given.argmax()]:
        # By the weight of a sample without a place that counts, the others may be lost.
        given = np.where(places > 0, given, 0.0)
        largest = given.max()
    exponent = 1 - math.frexp(largest)[1] if largest else 0
    if exponent == 0:
        return Weights(given, 0, places)
    times = np.ldexp(given, exponent)
    if exponent < 0:
        # What weighs anything still does, so that a NaN in it is seen.
        np.copyto(times, np.finfo(np.float64).smallest_subnormal, where=(times == 0) & (given > 0))
    return Weights(times, exponent, places)


def _places(x: Array, channels: int, where: Array | None) -> int | Array:
    """Values of a channel that count in each sample."""
    all_of_them = x.size // max(channels * len(x), 1)
    if where is None or not all_of_them:
        return all_of_them
    where = where.reshape(len(x), -1)
    if all_of_them == 1:
        return where[:, 0]
    # Counted as bits: a sum of bytes over one axis takes ten times as long.
    return np.asarray(np.bitwise_count(np.packbits(where, axis=1)).sum(1, dtype=np.int64))


def times_power(number: float, exponent: int) -> float:
    """number * 2**exponent; infinity for what is too large."""
    try:
        return math.ldexp(number, exponent) if exponent else number
    except OverflowError:
        return math.inf
