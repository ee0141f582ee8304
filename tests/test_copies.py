"""Copies from one memory order to another, and when none is needed."""

from __future__ import annotations

import math
from itertools import pairwise, permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fastbn.layouts import is_view
from support.strategies import any_order

entry = pytest.importorskip("fastbn._ext.entry")

Array = NDArray[Any]
ITEMS = ("u2", "f4", "f8", "f2", "u1", "c16", ">f4")


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Array, Array]:
    lengths = st.sampled_from([1, 2, 3, 7, 8, 9, 15, 16, 17, 33, 64, 70])
    shape = draw(st.lists(lengths, min_size=1, max_size=4).filter(lambda s: math.prod(s) <= 20_000))
    dtype = draw(st.sampled_from(ITEMS))
    a, out = (draw(any_order(tuple(shape), dtype)) for _ in range(2))
    a[...] = np.random.default_rng(0).permutation(a.size).reshape(a.shape).astype(dtype)
    return a, out


@settings(max_examples=400)
@given(pairs(), st.sampled_from([1, 2, 5]))
def test_any_order(pair: tuple[Array, Array], threads: int) -> None:
    """What `numpy.copyto` writes, and nothing beside it."""
    a, out = pair
    entry.copy(a, out, threads)
    np.testing.assert_array_equal(out, a)
    out[...] = 0
    assert not (out if out.base is None else out.base).any()


@pytest.mark.parametrize("dtype", ["u2", "f4", "f8"])
@pytest.mark.parametrize("shape", [(2, 600, 1100), (1, 3, 5000), (3, 130, 513), (700, 1, 530)])
def test_more_than_a_piece(shape: tuple[int, ...], dtype: str) -> None:
    """Both ways, by threads."""
    a = np.random.default_rng(0).permutation(math.prod(shape)).reshape(shape).astype(dtype)
    there = np.empty((shape[0], shape[2], shape[1]), dtype).swapaxes(1, 2)
    entry.copy(a, there, 3)
    np.testing.assert_array_equal(there, a)
    back = np.empty_like(a, order="C")
    entry.copy(there, back, 3)
    np.testing.assert_array_equal(back, a)


@pytest.mark.parametrize("order", list(permutations(range(3))), ids=str)
@pytest.mark.parametrize("steps", [(1, 1, 1), (1, 0, 1), (0, 1, 0), (2, 1, 1), (1, 3, 1)], ids=str)
def test_windows(steps: tuple[int, ...], order: tuple[int, ...]) -> None:
    """What overlaps itself is contiguous along several axes, or has strides of 0."""
    signal, shape = np.arange(100, dtype=np.float32), (5, 9, 17)
    a = np.lib.stride_tricks.as_strided(signal, shape, [4 * step for step in steps])
    out = np.full([shape[axis] for axis in order], -1, np.float32).transpose(np.argsort(order))
    entry.copy(a, out, 2)
    np.testing.assert_array_equal(out, a)


@settings(max_examples=400)
@given(st.data())
def test_is_view(data: st.DataObject) -> None:
    """Just where NumPy's reshape makes no copy."""
    shape = tuple(data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4)))
    a = data.draw(any_order(shape, "f4"))
    factors = [f for n in shape for f in {4: (2, 2), 6: (2, 3)}.get(n, (n,))]
    cuts = data.draw(st.lists(st.integers(0, len(factors)), max_size=4).map(sorted))
    ends = [0, *cuts, len(factors)]
    new = tuple(math.prod(factors[i:j]) for i, j in pairwise(ends))
    assert is_view(a, new) == np.may_share_memory(a.reshape(new), a)
