"""The Cython backend: the compiled kernels of the instruction set that was picked at import."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import numpy as np

from fastbn._ext import cpu, entry
from fastbn.activations import Activation
from fastbn.backends import ASKED_ISA, NativeFacts, isas
from fastbn.backends.base import (
    Affine,
    Array,
    Backend,
    Gate,
    GradientCoefficients,
    Selection,
    Table,
    Tail,
)
from fastbn.errors import BackendError


class NativeBackend(Backend):
    """Compiled passes, trips and plain entries, on one instruction set."""

    name = "cython"

    def __init__(self, isa: str) -> None:
        self.isa = isa
        kernels = (f"fastbn._ext.kernels_{isa}_{element}" for element in entry.ELEMENTS)
        self._engine = entry.Engine(isa, tuple(importlib.import_module(name) for name in kernels))
        self.plain_moments = self._engine.plain_moments
        self.plain_batch_norm = self._engine.plain_batch_norm
        self.plain_normalize = self._engine.plain_normalize
        self.plain_backward = self._engine.plain_backward
        self.plain_samples = self._engine.plain_samples
        self.plain_samples_backward = self._engine.plain_samples_backward

    def calls(self) -> int:
        """How often kernels of this instruction set have run in this process."""
        return int(self._engine.calls())

    def plain_frozen(
        self, affine: Affine, layout: str, activation: Activation
    ) -> Callable[..., Array | None]:
        return self._engine.frozen(affine, layout, activation)

    def moments(
        self, x: Array, threads: int, selection: Selection | None = None
    ) -> tuple[Table, Table]:
        return self._engine.moments(_walkable(x), threads, selection)

    def normalize(
        self,
        x: Array,
        affine: Affine,
        out: Array,
        threads: int,
        tail: Tail | None = None,
        selection: Selection | None = None,
    ) -> None:
        target, fused = _target(out), (_walkable_tail(tail), selection)
        self._engine.normalize(_walkable(x), affine, target, threads, *fused)
        _deliver(target, out)

    def gradient_moments(
        self,
        dy: Array,
        x: Array,
        mean: Table,
        threads: int,
        gate: Gate | None = None,
        selection: Selection | None = None,
    ) -> tuple[Table, Table]:
        arrays, fused = (_walkable(dy), _walkable(x)), (_walkable_gate(gate), selection)
        return self._engine.gradient_moments(*arrays, mean, threads, *fused)

    def input_gradient(
        self,
        dy: Array,
        x: Array | None,
        coefficients: GradientCoefficients,
        out: Array,
        threads: int,
        gate: Gate | None = None,
        selection: Selection | None = None,
    ) -> None:
        target, gated = _target(out), _walkable_gate(gate)
        arrays = _walkable(dy), None if x is None else _walkable(x)
        self._engine.input_gradient(*arrays, coefficients, target, threads, gated, selection)
        _deliver(target, out)
        if gated is not None and gate is not None:
            _deliver(gated.dresidual, gate.dresidual)

    def forward(
        self,
        x: Array,
        gamma: Table,
        beta: Table,
        eps: float,
        out: Array,
        threads: int,
        tail: Tail | None = None,
        selection: Selection | None = None,
        pool: int = 1,
    ) -> tuple[Table, Table]:
        target, fused = _target(out), (_walkable_tail(tail), selection, pool)
        x = _walkable(x, pool)
        result = self._engine.forward(x, gamma, beta, eps, target, threads, *fused)
        _deliver(target, out)
        return result

    def backward(
        self,
        dy: Array,
        x: Array,
        mean: Table,
        var: Table,
        gamma: Table,
        eps: float,
        frozen: bool,
        out: Array,
        threads: int,
        gate: Gate | None = None,
        selection: Selection | None = None,
        pool: int = 1,
    ) -> tuple[Table, Table]:
        target, gated = _target(out), _walkable_gate(gate)
        tables, fused = (mean, var, gamma), (gated, selection, pool)
        result = self._engine.backward(
            _walkable(dy), _walkable(x), *tables, eps, frozen, target, threads, *fused
        )
        _deliver(target, out)
        if gated is not None and gate is not None:
            _deliver(gated.dresidual, gate.dresidual)
        return result

    def forward_rows(
        self,
        x: Array,
        gamma: Table,
        beta: Table,
        eps: float,
        out: Array,
        threads: int,
        tail: Tail | None = None,
    ) -> tuple[Table, Table]:
        return self._engine.forward_rows(x, gamma, beta, eps, out, threads, tail)

    def backward_rows(
        self,
        dy: Array,
        x: Array,
        mean: Table,
        var: Table,
        gamma: Table,
        eps: float,
        out: Array,
        threads: int,
        gate: Gate | None = None,
    ) -> tuple[Table, Table]:
        dgamma, dbeta = self._engine.backward_rows(dy, x, mean, var, gamma, eps, out, threads, gate)
        return dgamma, dbeta


_variants: dict[str, NativeBackend] = {}


def variant(isa: str) -> NativeBackend:
    """The backend on the instruction set `isa`, one of `facts().isas`."""
    if isa not in _variants:
        isas.check("isa", isa)
        _variants[isa] = NativeBackend(isa)
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


def _walkable(a: Array, pool: int = 1) -> Array:
    """`a`, or a dense copy where its narrow rows, or what is summed as one plane, lie apart."""
    _, samples, channels, size = a.shape
    apart = pool > 1 and size > 1 and a.strides[2] != size * a.itemsize
    apart |= pool == channels and size == 1 < samples and a.strides[1] != channels * a.itemsize
    return a if entry.walks(a) and not apart else np.ascontiguousarray(a)


def _target(out: Array) -> Array:
    return out if entry.walks(out) else np.empty(out.shape, out.dtype)


def _deliver(target: Array | None, out: Array | None) -> None:
    if out is not None and target is not out:
        out[...] = target


def _walkable_tail(tail: Tail | None) -> Tail | None:
    if tail is None or tail.residual is None:
        return tail
    return Tail(tail.activation, _walkable(tail.residual))


def _walkable_gate(gate: Gate | None) -> Gate | None:
    if gate is None:
        return None
    dresidual = None if gate.dresidual is None else _target(gate.dresidual)
    return Gate(gate.activation, _walkable(gate.y), dresidual)
