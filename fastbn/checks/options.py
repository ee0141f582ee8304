"""Options of the verbs: words, flags and numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn import activations
from fastbn.activations import Activation
from fastbn.checks.words import (
    as_float,
    described,
    dtype_words,
    is_number,
    name_of,
    whole_number,
    word_of,
    wrong_type_or_value,
)
from fastbn.elements import ELEMENTS, SINGLE, is_element, is_result_of, result_of
from fastbn.errors import shown
from fastbn.layouts import LAYOUTS

MAX_THREADS = 1024
METHODS = ("exact", "average")


def layout(value: Any) -> str:
    """One of the names in `LAYOUTS`."""
    word = word_of(value)
    if word in LAYOUTS:
        return word
    raise wrong_type_or_value(
        value,
        str,
        f"layout is {shown(value)}, expected 'NCHW' (channels on axis 1) or 'NHWC' (channels "
        "last); it names where the channels are, for arrays of any rank from 2 up",
    )


def out_layout(value: Any, layout_of_x: str, **others: Any) -> str:
    """The layout of y: that of x where it is None. Another one goes with nothing else."""
    if value is None:
        return layout_of_x
    word = word_of(value)
    if word not in LAYOUTS:
        raise wrong_type_or_value(
            value,
            str,
            f"out_layout is {shown(value)}, expected 'NCHW' (channels on axis 1), 'NHWC' (channels "
            "last), or None for that of x; pass one of them",
        )
    for name, other in others.items():
        if other is not None and word != layout_of_x:
            raise ValueError(
                f"out_layout is {word!r}, not that of x, and {name} is given, expected one of "
                f"them; normalize with {name}, and bring y into the other layout by numpy.moveaxis"
            )
    return word


def result_type(value: Any) -> np.dtype[Any]:
    """A type that y may have."""
    dtype: np.dtype[Any] | None
    try:
        dtype = np.dtype(value)
    except TypeError:
        dtype = None
    if dtype is None or not is_element(dtype) or not dtype.isnative:
        raise TypeError(
            f"dtype is {shown(value)}, expected {ELEMENTS}, in native byte order; pass one of "
            "them, as numpy.float16 or ml_dtypes.bfloat16, and convert y to others with its astype"
        )
    return dtype


def result_dtype(value: Any, out: Any, x_name: str, x: NDArray[Any]) -> np.dtype[Any]:
    """The type of y: asked for, that of `out`, or the usual one."""
    usual = result_of(x.dtype)
    if value is None:
        may_be = out is not None and is_result_of(out.dtype, x.dtype)
        given: np.dtype[Any] = out.dtype if may_be else usual
        return given
    dtype = result_type(value)
    if is_result_of(dtype, x.dtype):
        return dtype
    known = f"{usual}, float16 or bfloat16" if usual == SINGLE else str(usual)
    raise TypeError(
        f"dtype is {dtype}, expected {known}, for {x_name} of {dtype_words(x.dtype)}; convert "
        f"{x_name} before, with {x_name}.astype({name_of(dtype)}), or y afterwards"
    )


def activation(value: Any, *, curves: bool = False) -> Activation:
    """What is done to y last; `activations.of` knows them. Curves are for inference alone."""
    known = activations.of(value)
    if known is not None and known.curve and not curves:
        raise ValueError(
            f"activation is {shown(value)}, expected one whose slope follows from y: in training "
            "and on the way back this one is an operation of its own; leave it out here, apply it "
            "to y, and multiply dy by its slope before"
        )
    if known is None:
        error = ValueError if isinstance(value, str | tuple) else TypeError
        names = ", ".join(repr(name) for name in (*activations.NAMED, *activations.CURVES))
        raise error(
            f"activation is {shown(value)}, expected None, {names} or ('{activations.LEAKY}', "
            "slope) with 0 < slope < 1; apply any other activation to y afterwards"
        )
    return known


def activation_name(value: Any, *, curves: bool = False) -> str | tuple[str, float] | None:
    """The same as a layer keeps it: of Python's own types, which print as they are written."""
    slope = activation(value, curves=curves).slope
    if isinstance(value, tuple):
        return activations.LEAKY, slope
    return None if value is None else word_of(value)


