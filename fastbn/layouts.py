"""An array and a layout -> the (G, N, C, S) view that every backend computes on.

1. Batch normalization does not care in which order the values of a channel come, so every layout
   is one view (G, N, C, S): G runs with statistics of their own (one, or the virtual batches),
   N samples, C channels, S values a channel and sample.
2. The view follows the *memory*, not the layout's name. Sort the axes by stride: those outside
   the channel axis become N, those inside it S. NCHW memory gives (1, N, C, H*W), channels-last
   memory (1, N*H*W, C, 1), whichever name it was handed over with.
3. Where each sample is a run, and all of its channels that share statistics follow each other in
   memory, they are one *row*: (1, 1, R, S), R rows of S values with statistics of their own.
   But many groups of few channels stay channels (`are_rows`).
4. Backends accept views of two families: *planes* (S contiguous) and *channels last* (S = 1, C
   contiguous), and say of a view whether they walk it where it lies. An array whose axes do not
   collapse into such a view is copied once, densely and in its own order: the order of summation,
   so every bit, is that of a dense array.
5. The stride of an axis of length 1 means nothing, and NumPy leaves whatever was there. Here it
   becomes that of a dense array, so that backends may go by every stride of a view.
"""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastbn._pool import empty

LAYOUTS = {"NCHW": 1, "NHWC": -1}
"""The layouts' names, and the axis that holds the channels."""

EACH_CHANNEL, ALL_CHANNELS, LAST_AXIS = -1, -2, -3
"""In place of a number of groups: each channel is one; all are one, and statistics are (N,); all of
each place are one."""

SHORT = 16
"""Values: shorter planes of a single channel are taken as one, for they fill no vector."""


def channel_axis(layout: str, ndim: int) -> int:
    """Axis of the channels in an array of rank `ndim`, counted from the front."""
    return LAYOUTS[layout] % ndim


