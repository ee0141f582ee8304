"""Planes: a channel is N rows of S values that lie side by side.

Several short planes are summed at once, value i of each going to sum i; of long ones value i goes
to sum i % LANES. Results of short planes leave their tile together, where memory has them together.

*Samples* are planes of a single row (layer norm of (N, C)). gamma and beta belong to their places,
so that sums are of gamma * dy; dgamma and dbeta are sums over channels, each block's for itself.
"""

from __future__ import annotations

from typing import Any

from fastbn.backends.base import Array, Table
from fastbn.backends.numba import elementwise, jobs, reduce
from fastbn.backends.numba.compiling import inline
from fastbn.backends.numba.elementwise import ROOM, TILE
from fastbn.backends.numba.instructions import array, doubles, local, narrow, octets, part
from fastbn.backends.numba.reduce import LANES, SHORT, Gradient, Slopes


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
    return dy, x, array(jobs.at(job.beside, unit.run, n, c) + offset, shape, like)


@inline
def _four(x: int, step: int, count: int, like: Any) -> Any:
    """Four arrays, so many bytes apart."""
    a, b = array(x, (count,), like), array(x + step, (count,), like)
    return a, b, array(x + 2 * step, (count,), like), array(x + 3 * step, (count,), like)


def add_forward(here: int, where: int, like: Any, selected: Any, fused: Any, placed: Any) -> int:
    """The sums of a block's channels over a chunk."""
    job, unit = jobs.job_at(here), jobs.unit_at(where)
    n0, n1, s0, s1 = jobs.chunk(job, unit.index, job.height)
    table, sums, size, lanes = jobs.table_of(job), jobs.sums_of(job), job.itemsize, _lanes(job)
    t0, t1 = local(SHORT, doubles()), local(SHORT, doubles())
    for c in range(unit.c0, unit.c1):
        shift, power = table[jobs.SHIFT, unit.run, c], table[jobs.POWER, unit.run, c]
        reduce.clear(part(t0, 0, lanes))
        reduce.clear(part(t1, 0, lanes))
        n = n0
        while n < n1:
            x, s, w = jobs.at(job.x, unit.run, n, c), s0, jobs.weight_of(job, unit.run, n)
            if selected is None and job.size <= SHORT and n + 4 <= n1:
                four, ahead = _four(x, job.x.row, job.size, like), 4 * job.x.row if job.fetch else 0
                reduce.add_four(four, shift, power, t0, t1, ahead)
                s, n = s1, n + 3
            while selected is None and s + 4 * LANES <= s1:
                four = _four(x + s * size, LANES * size, LANES, like)
                reduce.add_four(four, shift, power, t0, t1, job.fetch)
                s += 4 * LANES
            while s < s1 and w > 0.0:
                few = array(x + s * size, (jobs.least(s1 - s, lanes),), like)
                seen = _seen(job, unit, n, s, few.size)
                reduce.add_moments(few, seen, (shift, power, w), t0, t1, selected, selected)
                s += lanes
            n += 1
        sums[unit.index, 0, unit.run, c] = _total(t0, lanes)
        sums[unit.index, 1, unit.run, c] = _total(t1, lanes)
    return 0


def add_backward(here: int, where: int, like: Any, selected: Any, fused: Any, placed: Any) -> int:
    """The sums of gradients of a block's channels over a chunk."""
    job, unit = jobs.job_at(here), jobs.unit_at(where)
    n0, n1, s0, s1 = jobs.chunk(job, unit.index, job.height)
    table, sums, act = jobs.table_of(job), jobs.sums_of(job), Slopes(job.slope, job.top)
    t0, t1, lanes = local(SHORT, doubles()), local(SHORT, doubles()), _lanes(job)
    plain = selected is None and placed is None
    for c in range(unit.c0, unit.c1):
        mean, n = table[jobs.MEAN, unit.run, c], n0
        reduce.clear(part(t0, 0, lanes))
        reduce.clear(part(t1, 0, lanes))
        while n < n1:
            s = s0
            if plain and job.size <= SHORT and n + 2 <= n1:
                dys, more = (
                    _operands(job, unit, n, c, 0, job.size, like),
                    _operands(job, unit, n + 1, c, 0, job.size, like),
                )
                reduce.add_two(
                    dys, more, mean, act, t0, t1, 2 * job.x.row if job.fetch else 0, fused
                )
                s, n = s1, n + 1
            while plain and s + 2 * LANES <= s1:
                dys, more = (
                    _operands(job, unit, n, c, s, LANES, like),
                    _operands(job, unit, n, c, s + LANES, LANES, like),
                )
                reduce.add_two(dys, more, mean, act, t0, t1, job.fetch, fused)
                s += 2 * LANES
            while s < s1:
                count = jobs.least(s1 - s, lanes)
                dys, seen = (
                    _operands(job, unit, n, c, s, count, like),
                    _seen(job, unit, n, s, count),
                )
                gamma = _places(job, job.gamma, c, s, count)
                reduce.add_products(dys, seen, gamma, mean, act, t0, t1, selected, fused, placed)
                s += lanes
            n += 1
        sums[unit.index, 0, unit.run, c] = _total(t0, lanes)
        sums[unit.index, 1, unit.run, c] = _total(t1, lanes)
    return 0


