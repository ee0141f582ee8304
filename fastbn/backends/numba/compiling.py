"""How kernels are compiled, called and kept.

A *body* is a part of the work on memory. It is compiled once for each element type, when it is
first asked for, and called by its address: so whatever calls it is compiled once for all types, and
LLVM sees no body twice. What was compiled is kept on disk where Numba finds a place.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numba
import numpy as np
from numba import types
from numba.core import caching

from fastbn.elements import is_bfloat16

F = TypeVar("F", bound=Callable[..., Any])
_njit: Any = numba.njit  # told only in part by its types
HALF, BRAIN = types.uint16, types.int16
"""Numba has neither float16 nor bfloat16; these integers stand for them."""


def inline(function: F) -> F:
    """A part of bodies."""
    options = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    inlined: F = _njit(function, error_model="numpy", forceinline=True, **options)
    return inlined


def kernel(parallel: bool = False) -> Callable[[F], F]:
    """A function that Python calls, and that lets other threads run meanwhile."""

    def compiled(function: F) -> F:
        made: F = _njit(function, error_model="numpy", nogil=True, parallel=parallel)
        _keep_on_disk(made, function)
        return made

    return compiled


@cache
def body(function: Callable[..., int], dtype: np.dtype[Any], *kinds: bool) -> int:
    """The address of a body for arrays of this type.

    Its arguments are the addresses of a job and of a unit of it, and pointers to nowhere: one tells
    the type, and one for each kind of work (`selected`, `fused`, `placed`) is None where that is
    not asked for, which leaves no trace of it.
    """
    pointer_to: Any = types.CPointer
    pointer, asked = pointer_to(_element(dtype)), pointer_to(types.uint8)
    of_kinds = (asked if kind else types.none for kind in kinds)
    arguments = types.int64, types.int64, pointer, *of_kinds
    compiled = _njit(function, error_model="numpy", no_cpython_wrapper=True)
    _keep_on_disk(compiled, function)
    compiled.compile(types.int64(*arguments))
    made = compiled.overloads[arguments]
    _bodies.append(made)
    return int(made.library.get_pointer_to_function(made.fndesc.llvm_cfunc_wrapper_name))


_bodies: list[Any] = []
"""What was compiled, and is called by its address."""


def _element(dtype: np.dtype[Any]) -> Any:
    if dtype.itemsize == 2:
        return BRAIN if is_bfloat16(dtype) else HALF
    return numba.from_dtype(dtype)


def _keep_on_disk(compiled: Any, function: Callable[..., Any]) -> None:
    with suppress(RuntimeError):  # no directory for it
        compiled._cache = _Cache(function)


@cache
def _stamp() -> tuple[tuple[float, int], ...]:
    """What tells this package from others: bodies are made of functions of several files."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return tuple((file.stat().st_mtime, file.stat().st_size) for file in files)


class _Cache(caching.FunctionCache):
    """Numba's files, which bring back what was compiled or else are as good as none: of other
    sources, empty, truncated, of another user, on a full disk."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)  # type: ignore[no-untyped-call]
        self._cache_file._source_stamp = _stamp()

    def load_overload(self, *arguments: Any) -> Any:
        try:
            return super().load_overload(*arguments)  # type: ignore[no-untyped-call]
        except Exception:  # whatever unpickling makes of what is there
            with suppress(OSError):
                self.flush()  # type: ignore[no-untyped-call]  # the index may be what is broken
            return None

    def save_overload(self, *arguments: Any) -> None:
        with suppress(Exception):
            super().save_overload(*arguments)  # type: ignore[no-untyped-call]
