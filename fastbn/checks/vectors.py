"""Per-channel vectors: parameters and statistics, and whose channels they must fit."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastbn.checks.arrays import ANY, DOUBLE, Types, array
from fastbn.checks.words import code_of, first_bad
from fastbn.elements import is_half
from fastbn.layouts import LAYOUTS, channel_axis


class Owner(NamedTuple):
    """Whose channels a vector of a layer must fit."""

    channels: int
    words: str


def owner_of(mean: Any) -> Owner:
    """What the vectors of a frozen batch norm must fit: as many channels as its mean has."""
    a = array("mean", mean, ANY)
    if a.ndim != 1:
        raise ValueError(
            f"mean has shape {a.shape}, expected rank 1, one value a channel; pass "
            f"{code_of('mean', mean)}.reshape(-1) if its order is right"
        )
    return Owner(len(a), f"mean has {len(a)} channels")


LAST = "last"
"""In place of a layout: channels are the last axis, whatever that is called."""


def per_channel(
    name: str,
    value: Any,
    x_name: str,
    x: NDArray[Any],
    layout: str,
    *,
    types: Types = ANY,
    runs: int | None = None,
) -> NDArray[Any]:
    """A (C,) or (runs, C) array that fits the channels of `x`, or its last axis."""
    a = array(name, value, types)
    axis = x.ndim - 1 if layout == LAST else channel_axis(layout, x.ndim)
    channels = x.shape[axis]
    if a.shape == ((channels,) if runs is None else (runs, channels)):
        return a
    if layout == LAST:
        raise ValueError(
            f"{name} has shape {a.shape}, expected ({channels},), an entry for each of the "
            f"{channels} values along the last axis of {x_name}, of shape {x.shape}"
        )
    if runs is not None:
        raise ValueError(
            f"{name} has shape {a.shape}, expected ({runs}, {channels}): with virtual_batch a "
            f"row for each group of the {len(x)} samples of {x_name}; pass what batch_norm returned"
        )
    message = (
        f"{name} has shape {a.shape} but {x_name} has {channels} channels "
        f"(axis {axis} of shape {x.shape}, layout {layout!r})"
    )
    other = next(known for known in LAYOUTS if known != layout)
    if a.shape == (x.shape[channel_axis(other, x.ndim)],):
        kind = "channels-last" if other == "NHWC" else "channels-first"
        raise ValueError(f"{message}; for {kind} data pass layout={other!r}")
    raise ValueError(f"{message}; {reshaping(code_of(name, value), a.shape, channels)}")


def reshaping(code: str, shape: tuple[int, ...], channels: int) -> str:
    """What to do with an array of another shape than (channels,)."""
    expected = f"expected shape ({channels},)"
    if shape == ():
        return f"{expected}: pass numpy.full({channels}, {code}) if it is the same for all"
    if len(shape) != 1 and math.prod(shape) == channels:
        return f"{expected}: pass {code}.reshape(-1) if its order is right"
    return f"{expected}, one value a channel"


def widened(a: NDArray[Any]) -> NDArray[Any]:
    """A parameter or statistic as it is computed with: half types as float32."""
    return a.astype(np.float32) if is_half(a.dtype) else a


def channel_vector(name: str, value: Any, owner: Owner, types: Types = ANY) -> NDArray[Any]:
    """A vector with one value for each channel of its owner; half types are widened."""
    a = array(name, value, types)
    if a.shape != (owner.channels,):
        remedy = reshaping(code_of(name, value), a.shape, owner.channels)
        raise ValueError(f"{name} has shape {a.shape} but {owner.words}; {remedy}")
    return widened(a)


def parameter(
    name: str, value: Any, x_name: str, x: NDArray[Any], layout: str
) -> NDArray[Any] | None:
    """gamma or beta: None, or one value a channel; half types are widened."""
    return None if value is None else widened(per_channel(name, value, x_name, x, layout))


def statistic(
    name: str,
    value: Any,
    x_name: str,
    x: NDArray[Any],
    layout: str,
    *,
    is_fixed: bool = True,
    runs: int | None = None,
) -> NDArray[Any]:
    """mean or var of each channel: of any type, widened, where fixed; else float64."""
    types = ANY if is_fixed else DOUBLE
    a = per_channel(name, value, x_name, x, layout, types=types, runs=runs)
    return widened(a)


def sample_statistic(
    name: str, value: Any, x_name: str, x: NDArray[Any], shape: tuple[int, ...]
) -> NDArray[Any]:
    """mean or var of each sample's groups of channels."""
    a = array(name, value, DOUBLE)
    if a.shape != shape:
        raise ValueError(
            f"{name} has shape {a.shape}, expected {shape}, an entry for each of the {len(x)} "
            f"samples of {x_name} and what shares statistics in it; pass what the forward returned"
        )
    return a


def mean(value: NDArray[Any], name: str = "mean") -> NDArray[Any]:
    """A mean of each channel that will be used again and again: not NaN."""
    channel = first_bad(np.isnan(value))
    if channel is not None:
        raise ValueError(
            f"{name}[{channel}] is nan: not a number; expected a number; "
            f"look at how channel {channel}'s statistics were made"
        )
    return value


def variance(value: NDArray[Any], *, nan: bool, name: str = "var") -> NDArray[Any]:
    """A variance of each channel: not negative, and NaN only where `nan` allows it."""
    bad = value < 0 if nan else ~(value >= 0)
    if bad.any():
        at = tuple(int(i) for i in np.unravel_index(bad.argmax(), bad.shape))
        expected = "zero or more" if nan else "zero or more, and no NaN"
        kind = "not a number" if math.isnan(value[at]) else "a variance cannot be negative"
        raise ValueError(
            f"{name}[{', '.join(map(str, at))}] is {value[at]}: {kind}; expected {expected}; "
            f"look at how channel {at[-1]}'s statistics were made"
        )
    return value
