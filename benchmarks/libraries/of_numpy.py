"""Plain NumPy expressions, as one writes them; a ready output takes the last step's result.

No fused works, which are those of `fastbn_unfused`, none with masks, and no halves, which NumPy
computes one by one.
"""

from __future__ import annotations

import numpy as np

from benchmarks.cells import Cell
from benchmarks.data import Array, Data, Results
from benchmarks.libraries import Task


def version() -> str:
    return np.__version__


def prepare(cell: Cell, data: Data) -> Task | None:
    if cell.is_fused or cell.is_half or cell.is_masked:
        return None
    if cell.is_grouped:
        return grouped(cell, data)
    if cell.is_images or cell.is_table:
        return images(data) if cell.is_images else table(cell, data)
    if cell.is_of_rows:
        is_forward = cell.plain_work == "forward"
        return rows_forward(cell, data) if is_forward else rows_backward(cell, data)
    gamma, beta = data.column(data.gamma), data.column(data.beta)
    out = None if cell.output == "fresh" else data.output(cell)
    over, eps = tuple(axis for axis in range(len(data.shape)) if axis != data.axis), data.eps
    if cell.work == "forward":
        x = data.x
        return Task(lambda: forward(x, gamma, beta, over, eps, out), Results)
    if cell.work == "step":
        out_of_step = (data.out, data.dx) if cell.output == "ready" else (None, None)
        return step(data, gamma, beta, over, out_of_step)
    if cell.work == "backward":
        dy, x = data.dy, data.x
        mean, var = (data.column(v.astype(data.dtype)) for v in data.batch_statistics)
        return Task(
            lambda: backward(dy, x, mean, var, gamma, over, eps, out),
            lambda r: Results(r[0], r[1].ravel(), r[2].ravel()),
        )
    mean, var = data.column(data.mean), data.column(data.var)
    if cell.work == "inference":
        x = data.x
        return Task(lambda: inference(x, mean, var, gamma, beta, eps, out), Results)
    if cell.curve:
        x, curve = data.x, silu if cell.curve == "silu" else hard_swish
        return Task(lambda: curve(inference(x, mean, var, gamma, beta, eps, out), out), Results)
    dy = data.dy
    return Task(lambda: np.multiply(dy, gamma / np.sqrt(var + eps), out=out), Results)


def images(data: Data) -> Task:
    x, mean, std = data.x, data.mean, np.sqrt(data.var)

    def call() -> Array:
        y = (x.astype(np.float32) / 255 - mean) / std
        return np.ascontiguousarray(y.transpose(0, 3, 1, 2))

    return Task(call, Results)


def table(cell: Cell, data: Data) -> Task:
    x = data.x
    statistics = x.mean(0), x.std(0)
    if cell.work == "table-transform":
        return Task(lambda: (x - statistics[0]) / statistics[1], Results)
    if cell.work == "table-fit":
        return Task(lambda: (x.mean(0), x.std(0)), lambda s: Results((x - s[0]) / s[1]))
    return Task(lambda: (x - x.mean(0)) / x.std(0), Results)


def step(
    data: Data, gamma: Array, beta: Array, over: tuple[int, ...], out: tuple[Array | None, ...]
) -> Task:
    """A forward, and the backward by its statistics."""
    x, dy, eps = data.x, data.dy, data.eps

    def call() -> tuple[Array, ...]:
        mean, var = x.mean(over, keepdims=True), x.var(over, keepdims=True)
        y = inference(x, mean, var, gamma, beta, eps, out[0])
        return y, *backward(dy, x, mean, var, gamma, over, eps, out[1])

    return Task(call, lambda r: Results(r[1], r[2].ravel(), r[3].ravel(), y=r[0]))


def grouped(cell: Cell, data: Data) -> Task:
    """Virtual batches and group norms, on views with axes of runs, groups and their channels."""
    runs, split = cell.shape[0] // cell.run, (cell.groups, cell.channels // cell.groups)
    shape: tuple[int, ...] = (runs, -1, *split)
    places: tuple[int, ...] = ()
    if cell.layout == "NCHW":
        shape, places = (runs, cell.run, *split, -1), (4,)
    over, of_channels, ones = (1, 3, *places), (0, 1, *places), (1,) * len(places)
    gamma, beta = (v.reshape(*split, *ones) for v in (data.gamma, data.beta))
    x, eps = data.x.reshape(shape), data.eps
    out = data.out.reshape(shape) if cell.output == "ready" else None
    if cell.plain_work == "forward":
        return Task(
            lambda: forward(x, gamma, beta, over, eps, out),
            lambda y: Results(y.reshape(data.shape)),
        )
    dy = data.dy.reshape(shape)
    mean, var = (
        v.astype(data.dtype).reshape(runs, 1, cell.groups, 1, *ones) for v in data.statistics(cell)
    )
    return Task(
        lambda: grouped_backward(dy, x, mean, var, gamma, over, of_channels, eps, out),
        lambda r: Results(r[0].reshape(data.shape), r[1].ravel(), r[2].ravel()),
    )


