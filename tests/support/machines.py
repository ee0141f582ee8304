"""Pretending another machine: the thresholds by which the compiled backends order their work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from fastbn import backends

ALWAYS_STREAM = dict.fromkeys(("stream_planes", "stream_rows", "stream_maps"), 0)
NEVER_STREAM = dict.fromkeys(ALWAYS_STREAM, 1 << 40)

MACHINES = {
    "usual caches, all streams": {
        "l2": 1 << 20,
        "fused_block": 1 << 19,
        "lookahead": 1 << 24,
        "prefetch_from": 0,
        **ALWAYS_STREAM,
    },
    "tiny caches, all streams": {
        "l2": 1 << 12,
        "fused_block": 1 << 10,
        "lookahead": 1 << 12,
        "column_tile": 48,
        "column_tile_streaming": 16,
        "scratch": 1 << 15,
        **ALWAYS_STREAM,
    },
    "vast caches, no streams": {
        "l2": 1 << 30,
        "fused_block": 1 << 28,
        "lookahead": 1 << 30,
        "column_tile": 1 << 20,
        "column_tile_streaming": 1 << 20,
        "prefetch_from": 1 << 40,
        **NEVER_STREAM,
    },
}
"""Threads are worth it on each, even for the smallest array."""


@contextmanager
def pretend(**thresholds: int) -> Iterator[None]:
    """Override thresholds of the compiled backends, by the names of `entry.tune`, in the block."""
    with pytest.MonkeyPatch.context() as patch:
        if "numba" in backends.usable():
            from fastbn.backends.numba import call

            for name, value in thresholds.items():
                if hasattr(call, name.upper()):  # it goes by some of them
                    patch.setattr(call, name.upper(), value)
        if "cython" in backends.usable():
            from fastbn._ext import entry

            in_force = entry.tune()
            entry.tune(**thresholds)
        try:
            yield
        finally:
            if "cython" in backends.usable():
                entry.tune(**in_force)
