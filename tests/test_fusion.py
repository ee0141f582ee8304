"""Activation and residual, fused: values, gradients, kinks, working in place, and overlaps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastbn
from oracle.arrays import DTYPES, HALVES, LAYOUTS, Array
from oracle.formulas import ACTIVATIONS
from support.bits import assert_same_bits
from support.judge import check_backward, check_forward
from support.memory import FORMS, WRITEABLE, dense
from support.strategies import Problem, recipes
from support.variants import Variant, each_backend

pytestmark = pytest.mark.usefixtures("variant")

ALL = (*DTYPES, *HALVES)
activations = st.sampled_from(ACTIVATIONS)


def residual_of(p: Problem) -> Array:
    """A residual for the problem, in the memory form of x."""
    residual: Array = np.ascontiguousarray(p.dy[::-1]) + p.dy.dtype.type(0.25)
    return residual


@given(recipes(ALL), activations, st.booleans())
def test_forward_and_backward_are_within_their_bounds(
    p: Problem, activation: Any, with_residual: bool
) -> None:
    """batch_norm, normalize and their gradients, fused, on any problem of the domain."""
    residual = residual_of(p) if with_residual else None
    y, mean, var = check_forward(
        p.x, p.gamma, p.beta, **p.options, activation=activation, residual=residual
    )
    gate = {"activation": activation, "y": None if activation is None else y}
    for frozen in (False, True):
        for dresidual in (False, True):
            check_backward(
                *(p.dy, p.x, mean, var, p.gamma),
                **(p.options | gate | {"frozen": frozen, "dresidual": dresidual}),
            )


@given(recipes(ALL), activations)
def test_the_residuals_gradient_changes_nothing_else(p: Problem, activation: Any) -> None:
    """dx, dgamma and dbeta have the same bits with dresidual and without; so has dx alone."""
    y, mean, var = fastbn.batch_norm(p.x, p.gamma, p.beta, **p.options, activation=activation)
    gate: Any = {"activation": activation, "y": None if activation is None else y, **p.options}
    for verb in (fastbn.batch_norm_backward, fastbn.normalize_backward):
        alone = verb(p.dy, p.x, mean, var, p.gamma, **gate)
        beside = verb(p.dy, p.x, mean, var, p.gamma, dresidual=True, **gate)
        for name in alone._fields:
            assert_same_bits({name: getattr(alone, name)}, {name: getattr(beside, name)})
    for wanted in (False, True):
        lone = fastbn.normalize_backward(
            *(p.dy, None, mean, var, p.gamma), params=False, dresidual=wanted, **gate
        )
        assert_same_bits({"dx": lone.dx}, {"dx": beside.dx})


KINKS = [-np.inf, -3.0, -0.0, 0.0, 1e-30, 3.0, 6.0, 7.0, np.inf, np.nan]
IDENTITY = np.zeros(1), np.ones(1)
"""Statistics by which nothing changes, where eps is 0."""


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize(
    ("activation", "expected", "slopes"),
    [
        ("relu", [0, 0, 0, 0, 1e-30, 3, 6, 7, np.inf, np.nan], [0, 0, 0, 0, 1, 1, 1, 1, 1, 1]),
        ("relu6", [0, 0, 0, 0, 1e-30, 3, 6, 6, 6, np.nan], [0, 0, 0, 0, 1, 1, 0, 0, 0, 1]),
        (
            ("leaky_relu", 0.5),
            [-np.inf, -1.5, 0, 0, 1e-30, 3, 6, 7, np.inf, np.nan],
            [0.5, 0.5, 0.5, 0.5, 1, 1, 1, 1, 1, 1],
        ),
    ],
)
def test_kinks_infinities_and_nan(
    dtype: Any, activation: Any, expected: list[float], slopes: list[float]
) -> None:
    """What activations make of special values; at a kink the gradient is the negative side's, and
    where relu6 gave 6 there is none."""
    x = np.array(KINKS * 3).astype(dtype)[:, None]
    options: Any = {"eps": 0.0, "activation": activation}
    y = fastbn.normalize(x, *IDENTITY, **options)
    # 1e-30 has no place in float16: there it is one more 0.
    rounded = np.array(expected).astype(dtype)
    np.testing.assert_array_equal(y[:10, 0].astype(float), rounded.astype(float))
    slopes = [slopes[2] if a == 0 else s for a, s in zip(rounded, slopes, strict=True)]
    for value in (2.0, np.nan, np.inf):
        dy = np.full_like(x, value)
        got = fastbn.normalize_backward(
            *(dy, None, *IDENTITY), **options, params=False, y=y, dresidual=True
        )
        with np.errstate(invalid="ignore"):
            wanted = [0.0 if s == 0 else s * value for s in slopes]
        for result in (got.dx, got.dresidual):
            np.testing.assert_array_equal(result[:10, 0].astype(float), wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ALL)
def test_in_place(dtype: Any, layout: str) -> None:
    """out=residual, out=x, dresidual=dy and out=dy give the bits of fresh results."""
    rng = np.random.default_rng(3)
    x, z, dy = (a.astype(dtype) for a in rng.normal(size=(3, 6, 9, 7, 9)))
    options: Any = {"layout": layout, "activation": "relu"}
    y, mean, var = fastbn.batch_norm(x, residual=z, **options)
    for name in ("x", "z"):
        for statistics in ((), (mean, var)):
            verb: Any = fastbn.normalize if statistics else fastbn.batch_norm
            mine = {"x": x.copy(), "z": z.copy()}
            out = mine[name]
            got = verb(mine["x"], *statistics, residual=mine["z"], out=out, **options)
            assert out is (got if statistics else got.y)
            assert_same_bits({"y": out}, {"y": y})
    for backward in (fastbn.batch_norm_backward, fastbn.normalize_backward):
        expected = backward(dy, x, mean, var, y=y, dresidual=True, **options)
        given, memory = dy.copy(), np.empty_like(x)
        got = backward(given, x, mean, var, y=y, dresidual=given, out=memory, **options)
        assert got.dresidual is given
        assert_same_bits(got._asdict(), expected._asdict())
        given = dy.copy()
        got = backward(given, x, mean, var, y=y, dresidual=memory, out=given, **options)
        assert got.dx is given
        assert got.dresidual is memory
        assert_same_bits(got._asdict(), expected._asdict())


@each_backend
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", sorted(FORMS))
def test_operands_in_any_form(form: str, layout: str) -> None:
    """residual, y and dresidual may lie in memory in any way; no bit depends on it."""
    rng = np.random.default_rng(4)
    x, z, dy = rng.normal(size=(3, 4, 5, 6, 5)).astype(np.float32)
    options: Any = {"layout": layout, "activation": "relu6"}
    y, mean, var = fastbn.batch_norm(x, residual=z, **options)
    formed = fastbn.batch_norm(x, residual=FORMS[form](z), **options)
    assert_same_bits({"y": formed.y}, {"y": y})
    expected = fastbn.batch_norm_backward(dy, x, mean, var, y=y, dresidual=True, **options)
    into: Any = WRITEABLE[form](np.full_like(x, np.nan)) if form in WRITEABLE else True
    got = fastbn.batch_norm_backward(dy, x, mean, var, y=FORMS[form](y), dresidual=into, **options)
    assert into is True or got.dresidual is into
    for name in expected._fields:
        a, b = dense(getattr(got, name)), dense(getattr(expected, name))
        assert_same_bits({name: a}, {name: b})


@each_backend
def test_without_an_activation_dresidual_is_dy() -> None:
    """The residual's gradient is a copy of dy, and dx what it is without."""
    x, dy = np.random.default_rng(5).normal(size=(2, 4, 3, 5))
    _, mean, var = fastbn.batch_norm(x)
    got = fastbn.batch_norm_backward(dy, x, mean, var, dresidual=True)
    assert got.dresidual is not dy
    np.testing.assert_array_equal(got.dresidual, dy)
    alone = fastbn.batch_norm_backward(dy, x, mean, var)
    assert_same_bits({"dx": got.dx}, {"dx": alone.dx})


