"""Folding: the same function, in the right types, or a clear refusal."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fastbn
from oracle.arrays import DTYPES, Array
from oracle.bounds import unit
from oracle.formulas import rstd_of
from support.judge import assert_within
from support.memory import FORMS

RNG = np.random.default_rng


def convolved(x: Array, weight: Array, groups: int) -> Array:
    """A convolution without padding: (N, in, ...) by (out, in / groups, ...)."""
    kernel = weight.shape[2:]
    axes = tuple(range(2, x.ndim))
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel, axes) if kernel else x
    n, parts = x.ndim - 2, []
    for part, w in zip(np.split(windows, groups, 1), np.split(weight, groups), strict=True):
        over = [1, *range(2 + n, 2 + 2 * n)], [1, *range(2, 2 + n)]
        parts.append(np.moveaxis(np.tensordot(part, w, over), -1, 1))
    return np.concatenate(parts, 1)


def convolved_back(x: Array, weight: Array, groups: int) -> Array:
    """A transposed convolution without padding: (N, in, ...) by (in, out / groups, ...)."""
    kernel, places = weight.shape[2:], x.shape[2:]
    size = [s + k - 1 for s, k in zip(places, kernel, strict=True)]
    parts = []
    for part, w in zip(np.split(x, groups, 1), np.split(weight, groups), strict=True):
        y = np.zeros((x.shape[0], w.shape[1], *size))
        for at in np.ndindex(*kernel):
            where = tuple(slice(a, a + s) for a, s in zip(at, places, strict=True))
            product = np.tensordot(part, w[(slice(None), slice(None), *at)], (1, 0))
            y[(slice(None), slice(None), *where)] += np.moveaxis(product, -1, 1)
        parts.append(y)
    return np.concatenate(parts, 1)


def exact_statistics(channels: int) -> dict[str, Any]:
    """Whole numbers and powers of two: with eps = 0 no rounding anywhere."""
    rng = RNG(1)
    return {
        "mean": rng.integers(-9, 9, channels).astype(np.float64),
        "var": 4.0 ** rng.integers(-3, 4, channels),
        "gamma": rng.choice([-2.0, 0.5, 4.0], channels),
        "beta": rng.integers(-9, 9, channels).astype(np.float64),
    }


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kernel", [(), (3,), (2, 3), (2, 1, 2)], ids=str)
def test_a_convolution_and_its_batch_norm_are_one_convolution(
    kernel: tuple[int, ...], transposed: bool, groups: int, biased: bool
) -> None:
    """Of every rank, transposed or not, with groups: to the bit where nothing is rounded."""
    rng, ins, outs = RNG(0), 6, 12
    shape = (ins, outs // groups) if transposed else (outs, ins // groups)
    weight = rng.integers(-9, 9, (*shape, *kernel)).astype(np.float64)
    bias = rng.integers(-9, 9, outs).astype(np.float64) if biased else None
    x = rng.integers(-9, 9, (2, ins, *(5 for _ in kernel))).astype(np.float64)
    statistics = exact_statistics(outs)
    apply = convolved_back if transposed else convolved
    places = (1, -1, *(1 for _ in kernel))
    y = apply(x, weight, groups) + (0 if bias is None else bias.reshape(places))
    expected = fastbn.normalize(y, **statistics, eps=0.0)
    folded = fastbn.fold_into_conv(
        weight, bias, **statistics, eps=0.0, transposed=transposed, groups=groups
    )
    got = apply(x, folded.weight, groups) + folded.bias.reshape(places)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("before", [False, True])
def test_a_linear_layer_and_its_batch_norm_are_one_layer(before: bool, biased: bool) -> None:
    """On either side of the layer."""
    rng = RNG(0)
    weight = rng.integers(-9, 9, (5, 7)).astype(np.float64)
    bias = rng.integers(-9, 9, 5).astype(np.float64) if biased else None
    x = rng.integers(-9, 9, (4, 7)).astype(np.float64)
    statistics = exact_statistics(7 if before else 5)

    def layer(a: Array) -> Array:
        y: Array = a @ weight.T + (0 if bias is None else bias)
        return y

    def norm(a: Array) -> Array:
        return fastbn.normalize(a, **statistics, eps=0.0)

    folded = fastbn.fold_into_linear(weight, bias, **statistics, eps=0.0, before=before)
    expected = layer(norm(x)) if before else norm(layer(x))
    np.testing.assert_array_equal(x @ folded.weight.T + folded.bias, expected)


@pytest.mark.parametrize("given", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_value_is_rounded_once(dtype: Any, given: Any) -> None:
    """Weights and biases come in their own types, within their own roundings."""
    rng = RNG(0)
    weight, bias = rng.normal(size=(9, 4, 3)).astype(dtype), rng.normal(size=9).astype(given)
    mean, gamma, beta = (v.astype(given) for v in rng.normal(size=(3, 9)))
    var = rng.exponential(size=9).astype(given)
    folded = fastbn.fold_into_conv(weight, bias, mean, var, gamma, beta)
    w, b, m, v, g, s = (a.astype(np.longdouble) for a in (weight, bias, mean, var, gamma, beta))
    scale = g * rstd_of(v, 1e-5)
    assert folded.weight.dtype == dtype
    assert folded.bias.dtype == given
    exact = w * scale[:, None, None]
    assert_within(folded.weight, exact, 2 * unit(dtype) * abs(exact), "weight")
    size = abs((b - m) * scale) + abs(s)
    assert_within(folded.bias, (b - m) * scale + s, 2 * unit(given) * size, "bias")
    alone = fastbn.fold_into_conv(weight, None, mean, var)
    assert alone.bias.dtype == dtype


def test_subnormal_results_are_zero() -> None:
    """A weight or bias below the normal numbers of its type becomes 0, of either sign."""
    weight = np.array([[1e-30, -1e-30, 1.0], [1e-39, -1e-39, 1.0]], np.float32)
    one = np.ones(2)
    folded = fastbn.fold_into_linear(
        weight, np.array([1e-39, 2.0], np.float32), 0 * one, one, np.array([1e-9, 1.0]), eps=0.0
    )
    np.testing.assert_array_equal(folded.weight, np.array([[0, 0, 1e-9], [0, 0, 1]], np.float32))
    np.testing.assert_array_equal(folded.bias, np.array([0, 2], np.float32))


def test_a_channel_without_variance_is_its_beta() -> None:
    """Where var + eps is 0, as `normalize` has it."""
    folded = fastbn.fold_into_linear(
        np.ones((2, 3)), None, np.ones(2), np.array([0.0, 4.0]), None, np.array([7.0, 0.0]), eps=0.0
    )
    np.testing.assert_array_equal(folded.weight, [[0, 0, 0], [0.5, 0.5, 0.5]])
    np.testing.assert_array_equal(folded.bias, [7, -0.5])


@pytest.mark.parametrize("form", FORMS)
def test_any_memory_and_new_arrays(form: str) -> None:
    """Weights in any form give what their dense copies do, share nothing, and stay as they are."""
    plain = RNG(0).normal(size=(4, 6, 3, 3)).astype(np.float32)
    weight, statistics = FORMS[form](plain), exact_statistics(4)
    before = weight.tobytes()
    for groups in (1, 2):
        folded = fastbn.fold_into_conv(weight, None, **statistics, groups=groups)
        expected = fastbn.fold_into_conv(plain, None, **statistics, groups=groups)
        np.testing.assert_array_equal(folded.weight, expected.weight)
        assert folded.weight.dtype.isnative
        assert folded.weight.flags.c_contiguous
        assert type(folded.weight) is np.ndarray
        assert not np.may_share_memory(folded.weight, weight)
    assert weight.tobytes() == before


ONE, FOUR = np.ones(6), np.ones((6, 4, 3))
BAD: list[tuple[str, dict[str, Any], type[Exception], tuple[str, ...]]] = [
    ("weight", {"weight": [[1.0]]}, TypeError, ("weight is a list", "numpy.asarray")),
    ("weight", {"weight": FOUR.astype(int)}, TypeError, ("weight has dtype int64", "astype")),
    ("weight", {"weight": ONE}, ValueError, ("weight has rank 1", "rank 2 or more")),
    ("bias", {"bias": np.ones(4)}, ValueError, ("bias has shape (4,)", "6 output channels")),
    ("mean", {"mean": np.ones(4)}, ValueError, ("mean has shape (4,)", "(axis 0 of shape (6, 4")),
    ("gamma", {"gamma": ONE[:, None]}, ValueError, ("gamma has shape (6, 1)", "shape (6,)")),
    ("beta", {"beta": 1.0}, TypeError, ("beta is a float", "numpy.ndarray")),
    ("var", {"var": -ONE}, ValueError, ("var[0] is -1.0", "negative")),
    ("var", {"var": np.where(np.arange(6) == 3, np.nan, 1)}, ValueError, ("var[3] is nan",)),
    ("eps", {"eps": -1.0}, ValueError, ("eps is -1.0", "zero or more")),
    ("groups", {"groups": 4}, ValueError, ("groups is 4", "divisor of 6")),
    ("groups", {"groups": 0}, ValueError, ("groups is 0", "divisor of 6")),
    ("groups", {"groups": 2.0}, TypeError, ("groups is a float", "whole number")),
    ("transposed", {"transposed": 1}, TypeError, ("transposed is an int", "True or False")),
    ("transposed", {"transposed": True}, ValueError, ("4 output channels (axis 1",)),
    (
        "transposed",
        {"transposed": True, "groups": 3},
        ValueError,
        ("12 output channels (axis 1 of shape (6, 4, 3), 3 groups)",),
    ),
    ("mean", {"mean": np.inf * ONE}, ValueError, ("bias[0] would be -inf", "finite")),
    ("gamma", {"gamma": 1e39 * ONE}, ValueError, ("weight[0, 0, 0] would be inf", "normalize")),
]


@pytest.mark.parametrize(("name", "changed", "error", "pieces"), BAD)
def test_bad_input(
    name: str, changed: dict[str, Any], error: type[Exception], pieces: tuple[str, ...]
) -> None:
    """The message names the argument, what came, what was expected and what to do."""
    arguments: dict[str, Any] = {
        "weight": FOUR.astype(np.float32),
        "bias": None,
        "mean": ONE,
        "var": ONE,
    }
    with pytest.raises(error) as raised:
        fastbn.fold_into_conv(**(arguments | changed))
    for piece in pieces:
        assert piece in str(raised.value), (name, str(raised.value))


def test_bad_input_of_a_linear_layer() -> None:
    """What only the linear layer can be asked."""
    with pytest.raises(ValueError, match=r"weight has rank 3 .* expected \(out, in\)"):
        fastbn.fold_into_linear(FOUR, None, np.ones(4), np.ones(4), before=True)
    with pytest.raises(ValueError, match=r"mean has shape \(6,\) but weight has 4 inputs \(axis 1"):
        fastbn.fold_into_linear(FOUR[:, :, 0], None, ONE, ONE, before=True)
    with pytest.raises(ValueError, match=r"bias has shape \(4,\) but weight has 6 output"):
        fastbn.fold_into_linear(FOUR[:, :, 0], np.ones(4), np.ones(4), np.ones(4), before=True)
    with pytest.raises(TypeError, match="before is an int"):
        fastbn.fold_into_linear(FOUR[:, :, 0], None, ONE, ONE, before=1)  # type: ignore[arg-type]
