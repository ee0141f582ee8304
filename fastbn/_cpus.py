"""How many processors this process may use: affinity, and the quota of its cgroup."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from fastbn import backends

_AFFINITY = len(os.sched_getaffinity(0))
"""Processors in the affinity mask, as they are before anything that fastbn imports loads OpenMP,
which may bind the main thread to one of them."""


def available_cpus() -> int:
    """The processors that both affinity and the cgroup's CPU quota allow, at least 1."""
    openmp = backends.openmp()
    # Whoever loaded OpenMP before fastbn, it knows what it could choose from.
    allowed = _AFFINITY if openmp is None else openmp.processors()
    return max(1, min([allowed, *(math.ceil(quota) for quota in _cgroup_quotas())]))


def _cgroup_quotas(
    proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> Iterator[float]:
    """Every CPU quota, in processors, on the way from this process's cgroups to the root."""
    try:
        lines = os.fsdecode(proc.read_bytes()).split("\n")
    except OSError:
        return
    for line in lines:
        fields = line.split(":", 2)
        if len(fields) != 3:
            continue
        _, controllers, path = fields
        if not controllers:
            mounts, read = [root], _version_2
        elif "cpu" in controllers.split(","):
            # Controllers that are mounted together share a folder, whose name has them in any
            # order; "cpu" may be a link to it, or not exist.
            mounts = sorted(m for m in root.glob("*cpu*") if "cpu" in m.name.split(","))
            read = _version_1
        else:
            continue
        for mount in mounts:
            # In a container the path may be the host's, not visible here: the mount itself remains.
            group = mount / path.lstrip("/")
            for folder in (group, *group.parents):
                if folder == mount.parent:
                    break
                quota = _quota(read, folder)
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
