"""Planes: a channel is N rows of S values that lie side by side.

Several short planes are summed at once, value i of each going to sum i; of long ones value i goes
to sum i % LANES. Results of short planes leave their tile together, where memory has them together.

By column (layer norm of (N, C)): each sample's group is one plane. gamma and beta belong to its
columns, so that sums are of gamma * dy; dgamma and dbeta are sums over planes, each block's for
itself.
"""

from __future__ import annotations

from typing import Any

from fastbn.backends.base import Array, Table
from fastbn.backends.numba import elementwise, jobs, reduce
from fastbn.backends.numba.compiling import inline
from fastbn.backends.numba.elementwise import ROOM, TILE
from fastbn.backends.numba.halves import narrow
from fastbn.backends.numba.instructions import array, doubles, local, octets, part
from fastbn.backends.numba.reduce import LANES, SHORT, ActivationParams, Gradient


@inline
def _lanes(job: Any) -> int:
    """How many sums a channel has, a multiple of four."""
    return int(-(-job.size // 4) * 4) if job.size <= SHORT else LANES


@inline
def _total(sums: Table, count: int) -> float:
    a = b = c = d = 0.0
    for i in range(count // 4):
        a += sums[4 * i]
        b += sums[4 * i + 1]
        c += sums[4 * i + 2]
        d += sums[4 * i + 3]
    return (a + b) + (c + d)


@inline
def _seen(job: Any, unit: Any, n: int, s: int, count: int) -> Any:
    """The mask of some places; of nothing where there is no mask."""
    place = (unit.run * job.rows + n) * job.size + s
    return array(job.mask + place, (count,), octets())


@inline
def _places(job: Any, address: int, c: int, s: int, count: int) -> Any:
    """Values of a table of places; of nothing where there is none."""
    return array(address + (c % job.period * job.size + s) * 8, (count,), doubles())


@inline
def _operands(job: Any, unit: Any, n: int, c: int, s: int, count: int, like: Any) -> Any:
    """Of some places dy, x and y."""
    offset, shape = s * job.itemsize, (count,)
    dy = array(jobs.at(job.dy, unit.run, n, c) + offset, shape, like)
    x = array(jobs.at(job.x, unit.run, n, c) + offset, shape, like)
    return dy, x, array(jobs.at(job.other, unit.run, n, c) + offset, shape, like)


@inline
def _four(x: int, step: int, count: int, like: Any) -> Any:
    """Four arrays, so many bytes apart."""
    a, b = array(x, (count,), like), array(x + step, (count,), like)
    return a, b, array(x + 2 * step, (count,), like), array(x + 3 * step, (count,), like)


def add_forward(
    job_address: int,
    unit_address: int,
    like: Any,
    selected: Any,
    with_epilogue: Any,
    by_column: Any,
) -> int:
    """The sums of a block's channels over a chunk."""
    job, unit = jobs.job_at(job_address), jobs.unit_at(unit_address)
    n0, n1, s0, s1 = jobs.chunk(job, unit.index, job.chunk_rows)
    table, sums, size, lanes = jobs.table_of(job), jobs.sums_of(job), job.itemsize, _lanes(job)
    t0, t1 = local(SHORT, doubles()), local(SHORT, doubles())
    for c in range(unit.c0, unit.c1):
        shift, factor = table[jobs.SHIFT, unit.run, c], table[jobs.UNIT, unit.run, c]
        reduce.clear(part(t0, 0, lanes))
        reduce.clear(part(t1, 0, lanes))
        n = n0
        while n < n1:
            x, s, w = jobs.at(job.x, unit.run, n, c), s0, jobs.weight_of(job, unit.run, n)
            if selected is None and job.size <= SHORT and n + 4 <= n1:
                four, ahead = _four(x, job.x.row, job.size, like), 4 * job.x.row if job.fetch else 0
                reduce.add_four(four, shift, factor, t0, t1, ahead)
                s, n = s1, n + 3
            while selected is None and s + 4 * LANES <= s1:
                four = _four(x + s * size, LANES * size, LANES, like)
                reduce.add_four(four, shift, factor, t0, t1, job.fetch)
                s += 4 * LANES
            while s < s1 and w > 0.0:
                few = array(x + s * size, (jobs.least(s1 - s, lanes),), like)
                seen = _seen(job, unit, n, s, few.size)
                reduce.add_moments(few, seen, (shift, factor, w), t0, t1, selected, selected)
                s += lanes
            n += 1
        sums[unit.index, 0, unit.run, c] = _total(t0, lanes)
        sums[unit.index, 1, unit.run, c] = _total(t1, lanes)
    return 0


def add_backward(
    job_address: int,
    unit_address: int,
    like: Any,
    selected: Any,
    with_epilogue: Any,
    by_column: Any,
) -> int:
    """The sums of gradients of a block's channels over a chunk."""
    job, unit = jobs.job_at(job_address), jobs.unit_at(unit_address)
    n0, n1, s0, s1 = jobs.chunk(job, unit.index, job.chunk_rows)
    table, sums, act = jobs.table_of(job), jobs.sums_of(job), ActivationParams(job.slope, job.top)
    t0, t1, lanes = local(SHORT, doubles()), local(SHORT, doubles()), _lanes(job)
    plain = selected is None and by_column is None
    for c in range(unit.c0, unit.c1):
        mean, n = table[jobs.MEAN, unit.run, c], n0
        reduce.clear(part(t0, 0, lanes))
        reduce.clear(part(t1, 0, lanes))
        while n < n1:
            s = s0
            if plain and job.size <= SHORT and n + 2 <= n1:
                dys = _operands(job, unit, n, c, 0, job.size, like)
                more = _operands(job, unit, n + 1, c, 0, job.size, like)
                reduce.add_two(
                    dys, more, mean, act, t0, t1, 2 * job.x.row if job.fetch else 0, with_epilogue
                )
                s, n = s1, n + 1
            while plain and s + 2 * LANES <= s1:
                dys = _operands(job, unit, n, c, s, LANES, like)
                more = _operands(job, unit, n, c, s + LANES, LANES, like)
                reduce.add_two(dys, more, mean, act, t0, t1, job.fetch, with_epilogue)
                s += 2 * LANES
            while s < s1:
                count = jobs.least(s1 - s, lanes)
                dys = _operands(job, unit, n, c, s, count, like)
                seen = _seen(job, unit, n, s, count)
                gamma = _places(job, job.gamma, c, s, count)
                reduce.add_products(
                    dys, seen, gamma, mean, act, t0, t1, selected, with_epilogue, by_column
                )
                s += lanes
            n += 1
        sums[unit.index, 0, unit.run, c] = _total(t0, lanes)
        sums[unit.index, 1, unit.run, c] = _total(t1, lanes)
    return 0


@inline
def _together(job: Any) -> bool:
    """Whether results of short planes follow each other in memory."""
    dense = job.out.column == job.size * job.itemsize
    return (
        dense
        and job.size <= TILE
        and (not job.has_dresidual or job.dresidual.column == job.out.column)
    )


@inline
def _clear_unseen(out: Array, seen: Array) -> None:
    for i in range(out.size):
        out[i] = out[i] if seen[i] else narrow(0.0, out[i])


def write_forward(
    job_address: int,
    unit_address: int,
    like: Any,
    selected: Any,
    with_epilogue: Any,
    by_column: Any,
) -> int:
    """y of a block's channels in a chunk."""
    job, unit = jobs.job_at(job_address), jobs.unit_at(unit_address)
    n0, n1, s0, s1 = jobs.chunk(job, unit.index, job.map_rows)
    table, act, tile = jobs.table_of(job), ActivationParams(job.slope, job.top), local(ROOM, like)
    for n in range(n0, n1):
        used, to = 0, 0
        for c in range(unit.c0, unit.c1):
            affine = (
                table[jobs.MEAN, unit.run, c],
                table[jobs.SCALE, unit.run, c],
                table[jobs.BETA, unit.run, c],
            )
            near, usual = elementwise.single_affine(affine[0], affine[1], affine[2], job.itemsize)
            for s in range(s0, s1, TILE):
                count = jobs.least(s1 - s, TILE)
                _, x, residual = _operands(job, unit, n, c, s, count, like)
                to = to if used else jobs.at(job.out, unit.run, n, c) + s * job.itemsize
                target = part(tile, used, count)
                reduce.fetch(x, job.fetch)
                gamma = _places(job, job.gamma, c, s, count)
                places = gamma, _places(job, job.beta, c, s, count)
                if usual and by_column is None:
                    elementwise.write_y_single(
                        target, x, residual, near, act, job.has_residual, with_epilogue
                    )
                else:
                    how = act, job.has_residual, with_epilogue, by_column
                    elementwise.write_y(target, x, residual, affine, places, *how)
                if selected is not None:
                    _clear_unseen(target, _seen(job, unit, n, s, count))
                used += count
                if not _together(job) or used > TILE or c + 1 == unit.c1:
                    elementwise.put(to, tile, used, job.stream, like)
                    used = 0
    return 0


@inline
def _add_parameters(
    job: Any,
    unit: Any,
    c: int,
    s: int,
    dys: Any,
    k: Gradient,
    act: ActivationParams,
    with_epilogue: Any,
) -> None:
    """To a block's sums for dgamma and dbeta."""
    shape = dys[0].shape
    row = (unit.c0 // job.block * 2 * job.period + c % job.period) * job.size + s
    dgamma = array(job.parameters + row * 8, shape, doubles())
    dbeta = array(job.parameters + (row + job.period * job.size) * 8, shape, doubles())
    reduce.add_columns(dgamma, dbeta, dys, k, act, with_epilogue)


def write_backward(
    job_address: int,
    unit_address: int,
    like: Any,
    selected: Any,
    with_epilogue: Any,
    by_column: Any,
) -> int:
    """dx of a block's channels in a chunk, and dy times the activation's slope."""
    job, unit = jobs.job_at(job_address), jobs.unit_at(unit_address)
    n0, n1, s0, s1 = jobs.chunk(job, unit.index, job.map_rows)
    table, act = jobs.table_of(job), ActivationParams(job.slope, job.top)
    tile, others = local(ROOM, like), local(ROOM, like)
    for n in range(n0, n1):
        used, to, dresidual_to, w = 0, 0, 0, jobs.weight_of(job, unit.run, n)
        for c in range(unit.c0, unit.c1):
            k = Gradient(
                table[jobs.SCALE, unit.run, c],
                table[jobs.DY_MEAN, unit.run, c],
                table[jobs.MEAN, unit.run, c],
                table[jobs.RSTD, unit.run, c],
                table[jobs.B, unit.run, c],
                table[jobs.REST, unit.run, c],
            )
            near, usual = elementwise.single_gradient(k, job.itemsize)
            for s in range(s0, s1, TILE):
                count = jobs.least(s1 - s, TILE)
                dys, offset = _operands(job, unit, n, c, s, count, like), s * job.itemsize
                reduce.fetch(dys[0], job.fetch)
                reduce.fetch(dys[1], job.fetch)
                to = to if used else jobs.at(job.out, unit.run, n, c) + offset
                dresidual_to = (
                    dresidual_to if used else jobs.at(job.dresidual, unit.run, n, c) + offset
                )
                target, other = part(tile, used, count), part(others, used, count)
                if job.frozen:
                    elementwise.write_scaled(target, dys, k.a, act, with_epilogue)
                elif usual and w == 1.0 and by_column is None:
                    elementwise.write_dx_single(target, dys, near, act, with_epilogue)
                else:
                    gamma = _places(job, job.gamma, c, s, count)
                    elementwise.write_dx(target, dys, gamma, k, w, act, with_epilogue, by_column)
                if job.has_dresidual:
                    elementwise.write_scaled(other, dys, 1.0, act, with_epilogue)
                if selected is not None:
                    _clear_unseen(target, _seen(job, unit, n, s, count))
                    _clear_unseen(other, _seen(job, unit, n, s, count))
                if by_column is not None:
                    _add_parameters(job, unit, c, s, dys, k, act, with_epilogue)
                used += count
                if not _together(job) or used > TILE or c + 1 == unit.c1:
                    elementwise.put(to, tile, used, job.stream, like)
                    if job.has_dresidual:
                        elementwise.put(dresidual_to, others, used, job.stream, like)
                    used = 0
    return 0
