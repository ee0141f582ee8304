"""How messages tell what came: types, values, names, code to paste."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn.errors import MOST, shown

SOME = 5
"""Names that a message lists at most."""


def word_of(value: Any) -> str:
    """The characters of a str, of whatever subclass; none of anything else."""
    return str.__str__(value) if isinstance(value, str) else ""


def code_of(name: str, value: Any) -> str:
    """Code that gives what came as an array with ndarray's own methods."""
    return name if type(value) is np.ndarray else f"numpy.asarray({name})"


def dtype_words(dtype: np.dtype[Any]) -> str:
    """A dtype in words; bfloat16 does not tell of itself that it is byte-swapped."""
    return str(dtype) if dtype.isnative or dtype.kind != "V" else f"byte-swapped {dtype.name}"


def dtype_code(x: NDArray[Any], x_name: str) -> str:
    """x's dtype as code that makes it; bfloat16's name depends on whose it is."""
    dtype = x.dtype.newbyteorder("=")
    return f"{x_name}.dtype" if dtype.kind != "f" else f"numpy.{dtype}"


def name_of(dtype: np.dtype[Any]) -> str:
    """A type as code; bfloat16's is somebody else's."""
    return f"numpy.{dtype}" if dtype.kind == "f" else f"ml_dtypes.{dtype.name}"


def described(value: Any) -> str:
    """A value's type, with the value where it is short."""
    text, kind = shown(value), type(value).__name__[:MOST]
    article = "an" if kind[:1].lower() in "aeiou" or kind == "ndarray" else "a"
    return f"{article} {kind}" + (f" ({text})" if len(text) <= 40 and kind not in text else "")


def whole_number(name: str, value: Any, expected: str, remedy: str) -> int:
    """A whole number that is no flag."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} is {described(value)}, expected {expected}; {remedy}")
    return int(value)


def wrong_type_or_value(value: Any, expected: type, message: str) -> TypeError | ValueError:
    """The message as a ValueError where the type was right, else as a TypeError."""
    return ValueError(message) if isinstance(value, expected) else TypeError(message)


def as_float(value: Real) -> float:
    """The nearest float; infinity for what is too large."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def first_bad(bad: NDArray[np.bool_]) -> int | None:
    """The first channel that is bad."""
    return int(bad.argmax()) if bad.any() else None


def listed(names: Sequence[Any]) -> str:
    """Some names, in words."""
    more = f" and {len(names) - SOME} more" if len(names) > SOME else ""
    return ", ".join(map(shown, names[:SOME])) + more


def is_number(value: Any) -> bool:
    """Whether this is a real number, and no flag."""
    return isinstance(value, Real) and not isinstance(value, bool)
