"""fastbn by its public functions; the environment says which backend and instruction set."""

from __future__ import annotations

from typing import Any

import fastbn
from benchmarks.cells import Cell
from benchmarks.data import Data, Results
from benchmarks.libraries import Task


def version() -> str:
    facts = fastbn.get_config()
    isa = f" ({facts['isa']})" if facts["backend"] == "cython" else ""
    return f"{facts['version']}, {facts['backend']}{isa}"


def prepare(cell: Cell, data: Data) -> Task:
    gamma, beta = data.gamma, data.beta
    layout = "NHWC" if cell.layout == "NHWC" else "NCHW"
    options: dict[str, Any] = {"eps": data.eps, "layout": layout}
    if cell.output == "ready":
        options["out"] = data.out
    if cell.work == "forward":
        x = data.x
        return Task(lambda: fastbn.batch_norm(x, gamma, beta, **options), lambda r: Results(r.y))
    if cell.work == "inference":
        x, mean, var = data.x, data.mean, data.var
        return Task(lambda: fastbn.normalize(x, mean, var, gamma, beta, **options), Results)
    dy = data.dy
    if cell.work == "backward":
        x, (mean, var) = data.x, data.batch_statistics
        return Task(
            lambda: fastbn.batch_norm_backward(dy, x, mean, var, gamma, **options),
            lambda r: Results(*r),
        )
    mean, var = data.mean, data.var
    return Task(
        lambda: fastbn.normalize_backward(dy, None, mean, var, gamma, params=False, **options),
        lambda r: Results(r.dx),
    )
