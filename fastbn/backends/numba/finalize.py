"""From sums to results and coefficients, a channel at a time.

Moments are taken about a shift, at first the channel's first value: a constant channel gives a
variance of exactly 0, and a large mean costs no digits. Where the shift lay far from the mean (an
outlier came first), or squares overflow, the channel is summed again about the mean just found, at
a unit in which they do not (Chan, Golub & LeVeque 1983).
"""

from __future__ import annotations

import math
from typing import Any

from fastbn.backends.base import Table
from fastbn.backends.numba import jobs
from fastbn.backends.numba.compiling import inline
from fastbn.backends.numba.halves import wide
from fastbn.backends.numba.instructions import array, doubles, part


@inline
def _channels(job: Any, unit: Any) -> tuple[int, int]:
    """The channels of a block of columns; a folded row is one block."""
    if job.fold > 1:
        return 0, job.channels
    return unit.c0 // job.spread, unit.c1 // job.spread


@inline
def _spread_out(job: Any, unit: Any, table: Table) -> None:
    """Give all columns of a block's channels what the first one has."""
    first, last = _channels(job, unit)
    for row in range(jobs.ROWS if job.fold * job.spread > 1 else 0):
        values = table[row, unit.run]
        for copy in range(job.fold):
            column = (copy * job.channels + first) * job.spread
            for c in range(first, last):
                for _ in range(job.spread):
                    values[column] = values[c * job.spread]
                    column += 1


@inline
def _merge(job: Any, unit: Any, sums: Table) -> None:
    """The sums of all chunks of a block's columns, in order, in place of the first chunk's."""
    for kind in range(2):
        total = part(sums[0, kind, unit.run], unit.c0, unit.c1 - unit.c0)
        for index in range(1, job.chunks):
            more = part(sums[index, kind, unit.run], unit.c0, total.size)
            for column in range(total.size):
                total[column] += more[column]


@inline
def _of_channel(job: Any, sums: Table, run: int, c: int) -> tuple[float, float]:
    """A channel's two sums: those of its columns."""
    a = b = 0.0
    for copy in range(job.fold):
        column = (copy * job.channels + c) * job.spread
        for _ in range(job.spread):
            a += sums[0, 0, run, column]
            b += sums[0, 1, run, column]
            column += 1
    return a, b


def start_forward(
    job_address: int,
    unit_address: int,
    like: Any,
    selected: Any,
    with_epilogue: Any,
    by_column: Any,
) -> int:
    """A channel's shift: its first value that counts."""
    job, unit = jobs.job_at(job_address), jobs.unit_at(unit_address)
    table, place = jobs.table_of(job), 0
    if job.starts:
        place = int(array(job.starts, (job.runs,), doubles())[unit.run])
    n, s = place // job.size, place % job.size
    first, last = _channels(job, unit)
    for c in range(first, last):
        column = c * job.spread
        address = jobs.at(job.x, unit.run, n, column) + s * job.itemsize
        table[jobs.SHIFT, unit.run, column] = wide(array(address, (1,), like)[0])
        table[jobs.UNIT, unit.run, column] = 1.0
    _spread_out(job, unit, table)
    return 0


def finish_forward(
    job_address: int,
    unit_address: int,
    like: Any,
    selected: Any,
    with_epilogue: Any,
    by_column: Any,
) -> int:
    """Mean, variance and scale; whether sums shall be taken again, which index 0 may ask for.

    The mean of d * d is (1 + (mean / s)**2) variances: beyond 16 deviations digits get lost.
    """
    job, unit, again = jobs.job_at(job_address), jobs.unit_at(unit_address), 0
    table, sums, count = jobs.table_of(job), jobs.sums_of(job), jobs.count_at(job, unit.run)
    _merge(job, unit, sums)
    first, last = _channels(job, unit)
    for c in range(first, last):
        column = c * job.spread
        shift, factor = table[jobs.SHIFT, unit.run, column], table[jobs.UNIT, unit.run, column]
        a, b = _of_channel(job, sums, unit.run, c)
        offset = a / count
        doubtful = not (a * offset * (257.0 / 256.0) <= b < math.inf) and math.isfinite(a)
        if unit.index == 0 and doubtful:
            again = 1
            table[jobs.SHIFT, unit.run, column] = shift + offset / factor
            table[jobs.UNIT, unit.run, column] = factor if math.isfinite(b) else 2.0**-600
        var = b / count - offset * offset
        var = 0.0 if var < 0.0 else var / factor / factor
        mean = shift + offset / factor
        if job.about_zero:
            var, mean = var + mean * mean, 0.0
        table[jobs.MEAN, unit.run, column] = mean
        table[jobs.VAR, unit.run, column] = var
        rstd = 1.0 / math.sqrt(var + job.eps) if var + job.eps != 0.0 else 0.0
        table[jobs.SCALE, unit.run, column] = table[jobs.GAMMA, unit.run, column] * rstd
    _spread_out(job, unit, table)
    return again


def start_backward(
    job_address: int,
    unit_address: int,
    like: Any,
    selected: Any,
    with_epilogue: Any,
    by_column: Any,
) -> int:
    """rstd = 1 / sqrt(var + eps)."""
    job, unit = jobs.job_at(job_address), jobs.unit_at(unit_address)
    table = jobs.table_of(job)
    for column in range(unit.c0, unit.c1):
        var = table[jobs.VAR, unit.run, column] + job.eps
        table[jobs.RSTD, unit.run, column] = 1.0 / math.sqrt(var) if var != 0.0 else 0.0
    return 0


def finish_backward(
    job_address: int,
    unit_address: int,
    like: Any,
    selected: Any,
    with_epilogue: Any,
    by_column: Any,
) -> int:
    """dgamma and dbeta, and the coefficients of
    dx = gamma * rstd * (dy - mean(dy) - xhat * mean(dy * xhat)) (Ioffe & Szegedy 2015, section 3).
    """
    job, unit = jobs.job_at(job_address), jobs.unit_at(unit_address)
    table, sums, count = jobs.table_of(job), jobs.sums_of(job), jobs.count_at(job, unit.run)
    _merge(job, unit, sums)
    first, last = _channels(job, unit)
    for c in range(first, last):
        column = c * job.spread
        dbeta, centred = _of_channel(job, sums, unit.run, c)
        dgamma = centred * table[jobs.RSTD, unit.run, column]
        scale = table[jobs.GAMMA, unit.run, column] * table[jobs.RSTD, unit.run, column]
        table[jobs.DBETA, unit.run, column] = dbeta
        table[jobs.DGAMMA, unit.run, column] = dgamma
        table[jobs.SCALE, unit.run, column] = scale
        table[jobs.B, unit.run, column] = -scale * (dgamma / count)
        table[jobs.DY_MEAN, unit.run, column] = 0.0 if job.about_zero else dbeta / count
        table[jobs.REST, unit.run, column] = 0.0
    _spread_out(job, unit, table)
    return 0
