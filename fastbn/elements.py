"""The element types of arrays: which there are, and what belongs to each.

float16 and bfloat16 are storage: arithmetic on them is float32's, and sums are float64 as for every
type. NumPy has no bfloat16 of its own; arrays of it come from whoever registers the type, as
ml_dtypes does, and are known by their dtype's name.
"""

from __future__ import annotations

from typing import Any

import numpy as np

FLOATS = "float32 or float64"
"""What weights and a layer's own arrays may be, in words."""

ELEMENTS = f"float16, bfloat16, {FLOATS}"
"""What arrays and parameters may be, in words."""

INTEGERS = "uint8, int8, uint16, int16"
"""What data may be besides, where it is normalized or measured, in words."""

SINGLE, DOUBLE = np.dtype(np.float32), np.dtype(np.float64)


def is_float(dtype: np.dtype[Any]) -> bool:
    """Whether this is computed with as it is, in either byte order."""
    return dtype.kind == "f" and dtype.itemsize in (4, 8)


def is_bfloat16(dtype: np.dtype[Any]) -> bool:
    """Whether this is somebody's bfloat16, in native byte order: NumPy cannot be relied on to swap
    the bytes of types that are not its own."""
    return dtype.itemsize == 2 and dtype.name == "bfloat16" and dtype.isnative


def is_half(dtype: np.dtype[Any]) -> bool:
    """Whether values take two bytes: float16, in either byte order, or bfloat16."""
    return dtype.itemsize == 2 and (dtype.kind == "f" or is_bfloat16(dtype))


def is_element(dtype: np.dtype[Any]) -> bool:
    """Whether arrays and parameters may be of this type, in either byte order."""
    return is_float(dtype) or is_half(dtype)


def is_integer(dtype: np.dtype[Any]) -> bool:
    """Whether this is an integer that float32 holds, in either byte order."""
    return dtype.kind in "iu" and dtype.itemsize <= 2


def is_datum(dtype: np.dtype[Any]) -> bool:
    """Whether data may be of this type, in either byte order."""
    return is_element(dtype) or is_integer(dtype)


def result_of(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The native type of y where nothing else is asked for: float32 for integers."""
    return SINGLE if is_integer(dtype) else dtype.newbyteorder("=")


def is_result_of(dtype: np.dtype[Any], of: np.dtype[Any]) -> bool:
    """Whether y may be of this type: that of x or, of float32 and of integers, a half type."""
    usual = result_of(of)
    return dtype == usual or (usual == SINGLE and is_half(dtype) and dtype.isnative)


def arithmetic(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The type of elementwise arithmetic, and of parameters' gradients where no parameter is."""
    return DOUBLE if dtype.itemsize == 8 else SINGLE
