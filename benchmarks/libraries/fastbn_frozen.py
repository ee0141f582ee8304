"""Inference by a FrozenBatchNorm, where arrays are so small that what a call costs counts."""

from __future__ import annotations

import fastbn
from benchmarks.cells import MB, Cell
from benchmarks.data import Data, Results
from benchmarks.libraries import Task, of_fastbn
from benchmarks.libraries.of_fastbn import version as version


def prepare(cell: Cell, data: Data) -> Task | None:
    if cell.work != "inference" or cell.bytes > MB or cell.is_reordered:
        return None
    x, options = data.x, of_fastbn.options(cell, data)
    out = options.pop("out", None)
    frozen = fastbn.FrozenBatchNorm(data.mean, data.var, data.gamma, data.beta, **options)
    return Task(lambda: frozen(x, out=out), Results)
