"""The same bits, for each backend by itself: whatever the threads, the memory and the process.

Every test holds one way of computing against the baseline of `support.grid`, over the whole grid.
Of Cython every instruction set is held against the same one.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from fastbn import backends
from fastbn.backends import base
from oracle.arrays import DTYPES
from support.bits import Array, Place, Results, assert_same_bits, run_all
from support.grid import (
    Digests,
    Point,
    Way,
    assert_baseline,
    baseline,
    digests,
    digests_of,
    points_of,
    problem,
    way,
)
from support.machines import MACHINES, pretend
from support.memory import FORMS, WRITEABLE, dense
from support.processes import output
from support.variants import BACKENDS, FUSED, VARIANTS, Variant, activate, environment

MANY = 13
"""More threads than most machines have processors; Numba has so many only if told at its start."""

LYING = {
    "reversed": "dense",
    "strided": "strided",
    "padded inside": "misaligned",
    "padded channels": "dense",
    "misaligned": "unlucky",
    "unlucky": "misaligned",
    "subclass": "strided",  # lies where it lay, and yet takes the way through all checks
}
"""The forms in C order of x and dy, and those of `out` beside them."""


def lying(form: str, out: str) -> Place:
    """x and dy in a form, and `out` in another, full of what must not be left."""
    return lambda x, dy: (FORMS[form](x), FORMS[form](dy), into(out)(x, dy)[2])


def into(form: str) -> Place:
    """`out` alone in a form."""
    return lambda x, dy: (x, dy, WRITEABLE[form](np.full_like(x, np.nan)))


def in_place_of_x(x: Array, dy: Array) -> tuple[Array, Array, Array]:
    x = dense(x)
    return x, dy, x


def in_place_of_dy(x: Array, dy: Array) -> tuple[Array, Array, Array]:
    dy = dense(dy)
    return x, dy, dy


def fused_as_passes(active: Variant, point: Point) -> Results:
    """Fused forward and backward as their two passes each, finalized in NumPy; no plain entries of
    them. What pools channels has no public passes, and is finalized in an order of its own."""
    if point.kind == "group norms":
        return way()(active, point)
    with pytest.MonkeyPatch.context() as patch:
        for fused in FUSED:
            passes = partial(getattr(base.Backend, fused), active.backend)
            patch.setattr(active.backend, fused, passes)
        for plain in ("plain_batch_norm", "plain_backward"):
            patch.setattr(active.backend, plain, base._never_plain)
        patch.setattr(active.backend, "plain_frozen", lambda *fixed: base._never_plain)
        return way(threads=3)(active, point)


COMPILED = [name for name in VARIANTS if name != "numpy"]
COMPUTED: dict[str, Way] = {
    "again": way(),
    **{f"{threads} threads": way(threads=threads) for threads in (2, 7)},
    "out unlucky": way(place=into("unlucky")),
    "fused as passes": fused_as_passes,
}
PLACED: dict[str, Way] = {
    "out dense": way(place=into("dense")),
    "in place of x, 3 threads": way(threads=3, place=in_place_of_x),
    "in place of dy": way(place=in_place_of_dy),
    **{f"{a} x and dy, {b} out": way(threads=3, place=lying(a, b)) for a, b in LYING.items()},
}
"""Seen to by what all instruction sets share."""


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("how", COMPUTED)
def test_way(how: str, name: str) -> None:
    """A number of threads, stores anywhere, a path through the library."""
    assert_baseline(how, name, digests(name, COMPUTED[how]))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in COMPILED if name in BACKENDS])
@pytest.mark.parametrize("how", PLACED)
def test_place(how: str, name: str) -> None:
    """A kind of memory."""
    assert_baseline(how, name, digests(name, PLACED[how]))


@pytest.mark.parametrize(
    ("name", "threads"),
    [*((name, 3) for name in COMPILED), *((name, 1) for name in COMPILED if name in BACKENDS)],
)
@pytest.mark.parametrize("machine", MACHINES)
def test_pretended_machine(machine: str, name: str, threads: int) -> None:
    """Cache sizes, streaming stores and the size of the team."""
    with pretend(serial_below=1, **MACHINES[machine]):
        found = digests(name, way(threads=threads))
    assert_baseline(f"{threads} threads, {machine}", name, found)


@pytest.mark.parametrize("name", COMPILED)
def test_streams_into_rows_that_lie_apart(name: str) -> None:
    """Stores past the caches, whose lines begin at another column in every row."""
    with pretend(serial_below=1, **MACHINES["usual caches, all streams"]):
        found = digests(name, way(place=into("padded inside")))
    assert_baseline("streamed into padded rows", name, found)


@pytest.mark.parametrize("name", BACKENDS)
def test_concurrent_calls(name: str) -> None:
    """Calls from several Python threads at once, each with threads of its own."""
    with activate(name) as active, ThreadPoolExecutor(4) as pool:
        before = active.calls()
        futures = [
            (point, pool.submit(copy_context().run, way(threads=2), active, point))
            for point in points_of(name)
        ]
        found: Digests = {}
        for point, future in futures:
            found |= digests_of(point, future.result(timeout=120))
        assert active.calls() > before
    assert_baseline("concurrent calls", name, found)


PROCESS = """
import json, os, sys
sys.path.append({tests!r})
from support.grid import digests, way
several = way(threads={threads})
first = digests({name!r}, several)
reading, writing = os.pipe()
if os.fork() == 0:
    try:
        with os.fdopen(writing, "w") as pipe:
            json.dump(digests({name!r}, several), pipe)
    finally:
        os._exit(0)
os.close(writing)
with os.fdopen(reading) as pipe:
    print(json.dumps({{"first calls": first, "forked child": json.load(pipe)}}))
"""


@pytest.mark.parametrize("name", BACKENDS)
def test_in_a_process_of_its_own(name: str) -> None:
    """The first calls of a process, and calls of a child forked after them."""
    code = PROCESS.format(tests=str(Path(__file__).parent), threads=MANY, name=name)
    variables = environment(name) | {"NUMBA_NUM_THREADS": str(MANY)}
    for how, found in json.loads(output(code, **variables)).items():
        assert_baseline(how, name, found)


@pytest.mark.parametrize("backend", backends.usable())
def test_a_forward_gives_the_bits_of_its_passes(backend: str) -> None:
    """batch_norm is moments, then normalize."""
    pairs = {"y": "normalize", "mean": "moments.mean", "var": "moments.var"}
    found = baseline(backend)
    for point in (point for point in points_of(backend) if point.kind == "plain"):
        for fused, alone in pairs.items():
            assert found[f"{point}: {fused}"] == found[f"{point}: {alone}"], f"{point}: {fused}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 7), (20, 70, 7, 7), (701, 100)], ids=str)
def test_no_parameters_are_ones_and_zeros(
    variant: Variant, shape: tuple[int, ...], dtype: type[np.generic]
) -> None:
    """gamma and beta that are not given have the bits of ones and zeros."""
    x, dy, gamma, beta = problem(Point(shape, "NCHW", np.dtype(dtype).name))
    parameters = np.ones_like(gamma, dtype), np.zeros_like(beta, dtype)
    assert_same_bits(run_all(x, dy), run_all(x, dy, *parameters))
