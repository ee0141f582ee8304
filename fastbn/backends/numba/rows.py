"""Rows: all columns of a row lie side by side, and each has sums of its own.

Results of short rows leave their tile together, where memory has them together. A mask lets whole
rows count or not. One row more than the others may be short: of the last samples, where several
make a row.
"""

from __future__ import annotations

from typing import Any

from fastbn.backends.base import Array, Table
from fastbn.backends.numba import elementwise, jobs, reduce
from fastbn.backends.numba.compiling import inline
from fastbn.backends.numba.elementwise import ROOM, TILE
from fastbn.backends.numba.halves import narrow
from fastbn.backends.numba.instructions import array, doubles, local, octets, part, singles
from fastbn.backends.numba.reduce import ActivationParams, Gradient


@inline
def _row(job: Any, unit: Any, a: Any, n: int, like: Any) -> Any:
    """A block's columns of a row."""
    end = unit.c1 if n < job.rows else job.rest
    return array(jobs.at(a, unit.run, n, unit.c0), (end - unit.c0,), like)


@inline
def _end(job: Any, n1: int) -> int:
    """The row after a chunk's last, which may be the short one."""
    return n1 + 1 if job.rest and n1 == job.rows else n1


@inline
def _is_seen(job: Any, unit: Any, n: int) -> bool:
    """Whether a row counts."""
    if not job.mask:
        return True
    return bool(array(job.mask, (job.runs, job.rows), octets())[unit.run, n])


