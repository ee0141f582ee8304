"""Every case of `oracle.hard` within its bounds, in every kernel's shape of work.

The bounds are asked of dense arrays on one thread. Strided memory and more threads are then asked
for the same bits, which is both cheaper and stronger.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

import fastbn
from oracle.arrays import DTYPES, LAYOUTS, Array, rows, to_layout
from oracle.hard import Hard, hard_data
from support.bits import Results, assert_same_bits, of_channels, run_all
from support.judge import check_everything
from support.memory import strided
from support.variants import Variant

PLANES = [(2, 19, 7, 7), (3, 2, 500), (2, 1, 8209)]
"""As NCHW: small planes and long ones, several chunks of a plane."""
ROWS = [(40, 17), (2, 5), (600, 3)]
"""Many and few, in several chunks: of either layout."""

CASES = [
    pytest.param(case, dtype, id=f"{np.dtype(dtype)}-{name}")
    for dtype in DTYPES
    for name, case in hard_data(dtype).items()
]


def finite_channels(x: Array, layout: str) -> Array:
    """Which channels hold no NaN and no infinity."""
    return np.asarray(np.isfinite(rows(x, layout)).all(1))


def check_poisoned(x: Array, results: Results, clean: Results, layout: str) -> None:
    """NaN and infinity spoil their own channel, and change no bit of any other."""
    finite = finite_channels(x, layout)
    assert_same_bits(of_channels(results, finite, layout), of_channels(clean, finite, layout))
    spoilt = of_channels(results, ~finite, layout)
    for name in ("y", "mean", "var", "batch_norm_backward(params=True).dx"):
        assert not np.isfinite(spoilt[name]).any(), name


@pytest.mark.parametrize(("case", "dtype"), CASES)
def test_hard_data(variant: Variant, case: Hard, dtype: Any) -> None:
    """All functions are within their bounds on hard data, in any memory, on any threads."""
    for shape, layout in [*product(PLANES, LAYOUTS), *((shape, "NHWC") for shape in ROWS)]:
        p = case.problem(shape, dtype)
        x, dy = to_layout(p.x, layout), to_layout(p.dy, layout)
        rest: dict[str, Any] = {"gamma": p.gamma, "beta": p.beta, "eps": p.eps, "layout": layout}
        clean = np.where(np.isfinite(x), x, 0)
        with fastbn.use_num_threads(1):
            check_everything(clean, dy, **rest)
            expected = run_all(clean, dy, **rest)
            check_poisoned(x, run_all(x, dy, **rest), expected, layout)
        with fastbn.use_num_threads(2):
            assert_same_bits(run_all(strided(clean), strided(dy), **rest), expected)
