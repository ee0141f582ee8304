"""One array's values in every kind of memory that a caller may hand over."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Subclass(np.ndarray[Any, Any]):
    """An ndarray by inheritance, as numpy.memmap is one."""


def dense(a: Array) -> Array:
    """A plain copy: C order, native, aligned."""
    return np.array(a, dtype=a.dtype.newbyteorder("="), order="C", subok=False)


def dense_in_its_order(a: Array) -> Array:
    """A dense copy in the array's own memory order; C order where a stride is 0."""
    broadcast = any(s == 0 and n > 1 for n, s in zip(a.shape, a.strides, strict=True))
    order: Any = "C" if broadcast else "K"
    return np.array(a, dtype=a.dtype.newbyteorder("="), order=order, subok=False)


def fortran(a: Array) -> Array:
    return np.asfortranarray(a)


def channels_last(a: Array) -> Array:
    """Axis 1 innermost in memory."""
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 1, -1)), -1, 1)


def transposed(a: Array) -> Array:
    """The outermost two axes, and the innermost two, change places in memory."""
    swapped = a.swapaxes(0, 1).swapaxes(-1, -2)
    return np.ascontiguousarray(swapped).swapaxes(-1, -2).swapaxes(0, 1)


def reversed_everywhere(a: Array) -> Array:
    backwards = (slice(None, None, -1),) * a.ndim
    return dense(a[backwards])[backwards]


def reversed_inside(a: Array) -> Array:
    return dense(a[..., ::-1])[..., ::-1]


def strided(a: Array) -> Array:
    """Every second value along every axis of a larger array."""
    large = np.full([2 * n for n in a.shape], 77, a.dtype)
    view = large[(slice(None, None, 2),) * a.ndim]
    view[...] = a
    return view


def padded_inside(a: Array) -> Array:
    """Innermost rows lie apart, at an odd distance and offset."""
    large = np.full((*a.shape[:-1], a.shape[-1] + 3), 77, a.dtype)
    view = large[..., 1:-2]
    view[...] = a
    return view


def padded_channels(a: Array) -> Array:
    """A slice of the axis after the first, as some channels of a larger array."""
    large = np.full((a.shape[0], a.shape[1] + 2, *a.shape[2:]), 77, a.dtype)
    view = large[:, 1:-1]
    view[...] = a
    return view


def misaligned(a: Array) -> Array:
    buffer = np.empty(a.nbytes + a.itemsize, np.uint8)
    view = buffer[1 : 1 + a.nbytes].view(a.dtype).reshape(a.shape)
    view[...] = a
    assert a.size == 0 or not view.flags.aligned
    return view


def unlucky(a: Array) -> Array:
    """Aligned for its type, and for no vector register."""
    view = np.empty(a.size + 1, a.dtype)[1:].reshape(a.shape)
    view[...] = a
    return view


def byte_swapped(a: Array) -> Array:
    return a.astype(a.dtype.newbyteorder("S"))


def read_only(a: Array) -> Array:
    view = a.view()
    view.flags.writeable = False
    return view


def subclass(a: Array) -> Array:
    return a.view(Subclass)


WRITEABLE: dict[str, Callable[[Array], Array]] = {
    "dense": dense,
    "fortran": fortran,
    "channels-last": channels_last,
    "transposed": transposed,
    "reversed": reversed_everywhere,
    "reversed inside": reversed_inside,
    "strided": strided,
    "padded inside": padded_inside,
    "padded channels": padded_channels,
    "misaligned": misaligned,
    "unlucky": unlucky,
    "subclass": subclass,
}
"""The forms that `out` may have."""

FORMS = WRITEABLE | {"byte-swapped": byte_swapped, "read-only": read_only}
"""The forms that an input may have."""


_PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None)


class Guarded:
    """Memory between two pages that nobody may touch."""

    def __init__(self, size: int) -> None:
        self.size = max(-(-size // _PAGE), 1) * _PAGE
        self._pages = np.frombuffer(mmap.mmap(-1, self.size + 2 * _PAGE), np.uint8)
        for start in (0, _PAGE + self.size):
            page = ctypes.c_void_p(self._pages.ctypes.data + start)
            assert _libc.mprotect(page, ctypes.c_size_t(_PAGE), 0) == 0

    def place(self, a: Array, *, behind: bool = True) -> Array:
        """A copy that lies against the page behind it, or against the one before."""
        first = _PAGE + (self.size - a.nbytes if behind else 0)
        view: Array = np.ndarray(a.shape, a.dtype, self._pages.data, first)
        view[...] = a
        return view


def against_a_page(a: Array) -> Array:
    """A copy, behind whose last byte there is a page that nobody may touch."""
    return Guarded(a.nbytes).place(a)
