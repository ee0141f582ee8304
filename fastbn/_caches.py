"""The sizes by which backends order their work: the caches of this machine, and what follows.

No bit of a result depends on them.
"""

from __future__ import annotations

from pathlib import Path


def cache_bytes(
    level: int, default: int, root: Path = Path("/sys/devices/system/cpu/cpu0/cache")
) -> int:
    """Bytes of the processor's data cache at `level`, as the operating system tells it."""
    try:
        for folder in sorted(root.glob("index*")):
            kind = (folder / "type").read_text().strip()
            if (folder / "level").read_text().strip() == str(level) and kind != "Instruction":
                return int((folder / "size").read_text().strip().removesuffix("K")) * 1024
    except (OSError, ValueError):
        pass
    return default


L2 = cache_bytes(2, 1 << 20)
"""A core's own cache: the block of a trip should stay in it."""

SERIAL_BELOW = 128 << 10
"""Operands this small: a second thread costs more than it brings."""

STREAM_FROM = min(48 << 20, cache_bytes(3, 96 << 20) // 2)
"""Operands of a trip this large: results go past the caches, which x and dy need for themselves.

Half of the last cache: with 32 MiB of it, trips on 19 MB of operands gained up to 25 % by
streaming, those on 13 MB lost 20 %. Elementwise work alone streams from twice that: until its
operands exceed the last cache, ordinary stores leave the result where its reader finds it (26 MB:
120 against 165 us).
"""
