"""A limit: a copy with ordinary stores."""

from __future__ import annotations

from benchmarks.cells import Cell
from benchmarks.data import Data
from benchmarks.libraries import Task, copies
from benchmarks.libraries.copies import version as version


def prepare(cell: Cell, data: Data) -> Task:
    return copies.prepare(cell, data, streaming=False)
