"""The arguments of the public functions: what is accepted, and every message about what is not.

Each function looks at one argument and returns it in the form that the backends take, or raises
before anything has been written. What it returns is all that callers go on with: arrays are
numpy.ndarray itself, and options the words of our tables, whatever subclass came. A message names
the argument, what came, what was expected and what to do.
"""

from __future__ import annotations

import difflib
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastbn import activations
from fastbn.activations import Activation
from fastbn.elements import ELEMENTS, FLOATS, is_element, is_float, is_half
from fastbn.errors import MOST, shown
from fastbn.layouts import LAYOUTS, channel_axis
from fastbn.results import GradientSums

MAX_THREADS = 1024
CLOSE = 0.8
"""From which ratio of difflib's on a name is taken for another one."""
SOME = 5
"""Names that a message lists at most."""


def layout(value: Any) -> str:
    """One of the names in `LAYOUTS`."""
    word = _word(value)
    if word in LAYOUTS:
        return word
    raise _wrong_type_or_value(
        value,
        str,
        f"layout is {shown(value)}, expected 'NCHW' (channels on axis 1) or 'NHWC' (channels "
        "last); it names where the channels are, for arrays of any rank from 2 up",
    )


def _word(value: Any) -> str:
    """The characters of a str, of whatever subclass; none of anything else."""
    return str.__str__(value) if isinstance(value, str) else ""


def plain(value: Any) -> NDArray[Any] | None:
    """An array as numpy.ndarray itself, whatever its class makes of it; None of what is none."""
    if type(value) is np.ndarray:
        return value
    if not issubclass(type(value), np.ndarray):
        return None
    view: NDArray[Any] = np.ndarray.view(value, np.ndarray)
    return view


def _code(name: str, value: Any) -> str:
    """Code that gives what came as an array with ndarray's own methods."""
    return name if type(value) is np.ndarray else f"numpy.asarray({name})"


class Types(NamedTuple):
    """The element types that an array may have, what others are converted to, and why."""

    words: str
    taken: Callable[[np.dtype[Any]], bool]
    wanted: str = "numpy.float32"
    reason: str = ""


_ELEMENTS = Types(ELEMENTS, is_element)
_FLOATS = Types(FLOATS, is_float)
_EXACT = Types(
    "float64",
    lambda dtype: is_float(dtype) and dtype.itemsize == 8,
    "numpy.float64",
    ": the gradient through the batch's own statistics needs the digits that the forward returned",
)


def array(name: str, value: Any, types: Types = _FLOATS) -> NDArray[Any]:
    """An ndarray of certain types, in either byte order."""
    known = types.words
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(
            f"{name} is a numpy.ma.MaskedArray, expected a plain numpy.ndarray of {known}: "
            f"a mask would be ignored; pass {name}.filled(value), or {name}.data to ignore it"
        )
    a = plain(value)
    if a is None:
        raise TypeError(
            f"{name} is {_described(value)}, expected a numpy.ndarray of {known}; "
            + _converted(name, value, types.wanted)
        )
    if not types.taken(a.dtype):
        came = f"{name} has dtype {_named(a.dtype)}, expected {known}{types.reason}"
        raise TypeError(f"{came}; {_retyped(_code(name, value), a.dtype, types.wanted)}")
    return a


def _converted(name: str, value: Any, dtype: str) -> str:
    """What to do with something that is no array."""
    if value is None or isinstance(value, str | bytes):
        return "pass one"
    return f"convert it with numpy.asarray({name}, dtype={dtype})"


def _retyped(code: str, dtype: np.dtype[Any], wanted: str) -> str:
    """What to do with an array of a type that is not taken."""
    if dtype.kind == "c":
        return f"pass {code}.real, {code}.imag, or both as channels of their own"
    if dtype == np.dtype("V2"):
        return f"if it is bfloat16, as numpy.load gives it, pass {code}.view(ml_dtypes.bfloat16)"
    is_wide = dtype.kind == "f" and dtype.itemsize > 8
    return f"convert it with {code}.astype({'numpy.float64' if is_wide else wanted})"


def batch(name: str, value: Any) -> NDArray[Any]:
    """The array that is normalized (or its gradient, where no x is needed): rank 2 or more."""
    a = array(name, value, _ELEMENTS)
    if a.ndim < 2:
        code = _code(name, value)
        remedy = f"with {code}[None, None]"
        if a.ndim:
            remedy = f"with {code}[:, None] (values of one channel) or {code}[None, :] (one sample)"
        raise ValueError(
            f"{name} has rank {a.ndim} (shape {a.shape}), expected rank 2 or more: samples and "
            f"channels, then any spatial axes; add what is missing {remedy}"
        )
    return a


_COMPANIONS = {
    "dy": "the gradient with respect to y, which has x's shape",
    "ddx": "the gradient with respect to the dx of the backward function, which has x's shape",
    "residual": "an array of x's shape; a smaller one with numpy.broadcast_to(residual, x.shape)",
    "y": "what the forward returned",
}
"""Arrays that must be like x, and what to pass."""


def companion(name: str, value: Any, x_name: str, x: NDArray[Any]) -> NDArray[Any]:
    """dy, ddx, residual or y: of x's shape and dtype (byte order apart)."""
    a = array(name, value, _ELEMENTS)
    if a.shape != x.shape:
        raise ValueError(
            f"{name} has shape {a.shape}, expected {x.shape}, the shape of {x_name}; "
            f"pass {_COMPANIONS[name]}"
        )
    if a.dtype.newbyteorder("=") != x.dtype.newbyteorder("="):
        raise TypeError(
            f"{name} has dtype {a.dtype}, expected {x.dtype}, the dtype of {x_name}; "
            f"convert it with {_code(name, value)}.astype({_spelled(x, x_name)})"
        )
    return a


