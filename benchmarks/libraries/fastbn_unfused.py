"""The fused works by fastbn's plain functions and NumPy, one call after the other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

import fastbn
from benchmarks.cells import Cell
from benchmarks.data import Data, Results
from benchmarks.libraries import Task, of_fastbn
from benchmarks.libraries.of_fastbn import version as version


def prepare(cell: Cell, data: Data) -> Task | None:
    if not cell.is_fused or cell.is_step:
        return None
    if cell.plain_work == "backward":
        return backward(cell, data)
    plain = of_fastbn.prepare(replace(cell, work=cell.plain_work), data)
    out, residual = data.out, data.residual

    def call() -> Any:
        result = plain.call()
        np.add(out, residual, out=out)
        np.maximum(out, 0, out=out)
        return result

    return Task(call, plain.read)


def backward(cell: Cell, data: Data) -> Task:
    dy, x, y, gamma, (mean, var) = data.dy, data.x, data.y, data.gamma, data.batch_statistics
    gated, passed = data.dresidual, np.empty(data.shape, bool)
    options = of_fastbn.options(cell, data)

    def call() -> Any:
        np.multiply(dy, np.greater(y, 0, out=passed), out=gated)
        return fastbn.batch_norm_backward(gated, x, mean, var, gamma, **options)

    return Task(call, lambda r: Results(r.dx, r.dgamma, r.dbeta, gated))
