"""oneDNN in its own layout: blocks of 16 channels (nChw16c) where it has AVX-512, of 8 elsewhere.

Another layout than NumPy arrays have, so its times are shown beside the peers', not among them.
"""

from __future__ import annotations

import numpy as np

from benchmarks.cells import Cell
from benchmarks.data import Array, Data
from benchmarks.libraries import Task
from benchmarks.libraries.of_onednn import Work, block, reads, vectors
from benchmarks.libraries.of_onednn import version as version

BLOCK = block()


def prepare(cell: Cell, data: Data) -> Task | None:
    if (cell.dtype, cell.layout) != ("float32", "NCHW") or cell.channels % BLOCK or cell.is_fused:
        return None
    arrays = vectors(cell, data) | {name: to_blocks(getattr(data, name)) for name in reads(cell)}
    arrays["out"] = np.full_like(arrays[reads(cell)[0]], np.nan)
    work = Work(cell, "tag_blocked", arrays, data.eps)
    return work.task(cell.output == "fresh", from_blocks)


def to_blocks(a: Array) -> Array:
    n, c, h, w = a.shape
    blocks = a.reshape(n, c // BLOCK, BLOCK, h, w).transpose(0, 1, 3, 4, 2)
    return np.ascontiguousarray(blocks)


def from_blocks(a: Array) -> Array:
    n, blocks, h, w, _ = a.shape
    return a.transpose(0, 1, 4, 2, 3).reshape(n, blocks * BLOCK, h, w)
