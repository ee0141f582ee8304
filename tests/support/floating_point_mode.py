"""The floating-point mode of the thread that asks: its registers, and arithmetic that shows it.

Processes that have not imported fastbn use this too.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

READABLE = platform.machine() == "x86_64" and platform.libc_ver()[0] == "glibc"
"""Whether the registers' place in the C library's environment is known."""

FLUSH = 0x8040  # results and operands: FTZ and DAZ
UPWARD = 0x800
FLAGS = 0x3F  # what has happened, which is no mode


class Environment(ctypes.Structure):
    """glibc's fenv_t on x86-64."""

    _fields_ = (
        ("control", ctypes.c_uint16),
        ("_between", ctypes.c_uint8 * 26),
        ("mxcsr", ctypes.c_uint32),
    )


def registers() -> tuple[int, int]:
    """The control word and MXCSR, without the flags."""
    now = _environment()
    return now.control, now.mxcsr & ~FLAGS


def arithmetic() -> bytes:
    """Float32 values that flushing or another rounding changes, by scalars and by vectors."""
    tiny, third = np.float32(1e-40) * np.float32(0.5), np.float32(1) / np.float32(-3)
    many = np.full(64, 1e-40, np.float32) * np.float32(0.5), np.full(64, 1, np.float32) / 3
    return b"".join(a.tobytes() for a in (tiny, third, *many))


def state() -> tuple[tuple[int, int] | None, bytes]:
    """All that is seen of the mode."""
    return registers() if READABLE else None, arithmetic()


@contextmanager
def flushing() -> Iterator[None]:
    """Subnormal results and operands are zero in the block."""
    with _restored() as changed:
        changed.mxcsr |= FLUSH
        _libm().fesetenv(ctypes.byref(changed))
        yield


@contextmanager
def upward() -> Iterator[None]:
    """Results are rounded upward in the block."""
    with _restored():
        assert _libm().fesetround(UPWARD) == 0
        yield


def _libm() -> ctypes.CDLL:
    return ctypes.CDLL("libm.so.6")


def _environment() -> Environment:
    now = Environment()
    assert _libm().fegetenv(ctypes.byref(now)) == 0
    return now


@contextmanager
def _restored() -> Iterator[Environment]:
    """A copy of the environment, which is brought back afterwards."""
    before = _environment()
    try:
        yield Environment.from_buffer_copy(before)
    finally:
        _libm().fesetenv(ctypes.byref(before))
