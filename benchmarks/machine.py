"""The machine: what its tables are headed with, and the cache sizes that plots show."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


@dataclass(frozen=True)
class Machine:
    cpu: str
    cores: int
    """Processors that this process may use."""
    l1: int | None
    """Bytes of a core's data cache; None where the system does not say, as with the others."""
    l2: int | None
    """Bytes of a core's cache."""
    l3: int | None
    memory: int
    """Bytes."""
    system: str
    python: str

    def __str__(self) -> str:
        caches = (("L1d", self.l1), ("L2", self.l2), ("L3", self.l3))
        sizes = ", ".join(f"{name} {binary(size)}" for name, size in caches if size)
        return (
            f"{self.cpu}, {self.cores} cores; {sizes or 'cache sizes unknown'}; "
            f"{self.memory / 2**30:.0f} GiB of memory; {self.system}; "
            f"Python {self.python}"
        )


def this_machine(cores: int) -> Machine:
    release, *_ = platform.release().split("-")
    return Machine(
        cpu=processor(),
        cores=cores,
        l1=cache_size("1", "Data"),
        l2=cache_size("2", "Unified"),
        l3=cache_size("3", "Unified"),
        memory=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        system=f"{platform.system()} {release} {platform.machine()}",
        python=platform.python_version(),
    )


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.machine()


def cache_size(level: str, kind: str, caches: Path = CACHES) -> int | None:
    """Bytes of one cache of the first processor."""
    for folder in sorted(caches.glob("index*")):
        try:
            here = (folder / "level").read_text().strip(), (folder / "type").read_text().strip()
            if here == (level, kind):
                return int((folder / "size").read_text().strip().removesuffix("K")) << 10
        except (OSError, ValueError):
            continue
    return None


def available_memory() -> int:
    """Bytes that new arrays may take."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def binary(size: int) -> str:
    """Bytes as KiB or MiB."""
    return f"{size / 2**20:g} MiB" if size >= 1 << 20 else f"{size / 2**10:g} KiB"
