"""The NumPy backend: the specification, written to be read first.

1. Everything is float64, whatever the arrays hold; a result is rounded once, when it is stored.
2. Statistics take two passes. Each channel is first shifted by its own first value, so that a
   constant channel gives a variance of exactly 0 and a large mean costs no digits; the variance
   is then taken about the mean, at a scale where no square overflows, and corrected for what
   rounding left of the mean (Chan, Golub & LeVeque 1983, equation 1.7).
3. A channel is looked at a time: the temporaries are one channel's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from fastbn.activations import Activation
from fastbn.backends.base import (
    Affine,
    Array,
    Backend,
    Gate,
    GradientCoefficients,
    Table,
    Tail,
    quiet,
)


class ReferenceBackend(Backend):
    """Plain NumPy in float64."""

    name = "numpy"

    @quiet
    def moments(self, x: Array, threads: int) -> tuple[Table, Table]:
        mean, var = _table(x), _table(x)
        for channel in _channels(x):
            values = _doubles(x, channel)
            shift = values.flat[0]
            centred = values - shift
            offset = centred.mean()
            centred -= offset
            mean[channel] = shift + (offset + centred.mean())
            var[channel] = _variance(centred)
        return mean, var

    @quiet
    def normalize(
        self, x: Array, affine: Affine, out: Array, threads: int, tail: Tail | None = None
    ) -> None:
        mean, scale, beta = affine
        for channel in _channels(x):
            centred = _doubles(x, channel) - mean[channel]
            y = centred * scale[channel] + beta[channel]
            _plane(out, channel)[...] = y if tail is None else _finished(y, tail, channel)

    @quiet
    def gradient_moments(
        self, dy: Array, x: Array, mean: Table, threads: int, gate: Gate | None = None
    ) -> tuple[Table, Table]:
        sum_dy, sum_dy_centred = _table(x), _table(x)
        for channel in _channels(x):
            dy_values = _gated(dy, gate, channel)
            sum_dy[channel] = dy_values.sum()
            sum_dy_centred[channel] = (dy_values * (_doubles(x, channel) - mean[channel])).sum()
        return sum_dy, sum_dy_centred

    @quiet
    def input_gradient(
        self,
        dy: Array,
        x: Array | None,
        coefficients: GradientCoefficients,
        out: Array,
        threads: int,
        gate: Gate | None = None,
    ) -> None:
        a, b, dy_mean, mean, rstd = coefficients
        for channel in _channels(dy):
            dx = _gated(dy, gate, channel)
            if gate is not None and gate.dresidual is not None:
                _plane(gate.dresidual, channel)[...] = dx
            if x is not None:
                dx -= dy_mean[channel]
            dx *= a[channel]
            if x is not None:
                dx += b[channel] * ((_doubles(x, channel) - mean[channel]) * rstd[channel])
            _plane(out, channel)[...] = dx


def load() -> Backend:
    """The backend object."""
    return ReferenceBackend()


def _variance(centred: Table) -> Any:
    """The variance of values whose mean is 0 but for rounding.

    Taken at a scale of 1: a power of two is exact, and no sum of squares overflows.
    """
    exponent = np.frexp(np.abs(centred).max())[1]
    scaled = np.ldexp(centred, -exponent)
    residue = scaled.mean()
    return np.ldexp(max(np.square(scaled).mean() - residue * residue, 0.0), 2 * exponent)


def _finished(y: Table, tail: Tail, channel: tuple[int, int]) -> Table:
    """What follows normalization."""
    if tail.residual is not None:
        y = y + _doubles(tail.residual, channel)
    return np.where(y <= 0, _times(tail.activation, y), np.minimum(y, tail.activation.top))


def _gated(dy: Array, gate: Gate | None, channel: tuple[int, int]) -> Table:
    """dy, where an activation stands between it and the normalization: times its slope."""
    values = _doubles(dy, channel)
    if gate is None:
        return values
    y = _doubles(gate.y, channel)
    gated = np.where(y <= 0, _times(gate.activation, values), values)
    top = gate.activation.top
    return np.where((y >= top) & (top < np.inf), 0, gated)


def _times(activation: Activation, values: Table) -> Table:
    """Times the slope, and 0 for a slope of 0 whatever the values."""
    return values * activation.slope if activation.slope else np.zeros_like(values)


def _channels(x: Array) -> Iterator[tuple[int, int]]:
    """The (run, channel) pairs of a (G, N, C, S) array."""
    return np.ndindex(x.shape[0], x.shape[2])


def _plane(x: Array, channel: tuple[int, int]) -> Array:
    """The (N, S) values of one channel of one run."""
    run, c = channel
    return x[run, :, c, :]


def _doubles(x: Array, channel: tuple[int, int]) -> Table:
    # In one order whatever the strides, so that sums have the same bits.
    return _plane(x, channel).astype(np.float64, order="C")


def _table(x: Array) -> Table:
    return np.empty((x.shape[0], x.shape[2]))
