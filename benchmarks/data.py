"""The arrays of a cell, the same in every process, and the proof that a library computed them.

A block of random numbers is repeated through each array: as good as random for what is timed, and
made at the speed of memory. dy leans on x, so that dgamma and dbeta are large and can be checked.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.cells import Cell, Shape

Array = NDArray[Any]

BLOCK = 1_000_003
"""Values before the numbers repeat; a prime, so that no two channels get the same ones."""
COUNTED = 0.7
"""The part of all places that a mask selects."""
TOLERANCE = 1e-3
"""Loose: it tells the right operation from a wrong one, not a good library from a bad one."""
COARSE = 8e-3
"""For bfloat16, whose own rounding is beyond that: the distance from 1 to the next."""


class Data:
    """Inputs and the ready output of the cells that share a layout, element type and shape."""

    eps = 1e-5

    def __init__(self, cell: Cell) -> None:
        self.key = self.key_of(cell)
        self.shape, self.dtype = cell.array_shape, np.dtype(cell.dtype)
        self.axis = len(self.shape) - 1 if cell.layout == "NHWC" else 1
        self.vector_dtype = np.promote_types(self.dtype, np.float32)  # halves have single vectors
        self.result_shape, self.result_dtype, self.result_axis = self.shape, self.dtype, self.axis
        if cell.is_images:
            self.result_shape, self.result_dtype = cell.shape, np.dtype(np.float32)
            self.result_axis = 1
        self.channels = cell.channels

    @staticmethod
    def key_of(cell: Cell) -> tuple[str, str, Shape]:
        return cell.layout, cell.dtype, cell.shape

    @cached_property
    def _block(self) -> Array:
        return np.random.default_rng(0).standard_normal(BLOCK)

    @cached_property
    def x(self) -> Array:
        if self.dtype.kind == "u":
            return self._filled(np.random.default_rng(0).integers(0, 256, BLOCK))
        return self._filled(0.5 + self._block)

    @cached_property
    def dy(self) -> Array:
        noise = np.random.default_rng(1).standard_normal(BLOCK)
        return self._filled(0.5 + 0.5 * self._block + noise)

    @cached_property
    def residual(self) -> Array:
        """For rows it is skip, and in their backward dsum."""
        return self._filled(np.random.default_rng(6).standard_normal(BLOCK))

    @cached_property
    def y(self) -> Array:
        """What relu left of a forward: half of it 0."""
        return self._filled(np.maximum(np.random.default_rng(7).standard_normal(BLOCK), 0))

    @cached_property
    def dresidual(self) -> Array:
        """The ready output for the residual's gradient."""
        return np.full(self.shape, np.nan, self.dtype)

    @cached_property
    def where(self) -> Array:
        """The mask, the same for all channels; at least one place counts."""
        shape = [*self.shape]
        shape[self.axis] = 1
        selected: Array = np.random.default_rng(8).random(shape) < COUNTED
        selected.flat[0] = True
        return selected

    @cached_property
    def weights(self) -> Array:
        """One of each sample, none of them 0."""
        return np.random.default_rng(9).uniform(0.5, 1.5, self.shape[0])

    def places(self, cell: Cell) -> Array:
        """What each place weighs in the cell's statistics, as one channel: 0 is not counted."""
        if not cell.is_masked:
            return np.ones(self.where.shape)
        per_sample = (-1, *[1] * (len(self.shape) - 1))
        return self.where * (self.weights.reshape(per_sample) if cell.is_weighed else 1.0)

    @cached_property
    def result_copied(self) -> Array:
        """Of images, an array like the result: they are few bytes beside it."""
        return np.zeros(self.result_shape, self.result_dtype)

    def moved(self, cell: Cell) -> list[tuple[Array, ...]]:
        """The arrays that a work writes, each with those read for it: every array once."""
        if cell.is_images:
            return [(self.out, self.result_copied)]
        if cell.is_step:
            forward, backward = cell.forward_and_backward
            return [*self.moved(forward), *self._moved_back(backward, self.dx, self.out)]
        if cell.has_skip and cell.plain_work == "forward":
            return [(self.out, self.x), (self.sum, self.residual)]
        if cell.plain_work == "backward":
            return self._moved_back(cell, self.output(cell), self.y)
        if cell.work == "normalize_backward":
            return [(self.out, self.dy)]
        out = self.output(cell)
        return [(out, self.x, self.residual) if cell.is_fused else (out, self.x)]

    def _moved_back(self, cell: Cell, dx: Array, y: Array) -> list[tuple[Array, ...]]:
        if cell.is_fused:
            return [(self.dresidual, self.dy, y), (dx, self.x)]
        return [(dx, self.dy, self.x, self.residual) if cell.has_skip else (dx, self.dy, self.x)]

    @cached_property
    def out(self) -> Array:
        return np.full(self.result_shape, np.nan, self.result_dtype)

    @cached_property
    def reordered(self) -> Array:
        """A ready output with x's axes, whose memory is in the order of the other layout."""
        back, forth = (1, -1) if self.axis == 1 else (-1, 1)
        dense = np.full(np.moveaxis(self.out, back, forth).shape, np.nan, self.dtype)
        return np.moveaxis(dense, forth, back)

    def in_place(self, cell: Cell) -> tuple[Cell, Data]:
        """The cell and data of the other layout whose x and output both are `reordered`."""
        other = replace(cell, layout=cell.other_layout, output="ready")
        data = Data(other)
        data.x = data.out = np.moveaxis(self.reordered, self.axis, data.axis)
        return other, data

    def output(self, cell: Cell) -> Array:
        """Where y or dx goes."""
        return self.reordered if cell.is_reordered else self.out

    @cached_property
    def dx(self) -> Array:
        """The ready output of a step's backward; `out` is that of its forward."""
        return np.full(self.shape, np.nan, self.dtype)

    @cached_property
    def sum(self) -> Array:
        """The ready output for x + skip."""
        return np.full(self.shape, np.nan, self.dtype)

    @cached_property
    def gamma(self) -> Array:
        return self._vector(2)

    @cached_property
    def beta(self) -> Array:
        return self._vector(3)

    @cached_property
    def mean(self) -> Array:
        """Given statistics, for inference and normalize_backward; not those of x."""
        return self._vector(4)

    @cached_property
    def var(self) -> Array:
        return self._vector(5)

    @cached_property
    def batch_statistics(self) -> tuple[Array, Array]:
        """Mean and biased variance of x in float64, as a forward would have saved them."""
        over = tuple(axis for axis in range(self.x.ndim) if axis != self.axis)
        mean = self.x.mean(over, dtype=np.float64)
        squares = np.einsum(f"{self._axes},{self._axes}->c", self.x, self.x, dtype=np.float64)
        n = self.x.size // self.channels
        return mean, np.maximum(squares / n - mean * mean, 0)

    def grouped(self, a: Array, cell: Cell, first: int = 0, channels: int | None = None) -> Array:
        """Some channels of x's shape (all of them where not told), as (runs, groups, values): what
        shares statistics in the cell."""
        planes = np.moveaxis(a, self.axis, 1).reshape(self.shape[0], self.channels, -1)
        planes = planes[:, first : None if channels is None else first + channels]
        if not cell.work.startswith("ghost"):
            groups = 1 if channels is not None else cell.groups
            return planes.reshape(len(planes), groups, -1)
        runs = planes.reshape(-1, cell.run, *planes.shape[1:])
        return runs.swapaxes(1, 2).reshape(len(runs), planes.shape[1], -1)

    def statistics(self, cell: Cell) -> tuple[Array, Array]:
        """Those that a forward would have saved for the cell: of what counts, as it weighs."""
        if cell.is_grouped:
            values = self.grouped(self.x, cell)
            return values.mean(2, dtype=np.float64), values.var(2, dtype=np.float64)
        if cell.is_of_rows:
            return statistics_of_rows(self.x, is_centred=cell.is_centred)
        if not cell.is_masked:
            return self.batch_statistics
        places = self.places(cell).take(0, self.axis)
        axes, kept = self._axes, self._axes.replace("c", "")
        mean = np.einsum(f"{kept},{axes}->c", places, self.x) / places.sum()
        squares = np.einsum(f"{kept},{axes},{axes}->c", places, self.x, self.x) / places.sum()
        return mean, np.maximum(squares - mean * mean, 0)

    @property
    def _axes(self) -> str:
        """The axes of x as einsum names them."""
        kept = "nhw"[: len(self.shape) - 1]
        return f"{kept[: self.axis]}c{kept[self.axis :]}"

    def column(self, vector: Array) -> Array:
        """A vector of channels in a shape that broadcasts against x."""
        shape = [1] * len(self.shape)
        shape[self.axis] = -1
        return vector.reshape(shape)

    def _vector(self, seed: int) -> Array:
        values = np.random.default_rng(seed).uniform(0.5, 1.5, self.channels)
        return values.astype(self.vector_dtype)

    def _filled(self, block: Array) -> Array:
        block = block.astype(self.dtype)
        flat = np.empty(int(np.prod(self.shape)), self.dtype)
        for start in range(0, flat.size, BLOCK):
            part = flat[start : start + BLOCK]
            part[:] = block[: part.size]
        return flat.reshape(self.shape)


