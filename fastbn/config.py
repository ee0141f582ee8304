"""What runs: backend, instruction set and number of threads, and where each was decided.

The environment is read once, at import, and strictly: a value that is unknown or impossible here
raises and lists what is possible. After that there is one process-wide default for the backend
and one for the threads, and a context variable over each for ``with`` blocks.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np

from fastbn import backends, checks
from fastbn._cpus import available_cpus
from fastbn.backends.base import Backend
from fastbn.errors import BackendError, shown

_backend_here: ContextVar[Backend | None] = ContextVar("fastbn_backend", default=None)
_threads_here: ContextVar[int | None] = ContextVar("fastbn_threads", default=None)


class _Defaults:
    """The process-wide defaults, and in words where they came from."""

    backend: Backend
    backend_source: str
    threads: int
    threads_source: str


_default = _Defaults()


def current_backend() -> Backend:
    """The backend that a call made here and now runs on."""
    return _backend_here.get() or _default.backend


def current_threads() -> int:
    """The number of threads that a call made here and now may use."""
    return _threads_here.get() or _default.threads


def current() -> tuple[Backend, int]:
    """Both, for callers that count nanoseconds."""
    return _backend_here.get() or _default.backend, _threads_here.get() or _default.threads


def get_backend() -> str:
    """Name of the backend in force: "cython", "numba" or "numpy".

    Examples
    --------
    >>> import fastbn
    >>> with fastbn.use_backend("numpy"):
    ...     fastbn.get_backend()
    'numpy'
    """
    return current_backend().name


def set_backend(name: str) -> None:
    """Make `name` the process's default backend.

    Parameters
    ----------
    name : {"auto", "cython", "numba", "numpy"}
        "auto" takes the first of cython, numba, numpy that is usable here.

    Raises
    ------
    TypeError, ValueError
        `name` is no backend's name.
    BackendError
        The backend cannot run here; the message says what it lacks.
    """
    _default.backend = backends.get(name)
    _default.backend_source = "set_backend"


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the block's calls on the backend `name`; other threads and tasks do not see it.

    Takes the names and raises the errors of `set_backend`.
    """
    token = _backend_here.set(backends.get(name))
    try:
        yield
    finally:
        _backend_here.reset(token)


def get_num_threads() -> int:
    """Number of threads in force.

    It is FASTBN_NUM_THREADS where set, else OMP_NUM_THREADS where set, else the processors that
    affinity and the cgroup quota allow, until `set_num_threads` or `use_num_threads` says
    otherwise.
    """
    return current_threads()


def set_num_threads(n: int) -> None:
    """Make `n` the process's default number of threads.

    Parameters
    ----------
    n : int
        From 1 to 1024. Small arrays take fewer, and calls made at once share them; results do not
        depend on it.

    Raises
    ------
    TypeError, ValueError
        `n` is no whole number, or out of range.
    """
    _default.threads = checks.threads("n", n)
    _default.threads_source = "set_num_threads"


@contextmanager
def use_num_threads(n: int) -> Iterator[None]:
    """Run the block's calls on at most `n` threads; other threads and tasks do not see it.

    Takes the values and raises the errors of `set_num_threads`.
    """
    token = _threads_here.set(checks.threads("n", n))
    try:
        yield
    finally:
        _threads_here.reset(token)


def get_config() -> dict[str, Any]:
    """What runs and why, as a dictionary.

    Returns
    -------
    dict
        version, python, numpy, platform; backend, backend_source, backends (usable here: each is
        imported to see); isa, isa_source, isas (usable here); openmp (whether the kernels were
        built with it); threads, threads_source. isa and openmp are None where the compiled
        kernels are not built, or fail to import: then isa_source says why.
    """
    import platform  # costs milliseconds that no import of fastbn should pay

    from fastbn import __version__

    try:
        native = backends.native_facts()
    except BackendError as error:
        native = backends.NativeFacts(None, str(error), (), None)
    here = _backend_here.get() is not None
    counted = _threads_here.get() is not None
    return {
        "version": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "platform": platform.platform(),
        "backend": current_backend().name,
        "backend_source": "use_backend" if here else _default.backend_source,
        "backends": backends.usable(),
        "isa": native.isa,
        "isa_source": native.isa_source,
        "isas": native.isas,
        "openmp": native.openmp,
        "threads": current_threads(),
        "threads_source": "use_num_threads" if counted else _default.threads_source,
    }


def show_config() -> None:
    """Print `get_config`, a line a fact: what a bug report needs."""
    for key, value in get_config().items():
        text = ", ".join(value) if isinstance(value, tuple) else str(value)
        print(f"{key:15} {text}")


def _read_environment() -> None:
    """Set the defaults; called once, at import."""
    if backends.ASKED_ISA:
        backends.native_facts()  # refuses what cannot run, whichever backend will
    _default.backend, _default.backend_source = _initial_backend()
    _default.threads, _default.threads_source = _initial_threads()


def _initial_backend() -> tuple[Backend, str]:
    asked = os.environ.get("FASTBN_BACKEND", "")
    if not asked or asked == "auto":
        backend = backends.get("auto")
        if not backends.is_built("cython"):
            warnings.warn(
                f"fastbn's compiled kernels were never built, so the slower {backend.name} backend "
                "runs; build them with: python -m pip install -e . (in a checkout, with a C "
                "compiler)",
                RuntimeWarning,
                stacklevel=5,  # whoever imports fastbn
            )
        return backend, "FASTBN_BACKEND" if asked else "first that is usable"
    try:
        return backends.get(asked), "FASTBN_BACKEND"
    except (ValueError, BackendError) as error:
        raise type(error)(f"environment variable FASTBN_BACKEND={asked}: {error}") from None


def _initial_threads() -> tuple[int, str]:
    asked = os.environ.get("FASTBN_NUM_THREADS", "")
    if asked:
        name = "environment variable FASTBN_NUM_THREADS"
        if not re.fullmatch(r"\s*[+-]?[0-9]+\s*", asked):
            raise ValueError(
                f"{name} is {shown(asked)}, expected a whole number of threads from 1 to "
                f"{checks.MAX_THREADS}; set a number, or unset it"
            )
        return checks.threads(name, int(asked)), "FASTBN_NUM_THREADS"
    # OMP_NUM_THREADS may be a list, a number for each level of nesting: the first is ours.
    openmp = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if openmp.isdecimal() and int(openmp) > 0:
        return min(int(openmp), checks.MAX_THREADS), "OMP_NUM_THREADS"
    return min(available_cpus(), checks.MAX_THREADS), "processors allowed here"


_read_environment()
