"""What fastbn takes in float32 for a cell of a half type."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.cells import Cell
from benchmarks.data import Data, Results
from benchmarks.libraries import Task, of_fastbn
from benchmarks.libraries.of_fastbn import version as version


def prepare(cell: Cell, data: Data) -> Task | None:
    if not cell.is_half:
        return None
    single = replace(cell, dtype="float32")
    task = of_fastbn.prepare(single, Data(single))
    read = task.read

    def narrowed(result: Any) -> Results:
        assert read is not None
        results = read(result)
        return results._replace(main=results.main.astype(data.dtype))

    return Task(task.call, narrowed)