class Results(NamedTuple):
    """What a library computed, as arrays of the cell's own shape and layout."""

    main: Array
    """y, or dx."""
    dgamma: Array | None = None
    dbeta: Array | None = None
    dresidual: Array | None = None
    y: Array | None = None
    """Of a step, whose main result is dx."""
    sum: Array | None = None
    """x + skip."""


def complaint(cell: Cell, data: Data, results: Results) -> str | None:
    """What is wrong with the results, or None: first, middle and last channel, in float64."""
    if cell.is_step:
        if results.y is None:
            return "no y"
        forward, backward = cell.forward_and_backward
        wrong = complaint(forward, data, Results(results.y))
        return wrong or complaint(backward, data, results)
    made = results.main.shape, results.main.dtype
    if made != (data.result_shape, data.result_dtype):
        return f"an array of {results.main.dtype}{results.main.shape}"
    if cell.is_reordered and results.main.strides != data.reordered.strides:
        return "an array in another order of memory"
    tolerance = COARSE if cell.dtype == "bfloat16" else TOLERANCE
    for channel in sorted({0, data.channels // 2, data.channels - 1}):
        for name, wanted in expected(cell, data, channel, results.y).items():
            whole = getattr(results, name)
            if whole is None:
                return f"no {name}"
            got = row(whole, channel, data.result_axis) if whole.ndim > 1 else whole[channel]
            off = float(np.max(np.abs(got - wanted)))
            if not off <= tolerance * (1 + float(np.max(np.abs(wanted)))):
                return f"{name} of channel {channel} is off by {off:.3g}"
    return None


def expected(cell: Cell, data: Data, channel: int, y: Array | None = None) -> dict[str, Array]:
    """The oracle: one channel by the formulas, in float64. A step's backward is that of its own y,
    which rounding may leave on either side of 0."""
    gamma, beta, mean, var = (
        float(v[channel]) for v in (data.gamma, data.beta, data.mean, data.var)
    )
    if cell.is_images or cell.is_table:
        return {"main": expected_of_data(cell, row(data.x, channel, data.axis), mean, var)}
    if cell.work == "normalize_backward":
        return {"main": row(data.dy, channel, data.axis) * (gamma / np.sqrt(var + data.eps))}
    if cell.is_grouped:
        return expected_of_group(cell, data, channel)
    if cell.is_of_rows:
        return expected_of_row(cell, data, channel)
    x, places = row(data.x, channel, data.axis), row(data.places(cell), 0, data.axis)
    share = places / places.sum()
    if cell.plain_work != "inference":
        mean = float(share @ x)
        var = float(share @ (x - mean) ** 2)
    xhat = (x - mean) / np.sqrt(var + data.eps)
    if cell.plain_work != "backward":
        y = gamma * xhat + beta
        if cell.is_fused:
            y = np.maximum(y + row(data.residual, channel, data.axis), 0)
        if cell.curve:
            y *= 1 / (1 + np.exp(-y)) if cell.curve == "silu" else np.clip(y + 3, 0, 6) / 6
        return {"main": np.where(places > 0, y, 0)}
    dy, more = np.where(places > 0, row(data.dy, channel, data.axis), 0), {}
    if cell.is_fused:
        dy = np.where(row(data.y if y is None else y, channel, data.axis) > 0, dy, 0)
        more = {"dresidual": dy}
    dbeta, dgamma = dy.sum(), (dy * xhat).sum()
    dx = gamma / np.sqrt(var + data.eps) * (dy - share * (dbeta + xhat * dgamma))
    return {"main": dx, "dgamma": dgamma, "dbeta": dbeta} | more


def expected_of_data(cell: Cell, x: Array, mean: float, var: float) -> Array:
    """A channel of images by given statistics of x / 255, or a column of a table by its own."""
    own: Array = (x - x.mean()) / x.std()
    return (x / 255 - mean) / np.sqrt(var) if cell.is_images else own


def expected_of_group(cell: Cell, data: Data, channel: int) -> dict[str, Array]:
    """The same, where statistics are of each virtual batch, or of each sample's groups."""
    pool = 1 if cell.work.startswith("ghost") else data.channels // cell.groups
    first = channel // pool * pool
    x, dy = (data.grouped(a, cell, first, pool)[:, 0].astype(np.float64) for a in (data.x, data.dy))
    gamma, beta = (
        np.repeat(v[first : first + pool].astype(np.float64), x.shape[1] // pool)
        for v in (data.gamma, data.beta)
    )
    rstd = 1 / np.sqrt(x.var(1, keepdims=True) + data.eps)
    xhat = (x - x.mean(1, keepdims=True)) * rstd
    g = gamma * dy
    dx = rstd * (g - g.mean(1, keepdims=True) - xhat * (g * xhat).mean(1, keepdims=True))

    def own(a: Array) -> Array:
        return a.reshape(len(a), pool, -1)[:, channel - first].ravel()

    if cell.plain_work == "forward":
        return {"main": own(gamma * xhat + beta)}
    sums = {"dgamma": own(dy * xhat).sum(), "dbeta": own(dy).sum()}
    return {"main": own(dx), **sums}


def expected_of_row(cell: Cell, data: Data, channel: int) -> dict[str, Array]:
    """A column, where statistics are of each row along the last axis."""
    gamma, beta = (float(v[channel]) for v in (data.gamma, data.beta))
    is_forward = cell.plain_work == "forward"
    x = data.x + data.residual if cell.has_skip and is_forward else data.x
    mean, var = (v.ravel() for v in statistics_of_rows(x, is_centred=cell.is_centred))
    rstd = 1 / np.sqrt(var + data.eps)
    own = row(x, channel, -1)
    xhat = (own - mean) * rstd
    if is_forward:
        y = gamma * xhat + (beta if cell.is_centred else 0)
        return {"main": y} | ({"sum": own} if cell.has_skip else {})
    dy = row(data.dy, channel, -1)
    g = np.einsum("...c,c->...", data.dy, data.gamma, dtype=np.float64).ravel()
    gx = np.einsum("...c,...c,c->...", data.dy, x, data.gamma, dtype=np.float64).ravel()
    g_xhat = (gx - mean * g) * rstd
    dx = rstd * (gamma * dy - (g * cell.is_centred + xhat * g_xhat) / data.channels)
    if cell.has_skip:
        dx += row(data.residual, channel, -1)
    sums = {"dgamma": (dy * xhat).sum()} | ({"dbeta": dy.sum()} if cell.is_centred else {})
    return {"main": dx} | sums


def statistics_of_rows(x: Array, *, is_centred: bool) -> tuple[Array, Array]:
    """Mean and variance of each row along the last axis; not centred, 0 and the mean square."""
    squares = np.einsum("...c,...c->...", x, x, dtype=np.float64) / x.shape[-1]
    mean = x.mean(-1, dtype=np.float64) if is_centred else np.zeros_like(squares)
    return mean, np.maximum(squares - mean * mean, 0)


def row(a: Array, channel: int, axis: int) -> Array:
    """The values of one channel."""
    values: Array = np.take(a, channel, axis).astype(np.float64).ravel()
    return values