@inline
def _together(job: Any) -> bool:
    """Whether results of short planes follow each other in memory."""
    dense = job.out.column == job.size * job.itemsize
    return dense and job.size <= TILE and (not job.keeps or job.kept.column == job.out.column)


@inline
def _clear_unseen(out: Array, seen: Array) -> None:
    for i in range(out.size):
        out[i] = out[i] if seen[i] else narrow(0.0, out[i])


def write_forward(here: int, where: int, like: Any, selected: Any, fused: Any, placed: Any) -> int:
    """y of a block's channels in a chunk."""
    job, unit = jobs.job_at(here), jobs.unit_at(where)
    n0, n1, s0, s1 = jobs.chunk(job, unit.index, job.tall)
    table, act, tile = jobs.table_of(job), Slopes(job.slope, job.top), local(ROOM, like)
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
                if usual and placed is None:
                    elementwise.write_y_single(target, x, residual, near, act, job.adds, fused)
                else:
                    how = act, job.adds, fused, placed
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
    job: Any, unit: Any, c: int, s: int, dys: Any, k: Gradient, act: Slopes, fused: Any
) -> None:
    """To a block's sums for dgamma and dbeta."""
    shape = dys[0].shape
    row = (unit.c0 // job.block * 2 * job.period + c % job.period) * job.size + s
    dgamma = array(job.parameters + row * 8, shape, doubles())
    dbeta = array(job.parameters + (row + job.period * job.size) * 8, shape, doubles())
    reduce.add_columns(dgamma, dbeta, dys, k, act, fused)


def write_backward(here: int, where: int, like: Any, selected: Any, fused: Any, placed: Any) -> int:
    """dx of a block's channels in a chunk, and dy times the activation's slope."""
    job, unit = jobs.job_at(here), jobs.unit_at(where)
    n0, n1, s0, s1 = jobs.chunk(job, unit.index, job.tall)
    table, act = jobs.table_of(job), Slopes(job.slope, job.top)
    tile, others = local(ROOM, like), local(ROOM, like)
    for n in range(n0, n1):
        used, to, kept, w = 0, 0, 0, jobs.weight_of(job, unit.run, n)
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
                kept = kept if used else jobs.at(job.kept, unit.run, n, c) + offset
                target, other = part(tile, used, count), part(others, used, count)
                if job.frozen:
                    elementwise.write_scaled(target, dys, k.a, act, fused)
                elif usual and w == 1.0 and placed is None:
                    elementwise.write_dx_single(target, dys, near, act, fused)
                else:
                    gamma = _places(job, job.gamma, c, s, count)
                    elementwise.write_dx(target, dys, gamma, k, w, act, fused, placed)
                if job.keeps:
                    elementwise.write_scaled(other, dys, 1.0, act, fused)
                if selected is not None:
                    _clear_unseen(target, _seen(job, unit, n, s, count))
                    _clear_unseen(other, _seen(job, unit, n, s, count))
                if placed is not None:
                    _add_parameters(job, unit, c, s, dys, k, act, fused)
                used += count
                if not _together(job) or used > TILE or c + 1 == unit.c1:
                    elementwise.put(to, tile, used, job.stream, like)
                    if job.keeps:
                        elementwise.put(kept, others, used, job.stream, like)
                    used = 0
    return 0
