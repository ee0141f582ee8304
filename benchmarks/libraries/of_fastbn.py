"""fastbn by its public functions; the environment says which backend and instruction set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import fastbn
from benchmarks.cells import Cell
from benchmarks.data import Data, Results
from benchmarks.libraries import Task


def version() -> str:
    facts = fastbn.get_config()
    isa = f" ({facts['isa']})" if facts["backend"] == "cython" else ""
    return f"{facts['version']}, {facts['backend']}{isa}"


def prepare(cell: Cell, data: Data) -> Task:
    if cell.is_grouped:
        return grouped(cell, data)
    if cell.is_of_rows:
        return rows(cell, data)
    if cell.is_step:
        return step(cell, data)
    if cell.is_images:
        return images(cell, data)
    if cell.is_table:
        from fastbn.sklearn import StandardScaler

        return table(cell, data, StandardScaler)
    gamma, beta = data.gamma, data.beta
    named = options(cell, data)
    if cell.is_fused:
        named |= fused(cell, data)
    if cell.is_masked:
        named |= selected(cell, data)
    if cell.curve:
        named["activation"] = cell.curve
    if cell.plain_work == "forward":
        x = data.x
        return Task(lambda: fastbn.batch_norm(x, gamma, beta, **named), lambda r: Results(r.y))
    if cell.plain_work == "inference":
        x, mean, var = data.x, data.mean, data.var
        return Task(lambda: fastbn.normalize(x, mean, var, gamma, beta, **named), Results)
    dy = data.dy
    if cell.plain_work == "backward":
        x, (mean, var) = data.x, data.statistics(cell)
        return Task(
            lambda: fastbn.batch_norm_backward(dy, x, mean, var, gamma, **named),
            lambda r: Results(*r),
        )
    mean, var = data.mean, data.var
    return Task(
        lambda: fastbn.normalize_backward(dy, None, mean, var, gamma, params=False, **named),
        lambda r: Results(r.dx),
    )


def grouped(cell: Cell, data: Data) -> Task:
    """Virtual batches, and group, instance and layer norm."""
    kind, named = cell.work.partition("-")[0], options(cell, data)
    own: tuple[int, ...] = (cell.groups,) if kind == "group" else ()
    verb = "batch_norm"
    if kind == "ghost":
        named["virtual_batch"] = cell.run
    else:
        verb = f"{kind}_norm"
    forward, backward = getattr(fastbn, verb), getattr(fastbn, f"{verb}_backward")
    x, gamma, beta = data.x, data.gamma, data.beta
    if cell.plain_work == "forward":
        return Task(lambda: forward(x, *own, gamma, beta, **named), lambda r: Results(r.y))
    dy, (mean, var) = data.dy, data.statistics(cell)
    if kind == "layer":
        mean, var = mean[:, 0], var[:, 0]
    given = dy, x, mean, var, *own, gamma
    return Task(lambda: backward(*given, **named), lambda r: Results(*r))


def rows(cell: Cell, data: Data) -> Task:
    """Layer and RMS norm along the last axis."""
    verb, named = "rms_norm", options(cell, data)
    if cell.is_centred:
        verb, named["axes"] = "layer_norm", "last"
    else:
        del named["layout"]
    forward, backward = getattr(fastbn, verb), getattr(fastbn, f"{verb}_backward")
    x, dy, gamma, (mean, var) = data.x, data.dy, data.gamma, data.statistics(cell)
    if cell.plain_work == "forward":
        named |= {"skip": data.residual} if cell.has_skip else {}
        vectors = (gamma, data.beta) if cell.is_centred else (gamma,)
        return Task(
            lambda: forward(x, *vectors, **named),
            lambda r: Results(r.y, sum=r.sum if cell.has_skip else None),
        )
    named |= {"dsum": data.residual} if cell.has_skip else {}
    statistics = (mean, var) if cell.is_centred else (var,)
    return Task(lambda: backward(dy, x, *statistics, gamma, **named), lambda r: Results(*r))


def step(cell: Cell, data: Data) -> Task:
    """A forward, and the backward by its results."""
    forward, backward = options(cell, data), options(cell, data)
    is_ready = cell.output == "ready"
    if is_ready:
        backward["out"] = data.dx
    if cell.is_fused:
        forward |= {"activation": "relu", "residual": data.residual}
        backward |= {"activation": "relu", "dresidual": data.dresidual if is_ready else True}
    x, dy, gamma, beta = data.x, data.dy, data.gamma, data.beta

    def call() -> Any:
        y, mean, var = fastbn.batch_norm(x, gamma, beta, **forward)
        return y, fastbn.batch_norm_backward(dy, x, mean, var, gamma, y=y, **backward)

    return Task(call, lambda r: Results(*r[1])._replace(y=r[0]))


def images(cell: Cell, data: Data) -> Task:
    """The first layer of a server."""
    layouts: dict[str, Any] = {"layout": "NHWC", "out_layout": "NCHW"}
    std = np.sqrt(data.var)
    one, x = fastbn.Standardizer(data.mean, std, divisor=255, **layouts), data.x
    out = None if cell.output == "fresh" else data.out
    return Task(lambda: one(x, out=out), Results)


def table(cell: Cell, data: Data, scaler_of: Callable[[], Any]) -> Task:
    """By a scaler as scikit-learn has it."""
    x, fitted = data.x, scaler_of().fit(data.x)
    if cell.work == "table-fit":
        return Task(lambda: scaler_of().fit(x), lambda scaler: Results(scaler.transform(x)))
    if cell.work == "table-transform":
        return Task(lambda: fitted.transform(x), Results)
    return Task(lambda: scaler_of().fit_transform(x), Results)


def options(cell: Cell, data: Data) -> dict[str, Any]:
    """What every function is told by name."""
    layout = "NHWC" if cell.layout == "NHWC" else "NCHW"
    ready = {} if cell.output == "fresh" else {"out": data.output(cell)}
    return {"eps": data.eps, "layout": layout} | ready


def fused(cell: Cell, data: Data) -> dict[str, Any]:
    """What makes a work a fused one."""
    if cell.plain_work == "backward":
        return {"activation": "relu", "y": data.y, "dresidual": data.dresidual}
    return {"activation": "relu", "residual": data.residual}


def selected(cell: Cell, data: Data) -> dict[str, Any]:
    """What makes a work a masked one."""
    weighed = {"weights": data.weights} if cell.is_weighed else {}
    return {"where": data.where} | weighed
