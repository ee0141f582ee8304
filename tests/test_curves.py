"""Activations of inference: hard_sigmoid, hard_swish and silu after normalize."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest

import fastbn
from oracle import formulas
from oracle.arrays import HALVES, LAYOUTS, to_layout, vector, wide
from oracle.bounds import bound_curve, bound_fused, bound_y, stored
from oracle.formulas import CURVES
from support.bits import assert_same_bits
from support.grid import TYPES
from support.judge import assert_within
from support.variants import CYTHON, activate, each_backend

SHAPES = ((7, 3), (2, 5, 6, 7), (3, 70, 40), (1, 3, 130, 131))


def made(shape: tuple[int, ...], layout: str, dtype: Any) -> Any:
    """x, a residual, and statistics and parameters of 3 deviations about the bends."""
    rng = np.random.default_rng(0)
    x, residual = (to_layout(a, layout).astype(dtype) for a in rng.normal(1, 2, (2, *shape)))
    mean, beta, gamma = rng.normal(size=(3, shape[1]))
    return x, residual, (mean, rng.uniform(0.5, 2, shape[1]), 3 * gamma, beta)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_y_is_within_its_bound(shape: tuple[int, ...], dtype: str, layout: str, curve: str) -> None:
    x, residual, vectors = made(shape, layout, TYPES[dtype])
    mean, var, gamma, beta = (vector(v, 0, shape[1]) for v in vectors)
    bn = formulas.normalize(wide(x, layout), mean, var, gamma, beta, 1e-5)
    bound = bound_y(x.dtype, bn, mean, var, gamma, beta, 1e-5)
    for z in (None, residual):
        v = bn if z is None else bn + wide(z, layout)
        before = bound if z is None else bound_fused(x.dtype, bound, v, v)
        exact = formulas.curve(v, curve)
        y = fastbn.normalize(x, *vectors, layout=layout, activation=curve, residual=z)
        within = stored(x.dtype, exact, bound_curve(x.dtype, before, exact, curve))
        assert y.dtype == x.dtype
        assert_within(wide(y, layout).astype(x.dtype), exact, within, "y")


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("dtype", TYPES)
def test_every_instruction_set_has_the_same_bits(dtype: str, curve: str) -> None:
    """Of values all over the range, subnormal results too."""
    kind = TYPES[dtype]
    ends = np.linspace(-760, 40, 4001)
    x = np.concatenate([ends, np.linspace(-9, 9, 4001), np.geomspace(1e-40, 1, 300)])
    x = np.concatenate([x, -x[-300:], [np.inf, -np.inf, np.nan]]).astype(kind)[:, None]
    found = []
    for name in CYTHON:
        with activate(name):
            found.append(fastbn.normalize(x, np.zeros(1), np.ones(1), eps=0.0, activation=curve))
    for other in found[1:]:
        assert_same_bits({"y": other}, {"y": found[0]})
    v = x.astype(np.longdouble)
    inside = np.isfinite(v)
    with np.errstate(all="ignore"):
        exact = np.where(inside, formulas.curve(np.where(inside, v, 0), curve), 0)
    bound = stored(kind, exact, bound_curve(kind, np.zeros_like(exact), exact, curve))
    assert_within(np.where(inside, found[0], 0).astype(kind), exact, bound, "y")


@each_backend
@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, *HALVES])
def test_special_values(dtype: Any, curve: str) -> None:
    """The limits, and NaN where NaN was; 0 where a mask says so."""
    x = np.array([np.nan, np.inf, -np.inf, 0, 1000, -1000]).astype(dtype)[:, None]
    y = fastbn.normalize(x, np.zeros(1), np.ones(1), eps=0.0, activation=curve)
    low, middle, top = (0, 0.5, 1) if curve == "hard_sigmoid" else (0, 0, np.inf)
    high = 1 if curve == "hard_sigmoid" else 1000
    expected = np.array([np.nan, top, low, middle, high, low]).astype(dtype)
    np.testing.assert_array_equal(y[:, 0], expected)
    where = np.array([False, True, True, False, True, True])[:, None]
    hidden = fastbn.normalize(x, np.zeros(1), np.ones(1), eps=0.0, activation=curve, where=where)
    np.testing.assert_array_equal(hidden, np.where(where, y, y.dtype.type(0)))


@each_backend
@pytest.mark.parametrize("curve", CURVES)
def test_frozen(curve: str) -> None:
    """The bits of normalize, in place too; pickled; its backward refuses."""
    x, residual, vectors = made((4, 6, 5, 5), "NCHW", np.float32)
    frozen = pickle.loads(pickle.dumps(fastbn.FrozenBatchNorm(*vectors, activation=curve)))
    assert f"activation={curve!r}" in repr(frozen)
    for z in (None, residual):
        y = fastbn.normalize(x, *vectors, activation=curve, residual=z)
        out = x.copy()
        assert_same_bits({"y": frozen(out, residual=z, out=out)}, {"y": y})
    with pytest.raises(ValueError, match=f"^activation is '{curve}', expected one whose slope"):
        frozen.backward(x, x, y=x)


X, V = np.ones((3, 4, 5), np.float32), np.ones(4)
TRAINING: dict[str, Any] = {
    "batch_norm": lambda curve: fastbn.batch_norm(X, activation=curve),
    "batch_norm_backward": lambda c: fastbn.batch_norm_backward(X, X, V, V, activation=c, y=X),
    "normalize_backward": lambda c: fastbn.normalize_backward(X, X, V, V, activation=c, y=X),
    "gradient_sums": lambda c: fastbn.gradient_sums(X, X, V, V, activation=c, y=X),
    "group_norm": lambda curve: fastbn.group_norm(X, 2, activation=curve),
    "layer_norm": lambda curve: fastbn.layer_norm(X, axes="last", activation=curve),
    "BatchNorm": lambda curve: fastbn.BatchNorm(4, activation=curve),
    "GroupNorm": lambda curve: fastbn.GroupNorm(2, 4, activation=curve),
}


@pytest.mark.parametrize("name", TRAINING)
@pytest.mark.parametrize("curve", CURVES)
def test_training_refuses(curve: str, name: str) -> None:
    """No slope follows from y."""
    with pytest.raises(ValueError, match=f"^activation is '{curve}', expected one whose slope"):
        TRAINING[name](curve)
