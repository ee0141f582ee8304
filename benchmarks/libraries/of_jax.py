"""JAX: the formulas under jit, which fuses them. It has no ready outputs. No halves."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.cells import Cell
from benchmarks.data import Data, Results
from benchmarks.libraries import Task


def version() -> str:
    return str(jax.__version__)


def prepare(cell: Cell, data: Data) -> Task | None:
    if cell.is_half:
        return None
    gamma, beta = data.column(data.gamma), data.column(data.beta)
    over = tuple(axis for axis in range(len(data.shape)) if axis != data.axis)
    residual = (data.residual,) if cell.is_fused else ()
    if cell.plain_work == "forward":
        return task(partial(forward, over=over, eps=data.eps), data.x, gamma, beta, *residual)
    if cell.plain_work == "backward":
        mean, var = (data.column(v.astype(data.dtype)) for v in data.batch_statistics)
        function = partial(backward, over=over, eps=data.eps)
        y = (data.y,) if cell.is_fused else ()
        return task(function, data.dy, data.x, mean, var, gamma, *y)
    mean, var = data.column(data.mean), data.column(data.var)
    if cell.plain_work == "inference":
        function = partial(inference, eps=data.eps)
        return task(function, data.x, mean, var, gamma, beta, *residual)
    return task(partial(normalize_backward, eps=data.eps), data.dy, var, gamma)


def task(function: Callable[..., tuple[Any, ...]], *operands: Any) -> Task:
    """A compiled call on arrays that are JAX's already, and an end to wait for."""
    compiled, arrays = jax.jit(function), [jax.device_put(a) for a in operands]

    def read(results: Any) -> Results:
        main, *sums = (np.asarray(r) for r in results)
        return Results(main, *(s.ravel() for s in sums[:2]), *sums[2:])

    return Task(lambda: jax.block_until_ready(compiled(*arrays)), read)


def inference(
    x: Any, mean: Any, var: Any, gamma: Any, beta: Any, residual: Any = None, *, eps: float
) -> tuple[Any, ...]:
    y = (x - mean) * (gamma * jax.lax.rsqrt(var + eps)) + beta
    return (y if residual is None else jnp.maximum(y + residual, 0),)


def normalize_backward(dy: Any, var: Any, gamma: Any, *, eps: float) -> tuple[Any, ...]:
    return (dy * (gamma * jax.lax.rsqrt(var + eps)),)


def forward(
    x: Any, gamma: Any, beta: Any, residual: Any = None, *, over: tuple[int, ...], eps: float
) -> tuple[Any, ...]:
    mean, var = jnp.mean(x, over, keepdims=True), jnp.var(x, over, keepdims=True)
    return (*inference(x, mean, var, gamma, beta, residual, eps=eps), mean, var)


def backward(
    dy: Any,
    x: Any,
    mean: Any,
    var: Any,
    gamma: Any,
    y: Any = None,
    *,
    over: tuple[int, ...],
    eps: float,
) -> tuple[Any, ...]:
    if y is not None:
        dy = jnp.where(y > 0, dy, 0)
    rstd = jax.lax.rsqrt(var + eps)
    xhat = (x - mean) * rstd
    dgamma, dbeta = jnp.sum(dy * xhat, over, keepdims=True), jnp.sum(dy, over, keepdims=True)
    n = x.size // gamma.size
    dx = gamma * rstd * (dy - dbeta / n - xhat * (dgamma / n))
    return (dx, dgamma, dbeta) if y is None else (dx, dgamma, dbeta, dy)
