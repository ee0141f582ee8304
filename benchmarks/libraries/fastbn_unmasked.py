"""What fastbn takes for a masked work's cell where everything counts, and alike."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.cells import Cell
from benchmarks.data import Data
from benchmarks.libraries import Task, of_fastbn
from benchmarks.libraries.of_fastbn import version as version


def prepare(cell: Cell, data: Data) -> Task | None:
    if not cell.is_masked:
        return None
    plain = of_fastbn.prepare(replace(cell, work=cell.plain_work), data)
    return Task(plain.call, None)  # right in the plain work's own cell, and not what is asked here