def rows_forward(cell: Cell, data: Data) -> Task:
    """Layer and RMS norm along the last axis, of x or of x + skip."""
    x, gamma, beta, eps, out = data.x, data.gamma, data.beta, data.eps, data.out

    def norm(x: Array) -> Array:
        if cell.is_centred:
            return forward(x, gamma, beta, (-1,), eps, out)
        y: Array = np.multiply(gamma, x / root_mean_square(x, eps), out=out)
        return y

    if not cell.has_skip:
        return Task(lambda: norm(x), Results)
    skip, total = data.residual, data.sum
    return Task(lambda: norm(np.add(x, skip, out=total)), lambda y: Results(y, sum=total))


def rows_backward(cell: Cell, data: Data) -> Task:
    """Their gradients, and what else reaches x + skip."""
    dy, x, gamma, eps, out = data.dy, data.x, data.gamma, data.eps, data.out
    dsum, of_columns = data.residual, tuple(range(x.ndim - 1))
    mean, var = (v.astype(data.dtype)[..., None] for v in data.statistics(cell))

    def gradients() -> tuple[Array, ...]:
        if cell.is_centred:
            return grouped_backward(dy, x, mean, var, gamma, (-1,), of_columns, eps, out)
        rstd = 1 / np.sqrt(var + eps)
        xhat = x * rstd
        g = gamma * dy
        dx = np.multiply(rstd, g - xhat * (g * xhat).mean(-1, keepdims=True), out=out)
        return dx, (dy * xhat).sum(of_columns)

    def call() -> tuple[Array, ...]:
        dx, *sums = gradients()
        return (np.add(dx, dsum, out=out) if cell.has_skip else dx, *sums)

    return Task(call, lambda r: Results(*r))


def root_mean_square(x: Array, eps: float) -> Array:
    """Of rows along the last axis."""
    root: Array = np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    return root


def silu(v: Array, out: Array | None) -> Array:
    y: Array = np.divide(v, 1 + np.exp(-v), out=out)
    return y


def hard_swish(v: Array, out: Array | None) -> Array:
    y: Array = np.multiply(v, np.clip(v + 3, 0, 6) / 6, out=out)
    return y


def inference(
    x: Array, mean: Array, var: Array, gamma: Array, beta: Array, eps: float, out: Array | None
) -> Array:
    y: Array = np.add(gamma * (x - mean) / np.sqrt(var + eps), beta, out=out)
    return y


def forward(
    x: Array, gamma: Array, beta: Array, over: tuple[int, ...], eps: float, out: Array | None
) -> Array:
    mean, var = x.mean(over, keepdims=True), x.var(over, keepdims=True)
    return inference(x, mean, var, gamma, beta, eps, out)


def backward(
    dy: Array,
    x: Array,
    mean: Array,
    var: Array,
    gamma: Array,
    over: tuple[int, ...],
    eps: float,
    out: Array | None,
) -> tuple[Array, Array, Array]:
    rstd = 1 / np.sqrt(var + eps)
    xhat = (x - mean) * rstd
    dgamma, dbeta = (dy * xhat).sum(over, keepdims=True), dy.sum(over, keepdims=True)
    n = x.size // gamma.size
    dx = np.multiply(gamma * rstd, dy - dbeta / n - xhat * (dgamma / n), out=out)
    return dx, dgamma, dbeta


def grouped_backward(
    dy: Array,
    x: Array,
    mean: Array,
    var: Array,
    gamma: Array,
    over: tuple[int, ...],
    of_channels: tuple[int, ...],
    eps: float,
    out: Array | None,
) -> tuple[Array, Array, Array]:
    rstd = 1 / np.sqrt(var + eps)
    xhat = (x - mean) * rstd
    dgamma, dbeta = (dy * xhat).sum(of_channels), dy.sum(of_channels)
    g = gamma * dy
    means = g.mean(over, keepdims=True), (g * xhat).mean(over, keepdims=True)
    dx = np.multiply(rstd, g - means[0] - xhat * means[1], out=out)
    return dx, dgamma, dbeta
