"""Hypothesis strategies: batch normalization problems inside the domain of the promises.

Two kinds, because each misses what the other finds: small dense arrays of any values, and recipes
(shape, distribution, seed) that reach the boundaries of vector lanes. Shrinking a recipe shrinks
its words. Overflow, NaN, infinity and empty arrays are outside this domain and have tests of
their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.lib.stride_tricks import as_strided
from numpy.random import Generator
from numpy.typing import NDArray

from oracle.arrays import DTYPES, LAYOUTS, channel_axis, channels_of
from support.memory import FORMS
from support.random_arrays import UNIT_STRIDES

Array = NDArray[Any]

AROUND_LANES = (1, 2, 7, 8, 9, 15, 16, 17, 31, 33)
LARGEST: dict[Any, float] = {np.float32: 1e3, np.float64: 1e9}
"""Keeps |mean| / sqrt(var + 1e-5) within 1e6 for float32 and 1e12 for float64."""


@dataclass(frozen=True)
class Problem:
    """The arguments of the five functions."""

    x: Array
    dy: Array
    gamma: Array | None
    beta: Array | None
    eps: float
    layout: str
    origin: str = field(default="drawn value by value")

    @property
    def channels(self) -> int:
        """The number of channels."""
        return channels_of(self.x, self.layout)

    @property
    def channel_axis(self) -> int:
        """The axis of the channels."""
        return channel_axis(self.x.ndim, self.layout)

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments that all functions but `moments` take."""
        return {"eps": self.eps, "layout": self.layout}


DISTRIBUTIONS: dict[str, Callable[[Generator, tuple[int, ...]], Array]] = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "uniform": lambda rng, shape: rng.uniform(-1, 1, shape),
    "skewed": lambda rng, shape: rng.exponential(size=shape) ** 2,
    "two values": lambda rng, shape: rng.choice([-1.0, 1.0], shape),
    "mostly zero": lambda rng, shape: np.where(rng.random(shape) < 0.9, 0, rng.normal(size=shape)),
    "constant": lambda rng, shape: np.zeros(shape),
}

epsilons = st.sampled_from([1e-5, 1e-3, 1.0])


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, ...]:
    """Rank 2 to 5, one or two axes around the size of vector registers."""
    rank = draw(st.integers(2, 5))
    shape = [draw(st.integers(1, 3)) for _ in range(rank)]
    for axis in draw(st.sets(st.integers(0, rank - 1), min_size=1, max_size=2)):
        shape[axis] = draw(st.sampled_from(AROUND_LANES))
    return tuple(shape)


@st.composite
def parameters(draw: st.DrawFn, channels: int) -> Array | None:
    """gamma or beta: not given, or any mix of ordinary values and zeros, of either type."""
    if draw(st.booleans()):
        return None
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    values = rng.normal(size=channels) * rng.choice([0.0, 1.0, 1e-3, 1e3], channels)
    vector: Array = values.astype(draw(st.sampled_from(DTYPES)))
    return vector


@st.composite
def recipes(draw: st.DrawFn, dtypes: tuple[Any, ...] = DTYPES) -> Problem:
    """A problem from a few words: any shape, layout, memory form and distribution."""
    shape, dtype, layout = draw(shapes()), draw(st.sampled_from(dtypes)), draw(layouts)
    # NumPy swaps the bytes of its own types alone.
    own = np.dtype(dtype).kind == "f"
    form = draw(st.sampled_from(sorted(f for f in FORMS if own or f != "byte-swapped")))
    kind = draw(st.sampled_from(sorted(DISTRIBUTIONS)))
    loc, scale = draw(st.sampled_from([0, 1, -30, 1000])), draw(st.sampled_from([1, 0.01, 50]))
    seed = draw(st.integers(0, 99))
    rng = np.random.default_rng(seed)
    x = (loc + scale * DISTRIBUTIONS[kind](rng, shape)).astype(dtype)
    dy = rng.normal(draw(st.sampled_from([0, 1])), 1, shape).astype(dtype)
    channels = channels_of(x, layout)
    return Problem(
        FORMS[form](x),
        dy,
        draw(parameters(channels)),
        draw(parameters(channels)),
        draw(epsilons),
        layout,
        f"{kind}, {loc} + {scale} * v, {form}, seed {seed}",
    )


@st.composite
def dense_problems(draw: st.DrawFn) -> Problem:
    """A small problem whose every value is Hypothesis's choice."""
    dtype, layout = draw(st.sampled_from(DTYPES)), draw(layouts)
    shape = draw(hnp.array_shapes(min_dims=2, max_dims=4, min_side=1, max_side=4))

    def values(largest: float) -> Array:
        limit = float(np.asarray(largest, dtype))
        width: Any = np.dtype(dtype).itemsize * 8
        # Nothing underflows: what does is the subject of test_special_values.py.
        elements = st.floats(-limit, limit, width=width).map(lambda v: v if abs(v) > 1e-15 else 0.0)
        # Without nothing() as its fill the strategy gives nearly constant arrays.
        array: Array = draw(hnp.arrays(dtype, shape, elements=elements, fill=st.nothing()))
        return array

    x, dy = values(LARGEST[dtype]), values(100.0)
    channels = channels_of(x, layout)
    return Problem(
        x, dy, draw(parameters(channels)), draw(parameters(channels)), draw(epsilons), layout
    )


@st.composite
def any_order(draw: st.DrawFn, shape: tuple[int, ...], dtype: Any) -> Array:
    """Of any order of the axes in memory, forwards and backwards, with gaps or without."""
    order = draw(st.permutations(range(len(shape))))
    gaps = [draw(st.sampled_from([1, 1, 1, 2])) for _ in shape]
    turns = tuple(draw(st.sampled_from([1, 1, 1, -1])) for _ in shape)
    large = np.zeros([shape[axis] * gaps[axis] for axis in order], dtype)
    some = large[tuple(slice(None, None, gaps[axis]) for axis in order)]
    return some.transpose(np.argsort(order))[tuple(slice(None, None, turn) for turn in turns)]


layouts = st.sampled_from(LAYOUTS)


@st.composite
def unit_strides(draw: st.DrawFn) -> Callable[[Array], Array]:
    """A way to place arrays: dense copies, but that an axis of length 1 has any stride."""
    strides = cycle(draw(st.lists(st.sampled_from(UNIT_STRIDES), min_size=1, max_size=9)))

    def place(a: Array) -> Array:
        dense = np.array(a, order="C")
        odd = [next(strides) if n == 1 else s for n, s in zip(a.shape, dense.strides, strict=True)]
        return as_strided(dense, a.shape, odd)

    return place


@st.composite
def shapes_of_ones(draw: st.DrawFn) -> tuple[int, ...]:
    """Rank 2 to 5, of which at most two axes are longer than 1."""
    shape = [1] * draw(st.integers(2, 5))
    for axis in draw(st.lists(st.integers(0, len(shape) - 1), max_size=2)):
        shape[axis] = draw(st.sampled_from([2, 3, 5, 17, 33]))
    return tuple(shape)


problems = st.one_of(recipes(), dense_problems())


@st.composite
def whole_numbers(draw: st.DrawFn) -> Problem:
    """A problem of small whole numbers, on which sums and small multiples are exact."""
    shape, dtype = draw(shapes()), draw(st.sampled_from(DTYPES))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    x, dy = rng.integers(-8, 9, (2, *shape)).astype(dtype)
    layout = draw(layouts)
    gamma = draw(parameters(channels_of(x, layout)))
    return Problem(x, dy, gamma, None, draw(epsilons), layout, "whole numbers")
