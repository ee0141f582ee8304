"""What a backend is: four passes over memory and four fused walks, on (G, N, C, S) views.

1. The passes are moments, normalize, gradient moments and the input gradient. Fused forward is the
   first two, fused backward the last two; each of these has a form for rows (7).
2. Arrays come as views made by `fastbn.layouts`: native, aligned, not empty, all of one shape and
   element type, and of one of two families: *planes* (S contiguous) or *channels last* (S = 1, C
   contiguous). N and G may have any strides, and axes of length 1 those of a dense array.
3. Statistics, parameters and sums are (G, C) tables with any strides, so that a vector shared by
   all runs is the same table with a stride of 0. What fused walks are given are tables of float32
   or float64, as the caller has them; all others are float64.
4. Passes write into arrays that the caller made, in place too: then `out` is the same view as one
   of the inputs.
5. Between two passes, *finalize* makes coefficients of sums, in float64: `normal_scale` and
   `gradient_coefficients` below. There channels may be *pooled*: so many consecutive ones share
   their statistics, and tables of them are (G, C / pool).
6. What stands beside normalization in a network is fused: an `Epilogue` adds a residual to y and
   applies an activation; on the way back `ActivationGrad` multiplies dy by the activation's slope.
   A `Selection` tells which places count, and how much in statistics. What stands at another place
   is not looked at; the result there is 0.
7. Where a sample's pooled channels follow each other in memory, they are a *row* with statistics of
   its own: planes of a view (1, 1, R, S), scaled and shifted by column.
8. Arrays of another type than the result's, or in another order of memory, come as *frames*: (N, C,
   S), of which channels or values of a channel are side by side. Two functions take them, which are
   made here of the others: `normalize_into`, and `integer_sums`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastbn.activations import LINEAR, Activation, apply_curve
from fastbn.elements import arithmetic

Array = NDArray[Any]
Table = NDArray[np.float64]


class Affine(NamedTuple):
    """Tables of y = (x - mean) * scale + beta."""

    mean: Table
    scale: Table
    beta: Table


class GradientCoefficients(NamedTuple):
    """Tables of dx = a * (dy - dy_mean) + b * xhat + rest, xhat = (x - mean) * rstd."""

    a: Table
    b: Table
    dy_mean: Table
    mean: Table
    rstd: Table
    rest: Table | None = None


class ForwardTables(NamedTuple):
    """What fused forward is given: y = gamma * (x - mean) / sqrt(var + eps) + beta."""

    gamma: Array | None
    beta: Array | None
    eps: float
    pool: int = 1
    """Consecutive channels that share their statistics."""


class BackwardTables(NamedTuple):
    """What fused backward is given; tables of statistics are (G, C / pool)."""

    mean: Array
    var: Array
    gamma: Array | None
    eps: float
    is_fixed: bool = False
    """Whether the statistics are constants, and let no gradient through."""
    pool: int = 1


class ForwardRowTables(NamedTuple):
    """What fused forward on rows is given: gamma and beta by column, (P, S)."""

    gamma: Table
    beta: Table
    eps: float
    is_centred: bool = True
    """Else nothing is subtracted: the mean is 0, and var the mean square (RMS norm)."""


class BackwardRowTables(NamedTuple):
    """What fused backward on rows is given: statistics of rows, (1, R), and gamma by column."""

    mean: Table
    var: Table
    gamma: Table
    eps: float
    is_centred: bool = True


class Part(NamedTuple):
    """Some runs and channels, which are worked on at once."""

    runs: slice
    channels: slice

    def of(self, a: Any) -> Any:
        """These runs and channels of a (G, N, C, S) array; None for None."""
        return None if a is None else a[self.runs, :, self.channels]

    def of_frame(self, a: Any) -> Any:
        """These channels of an (N, C, S) array; None for None."""
        return None if a is None else a[:, self.channels]


class Epilogue(NamedTuple):
    """y = activation((x - mean) * scale + beta + residual)."""

    activation: Activation
    residual: Array | None

    def part(self, part: Part) -> Epilogue:
        """The same on some runs and channels."""
        return Epilogue(self.activation, part.of(self.residual))


class ActivationGrad(NamedTuple):
    """In place of dy stands dy times the slope of the activation where it gave y."""

    activation: Activation
    y: Array
    dresidual: Array | None
    """Where dy times the slope is written, by whatever writes dx; perhaps dy itself."""

    def part(self, part: Part) -> ActivationGrad:
        """The same on some runs and channels."""
        return ActivationGrad(self.activation, part.of(self.y), part.of(self.dresidual))


class Selection(NamedTuple):
    """The places that count, the same for all channels, and their samples' weight."""

    mask: NDArray[np.bool_]
    """(G, N, S), contiguous."""
    weights: Table | None
    """(G, M), contiguous: a weight for each N / M consecutive entries of N (channels-last views
    have a sample's places there). Only statistics are weighted; what weighs 0 is not read."""
    counts: Table
    """(G,), contiguous: of a channel, the sum of the weights of its places; more than 0. A run
    without any has 1, and statistics that mean nothing."""

    def part(self, part: Part) -> Selection:
        """The same of some runs."""
        weights = None if self.weights is None else self.weights[part.runs]
        return Selection(self.mask[part.runs], weights, self.counts[part.runs])

    def sample_weights(self, run: int) -> Table | None:
        """A run's weights, (N, 1)."""
        if self.weights is None:
            return None
        each = self.mask.shape[1] // self.weights.shape[1]
        return np.repeat(self.weights[run], each)[:, None]