def where(value: Any, x_name: str, x: NDArray[Any], layout: str) -> NDArray[np.bool_]:
    """Which places count: of x's shape, but for a single channel."""
    axis = channel_axis(layout, x.ndim)
    single = (*x.shape[:axis], 1, *x.shape[axis + 1 :])
    expected = f"expected a numpy.ndarray of bool that broadcasts to {single}"
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(
            "where is a numpy.ma.MaskedArray, expected a plain numpy.ndarray of bool; pass "
            "where.filled(False)"
        )
    a = plain(value)
    if a is None:
        remedy = _converted("where", value, "bool")
        raise TypeError(f"where is {_described(value)}, {expected}; {remedy}")
    if a.dtype != np.bool_:
        raise TypeError(
            f"where has dtype {_named(a.dtype)}, {expected}; convert it with "
            f"{_code('where', value)}.astype(bool), if what is not 0 counts"
        )
    try:
        return np.broadcast_to(a, single)
    except ValueError:
        pass
    remedy = "it is the same for all channels: its axis of channels has length 1"
    if a.shape == single[:axis] + single[axis + 1 :]:
        code = _code("where", value)
        remedy = f"add the axis of channels with numpy.expand_dims({code}, {axis})"
    raise ValueError(
        f"where has shape {a.shape}, expected {single} or what broadcasts to it, for {x_name} "
        f"of shape {x.shape} and layout {layout!r}; {remedy}"
    )


def weights(value: Any, x_name: str, x: NDArray[Any]) -> NDArray[Any]:
    """How much each sample counts: finite, zero or more."""
    a = array("weights", value)
    if a.shape != x.shape[:1]:
        raise ValueError(
            f"weights has shape {a.shape}, expected {x.shape[:1]}, one value a sample of {x_name}; "
            "for places use where"
        )
    if a.size and not 0 <= a.min() <= a.max() < np.inf:
        sample = int((~((a >= 0) & np.isfinite(a))).argmax())
        raise ValueError(
            f"weights[{sample}] is {a[sample]}, expected a finite number, zero or more; it is how "
            "much a sample counts in the statistics"
        )
    return a


def total_weight(value: float) -> float:
    """The sum of all weights: a float64."""
    if value == math.inf:
        raise ValueError(
            f"weights add up to more than {sys.float_info.max:.4g} over the values of a channel, "
            "expected a sum that float64 holds; their scale changes nothing but the count: divide "
            "them by the largest"
        )
    return value


def activation(value: Any) -> Activation:
    """What is done to y last; `activations.of` knows them."""
    known = activations.of(value)
    if known is None:
        error = ValueError if isinstance(value, str | tuple) else TypeError
        names = ", ".join(repr(name) for name in activations.NAMED)
        raise error(
            f"activation is {shown(value)}, expected None, {names} or ('{activations.LEAKY}', "
            "slope) with 0 < slope < 1; apply any other activation to y afterwards"
        )
    return known


def activation_name(value: Any) -> str | tuple[str, float] | None:
    """The same as a layer keeps it: of Python's own types, which print as they are written."""
    slope = activation(value).slope
    if isinstance(value, tuple):
        return activations.LEAKY, slope
    return None if value is None else _word(value)


def gate(
    y: Any, asked: Any, x_name: str, x: NDArray[Any]
) -> tuple[Activation, NDArray[Any] | None]:
    """What was done to y, and the forward's y, which the gradient through an activation needs;
    without one nothing looks at it."""
    known = activation(asked)
    if asked is None:
        return known, None
    if y is None:
        raise TypeError(
            f"y is None, expected the forward's y: the gradient through activation "
            f"{shown(asked)} follows from it; pass y=y"
        )
    return known, companion("y", y, x_name, x)


def no_activation(value: Any) -> None:
    """None, where an activation would have to be differentiated twice."""
    if value is not None:
        error = ValueError if isinstance(value, str | tuple) else TypeError
        raise error(
            f"activation is {shown(value)}, expected None: an activation has no second derivative "
            "at its kinks; apply it apart: multiply dy by its slope where it gave y, and "
            "afterwards ddy too"
        )


def some_gradient(**given: Any) -> None:
    """Gradients of which not all are absent."""
    if all(value is None for value in given.values()):
        raise TypeError(
            f"{', '.join(given)} are all None, expected an array in place of one or more: the "
            "gradients with respect to what the backward function gave; pass those that there are"
        )


def may_lack_x(x: Any, *, frozen: bool, params: bool) -> bool:
    """Whether x is None where the gradient does not need it."""
    if x is None and frozen and params:
        raise TypeError(
            "x is None, expected the array given to normalize: dgamma is a sum over dy and x; "
            "pass x, or params=False to have dx alone"
        )
    return x is None and frozen


