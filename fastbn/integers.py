"""Sums of integers, which are exact, and the statistics that follow from them.

1. Backends sum the values of a channel and their squares in 64 bits, of at most `MOST` values at a
   time. Totals of more are Python's own integers: they have no end.
2. ``mean = S / n`` and ``var = (n * Q - S**2) / n**2``, S the sum and Q that of the squares: the
   numerator is an integer, so nothing is lost where the two products are nearly equal. Each
   quotient is rounded once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastbn._batch import Batch
from fastbn.backends.base import Backend
from fastbn.layouts import frame

Array = NDArray[Any]

MOST = 1 << 31
"""Values of a channel that are summed at a time: squares of 16 bits fit 63."""


class Totals(NamedTuple):
    """The count of a channel's values, their sums and those of their squares: exact."""

    values: int
    sums: Array
    """(C,), of Python's integers."""
    squares: Array

    @staticmethod
    def of(batch: Batch, on: tuple[Backend, int]) -> Totals:
        """Of a batch of integers; what a mask leaves out counts as 0 in the sums."""
        backend, threads = on
        x = batch.array
        if batch.where is not None:
            x = np.where(batch.where, x, x.dtype.type(0))
        sums, squares = (np.zeros(batch.channels, object) for _ in range(2))
        for part in _parts(frame(x, batch.layout)) if x.size else ():
            some, square = backend.integer_sums(part, threads)
            sums, squares = sums + some.astype(object), squares + square.astype(object)
        return Totals(int(batch.places), sums, squares)

    def merge(self, other: Totals) -> Totals:
        """Those of both's values together."""
        values, sums, squares = other
        return Totals(self.values + values, self.sums + sums, self.squares + squares)

    def moments(self) -> tuple[Array, Array]:
        """Mean and biased variance, float64; zeros without values."""
        n = self.values
        if not n:
            return np.zeros(len(self.sums)), np.zeros(len(self.sums))
        numerator = n * self.squares - self.sums * self.sums
        mean, var = self.sums / n, numerator / (n * n)
        return mean.astype(np.float64), var.astype(np.float64)


def _parts(x: Array) -> list[Array]:
    """An (N, C, S) array, some samples or values of one at a time."""
    n, _, s = x.shape
    samples = max(MOST // s, 1)
    places = [(i, j) for i in range(0, n, samples) for j in range(0, s, MOST)]
    return [frame(x[i : i + samples, :, j : j + MOST], "NCHW") for i, j in places]
