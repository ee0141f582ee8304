"""What runs: backend, instruction set and number of threads, and where each was decided.

The environment is read once, at import, and strictly: a value that is unknown or impossible here
raises and lists what is possible. After that there is one process-wide default for the backend
and one for the threads, and a context variable over each for ``with`` blocks. Where nobody gave
fastbn a number of threads, OpenMP's number for the calling thread limits each call.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

import numpy as np

from fastbn import _pool, backends, checks
from fastbn._cpus import available_cpus
from fastbn.backends.base import Backend
from fastbn.errors import BackendError, shown

T = TypeVar("T")


class _Override(Generic[T]):
    """What a block has chosen."""

    def __init__(self, value: T, outer: _Override[T] | None) -> None:
        self.value = value
        self.outer = outer
        self.ended = False


_backend_here: ContextVar[_Override[Backend] | None] = ContextVar("fastbn_backend", default=None)
_threads_here: ContextVar[_Override[int] | None] = ContextVar("fastbn_threads", default=None)


def _innermost(variable: ContextVar[_Override[T] | None]) -> _Override[T] | None:
    """The override in force here."""
    override = variable.get()
    while override is not None and override.ended:
        override = override.outer
    return override


@contextmanager
def _override(variable: ContextVar[_Override[T] | None], value: T) -> Iterator[None]:
    """Put `value` in force in the block."""
    override = _Override(value, _innermost(variable))
    token = variable.set(override)
    try:
        yield
    finally:
        try:
            variable.reset(token)
        except ValueError:  # a generator's block, which ends in another context than it began in
            override.ended = True


class _Defaults:
    """The process-wide defaults, and in words where they came from."""

    backend: Backend
    backend_source: str
    threads: int
    """The number that somebody gave fastbn, or 0."""
    threads_source: str


_default = _Defaults()
_most_threads: int
"""Of a call where nobody gave fastbn a number; OpenMP's, if that is less."""
_at_most: Callable[[int], int]
"""The less of a number and OpenMP's for the calling thread."""


def current() -> tuple[Backend, int]:
    """The backend and the number of threads of a call made here and now; quick without a block."""
    backend, threads = _backend_here.get(), _threads_here.get()
    if backend is None and threads is None:
        return _default.backend, _default.threads or _at_most(_most_threads)
    backend, threads = _innermost(_backend_here), _innermost(_threads_here)
    return (
        backend.value if backend else _default.backend,
        threads.value if threads else _default.threads or _at_most(_most_threads),
    )