Y_HERE: dict[str, Callable[[Array, Array], Any]] = {
    "like x": lambda dy, out: np.ones_like(dy),
    "dy itself": lambda dy, out: dy,
    "out itself": lambda dy, out: out,
    "another type": lambda dy, out: dy.astype(np.float64),
    "another shape": lambda dy, out: dy[0],
    "strided": lambda dy, out: np.zeros((*dy.shape[:-1], 2 * dy.shape[-1]), dy.dtype)[..., ::2],
    "no array": lambda dy, out: [1.0],
}


@each_backend
@pytest.mark.parametrize("y", Y_HERE)
def test_without_an_activation_y_is_not_looked_at(y: str) -> None:
    """So that callers can pass it always, whatever it is: results are those without."""
    x, dy = np.random.default_rng(0).normal(size=(2, 6, 4, 5)).astype(np.float32)
    mean, var = fastbn.moments(x)
    frozen = fastbn.FrozenBatchNorm(mean, var)
    by_sample = fastbn.instance_norm(x)[1:]
    rows: Any = [dy[:, :, 0].copy(), x[:, :, 0].copy(), np.ones(6), np.ones(6)]
    calls: list[Callable[..., Any]] = [
        partial(fastbn.batch_norm_backward, dy, x, mean, var),
        partial(fastbn.batch_norm_backward, dy, x, mean, var, where=dy[:, :1] > 0),
        partial(fastbn.normalize_backward, dy, x, mean, var),
        partial(fastbn.normalize_backward, dy, None, mean, var, params=False),
        partial(frozen.backward, dy, x),
        partial(fastbn.instance_norm_backward, dy, x, *by_sample),
        partial(fastbn.layer_norm_backward, *rows),
    ]
    for call in calls:
        for dresidual in (False, True):
            expected = call(dresidual=dresidual)
            out = np.empty_like(expected.dx)
            found = call(y=Y_HERE[y](dy, out), dresidual=dresidual, out=out)
            assert found.dx is out
            for a, b in zip(found, expected, strict=True):
                np.testing.assert_array_equal(a, b)
    sums = fastbn.gradient_sums(dy, x, mean, var)
    for a, b in zip(fastbn.gradient_sums(dy, x, mean, var, y=Y_HERE[y](dy, dy)), sums, strict=True):
        np.testing.assert_array_equal(a, b)


