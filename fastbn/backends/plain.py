"""Plain calls of a backend that has no compiled entries of its own: recognised by those of Cython.

All checks of a verb cost more than some 1 MB of work. Where the compiled entries are built, on
whatever their kernels run, they tell in a few hundred nanoseconds whether arguments are as most
are, and where results go; the backend does the work. Where they are not built, no call is plain.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fastbn.activations import LINEAR, Activation, of
from fastbn.backends.base import (
    ActivationGrad,
    Affine,
    Array,
    Backend,
    BackwardTables,
    Epilogue,
    ForwardTables,
    GradientCoefficients,
    Table,
    filled,
    normal_scale,
    quiet,
)
from fastbn.backends.tuning import scratch
from fastbn.elements import SINGLE, arithmetic
from fastbn.layouts import reshaped

try:
    from fastbn._ext import entry
except ImportError:
    entry = None  # type: ignore[assignment]

Shape = tuple[int, int, int, int]


class PlainCalls(Backend):
    """The plain entries, by the passes and fused walks."""

    def __init__(self) -> None:
        if entry is not None:
            self.plain_moments = self._plain_moments
            self.plain_batch_norm = self._plain_batch_norm
            self.plain_normalize = self._plain_normalize
            self.plain_backward = self._plain_backward

    def copy(self, a: Array, out: Array, threads: int) -> None:
        if entry is None:
            super().copy(a, out, threads)
        else:
            entry.copy(a, out, threads)

    def _fits(self, shape: Shape, x: Array) -> bool:
        """Whether tables of all channels are small beside the array."""
        channels = shape[2]
        return channels <= 16 or channels * self.channel_bytes(shape) <= scratch(x.nbytes, 1.0)

    def plain_frozen(
        self, affine: Affine, layout: str, activation: Activation, dtype: Any, out_layout: Any
    ) -> Callable[..., Array | None]:
        tables = Affine(*(np.ascontiguousarray(vector)[None] for vector in affine))

        def normalize(x: Any, residual: Any, out: Any, threads: int) -> Array | None:
            if entry is None or dtype is not None or out_layout is not None or activation.curve:
                return None
            found = entry.plain_forward(x, None, None, 0.0, layout, None, residual, out)
            if found is None or found[0][2] != tables.mean.size or not self._fits(found[0], x):
                return None
            shape, y = found
            view, target = reshaped(x, shape), reshaped(y, shape)
            self.normalize(view, tables, target, threads, _epilogue(activation, residual, shape))
            return np.asarray(y)

        return normalize

    def _plain_moments(self, x: Any, layout: Any, threads: int) -> tuple[Table, Table] | None:
        shape = entry.plain_shape(x, layout)
        if shape is None or not self._fits(shape, x):
            return None
        mean, var = self.moments(reshaped(x, shape), threads)
        return mean[0], var[0]

    def _plain_batch_norm(self, *arguments: Any) -> tuple[Array, Table, Table] | None:
        *given, threads = arguments
        found = entry.plain_forward(*given)
        if found is None or not self._fits(found[0], given[0]):
            return None
        x, gamma, beta, eps, _, activation, residual, _ = given
        shape, y = found
        tables = ForwardTables(_row(gamma), _row(beta), eps)
        epilogue = _epilogue(of(activation), residual, shape)
        target = reshaped(y, shape)
        mean, var = self.forward(reshaped(x, shape), tables, target, threads, epilogue)
        return y, mean[0], var[0]

    def _plain_normalize(self, *arguments: Any) -> Array | None:
        *given, threads = arguments
        found = entry.plain_normalize(*given)
        if found is None or not self._fits(found[0], given[0]):
            return None
        x, mean, var, gamma, beta, eps, _, activation, residual, *_ = given
        shape, y = found
        affine = Affine(mean[None], _scale(gamma, var, eps), filled(_row(beta), 0.0))
        epilogue = _epilogue(of(activation), residual, shape)
        self.normalize(reshaped(x, shape), affine, reshaped(y, shape), threads, epilogue)
        return np.asarray(y)

    def _plain_backward(
        self, *arguments: Any
    ) -> tuple[Array, Array | None, Array | None, Array | None] | None:
        *given, threads = arguments
        found = entry.plain_backward(*given)
        if found is None or not self._fits(found[0], given[0]):
            return None
        dy, x, mean, var, gamma, eps, _, params, activation, y, _, frozen, _ = given
        shape, dx, dresidual = found
        view, target = reshaped(dy, shape), reshaped(dx, shape)
        grad = None
        if activation is not None or dresidual is not None:
            own, wanted = dy if activation is None else y, None
            if dresidual is not None:
                wanted = reshaped(dresidual, shape)
            grad = ActivationGrad(of(activation) or LINEAR, reshaped(own, shape), wanted)
        if frozen and not params:
            scale = _scale(gamma, var, eps)
            coefficients = GradientCoefficients(scale, *[np.zeros((1, 1))] * 4)
            self.input_gradient(view, None, coefficients, target, threads, grad)
            return dx, None, None, dresidual
        tables = BackwardTables(mean[None], var[None], _row(gamma), eps, frozen)
        sums = self.backward(view, reshaped(x, shape), tables, target, threads, grad)
        if not params:
            return dx, None, None, dresidual
        single = (arithmetic(dy.dtype) if gamma is None else gamma.dtype) == SINGLE
        dgamma, dbeta = (_single(s[0]) if single else s[0] for s in sums)
        return dx, dgamma, dbeta, dresidual


def _row(vector: Any) -> Any:
    """(1, C) of a vector, None of None."""
    return None if vector is None else vector[None]


def _epilogue(activation: Activation | None, residual: Any, shape: Shape) -> Epilogue | None:
    """An epilogue on views; None for nothing."""
    if residual is None and activation == LINEAR:
        return None
    added = None if residual is None else reshaped(residual, shape)
    return Epilogue(activation or LINEAR, added)


@quiet
def _scale(gamma: Any, var: Array, eps: float) -> Table:
    """gamma / sqrt(var + eps) as a table."""
    return normal_scale(filled(_row(gamma), 1.0), filled(_row(var), 1.0), eps)


@quiet
def _single(values: Table) -> Array:
    return values.astype(np.float32)