def get_backend() -> str:
    """Name of the backend in force: "cython", "numba" or "numpy".

    Examples
    --------
    >>> import fastbn
    >>> with fastbn.use_backend("numpy"):
    ...     fastbn.get_backend()
    'numpy'
    """
    return current()[0].name


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

    Takes the names and raises the errors of `set_backend`. In a generator the block holds
    for the code that asks for its values, too, between them. A generator that is left early, or
    passed on to another thread or task, may end the block in another context than it began in:
    then it ends everywhere, in tasks begun inside it too.
    """
    with _override(_backend_here, backends.get(name)):
        yield


def get_num_threads() -> int:
    """Number of threads in force.

    It is what `use_num_threads`, `set_num_threads` or FASTBN_NUM_THREADS says. Else it is
    OMP_NUM_THREADS where set, or the processors that affinity and the cgroup quota allow, and at
    most OpenMP's number for the calling thread (``omp_get_max_threads``, which
    ``threadpoolctl.threadpool_limits`` changes), read anew by each call. Other threads, those of
    a pool too, have OpenMP's numbers of their own.
    """
    return current()[1]


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
    _default.threads = checks.options.threads("n", n)
    _default.threads_source = "set_num_threads"


@contextmanager
def use_num_threads(n: int) -> Iterator[None]:
    """Run the block's calls on at most `n` threads; other threads and tasks do not see it.

    Takes the values and raises the errors of `set_num_threads`. In generators it behaves as
    `use_backend` does.
    """
    with _override(_threads_here, checks.options.threads("n", n)):
        yield


def get_config() -> dict[str, Any]:
    """What runs and why, as a dictionary.

    Returns
    -------
    dict
        version ("unknown" where fastbn was not installed), python, numpy, platform; backend,
        backend_source, backends (usable here: each is imported to see), unusable (the others, and
        instruction sets that were built for other processors, and why); isa, isa_source, isas
        (built, and usable here); openmp (whether the kernels were built with it); threads,
        threads_source; pool_bound, pool_idle, pool_hits (bytes that may be idle between results,
        those that are, and how many results got some). isa and openmp are None where no compiled
        kernels run: then isa_source says why.
    """
    import platform  # costs milliseconds that no import of fastbn should pay

    from fastbn import __version__

    try:
        native = backends.native_facts()
    except BackendError as error:
        native = backends.NativeFacts(None, str(error), (), (), None)
    backend, threads = current()
    if backend.name != "cython" and native.isas:
        unused = f"the {backend.name} backend runs, which has none"
        native = native._replace(isa=None, isa_source=unused, openmp=None)
    here = _innermost(_backend_here) is not None
    return {
        "version": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "platform": platform.platform(),
        "backend": backend.name,
        "backend_source": "use_backend" if here else _default.backend_source,
        "backends": backends.usable(),
        "unusable": (*backends.unusable(), *native.foreign),
        "isa": native.isa,
        "isa_source": native.isa_source,
        "isas": native.isas,
        "openmp": native.openmp,
        "threads": threads,
        "threads_source": _threads_source(threads),
        **_pool.facts(),
    }


def _threads_source(threads: int) -> str:
    if _innermost(_threads_here) is not None:
        return "use_num_threads"
    limited = not _default.threads and threads < _most_threads
    return "omp_get_max_threads" if limited else _default.threads_source


def show_config() -> None:
    """Print `get_config`, a line a fact: what a bug report needs."""
    for key, value in get_config().items():
        text = ", ".join(value) or "none" if isinstance(value, tuple) else str(value)
        print(f"{key:15} {text}")


def read_environment() -> None:
    """Set the defaults, as the last of ``import fastbn``: a warning points at whoever imports it.

    A variable that is unknown or impossible here raises; where fastbn is imported for
    ``python -m fastbn`` it is a line on stderr and exit status 2.
    """
    try:
        _set_defaults()
    except (ValueError, BackendError) as error:
        if not _is_command():
            raise
        print(f"python -m fastbn: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _set_defaults() -> None:
    global _most_threads, _at_most
    if backends.ASKED_ISA:
        backends.native_facts()  # refuses what cannot run, whichever backend will
    _pool.read_environment()
    _default.backend, _default.backend_source = _initial_backend()
    _default.threads, _default.threads_source = _asked_threads(), "FASTBN_NUM_THREADS"
    if not _default.threads:
        _most_threads, _default.threads_source = _unasked_threads()
    openmp = backends.openmp()
    _at_most = int if openmp is None else openmp.at_most


def _initial_backend() -> tuple[Backend, str]:
    asked = os.environ.get("FASTBN_BACKEND", "")
    if not asked or asked == "auto":
        backend = backends.get("auto")
        if backend.name != "cython":
            warnings.warn(
                f"the slower {backend.name} backend of fastbn runs, for "
                f"{backends.why_not('cython')} (with a C compiler)",
                RuntimeWarning,
                stacklevel=5,  # whoever imports fastbn
            )
        return backend, "FASTBN_BACKEND" if asked else "first that is usable"
    try:
        return backends.get(asked), "FASTBN_BACKEND"
    except (ValueError, BackendError) as error:
        raise type(error)(f"environment variable FASTBN_BACKEND={asked}: {error}") from None


def _asked_threads() -> int:
    """FASTBN_NUM_THREADS, or 0."""
    asked = os.environ.get("FASTBN_NUM_THREADS", "")
    if not asked:
        return 0
    number = int(asked) if re.fullmatch(r"\s*\+?[0-9]{1,9}\s*", asked) else 0
    if not 1 <= number <= checks.options.MAX_THREADS:
        raise ValueError(
            f"environment variable FASTBN_NUM_THREADS is {shown(asked)}, expected a whole number "
            f"of threads from 1 to {checks.options.MAX_THREADS}; set one of them, or unset it"
        )
    return number


def _unasked_threads() -> tuple[int, str]:
    """The number of threads where nobody gave fastbn one, and where it is from."""
    # A number for each level of nesting. GNU OpenMP ignores the list if any is none.
    numbers = os.environ.get("OMP_NUM_THREADS", "").split(",")
    positive = re.compile(r"\s*\+?0*[1-9][0-9]{0,9}\s*", re.ASCII)
    if all(positive.fullmatch(number) and int(number) < 1 << 31 for number in numbers):
        return min(int(numbers[0]), checks.options.MAX_THREADS), "OMP_NUM_THREADS"
    return min(available_cpus(), checks.options.MAX_THREADS), "processors allowed here"


def _is_command() -> bool:
    """Whether fastbn is imported for ``python -m fastbn``, whose arguments are not read yet."""
    arguments = getattr(sys, "argv", [])  # which a program that embeds Python may not set
    module = sys.orig_argv[-len(arguments) :][:1]
    return arguments[:1] == ["-m"] and module in (["fastbn"], ["-mfastbn"])
