"""Arrays of more than 2**31 values, and channels of up to 1e8, which no oracle could take whole.

1. The data repeat one block, so that the exact statistics are the block's; every period of a
   result must have the first one's bits, and the first is judged beside the block.
2. The count of repeats is a power of two: dgamma and dbeta divide by it without rounding.
3. Nothing else of such a size is made: results go into the arguments' memory, and are compared
   in pieces.
4. The NumPy reference is left out: a channel's temporaries are several times its float64 values.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastbn
from oracle.arrays import DTYPES, LAYOUTS, Array
from support.bits import assert_same_bits, run_all
from support.judge import assert_within, judge_backward, judge_forward
from support.variants import CYTHON, VARIANTS, Variant, each_backend

COMPILED = [*CYTHON[:1], *(name for name in VARIANTS if name == "numba")]
of_compiled = pytest.mark.parametrize("variant", COMPILED, indirect=True)


@dataclass(frozen=True)
class Periodic:
    """An array of one block again and again: along the planes, or along the rows."""

    layout: str
    samples: int
    channels: int
    period: int
    repeats: int
    """Of the block in a channel, over all samples."""
    rank: int = 3

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        return self.shape_of(self.samples, self.period * self.repeats // self.samples)

    @property
    def block_shape(self) -> tuple[int, ...]:
        """Of the block, as one sample."""
        return self.shape_of(1, self.period)

    def shape_of(self, samples: int, places: int) -> tuple[int, ...]:
        """Of samples of so many places; without an axis of samples in rank 2."""
        if self.layout == "NCHW":
            return samples, self.channels, places
        return (samples, places, self.channels)[3 - self.rank :]

    def __str__(self) -> str:
        return f"{self.layout} {self.shape}"

    def periods(self, a: Array) -> Array:
        """A view of the array as (sample, channel, repeat, period); of rows, (1, 1, ...)."""
        if self.layout == "NCHW":
            return a.reshape(self.samples, self.channels, -1, self.period)
        return a.reshape(1, 1, self.repeats, -1)

    def filled(self, block: Array) -> Array:
        """The array of a block."""
        a = np.empty(self.shape, block.dtype)
        view = self.periods(a)
        view[...] = block.reshape(1, view.shape[1], 1, -1)
        return a

    def first(self, a: Array) -> Array:
        """A copy of the first period, after making sure that it is the only one."""
        view = self.periods(a).view(f"u{a.itemsize}")
        for sample in view:
            for channel, first in zip(sample, view[0, :, 0], strict=True):
                for start in range(0, len(channel), 1024):
                    assert (channel[start : start + 1024] == first).all(), (str(self), start)
        return self.periods(a)[0, :, 0].reshape(self.block_shape).copy()


def beyond_int32(layout: str, samples: int, channels: int, rank: int = 3) -> Periodic:
    """A little more than 2**31 values."""
    repeats = 1 << 18 if channels < 16 else 1 << 14
    return Periodic(layout, samples, channels, 2**31 // (channels * repeats) + 1, repeats, rank)


def block_of(p: Periodic, dtype: Any, mean: float, seed: int) -> Array:
    """A block of deviation 1."""
    return np.random.default_rng(seed).normal(mean, 1, p.block_shape).astype(dtype)


def parameters(p: Periodic, dtype: Any) -> tuple[Array, Array]:
    """gamma and beta."""
    gamma, beta = np.random.default_rng(2).normal(size=(2, p.channels)).astype(dtype)
    return gamma, beta


def check_forward_in_place(p: Periodic, dtype: Any, mean: float) -> None:
    """`batch_norm` of the array into itself, then `normalize` of that into itself."""
    block, (gamma, beta) = block_of(p, dtype, mean, 0), parameters(p, dtype)
    x = p.filled(block)
    result = fastbn.batch_norm(x, gamma, beta, layout=p.layout, out=x)
    result = result._replace(y=p.first(x))
    for judged in judge_forward(result, block, gamma, beta, layout=p.layout):
        assert_within(*judged)
    statistics = np.full(p.channels, 0.5), np.full(p.channels, 2.0)
    fastbn.normalize(x, *statistics, layout=p.layout, out=x)
    again = fastbn.normalize(result.y, *statistics, layout=p.layout)
    np.testing.assert_array_equal(p.first(x), again)


def check_backward_in_place(p: Periodic, dtype: Any, mean: float) -> None:
    """`batch_norm_backward` into dy."""
    block, dy_block = block_of(p, dtype, mean, 0), block_of(p, dtype, 0.5, 1)
    gamma, _ = parameters(p, dtype)
    statistics = fastbn.moments(block, layout=p.layout)
    x, dy = p.filled(block), p.filled(dy_block)
    dx, dgamma, dbeta = fastbn.batch_norm_backward(
        dy, x, *statistics, gamma, layout=p.layout, out=dy
    )
    assert dgamma is not None
    assert dbeta is not None
    got = fastbn.Gradients(p.first(dx), dgamma / p.repeats, dbeta / p.repeats)
    for judged in judge_backward(got, dy_block, block, *statistics, gamma, layout=p.layout):
        assert_within(*judged)


BEYOND_INT32 = [
    beyond_int32("NCHW", 2, 3),
    beyond_int32("NCHW", 1, 1),
    beyond_int32("NHWC", 2, 67),
    beyond_int32("NHWC", 1, 3, rank=2),
]


@pytest.mark.large(gigabytes=8.7)
@of_compiled
@pytest.mark.parametrize("p", BEYOND_INT32, ids=str)
def test_forward_beyond_int32(variant: Variant, p: Periodic) -> None:
    """No index or count of a forward is an int."""
    check_forward_in_place(p, np.float32, 3.0)


@pytest.mark.large(gigabytes=17.4)
@of_compiled
@pytest.mark.parametrize("p", BEYOND_INT32, ids=str)
def test_backward_beyond_int32(variant: Variant, p: Periodic) -> None:
    """No index or count of a backward is an int."""
    check_backward_in_place(p, np.float32, 3.0)


SOME = [Periodic("NCHW", 1, 1, 4883, 1 << 9), Periodic("NHWC", 1, 2, 4883, 1 << 9)]
MANY = [Periodic("NCHW", 1, 1, 6103, 1 << 14), Periodic("NHWC", 1, 2, 6103, 1 << 14)]
"""Of 2.5e6, and of just below 1e8 values a channel."""
LONG = [*SOME, *(pytest.param(p, marks=pytest.mark.large(gigabytes=3.3)) for p in MANY)]


@pytest.mark.slow
@of_compiled
@pytest.mark.parametrize("far", [False, True], ids=["ordinary", "far from 0"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", LONG, ids=str)
def test_many_values_a_channel(variant: Variant, p: Periodic, dtype: Any, far: bool) -> None:
    """The bounds hold for as many values as promised, at the largest |mean|/s promised."""
    limit = 0.9e6 if dtype is np.float32 else 0.9e12
    mean = limit if far else 1.0
    check_forward_in_place(p, dtype, mean)
    check_backward_in_place(p, dtype, mean)


@each_backend
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_further_apart_than_int32(layout: str, tmp_path: Path) -> None:
    """Few of them, in a file that is nearly all hole."""
    values = np.random.default_rng(0).normal(3, 2, (3, 2, 5, 12)).astype(np.float32)
    file = np.memmap(tmp_path / "values", np.float32, "w+", shape=(3, (1 << 31) + 120))
    x, dy = (file[:, start : start + 60].reshape(3, 5, 12) for start in (0, 1 << 31))
    x[...], dy[...] = values[:, 0], values[:, 1]
    assert_same_bits(run_all(x, dy, layout=layout), run_all(x.copy(), dy.copy(), layout=layout))
