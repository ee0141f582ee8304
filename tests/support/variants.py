"""The variants under test: every backend usable here, Cython once for each instruction set.

A variant proves that it ran: `Variant.calls` counts its kernel runs, and the fixture `variant`
fails a test during which that count did not rise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

import pytest

import fastbn
from fastbn import backends, config
from fastbn.backends.base import Backend

PASSES = ("moments", "normalize", "gradient_moments", "input_gradient")
FUSED = ("forward", "backward")
EIGHT = (*PASSES, *FUSED, "forward_rows", "backward_rows")
COUNTED = (*EIGHT, "integer_sums")


@dataclass(frozen=True)
class Variant:
    """One backend (and instruction set) that calls now run on."""

    name: str
    backend: Backend
    calls: Callable[[], int]
    """How many kernel runs this variant has made so far."""


def _names() -> tuple[str, ...]:
    names = [name for name in reversed(backends.usable()) if name != "cython"]
    return (*names, *(f"cython-{isa}" for isa in backends.native_facts().isas))


VARIANTS = _names()
CYTHON = tuple(name for name in VARIANTS if name.startswith("cython-"))
BACKENDS = (*(name for name in VARIANTS if name not in CYTHON), *CYTHON[:1])
"""A variant of each backend, of Cython the best: for what instruction sets share."""
EACH_BACKEND = [
    pytest.mark.usefixtures("variant"),
    pytest.mark.parametrize("variant", BACKENDS, indirect=True),
]
"""Marks that run tests on these in place of all variants."""
Test = TypeVar("Test", bound=Callable[..., None])


def each_backend(test: Test) -> Test:
    """The same for a test."""
    for mark in EACH_BACKEND:
        test = mark(test)
    return test


_RUNNERS = {
    "cython": {"FASTBN_BACKEND": "cython"},
    "numba on omp": {"FASTBN_BACKEND": "numba", "NUMBA_THREADING_LAYER": "omp"},
    "numba on workqueue": {"FASTBN_BACKEND": "numba", "NUMBA_THREADING_LAYER": "workqueue"},
    "numpy": {"FASTBN_BACKEND": "numpy"},
}
RUNNERS = {n: r for n, r in _RUNNERS.items() if r["FASTBN_BACKEND"] in backends.usable()}
"""Each way to run threads, as the environment variables that choose it."""


@contextmanager
def activate(name: str) -> Iterator[Variant]:
    """Run the block's calls on the variant `name`."""
    backend_name, _, isa = name.partition("-")
    with ExitStack() as stack:
        if isa:
            from fastbn.backends import native

            compiled: Any = native.variant(isa)
            assert compiled.isa == isa
            stack.enter_context(config._override(config._backend_here, compiled))
            yield Variant(name, compiled, compiled.calls)
        else:
            stack.enter_context(fastbn.use_backend(backend_name))
            backend = config.current()[0]
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            yield Variant(name, backend, _counted(backend, patch))


def environment(name: str) -> dict[str, str]:
    """The environment variables that make `name` a new process's default."""
    backend_name, _, isa = name.partition("-")
    return {"FASTBN_BACKEND": backend_name, **({"FASTBN_ISA": isa} if isa else {})}


def proof(name: str) -> str:
    """Code that fails in a process of which `name` is not the default."""
    backend, _, isa = name.partition("-")
    code = f"\nassert fastbn.get_backend() == {backend!r}\n"
    return code + (f"assert fastbn.get_config()['isa'] == {isa!r}\n" if isa else "")


_made: dict[str, list[str]] = {}


def _counted(backend: Backend, patch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Count the calls of the functions that compute, and of the plain entry that needs none.

    Who made a plain entry keeps it, so that it must go on counting.
    """
    made = _made.setdefault(backend.name, [])

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            if name in COUNTED or result is not None:
                made.append(name)
            return result

        return counted

    for name in COUNTED:
        patch.setattr(backend, name, counting(name, getattr(backend, name)))
    frozen = backend.plain_frozen
    patch.setattr(backend, "plain_frozen", lambda *fixed: counting("plain", frozen(*fixed)))
    return made.__len__
