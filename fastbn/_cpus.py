"""How many processors this process may use: affinity, and the quota of its cgroup."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from fastbn import backends
from fastbn._cgroups import PROC, ROOT, folders

_AFFINITY = len(os.sched_getaffinity(0))
"""Processors in the affinity mask, as they are before anything that fastbn imports loads OpenMP,
which may bind the main thread to one of them."""


def available_cpus() -> int:
    """The processors that both affinity and the cgroup's CPU quota allow, at least 1."""
    openmp = backends.openmp()
    # Whoever loaded OpenMP before fastbn, it knows what it could choose from.
    allowed = _AFFINITY if openmp is None else openmp.processors()
    return max(1, min([allowed, *(math.ceil(quota) for quota in _cgroup_quotas())]))


def _cgroup_quotas(proc: Path = PROC, root: Path = ROOT) -> Iterator[float]:
    """Every CPU quota, in processors, on the way from this process's cgroups to the root."""
    for folder, version in folders("cpu", proc, root):
        quota = _quota(_version_1 if version == 1 else _version_2, folder)
        if quota is not None:
            yield quota


def _quota(read: Callable[[Path], list[str]], folder: Path) -> float | None:
    """A group's quota in processors; None where it has none, or its files make no sense."""
    try:
        quota, period = map(int, read(folder))
        return quota / period if quota > 0 and period > 0 else None
    except (OSError, ValueError, OverflowError):
        return None


def _version_1(folder: Path) -> list[str]:
    return [(folder / f"cpu.cfs_{what}_us").read_text() for what in ("quota", "period")]


def _version_2(folder: Path) -> list[str]:
    return (folder / "cpu.max").read_text().split()
