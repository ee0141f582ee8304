"""Arrays: their type, rank and shape, and what must be like x."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastbn.activations import Activation
from fastbn.checks.dask import is_lazy
from fastbn.checks.dlpack import has_dlpack, imported
from fastbn.checks.options import activation
from fastbn.checks.words import code_of, described, dtype_code, dtype_words, name_of
from fastbn.elements import ELEMENTS, FLOATS, INTEGERS, is_datum, is_element, is_float
from fastbn.errors import shown
from fastbn.layouts import LAYOUTS, channel_axis


def as_ndarray(value: Any) -> NDArray[Any] | None:
    """The array as numpy.ndarray itself, whatever its subclass; None if it is no array."""
    if type(value) is np.ndarray:
        return value
    if not issubclass(type(value), np.ndarray):
        return None
    view: NDArray[Any] = np.ndarray.view(value, np.ndarray)
    return view


def is_array(value: Any) -> bool:
    """Whether this is an array, of NumPy or of another library."""
    return isinstance(value, np.ndarray) or has_dlpack(value)


class Types(NamedTuple):
    """The element types that an array may have, what others are converted to, and why."""

    words: str
    taken: Callable[[np.dtype[Any]], bool]
    wanted: str = "numpy.float32"
    reason: str = ""


ANY = Types(ELEMENTS, is_element)
DATA = Types(f"{ELEMENTS}, {INTEGERS}", is_datum)
WIDE = Types(FLOATS, is_float)
DOUBLE = Types(
    "float64",
    lambda dtype: is_float(dtype) and dtype.itemsize == 8,
    "numpy.float64",
    ": the gradient through the batch's own statistics needs the digits that the forward returned",
)


def array(name: str, value: Any, types: Types = WIDE) -> NDArray[Any]:
    """An ndarray of certain types, in either byte order."""
    known = types.words
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(
            f"{name} is a numpy.ma.MaskedArray, expected a plain numpy.ndarray of {known}: "
            f"a mask would be ignored; pass {name}.filled(value), or {name}.data to ignore it"
        )
    a = as_ndarray(value)
    if a is None:
        a = imported(name, value)
    if a is None:
        raise TypeError(
            f"{name} is {described(value)}, expected a numpy.ndarray of {known}; "
            + _converted(name, value, types.wanted)
        )
    if not types.taken(a.dtype):
        came = f"{name} has dtype {dtype_words(a.dtype)}, expected {known}{types.reason}"
        raise TypeError(f"{came}; {_retyped(code_of(name, value), a.dtype, types.wanted)}")
    return a


def _converted(name: str, value: Any, dtype: str) -> str:
    """What to do with something that is no array."""
    if value is None or isinstance(value, str | bytes):
        return "pass one"
    if is_lazy(value):
        return f"pass {name}.compute(), or go by chunks with the functions of fastbn.dask"
    return f"convert it with numpy.asarray({name}, dtype={dtype})"


def _retyped(code: str, dtype: np.dtype[Any], wanted: str) -> str:
    """What to do with an array of a type that is not taken."""
    if dtype.kind == "c":
        return f"pass {code}.real, {code}.imag, or both as channels of their own"
    if dtype == np.dtype("V2"):
        return f"if it is bfloat16, as numpy.load gives it, pass {code}.view(ml_dtypes.bfloat16)"
    is_wide = dtype.kind == "f" and dtype.itemsize > 8
    return f"convert it with {code}.astype({'numpy.float64' if is_wide else wanted})"


def batch(name: str, value: Any, types: Types = ANY) -> NDArray[Any]:
    """The array that is normalized (or its gradient, where no x is needed): rank 2 or more."""
    a = array(name, value, types)
    if a.ndim < 2:
        code = code_of(name, value)
        remedy = f"with {code}[None, None]"
        if a.ndim:
            remedy = f"with {code}[:, None] (values of one channel) or {code}[None, :] (one sample)"
        raise ValueError(
            f"{name} has rank {a.ndim} (shape {a.shape}), expected rank 2 or more: samples and "
            f"channels, then any spatial axes; add what is missing {remedy}"
        )
    return a


def table(name: str, value: Any) -> NDArray[Any]:
    """A table: rows and columns."""
    a = batch(name, value, DATA)
    if a.ndim != 2:
        raise ValueError(
            f"{name} has rank {a.ndim} (shape {a.shape}), expected rank 2, rows and columns; "
            f"reshape it, with {code_of(name, value)}.reshape(len({name}), -1)"
        )
    return a


_COMPANIONS = {
    "skip": "what is added to x",
    "dsum": "the gradient that reaches x + skip by its other uses",
    "dy": "the gradient with respect to y, which has x's shape",
    "ddx": "the gradient with respect to the dx of the backward function, which has x's shape",
    "residual": "an array of x's shape; a smaller one with numpy.broadcast_to(residual, x.shape)",
    "y": "what the forward returned",
}
"""Arrays that must be like x, and what to pass."""


def companion(
    name: str, value: Any, x_name: str, x: NDArray[Any], dtype: np.dtype[Any] | None = None
) -> NDArray[Any]:
    """dy, ddx, residual or y: of x's shape and dtype, or another one (byte order apart)."""
    a = array(name, value, ANY)
    if a.shape != x.shape:
        raise ValueError(
            f"{name} has shape {a.shape}, expected {x.shape}, the shape of {x_name}; "
            f"pass {_COMPANIONS[name]}"
        )
    if a.dtype.newbyteorder("=") != (x.dtype.newbyteorder("=") if dtype is None else dtype):
        whose = f"{x.dtype}, the dtype of {x_name}" if dtype is None else f"{dtype}, as y has"
        code = dtype_code(x, x_name) if dtype is None else name_of(dtype)
        raise TypeError(
            f"{name} has dtype {a.dtype}, expected {whose}; "
            f"convert it with {code_of(name, value)}.astype({code})"
        )
    return a


