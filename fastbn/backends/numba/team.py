"""Numba's threads, where it is safe to use them.

"workqueue" threads end the process when entered twice at once, so one call at a time has threads
and the others run serial meanwhile; OpenMP's are lost in a forked child. The bits are the same.
"""

from __future__ import annotations

import importlib
import os
import threading
from typing import Any

import numba
import numpy as np
from numba import prange
from numba.np.ufunc import parallel as layers

from fastbn.backends.numba.compiling import kernel
from fastbn.backends.numba.jobs import drive
from fastbn.errors import BackendError

_numba: Any = numba  # its types are told only in part
_lock = threading.Lock()
_process = os.getpid()


@kernel(parallel=True)
def _share(job_address: int, phase: int, threads: int) -> None:
    for thread in prange(threads):
        drive(job_address, phase, np.int64(thread), threads)  # type: ignore[arg-type]


def share(job_address: int, phase: int, threads: int) -> None:
    """A phase of a job, on so many threads where that is safe now."""
    if threads > 1 and _lock.acquire(blocking=False):
        try:
            if _threads_work():
                _on_threads(job_address, phase, threads)
                return
        finally:
            _lock.release()
    drive(job_address, phase, 0, 1)


def _on_threads(job_address: int, phase: int, threads: int) -> None:
    before = _numba.get_num_threads()
    if before == threads:
        _share(job_address, phase, threads)
        return
    _numba.set_num_threads(threads)
    try:
        _share(job_address, phase, threads)
    finally:
        _numba.set_num_threads(before)


def _threads_work() -> bool:
    """Whether threads can run in this process now.

    OpenMP's are lost in a forked child; "workqueue" ends the process when anybody else, in another
    Python thread, runs parallel code of their own at the same time.
    """
    global _process
    try:
        layer = _numba.threading_layer()
    except ValueError:  # none have been started yet
        _process = os.getpid()
        return True
    if layer == "workqueue":
        return threading.active_count() == 1
    return bool(layer != "omp" or _process == os.getpid())


_LAYERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("default", "workqueue", "forksafe"), ()),
    **dict.fromkeys(("tbb", "safe"), ("tbb",)),
    "omp": ("omp",),
    "threadsafe": ("tbb", "omp"),
}
"""Numba's threading layers, and the libraries of which each needs one."""


def _is_there(library: str) -> bool:
    try:
        if library == "tbb":
            check: Any = layers._check_tbb_version_compatible
            check()
        importlib.import_module(f"numba.np.ufunc.{library}pool")
    except ImportError:
        return False
    return True


def check_layer() -> None:
    """Numba would tell only in mid-call that it has no threads as asked for."""
    layer, order = str(_numba.config.THREADING_LAYER), _numba.config.THREADING_LAYER_PRIORITY
    libraries, variable = _LAYERS.get(layer.lower()), "NUMBA_THREADING_LAYER"
    if libraries is None:
        raise BackendError(f"{variable} is {layer!r}, expected one of {', '.join(_LAYERS)}")
    if libraries and not any(map(_is_there, libraries)):
        lacking = " or ".join(libraries)
        raise BackendError(f"{variable} is {layer!r}, but {lacking} is not here; unset it")
    if sorted(order) != ["omp", "tbb", "workqueue"]:
        given = " ".join(order)
        raise BackendError(f"{variable}_PRIORITY is {given!r}, expected tbb, omp and workqueue")
