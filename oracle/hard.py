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

from oracle.arrays import Array

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
            x = np.ascontiguousarray(self.x(rng, shape), dtype)
        exact = x.astype(np.float64)
        gamma = rng.uniform(0.5, 1.5, shape[1])
        beta = rng.normal(size=shape[1]) if self.beta is None else self.beta(gamma)
        dy = leaning(rng, exact) if self.dy is None else self.dy(rng, exact)
        dy, gamma, beta = (a.astype(dtype) for a in (dy, gamma, beta))
        return Problem(x, dy, gamma, beta, self.eps)


def all_but_channels(shape: Shape) -> tuple[int, ...]:
    """All axes but that of the channels."""
    return tuple(axis for axis in range(len(shape)) if axis != 1)


def standardized(x: Array) -> Array:
    """xhat, about; 0 in channels that are constant or not finite."""
    over = all_but_channels(x.shape)
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


def leaning_of_size(size: float) -> Callable[[Generator, Array], Array]:
    """The same, so large or small that results stay representable beside an extreme x."""
    return lambda rng, x: size * leaning(rng, x)


def normal(mean: float, s: float = 1.0) -> Callable[[Generator, Shape], Array]:
    return lambda rng, shape: rng.normal(mean, s, shape)


def far(*ratios: float) -> Callable[[Generator, Shape], Array]:
    """Deviation 1 about a mean as large as the ratio: the first channel's first, and so on."""

    def make(rng: Generator, shape: Shape) -> Array:
        means = per_channel(np.resize(ratios, shape[1]), shape)
        return means + standardized(rng.normal(size=shape))

    return make


def times(factor: float) -> Callable[[Generator, Shape], Array]:
    """Of both signs, about as large as the factor."""
    return lambda rng, shape: factor * rng.uniform(-1, 1, shape)


def below(largest: float) -> Callable[[Generator, Shape], Array]:
    """Just below the largest: all of one sign, their mean beyond a thousand deviations."""
    return lambda rng, shape: largest * (1 - 1e-3 * rng.random(shape))


def rarely(value: float) -> Callable[[Generator, Shape], Array]:
    """Mostly the negative of a value, and now and then the value."""
    return lambda rng, shape: np.where(rng.random(shape) < 0.05, value, -value)


def constant(rng: Generator, shape: Shape) -> Array:
    values = np.resize([0.1, -1 / 3, 2e3 + 0.1, 1e-40, 0.0, -3e3], shape[1])
    return np.broadcast_to(per_channel(values, shape), shape).copy()


def per_channel(values: Array, shape: Shape) -> Array:
    """A value for each channel, to broadcast against the shape."""
    return values.reshape(1, -1, *[1] * (len(shape) - 2))


def outlier(place: int) -> Callable[[Generator, Shape], Array]:
    """One value of 1e30 in every second channel, beside ordinary ones."""

    def make(rng: Generator, shape: Shape) -> Array:
        rows = rng.normal(1, 2, (shape[1], shape[0], *shape[2:]))
        flat = rows.reshape(shape[1], -1)
        flat[::2, place % flat.shape[1]] = 1e30
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


def _far_away(limit: float) -> Iterator[Hard]:
    """|mean|/s up to the limit of the promise."""
    exponents = np.linspace(0, np.log10(limit), 4)
    for exponent in exponents[1:]:
        yield Hard(f"mean 1e{exponent:.0f}, deviation 1", far(0.99 * 10**exponent))
    below_limit = 0.99 * 10 ** np.linspace(exponents[-1], 0, 13)
    signs = (-1) ** np.arange(13)
    yield Hard(f"means to -1e{exponents[-1]:.0f}, eps = 0", far(*-signs * below_limit), eps=0.0)
    yield Hard("U(0, 1) + 250", lambda rng, shape: 250 + rng.uniform(size=shape))
    yield Hard("mean -1e3, deviation 1e-2", normal(-1e3, 1e-2))


def _in_order() -> Iterator[Hard]:
    """Ordinary values, one exceptional value or an order that sums do not like."""
    yield Hard("constant channels", constant)
    yield Hard("an outlier of 1e30", outlier(-2))
    yield Hard("an outlier of 1e30, first", outlier(0))
    yield Hard("an outlier of 1e30, second", outlier(1))
    yield Hard("an outlier of 1e30, in a second vector", outlier(16))
    yield Hard("an outlier of 1e30, last", outlier(-1))
    yield Hard("sorted", ascending)
    yield Hard("a jump", jump)
    yield Hard("alternating signs", alternating)
    yield Hard("NaN and infinity in two channels", poisoned)


def _at_the_ends(single: bool) -> Iterator[Hard]:
    """Scales of every size."""
    largest, smallest = (float(np.finfo(np.float32).max), 1e-37) if single else (1e153, 1e-150)
    yield Hard("scales from 1e-15 to 1e15", side_by_side)
    yield Hard("near the largest", times(largest))
    yield Hard("near the largest, of one sign", below(largest))
    yield Hard("near the largest, dy too", times(largest), dy=leaning_of_size(1e30))
    yield Hard("the largest and its negative", rarely(largest))
    if single:
        tiny = leaning_of_size(1e-10)
        yield Hard("subnormal, eps = 0", times(1e-40), dy=tiny, eps=0.0)
    of_results = leaning_of_size(1e-2)
    yield Hard("near the smallest, eps = 0", times(smallest), dy=of_results, eps=0.0)
    yield Hard("deviation 1e-6, eps = 1e-12", normal(0, 1e-6), eps=1e-12)


def _of_parameters() -> Iterator[Hard]:
    """Cancellation against beta, and gradients that are 0 but for rounding."""
    yield Hard("beta cancels gamma * xhat", two_values, beta=lambda gamma: -gamma)
    yield Hard("dy constant", normal(3), dy=lambda rng, x: np.full(x.shape, 0.7))
    yield Hard("dy parallel to xhat", normal(3), dy=lambda rng, x: 0.7 + standardized(x))


def hard_data(dtype: Any) -> dict[str, Hard]:
    """All cases for an element type, by name."""
    single = np.dtype(dtype).itemsize == 4
    ordinary = Hard("ordinary: N(0, 1)", normal(0))
    cases = (
        ordinary,
        *_far_away(1e6 if single else 1e12),
        *_in_order(),
        *_at_the_ends(single),
        *_of_parameters(),
    )
    return {case.name: case for case in cases}