class Arrangement(NamedTuple):
    """How arrays of one shape are seen as (G, N, C, S), and how to come back."""

    axes: tuple[int, ...]
    """The axes in memory order, outermost first."""
    view_shape: tuple[int, int, int, int]
    by_row: bool = False

    @staticmethod
    def of(
        x: NDArray[Any],
        layout: str,
        *,
        by_sample: bool = False,
        whole: NDArray[Any] | None = None,
        runs: int | None = None,
        pool: int = 1,
    ) -> Arrangement:
        """Arrange by the memory order of `x`, which is not empty, or of the `whole` array of which
        it is some samples.

        `by_sample`: samples stay outermost and apart (each may have a weight). `runs`: as many
        groups of equal numbers of samples. `pool`: consecutive channels that share statistics.
        Other memory is copied.
        """
        channel = channel_axis(layout, x.ndim)
        axes = _memory_order(x if whole is None else whole, channel)
        by_sample = by_sample or runs is not None
        if by_sample and axes[0] != 0:
            axes = tuple(range(x.ndim))
        at = axes.index(channel)
        n = prod(x.shape[axis] for axis in axes[:at])
        s = prod(x.shape[axis] for axis in axes[at + 1 :])
        groups = runs or 1
        if x.shape[channel] == 1 and s < SHORT and (runs is not None or not by_sample):
            # All values of a run are those of one channel.
            n, s = groups, n * s // groups
        if n == groups and s == 1 and are_rows(x.shape[channel] // pool, pool):
            return Arrangement(axes, (1, 1, n * x.shape[channel] // pool, pool), by_row=True)
        return Arrangement(axes, (groups, n // groups, x.shape[channel], s))

    @staticmethod
    def of_rows(x: NDArray[Any]) -> Arrangement:
        """The rows along the last axis, in the order of x's own axes."""
        size = x.shape[-1]
        return Arrangement(tuple(range(x.ndim)), (1, 1, x.size // size, size), by_row=True)

    def view(self, a: NDArray[Any]) -> NDArray[Any] | None:
        """A native `a` as a (G, N, C, S) array of one of the two families, where it lies; None
        where that is neither."""
        a = a.transpose(self.axes)
        v = reshaped(a, self.view_shape) if is_view(a, self.view_shape) else None
        return v if v is not None and _is_walkable(v) else None

    def new(self, dtype: np.dtype[Any]) -> NDArray[Any]:
        """A dense (G, N, C, S) array."""
        return empty(self.view_shape, dtype)

    def alike(self, a: NDArray[Any], view: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """`a` and a dense view, with the same axes."""
        a = a.transpose(self.axes)
        return a, view.reshape(a.shape)

    def mask(self, where: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """An array like x but for a single channel, as contiguous (G, N, S)."""
        g, n, _, s = self.view_shape
        return reshaped(np.ascontiguousarray(where.transpose(self.axes)), (g, n, s))

    def fresh(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """A new array of `shape`, dense in this arrangement's memory order."""
        dense = empty(tuple(shape[axis] for axis in self.axes), dtype)
        return dense.transpose(np.argsort(self.axes))


def moved(a: NDArray[Any], source: int, target: int) -> NDArray[Any]:
    """`numpy.moveaxis`, which takes ten microseconds."""
    if source == target:
        return a
    order = list(range(a.ndim))
    order.insert(target, order.pop(source))
    return a.transpose(order)


def frame_of(a: NDArray[Any], layout: str) -> NDArray[Any] | None:
    """`a` as (N, C, S) where it lies, if values of a channel or channels are side by side."""
    planes = moved(a, channel_axis(layout, a.ndim), 1)
    shape = (len(a), planes.shape[1], prod(planes.shape[2:]))
    if not a.dtype.isnative or not is_view(planes, shape):
        return None
    v = reshaped(planes, shape)
    _, c, s = shape
    dense = (s > 1 and v.strides[2] == v.itemsize) or (c * s == 1 or v.strides[1] == v.itemsize)
    return v if v.flags.aligned and dense else None


def frame(a: NDArray[Any], layout: str) -> NDArray[Any]:
    """`a` as (N, C, S), where it lies or else a dense copy."""
    v = frame_of(a, layout)
    if v is None:
        planes = moved(a, channel_axis(layout, a.ndim), 1)
        dense = empty(planes.shape, a.dtype.newbyteorder("="))
        dense[...] = planes
        v = dense.reshape(len(a), planes.shape[1], -1)
    return v


def are_rows(groups: int, pool: int) -> bool:
    """Whether a sample's groups of `pool` channels, of one place, are rows: their gamma and beta by
    column take up 32 places a group at least, and such tables have to stay small."""
    return pool >= 16 or (pool > 1 and groups <= 400)


def reshaped(a: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """`a.reshape(shape)`, with the strides of a dense array on axes of length 1."""
    v = a.reshape(shape)
    strides: list[int] = []
    dense = v.itemsize
    for length, stride in zip(reversed(v.shape), reversed(v.strides), strict=True):
        strides.insert(0, stride if length > 1 else dense)
        dense = length * strides[0]
    if v.strides == tuple(strides):
        return v
    return np.lib.stride_tricks.as_strided(v, strides=strides)


def is_view(a: NDArray[Any], shape: tuple[int, ...]) -> bool:
    """Whether `a.reshape(shape)` is a view: axes of which it makes one follow each other."""
    blocks: list[tuple[int, int]] = []
    for length, stride in zip(reversed(a.shape), reversed(a.strides), strict=True):
        if blocks and stride == blocks[-1][0] * blocks[-1][1]:
            blocks[-1] = (blocks[-1][0] * length, blocks[-1][1])
        elif length > 1:
            blocks.append((length, stride))
    wanted = [length for length in reversed(shape) if length > 1]
    for left, _ in blocks:
        while left > 1:
            length = wanted.pop(0)
            if left % length:
                return False
            left //= length
    return True


def _memory_order(x: NDArray[Any], channel: int) -> tuple[int, ...]:
    """The axes by falling stride; axes without one (size 1) stay where the layout has them."""
    axes = range(x.ndim)
    if any(x.strides[axis] == 0 and x.shape[axis] > 1 for axis in axes):
        return tuple(axes)  # a broadcast array: no memory order to follow
    real = [axis for axis in axes if x.shape[axis] > 1]
    by_stride = iter(sorted(real, key=lambda axis: -abs(x.strides[axis])))
    return tuple(next(by_stride) if axis in real else axis for axis in axes)


def _is_walkable(v: NDArray[Any]) -> bool:
    """Whether a (G, N, C, S) view is of one of the two families."""
    _, _, c, s = v.shape
    inner, size = (2, c) if s == 1 else (3, s)
    dense = size == 1 or v.strides[inner] == v.itemsize
    return dense and bool(v.flags.aligned) and v.dtype.isnative
