"""Data that is hard to normalize: what single precision, one pass or one scale gets wrong.

Each case is a recipe for any shape and element type, so that tests and the accuracy benchmark ask
the same of everyone. Values are made in NCHW and rounded to the element type: what is then asked is
the exact result for the rounded values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.random import Generator

from benchmarks.oracle import Array

Shape = tuple[int, ...]


class Problem(NamedTuple):
    """The arguments of forward and backward, in NCHW."""

    x: Array
    dy: Array
    gamma: Array
    beta: Array
    eps: float


@dataclass(frozen=True)
class Hard:
    """One kind of hard data."""

    name: str
    x: Callable[[Generator, Shape], Array]
    dy: Callable[[Generator, Array], Array] | None = None
    """Of x; noise that leans on x where there is none."""
    beta: Callable[[Array], Array] | None = None
    """Of gamma; any where there is none."""
    eps: float = 1e-5

    def problem(self, shape: Shape, dtype: Any, seed: int = 0) -> Problem:
        """The case in one shape (N, C, ...)."""
        rng = np.random.default_rng(seed)
        with np.errstate(over="ignore", under="ignore"):
            x = self.x(rng, shape).astype(dtype, order="C")
        exact = x.astype(np.float64)
        gamma = rng.uniform(0.5, 1.5, shape[1])
        beta = rng.normal(size=shape[1]) if self.beta is None else self.beta(gamma)
        dy = leaning(rng, exact) if self.dy is None else self.dy(rng, exact)
        dy, gamma, beta = (a.astype(dtype) for a in (dy, gamma, beta))
        return Problem(x, dy, gamma, beta, self.eps)


def over_channels(shape: Shape) -> tuple[int, ...]:
    """All axes but that of the channels."""
    return tuple(axis for axis in range(len(shape)) if axis != 1)


def standardized(x: Array) -> Array:
    """xhat, about; 0 in channels that are constant or not finite."""
    over = over_channels(x.shape)
    with np.errstate(invalid="ignore", over="ignore"):
        scaled = x / np.abs(x).max(over, keepdims=True, initial=1e-300)
        centred = scaled - scaled.mean(over, keepdims=True)
        deviation = centred.std(over, keepdims=True)
        xhat: Array = np.where(deviation > 0, centred / np.where(deviation > 0, deviation, 1), 0)
    return np.where(np.isfinite(xhat), xhat, 0)


def leaning(rng: Generator, x: Array) -> Array:
    """Noise with a mean and a part along xhat: dgamma and dbeta are large."""
    noise = rng.normal(size=x.shape)
    return 0.5 + 0.5 * standardized(x) + noise


def small(rng: Generator, x: Array) -> Array:
    """Noise as ever, so small that dx is in the range of float32 where 1/s is not."""
    return 1e-5 * leaning(rng, x)


def normal(mean: float, s: float = 1.0) -> Callable[[Generator, Shape], Array]:
    return lambda rng, shape: rng.normal(mean, s, shape)


def times(factor: float) -> Callable[[Generator, Shape], Array]:
    """Of both signs, about as large as the factor."""
    return lambda rng, shape: factor * rng.uniform(-1, 1, shape)


def constant(rng: Generator, shape: Shape) -> Array:
    values = np.resize([0.1, -1 / 3, 2e3 + 0.1, 1e-30, 0.0, -3e3], shape[1])
    return np.broadcast_to(per_channel(values, shape), shape).copy()


def per_channel(values: Array, shape: Shape) -> Array:
    """A value for each channel, to broadcast against the shape."""
    return values.reshape(1, -1, *[1] * (len(shape) - 2))


def outlier(place: int) -> Callable[[Generator, Shape], Array]:
    """One value of 1e30 in each channel, its first or another."""

    def make(rng: Generator, shape: Shape) -> Array:
        rows = rng.normal(1, 2, (shape[1], shape[0], *shape[2:]))
        flat = rows.reshape(shape[1], -1)
        flat[:, place % flat.shape[1]] = 1e30
        return np.moveaxis(rows, 0, 1)

    return make


def side_by_side(rng: Generator, shape: Shape) -> Array:
    """From 1e-15 in one channel to 1e15 in another."""
    scales = 10.0 ** np.resize(np.arange(-15, 16, 3), shape[1])
    return per_channel(scales, shape) * rng.normal(3, 1, shape)


def alternating(rng: Generator, shape: Shape) -> Array:
    """Neighbours cancel in every sum."""
    signs: Array = (-1.0) ** np.indices(shape).sum(0)
    return signs * (1000 + rng.normal(size=shape))


def ascending(rng: Generator, shape: Shape) -> Array:
    """Sorted within each channel, far from 0."""
    rows = np.sort(rng.normal(500, 100, (shape[1], shape[0] * int(np.prod(shape[2:])))))
    return np.moveaxis(rows.reshape(shape[1], shape[0], *shape[2:]), 0, 1)


def jump(rng: Generator, shape: Shape) -> Array:
    """The level changes in the middle of the batch."""
    late = np.arange(shape[0]) >= shape[0] // 2
    return 900.0 * late.reshape(-1, *[1] * (len(shape) - 1)) + 0.01 * rng.normal(size=shape)


def poisoned(rng: Generator, shape: Shape) -> Array:
    """A NaN in the first channel and an infinity in the last."""
    x = rng.normal(1, 2, shape)
    x[(0, 0, *[0] * (len(shape) - 2))] = np.nan
    x[(-1, -1, *[-1] * (len(shape) - 2))] = np.inf
    return x


def two_values(rng: Generator, shape: Shape) -> Array:
    return 100 + rng.choice([-1.0, 1.0], shape)


def _of_float(dtype: Any) -> Iterator[Hard]:
    single = np.dtype(dtype).itemsize == 4
    yield Hard("ordinary: N(0, 1)", normal(0))
    for exponent in (2, 4, 6) if single else (4, 8, 12):
        yield Hard(f"mean 1e{exponent}, deviation 2", normal(10.0**exponent, 2))
    yield Hard("U(0, 1) + 250", lambda rng, shape: 250 + rng.uniform(size=shape))
    yield Hard("mean -1e3, deviation 1e-2", normal(-1e3, 1e-2))
    yield Hard("constant channels", constant)
    yield Hard("an outlier of 1e30", outlier(-2))
    yield Hard("an outlier of 1e30, first", outlier(0))
    yield Hard("sorted", ascending)
    yield Hard("a jump", jump)
    yield Hard("alternating signs", alternating)
    yield Hard("scales from 1e-15 to 1e15", side_by_side)
    yield Hard("near the largest", times(3.4e38 if single else 1e150))
    if single:
        yield Hard("subnormal, eps = 0", times(1e-40), dy=small, eps=0.0)
    yield Hard("near the smallest, eps = 0", times(1e-37 if single else 1e-150), eps=0.0)
    yield Hard("NaN and infinity in two channels", poisoned)
    yield Hard("deviation 1e-6, eps = 1e-12", normal(0, 1e-6), eps=1e-12)
    yield Hard("beta cancels gamma * xhat", two_values, beta=lambda gamma: -gamma)
    yield Hard("dy constant", normal(3), dy=lambda rng, x: np.full(x.shape, 0.7))
    yield Hard("dy parallel to xhat", normal(3), dy=lambda rng, x: 0.7 + standardized(x))


def hard_data(dtype: Any) -> dict[str, Hard]:
    """All cases for an element type, by name."""
    return {case.name: case for case in _of_float(dtype)}
