"""float16 and bfloat16: float32's result is rounded once, NaN and subnormals are kept."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given

import fastbn
from fastbn.elements import is_bfloat16, is_element, is_half
from oracle.arrays import HALVES, LAYOUTS, Array
from support.bits import assert_same_bits
from support.judge import check_everything
from support.processes import output
from support.strategies import Problem, recipes
from support.variants import Variant, each_backend


def every_value(dtype: type) -> Array:
    """All 65536 of them."""
    return np.arange(2**16, dtype=np.uint16).view(dtype)


@pytest.mark.usefixtures("variant")
@given(recipes(HALVES))
def test_every_function_is_within_its_bounds(p: Problem) -> None:
    """The five functions on half types, any shape, layout and memory."""
    check_everything(p.x, p.dy, p.gamma, p.beta, eps=p.eps, layout=p.layout)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", HALVES)
def test_every_value_comes_and_goes(dtype: type, layout: str) -> None:
    """Nothing changes on the way through an identity, subnormals and infinities included; NaN
    stays NaN."""
    x = every_value(dtype).reshape(64, 16, 64)
    channels = x.shape[1] if layout == "NCHW" else x.shape[2]
    y = fastbn.normalize(x, np.zeros(channels), np.ones(channels), eps=0.0, layout=layout)
    assert y.dtype == x.dtype
    with np.errstate(invalid="ignore"):  # among them are NaN that signal
        np.testing.assert_array_equal(y.astype(float), x.astype(float))


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", HALVES)
def test_results_are_rounded_to_nearest_even(dtype: type, layout: str) -> None:
    """Products of a half and 13 bits are exact in float32, and many lie half way between two
    halves: each is rounded as NumPy and ml_dtypes round it, overflow and subnormals included."""
    with np.errstate(invalid="ignore"):
        x = every_value(dtype)
        x = x[np.isfinite(x.astype(np.float32))]
    fractions = [1, 1 + 2**-1, 1 + 2**-5, 1 + 2**-11, 2 - 2**-12]
    gamma = np.array([s * f for s in (1, -(2.0**-7), 2.0**5) for f in fractions])
    x = np.repeat(x[:, None], len(gamma), 1)
    if layout == "NCHW":
        x = np.ascontiguousarray(x.T)[None]
    at = 1 if layout == "NCHW" else 0
    y = fastbn.normalize(
        *(x, np.zeros(len(gamma)), np.ones(len(gamma)), gamma), eps=0.0, layout=layout
    )
    exact = x.astype(np.float64) * gamma.reshape((-1, 1) if at else (1, -1))
    with np.errstate(over="ignore"):
        expected = exact.astype(np.float32).astype(dtype)
    fits = np.abs(exact) >= 2.0**-149  # where float32 underflows is another test's subject
    np.testing.assert_array_equal(y.astype(float)[fits], expected.astype(float)[fits])


@each_backend
@pytest.mark.parametrize("dtype", HALVES)
def test_parameters_and_their_gradients(dtype: type) -> None:
    """Parameters are float32 or float64 and so are their gradients; float32 without any."""
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(2, 6, 5, 4)).astype(dtype)
    _, mean, var = fastbn.batch_norm(x)
    assert mean.dtype == var.dtype == np.float64
    for gamma, expected in ((None, np.float32), *((np.ones(5, t), t) for t in ("f4", "f8"))):
        got = fastbn.batch_norm_backward(dy, x, mean, var, gamma)
        assert got.dx.dtype == dtype
        assert got.dgamma is not None
        assert got.dgamma.dtype == np.dtype(expected)


@each_backend
def test_byte_swapped_float16() -> None:
    """Either byte order comes, the native one goes."""
    x = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float16)
    y, _, _ = fastbn.batch_norm(x.astype(">f2"))
    assert y.dtype == np.float16
    np.testing.assert_array_equal(y, fastbn.batch_norm(x).y)


def with_parameters(x: Array, dy: Array, vectors: dict[str, Any]) -> dict[str, Array]:
    """What all functions give, by parameters and, where they may be other than float64,
    statistics."""
    gamma, beta, mean, var = vectors.values()
    ones = np.ones(len(gamma))
    by_sample = np.ones((len(x), len(gamma)))
    found: list[Any] = [*fastbn.batch_norm(x, gamma, beta), fastbn.normalize(x, **vectors)]
    found += fastbn.batch_norm_backward(dy, x, ones, ones, gamma)
    found += fastbn.normalize_backward(dy, x, mean, var, gamma)
    found += fastbn.batch_norm_double_backward(dy, beta, beta, dy, x, ones, ones, gamma)
    found += fastbn.normalize_double_backward(dy, beta, beta, dy, x, mean, var, gamma)
    for samples in (x, x[:, :, 0].copy()):
        found += [*fastbn.instance_norm(samples, gamma, beta), *fastbn.layer_norm(samples, gamma)]
        back = np.ones_like(samples)
        found += fastbn.instance_norm_backward(back, samples, by_sample, by_sample, gamma)
        found += fastbn.layer_norm_backward(back, samples, ones[:1].repeat(len(x)), ones[: len(x)])
    frozen = fastbn.FrozenBatchNorm(**vectors)
    found += [frozen(x), frozen.scale, frozen.gamma, frozen.mean, *frozen.backward(dy, x)]
    weight = np.tile(gamma, (len(gamma), 1))
    for kernel in (weight, weight[..., None]):
        found += fastbn.fold_into_conv(kernel, beta, **vectors)
    for before in (False, True):
        found += fastbn.fold_into_linear(weight, beta, **vectors, before=before)
    found.append(fastbn.Moments(3, mean, var).to_array())
    return {str(i): a for i, a in enumerate(found)}


@each_backend
@pytest.mark.parametrize("dtype", [*HALVES, ">f2"])
@pytest.mark.parametrize("of_x", ["f4", ml_dtypes.bfloat16])
def test_parameters_of_half_types_are_widened(of_x: Any, dtype: Any) -> None:
    """They do what the same numbers in float32 do; all that is of their type is float32."""
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(2, 6, 6, 4)).astype(of_x)
    names = ("gamma", "beta", "mean", "var")
    drawn = dict(zip(names, rng.uniform(1, 2, (4, 6)), strict=True))
    halves = {name: a.astype(dtype) for name, a in drawn.items()}
    singles = {name: a.astype(np.float32) for name, a in halves.items()}
    found, expected = with_parameters(x, dy, halves), with_parameters(x, dy, singles)
    assert_same_bits(found, expected)
    assert {a.dtype for a in found.values()} <= {np.dtype(t) for t in (of_x, "f4", "f8")}


@each_backend
@pytest.mark.no_kernel
def test_what_half_types_are_too_short_for() -> None:
    """Statistics that the gradient goes through, and weights; operands have the type of x."""
    x, half = np.ones((3, 4), np.float16), np.ones(4, np.float16)
    exact = "has dtype float16, expected float64: the gradient through the batch's own statistics"
    with pytest.raises(TypeError, match=f"^mean {exact}"):
        fastbn.batch_norm_backward(x, x, half, np.ones(4))
    with pytest.raises(TypeError, match=f"^var {exact}"):
        fastbn.gradient_sums(x, x, np.ones(4), half)
    with pytest.raises(TypeError, match=f"^var {exact}"):
        fastbn.layer_norm_backward(x, x, np.ones(3), half[:3])
    with pytest.raises(TypeError, match=r"^weights has dtype float16, expected float32 or float64"):
        fastbn.moments(x, weights=half[:3])
    dy = x.astype(ml_dtypes.bfloat16)
    with pytest.raises(TypeError, match="dy has dtype bfloat16, expected float16"):
        fastbn.batch_norm_backward(dy, x, np.zeros(4), np.ones(4))
    with pytest.raises(TypeError, match=r"out has dtype float16, .* numpy.empty\(.*x.dtype\)"):
        fastbn.batch_norm(x.astype(ml_dtypes.bfloat16), out=np.empty_like(x))


def test_which_types_are_elements() -> None:
    """bfloat16 is known by its name; other types of two bytes are not, nor is it byte-swapped."""
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    assert is_bfloat16(bfloat16)
    assert is_half(bfloat16)
    assert is_half(np.dtype(">f2"))
    for other in ("V2", "<i2", "S2", bfloat16.newbyteorder("S"), ml_dtypes.float8_e5m2):
        assert not is_element(np.dtype(other)), other


@each_backend
@pytest.mark.no_kernel
def test_byte_swapped_bfloat16_is_refused(variant: Variant) -> None:
    """As x and as out, though its dtype claims to equal the native one."""
    x = np.ones((3, 4), ml_dtypes.bfloat16)
    swapped = x.view(x.dtype.newbyteorder("S"))
    with pytest.raises(TypeError, match=r"^x has dtype byte-swapped bfloat16, expected float16"):
        fastbn.batch_norm(swapped)
    with pytest.raises(TypeError, match=r"^out has dtype byte-swapped bfloat16, expected bfloat16"):
        fastbn.batch_norm(x, out=swapped)
    assert (x == 1).all()


def test_nothing_else_is_imported() -> None:
    """fastbn knows bfloat16 without whoever made it."""
    assert output("import sys, fastbn; print('ml_dtypes' in sys.modules)").strip() == "False"
