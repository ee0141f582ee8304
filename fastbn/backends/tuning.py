"""The sizes by which backends order their work: the caches of this machine, and what follows.

No bit of a result depends on them, but for MOST_FOLDED, which is the same everywhere. The compiled
kernels read them by name (`Tuning` in _ext/schedule.pxi); `fastbn._ext.entry.tune` overrides them
for experiments.
"""

from __future__ import annotations

from math import ceil, lcm
from pathlib import Path


def cache_bytes(
    level: int, default: int, root: Path = Path("/sys/devices/system/cpu/cpu0/cache")
) -> int:
    """Bytes of the processor's data cache at `level`, as the operating system tells it."""
    try:
        for folder in sorted(root.glob("index*")):
            kind = (folder / "type").read_text().strip()
            if (folder / "level").read_text().strip() == str(level) and kind != "Instruction":
                size = int((folder / "size").read_text().strip().removesuffix("K")) * 1024
                return size if size > 0 else default
    except (OSError, ValueError):
        pass
    return default


L2 = cache_bytes(2, 1 << 20)
"""A core's own cache."""

FUSED_BLOCK = max(L2 // 2, min(L2, 512 << 10))
"""Operands of a block that goes through both passes, of which the second walk should find most in
a core's own cache. Where that is 512 KiB, all of it: a quarter was 8 to 45 % slower, forward and
backward in NCHW, at all sizes. What lies together in memory is short then, and each block costs its
beginning.
"""

SERIAL_BELOW = 128 << 10
"""Operands this small: a second thread costs more than it brings."""

LAST = min(96 << 20, cache_bytes(3, 96 << 20))
"""The cache that cores share."""

LOOKAHEAD = LAST // 2
"""While a block of a fused walk is written the next is fetched, if the two blocks of all threads
stay below this: (32, 256, 56, 56) forward in NCHW 8.5 -> 7.7 ms.
"""

STREAM_PLANES = LAST // 2
"""Operands of a fused walk over planes this large: results go past the caches, which x and dy need
for themselves.

With 32 MiB of last cache, streaming lost 20 % at 15 MiB of operands, was level at 18 and gained
24 to 30 % at 23.
"""

STREAM_ROWS = LAST * 3 // 4
"""The same for rows, of which the second walk wants everything again: ordinary stores won by 20 to
40 % up to 23 MiB, streaming by 15 to 70 % at 24 to 37.
"""

STREAM_MAPS = LAST
"""The same for elementwise work alone: until its operands exceed the last cache, ordinary stores
leave the result where its reader finds it (24 MiB: 220 to 270 against 305 us).
"""

COLUMN_TILE = 1024
"""Values of a row, of all operands, whose tables stay in L1: so many columns are summed together,
in so many rows that there are about as many values; they share the fetching of the tables.
"""

COLUMN_TILE_STREAMING = 128
"""The same values for rows beyond the caches: several rows at once are more streams than the memory
follows (39 against 70 GB/s for the sums of gradients, which read two arrays). Twice as many of half
types (bfloat16 rows of 64: 8.8 -> 7.7 ms).
"""

PREFETCH_FROM = 8 * L2
"""Operands of a thread this large are fetched before they are needed. Below, the processor's own
fetching is enough, and ours only takes the time of loads: without it sums of gradients in L2 take
1.2 to 1.7 ns for 16 pairs instead of 1.9 to 2.2, and at 13 MB of operands two threads are 5 to 20 %
faster; at 50 they are up to twice as slow.
"""

SCRATCH = 1000 << 10
"""Bytes of tables of one call that are never too many: with their padding, up to 1 MiB."""

SCRATCH_PART = 50
"""Above that, the tables may take this part of the array; wide arrays with few values a channel are
worked on in parts.
"""

CALLS_SHARE = 0.6
"""The share of these limits for tables that `_run` makes; compiled kernels have the rest."""

CHANNEL_BYTES = 160
"""Of tables, for a channel of one run, of verbs that make some: up to twenty float64 vectors at a
time."""

RUN_BYTES = 32
"""Of tables that a fused walk is given and gives, for each channel of each run."""
SUM_BYTES = 16
"""The same for each channel of one run: its two sums or statistics alone."""
ROW_BYTES = 24
"""The same for each row."""

MOST_FOLDED = 1280
"""Columns that narrow rows are folded into at most, several samples to a row."""


def scratch(array_bytes: int, share: float) -> int:
    """A share of the bytes that tables may take beside an array."""
    return int(max(SCRATCH, array_bytes // SCRATCH_PART) * share)


def parts(channels: int, size: int, limit: int, channel_bytes: int, pool: int = 1) -> list[slice]:
    """The channels, of `size` values a sample, in parts whose tables stay below a limit.

    A part is whole vectors, and whole groups of `pool` channels, or has more columns than are ever
    folded, so that it has no other bits than the whole array; what cannot be divided so is one.
    """
    whole = lcm(16, pool)
    most = max(limit // channel_bytes // whole, 1) * whole
    if channels <= most:
        return [slice(0, channels)]
    widest = MOST_FOLDED // 2 // size + 1
    last = channels if channels % whole == 0 else (channels - widest) // whole * whole
    if last <= 0:
        return [slice(0, channels)]
    step = ceil(last / (ceil(last / most) * whole)) * whole
    ends = [*range(step, last, step), last, *([channels] if last < channels else [])]
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