quiet = np.errstate(all="ignore")
"""Decorates float64 steps on data: NaN and infinities stay in their channel, without a warning."""


@quiet
def inverse_deviation(var: Table, eps: float) -> Table:
    """rstd = 1 / sqrt(var + eps), and 0 where var + eps is 0: such a channel gives y = beta."""
    total = np.asarray(var + eps)
    rstd = np.zeros_like(total)
    np.divide(1.0, np.sqrt(total), out=rstd, where=total != 0)
    return rstd


@quiet
def normal_scale(gamma: Table, var: Table, eps: float) -> Table:
    """gamma / sqrt(var + eps)."""
    return np.asarray(gamma * inverse_deviation(var, eps))


@quiet
def gradient_coefficients(
    sum_dy: Table, sum_dy_xhat: Table, count: float | Table, mean: Table, rstd: Table, gamma: Table
) -> GradientCoefficients:
    """dx = gamma * rstd * (dy - mean(dy) - xhat * mean(dy * xhat)).

    Ioffe & Szegedy (2015), section 3, with the gradients through the batch's own mean and
    variance collected.
    """
    a = gamma * rstd
    return GradientCoefficients(a, -a * (sum_dy_xhat / count), sum_dy / count, mean, rstd)


@quiet
def frozen_coefficients(mean: Table, rstd: Table, gamma: Table) -> GradientCoefficients:
    """dx = gamma * rstd * dy: through fixed statistics."""
    zero = np.zeros_like(rstd)
    return GradientCoefficients(gamma * rstd, zero, zero, mean, rstd)


@quiet
def pooled_moments(mean: Table, var: Table, pool: int) -> tuple[Table, Table]:
    """Of `pool` consecutive channels together, which have as many values each (Chan, Golub &
    LeVeque 1983, equation 2.1): no two large squares are subtracted."""
    means, variances = (a.reshape(len(a), -1, pool) for a in (mean, var))
    first = means[:, :, 0]
    together = first + (means - first[:, :, None]).mean(2)
    return together, ((variances + np.square(means - together[:, :, None])) / pool).sum(2)


@quiet
def pooled_coefficients(
    sum_dy: Table,
    sum_dy_xhat: Table,
    count: float | Table,
    mean: Table,
    rstd: Table,
    gamma: Table,
    pool: int,
) -> GradientCoefficients:
    """dx = rstd * (gamma * dy - mean(gamma * dy) - xhat * mean(gamma * dy * xhat)), the means being
    of `pool` channels: Wu & He (2018), differentiated."""

    def pooled(sums: Table) -> Table:
        means = (gamma * sums).reshape(len(sums), -1, pool).sum(2) / (count * pool)
        return np.repeat(means, pool, 1)

    b, rest = -rstd * pooled(sum_dy_xhat), -rstd * pooled(sum_dy)
    return GradientCoefficients(gamma * rstd, b, np.zeros_like(rstd), mean, rstd, rest)


INTO_BYTES = 1 << 22
"""Of arrays by way of which `Backend` brings values into another type or order."""


def filled(table: Array | None, default: float) -> Table:
    """A table as float64, or what stands for all of one that is not given."""
    return np.full((1, 1), default) if table is None else np.asarray(table, np.float64)