def per_channel(
    name: str,
    value: Any,
    x_name: str,
    x: NDArray[Any],
    layout: str,
    *,
    types: Types = _ELEMENTS,
    groups: int | None = None,
) -> NDArray[Any]:
    """A (C,) or (groups, C) array that fits the channels of `x`."""
    a = array(name, value, types)
    axis = channel_axis(layout, x.ndim)
    channels = x.shape[axis]
    if a.shape == ((channels,) if groups is None else (groups, channels)):
        return a
    if groups is not None:
        raise ValueError(
            f"{name} has shape {a.shape}, expected ({groups}, {channels}): with virtual_batch a "
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
    raise ValueError(f"{message}; {_vector(_code(name, value), a.shape, channels)}")


def _vector(code: str, shape: tuple[int, ...], channels: int) -> str:
    """What to do with an array of another shape than (channels,)."""
    expected = f"expected shape ({channels},)"
    if shape == ():
        return f"{expected}: pass numpy.full({channels}, {code}) if it is the same for all"
    if len(shape) != 1 and math.prod(shape) == channels:
        return f"{expected}: pass {code}.reshape(-1) if its order is right"
    return f"{expected}, one value a channel"


def _widened(a: NDArray[Any]) -> NDArray[Any]:
    """A parameter or statistic as it is computed with: half types as float32."""
    return a.astype(np.float32) if is_half(a.dtype) else a


def parameter(
    name: str, value: Any, x_name: str, x: NDArray[Any], layout: str
) -> NDArray[Any] | None:
    """gamma or beta: None, or one value a channel; half types are widened."""
    return None if value is None else _widened(per_channel(name, value, x_name, x, layout))


def statistic(
    name: str,
    value: Any,
    x_name: str,
    x: NDArray[Any],
    layout: str,
    *,
    single: bool = True,
    groups: int | None = None,
) -> NDArray[Any]:
    """mean or var of each channel; less than float64, widened, only where `single` says so."""
    types = _ELEMENTS if single else _EXACT
    a = per_channel(name, value, x_name, x, layout, types=types, groups=groups)
    return _widened(a)


def sample_statistic(
    name: str, value: Any, x_name: str, x: NDArray[Any], shape: tuple[int, ...]
) -> NDArray[Any]:
    """mean or var of each sample's groups of channels."""
    a = array(name, value, _EXACT)
    if a.shape != shape:
        raise ValueError(
            f"{name} has shape {a.shape}, expected {shape}, an entry for each of the {len(x)} "
            f"samples of {x_name} and what shares statistics in it; pass what the forward returned"
        )
    return a


def channel_groups(value: Any, channels: int) -> int:
    """Groups of as many channels each."""
    n = _whole("groups", value, "a whole number", "pass an int")
    if n < 1:
        raise ValueError(
            f"groups is {shown(n)}, expected 1 or more; 1 is layer norm, and as many as "
            "channels instance norm"
        )
    if channels % n != 0:
        raise ValueError(
            f"groups is {shown(n)}, expected a divisor of {channels}, the number of channels: "
            "groups have as many channels each; pass one, or another layout"
        )
    return n


def mean(value: NDArray[Any], name: str = "mean") -> NDArray[Any]:
    """A mean of each channel that will be used again and again: not NaN."""
    channel = _first(np.isnan(value))
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


def virtual_batch(value: Any, **others: Any) -> int | None:
    """How many samples have statistics of their own; None for all. Goes with nothing else."""
    if value is None:
        return None
    remedy = "pass an int, or None for the batch as a whole"
    n = _whole("virtual_batch", value, "a whole number of samples", remedy)
    if n < 1:
        raise ValueError(
            f"virtual_batch is {shown(n)}, expected 1 or more samples; pass None for the batch as "
            "a whole"
        )
    for name, other in others.items():
        if other is not None:
            raise ValueError(
                f"virtual_batch and {name} are both given, expected one of them: {name} is of the "
                f"batch as a whole; call the function for each group of samples with its {name}"
            )
    return n


def _first(bad: NDArray[np.bool_]) -> int | None:
    """The first channel that is bad."""
    return int(bad.argmax()) if bad.any() else None


def gradient_sums(
    value: Any, own: float, x_name: str, x: NDArray[Any], layout: str
) -> GradientSums:
    """dgamma, dbeta and count of a whole batch: vectors of float64, and at least x's own count."""
    if not isinstance(value, tuple | list) or len(value) != 3:
        raise TypeError(
            f"sums is {_described(value)}, expected (dgamma, dbeta, count) as gradient_sums gives "
            "them, added up over all parts of the batch"
        )
    dgamma, dbeta = (
        statistic(f"sums[{i}]", value[i], x_name, x, layout, single=False) for i in (0, 1)
    )
    n = count("sums[2]", value[2])
    if n < own:
        raise ValueError(
            f"sums[2] is {n}, expected the values of a channel in all parts of the batch, at "
            f"least the {own} of {x_name}; add up the counts that gradient_sums gives"
        )
    return GradientSums(dgamma.astype(np.float64), dbeta.astype(np.float64), n)


def count(name: str, value: Any) -> float:
    """How many values there are, or the sum of their weights: finite, zero or more; also an array
    of it alone, as sums over processes give it."""
    a = plain(value)
    number = a[()] if a is not None and a.ndim == 0 else value
    if not isinstance(number, Real) or isinstance(number, bool | np.bool_):
        raise TypeError(f"{name} is {_described(value)}, expected a number of values; pass an int")
    n = int(number) if isinstance(number, Integral) else float(number)
    if not 0 <= n <= sys.float_info.max:
        raise ValueError(
            f"{name} is {shown(n)}, expected a finite number, zero or more: how many values a "
            "channel has"
        )
    return n


def epsilon(value: Any) -> float:
    """eps: a finite number, zero or more."""
    if not isinstance(value, Real) or isinstance(value, bool | np.bool_):
        raise TypeError(
            f"eps is {_described(value)}, expected a number, zero or more; pass a float, as 1e-5"
        )
    eps = _as_float(value)
    if not (eps >= 0 and math.isfinite(eps)):
        raise ValueError(
            f"eps is {eps}, expected a finite number, zero or more; it is added to the variance "
            "before the square root, 1e-5 is usual"
        )
    return eps


def _as_float(value: Real) -> float:
    """The nearest float; infinity for what is too large."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


class Owner(NamedTuple):
    """Whose channels a vector of a layer must fit."""

    channels: int
    words: str


def statistics(mean: Any) -> Owner:
    """What the vectors of a frozen batch norm must fit: as many channels as its mean has."""
    a = array("mean", mean, _ELEMENTS)
    if a.ndim != 1:
        raise ValueError(
            f"mean has shape {a.shape}, expected rank 1, one value a channel; pass "
            f"{_code('mean', mean)}.reshape(-1) if its order is right"
        )
    return Owner(len(a), f"mean has {len(a)} channels")


def batch_of(made: str, x: Any, channels: int, layout_name: Any) -> NDArray[Any]:
    """An array with the channels of something that was made for them: a layer, say."""
    a, known = batch("x", x), layout(layout_name)
    axis = channel_axis(known, a.ndim)
    if a.shape[axis] != channels:
        other = next(name for name in LAYOUTS if name != known)
        fits = a.shape[channel_axis(other, a.ndim)] == channels
        remedy = f"make the {made} with layout={other!r}" if fits else "pass another array"
        raise ValueError(
            f"x has {a.shape[axis]} channels (axis {axis} of shape {a.shape}, layout {known!r}), "
            f"expected {channels}, as the {made} has; {remedy}"
        )
    return a


# ---- Moments and populations ----


def flat_moments(name: str, value: Any) -> tuple[float, float, NDArray[Any], NDArray[Any]]:
    """Two numbers about counts and two vectors of a value a channel, from one flat array."""
    a = array(name, value)
    if a.ndim != 1 or a.size % 2 or not a.size:
        raise ValueError(
            f"{name} has shape {a.shape}, expected (2 + 2 * channels,): two numbers and two "
            "vectors, as Moments gives them"
        )
    first, second = a[2:].astype(np.float64).reshape(2, -1)
    n, m = (
        count(f"{name}[{i}]", int(number) if number.is_integer() else number)
        for i, number in enumerate(a[:2].tolist())
    )
    return n, m, first, second


def effective_count(value: Any, total: float) -> float:
    """As many values as these that weigh `total` come to; where not given, they weigh 1 each."""
    if value is None:
        return max(total, 1) if total else 0
    n = count("effective_count", value)
    if n < 1 if total else n:
        raise ValueError(
            f"effective_count is {n}, expected {'1 or more' if total else 0} where count is "
            f"{total}: how many values, if all weighed the same; leave it out if they do"
        )
    return n


def squared_weights(value: float, total: float) -> float:
    """The effective number of values from the sum of their squared weights, and of their weights.

    Parts whose squares are subnormal may be among them.
    """
    if value == total:
        return effective_count(None, total)
    n = total * (float(total) / value) if value >= 2.0**-960 else 0.0
    if not 1 - ROUNDING <= n < math.inf:
        raise ValueError(
            f"sums[1] is {value} where sums[0] is {total}, expected the sum of the squared weights "
            "of values that weigh so much; add up what to_sums gives or, where squares are out of "
            "float64's range, multiply all weights by one number before"
        )
    return max(n, 1.0)


def same_channels(mean: NDArray[Any], other: Any, kind: type) -> None:
    """Moments that can be merged."""
    if not isinstance(other, kind):
        raise TypeError(
            f"other is {_described(other)}, expected {kind.__name__}; make them with "
            f"fastbn.{kind.__name__}.of(x)"
        )
    channels = len(other.mean)  # type: ignore[attr-defined]  # Moments, which import this module
    if channels != len(mean):
        raise ValueError(
            f"other has {channels} channels, expected {len(mean)}; merge moments of the same layer"
        )


def population(name: str, batches: int) -> None:
    """At least one batch with values."""
    if not batches:
        raise ValueError(
            f"{name} had no batch with values, expected one or more; an iterator is used up by one "
            "walk over it (pass a list), and a layer counts what forward calls it on"
        )


def layers(value: Any, kind: type[Any]) -> None:
    """Layers whose running statistics can be estimated: each once."""
    if isinstance(value, kind) or not isinstance(value, Sequence) or not value:
        raise TypeError(
            f"layers is {_described(value)}, expected a list of {kind.__name__}, in the order in "
            "which forward calls them; pass [layer] for one"
        )
    for i, layer in enumerate(value):
        if not isinstance(layer, kind):
            raise TypeError(
                f"layers[{i}] is {_described(layer)}, expected a {kind.__name__}; leave out what "
                "is none"
            )
        if any(layer is other for other in value[:i]):
            raise ValueError(f"layers[{i}] is there twice, expected each layer once; leave it out")
        tracked = layer.running_mean, layer.running_var, layer.num_batches_tracked
        running(*tracked, layer.channels, writes=True, nan=True, of=f"layers[{i}].")


def network(forward: Any) -> None:
    """What takes a batch through a network."""
    if not callable(forward):
        raise TypeError(
            f"forward is {_described(forward)}, expected a callable that takes a batch and calls "
            "the layers on it; pass the network"
        )


def walks(batches: Any, number: int = 1) -> None:
    """Batches that can be walked over so many times."""
    if not (isinstance(batches, Iterable) or hasattr(type(batches), "__getitem__")):
        raise TypeError(
            f"batches is {_described(batches)}, expected an iterable of batches; pass [batch] for "
            "one"
        )
    if number > 1 and isinstance(batches, Iterator):
        raise TypeError(
            f"batches is {_described(batches)}, which can be walked over once, expected something "
            f"for {number} walks, one a layer; pass a list, or sequential=False"
        )


def unbiased_factor(count: float, n: float) -> float:
    """n / (n - 1), for more than one value."""
    if n <= 1 + ROUNDING:
        came = f"count is {n}" if n == count else f"effective_count is {n}"
        raise ValueError(
            f"{came}, expected more than 1: one value has no unbiased variance; "
            "give more values, or use the biased var"
        )
    return n / (n - 1)


ROUNDING = 2.0**-40
"""How near to 1 an effective number of values tells too little of n - 1."""
METHODS = ("exact", "average")
ONE_VALUE = ("raise", "running", "skip")
NONFINITE = ("update", "raise", "skip")


def option(name: str, value: Any, known: tuple[str, ...]) -> str:
    """One of a few words."""
    word = _word(value)
    if word in known:
        return word
    words = ", ".join(repr(word) for word in known)
    raise _wrong_type_or_value(
        value, str, f"{name} is {shown(value)}, expected one of {words}; pass one of them"
    )


# ---- The layer ----


def channels(value: Any) -> int:
    """How many channels a layer has: one or more."""
    n = _whole("channels", value, "a whole number", "pass an int")
    if n < 1:
        raise ValueError(
            f"channels is {shown(n)}, expected one or more; pass those of the arrays to come"
        )
    return n


def momentum(momentum: Any, decay: Any, default: float) -> tuple[float | None, float | None]:
    """The weight of the new batch or that of the old; one of them, or the default."""
    if decay is not None and momentum is not default:
        raise ValueError(
            f"momentum is {shown(momentum)} and decay is {shown(decay)}, expected one of them: "
            "momentum is the weight of the new batch, decay the weight of the old; leave one out"
        )
    if decay is not None:
        return None, weight_of_old(decay)
    if momentum is None:
        return None, None
    return _weight("momentum", momentum, "of the new batch"), None


def weight_of_old(decay: Any) -> float:
    """decay alone."""
    return _weight("decay", decay, "of the old statistics")


def _weight(name: str, value: Any, whose: str) -> float:
    """A number from 0 to 1."""
    if not isinstance(value, Real) or isinstance(value, bool | np.bool_):
        raise TypeError(
            f"{name} is {_described(value)}, expected a number from 0 to 1; for the average of all "
            "batches pass momentum=None"
        )
    number = _as_float(value)
    if not 0 <= number <= 1:
        raise ValueError(
            f"{name} is {number}, expected a number from 0 to 1: it is the weight {whose}, and the "
            f"other gets 1 - {name}"
        )
    return number


def one_value(value: Any, tracks: bool, virtual_batch: int | None) -> str:
    """What a layer does with one value a channel."""
    known = option("one_value", value, ONE_VALUE)
    if known == "running" and not tracks:
        raise ValueError(
            "one_value is 'running', expected 'raise' or 'skip' where track_running_stats is "
            "False: there are no running statistics to use"
        )
    if known == "running" and virtual_batch is not None:
        raise ValueError(
            f"one_value is 'running', expected 'raise' or 'skip' where virtual_batch is "
            f"{virtual_batch}: the groups of a batch are normalized alike; pass 'skip' to leave "
            "groups of one value out of the running statistics"
        )
    return known


def renormalization(value: Any, kind: type, tracks: bool, virtual_batch: int | None) -> Any:
    """What a layer's renormalization is limited by; None for none."""
    if value is None:
        return None
    if not isinstance(value, kind):
        raise TypeError(
            f"renormalization is {_described(value)}, expected a fastbn.{kind.__name__} or None; "
            f"pass fastbn.{kind.__name__}() for the limits of the paper"
        )
    if not tracks:
        raise ValueError(
            "renormalization is given, expected None where track_running_stats is False: it goes "
            "by the running statistics; leave one of them out"
        )
    if virtual_batch is not None:
        raise ValueError(
            "renormalization and virtual_batch are both given, expected one of them: r and d are "
            "of the batch as a whole; leave one out"
        )
    return value


def frozen_statistics(value: Any, tracks: bool) -> bool:
    """Whether a layer goes by its running statistics always."""
    is_frozen = flag("frozen_statistics", value)
    if is_frozen and not tracks:
        raise ValueError(
            "frozen_statistics is True, expected False where track_running_stats is False: there "
            "are no running statistics to go by; leave one of them out"
        )
    return is_frozen


def limit(name: str, value: Any, least: float, meaning: str) -> float:
    """How far renormalization goes at most."""
    if not isinstance(value, Real) or isinstance(value, bool | np.bool_):
        raise TypeError(
            f"{name} is {_described(value)}, expected a number, {least} or more; pass a float"
        )
    number = _as_float(value)
    if not least <= number < math.inf:
        raise ValueError(
            f"{name} is {shown(value)}, expected a finite number, {least} or more; it says "
            f"{meaning}"
        )
    return number


def schedule(start: Any, **ends: Any) -> dict[str, int]:
    """Numbers of batches between which limits open."""
    numbers = {
        name: _whole(name, value, "a whole number of batches", "pass an int")
        for name, value in ({"start": start} | ends).items()
    }
    start = numbers["start"]
    if start < 0:
        raise ValueError(
            f"start is {shown(start)}, expected a number of batches, zero or more; pass 0"
        )
    for name, end in numbers.items():
        if end < start:
            raise ValueError(
                f"{name} is {shown(end)}, expected {shown(start)} or more, as start is: limits "
                "open from start on; pass the same for limits that are open at once"
            )
    return numbers


def batches(value: Any) -> int:
    """How many batches running statistics are of, where something goes by it."""
    if value is None:
        raise ValueError(
            "num_batches_tracked is None, expected a number of batches: renormalization's limits "
            "go by it; set it"
        )
    return int(value)


def parameter_type(value: Any) -> np.dtype[Any]:
    """The type of a layer's arrays."""
    is_long = isinstance(value, str | bytes) and len(value) > 100  # which NumPy would parse
    try:
        found: np.dtype[Any] = np.dtype(object if is_long else value)
    except Exception:  # NumPy's, and those of what it prints into its message
        found = np.dtype(object)
    if value is None or not is_float(found):
        raise TypeError(
            f"dtype is {shown(value)}, expected 'float32' or 'float64': the type of parameters and "
            "running statistics, whatever the arrays are"
        )
    return found.newbyteorder("=")


def several_values(
    policy: str, counts: NDArray[Any], tracks: bool, virtual_batch: int | None
) -> None:
    """More than one value a channel in each group, where the layer's policy asks for it."""
    if one_value(policy, tracks, virtual_batch) != "raise":
        return
    came, running = "one value a channel", "'running' (use the running statistics) or "
    if len(counts) > 1:
        came += f" in group {counts.argmin()} of {len(counts)} (virtual_batch is {virtual_batch})"
    if not tracks or virtual_batch is not None:
        running = ""
    raise ValueError(
        f"x has {came}, expected two or more: one value has no variance to normalize by; give "
        f"a larger batch, or make the layer with one_value={running}'skip' (y = beta)"
    )


def finite(found: dict[str, NDArray[Any]], renewed: dict[str, NDArray[Any]]) -> None:
    """Statistics of a batch, and running ones renewed by them, without NaN and infinity."""
    for name, a in found.items():
        channel = _first(~np.isfinite(a))
        if channel is not None:
            raise ValueError(
                f"x has a {name} of {a[channel]} in channel {channel}, expected finite statistics; "
                "look for them in x, or make the layer with nonfinite='skip' or 'update'"
            )
    for name, a in renewed.items():
        channel = _first(~np.isfinite(a))
        if channel is not None:
            of_x = ", ".join(f"a {word} of {b[channel]}" for word, b in found.items())
            raise ValueError(
                f"{name}[{channel}] would be {a[channel]}, expected a finite number in {a.dtype}: "
                f"x has {of_x} there; scale x, or make the layer with a wider dtype or with "
                "nonfinite='skip' or 'update'"
            )


def running(
    running_mean: Any,
    running_var: Any,
    batches: Any,
    channels: int,
    *,
    writes: bool,
    nan: bool,
    of: str = "",
) -> tuple[NDArray[Any], NDArray[Any]]:
    """A layer's running statistics: of its channels, to be written where `writes` says so; `of`
    tells whose, in names.

    Infinity is let in where they are only used, as `normalize` lets it in; what is to be written
    and may not become NaN has to be finite.
    """
    if running_mean is None or running_var is None:
        raise ValueError(
            f"{of}running_mean and {of}running_var are None, expected arrays: the layer keeps no "
            "running statistics; make it with track_running_stats=True"
        )
    owner = Owner(channels, f"the layer has {channels} channels")
    given = {f"{of}running_mean": running_mean, f"{of}running_var": running_var}
    own = {name: owned(name, a, owner, _FLOATS) for name, a in given.items()}
    running_mean, running_var = own.values()
    if writes:
        counted = f"{of}num_batches_tracked"
        tracked = {} if batches is None else {counted: counter(batches, counted)}
        for name, a in (own | tracked).items():
            writeable(name, a, "training renews it; assign a copy, or set frozen_statistics")
    if not nan:
        mean(running_mean, f"{of}running_mean")
    variance(running_var, nan=nan, name=f"{of}running_var")
    if writes and not nan:
        for name, a in own.items():
            _renewable(name, a)
    return running_mean, running_var


def _renewable(name: str, a: NDArray[Any]) -> None:
    """Running statistics that a batch can change."""
    channel = _first(np.isinf(a))
    if channel is not None:
        raise ValueError(
            f"{name}[{channel}] is {a[channel]}, expected a finite number: no batch makes it one "
            "again; write a finite number, or make the layer with nonfinite='update'"
        )


MOST_BATCHES = int(np.iinfo(np.int64).max)
"""Where counting stops."""


def counter(value: Any, name: str = "num_batches_tracked") -> NDArray[np.int64]:
    """How many batches running statistics are of: an array of int64 and shape () as it is; any
    other whole number (7.0 is one) as such an array."""
    is_scalar = isinstance(value, np.ndarray | np.generic) and value.shape == ()
    n: Any = value.item() if is_scalar else value
    is_number = isinstance(n, Real) and not isinstance(n, bool)
    if not is_number or isinstance(value, np.ma.MaskedArray):
        raise TypeError(
            f"{name} is {_described(value)}, expected a whole number, or a numpy.ndarray of int64 "
            "and shape (), or None; it is how many batches the running statistics are of"
        )
    if not (0 <= n <= MOST_BATCHES and n == int(n)):
        raise ValueError(
            f"{name} is {shown(n)}, expected a whole number, zero or more: how many batches the "
            "running statistics are of; set it to 0 to start anew"
        )
    if isinstance(value, np.ndarray) and value.dtype == np.int64 and value.dtype.isnative:
        return value
    return np.array(int(n), np.int64)


def writeable(name: str, a: NDArray[Any], reason: str) -> None:
    """An array of a layer that is about to be written."""
    if not a.flags.writeable:
        raise ValueError(f"{name} is read-only, expected a writeable array: {reason}")


def gradient(name: str, value: Any, channels: int) -> NDArray[Any]:
    """Where a layer's backward is to write dgamma or dbeta."""
    return owned(name, value, Owner(channels, f"the layer has {channels} channels"), _FLOATS)


def attribute(layer: Any, name: str, value: Any, aliases: Mapping[str, str]) -> None:
    """An attribute that a layer's class has; a subclass of somebody's may have others, with names
    that are not close to one of the layer's."""
    kind = type(layer)

    def is_method(known: str) -> bool:
        return inspect.isroutine(getattr(kind, known, None))

    if is_method(name) and not callable(value):
        raise AttributeError(
            f"{kind.__name__}.{name} is a method, expected something callable in its place; call "
            f"it, as layer.{name}()"
        )
    if hasattr(kind, name):
        return
    if any(name in inspect.get_annotations(each) for each in kind.__mro__):
        return
    names = [n for n in (*vars(layer), *dir(kind)) if not n.startswith("_") and not is_method(n)]
    is_ours = kind.__module__.startswith(__name__.removesuffix("checks"))
    cutoff = 0 if is_ours else CLOSE
    nearest = difflib.get_close_matches(aliases.get(name, name), names, 1, cutoff)
    if nearest:
        raise AttributeError(
            f"{kind.__name__} has no attribute {name!r}, expected one that it has; the nearest is "
            f"{nearest[0]!r}; a subclass names its own in its class body, or sets them in __init__"
        )


def forward(last: Any, dy: Any, params: bool) -> Any:
    """What a layer's last call left, for a dy that belongs to it."""
    if last is None:
        raise ValueError(
            "backward was called before forward; call the layer on x first, and then backward"
        )
    shape = array("dy", dy, _ELEMENTS).shape
    if shape != last.shape:
        raise ValueError(
            f"dy has shape {shape}, expected {last.shape}, the shape of the x that the layer was "
            "last called on; call backward after its own forward"
        )
    if last.x is None and last.needs_x(params):
        raise ValueError(
            "the layer's last call wrote y over x (out=x), and the gradient needs x; call it "
            "with another out"
        )
    return last


def arrays(own: dict[str, Any]) -> dict[str, NDArray[Any]]:
    """A layer's arrays as it has them, by their names in it."""
    return {
        # The layer checks it when it is set.
        name: a if name == "num_batches_tracked" else array(name, a)
        for name, a in own.items()
    }


def state(
    value: Any,
    own: dict[str, NDArray[Any]],
    options: str = "scale, shift and track_running_stats",
) -> dict[str, NDArray[Any]]:
    """A layer's arrays, by name: as many, of the shapes and kinds that it has, which `options`
    decide."""
    if not isinstance(value, Mapping):
        raise TypeError(f"state is {_described(value)}, expected a mapping, as state_dict gives it")
    needed = [name for name in own if name != "num_batches_tracked"]
    missing = [name for name in needed if name not in value]
    unknown = [name for name in value if name not in own]
    expected = f"expected {', '.join(map(repr, own))}"
    prefixes = _prefixes(value, needed) if missing else []
    if prefixes:
        plural = "es" if len(prefixes) > 1 else ""
        raise ValueError(
            f"state has a network's names, {expected}; these stand after {len(prefixes)} "
            f"prefix{plural}; strip one: set prefix = {prefixes[0]!r} and pass "
            "{name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)}"
        )
    if missing or unknown:
        odd = "; ".join(
            f"{what} {_listed(names)}"
            for what, names in (("missing are", missing), ("not known are", unknown))
            if names
        )
        raise ValueError(
            f"state has not the layer's names, {expected}; {odd}; make the layer with the "
            f"{options} of the one that was saved"
        )
    for name, a in own.items():
        writeable(f"the layer's {name!r}", a, "a state is written into it; assign a copy")
    # PyTorch's states had no counter at first.
    return {name: _state_array(name, value.get(name, 0), a) for name, a in own.items()}


def _prefixes(state: Mapping[Any, Any], names: Sequence[str]) -> list[str]:
    """What stands before all of a layer's names, where the state is a network's."""
    found = [
        name.removesuffix(names[0])
        for name in state
        if names and isinstance(name, str) and name.endswith(names[0])
    ]
    return [p for p in found if all(p + name in state for name in names)]


def _listed(names: Sequence[Any]) -> str:
    """Some names, in words."""
    more = f" and {len(names) - SOME} more" if len(names) > SOME else ""
    return ", ".join(map(shown, names[:SOME])) + more


def sample_state(value: Any, own: dict[str, NDArray[Any]], made: str) -> None:
    """A state of a layer that keeps parameters of channels alone; what else is wrong, `state`
    tells."""
    if not isinstance(value, Mapping):
        return
    running = [name for name in value if name in ("running_mean", "running_var")]
    if running:
        raise ValueError(
            f"state has {' and '.join(map(repr, running))}, expected parameters alone: a {made} "
            "goes by each sample's own statistics, in evaluation too; leave out what runs, or use "
            "fastbn.FrozenBatchNorm to normalize by it"
        )
    for name, a in own.items():
        shape = tuple(getattr(value.get(name), "shape", ()))
        if len(shape) > 1:
            raise ValueError(
                f"state[{name!r}] has shape {shape}, expected {a.shape}: gamma and beta are of "
                f"channels, not of elements; make the {made} with scale=False and shift=False, and "
                "multiply and add them yourself"
            )


def _state_array(name: str, value: Any, own: NDArray[Any]) -> NDArray[Any]:
    """One of them, in the layer's type."""
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(
            f"state[{name!r}] is a numpy.ma.MaskedArray, expected a plain array: a mask would be "
            f"ignored; pass state[{name!r}].filled(value), or state[{name!r}].data to ignore it"
        )
    try:
        given = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"state[{name!r}] is {_described(value)}, expected an array; NumPy says: {error}"
        ) from error
    if given.shape != own.shape:
        raise ValueError(
            f"state[{name!r}] has shape {given.shape}, expected {own.shape}, as the layer has; "
            "pass the state of a layer with as many channels"
        )
    if own.dtype.kind in "iu" and (given.dtype.kind != "V" or is_half(given.dtype)):
        return counter(given, f"state[{name!r}]")
    may_be_bits = given.dtype.kind in "iu" and given.dtype.itemsize == 2
    if may_be_bits or (given.dtype.kind not in "fiu" and not is_half(given.dtype)):
        raise TypeError(
            f"state[{name!r}] has dtype {_named(given.dtype)}, expected {own.dtype} or what rounds "
            f"to it; {_remedy(name, given.dtype, own.dtype)}"
        )
    if name == "running_var":
        variance(given, nan=False, name=name)
    elif name == "running_mean":
        mean(given, name)
    return given


