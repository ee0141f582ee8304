"""A grid of problems, and what one way of computing gives on it: one digest for each result.

A digest tells equal bits from others without keeping the results, so that every way can be held
against one baseline over the whole grid: one thread, dense arrays, fresh results. All instruction
sets share the baseline of one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np

import fastbn
from oracle.arrays import DTYPES, HALVES, LAYOUTS, channels_of, to_layout
from support.bits import (
    Array,
    Place,
    Results,
    as_given,
    run_all,
    run_fused,
    run_group_norms,
    run_masked,
)
from support.variants import VARIANTS, Variant, activate

# As NCHW words. Values and bytes decide: 16384 values make a chunk of planes, 64 to 1024 rows one
# of rows, 128 KiB of operands are worth a second thread and a MB more than ten.
SHAPES: tuple[tuple[int, ...], ...] = (
    # a single value, or few; broken lanes; empty axes
    (1, 1),
    (5, 17, 1),
    (3, 5, 7),
    (3, 2, 33),
    # tiny planes, which rows may hold; rank 5
    (9, 8, 2, 2),
    (2, 3, 2, 2, 3),
    (5001, 3, 2, 2),
    # planes: several chunks of several samples; channels more and fewer than threads
    (12, 70, 7, 7),
    (3, 300, 7, 7),
    (700, 3, 49),
    (12, 17, 13, 17),
    (3, 15, 2, 13, 17),
    (3, 24, 30, 31),
    # planes in pieces
    (2, 2, 130, 131),
    (1, 1, 40000),
    (2, 3, 16500),
    # rows: narrow and folded with a broken last one, whole lanes, broken lanes, long, and so wide
    # that they are worked on in parts
    (9001, 3),
    (4003, 16),
    (701, 100),
    (1501, 67),
    (66, 5000),
    (2, 5001),
    (2, 20_003),
)
OF_SAMPLES: tuple[tuple[int, ...], ...] = (
    # rows: narrow, broken lanes, whole ones, in pieces
    *((4003, 12), (701, 100), (1501, 48), (3, 20_000)),
    # planes: tiny, of groups in pieces, of a vector's width and more
    *((601, 8, 2), (12, 70, 7, 7), (3, 300, 7, 7), (12, 18, 13, 17), (2, 4, 130, 131)),
)
"""Those of group norm and its like, whose groups are samples' own."""
EXTREME = {"float64": 1e153}
"""Values of this size have squares whose sum overflows."""
TYPES = {np.dtype(dtype).name: dtype for dtype in (*DTYPES, *HALVES)}


class Point(NamedTuple):
    """One problem of the grid."""

    shape: tuple[int, ...]
    layout: str
    dtype: str
    kind: str = "plain"
    """What is asked for, by the names of RUNS."""

    def __str__(self) -> str:
        return f"{self.shape} {self.layout} {self.dtype} {self.kind}"


RUNS = {"plain": run_all, "fused": run_fused, "masked": run_masked, "group norms": run_group_norms}
"""Fused: with activations and a residual. Masked: with `where`, and with `weights`. Group norms:
of one, of some and of as many groups as channels."""


GRID = tuple(
    Point(shape, layout, dtype, kind)
    for shapes, dtypes, kind in (
        (SHAPES, ("float32", "float64"), "plain"),
        (SHAPES[1::4], ("float16", "bfloat16"), "plain"),
        (SHAPES[2::5], ("float32", "bfloat16"), "fused"),
        (SHAPES[3::9], ("float64", "float16"), "fused"),
        (SHAPES[::3], ("float32",), "masked"),
        (SHAPES[4::9], ("float64", "bfloat16"), "masked"),
        (OF_SAMPLES, ("float32", "bfloat16"), "group norms"),
        (OF_SAMPLES[1::3], ("float64", "float16"), "group norms"),
    )
    for shape in shapes
    for layout in LAYOUTS
    for dtype in dtypes
)

Problem = tuple[Array, Array, Array, Array]
Way = Callable[[Variant, Point], Results]
Digests = dict[str, str]
"""By point and result."""


@cache
def problem(point: Point) -> Problem:
    """x, dy, gamma and beta, which nobody may change; some channels need a second summation."""
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(2, *point.shape))
    x = 3 + 2 * x
    n, channels = point.shape[:2]
    x[:, 4::7] *= EXTREME.get(point.dtype, 1.0)
    starts = x.reshape(n, channels, -1)[0, :, 0]
    starts[n % 3 :: 3] = 1e4  # outliers: a bad shift
    x, dy = (to_layout(a, point.layout).astype(TYPES[point.dtype]) for a in (x, dy))
    # In float64, so that the sums of gradients are given unrounded.
    gamma, beta = rng.normal(size=(2, channels_of(x, point.layout)))
    for a in (x, dy, gamma, beta):
        a.flags.writeable = False
    return x, dy, gamma, beta


def way(*, threads: int = 1, place: Place = as_given) -> Way:
    """All functions with some number of threads, their arrays in some places."""

    def compute(active: Variant, point: Point) -> Results:
        with fastbn.use_num_threads(threads):
            run = RUNS[point.kind]
            return run(*problem(point), layout=point.layout, place=place)

    return compute


def points_of(name: str) -> tuple[Point, ...]:
    """The variant's grid: Numba compiles for each type and kind, of which some will do. NumPy has
    neither threads nor chunks nor parts, and takes one channel after the other, or one of a sample:
    a third of what is not too wide will do."""
    if name == "numba":
        single = tuple(point for point in GRID if point.dtype == "float32")
        return single + tuple(
            point for point in GRID[::4] if point.kind == "plain" and point not in single
        )
    if name != "numpy":
        return GRID

    def channels(point: Point) -> int:
        samples, wide = point.shape[:2]
        return wide * samples if point.kind == "group norms" else wide

    return tuple(point for point in GRID[::3] if channels(point) < 2000)


def digests(name: str, compute: Way) -> Digests:
    """What a way gives on the variant `name`, which runs at every point, from the grid's end."""
    found: Digests = {}
    with activate(name) as active:
        for point in reversed(points_of(name)):
            before = active.calls()
            found |= digests_of(point, compute(active, point))
            assert active.calls() > before, f"{name} did not run"
    return found


def digests_of(point: Point, results: Results) -> Digests:
    return {f"{point}: {name}": _digest(a) for name, a in results.items()}


def assert_baseline(how: str, name: str, found: Digests) -> None:
    """A variant's digests are those of its backend's baseline; if not, tell which way and where."""
    expected = baseline(name.partition("-")[0])
    assert not found.keys() ^ expected.keys(), f"{how}: not the results of the whole grid"
    wrong = [where for where, digest in found.items() if digest != expected[where]]
    listed = "\n".join(wrong[:20])
    assert not wrong, f"{how}, {name}: {len(wrong)} of {len(found)} results differ:\n{listed}"


@cache
def baseline(backend: str) -> Digests:
    """What a backend gives with one thread and dense arrays, when it is first asked."""

    def compute(active: Variant, point: Point) -> Results:
        results = way()(active, point)
        for result, a in results.items():
            assert not np.isnan(a).any(), f"{point}: {result}"
        return results

    return digests([v for v in VARIANTS if v.partition("-")[0] == backend][-1], compute)


def _digest(a: Array) -> str:
    """Of type, shape and bits."""
    digest = hashlib.blake2b(f"{a.dtype.str} {a.shape}".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(a).view(np.uint8).data)
    return digest.hexdigest()
