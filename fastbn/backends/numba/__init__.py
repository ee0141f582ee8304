"""The Numba backend: passes and fused walks, compiled when first used.

`call` prepares a job of arrays, and `jobs` tells in which order its bodies come: those of `planes`
and `rows`, the two families of memory, made of the inner loops in `reduce` and `elementwise`, and
those of `finalize`, from sums to coefficients. `compiling` and `instructions` are what Numba needs
for that, and `team` has its threads.
"""

from __future__ import annotations

import math

import numba
import numpy as np

from fastbn.activations import LINEAR
from fastbn.backends.base import (
    ActivationGrad,
    Affine,
    Array,
    Backend,
    BackwardRowTables,
    BackwardTables,
    Epilogue,
    ForwardRowTables,
    ForwardTables,
    GradientCoefficients,
    Selection,
    Table,
    rows_per_sum,
)
from fastbn.backends.numba import jobs, team
from fastbn.backends.numba.call import Call, channel_bytes, walks
from fastbn.backends.plain import PlainCalls
from fastbn.errors import BackendError

if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
    raise BackendError("NUMBA_DISABLE_JIT is set, so nothing would be compiled; unset it")


class NumbaBackend(PlainCalls):
    """Compiled by Numba."""

    name = "numba"

    def walks(self, view: Array, pool: int = 1) -> bool:
        return walks(view)

    def channel_bytes(self, shape: tuple[int, int, int, int]) -> int:
        return channel_bytes(shape)

    def moments(
        self, x: Array, threads: int, selection: Selection | None = None
    ) -> tuple[Table, Table]:
        call = Call(x, selection)
        call.give(jobs.GAMMA, 1.0)
        call.array(x, "x", "dy", "other", "out", "dresidual")
        call.run(threads, backward=False, sums=True, writes=False)
        return call.take(jobs.MEAN), call.take(jobs.VAR)

    def normalize(
        self,
        x: Array,
        affine: Affine,
        out: Array,
        threads: int,
        epilogue: Epilogue | None = None,
        selection: Selection | None = None,
    ) -> None:
        call = Call(x, selection)
        for row, values in zip((jobs.MEAN, jobs.SCALE, jobs.BETA), affine, strict=True):
            call.give(row, values)
        _forward(call, x, out, threads, epilogue, sums=False)

    def forward(
        self,
        x: Array,
        tables: ForwardTables,
        out: Array,
        threads: int,
        epilogue: Epilogue | None = None,
        selection: Selection | None = None,
    ) -> tuple[Table, Table]:
        if tables.pool > 1:
            return super().forward(x, tables, out, threads, epilogue, selection)
        call = Call(x, selection)
        call.with_eps(tables.eps)
        call.give(jobs.GAMMA, 1.0 if tables.gamma is None else tables.gamma)
        call.give(jobs.BETA, 0.0 if tables.beta is None else tables.beta)
        _forward(call, x, out, threads, epilogue, sums=True)
        return call.take(jobs.MEAN), call.take(jobs.VAR)

    def forward_rows(
        self,
        x: Array,
        tables: ForwardRowTables,
        out: Array,
        threads: int,
        epilogue: Epilogue | None = None,
        mask: Array | None = None,
    ) -> tuple[Table, Table]:
        call = Call(x, by_column=True)
        call.with_eps(tables.eps)
        call.set(about_zero=not tables.is_centred)
        call.give(jobs.GAMMA, 1.0)
        call.places("gamma", tables.gamma)
        call.places("beta", tables.beta)
        _forward(call, x, out, threads, epilogue, sums=True)
        found = call.take(jobs.MEAN), call.take(jobs.VAR)
        if mask is not None:
            for a in (out[0, 0], *(table[0] for table in found)):
                a[~mask] = 0
        return found

    def gradient_moments(
        self,
        dy: Array,
        x: Array,
        mean: Table,
        threads: int,
        activation_grad: ActivationGrad | None = None,
        selection: Selection | None = None,
    ) -> tuple[Table, Table]:
        call = Call(x, selection)
        for row, values in ((jobs.MEAN, mean), (jobs.VAR, 1.0), (jobs.GAMMA, 1.0)):
            call.give(row, values)
        _backward(call, dy, x, None, threads, activation_grad, sums=True)
        return call.take(jobs.DBETA), call.take(jobs.DGAMMA)

    def input_gradient(
        self,
        dy: Array,
        x: Array | None,
        coefficients: GradientCoefficients,
        out: Array,
        threads: int,
        activation_grad: ActivationGrad | None = None,
        selection: Selection | None = None,
    ) -> None:
        call = Call(dy, selection)
        a, b, dy_mean, mean, rstd, rest = coefficients
        call.give(jobs.SCALE, a)
        if x is None:
            call.set(frozen=True)
        else:
            given = (jobs.B, b), (jobs.DY_MEAN, dy_mean), (jobs.MEAN, mean), (jobs.RSTD, rstd)
            for row, values in (*given, (jobs.REST, 0.0 if rest is None else rest)):
                call.give(row, values)
        _backward(call, dy, dy if x is None else x, out, threads, activation_grad, sums=False)

    def backward(
        self,
        dy: Array,
        x: Array,
        tables: BackwardTables,
        out: Array,
        threads: int,
        activation_grad: ActivationGrad | None = None,
        selection: Selection | None = None,
    ) -> tuple[Table, Table]:
        if tables.pool > 1:
            return super().backward(dy, x, tables, out, threads, activation_grad, selection)
        gamma = 1.0 if tables.gamma is None else tables.gamma
        call = Call(x, selection)
        call.with_eps(tables.eps)
        call.set(frozen=tables.is_fixed)
        for row, values in ((jobs.MEAN, tables.mean), (jobs.VAR, tables.var), (jobs.GAMMA, gamma)):
            call.give(row, values)
        _backward(call, dy, x, out, threads, activation_grad, sums=True)
        return call.take(jobs.DGAMMA), call.take(jobs.DBETA)

    def backward_rows(
        self,
        dy: Array,
        x: Array,
        tables: BackwardRowTables,
        out: Array,
        threads: int,
        activation_grad: ActivationGrad | None = None,
        mask: Array | None = None,
        dsum: Array | None = None,
    ) -> tuple[Table, Table]:
        mean, var, gamma, eps, is_centred = tables
        (period, size), rows = gamma.shape, mean.size
        if mask is not None:
            dy, x = (np.where(mask[:, None], a, a.dtype.type(0)) for a in (dy, x))
        block = rows_per_sum(period, size, rows)
        call = Call(x, by_column=True, block=block)
        call.with_eps(eps)
        call.set(about_zero=not is_centred)
        for row, values in ((jobs.MEAN, mean), (jobs.VAR, var), (jobs.GAMMA, 1.0)):
            call.give(row, values)
        sums = np.zeros((-(-rows // block), 2, period, size))
        call.places("gamma", gamma)
        call.set(parameters=sums.ctypes.data)
        _backward(call, dy, x, out, threads, activation_grad, sums=True)
        dgamma, dbeta = sums.sum(0)
        if mask is not None:
            out[0, 0, ~mask] = 0
        if dsum is not None:
            with np.errstate(all="ignore"):
                np.add(out, dsum, out=out)
        return dgamma, dbeta


def _forward(
    call: Call, x: Array, out: Array, threads: int, epilogue: Epilogue | None, sums: bool
) -> None:
    """y, and what an epilogue adds."""
    call.array(x, "x", "dy", "other", "dresidual")
    call.array(out, "out")
    if epilogue is not None:
        call.activate(epilogue.activation.slope, epilogue.activation.top)
        if epilogue.residual is not None:
            call.array(epilogue.residual, "other")
            call.set(has_residual=True)
    call.run(threads, backward=False, sums=sums, writes=True)


def _backward(
    call: Call,
    dy: Array,
    x: Array,
    out: Array | None,
    threads: int,
    activation_grad: ActivationGrad | None,
    sums: bool,
) -> None:
    """dx, after the gradient through an activation; without one y does not matter."""
    call.array(x, "x")
    call.array(dy, "dy", "other", "out", "dresidual")
    if out is not None:
        call.array(out, "out")
    if activation_grad is not None and activation_grad.activation != LINEAR:
        slope, top, _ = activation_grad.activation
        call.activate(slope, math.nan if top == math.inf else top)
        call.array(activation_grad.y, "other")
    if activation_grad is not None and activation_grad.dresidual is not None and out is not None:
        call.array(activation_grad.dresidual, "dresidual")
        call.set(has_dresidual=True)
    call.run(threads, backward=True, sums=sums, writes=out is not None)


def load() -> Backend:
    """The backend object."""
    team.check_layer()
    return NumbaBackend()