def _remedy(name: str, came: np.dtype[Any], wanted: np.dtype[Any]) -> str:
    """What to do about an array of another type in a state: NumPy, which has no bfloat16, saves one
    as two bytes without a type, and others save its bits as whole numbers."""
    given = f"numpy.asarray(state[{name!r}])"
    if came.name == "bfloat16":
        return f"pass {given}.view(numpy.uint16).byteswap().view(ml_dtypes.bfloat16)"
    if came.itemsize != 2 or came.kind not in "iuV":
        return f"convert it to {wanted}"
    bits = f"pass {given}.view(ml_dtypes.bfloat16) if these are bfloat16's bits"
    return bits if came.kind == "V" else f"{bits}, or {given}.astype(numpy.{wanted}) if numbers"


# ---- Folding ----


def weight(value: Any) -> NDArray[Any]:
    """The weights of a linear layer or convolution: rank 2 or more; half types are widened."""
    a = array("weight", value, _ELEMENTS)
    if a.ndim < 2:
        code = _code("weight", value)
        remedy = f"with {code}[:, None]" if a.ndim else f"with {code}[None, None]"
        raise ValueError(
            f"weight has rank {a.ndim} (shape {a.shape}), expected rank 2 or more: output and "
            f"input channels, then any others; add what is missing {remedy}"
        )
    return _widened(a)


