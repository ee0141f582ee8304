"""Every bad argument of group, instance and layer norm: the kind of error, what its message says,
and that nothing has been written."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fastbn
from support.layers import fails
from support.sample_norms import Norm
from support.variants import each_backend

SHAPE = (4, 6, 5)
X = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
KINDS = (Norm("instance"), Norm("layer"), Norm(3))

GROUPS = [
    (0, ValueError, "groups is 0, expected 1 or more; 1 is layer norm, and as many as channels"),
    (-2, ValueError, "groups is -2, expected 1 or more"),
    (4, ValueError, "groups is 4, expected a divisor of 6, the number of channels: ... pass one"),
    (12, ValueError, "groups is 12, expected a divisor of 6"),
    (2.0, TypeError, "groups is a float (2.0), expected a whole number; pass an int"),
    (True, TypeError, "groups is a bool (True), expected a whole number"),
    (None, TypeError, "groups is a NoneType (None), expected a whole number"),
    ("2", TypeError, "groups is a str ('2'), expected a whole number"),
    (np.ones(1, int), TypeError, "groups is an ndarray ... expected a whole number"),
]


@each_backend
@pytest.mark.no_kernel
@pytest.mark.parametrize(("groups", "error", "words"), GROUPS)
def test_bad_groups(groups: Any, error: type[Exception], words: str) -> None:
    """In both verbs and the layer."""
    out, table = np.full_like(X, 7), np.ones((4, 3))
    with fails(error, words):
        fastbn.group_norm(X, groups, out=out)
    with fails(error, words):
        fastbn.group_norm_backward(X, X, table, table, groups, out=out)
    with fails(error, words):
        fastbn.GroupNorm(groups, 6)
    assert (out == 7).all()


FORWARD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "rank": ({"x": X[0, 0]}, ValueError, "x has rank 1 ... 2 or more"),
    "integers": ({"x": np.ones(SHAPE, int)}, TypeError, "x has dtype int64, expected float16"),
    "gamma": ({"gamma": np.ones(5)}, ValueError, "gamma has shape (5,) but x has 6 channels"),
    "elementwise": (
        {"gamma": np.ones((6, 5))},
        ValueError,
        "gamma has shape (6, 5) but x has 6 channels",
    ),
    "whole beta": ({"beta": np.ones(6, int)}, TypeError, "beta has dtype int64, expected float16"),
    "eps": ({"eps": -1.0}, ValueError, "eps is -1.0, expected a finite number, zero or more"),
    "layout": ({"layout": "NCL"}, ValueError, "layout is 'NCL', expected 'NCHW'"),
    "activation": ({"activation": "gelu"}, ValueError, "activation is 'gelu', expected None"),
    "residual": (
        {"residual": X[:1]},
        ValueError,
        "residual has shape (1, 6, 5), expected (4, 6, 5), the shape of x",
    ),
    "out's shape": ({"out": np.ones((4, 6), "f4")}, ValueError, "out has shape (4, 6), expected"),
    "out's type": ({"out": np.ones(SHAPE)}, TypeError, "out has dtype float64, expected float32"),
}


@each_backend
@pytest.mark.no_kernel
@pytest.mark.parametrize("name", FORWARD)
def test_bad_forward(name: str) -> None:
    """Nothing is written, and no kernel runs."""
    changed, error, words = FORWARD[name]
    for norm in KINDS:
        out = np.full_like(X, 7)
        given = {"x": X, "out": out} | changed
        with fails(error, words):
            norm.forward(given.pop("x"), **given)
        assert (out == 7).all()


@each_backend
@pytest.mark.no_kernel
def test_bad_results() -> None:
    """Memory of inputs that is not the same place, of parameters, and what cannot be written."""
    for norm in KINDS:
        large = np.zeros((4, 7, 5), np.float32)
        x, beside = large[:, :-1], large[:, 1:]
        gamma = large.reshape(-1)[:6]
        with fails(ValueError, "out overlaps x without being x"):
            norm.forward(x, out=beside)
        with fails(ValueError, "out overlaps gamma, expected memory apart from it"):
            norm.forward(X, gamma=gamma, out=x)
        table = np.ones(norm.shape(4, 6))
        with fails(ValueError, "out overlaps dy without being dy"):
            norm.backward(x, X, table, table, out=beside)
        with fails(ValueError, "dresidual overlaps x, expected memory apart from it"):
            norm.backward(X.copy(), x, table, table, dresidual=x)
        x.flags.writeable = False
        with fails(ValueError, "out is read-only, expected a writeable array"):
            norm.forward(X, out=x)
        assert not large.any()


BACKWARD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "dy": ({"dy": X[:, :5]}, ValueError, "dy has shape (4, 5, 5), expected (4, 6, 5)"),
    "dy's type": ({"dy": X.astype(float)}, TypeError, "dy has dtype float64, expected float32"),
    "no x": ({"x": None}, TypeError, "x is a NoneType"),
    "params": ({"params": 1}, TypeError, "params is an int (1), expected True or False"),
    "no y": ({"activation": "relu"}, TypeError, "y is None, expected the forward's y"),
    "dresidual": ({"dresidual": 1}, TypeError, "dresidual is an int (1), expected True or False"),
    "out": ({"out": X[:1]}, ValueError, "out has shape (1, 6, 5), expected (4, 6, 5)"),
}


@each_backend
@pytest.mark.no_kernel
@pytest.mark.parametrize("name", BACKWARD)
def test_bad_backward(name: str) -> None:
    """Nothing is written, and no kernel runs."""
    changed, error, words = BACKWARD[name]
    for norm in KINDS:
        table, out = np.ones(norm.shape(4, 6)), np.full_like(X, 7)
        given: dict[str, Any] = {"dy": X, "x": X, "mean": table, "var": table, "out": out} | changed
        arrays = [given.pop(key) for key in ("dy", "x", "mean", "var")]
        with fails(error, words):
            norm.backward(*arrays, **given)
        assert (out == 7).all()


@each_backend
@pytest.mark.no_kernel
@pytest.mark.parametrize("norm", KINDS, ids=lambda norm: str(norm.kind))
def test_bad_statistics(norm: Norm) -> None:
    """Each sample's, in float64, and no negative variance."""
    shape, out = norm.shape(4, 6), np.full_like(X, 7)
    good = np.ones(shape)
    negative = good.copy()
    negative[(1, *[0] * (len(shape) - 1))] = -1
    at = "1" if len(shape) == 1 else "1, 0"
    wrong = f"expected {shape}, an entry for each of the 4 samples of x"
    for mean, var, error, words in (
        (np.ones(6), good, ValueError, f"mean has shape (6,), {wrong}"),
        (good, good[:3], ValueError, f"var has shape {(3, *shape[1:])}, {wrong}"),
        (good[..., None], good, ValueError, f"mean has shape {(*shape, 1)}, {wrong}"),
        (good.astype("f4"), good, TypeError, "mean has dtype float32, expected float64"),
        (good, good.astype("f4"), TypeError, "var has dtype float32, expected float64"),
        (good.tolist(), good, TypeError, "mean is a list"),
        (None, good, TypeError, "mean is a NoneType"),
        (good, negative, ValueError, f"var[{at}] is -1.0: a variance cannot be negative"),
    ):
        with fails(error, words):
            norm.backward(X, X, mean, var, out=out)
    assert (out == 7).all()
