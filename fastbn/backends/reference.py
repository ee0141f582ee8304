"""The NumPy backend: the specification, written to be read first.

1. Everything is float64, whatever the arrays hold; a result is rounded once, when it is stored.
2. Statistics take two passes. Each channel is first shifted by its own first value, so that a
   constant channel gives a variance of exactly 0 and a large mean costs no digits; the variance
   is then taken about the mean, at a scale where no square overflows, and corrected for what
   rounding left of the mean (Chan, Golub & LeVeque 1983, equation 1.7).
3. One channel is worked on at a time: the temporaries are one channel's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from fastbn.activations import Activation
from fastbn.backends.base import (
    ActivationGrad,
    Affine,
    Array,
    Backend,
    BackwardRowTables,
    Epilogue,
    ForwardRowTables,
    GradientCoefficients,
    Selection,
    Table,
    inverse_deviation,
    quiet,
)


class ReferenceBackend(Backend):
    """Plain NumPy in float64."""

    name = "numpy"

    @quiet
    def moments(
        self, x: Array, threads: int, selection: Selection | None = None
    ) -> tuple[Table, Table]:
        mean, var = _table(x), _table(x)
        for channel in _channels(x):
            values, weights = _weighed(x, channel, selection)
            if not values.size:
                mean[channel] = var[channel] = 0
                continue
            shift = values.flat[0]
            centred = values - shift
            offset = _mean(centred, weights)
            centred -= offset
            mean[channel] = shift + (offset + _mean(centred, weights))
            var[channel] = _variance(centred, weights)
        return mean, var

    @quiet
    def normalize(
        self,
        x: Array,
        affine: Affine,
        out: Array,
        threads: int,
        epilogue: Epilogue | None = None,
        selection: Selection | None = None,
    ) -> None:
        mean, scale, beta = affine
        for channel in _channels(x):
            centred = _doubles(x, channel) - mean[channel]
            y = centred * scale[channel] + beta[channel]
            y = y if epilogue is None else _with_epilogue(y, epilogue, channel)
            _plane(out, channel)[...] = _masked(y, channel, selection)

    @quiet
    def gradient_moments(
        self,
        dy: Array,
        x: Array,
        mean: Table,
        threads: int,
        activation_grad: ActivationGrad | None = None,
        selection: Selection | None = None,
    ) -> tuple[Table, Table]:
        sum_dy, sum_dy_xmu = _table(x), _table(x)
        for channel in _channels(x):
            dy_values = _masked(
                _through_activation(dy, activation_grad, channel), channel, selection
            )
            centred = _masked(_doubles(x, channel) - mean[channel], channel, selection)
            sum_dy[channel] = dy_values.sum()
            sum_dy_xmu[channel] = (dy_values * centred).sum()
        return sum_dy, sum_dy_xmu

    @quiet
    def input_gradient(
        self,
        dy: Array,
        x: Array | None,
        coefficients: GradientCoefficients,
        out: Array,
        threads: int,
        activation_grad: ActivationGrad | None = None,
        selection: Selection | None = None,
    ) -> None:
        a, b, dy_mean, mean, rstd, rest = coefficients
        for channel in _channels(dy):
            dx = _masked(_through_activation(dy, activation_grad, channel), channel, selection)
            if activation_grad is not None and activation_grad.dresidual is not None:
                _plane(activation_grad.dresidual, channel)[...] = dx
            weights = None if selection is None else selection.sample_weights(channel[0])
            w = 1.0 if weights is None else weights
            if x is not None:
                dx = dx - w * dy_mean[channel]
            dx = dx * a[channel]
            if x is not None:
                dx += w * (b[channel] * ((_doubles(x, channel) - mean[channel]) * rstd[channel]))
            if rest is not None:
                dx += rest[channel]
            _plane(out, channel)[...] = _masked(dx, channel, selection)

    @quiet
    def forward_rows(
        self,
        x: Array,
        tables: ForwardRowTables,
        out: Array,
        threads: int,
        epilogue: Epilogue | None = None,
        mask: Array | None = None,
    ) -> tuple[Table, Table]:
        gamma, beta, eps, is_centred = tables
        mean, var = self.moments(x, threads)
        if not is_centred:
            mean, var = np.zeros_like(mean), var + mean * mean
        rstd = inverse_deviation(var, eps)
        for row in _channels(x):
            if _is_hidden(row, mask):
                _plane(out, row)[...] = mean[row] = var[row] = 0
                continue
            place = row[1] % len(gamma)
            xhat = (_doubles(x, row) - mean[row]) * rstd[row]
            y = xhat * gamma[place] + beta[place]
            _plane(out, row)[...] = y if epilogue is None else _with_epilogue(y, epilogue, row)
        return mean, var

    @quiet
    def backward_rows(
        self,
        dy: Array,
        x: Array,
        tables: BackwardRowTables,
        out: Array,
        threads: int,
        activation_grad: ActivationGrad | None = None,
        mask: Array | None = None,
        dsum: Array | None = None,
    ) -> tuple[Table, Table]:
        mean, gamma = tables.mean, tables.gamma
        rstd = inverse_deviation(tables.var, tables.eps)
        dgamma, dbeta = np.zeros((2, *gamma.shape))
        for row in _channels(x):
            place = row[1] % len(gamma)
            dy_values = _through_activation(dy, activation_grad, row)
            if _is_hidden(row, mask):
                dy_values = np.zeros_like(dy_values)
            if activation_grad is not None and activation_grad.dresidual is not None:
                _plane(activation_grad.dresidual, row)[...] = dy_values
            more = 0.0 if dsum is None else _doubles(dsum, row)
            if _is_hidden(row, mask):
                _plane(out, row)[...] = more
                continue
            xhat = (_doubles(x, row) - mean[row]) * rstd[row]
            dgamma[place] += (dy_values * xhat)[0]
            dbeta[place] += dy_values[0]
            scaled = dy_values * gamma[place]
            shared = scaled.mean() if tables.is_centred else 0.0
            dx = scaled - shared - xhat * (scaled * xhat).mean()
            _plane(out, row)[...] = dx * rstd[row] + more
        return dgamma, dbeta


def load() -> Backend:
    """The backend object."""
    return ReferenceBackend()


def _variance(centred: Table, weights: Table | None) -> Any:
    """The variance of values whose mean is 0 but for rounding.

    Taken at a scale of 1: a power of two is exact, and no sum of squares overflows.
    """
    exponent = np.frexp(np.abs(centred).max())[1]
    scaled = np.ldexp(centred, -exponent)
    residue = _mean(scaled, weights)
    variance = _mean(np.square(scaled), weights) - residue * residue
    return np.ldexp(max(variance, 0.0), 2 * exponent)


def _mean(values: Table, weights: Table | None) -> Any:
    return values.mean() if weights is None else (weights * values).sum() / weights.sum()


def _weighed(
    x: Array, channel: tuple[int, int], selection: Selection | None
) -> tuple[Table, Table | None]:
    """The values of a channel that weigh in its statistics, and their weights, if not all 1."""
    values = _doubles(x, channel)
    if selection is None:
        return values, None
    mask, rows = selection.mask[channel[0]], selection.sample_weights(channel[0])
    if rows is None:
        return values[mask], None
    mask = mask & (rows > 0)
    return values[mask], np.broadcast_to(rows, mask.shape)[mask]


def _is_hidden(row: tuple[int, int], mask: Array | None) -> bool:
    """Whether a mask of rows hides it."""
    return mask is not None and not mask[row[1]]


def _masked(values: Table, channel: tuple[int, int], selection: Selection | None) -> Table:
    """The values where they count, and 0 elsewhere."""
    return values if selection is None else np.where(selection.mask[channel[0]], values, 0.0)


def _with_epilogue(y: Table, epilogue: Epilogue, channel: tuple[int, int]) -> Table:
    """What follows normalization."""
    if epilogue.residual is not None:
        y = y + _doubles(epilogue.residual, channel)
    return np.where(
        y <= 0, _times_slope(epilogue.activation, y), np.minimum(y, epilogue.activation.top)
    )


def _through_activation(
    dy: Array, activation_grad: ActivationGrad | None, channel: tuple[int, int]
) -> Table:
    """dy, where an activation stands between it and the normalization: times its slope."""
    values = _doubles(dy, channel)
    if activation_grad is None:
        return values
    y = _doubles(activation_grad.y, channel)
    gated = np.where(y <= 0, _times_slope(activation_grad.activation, values), values)
    top = activation_grad.activation.top
    return np.where((y >= top) & (top < np.inf), 0, gated)


def _times_slope(activation: Activation, values: Table) -> Table:
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
