"""Calls that stay inside a kernel for as long as a test wants; for a process of its own."""

from __future__ import annotations

import ctypes
import mmap
import signal
import threading
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fastbn

PLANE = 64 * mmap.PAGESIZE
"""Bytes; large enough for several threads."""
_NOBODY, _EVERYBODY = 0, mmap.PROT_READ | mmap.PROT_WRITE
_libc = ctypes.CDLL(None)


def wait_at_forbidden_pages() -> None:
    """Let who reads a forbidden page try again and again, until it may."""
    # The handler sleeps as many microseconds as the signal's number.
    handler = ctypes.cast(_libc.usleep, ctypes.c_void_p)
    _libc.signal(int(signal.SIGSEGV), handler)


class BlockingCall:
    """A call in a thread of its own that is inside the kernel, and ends when released.

    It normalizes two planes, of which the second may not be read yet.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._pages = mmap.mmap(-1, 2 * PLANE)
        self._x: NDArray[Any] = np.frombuffer(self._pages, np.float32).reshape(1, 2, -1)
        self._x[...] = np.arange(self._x.size).reshape(self._x.shape) % 1000
        self._y = np.full_like(self._x, np.nan)
        self._allow(_NOBODY)
        self._thread = threading.Thread(target=self._call)
        self._thread.start()
        while np.isnan(self._y[0, 0, 0]):
            time.sleep(0.001)

    def release(self) -> bool:
        """Let the call end; whether it was inside until now, and its result is right."""
        inside = bool(np.isnan(self._y[0, 1, -1]))
        self._allow(_EVERYBODY)
        self._thread.join()
        return inside and bool((self._y == self._x - 1).all())

    def _call(self) -> None:
        with fastbn.use_num_threads(self._threads):
            fastbn.normalize(self._x, np.ones(2), np.ones(2), eps=0.0, out=self._y)

    def _allow(self, protection: int) -> None:
        second = ctypes.c_void_p(self._x.ctypes.data + PLANE)
        if _libc.mprotect(second, ctypes.c_size_t(PLANE), protection) != 0:
            raise OSError("the second plane's pages do not change their protection")