def groups(value: Any, layer: NDArray[Any]) -> int:
    """The groups of a convolution: a whole number that divides its weight's first axis."""
    n = _whole("groups", value, "a whole number", "pass 1 for none")
    if n < 1 or layer.shape[0] % n:
        raise ValueError(
            f"groups is {shown(n)}, expected a divisor of {layer.shape[0]} (axis 0 of weight's "
            f"shape {layer.shape}); pass the groups of the convolution, 1 for none"
        )
    return n


def outputs(layer: NDArray[Any], groups: int, transposed: bool) -> Owner:
    """The output channels of a layer, however its weight has them."""
    axis, in_groups = (1, f", {groups} groups") if transposed else (0, "")
    channels = layer.shape[axis] * (groups if transposed else 1)
    return Owner(
        channels,
        f"weight has {channels} output channels (axis {axis} of shape {layer.shape}{in_groups})",
    )


def inputs(layer: NDArray[Any]) -> Owner:
    """The inputs of a linear layer."""
    if layer.ndim != 2:
        raise ValueError(
            f"weight has rank {layer.ndim} (shape {layer.shape}), expected (out, in) where "
            "before is True; fold each place of a larger kernel by itself, if nothing is padded"
        )
    return Owner(
        layer.shape[1], f"weight has {layer.shape[1]} inputs (axis 1 of shape {layer.shape})"
    )


