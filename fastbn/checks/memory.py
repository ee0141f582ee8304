"""Outputs: like x, writeable, and apart from what is read meanwhile."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn.checks.arrays import as_ndarray
from fastbn.checks.words import described, dtype_code, dtype_words, name_of


def output(
    name: str,
    value: Any,
    x_name: str,
    x: NDArray[Any],
    *,
    in_place: dict[str, NDArray[Any] | None],
    apart: dict[str, NDArray[Any] | None],
    shape: tuple[int, ...] | None = None,
    dtype: np.dtype[Any] | None = None,
) -> NDArray[Any]:
    """An array for results: like `x` or of another shape and type, writeable, free of overlap but
    for being one of `in_place` itself. What is returned is written; the caller gets back what it
    passed."""
    shape = x.shape if shape is None else shape
    other, dtype = dtype, x.dtype.newbyteorder("=") if dtype is None else dtype

    # Words are made for an error alone: NumPy takes microseconds to name a type.
    def wanted() -> str:
        return f"shape {shape} and dtype {dtype}"

    def make() -> str:
        code = dtype_code(x, x_name) if other is None else name_of(other)
        return f"make it with numpy.empty({shape}, {code})"

    a = as_ndarray(value)
    if a is None or isinstance(value, np.ma.MaskedArray):
        raise TypeError(
            f"{name} is {described(value)}, expected a numpy.ndarray of {wanted()}, or None; "
            f"{make()}"
        )
    if a.dtype != dtype or not a.dtype.isnative:
        came = dtype_words(a.dtype)
        raise TypeError(f"{name} has dtype {came}, expected {dtype} in native order; {make()}")
    if a.shape != shape:
        raise ValueError(f"{name} has shape {a.shape}, expected {shape}; {make()}")
    if not a.flags.writeable:
        raise ValueError(f"{name} is read-only, expected a writeable array of {wanted()}; {make()}")
    if _overlaps_itself(a):
        raise ValueError(
            f"{name} overlaps itself (shape {a.shape}, strides {a.strides}), expected an "
            f"array with a place of its own for every value; {make()}"
        )
    for read, b in in_place.items():
        if b is not None and not _same_place(a, b) and share(a, b):
            raise ValueError(
                f"{name} overlaps {read} without being {read}: expected either {read} itself "
                f"(same place, strides and dtype: works in place) or memory apart from it; {make()}"
            )
    for read, b in apart.items():
        if b is not None and share(a, b):
            raise ValueError(f"{name} overlaps {read}, expected memory apart from it; {make()}")
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
    return a is b or (
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


def writeable(name: str, a: NDArray[Any], reason: str) -> None:
    """An array of a layer that is about to be written."""
    if not a.flags.writeable:
        raise ValueError(f"{name} is read-only, expected a writeable array: {reason}")