def rows_per_sum(period: int, size: int, rows: int) -> int:
    """How many rows have sums of columns together, by their shape alone: about a sixty-fourth of
    them, but not so few that the sums outgrow 1.6 % of the rows, or half a MiB where that is more,
    nor so many that roundings do."""
    most = max(rows // 256, min(rows // 32, (1 << 15) // (period * size)), 1)
    pieces = max(min(most, 64), rows // 4096)
    return -(-rows // (pieces * period)) * period


def _never_plain(*arguments: Any) -> None:
    """For a backend without plain entries no arguments are plain."""


class Backend(ABC):
    """The eight functions, fused walks as their two passes; faster backends override them.

    A backend may have plain entries as well: the whole public call for plain arguments. Each takes
    the verb's arguments in order (`plain_backward` one more, `frozen`) and the number of
    threads; those of samples (virtual batches, group, instance and layer norm) take after the
    arrays how many groups of channels share statistics, and how many samples. None means "not
    plain": nothing was touched, and the caller checks, arranges and calls the eight functions
    instead.
    """

    name: str
    plain_moments: Callable[..., tuple[Table, Table] | None] = staticmethod(_never_plain)
    plain_batch_norm: Callable[..., tuple[Array, Table, Table] | None] = staticmethod(_never_plain)
    plain_normalize: Callable[..., Array | None] = staticmethod(_never_plain)
    plain_backward: Callable[..., tuple[Array, Array | None, Array | None, Array | None] | None] = (
        staticmethod(_never_plain)
    )
    plain_samples: Callable[..., tuple[Array, Table, Table] | None] = staticmethod(_never_plain)
    plain_rows: Callable[..., tuple[Array, Table, Table, Array] | None] = staticmethod(_never_plain)
    plain_rows_backward: Callable[
        ..., tuple[Array, Array | None, Array | None, Array | None] | None
    ] = staticmethod(_never_plain)
    plain_samples_backward: Callable[
        ..., tuple[Array, Array | None, Array | None, Array | None] | None
    ] = staticmethod(_never_plain)

    def plain_frozen(
        self, affine: Affine, layout: str, activation: Activation, dtype: Any, out_layout: Any
    ) -> Callable[..., Array | None]:
        """The plain entry of a frozen batch norm, of (x, residual, out, threads): made once, with
        all that its calls have in common."""
        return _never_plain

    def walks(self, view: Array, pool: int = 1) -> bool:
        """Whether a view of one of the two families is computed on where it lies; `pool`: channels
        whose moments are summed as one plane."""
        return True

    def copy(self, a: Array, out: Array, threads: int) -> None:
        """`numpy.copyto(out, a)`, of arrays of one shape and type that lie apart."""
        np.copyto(out, a)

    def channel_bytes(self, shape: tuple[int, int, int, int]) -> int:
        """Bytes of tables that a call takes for each channel of a (G, N, C, S) view, where it does
        not see to it itself that they stay small."""
        return 0

    @abstractmethod
    def moments(
        self, x: Array, threads: int, selection: Selection | None = None
    ) -> tuple[Table, Table]:
        """Mean and biased variance over N and S."""

    @abstractmethod
    def normalize(
        self,
        x: Array,
        affine: Affine,
        out: Array,
        threads: int,
        epilogue: Epilogue | None = None,
        selection: Selection | None = None,
    ) -> None:
        """out = (x - mean) * scale + beta, and what an epilogue adds."""

    @quiet
    def normalize_into(
        self,
        x: Array,
        affine: Affine,
        out: Array,
        threads: int,
        epilogue: Epilogue | None = None,
    ) -> None:
        """`normalize` of an (N, C, S) array into one of another type or order of memory; channels,
        or values of a channel, are side by side. A residual has the type of out. Here: some samples
        at a time, by way of arrays of planes."""
        activation = LINEAR if epilogue is None else epilogue.activation
        alike = x.dtype == out.dtype and not activation.curve
        wide = x.dtype if alike else arithmetic(x.dtype)
        at_once = max(INTO_BYTES // (x[:1].size * wide.itemsize), 1)
        for start in range(0, len(x), at_once):
            some = slice(start, start + at_once)
            tile = x[some].astype(wide, order="C")[None]
            beside = epilogue
            if epilogue is not None and epilogue.residual is not None:
                residual = epilogue.residual[some].astype(wide, order="C")[None]
                beside = epilogue._replace(residual=residual)
            if beside is not None and activation.curve:
                beside = beside._replace(activation=LINEAR)
            self.normalize(tile, affine, tile, threads, beside)
            out[some] = apply_curve(activation, tile[0]) if activation.curve else tile[0]

    def integer_sums(self, x: Array, threads: int) -> tuple[Array, Array]:
        """The sums of the integers in an (N, C, S) array of at most 2^31 values a channel, and of
        their squares: (C,) of int64 and of uint64."""
        sums, squares = np.zeros(x.shape[1], np.int64), np.zeros(x.shape[1], np.uint64)
        at_once = max(INTO_BYTES // max(x[:1].size * 8, 1), 1)
        for start in range(0, len(x), at_once):
            tile = x[start : start + at_once].astype(np.int64)
            sums += tile.sum((0, 2))
            squares += np.square(tile).astype(np.uint64).sum((0, 2))
        return sums, squares

    @abstractmethod
    def gradient_moments(
        self,
        dy: Array,
        x: Array,
        mean: Table,
        threads: int,
        activation_grad: ActivationGrad | None = None,
        selection: Selection | None = None,
    ) -> tuple[Table, Table]:
        """Sums over N and S of dy, after an activation's gradient, and of dy * (x - mean); nothing
        weighs."""

    @abstractmethod
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
        """out = a * (dy - w * dy_mean) + w * b * xhat + rest, of dy after an activation's gradient
        and, where a selection has weights, a sample's w, else 1; without x, out = a * dy."""

    @abstractmethod
    def forward_rows(
        self,
        x: Array,
        tables: ForwardRowTables,
        out: Array,
        threads: int,
        epilogue: Epilogue | None = None,
        mask: Array | None = None,
    ) -> tuple[Table, Table]:
        """Fused forward on (1, 1, R, S) rows: row r is scaled by row r % P of the (P, S) table
        gamma, and so shifted; gives mean and variance, (1, R). All is 0 of rows where the mask,
        (R,), is false."""

    @abstractmethod
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
        """Fused backward on rows; mean and var are (1, R), and what it gives are the sums over
        all rows with the same place in gamma, dgamma and dbeta, (P, S). To dx is added dsum, which
        does not go with an activation's gradient."""

    def forward(
        self,
        x: Array,
        tables: ForwardTables,
        out: Array,
        threads: int,
        epilogue: Epilogue | None = None,
        selection: Selection | None = None,
    ) -> tuple[Table, Table]:
        """Fused forward: moments, then normalize; gives mean and variance."""
        eps, pool = tables.eps, tables.pool
        gamma, beta = filled(tables.gamma, 1.0), filled(tables.beta, 0.0)
        found = mean, var = self.moments(x, threads, selection)
        if pool > 1:
            found = pooled_moments(mean, var, pool)
            mean, var = (np.repeat(a, pool, 1) for a in found)
        affine = Affine(mean, normal_scale(gamma, var, eps), np.broadcast_to(beta, mean.shape))
        self.normalize(x, affine, out, threads, epilogue, selection)
        return found

    @quiet
    def backward(
        self,
        dy: Array,
        x: Array,
        tables: BackwardTables,
        out: Array,
        threads: int,
        activation_grad: ActivationGrad | None = None,
        selection: Selection | None = None,
    ) -> tuple[Table, Table]:
        """Fused backward: gradient moments, then the gradient of the input.

        By fixed statistics dx = gamma * rstd * dy. Gives dgamma, dbeta, (G, C) whatever is pooled.
        """
        eps, is_fixed, pool = tables.eps, tables.is_fixed, tables.pool
        mean, var = (np.asarray(a, np.float64) for a in (tables.mean, tables.var))
        gamma = filled(tables.gamma, 1.0)
        if pool > 1:
            mean, var = (np.repeat(a, pool, 1) for a in (mean, var))
        rstd = inverse_deviation(var, eps)
        sum_dy, sum_dy_xmu = self.gradient_moments(dy, x, mean, threads, activation_grad, selection)
        dgamma = sum_dy_xmu * rstd
        count = x.shape[1] * x.shape[3] if selection is None else selection.counts[:, None]
        sums = sum_dy, dgamma, count, mean, rstd, gamma
        if pool > 1:
            coefficients = pooled_coefficients(*sums, pool)
        else:
            coefficients = gradient_coefficients(*sums)
        of_x = None if is_fixed else x
        self.input_gradient(dy, of_x, coefficients, out, threads, activation_grad, selection)
        return dgamma, sum_dy
