"""Hard data for a library's task, and how far its results are from the exact ones.

The figures are in units of the promised bound (`oracle.bounds`): up to 1 is as promised.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from benchmarks.cells import Cell, Shape
from benchmarks.data import Array, Data, Results
from oracle import bounds, formulas
from oracle.arrays import Wide, rows, to_layout, wide
from oracle.bounds import units
from oracle.hard import Problem, hard_data


class Exact(NamedTuple):
    """One case in one element type; layouts and works share it."""

    problem: Problem
    statistics: tuple[Array, Array]
    """Mean and variance rounded to float64: what a backward is given."""
    results: dict[str, tuple[Wide, Wide]]
    """What is right and how wrong it may be: y and dx as rows, dgamma and dbeta."""


@lru_cache(maxsize=1)
def exact(case: str, dtype: str, shape: Shape) -> Exact:
    """The case solved in extended precision; kept, as the next cells ask for the same."""
    problem = hard_data(dtype)[case].problem(shape, dtype)
    eps, x, dy = problem.eps, wide(problem.x, "NCHW"), wide(problem.dy, "NCHW")
    gamma, beta = (v.astype(np.longdouble) for v in (problem.gamma, problem.beta))
    with np.errstate(all="ignore"):
        mean, var = formulas.moments(x)
        y = formulas.normalize(x, mean, var, gamma, beta, eps)
        bound_y = bounds.bound_y(dtype, y, mean, var, gamma, beta, eps)
        statistics = mean.astype(np.float64), var.astype(np.float64)
        mean, var = (v.astype(np.longdouble) for v in statistics)
        wanted = formulas.backward(dy, x, mean, var, gamma, eps, frozen=False)
        bound_dx = bounds.bound_dx(dtype, wanted, dy, mean, var, gamma, eps, frozen=False)
        bound_dgamma = bounds.bound_dgamma(dtype, wanted, mean, var, eps)
        bound_dbeta = bounds.bound_dbeta(dtype, wanted, mean, var, eps)
    results = {
        "y": (y, bound_y),
        "dx": (wanted.dx, bound_dx),
        "dgamma": (wanted.dgamma, bound_dgamma),
        "dbeta": (wanted.dbeta, bound_dbeta),
    }
    return Exact(problem, statistics, results)


class HardData(Data):
    """A hard case in a cell's shape, layout and element type."""

    def __init__(self, cell: Cell, case: str) -> None:
        super().__init__(cell)
        self.exact = exact(case, cell.dtype, cell.shape)
        problem = self.exact.problem
        self.x, self.dy = (to_layout(a, cell.layout) for a in (problem.x, problem.dy))
        self.gamma, self.beta, self.eps = problem.gamma, problem.beta, problem.eps
        self.batch_statistics = self.exact.statistics


def worst(cell: Cell, data: HardData, results: Results) -> dict[str, float]:
    """The largest error of each result, in units of its bound.

    Channels whose statistics are not finite are left out: nothing is promised of them, but that
    the others do not suffer.
    """
    counted = np.isfinite(data.batch_statistics[1])
    main = rows(results.main, cell.layout)
    if cell.work == "forward":
        named = {"y": main}
    else:
        assert results.dgamma is not None
        assert results.dbeta is not None
        named = {"dx": main, "dgamma": results.dgamma, "dbeta": results.dbeta}
    figures = {}
    for name, got in named.items():
        wanted, bound = data.exact.results[name]
        figures[name] = float(units(got[counted], wanted[counted], bound[counted]).max())
    return figures
