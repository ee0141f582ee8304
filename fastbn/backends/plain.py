"""Plain calls, for a backend without compiled entries: arguments as most calls have them.

All checks of a verb cost more than some 1 MB of work. Contiguous arrays that fit need few of them:
these entries answer None, having touched nothing, for everything else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
    normal_scale,
    quiet,
)
from fastbn.backends.tuning import scratch
from fastbn.elements import SINGLE, arithmetic, is_bfloat16
from fastbn.layouts import SHORT, reshaped

_DTYPES = (np.dtype(np.float32), np.dtype(np.float64))
_ELEMENTS = (*_DTYPES, np.dtype(np.float16))


def _plain_view(backend: Backend, a: Any, layout: Any) -> Array | None:
    """The (G, N, C, S) view of an array as most calls have it, if its tables fit; or None."""
    if type(a) is not np.ndarray or a.ndim < 2 or a.size == 0:
        return None
    if a.dtype not in _ELEMENTS and not is_bfloat16(a.dtype):
        return None
    flags, shape = a.flags, a.shape
    if type(layout) is not str or not (flags.c_contiguous and flags.aligned):
        return None
    if layout == "NCHW":
        n, c = shape[:2]
        s = a.size // (n * c)
    elif layout == "NHWC":
        n, c, s = a.size // shape[-1], shape[-1], 1
    else:
        return None
    if c > 16 and c * backend.channel_bytes((1, n, c, s)) > scratch(a.nbytes, 1.0):
        return None
    return reshaped(a, (1, 1, 1, n * s) if c == 1 and s < SHORT else (1, n, c, s))


def _plain_vectors(channels: int, *vectors: Any) -> bool:
    """Whether each is one value a channel."""
    for v in vectors:
        if type(v) is not np.ndarray or v.shape != (channels,) or v.dtype not in _DTYPES:
            return False
    return True


def _plain_like(a: Any, x: Array) -> bool:
    """Whether `a` is an array like the plain array x."""
    if type(a) is not np.ndarray or a.dtype != x.dtype or a.shape != x.shape:
        return False
    flags = a.flags
    return bool(flags.c_contiguous and flags.aligned)


def _plain_output(
    out: Array | None, x: Array, *inputs: Any, apart: Sequence[Any] = ()
) -> Array | None:
    """`out` if it is like x, and apart from the inputs or one of them; or a fresh one. None may
    stand for an array that is not given."""
    if out is None:
        return np.empty(x.shape, x.dtype)
    if not _plain_like(out, x) or not out.flags.writeable:
        return None
    for a in (x, *inputs):
        if a is not out and a is not None and np.may_share_memory(out, a):
            return None
    for a in apart:
        if a is not None and np.may_share_memory(out, a):
            return None
    return out


def _plain_eps(eps: Any) -> bool:
    return type(eps) is float and 0.0 <= eps < math.inf


@quiet
def _single(values: Table) -> Array:
    return values.astype(np.float32)


def _given(*vectors: Any) -> list[Any]:
    return [v for v in vectors if v is not None]


def _table(vector: Any, default: float) -> Any:
    """(1, C) of a vector, or what stands for it."""
    return np.full((1, 1), default) if vector is None else vector[None]


def _plain_epilogue(activation: Activation | None, residual: Any, x: Array, view: Array) -> Any:
    """The epilogue of a plain call; False if it is not plain."""
    if activation is None or not (residual is None or _plain_like(residual, x)):
        return False
    return Epilogue(activation, None if residual is None else reshaped(residual, view.shape))


def _plain_activation_grad(
    activation: Any, y: Any, dresidual: Any, dy: Array, view: Array, *apart: Any
) -> Any:
    """The activation gradient of a plain call, and what it writes or None; False if not plain."""
    asked = of(activation)
    if asked is None or (activation is None) != (y is None):
        return False
    if not (y is None or _plain_like(y, dy)):
        return False
    if dresidual is False:
        return ActivationGrad(asked, reshaped(y, view.shape), None), None
    fresh = dresidual is True
    wanted = _plain_output(None if fresh else dresidual, dy, apart=(y, *apart))
    if dresidual is None or wanted is None:
        return False
    own = dy if y is None else y
    return ActivationGrad(asked, reshaped(own, view.shape), reshaped(wanted, view.shape)), wanted


@quiet
def _scale(gamma: Any, var: Array, eps: float, nan: bool) -> Table | None:
    """gamma / sqrt(var + eps) as a table; None if var is no variance."""
    if not (var >= 0.0).all() and not (nan and not (var < 0.0).any()):
        return None
    return normal_scale(_table(gamma, 1.0), var.astype(np.float64)[None], eps)


class PlainCalls(Backend):
    """The plain entries, by the passes and fused walks."""

    def __init__(self) -> None:
        self.plain_moments = self._plain_moments
        self.plain_batch_norm = self._plain_batch_norm
        self.plain_normalize = self._plain_normalize
        self.plain_backward = self._plain_backward

    def plain_frozen(
        self, affine: Affine, layout: str, activation: Activation
    ) -> Callable[..., Array | None]:
        tables = Affine(*(np.ascontiguousarray(vector)[None] for vector in affine))

        def normalize(x: Any, residual: Any, out: Any, threads: int) -> Array | None:
            view, epilogue = _plain_view(self, x, layout), None
            if view is None or view.shape[2] != tables.mean.size:
                return None
            if activation != LINEAR or residual is not None:
                epilogue = _plain_epilogue(activation, residual, x, view)
            y = None if epilogue is False else _plain_output(out, x, residual)
            if y is None:
                return None
            self.normalize(view, tables, reshaped(y, view.shape), threads, epilogue)
            return y

        return normalize

    def _plain_moments(self, x: Any, layout: Any, threads: int) -> tuple[Table, Table] | None:
        view = _plain_view(self, x, layout)
        if view is None:
            return None
        mean, var = self.moments(view, threads)
        return mean[0], var[0]

    def _plain_batch_norm(self, *arguments: Any) -> tuple[Array, Table, Table] | None:
        x, gamma, beta, eps, layout, activation, residual, out, threads = arguments
        view, parameters = _plain_view(self, x, layout), _given(gamma, beta)
        if view is None or not _plain_eps(eps) or not _plain_vectors(view.shape[2], *parameters):
            return None
        epilogue = None
        if activation is not None or residual is not None:
            epilogue = _plain_epilogue(of(activation), residual, x, view)
        y = None if epilogue is False else _plain_output(out, x, residual, *parameters)
        if y is None:
            return None
        tables = ForwardTables(_table(gamma, 1.0), _table(beta, 0.0), eps)
        mean, var = self.forward(view, tables, reshaped(y, view.shape), threads, epilogue)
        return y, mean[0], var[0]

    def _plain_normalize(self, *arguments: Any) -> Array | None:
        x, mean, var, gamma, beta, eps, layout, activation, residual, out, threads = arguments
        view, vectors = _plain_view(self, x, layout), [mean, var, *_given(gamma, beta)]
        if view is None or not _plain_eps(eps) or not _plain_vectors(view.shape[2], *vectors):
            return None
        epilogue = None
        if activation is not None or residual is not None:
            epilogue = _plain_epilogue(of(activation), residual, x, view)
        y = None if epilogue is False else _plain_output(out, x, residual, *vectors)
        scale = None if y is None else _scale(gamma, var, eps, False)
        if y is None or scale is None:
            return None
        affine = Affine(mean[None], scale, _table(beta, 0.0))
        self.normalize(view, affine, reshaped(y, view.shape), threads, epilogue)
        return y

    def _plain_backward(
        self, *arguments: Any
    ) -> tuple[Array, Array | None, Array | None, Array | None] | None:
        dy, x, mean, var, gamma, eps, layout, params, activation = arguments[:9]
        y, dresidual, frozen, out, threads = arguments[9:]
        view, vectors = _plain_view(self, dy, layout), [mean, var, *_given(gamma)]
        if view is None or not _plain_eps(eps) or not _plain_vectors(view.shape[2], *vectors):
            return None
        if type(params) is not bool or not (frozen or mean.dtype == var.dtype == np.float64):
            return None
        lone = frozen and not params
        if not (lone and x is None) and not _plain_like(x, dy):
            return None
        activation_grad = through = None
        if activation is not None or y is not None or dresidual is not False:
            gated = _plain_activation_grad(activation, y, dresidual, dy, view, x, *vectors)
            if gated is False:
                return None
            activation_grad, through = gated
        dx = _plain_output(out, dy, x, *vectors, apart=(y, through))
        scale = None if dx is None else _scale(gamma, var, eps, not frozen)
        if dx is None or scale is None:
            return None
        target = reshaped(dx, view.shape)
        if lone:
            coefficients = GradientCoefficients(scale, *[np.zeros((1, 1))] * 4)
            self.input_gradient(view, None, coefficients, target, threads, activation_grad)
            return dx, None, None, through
        tables = BackwardTables(mean[None], var[None], _table(gamma, 1.0), eps, frozen)
        of_x = reshaped(x, view.shape)
        sums = self.backward(view, of_x, tables, target, threads, activation_grad)
        if not params:
            return dx, None, None, through
        single = (arithmetic(dy.dtype) if gamma is None else gamma.dtype) == SINGLE
        dgamma, dbeta = (_single(s[0]) if single else s[0] for s in sums)
        return dx, dgamma, dbeta, through
