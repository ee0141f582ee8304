"""A call to the kernels: what arrays they walk, in which order, and on how many threads."""

from __future__ import annotations

import math
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numba
import numpy as np

from fastbn.backends.base import Array, Selection, Table
from fastbn.backends.numba import finalize, planes, rows, team
from fastbn.backends.numba.compiling import body
from fastbn.backends.numba.elementwise import TILE
from fastbn.backends.numba.jobs import AGAIN, ALL, FINISH, JOB, ROWS, START, SUM, WRITE, cut, drive
from fastbn.backends.tuning import (
    FUSED_BLOCK,
    PREFETCH_FROM,
    SERIAL_BELOW,
    STREAM_MAPS,
    STREAM_PLANES,
    STREAM_ROWS,
)

AHEAD = 4096
"""Bytes from what is read to what is fetched meanwhile."""
TINY = 16
"""Values of a plane; smaller ones are columns of rows."""
NARROW = 256
"""Columns; of narrower rows several make one."""
POOLED = 80
"""Bytes of tables for a channel between two passes, where channels are pooled."""
_numba: Any = numba  # its types are told only in part
_DOUBLE = np.dtype(np.float64)
_PLACE = {name: field[1] // 8 for name, field in (JOB.fields or {}).items()}


class Shape(NamedTuple):
    """How arrays of a shape are walked: as planes, or as rows of so many columns."""

    is_rows: bool
    runs: int
    rows: int
    columns: int
    size: int
    rest: int
    fold: int
    channels: int
    spread: int
    chunk_rows: int
    piece: int
    pieces: int
    chunks: int


@lru_cache(256)
def _shape_of(shape: tuple[int, ...], selected: bool, by_column: bool) -> Shape:
    """Rows, columns and chunks: they follow from the shape alone."""
    runs, n, channels, size = shape
    fold, spread = 1, 1
    is_rows = not by_column and (size == 1 or (size < TINY and not selected))
    if is_rows:
        spread, size = size, 1
        while not selected and fold * channels * spread < NARROW and 2 * fold <= n:
            fold *= 2
    width, count = channels * spread, n // fold
    numbers = runs, count, fold * width, size, n % fold * width, fold, channels, spread
    return Shape(is_rows, *numbers, *cut(count, size))


@cache
def _bodies(
    dtype: np.dtype[Any], is_rows: bool, backward: bool, sums: bool, writes: bool, *kinds: bool
) -> tuple[int, int, int, int]:
    """The addresses of what a job calls; 0 of what it does not."""
    family, direction = rows if is_rows else planes, "backward" if backward else "forward"
    plain, start = (False,) * 3, getattr(finalize, "start_" + direction)
    finish = getattr(finalize, "finish_" + direction)
    return (
        body(start, dtype, *plain) if sums else 0,
        body(getattr(family, "add_" + direction), dtype, *kinds) if sums else 0,
        body(finish, _DOUBLE, *plain) if sums else 0,
        body(getattr(family, "write_" + direction), dtype, *kinds) if writes else 0,
    )


def walks(view: Array) -> bool:
    """Whether what makes a row lies side by side."""
    shape = _shape_of(view.shape, False, False)
    return shape.fold * shape.spread == 1 or bool(view[0].flags.c_contiguous)


def channel_bytes(shape: tuple[int, ...]) -> int:
    """Bytes of a call's tables for a channel, and of what stands between two pooled passes."""
    found = _shape_of(shape, False, False)
    return found.columns // found.channels * (ROWS + 2 * found.chunks) * 8 + POOLED


class Call:
    """A job, and the arrays that it points at."""

    def __init__(
        self, x: Array, selection: Selection | None = None, by_column: bool = False, block: int = 0
    ) -> None:
        self.shape = shape = _shape_of(x.shape, selection is not None, by_column)
        self.table = np.empty((ROWS, shape.runs, shape.columns))
        self._kinds = [selection is not None, False, by_column]
        self._dtype, self._block = x.dtype, block
        self._words, self._total, self._alive = [0] * (JOB.itemsize // 8), 0, [self.table]
        self._numbers = [x.shape[1] * x.shape[3], 0.0, 1.0, math.inf]  # count, eps, slope, top
        first = _PLACE["runs"]
        self._words[first : first + len(shape) - 1] = shape[1:]
        self.set(itemsize=x.itemsize, table=self.table.ctypes.data)
        self._selection = selection
        if selection is not None:
            self._select(selection)

    def set(self, **words: int) -> None:
        """Set numbers of the job."""
        for name, value in words.items():
            self._words[_PLACE[name]] = value

    def _select(self, selection: Selection) -> None:
        mask, weights, counts = selection
        self.set(mask=mask.ctypes.data, counts=counts.ctypes.data)
        if weights is not None:
            weight_samples = mask.shape[1] // weights.shape[1]
            self.set(weights=weights.ctypes.data, weight_samples=weight_samples)

    def _set_firsts(self, selection: Selection) -> None:
        """Point at the first place of each run that counts: where moments take their shift."""
        weighs, weights = selection.mask, selection.weights
        if weights is not None:
            weight_samples = weighs.shape[1] // weights.shape[1]
            weighs = weighs & (weights > 0).repeat(weight_samples, 1)[:, :, None]
        starts = weighs.reshape(len(weighs), -1).argmax(1).astype(np.float64)
        self.set(starts=starts.ctypes.data)
        self._alive.append(starts)

    def with_eps(self, eps: float) -> None:
        self._numbers[1] = eps

    def activate(self, slope: float, top: float) -> None:
        """What is fused: an activation, and the residual or the y that goes with it."""
        self._kinds[1], self._numbers[2:] = True, [slope, top]

    def _row(self, row: int) -> Any:
        """A row of the table as (runs, fold, channels, spread)."""
        return self.table[row].reshape(-1, self.shape.fold, self.shape.channels, self.shape.spread)

    def give(self, row: int, values: Any) -> None:
        """Fill a row of the table with (runs, channels) values, or one for all."""
        self._row(row)[...] = values[:, None, :, None] if isinstance(values, np.ndarray) else values

    def take(self, row: int) -> Any:
        """(runs, channels) of a row."""
        return self._row(row)[:, 0, :, 0].copy()

    def places(self, name: str, values: Table) -> None:
        """Point at a table (period, size) of what belongs to places."""
        values = np.ascontiguousarray(values)
        self.set(**{name: values.ctypes.data}, period=len(values))
        self._alive.append(values)

    def array(self, a: Array, *names: str) -> None:
        """Point at an array that is walked where it lies."""
        shape = self.shape
        run, row, column, _ = a.strides
        place = a.ctypes.data, run, row * shape.fold, a.itemsize if shape.is_rows else column
        for name in names:
            first = _PLACE[name]
            self._words[first : first + 4] = place
        self._alive.append(a)
        self._total += a.nbytes

    def run(self, threads: int, backward: bool, sums: bool, writes: bool) -> None:
        """Bring the parts of the work in order."""
        shape, total = self.shape, self._total
        if total * 2 < SERIAL_BELOW * 3:
            threads = 1
        threads = min(threads, _numba.config.NUMBA_NUM_THREADS)
        if self._selection is not None and sums and not backward:
            self._set_firsts(self._selection)
        start, add, finish, write = _bodies(
            self._dtype, shape.is_rows, backward, sums, writes, *self._kinds
        )
        streamed = STREAM_ROWS if shape.is_rows else STREAM_PLANES
        stream = writes and total >= (streamed if sums else STREAM_MAPS)
        block, whole = self._order(threads, 2 if backward else 1, sums)
        partial = np.empty((shape.chunks, 2, shape.runs, shape.columns) if sums else 0)
        self.set(start=start, add=add, finish=finish, write=write, stream=stream, block=block)
        map_rows = shape.chunk_rows
        if shape.is_rows:  # each chunk begins with the coefficients of its columns
            map_rows = max(map_rows, -(-shape.rows // (1 if whole else 2 * threads)))
        self.set(map_rows=map_rows, map_chunks=-(-shape.rows // map_rows) * shape.pieces)
        self.set(
            sums=partial.ctypes.data if sums else 0,
            fetch=AHEAD if total >= threads * PREFETCH_FROM else 0,
        )
        job = np.array(self._words)
        job[-4:].view(np.float64)[:] = self._numbers
        _run(job.ctypes.data, threads, whole, sums, writes)

    def _order(self, threads: int, inputs: int, sums: bool) -> tuple[int, bool]:
        """Columns of a block, and whether each goes through all of the work at once."""
        shape = self.shape
        columns, runs = shape.columns, shape.runs
        if self._block:
            return self._block, True
        if shape.is_rows:
            blocks = -(-columns // (TILE // (16 * shape.spread) * 16 * shape.spread))
            whole = 16 * shape.spread
            block = (
                columns if shape.fold > 1 else min(-(-columns // (blocks * whole)) * whole, columns)
            )
            held = shape.rows * block * self._words[_PLACE["itemsize"]] * inputs <= FUSED_BLOCK
            even = threads == 1 or runs * -(-columns // block) % threads == 0
            return block, sums and held and even
        groups = runs * columns
        if sums and 10 * groups >= 9 * -(-groups // threads) * threads:
            channel = shape.rows * shape.size * self._words[_PLACE["itemsize"]] * inputs
            blocks, parts = -(-columns // max(FUSED_BLOCK // channel, 1)), -(-threads // runs)
            return -(-columns // min(-(-blocks // parts) * parts, columns)), True
        spare = 4 * threads // (runs * shape.chunks)
        return -(-columns // min(max(spare, 1), columns)), False


def _run(job_address: int, threads: int, whole: bool, sums: bool, writes: bool) -> None:
    if whole:
        team.share(job_address, ALL, threads)
        return
    if sums:
        drive(job_address, START, 0, 1)
        team.share(job_address, SUM, threads)
        if drive(job_address, FINISH, 0, 1):
            team.share(job_address, SUM, threads)
            drive(job_address, AGAIN, 0, 1)
    if writes:
        team.share(job_address, WRITE, threads)