def owned(name: str, value: Any, owner: Owner, types: Types = _ELEMENTS) -> NDArray[Any]:
    """A vector with one value for each channel of its owner; half types are widened."""
    a = array(name, value, types)
    if a.shape != (owner.channels,):
        remedy = _vector(_code(name, value), a.shape, owner.channels)
        raise ValueError(f"{name} has shape {a.shape} but {owner.words}; {remedy}")
    return _widened(a)


def folded(name: str, value: NDArray[Any]) -> None:
    """Weights or a bias that batch norm was folded into: all finite."""
    bad = np.argwhere(~np.isfinite(value))
    if bad.size:
        place = tuple(int(i) for i in bad[0])
        raise ValueError(
            f"{name}{list(place)} would be {value[place]}, expected a finite number in "
            f"{value.dtype}; look at this channel's mean, var, gamma and beta, or keep the batch "
            "norm: fastbn.normalize computes from x - mean"
        )


def flag(name: str, value: Any) -> bool:
    """True or False, and not something that merely counts as one."""
    if isinstance(value, bool | np.bool_):
        return bool(value)
    raise TypeError(f"{name} is {_described(value)}, expected True or False; pass one of them")


def threads(name: str, value: Any) -> int:
    """A number of threads: a whole number from 1 to `MAX_THREADS`."""
    n = _whole(name, value, "a whole number of threads", "pass an int, 1 for serial work")
    if not 1 <= n <= MAX_THREADS:
        raise ValueError(
            f"{name} is {shown(n)}, expected a number of threads from 1 to {MAX_THREADS}; "
            f"pass {'1 for serial work' if n < 1 else f'{MAX_THREADS} at most'}"
        )
    return n


