"""Arrays of other libraries, by DLPack: on the CPU they are read where they lie.

NumPy reads all types but bfloat16, which it does not have. Of a tensor of these the type is written
over as unsigned integers of 16 bits before NumPy reads it (the layout of DLPack's unversioned
`DLManagedTensor` is fixed); the array is then seen as ml_dtypes' bfloat16.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

CPU = 1
UNSIGNED, BFLOAT = 1, 4
NAME = b"dltensor"
_REFUSALS = BufferError, RuntimeError, TypeError, ValueError


class _Tensor(ctypes.Structure):
    """The beginning of a `DLTensor`."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
    )


_pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.restype, _pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


class _Words:
    """A tensor of bfloat16 as words of 16 bits; a TypeError where it is none."""

    def __init__(self, value: Any) -> None:
        self.device, self.capsule = value.__dlpack_device__(), value.__dlpack__()
        tensor = _Tensor.from_address(_pointer_of(self.capsule, NAME))
        if (tensor.code, tensor.bits) != (BFLOAT, 16):
            raise TypeError("no bfloat16")
        tensor.code = UNSIGNED

    def __dlpack_device__(self) -> Any:
        return self.device

    def __dlpack__(self, **_: Any) -> Any:
        return self.capsule


def has_dlpack(value: Any) -> bool:
    """Whether this is an array of some library."""
    return hasattr(type(value), "__dlpack__") and hasattr(type(value), "__dlpack_device__")


def imported(name: str, value: Any) -> NDArray[Any] | None:
    """The array, without a copy; None where it is none of any library."""
    if not has_dlpack(value):
        return None
    kind = f"a {type(value).__module__.partition('.')[0]} {type(value).__name__}"
    try:
        device = int(value.__dlpack_device__()[0])
        if device == CPU:
            a: NDArray[Any] = np.from_dlpack(value)
            return a
    except _REFUSALS as error:
        words = _words(value)
        if words is not None:
            halves: NDArray[Any] = words.view(_bfloat16(name))
            return halves
        remedy = f"pass {name}.detach()"
        if not getattr(value, "requires_grad", False):
            remedy = "copy it into a numpy.ndarray"
        raise TypeError(
            f"{name} is {kind} that cannot be read as an array ({error}), expected a "
            f"numpy.ndarray or what DLPack gives; {remedy}"
        ) from error
    raise TypeError(
        f"{name} is {kind} on another device (DLPack's number {device}), expected one on the "
        f"CPU; bring it there, with {name}.cpu() or what its library has for that"
    )


def _words(value: Any) -> NDArray[Any] | None:
    """Those of an array of bfloat16; None for what is none."""
    try:
        return np.from_dlpack(_Words(value))
    except _REFUSALS:
        return None


def _bfloat16(name: str) -> Any:
    try:
        import ml_dtypes
    except ImportError as error:
        raise TypeError(
            f"{name} holds bfloat16, which NumPy has from the package ml_dtypes, and that is not "
            "installed; install it, or convert to float32"
        ) from error
    return ml_dtypes.bfloat16
