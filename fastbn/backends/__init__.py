"""The backends by name: which exist, which can run here, and loading one when it is asked for."""

from __future__ import annotations

import importlib
import os
import textwrap
from functools import cache
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
        "the compiled kernels were never built; in a checkout run: python -m pip install -e .",
    ),
    "numba": _Entry(
        "fastbn.backends.numba",
        "numba",
        "numba is not installed; run: python -m pip install 'fastbn[numba]'",
    ),
    "numpy": _Entry("fastbn.backends.reference", "numpy", ""),
}
"""The backends in the order in which "auto" tries them."""

ASKED_ISA = os.environ.get("FASTBN_ISA", "")
"""The instruction set that the environment asks for, as it was at import."""

_loaded: dict[str, Backend] = {}
_failed: dict[tuple[str, str], Exception] = {}
"""What a function of a backend's module raised where that cannot be mended while Python runs: half
an import is left behind, and a second one would only hide the reason."""


class NativeFacts(NamedTuple):
    """What `get_config` tells about the compiled kernels; None where none can run."""

    isa: str | None
    isa_source: str
    isas: tuple[str, ...]
    foreign: tuple[str, ...]
    openmp: bool | None


def is_built(name: str) -> bool:
    """Whether what the backend needs is there, without importing it."""
    try:
        return find_spec(BACKENDS[name].needs) is not None
    except Exception:  # something else stands in its place: loading the backend tells what is wrong
        return True


@cache
def openmp() -> Any:
    """The module that asks OpenMP; None where the kernels are not built, or built without it."""
    if not is_built("cython"):
        return None
    try:
        cpu = importlib.import_module("fastbn._ext.cpu")
    except Exception:  # whoever wants the Cython backend is told why
        return None
    return cpu if cpu.has_openmp() else None


def usable() -> tuple[str, ...]:
    """The names of the backends that load here."""
    return tuple(name for name in BACKENDS if why_not(name) is None)


def unusable() -> tuple[str, ...]:
    """The names of the others, each with what it lacks."""
    reasons = ((name, why_not(name)) for name in BACKENDS)
    return tuple(f"{name}: {reason}" for name, reason in reasons if reason is not None)


def why_not(name: str) -> str | None:
    """Why the backend cannot run here, or None: then it is loaded."""
    if name in _loaded:
        return None
    if not is_built(name):
        return BACKENDS[name].remedy
    try:
        _loaded[name] = _call(name, "load")
    except BackendError as error:
        return str(error)
    return None


def get(name: Any) -> Backend:
    """The backend called `name`, or the first usable one for "auto"."""
    asked = str.__str__(name) if isinstance(name, str) else None
    if asked not in ("auto", *BACKENDS):
        known = ", ".join(repr(known) for known in ("auto", *BACKENDS))
        kind = TypeError if asked is None else ValueError
        raise kind(f"backend is {shown(name)}, expected one of {known}; usable here: {_listed()}")
    if asked != "auto":
        return _load(asked)
    # Kernels that are there and broken are an error; those of other processors are passed over, as
    # numba is.
    passed = why_not("cython") is not None and ("cython", "load") not in _failed
    return _load(usable()[0] if passed else "cython")


def native_facts() -> NativeFacts:
    """The compiled kernels' instruction sets and OpenMP, whichever backend is in force."""
    facts = NativeFacts(None, BACKENDS["cython"].remedy, (), (), None)
    if is_built("cython"):
        facts = _call("cython", "facts")
    if not facts.isas and ASKED_ISA not in ("", "auto"):
        raise BackendError(
            f"environment variable FASTBN_ISA is {shown(ASKED_ISA)}, expected it unset or 'auto': "
            f"there is no instruction set to choose, for {facts.isa_source}"
        )
    return facts


def _load(name: str) -> Backend:
    reason = why_not(name)
    if reason is not None:
        raise BackendError(
            f"backend {name!r} cannot run here: {reason}; usable here: {_listed(but=name)}"
        ) from _failed.get((name, "load"))
    return _loaded[name]


def _call(name: str, function: str) -> Any:
    """What a function of the backend's module gives; whatever it imports may be broken."""
    entry, failed = BACKENDS[name], _failed.get((name, function))
    if failed is None:
        try:
            return getattr(importlib.import_module(entry.module), function)()
        except BackendError:
            raise
        except Exception as error:
            _failed[name, function] = failed = error
    told = textwrap.shorten(f"{type(failed).__name__}: {failed}", 300, placeholder=" ...")
    raise BackendError(
        f"{entry.needs} is there but fails to load ({told}); reinstall it, or choose another "
        "backend with FASTBN_BACKEND or fastbn.set_backend"
    ) from failed


def _listed(but: str | None = None) -> str:
    """The usable backends, and of the others (but of one) those that are there and fail."""
    failing = (name for name in BACKENDS if name not in (*_loaded, but) and is_built(name))
    reasons = ((name, why_not(name)) for name in failing)
    told = [f"{name} fails: {reason}" for name, reason in reasons if reason is not None]
    return "; ".join([", ".join(usable()), *told])