def output(
    name: str,
    value: Any,
    x_name: str,
    x: NDArray[Any],
    *,
    in_place: dict[str, NDArray[Any] | None],
    apart: dict[str, NDArray[Any] | None],
) -> NDArray[Any]:
    """An array for results: like `x`, writeable, free of overlap but for being one of `in_place`
    itself. What is returned is written; the caller gets back what it passed."""
    dtype = x.dtype.newbyteorder("=")
    wanted = f"shape {x.shape} and dtype {dtype}"
    make = f"make it with numpy.empty({x.shape}, {_spelled(x, x_name)})"
    a = plain(value)
    if a is None or isinstance(value, np.ma.MaskedArray):
        raise TypeError(
            f"{name} is {_described(value)}, expected a numpy.ndarray of {wanted}, or None; {make}"
        )
    if a.dtype != dtype or not a.dtype.isnative:
        came = _named(a.dtype)
        raise TypeError(f"{name} has dtype {came}, expected {dtype} in native order; {make}")
    if a.shape != x.shape:
        raise ValueError(f"{name} has shape {a.shape}, expected {x.shape}; {make}")
    if not a.flags.writeable:
        raise ValueError(f"{name} is read-only, expected a writeable array of {wanted}; {make}")
    if _overlaps_itself(a):
        raise ValueError(
            f"{name} overlaps itself (shape {a.shape}, strides {a.strides}), expected an "
            f"array with a place of its own for every value; {make}"
        )
    for other, b in in_place.items():
        if b is not None and not _same_place(a, b) and share(a, b):
            raise ValueError(
                f"{name} overlaps {other} without being {other}: expected either {other} itself "
                f"(same place, strides and dtype: works in place) or memory apart from it; {make}"
            )
    for other, b in apart.items():
        if b is not None and share(a, b):
            raise ValueError(f"{name} overlaps {other}, expected memory apart from it; {make}")
    return a


