"""The same bits, for each backend by itself: whatever the threads, the company and the path."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from bits import Results, assert_same_bits, run_all
from variants import CYTHON, Variant, activate

import fastbn
from benchmarks.oracle import DTYPES, LAYOUTS, Array, channels_of, to_layout
from fastbn.backends.base import Backend
from fastbn.layouts import Arrangement

SHAPES = [(6, 24, 40, 41), (5, 3, 130, 131), (2, 1, 300, 301), (3001, 67), (8, 300, 7, 7)]
"""As NCHW: many channels and few, one, none but rows, small planes; all worth several threads."""

Problem = tuple[Array, Array, Array, Array]


def problem(shape: tuple[int, ...], dtype: Any, layout: str, seed: int = 0) -> Problem:
    rng = np.random.default_rng(seed)
    x = to_layout(rng.normal(3, 2, shape), layout).astype(dtype)
    dy = to_layout(rng.normal(size=shape), layout).astype(dtype)
    gamma, beta = rng.normal(size=(2, channels_of(x, layout))).astype(dtype)
    return x, dy, gamma, beta


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_number_of_threads(
    variant: Variant, shape: tuple[int, ...], dtype: Any, layout: str
) -> None:
    """1, 2, 3 and 7 threads give the same bits, and so does a second run."""
    arguments = problem(shape, dtype, layout)
    with fastbn.use_num_threads(1):
        expected = run_all(*arguments, layout=layout)
    for threads in (2, 3, 7, 2):
        with fastbn.use_num_threads(threads):
            assert_same_bits(run_all(*arguments, layout=layout), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_concurrent_calls(variant: Variant, dtype: Any) -> None:
    """Calls from several Python threads at once give what each gives alone."""
    problems = [
        (problem(shape, dtype, layout, seed), layout)
        for seed, shape in enumerate([(4, 24, 40, 41), (3, 3, 130, 131), (2001, 67), (5, 7)])
        for layout in LAYOUTS
    ]

    def run(item: tuple[Problem, str]) -> Results:
        with fastbn.use_num_threads(2):
            return run_all(*item[0], layout=item[1])

    expected = [run(item) for item in problems]
    with ThreadPoolExecutor(4) as pool:
        futures = [
            pool.submit(copy_context().run, run, item) for _ in range(3) for item in problems
        ]
        for i, future in enumerate(futures):
            assert_same_bits(future.result(timeout=120), expected[i % len(problems)])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 5, 7), (2, 33, 1), (1, 1)], ids=str)
def test_a_trip_gives_its_two_passes_bits(
    variant: Variant, shape: tuple[int, ...], dtype: Any, layout: str
) -> None:
    """Forward is moments then normalize; backward is its two passes; with out or without."""
    x, dy, gamma, beta = problem(shape, dtype, layout)
    y, mean, var = fastbn.batch_norm(x, gamma, beta, layout=layout)
    passes = fastbn.moments(x, layout=layout)
    z = fastbn.normalize(x, *passes, gamma, beta, layout=layout)
    again = fastbn.batch_norm(x, gamma, beta, layout=layout, out=np.empty_like(x))
    for other in ((z, *passes), again):
        assert_same_bits(
            dict(zip(("y", "mean", "var"), other, strict=True)), {"y": y, "mean": mean, "var": var}
        )

    arrangement = Arrangement.of(x, layout)
    views = arrangement.view(dy), arrangement.view(x)
    tables = mean[None], var[None], gamma.astype(np.float64)[None]
    for frozen in (False, True):
        backend, trip, two = variant.backend, np.empty_like(views[1]), np.empty_like(views[1])
        sums = backend.backward(*views, *tables, 1e-5, frozen, trip, 2)
        sums_of_two = Backend.backward(backend, *views, *tables, 1e-5, frozen, two, 2)
        verb = fastbn.normalize_backward if frozen else fastbn.batch_norm_backward
        dx, dgamma, dbeta = verb(dy, x, mean, var, gamma, layout=layout)
        assert dgamma is not None
        assert dbeta is not None
        assert_same_bits(
            {"dx": trip, "dgamma": sums[0], "dbeta": sums[1]},
            {"dx": two, "dgamma": sums_of_two[0], "dbeta": sums_of_two[1]},
        )
        assert_same_bits(
            {"dx": arrangement.view(dx), "dgamma": dgamma, "dbeta": dbeta},
            {
                "dx": two,
                "dgamma": sums_of_two[0][0].astype(dtype),
                "dbeta": sums_of_two[1][0].astype(dtype),
            },
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 7), (4, 24, 20, 21)], ids=str)
def test_the_plain_entry_and_the_walked_path(
    variant: Variant, shape: tuple[int, ...], dtype: Any
) -> None:
    """Arguments that are plain, and equal ones that are not, take two ways to the same bits."""
    x, dy, gamma, beta = problem(shape, dtype, "NCHW")
    apart = np.repeat(gamma, 2)[::2], np.repeat(beta, 2)[::2]
    assert_same_bits(run_all(x, dy, *apart), run_all(x, dy, gamma, beta))
    assert_same_bits(run_all(x, dy), run_all(x, dy, np.ones_like(gamma), np.zeros_like(beta)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pair", list(combinations(CYTHON, 2)), ids=" and ".join)
def test_instruction_sets_agree(pair: tuple[str, str], dtype: Any, layout: str) -> None:
    """Every compiled instruction set gives the same bits."""
    for shape in (*SHAPES, (3, 5, 7), (2, 33, 9), (5, 17, 1), (1, 1), (9, 8, 2, 2)):
        arguments = problem(shape, dtype, layout)
        results = []
        for name in pair:
            with activate(name) as active:
                before = active.calls()
                results.append(run_all(*arguments, layout=layout))
                assert active.calls() > before
        assert_same_bits(*results)
