"""Where the limits stand that the system sets to this process's cgroups."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

PROC, ROOT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def folders(controller: str, proc: Path = PROC, root: Path = ROOT) -> Iterator[tuple[Path, int]]:
    """Every folder on the way from this process's cgroups to the root, and its version, 1 or 2, of
    the interface; those of version 1 that `controller` is in charge of."""
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
            mounts, version = [root], 2
        elif controller in controllers.split(","):
            # Controllers that are mounted together share a folder, whose name has them in any
            # order; a link may stand for one of them, or not.
            named = (m for m in root.glob(f"*{controller}*") if controller in m.name.split(","))
            mounts, version = sorted(named), 1
        else:
            continue
        for mount in mounts:
            # In a container the path may be the host's, not visible here: the mount itself remains.
            group = mount / path.lstrip("/")
            for folder in (group, *group.parents):
                if folder == mount.parent:
                    break
                yield folder, version
