"""All calls with all arrays between pages that nobody may touch; for a process of its own.

An array that is read or written a byte past its end, or before its start, ends the process. Where
it was is left in a file.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from pathlib import Path
from random import Random

from oracle.arrays import LAYOUTS
from support.every_call import ALL, Array, Given
from support.grid import TYPES
from support.memory import Guarded
from support.random_arrays import in_layout
from support.variants import activate

AROUND_VECTORS = (*range(1, 41), 63, 64, 65)
LARGE = ((2, 2, 16385), (1025, 3), (2, 5001), (70, 33, 5))


class Log:
    """Where the process is, in a file that survives it."""

    SIZE = 4096

    def __init__(self, path: str) -> None:
        Path(path).write_bytes(bytes(self.SIZE))
        with Path(path).open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), self.SIZE)

    def put(self, words: str) -> None:
        self._memory[:] = words.encode().ljust(self.SIZE, b"\0")

    @staticmethod
    def read(path: str) -> str:
        return Path(path).read_bytes().rstrip(b"\0").decode()


FORMS: tuple[Callable[[int], tuple[int, ...]], ...] = (
    lambda n: (1, n),
    lambda n: (3, n),
    lambda n: (2, 3, n),
    lambda n: (1, 2, n),
    lambda n: (2, n, 3),
    lambda n: (3, n, 2, 1),
)
"""As NCHW words: rows and planes."""


class Places:
    """Where arrays lie, each for as long as a call."""

    def __init__(self, number: int = 32, size: int = 1 << 12) -> None:
        self._ring = [Guarded(size) for _ in range(number)]
        self._next, self.behind = 0, True

    def __call__(self, a: Array) -> Array:
        self._next = (self._next + 1) % len(self._ring)
        guarded = self._ring[self._next]
        if a.nbytes > guarded.size:
            guarded = Guarded(a.nbytes)
        return guarded.place(a, behind=self.behind)


def every(name: str, path: str, few: bool) -> None:
    """Make all calls on a variant; of few types and sizes, where each type is compiled for."""
    log, places, random = Log(path), Places(), Random(0)
    types = ["float32"] if few else list(TYPES)
    shapes = [form(n) for n in AROUND_VECTORS[:: 5 if few else 1] for form in FORMS]
    with activate(name):
        for shape in (*shapes, *LARGE):
            layout, dtype = random.choice(LAYOUTS), random.choice(types)
            places.behind = random.random() < 0.75
            given = Given(in_layout(shape, layout), layout, TYPES[dtype], places)
            side = "behind" if places.behind else "before"
            calls(given, log, f"{name}: {dtype} {shape} {layout}, pages {side}")


def calls(given: Given, log: Log, where: str) -> None:
    for verb, ways in ALL.items():
        for how, call in ways.items():
            log.put(f"{verb} ({how}), {where}")
            call(given)
    log.put("")
