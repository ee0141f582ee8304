"""The Cython backend: the compiled kernels of the instruction set that was picked at import."""

from __future__ import annotations

import importlib

from fastbn._ext import cpu, entry
from fastbn.backends import ASKED_ISA, NativeFacts, isas
from fastbn.backends.base import Backend
from fastbn.errors import BackendError


class NativeBackend(entry.Engine, Backend):
    """Compiled passes, fused walks and plain entries, on one instruction set."""

    name = "cython"


_variants: dict[str, NativeBackend] = {}


def variant(isa: str) -> NativeBackend:
    """The backend on the instruction set `isa`, one of `facts().isas`."""
    if isa not in _variants:
        isas.check("isa", isa)
        kernels = (f"fastbn._ext.kernels_{isa}_{element}" for element in entry.ELEMENTS)
        modules = tuple(importlib.import_module(name) for name in kernels)
        _variants[isa] = NativeBackend(isa, modules)
    return _variants[isa]


def _picked() -> tuple[str, str]:
    """The instruction set that FASTBN_ISA asks for, or the best, and who decided."""
    asked = ASKED_ISA
    if not asked or asked == "auto":
        return isas.usable()[0], "FASTBN_ISA" if asked else "best that runs here"
    isas.check("environment variable FASTBN_ISA", asked)
    return asked, "FASTBN_ISA"


def load() -> Backend:
    """The backend on the instruction set that the environment asks for."""
    if not isas.usable():
        raise BackendError(isas.why_none())
    return variant(_picked()[0])


def facts() -> NativeFacts:
    """What `fastbn.get_config` tells of the compiled kernels."""
    usable = isas.usable()
    if not usable:
        return NativeFacts(None, isas.why_none(), (), (), None)
    return NativeFacts(*_picked(), usable, isas.foreign(), cpu.has_openmp())
