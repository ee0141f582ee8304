"""JAX: the formulas under jit. It has no ready outputs."""

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


def prepare(cell: Cell, data: Data) -> Task:
    gamma, beta = data.column(data.gamma), data.column(data.beta)
    over = tuple(axis for axis in range(len(data.shape)) if axis != data.axis)
    if cell.work == "forward":
        return task(partial(forward, over=over, eps=data.eps), data.x, gamma, beta)
    if cell.work == "backward":
        mean, var = (data.column(v.astype(data.dtype)) for v in data.batch_statistics)
        function = partial(backward, over=over, eps=data.eps)
        return task(function, data.dy, data.x, mean, var, gamma)
    mean, var = data.column(data.mean), data.column(data.var)
    if cell.work == "inference":
        return task(partial(inference, eps=data.eps), data.x, mean, var, gamma, beta)
    return task(partial(frozen, eps=data.eps), data.dy, var, gamma)


def task(function: Callable[..., tuple[Any, ...]], *operands: Any) -> Task:
    """A compiled call on arrays that are JAX's already, and an end to wait for."""
    compiled, arrays = jax.jit(function), [jax.device_put(a) for a in operands]

    def read(results: Any) -> Results:
        main, *sums = (np.asarray(r) for r in results)
        return Results(main, *(s.ravel() for s in sums[:2]))

    return Task(lambda: jax.block_until_ready(compiled(*arrays)), read)


def inference(x: Any, mean: Any, var: Any, gamma: Any, beta: Any, *, eps: float) -> tuple[Any, ...]:
    return ((x - mean) * (gamma * jax.lax.rsqrt(var + eps)) + beta,)


def frozen(dy: Any, var: Any, gamma: Any, *, eps: float) -> tuple[Any, ...]:
    return (dy * (gamma * jax.lax.rsqrt(var + eps)),)


def forward(x: Any, gamma: Any, beta: Any, *, over: tuple[int, ...], eps: float) -> tuple[Any, ...]:
    mean, var = jnp.mean(x, over, keepdims=True), jnp.var(x, over, keepdims=True)
    return (*inference(x, mean, var, gamma, beta, eps=eps), mean, var)


def backward(
    dy: Any, x: Any, mean: Any, var: Any, gamma: Any, *, over: tuple[int, ...], eps: float
) -> tuple[Any, ...]:
    rstd = jax.lax.rsqrt(var + eps)
    xhat = (x - mean) * rstd
    dgamma, dbeta = jnp.sum(dy * xhat, over, keepdims=True), jnp.sum(dy, over, keepdims=True)
    n = x.size // gamma.size
    return gamma * rstd * (dy - dbeta / n - xhat * (dgamma / n)), dgamma, dbeta