@inline
def _ahead(job: Any) -> int:
    """Bytes from a row to the one that is fetched meanwhile, if any is."""
    four = 4 * job.x.row
    return int((job.fetch // four + 1) * four) if job.fetch and four > 0 else 0


@inline
def _columns(row: Table, unit: Any) -> Any:
    """A block's columns of a row of a table."""
    return part(row, unit.c0, unit.c1 - unit.c0)


@inline
def _save(job: Any, unit: Any, s0: Table, s1: Table) -> None:
    sums = jobs.sums_of(job)
    first = _columns(sums[unit.index, 0, unit.run], unit)
    second = _columns(sums[unit.index, 1, unit.run], unit)
    for i in range(first.size):
        first[i], second[i] = s0[i], s1[i]


def add_forward(
    job_address: int,
    unit_address: int,
    like: Any,
    selected: Any,
    with_epilogue: Any,
    by_column: Any,
) -> int:
    """The sums of a block's columns over a chunk."""
    job, unit = jobs.job_at(job_address), jobs.unit_at(unit_address)
    n, n1, _, _ = jobs.chunk(job, unit.index, job.chunk_rows)
    table, s0, s1 = jobs.table_of(job), local(TILE, doubles()), local(TILE, doubles())
    shift = _columns(table[jobs.SHIFT, unit.run], unit)
    factor = _columns(table[jobs.UNIT, unit.run], unit)
    reduce.clear(s0)
    reduce.clear(s1)
    while selected is None and n + 4 <= n1:
        x0, x1 = _row(job, unit, job.x, n, like), _row(job, unit, job.x, n + 1, like)
        x2, x3 = _row(job, unit, job.x, n + 2, like), _row(job, unit, job.x, n + 3, like)
        reduce.add_four((x0, x1, x2, x3), shift, factor, s0, s1, _ahead(job))
        n += 4
    while n < _end(job, n1):
        x, w = _row(job, unit, job.x, n, like), jobs.weight_of(job, unit.run, n)
        if w > 0.0 and _is_seen(job, unit, n):
            reduce.add_moments(x, None, (shift, factor, w), s0, s1, None, selected)
        n += 1
    _save(job, unit, s0, s1)
    return 0


@inline
def _operands(job: Any, unit: Any, n: int, like: Any) -> Any:
    """Of a row dy, x and y."""
    dy, x = _row(job, unit, job.dy, n, like), _row(job, unit, job.x, n, like)
    return dy, x, _row(job, unit, job.other, n, like)


def add_backward(
    job_address: int,
    unit_address: int,
    like: Any,
    selected: Any,
    with_epilogue: Any,
    by_column: Any,
) -> int:
    """The sums of gradients of a block's columns over a chunk."""
    job, unit = jobs.job_at(job_address), jobs.unit_at(unit_address)
    n, n1, _, _ = jobs.chunk(job, unit.index, job.chunk_rows)
    table, s0, s1 = jobs.table_of(job), local(TILE, doubles()), local(TILE, doubles())
    mean, act = _columns(table[jobs.MEAN, unit.run], unit), ActivationParams(job.slope, job.top)
    reduce.clear(s0)
    reduce.clear(s1)
    while selected is None and n + 2 <= n1:
        dys, more = _operands(job, unit, n, like), _operands(job, unit, n + 1, like)
        reduce.add_two(dys, more, mean, act, s0, s1, _ahead(job), with_epilogue)
        n += 2
    while n < _end(job, n1):
        if _is_seen(job, unit, n):
            dys = _operands(job, unit, n, like)
            reduce.add_products(dys, None, None, mean, act, s0, s1, None, with_epilogue, None)
        n += 1
    _save(job, unit, s0, s1)
    return 0


@inline
def _mend(out: Array, others: Array, fits: Array) -> None:
    """What stands for the columns that float32 does not fit."""
    for i in range(out.size):
        out[i] = out[i] if fits[i] else others[i]


@inline
def _zero(out: Array) -> None:
    for i in range(out.size):
        out[i] = narrow(0.0, out[i])


def write_forward(
    job_address: int,
    unit_address: int,
    like: Any,
    selected: Any,
    with_epilogue: Any,
    by_column: Any,
) -> int:
    """y of a block's columns in a chunk."""
    job, unit = jobs.job_at(job_address), jobs.unit_at(unit_address)
    n0, n1, _, _ = jobs.chunk(job, unit.index, job.map_rows)
    table, act = jobs.table_of(job), ActivationParams(job.slope, job.top)
    tile, other = local(ROOM, like), local(TILE, like)
    mean = _columns(table[jobs.MEAN, unit.run], unit)
    scale = _columns(table[jobs.SCALE, unit.run], unit)
    beta = _columns(table[jobs.BETA, unit.run], unit)
    near = local(TILE, singles()), local(TILE, singles()), local(TILE, singles())
    fits, usual = local(TILE, octets()), 0
    for i in range(mean.size):
        k, fits[i] = elementwise.single_affine(mean[i], scale[i], beta[i], job.itemsize)
        near[0][i], near[1][i], near[2][i] = k
    for i in range(mean.size):
        usual += fits[i]
    together, used, to = job.out.row == mean.size * job.itemsize, 0, 0
    for n in range(n0, _end(job, n1)):
        x, residual = _row(job, unit, job.x, n, like), _row(job, unit, job.other, n, like)
        to = to if used else jobs.at(job.out, unit.run, n, unit.c0)
        target = part(tile, used, x.size)
        reduce.fetch(x, job.fetch)
        if not _is_seen(job, unit, n):
            _zero(target)
        else:
            if usual > 0:
                elementwise.write_y_single(
                    target, x, residual, near, act, job.has_residual, with_epilogue
                )
            if usual < mean.size:
                how = (mean, scale, beta), (mean, mean), act, job.has_residual, with_epilogue, None
                elementwise.write_y(target if usual == 0 else other, x, residual, *how)
            if 0 < usual < mean.size:
                _mend(target, other, fits)
        used += x.size
        if not together or used > TILE or n + 1 == _end(job, n1):
            elementwise.put(to, tile, used, job.stream, like)
            used = 0
    return 0


def write_backward(
    job_address: int,
    unit_address: int,
    like: Any,
    selected: Any,
    with_epilogue: Any,
    by_column: Any,
) -> int:
    """dx of a block's columns in a chunk, and dy times the activation's slope."""
    job, unit = jobs.job_at(job_address), jobs.unit_at(unit_address)
    n0, n1, _, _ = jobs.chunk(job, unit.index, job.map_rows)
    table, act = jobs.table_of(job), ActivationParams(job.slope, job.top)
    tile, others = local(ROOM, like), local(ROOM, like)
    k = Gradient(
        _columns(table[jobs.SCALE, unit.run], unit),
        _columns(table[jobs.DY_MEAN, unit.run], unit),
        _columns(table[jobs.MEAN, unit.run], unit),
        _columns(table[jobs.RSTD, unit.run], unit),
        _columns(table[jobs.B, unit.run], unit),
        _columns(table[jobs.REST, unit.run], unit),
    )
    near = (
        local(TILE, singles()),
        local(TILE, singles()),
        local(TILE, singles()),
        local(TILE, singles()),
        local(TILE, singles()),
    )
    fits, usual = local(TILE, octets()), 0
    for i in range(0 if job.frozen else k.a.size):
        one = Gradient(k.a[i], k.dy_mean[i], k.mean[i], k.rstd[i], k.b[i], k.rest[i])
        found, fits[i] = elementwise.single_gradient(one, job.itemsize)
        near[0][i], near[1][i], near[2][i], near[3][i], near[4][i] = found
    for i in range(k.a.size):
        usual += fits[i]
    row = k.a.size * job.itemsize
    together = job.out.row == row and (not job.has_dresidual or job.dresidual.row == row)
    used, to, dresidual_to = 0, 0, 0
    for n in range(n0, _end(job, n1)):
        dys, w = _operands(job, unit, n, like), jobs.weight_of(job, unit.run, n)
        reduce.fetch(dys[0], job.fetch)
        reduce.fetch(dys[1], job.fetch)
        to = to if used else jobs.at(job.out, unit.run, n, unit.c0)
        dresidual_to = dresidual_to if used else jobs.at(job.dresidual, unit.run, n, unit.c0)
        target, other = part(tile, used, dys[0].size), part(others, used, dys[0].size)
        if not _is_seen(job, unit, n):
            _zero(target)
            _zero(other)
        elif job.frozen:
            elementwise.write_scaled(target, dys, k.a, act, with_epilogue)
        elif w != 1.0:
            elementwise.write_dx(target, dys, None, k, w, act, with_epilogue, None)
        else:
            if usual > 0:
                elementwise.write_dx_single(target, dys, near, act, with_epilogue)
            if usual < k.a.size:
                how = dys, None, k, w, act, with_epilogue, None
                elementwise.write_dx(target if usual == 0 else other, *how)
            if 0 < usual < k.a.size:
                _mend(target, other, fits)
        if job.has_dresidual and _is_seen(job, unit, n):
            elementwise.write_scaled(other, dys, 1.0, act, with_epilogue)
        used += dys[0].size
        if not together or used > TILE or n + 1 == _end(job, n1):
            elementwise.put(to, tile, used, job.stream, like)
            if job.has_dresidual:
                elementwise.put(dresidual_to, others, used, job.stream, like)
            used = 0
    return 0
