"""A call as its kernels see it, and the order of its work.

1. A channel's values are cut into chunks by shape alone. Sums of chunks are added in order: so no
   bit depends on threads, on strides or on where arrays lie.
2. *Planes* have S values side by side. In *rows* all columns lie side by side, and each has sums of
   its own. Columns are channels or, where those are few, channels of several samples (`fold`) or of
   tiny planes (`spread`); what belongs to a channel is added in the end.
3. `drive` brings bodies in order: a block of channels at a time goes through both passes, while it
   is in the cache; or all threads share the chunks of one pass, then those of the next.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastbn.backends.numba.compiling import inline, kernel
from fastbn.backends.numba.instructions import (
    USUAL_MODE,
    array,
    doubles,
    fence,
    invoke,
    record,
    set_mode,
)

CHUNK = 16384
"""Values of a channel whose sums are kept apart before they are added."""
ALL, START, FINISH, AGAIN, SUM, WRITE = range(6)
"""What is asked of `drive`: all passes of some blocks, or one step of all of them."""
ROWS = 9
GAMMA, MEAN, VAR, SCALE, BETA, SHIFT, UNIT, DGAMMA, DBETA = range(ROWS)
"""Rows of a call's table, which has a value for each column of each run."""
RSTD, B, DY_MEAN, REST = VAR, BETA, SHIFT, UNIT
"""Backward, these take the places of rows that only the forward needs."""
ARRAYS = ("x", "dy", "other", "out", "dresidual")
"""`other` is forward a residual, backward the activation's y; `dresidual` takes dy times its slope.
Where there is none, another array stands for it."""

_OPERAND = np.dtype([(name, np.int64) for name in ("address", "run", "row", "column")])
"""An array: its address, and its strides in bytes; columns are the channels of rows."""
JOB = np.dtype(
    [
        *((name, _OPERAND) for name in ARRAYS),
        *((name, np.int64) for name in ("has_residual", "has_dresidual", "frozen", "about_zero")),
        *((name, np.int64) for name in ("stream", "fetch")),
        # Rows of `columns` values, perhaps one more of only `rest`; planes have `size` values. A
        # chunk is `chunk_rows` rows, or a `piece` of one; a block is some columns. What is written
        # has chunks of its own: `map_chunks` of them, `map_rows` rows each.
        *((name, np.int64) for name in ("runs", "rows", "columns", "size", "rest")),
        *((name, np.int64) for name in ("fold", "channels", "spread")),
        *((name, np.int64) for name in ("chunk_rows", "piece", "pieces", "chunks", "block")),
        *((name, np.int64) for name in ("itemsize", "map_rows", "map_chunks")),
        # Addresses, 0 of what there is not: (ROWS, runs, columns) and (chunks, 2, runs, columns) of
        # float64, (runs, rows, size) of bytes, (runs, rows / weight_samples) of
        # float64, and of each run the first place that counts, and how many do.
        *(
            (name, np.int64)
            for name in ("table", "sums", "mask", "weights", "weight_samples", "starts", "counts")
        ),
        # By column (layer norm): gamma and beta, (period, size) of float64, and for each block of
        # rows its sums for dgamma and dbeta.
        *((name, np.int64) for name in ("gamma", "beta", "parameters", "period")),
        *((name, np.int64) for name in ("start", "add", "finish", "write")),
        *((name, np.float64) for name in ("count", "eps", "slope", "top")),
    ]
)
_UNIT = np.dtype([(name, np.int64) for name in ("run", "c0", "c1", "index")])
"""What a body works on: columns c0 to c1 of a run, over a chunk."""
job_at, unit_at = record(JOB), record(_UNIT)


@inline
def table_of(job: Any) -> Any:
    return array(job.table, (ROWS, job.runs, job.columns), doubles())


@inline
def sums_of(job: Any) -> Any:
    return array(job.sums, (job.chunks, 2, job.runs, job.columns), doubles())


@inline
def least(a: int, b: int) -> int:
    return a if a < b else b


@inline
def chunk(job: Any, index: int, chunk_rows: int) -> tuple[int, int, int, int]:
    """Rows n0 to n1 and their values s0 to s1, of chunks so many rows high."""
    n0, s0 = index // job.pieces * chunk_rows, index % job.pieces * job.piece
    return n0, least(n0 + chunk_rows, job.rows), s0, least(s0 + job.piece, job.size)


@inline
def at(a: Any, run: int, n: int, c: int) -> int:
    """Address of a value."""
    return int(a.address + run * a.run + n * a.row + c * a.column)


@inline
def count_at(job: Any, run: int) -> float:
    """How many values of a channel of a run count."""
    if not job.counts:
        return float(job.count)
    return float(array(job.counts, (job.runs,), doubles())[run])


@inline
def weight_of(job: Any, run: int, n: int) -> float:
    """What a row's values weigh in statistics."""
    if not job.weights:
        return 1.0
    weights = array(job.weights, (job.runs, job.rows // job.weight_samples), doubles())
    return float(weights[run, n // job.weight_samples])


def cut(rows: int, size: int) -> tuple[int, int, int, int]:
    """Rows to a chunk or, of a longer row, values; pieces of a row, and chunks."""
    if size == 1:
        chunk_rows = min(max(-(-rows // 256) * 8, 64), 512)
        return chunk_rows, 1, 1, max(1, -(-rows // chunk_rows))
    chunk_rows, piece, pieces = max(1, CHUNK // size), size, -(-size // CHUNK)
    if pieces > 1:
        piece = -(-size // (pieces * 64)) * 64
        pieces = -(-size // piece)
    return chunk_rows, piece, pieces, -(-rows // chunk_rows) * pieces


@inline
def _fused(job_address: int, run: int, c0: int, c1: int) -> None:
    """A block of columns through both passes; the second begins with what was read last."""
    job = job_at(job_address)
    if job.sums:
        invoke(job.start, job_address, run, c0, c1, 0)
        for attempt in range(2):
            for index in range(job.chunks):
                invoke(job.add, job_address, run, c0, c1, index)
            if not invoke(job.finish, job_address, run, c0, c1, attempt):
                break
    for index in range(job.map_chunks - 1 if job.write else -1, -1, -1):
        invoke(job.write, job_address, run, c0, c1, index)


@kernel()
def drive(job_address: int, phase: int, thread: int, threads: int) -> int:
    """A thread's share of a phase; whether sums have to be taken again."""
    mode, job, again = set_mode(USUAL_MODE), job_at(job_address), 0
    across = -(-job.columns // job.block)
    blocks = job.runs * across
    units = blocks
    if phase >= SUM:
        units *= job.chunks if phase == SUM else job.map_chunks
    for unit in range(units * thread // threads, units * (thread + 1) // threads):
        index, block = unit // blocks, unit % blocks
        run, c0 = block // across, block % across * job.block
        c1 = least(c0 + job.block, job.columns)
        if phase == ALL:
            _fused(job_address, run, c0, c1)
        elif FINISH <= phase <= AGAIN:
            again |= invoke(job.finish, job_address, run, c0, c1, phase - FINISH)
        else:
            step = job.start if phase == START else job.add if phase == SUM else job.write
            invoke(step, job_address, run, c0, c1, index)
    if job.stream:
        fence()
    set_mode(mode)
    return again
