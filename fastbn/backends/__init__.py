"""The backends by name: which exist, which can run here, and loading one when it is asked for."""

from __future__ import annotations

import importlib
import os
from importlib.util import find_spec
from typing import Any, NamedTuple

from fastbn.backends.base import Backend
from fastbn.errors import BackendError, shown


class _Entry(NamedTuple):
    """Where a backend lives, what must be importable for it, and how to get that."""

    module: str
    needs: str
    remedy: str


BACKENDS = {
    "cython": _Entry(
        "fastbn.backends.native",
        "fastbn._ext.entry",
        "its compiled kernels were never built; in a checkout run: python -m pip install -e .",
    ),
    "numba": _Entry(
        "fastbn.backends.jit",
        "numba",
        "numba is not installed; run: python -m pip install 'fastbn[numba]'",
    ),
    "numpy": _Entry("fastbn.backends.reference", "numpy", ""),
}
"""The backends in the order in which "auto" tries them."""

ASKED_ISA = os.environ.get("FASTBN_ISA", "")
"""The instruction set that the environment asks for, as it was at import."""

_loaded: dict[str, Backend] = {}


class NativeFacts(NamedTuple):
    """What `get_config` tells about the compiled kernels; None where they are not built."""

    isa: str | None
    isa_source: str | None
    isas: tuple[str, ...]
    openmp: bool | None


def is_built(name: str) -> bool:
    """Whether what the backend needs is there, without importing it."""
    return find_spec(BACKENDS[name].needs) is not None


def usable() -> tuple[str, ...]:
    """The names of the backends that load here."""
    return tuple(name for name in BACKENDS if _loads(name))


def get(name: Any) -> Backend:
    """The backend called `name`, or the first usable one for "auto"."""
    asked = str.__str__(name) if isinstance(name, str) else None
    if asked not in ("auto", *BACKENDS):
        known = ", ".join(repr(known) for known in ("auto", *BACKENDS))
        kind = TypeError if asked is None else ValueError
        raise kind(f"backend is {shown(name)}, expected one of {known}; usable here: {_listed()}")
    if asked != "auto":
        return _load(asked)
    # Kernels that are there and broken are an error; numba is passed over.
    return _load("cython" if is_built("cython") else usable()[0])


def native_facts() -> NativeFacts:
    """The compiled kernels' instruction sets and OpenMP, whichever backend is in force."""
    if not is_built("cython"):
        if ASKED_ISA not in ("", "auto"):
            raise BackendError(
                f"environment variable FASTBN_ISA is {shown(ASKED_ISA)}, expected it unset or "
                f"'auto': there is no instruction set to choose, for {BACKENDS['cython'].remedy}"
            )
        return NativeFacts(None, None, (), None)
    facts: NativeFacts = _call("cython", "facts")
    return facts


def _load(name: str) -> Backend:
    if name not in _loaded:
        if not is_built(name):
            raise BackendError(
                f"backend {name!r} cannot run here: {BACKENDS[name].remedy}; "
                f"usable here: {_listed()}"
            )
        _loaded[name] = _call(name, "load")
    return _loaded[name]


def _loads(name: str) -> bool:
    if not is_built(name):
        return False
    try:
        _load(name)
    except BackendError:
        return False
    return True


def _call(name: str, function: str) -> Any:
    """What a function of the backend's module gives; whatever it imports may be broken."""
    entry = BACKENDS[name]
    try:
        return getattr(importlib.import_module(entry.module), function)()
    except ImportError as error:
        raise BackendError(
            f"backend {name!r} is there but fails to import ({error}); reinstall what it needs "
            f"({entry.needs}), or choose another with FASTBN_BACKEND or fastbn.set_backend"
        ) from error


def _listed() -> str:
    return ", ".join(usable())
