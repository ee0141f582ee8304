"""A memory handler of one's own in force for NumPy's arrays (NEP 49), by NumPy's C interface."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

SET_HANDLER = 304
"""Of PyDataMem_SetHandler among the functions of NumPy's C interface."""

_libc = ctypes.CDLL(None)
for _name in ("malloc", "calloc", "realloc"):
    getattr(_libc, _name).restype = ctypes.c_void_p
_SIZE, _POINTER = ctypes.c_size_t, ctypes.c_void_p


class _Handler(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char * 127),
        ("version", ctypes.c_uint8),
        ("context", _POINTER),
        ("malloc", ctypes.CFUNCTYPE(_POINTER, _POINTER, _SIZE)),
        ("calloc", ctypes.CFUNCTYPE(_POINTER, _POINTER, _SIZE, _SIZE)),
        ("realloc", ctypes.CFUNCTYPE(_POINTER, _POINTER, _POINTER, _SIZE)),
        ("free", ctypes.CFUNCTYPE(None, _POINTER, _POINTER, _SIZE)),
    )


def _malloc(context: Any, size: int) -> Any:
    return _libc.malloc(_SIZE(size))


def _calloc(context: Any, count: int, each: int) -> Any:
    return _libc.calloc(_SIZE(count), _SIZE(each))


def _realloc(context: Any, data: Any, size: int) -> Any:
    return _libc.realloc(_POINTER(data), _SIZE(size))


def _free(context: Any, data: Any, size: int) -> None:
    _libc.free(_POINTER(data))


_kinds: list[Any] = [kind for _, kind in _Handler._fields_[3:]]
_functions = [
    kind(function)
    for kind, function in zip(_kinds, (_malloc, _calloc, _realloc, _free), strict=True)
]
_handler = _Handler(b"of the test", 1, None, *_functions)


def _pointer(capsule: Any, name: bytes | None) -> int:
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = _POINTER, (ctypes.py_object, ctypes.c_char_p)
    found: int = get(capsule, name)
    return found


def _new_capsule() -> Any:
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, (_POINTER, ctypes.c_char_p, _POINTER)
    return new(ctypes.addressof(_handler), b"mem_handler", None)


_interface = _pointer(np._core._multiarray_umath._ARRAY_API, None)  # type: ignore[attr-defined]
_table = ctypes.cast(_interface, ctypes.POINTER(_POINTER))
_set_handler = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.py_object)(_table[SET_HANDLER] or 0)
_capsule = _new_capsule()


@contextmanager
def own_handler() -> Iterator[str]:
    """Arrays made in the block have a handler of its own; gives the handler's name."""
    before = _set_handler(_capsule)
    try:
        yield _handler.name.decode()
    finally:
        _set_handler(before)


def handler_of(a: np.ndarray[Any, Any]) -> str | None:
    """The name of the handler that made an array's memory."""
    found: str | None = np._core.multiarray.get_handler_name(a)  # type: ignore[attr-defined]
    return found