def no_activation(value: Any) -> None:
    """None, where an activation would have to be differentiated twice."""
    if value is not None:
        error = ValueError if isinstance(value, str | tuple) else TypeError
        raise error(
            f"activation is {shown(value)}, expected None: an activation has no second derivative "
            "at its kinks; apply it apart: multiply dy by its slope where it gave y, and "
            "afterwards ddy too"
        )


def flag(name: str, value: Any) -> bool:
    """True or False, and not something that merely counts as one."""
    if isinstance(value, bool | np.bool_):
        return bool(value)
    raise TypeError(f"{name} is {described(value)}, expected True or False; pass one of them")


def threads(name: str, value: Any) -> int:
    """A number of threads: a whole number from 1 to `MAX_THREADS`."""
    n = whole_number(name, value, "a whole number of threads", "pass an int, 1 for serial work")
    if not 1 <= n <= MAX_THREADS:
        raise ValueError(
            f"{name} is {shown(n)}, expected a number of threads from 1 to {MAX_THREADS}; "
            f"pass {'1 for serial work' if n < 1 else f'{MAX_THREADS} at most'}"
        )
    return n


def option(name: str, value: Any, known: tuple[str, ...]) -> str:
    """One of a few words."""
    word = word_of(value)
    if word in known:
        return word
    words = ", ".join(repr(word) for word in known)
    raise wrong_type_or_value(
        value, str, f"{name} is {shown(value)}, expected one of {words}; pass one of them"
    )


def axes(value: Any, **others: Any) -> str:
    """What layer norm normalizes together; the others go with the last axis alone."""
    word = option("axes", value, ("sample", "last"))
    for name, other in others.items():
        if other is not None and word != "last":
            raise ValueError(
                f"{name} is given and axes is {word!r}, expected axes='last': {name} is of rows; "
                f"leave {name} out, or pass axes='last' to normalize each row of the last axis"
            )
    return word


def goes_alone(name: str, **others: Any) -> None:
    """What does not go with any of these."""
    for other, value in others.items():
        if value is not None and value is not False:
            raise ValueError(
                f"{name} and {other} are given, expected one of them; leave {name} out, and add it "
                "to dx afterwards"
            )


def known_keys(given: Any, keys: tuple[str, ...]) -> dict[str, Any]:
    """A dictionary of these, as a to_dict gave it."""
    if not isinstance(given, dict) or set(given) != set(keys):
        raise ValueError(
            f"given is {described(given)}, expected a dictionary of {', '.join(keys)}; pass what "
            "to_dict gave"
        )
    return given


def epsilon(value: Any) -> float:
    """eps: a finite number, zero or more."""
    if not is_number(value):
        raise TypeError(
            f"eps is {described(value)}, expected a number, zero or more; pass a float, as 1e-5"
        )
    eps = as_float(value)
    if not (eps >= 0 and math.isfinite(eps)):
        raise ValueError(
            f"eps is {eps}, expected a finite number, zero or more; it is added to the variance "
            "before the square root, 1e-5 is usual"
        )
    return eps


def virtual_batch(value: Any, **others: Any) -> int | None:
    """How many samples have statistics of their own; None for all. Goes with nothing else."""
    if value is None:
        return None
    remedy = "pass an int, or None for the batch as a whole"
    n = whole_number("virtual_batch", value, "a whole number of samples", remedy)
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


def groups(value: Any) -> int:
    """How many groups of channels: one or more."""
    if type(value) is int and value > 0:
        return value
    n = whole_number("groups", value, "a whole number", "pass an int")
    if n < 1:
        raise ValueError(
            f"groups is {shown(n)}, expected 1 or more; 1 is layer norm, and as many as "
            "channels instance norm"
        )
    return n


def divisor(groups: int, channels: int) -> int:
    """Groups of as many channels each."""
    if channels % groups != 0:
        raise ValueError(
            f"groups is {shown(groups)}, expected a divisor of {channels}, the number of channels: "
            "groups have as many channels each; pass one, or another layout"
        )
    return groups
