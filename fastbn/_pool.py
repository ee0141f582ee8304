"""Fresh results: from memory that earlier results gave back, where they are large.

A page that the process has not touched costs more than most of this library's work on it. NumPy
arrays are made from a pool of blocks that stay idle for a while (_ext/pool.pyx, which is a part of
the compiled kernels: without them every array is NumPy's own).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn._cgroups import PROC, ROOT, folders
from fastbn.errors import shown

try:
    from fastbn._ext import pool
except Exception:  # whoever wants the Cython backend is told why
    pool = None  # type: ignore[assignment]

_bound = 0
"""Bytes that may be idle."""

SMALLEST = 1 << 20
"""Bytes of the arrays that are made from the pool; below, malloc keeps what is freed."""
MOST = 512 << 20
"""Idle bytes, unless the environment says otherwise; at most an eighth of the memory there is."""
SECONDS = 10.0
"""Blocks idle for longer go back to the system."""

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """`numpy.empty`, from the pool where the array is large."""
    if pool is None or prod(shape) * dtype.itemsize < SMALLEST:
        return np.empty(shape, dtype)
    return pool.empty(shape, dtype)


def clear_pool() -> None:
    """Give the memory that fastbn keeps for its next results back to the system.

    Results of 1 MiB and more get memory that an earlier one, since deleted, has given back. Such
    memory is kept for ten seconds, or until the next call after that: a process that stops calling
    fastbn keeps it, and may want to call this. How much is kept at most, and how much is:
    `get_config`; the environment variable FASTBN_POOL sets the bound.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> for _ in range(2):
    ...     y = fastbn.batch_norm(np.zeros((16, 16, 64, 64), np.float32)).y
    >>> del y
    >>> fastbn.clear_pool()
    >>> fastbn.get_config()["pool_idle"]
    0
    """
    if pool is not None:
        pool.clear()


def facts() -> dict[str, int]:
    """What `get_config` tells of the pool."""
    idle, hits = (0, 0) if pool is None else pool.usage()
    return {"pool_bound": 0 if pool is None else _bound, "pool_idle": idle, "pool_hits": hits}


def read_environment() -> None:
    """Set the pool's bound; called once, at import."""
    global _bound
    asked = os.environ.get("FASTBN_POOL", "")
    _bound = _asked_bound(asked) if asked else min(MOST, _memory() // 8)
    if pool is not None:
        pool.configure(_bound, SECONDS)


def _asked_bound(asked: str) -> int:
    found = re.fullmatch(r"\s*([0-9]{1,15})\s*([KMG]?)\s*", asked, re.ASCII | re.IGNORECASE)
    if found is None:
        raise ValueError(
            f"environment variable FASTBN_POOL is {shown(asked)}, expected a number of bytes, with "
            "K, M or G behind it or nothing, as 256M, or 0 for no pool; set one of them, or unset "
            "it"
        )
    number, unit = found.groups()
    return min(int(number) * _UNITS[unit.upper()], 1 << 62)


def _memory() -> int:
    """Bytes that this process may use: the machine's, or less in its cgroup."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([machine, *_cgroup_limits()])


def _cgroup_limits(proc: Path = PROC, root: Path = ROOT) -> Iterator[int]:
    """Every limit of memory, in bytes, on the way from this process's cgroups to the root."""
    for folder, version in folders("memory", proc, root):
        name = "memory.max" if version == 2 else "memory.limit_in_bytes"
        try:
            yield max(int((folder / name).read_text()), 0)
        except (OSError, ValueError):  # there is none, or it is "max"
            continue
