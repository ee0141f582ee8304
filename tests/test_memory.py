"""Where and how an array lies changes no bit of the results, and no input is ever changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fastbn
from oracle.arrays import DTYPES, LAYOUTS, Array, channels_of
from support.bits import assert_same_bits, run_all
from support.memory import FORMS, dense_in_its_order
from support.pairs import paired
from support.variants import Variant, each_backend

SHAPES = [(5, 7), (3, 17, 9), (2, 5, 6, 7), (3, 2, 2, 3, 5)]


def problem(shape: tuple[int, ...], dtype: Any, layout: str) -> tuple[Array, Array, Array, Array]:
    rng = np.random.default_rng(3)
    x, dy = rng.normal(1, 2, (2, *shape)).astype(dtype)
    gamma, beta = rng.normal(size=(2, channels_of(x, layout))).astype(dtype)
    return x, dy, gamma, beta


@each_backend
@paired(form=FORMS, shape=SHAPES, dtype=DTYPES, layout=LAYOUTS)
def test_form_of_x(
    variant: Variant, form: str, shape: tuple[int, ...], dtype: Any, layout: str
) -> None:
    """x in any form has the bits of its dense copy in the same memory order; so y lies as x."""
    x, dy, gamma, beta = problem(shape, dtype, layout)
    x = FORMS[form](x)
    twin = dense_in_its_order(x)
    results = run_all(x, dy, gamma, beta, layout=layout)
    assert_same_bits(results, run_all(twin, dy, gamma, beta, layout=layout))
    for name in ("y", "normalize", "batch_norm_backward(params=True).dx"):
        assert results[name].strides == twin.strides, name
        assert type(results[name]) is np.ndarray


@each_backend
@paired(form=FORMS, dtype=DTYPES, layout=LAYOUTS)
def test_form_of_dy_and_the_vectors(variant: Variant, form: str, dtype: Any, layout: str) -> None:
    """dy, gamma, beta, mean and var in any form have the bits of their dense copies."""
    x, dy, gamma, beta = problem((3, 6, 5, 4), dtype, layout)
    expected = run_all(x, dy, gamma, beta, layout=layout)
    if form != "channels-last":  # nothing a vector has
        g, b = (FORMS[form](v[:, None, None])[:, 0, 0] for v in (gamma, beta))
        assert_same_bits(run_all(x, dy, g, b, layout=layout), expected)
        m, v = (FORMS[form](expected[k][:, None, None])[:, 0, 0] for k in ("mean", "var"))
        y = fastbn.normalize(x, m, v, gamma, beta, layout=layout)
        dx = fastbn.batch_norm_backward(dy, x, m, v, gamma, layout=layout).dx
        wanted = expected["batch_norm_backward(params=True).dx"]
        assert_same_bits({"y": y, "dx": dx}, {"y": expected["normalize"], "dx": wanted})
    results = run_all(x, FORMS[form](dy), gamma, beta, layout=layout)
    for name in [name for name in results if name.startswith("normalize_backward(params=False)")]:
        # Here dy is alone: the results lie as it does, which changes no value.
        np.testing.assert_array_equal(results.pop(name), expected.pop(name))
    assert_same_bits(results, expected)


@each_backend
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("axes", [(0,), (1,), (3,), (2, 3), (0, 1, 2, 3)], ids=str)
def test_broadcast_inputs(variant: Variant, axes: tuple[int, ...], layout: str) -> None:
    """x and dy with strides of 0 have the bits of their dense copies."""
    full = (3, 6, 5, 4)
    x, dy, gamma, beta = problem(full, np.float32, layout)
    first = tuple(slice(0, 1) if axis in axes else slice(None) for axis in range(4))
    x, dy = (np.broadcast_to(a[first], full) for a in (x, dy))
    results = run_all(x, dy, gamma, beta, layout=layout)
    twins = np.ascontiguousarray(x), np.ascontiguousarray(dy)
    assert_same_bits(results, run_all(*twins, gamma, beta, layout=layout))
    assert results["y"].flags.c_contiguous


@each_backend
@pytest.mark.parametrize("layout", LAYOUTS)
def test_overlapping_windows(variant: Variant, layout: str) -> None:
    """An x that overlaps itself is read where it lies or copied, never wrong."""
    signal = np.random.default_rng(0).normal(size=60).astype(np.float32)
    x = np.lib.stride_tricks.sliding_window_view(signal, 21)
    dy = x[::-1]
    got, expected = (fastbn.batch_norm(a, layout=layout) for a in (x, np.ascontiguousarray(x)))
    np.testing.assert_allclose(got.y, expected.y, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(got.mean, expected.mean, rtol=1e-12)
    dx = fastbn.batch_norm_backward(dy, x, got.mean, got.var, layout=layout).dx
    plain = fastbn.batch_norm_backward(
        np.ascontiguousarray(dy), np.ascontiguousarray(x), got.mean, got.var, layout=layout
    ).dx
    np.testing.assert_allclose(dx, plain, rtol=1e-5, atol=1e-6)


@each_backend
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_inputs_are_never_modified_and_never_given_back(
    variant: Variant, form: str, layout: str
) -> None:
    """No bit of an input changes, and no result shares memory with an input or another result."""
    arrays = problem((3, 6, 5, 4), np.float64, layout)
    x, dy = (FORMS[form](a) for a in arrays[:2])
    gamma, beta = arrays[2:]
    inputs = {"x": x, "dy": dy, "gamma": gamma, "beta": beta}
    before = {name: a.tobytes() for name, a in inputs.items()}
    results = run_all(x, dy, gamma, beta, layout=layout)
    assert {name: a.tobytes() for name, a in inputs.items()} == before
    named = [*inputs.items(), *results.items()]
    for i, (name, a) in enumerate(results.items(), start=len(inputs)):
        assert a.flags.writeable
        assert a.dtype.isnative
        for other, b in named[:i]:
            assert not np.may_share_memory(a, b), f"{name} shares memory with {other}"


@each_backend
@pytest.mark.parametrize("wrap", [np.array, np.ascontiguousarray, lambda a: a[:]])
def test_statistics_given_back_are_plain_vectors(
    variant: Variant, wrap: Callable[[Array], Array]
) -> None:
    """mean and var are contiguous (C,) arrays of their own that may be kept and changed."""
    x = wrap(np.random.default_rng(0).normal(size=(4, 3, 2)).astype(np.float32))
    _, mean, var = fastbn.batch_norm(x)
    kept = var.copy()
    mean += 1
    assert mean.shape == var.shape == (3,)
    assert mean.flags.c_contiguous
    np.testing.assert_array_equal(var, kept)
    np.testing.assert_array_equal(fastbn.moments(x).var, kept)