@each_backend
@pytest.mark.no_kernel
def test_an_empty_batch() -> None:
    """It stays empty, fused or not, and its gradients are zeros."""
    x = np.zeros((0, 3, 4), np.float32)
    y, mean, var = fastbn.batch_norm(x, activation="relu", residual=x)
    got = fastbn.batch_norm_backward(x, x, mean, var, activation="relu", y=y, dresidual=True)
    assert y.shape == got.dx.shape == got.dresidual.shape == x.shape
    np.testing.assert_array_equal(got.dgamma, np.zeros(3))


@each_backend
@pytest.mark.no_kernel
def test_other_overlaps_are_refused() -> None:
    """out or dresidual that overlaps another operand is refused, and nothing is written."""
    buffer = np.random.default_rng(6).normal(size=260)
    a, b = buffer[:64].reshape(4, 4, 4), buffer[1:65].reshape(4, 4, 4)
    c, d = buffer[130:194].reshape(4, 4, 4), buffer[196:260].reshape(4, 4, 4)
    mean, var = np.zeros(4), np.ones(4)
    relu: Any = {"activation": "relu", "y": c}
    backward: Any = partial(fastbn.batch_norm_backward, mean=mean, var=var)
    calls: dict[str, Callable[[], object]] = {
        "out overlaps residual without": lambda: fastbn.batch_norm(c, residual=a, out=b),
        "out overlaps y, ": lambda: backward(a, d, out=c, **relu),
        "out overlaps dresidual, ": lambda: backward(a, d, out=a, dresidual=a),
        "dresidual overlaps dy without": lambda: backward(a, d, dresidual=b),
        "dresidual overlaps x, ": lambda: backward(a, d, dresidual=d),
        "dresidual overlaps y, ": lambda: backward(a, d, dresidual=c, **relu),
    }
    before = buffer.tobytes()
    for message, call in calls.items():
        with pytest.raises(ValueError, match=f"^{message}"):
            call()
    assert buffer.tobytes() == before


def test_fused_relu_is_the_parts_in_one_pass(variant: Variant) -> None:
    """Where arithmetic is the element type's, y has the bits of normalize, add and maximum."""
    rng = np.random.default_rng(7)
    x, z = rng.normal(size=(2, 5, 33, 9, 9)).astype(np.float32)
    mean, var = rng.normal(size=33), rng.exponential(size=33)
    parts = np.maximum(fastbn.normalize(x, mean, var) + z, 0)
    y = fastbn.normalize(x, mean, var, activation="relu", residual=z)
    if variant.name == "numpy":  # float64 throughout: a rounding less
        np.testing.assert_allclose(y, parts, rtol=2.0**-22, atol=2.0**-22)
    else:
        np.testing.assert_array_equal(y, parts)