def share(a: NDArray[Any], b: NDArray[Any]) -> bool:
    """Whether two arrays share memory; where that is hard to tell, that they do."""
    a, b = np.asarray(a), np.asarray(b)
    try:
        return np.shares_memory(a, b, max_work=10_000)  # type: ignore[arg-type]  # any int is one
    except np.exceptions.TooHardError:
        return True


def _same_place(a: NDArray[Any], b: NDArray[Any]) -> bool:
    """Whether two arrays of one shape are the same elements in the same order."""
    return (
        a.ctypes.data == b.ctypes.data
        and a.dtype == b.dtype
        and all(s == t or n == 1 for n, s, t in zip(a.shape, a.strides, b.strides, strict=True))
    )


def _overlaps_itself(a: NDArray[Any]) -> bool:
    """Whether no walk from the innermost stride outwards keeps the elements apart."""
    reach = a.itemsize
    for stride, n in sorted((abs(s), n) for n, s in zip(a.shape, a.strides, strict=True) if n > 1):
        if stride < reach:
            return a.size > 0
        reach += stride * (n - 1)
    return False


def _named(dtype: np.dtype[Any]) -> str:
    """A dtype in words; bfloat16 does not tell of itself that it is byte-swapped."""
    return str(dtype) if dtype.isnative or dtype.kind != "V" else f"byte-swapped {dtype.name}"


def _spelled(x: NDArray[Any], x_name: str) -> str:
    """x's dtype as code that makes it; bfloat16's name depends on whose it is."""
    dtype = x.dtype.newbyteorder("=")
    return f"{x_name}.dtype" if dtype.kind != "f" else f"numpy.{dtype}"


def _described(value: Any) -> str:
    """A value's type, with the value where it is short."""
    text, kind = shown(value), type(value).__name__[:MOST]
    article = "an" if kind[:1].lower() in "aeiou" or kind == "ndarray" else "a"
    return f"{article} {kind}" + (f" ({text})" if len(text) <= 40 and kind not in text else "")


def _whole(name: str, value: Any, expected: str, remedy: str) -> int:
    """A whole number that is no flag."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} is {_described(value)}, expected {expected}; {remedy}")
    return int(value)


def _wrong_type_or_value(value: Any, expected: type, message: str) -> TypeError | ValueError:
    """The message as a ValueError where the type was right, else as a TypeError."""
    return ValueError(message) if isinstance(value, expected) else TypeError(message)