def activation_grad(
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
    a = as_ndarray(value)
    if a is None:
        a = imported("where", value)
    if a is None:
        remedy = _converted("where", value, "bool")
        raise TypeError(f"where is {described(value)}, {expected}; {remedy}")
    if a.dtype != np.bool_:
        raise TypeError(
            f"where has dtype {dtype_words(a.dtype)}, {expected}; convert it with "
            f"{code_of('where', value)}.astype(bool), if what is not 0 counts"
        )
    try:
        return np.broadcast_to(a, single)
    except ValueError:
        pass
    remedy = "it is the same for all channels: its axis of channels has length 1"
    if a.shape == single[:axis] + single[axis + 1 :]:
        code = code_of("where", value)
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


def made_for(x: NDArray[Any], layout: str, made: str, channels: int) -> None:
    """An array with the channels of something that was made for them: a layer, say."""
    axis = channel_axis(layout, x.ndim)
    if x.shape[axis] != channels:
        other = next(name for name in LAYOUTS if name != layout)
        fits = x.shape[channel_axis(other, x.ndim)] == channels
        remedy = f"make the {made} with layout={other!r}" if fits else "pass another array"
        raise ValueError(
            f"x has {x.shape[axis]} channels (axis {axis} of shape {x.shape}, layout {layout!r}), "
            f"expected {channels}, as the {made} has; {remedy}"
        )


def rows_made_for(value: Any, made: str, channels: int) -> NDArray[Any]:
    """An array whose rows along the last axis have the channels of such a thing."""
    x = batch("x", value, ANY)
    if x.shape[-1] != channels:
        raise ValueError(
            f"x has rows of {x.shape[-1]} values (the last axis of shape {x.shape}), expected "
            f"{channels}, as the {made} has channels; pass another array, or move the axis of the "
            "channels to the end"
        )
    return x
