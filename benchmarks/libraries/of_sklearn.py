"""scikit-learn's StandardScaler."""

from __future__ import annotations

import sklearn
from sklearn.preprocessing import StandardScaler

from benchmarks.cells import Cell
from benchmarks.data import Data
from benchmarks.libraries import Task
from benchmarks.libraries.of_fastbn import table


def version() -> str:
    return str(sklearn.__version__)


def prepare(cell: Cell, data: Data) -> Task | None:
    return table(cell, data, StandardScaler) if cell.is_table else None
