"""Layer norm over the last axis, and RMS norm: values within their bounds, what a skip and a mask
of rows do, and refusals.

Layer norm of rows is that of (N, C), which has an oracle of its own in test_group_norms; RMS norm
has its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import fastbn
from oracle.arrays import DTYPES, HALVES, limits
from support import rms_norms
from support.bits import assert_same_bits
from support.grid import TYPES
from support.judge import assert_within
from support.strategies import any_order
from support.variants import CYTHON, activate, each_backend

Array = NDArray[Any]

SHAPES = ((7, 1), (5, 3, 2), (37, 20), (2, 9, 48), (33, 640), (4, 5, 6, 17), (2, 16400), (1500, 64))


def made(shape: tuple[int, ...], dtype: Any, seed: int = 0) -> tuple[Array, ...]:
    """x, dy, something of their shape and gamma; rows differ in mean and size."""
    rng = np.random.default_rng(seed)
    x, dy, skip = rng.normal(size=(3, *shape))
    each = *shape[:-1], 1
    x = (x + rng.uniform(-3, 3, each)) * 10 ** rng.uniform(-2, 2, each)
    return *(a.astype(dtype) for a in (x, dy, skip)), rng.normal(size=shape[-1])


def mask_of(shape: tuple[int, ...], seed: int = 1) -> NDArray[np.bool_]:
    return np.random.default_rng(seed).random((*shape[:-1], 1)) < 0.6


def forward(kind: str, x: Array, gamma: Array | None, **options: Any) -> Any:
    if kind == "rms":
        return fastbn.rms_norm(x, gamma, **options)
    return fastbn.layer_norm(x, gamma, gamma, axes="last", **options)


def backward(kind: str, dy: Array, x: Array, found: Any, gamma: Any, **options: Any) -> Any:
    if kind == "rms":
        return fastbn.rms_norm_backward(dy, x, found.mean_square, gamma, **options)
    verb = fastbn.layer_norm_backward
    return verb(dy, x, found.mean, found.var, gamma, axes="last", **options)


def check_rms(x: Array, dy: Array, gamma: Array | None, eps: float) -> None:
    y, mean_square = fastbn.rms_norm(x, gamma, eps=eps)
    assert mean_square.shape == x.shape[:-1]
    found = fastbn.rms_norm_backward(dy, x, mean_square, gamma, eps=eps)
    rows, back, of_x, dx = (a.reshape(-1, x.shape[-1]) for a in (y, dy, x, found.dx))
    assert found.dgamma is not None
    given: Any = mean_square.reshape(-1), of_x, gamma, eps
    for judged in rms_norms.judge_forward(rows, *given):
        assert_within(*judged)
    given = back, of_x, mean_square.reshape(-1), gamma, eps
    for judged in rms_norms.judge_backward((dx, found.dgamma), *given):
        assert_within(*judged)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_is_within_its_bound(shape: tuple[int, ...], dtype: str) -> None:
    x, dy, _, gamma = made(shape, TYPES[dtype])
    check_rms(x, dy, gamma, 1e-5)
    check_rms(x, dy, gamma.astype(np.float32), 0.5)
    check_rms(x, dy, None, 1e-5)


@each_backend
@given(st.sampled_from((*DTYPES, *HALVES)), st.integers(1, 70), st.integers(1, 40), st.integers())
def test_rms_norm_of_anything(dtype: Any, rows: int, columns: int, seed: int) -> None:
    x, dy, _, gamma = made((rows, columns), dtype, seed % 1000)
    check_rms(x, dy, gamma, 1e-3)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(2, 9, 48), (4, 5, 6, 17), (3, 300, 7)])
def test_layer_norm_of_the_last_axis_is_that_of_rows(shape: tuple[int, ...], dtype: str) -> None:
    """All bits, fused and not, whatever `layout` says."""
    x, dy, z, gamma = made(shape, TYPES[dtype])
    flat = [a.reshape(-1, shape[-1]) for a in (x, dy, z)]
    fused: dict[str, Any] = {"activation": "relu", "residual": z}
    expected = fastbn.layer_norm(flat[0], gamma, gamma, activation="relu", residual=flat[2])
    y, mean, var = fastbn.layer_norm(x, gamma, gamma, axes="last", layout="NHWC", **fused)
    assert mean.shape == var.shape == shape[:-1]
    assert_same_bits(
        {"y": y.reshape(flat[0].shape), "m": mean.reshape(-1), "v": var.reshape(-1)},
        {"y": expected.y, "m": expected.mean, "v": expected.var},
    )
    options: dict[str, Any] = {"activation": "relu", "dresidual": True}
    given = flat[1], flat[0], expected.mean, expected.var, gamma
    wanted = fastbn.layer_norm_backward(*given, y=expected.y, **options)
    got = fastbn.layer_norm_backward(dy, x, mean, var, gamma, axes="last", y=y, **options)
    for name in ("dx", "dgamma", "dbeta", "dresidual"):
        a, b = getattr(got, name), getattr(wanted, name)
        assert_same_bits({name: a.reshape(b.shape)}, {name: b})


KINDS = pytest.mark.parametrize("kind", ["rms", "layer"])


@KINDS
@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(7, 1), (2, 9, 48), (33, 640), (2, 40000), (3, 1000, 130)])
def test_a_skip_is_added_before(shape: tuple[int, ...], dtype: str, kind: str) -> None:
    """y is that of the sum, to the bit; dsum is added to dx, which is rounded once or twice."""
    x, dy, skip, gamma = made(shape, TYPES[dtype])
    with np.errstate(all="ignore"):
        total = x + skip
    for threads in (1, 3):
        with fastbn.use_num_threads(threads):
            *found, got = forward(kind, x, gamma, skip=skip)
            expected = forward(kind, total, gamma)
            assert_same_bits({"sum": got, "y": found[0]}, {"sum": total, "y": expected.y})
            np.testing.assert_array_equal(found[1:], expected[1:])
            alone = backward(kind, dy, total, expected, gamma)
            both = backward(kind, dy, total, expected, gamma, dsum=skip)
    np.testing.assert_array_equal(both[1:], alone[1:])
    wide = alone.dx.astype(np.float64) + skip.astype(np.float64)
    of_type = limits(x.dtype)
    rounding, least = float(of_type.eps), float(of_type.smallest_subnormal)
    size = abs(alone.dx.astype(np.float64)) + abs(wide)
    assert (abs(both.dx.astype(np.float64) - wide) <= rounding * size + least).all()


@KINDS
@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(40, 3), (2, 9, 48), (3, 50, 130)])
def test_hidden_rows_have_no_part(shape: tuple[int, ...], dtype: str, kind: str) -> None:
    """Results are those of the rows that count; of others 0, or dsum, whatever stands there."""
    x, dy, skip, gamma = made(shape, TYPES[dtype])
    where = mask_of(shape)
    counts = where[..., 0]
    x[~counts], dy[~counts] = np.nan, np.inf
    found = forward(kind, x, gamma, where=where)
    seen = forward(kind, np.ascontiguousarray(x[counts]), gamma)
    for a, b in zip(found, seen, strict=True):
        assert_same_bits({"": np.ascontiguousarray(a[counts])}, {"": b})
        assert not a[~counts].any()
    wanted = backward(kind, np.ascontiguousarray(dy[counts]), x[counts], seen, gamma)
    # |xhat| is at most the root of the number of columns.
    terms = np.abs(dy[counts].astype(np.float64)).reshape(-1, shape[-1]).sum(0) * shape[-1] ** 0.5
    for dsum in (None, skip):
        got = backward(kind, dy, x, found, gamma, where=where, dsum=dsum)
        expected = np.zeros_like(skip) if dsum is None else dsum
        assert_same_bits({"dx": got.dx[~counts]}, {"dx": expected[~counts]})
        for a, b in zip(got[1:], wanted[1:], strict=True):
            u = np.finfo(a.dtype).eps  # both are within u |value| + 1e-12 sum|dy xhat|
            off = np.abs(a.astype(np.float64) - b.astype(np.float64))
            assert (off <= 2 * (u * np.abs(b) + 1e-12 * terms)).all()
    assert_same_bits(
        {"dx": backward(kind, dy, x, found, gamma, where=where).dx[counts]}, {"dx": wanted.dx}
    )
    nothing = np.zeros_like(where)
    assert not forward(kind, x, gamma, where=nothing).y.any()
    assert_same_bits(
        {"dx": backward(kind, dy, x, found, gamma, where=nothing, dsum=skip).dx}, {"dx": skip}
    )


@KINDS
@pytest.mark.parametrize("name", CYTHON)
@given(data=st.data(), dtype=st.sampled_from((*DTYPES, *HALVES)), seed=st.integers(0, 9))
def test_memory_changes_no_bit(kind: str, name: str, data: Any, dtype: Any, seed: int) -> None:
    """Of arrays in any order, into such, in place, by any number of threads."""
    shape = tuple(data.draw(st.lists(st.sampled_from([1, 2, 5, 17, 48]), min_size=2, max_size=4)))
    x, dy, skip, gamma = made(shape, dtype, seed)
    where = mask_of(shape) if data.draw(st.booleans()) else None
    given_skip = skip if data.draw(st.booleans()) else None

    def moved(a: Array | None) -> Any:
        if a is None:
            return None
        other = data.draw(any_order(a.shape, a.dtype))
        other[...] = a
        return other

    with activate(name):
        expected = forward(kind, x, gamma, skip=given_skip, where=where)
        total = x if given_skip is None else expected.sum
        back = backward(kind, dy, total, expected, gamma, dsum=given_skip, where=where)
        with fastbn.use_num_threads(data.draw(st.sampled_from([1, 2, 3]))):
            other = moved(x)
            out = data.draw(st.sampled_from([None, other, moved(dy)]))
            given_where = moved(where)
            found = forward(kind, other, gamma, skip=moved(given_skip), where=given_where, out=out)
            into = data.draw(st.sampled_from([None, moved(dy)]))
            options = {"dsum": moved(given_skip), "where": given_where, "out": into}
            got = backward(kind, moved(dy), moved(total), expected, gamma, **options)
        assert out is None or found.y is out
        for results, wanted in ((found, expected), (got, back)):
            assert_same_bits(dict(enumerate_(results)), dict(enumerate_(wanted)))


def enumerate_(results: Any) -> list[tuple[str, Array]]:
    return [(str(i), np.ascontiguousarray(a)) for i, a in enumerate(results)]


X = np.ones((4, 5, 6), np.float32)
STATISTIC = np.ones((4, 5))
BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "axes": (lambda: fastbn.layer_norm(X, axes="rows"), ValueError, "axes is 'rows', expected"),  # type: ignore[call-overload]
    "axes of a number": (lambda: fastbn.layer_norm(X, axes=-1), TypeError, "axes is -1, expected"),  # type: ignore[call-overload]
    "skip of samples": (
        lambda: fastbn.layer_norm(X, skip=X),  # type: ignore[call-overload]
        ValueError,
        "skip is given and axes is 'sample', expected axes='last'",
    ),
    "gamma": (
        lambda: fastbn.rms_norm(X, np.ones(5)),
        ValueError,
        r"gamma has shape \(5,\), expected \(6,\)",
    ),
    "rank": (lambda: fastbn.rms_norm(X[0, 0]), ValueError, "x has rank 1"),
    "skip's shape": (
        lambda: fastbn.rms_norm(X, skip=X[:1]),
        ValueError,
        r"skip has shape \(1, 5, 6\), expected \(4, 5, 6\)",
    ),
    "skip's type": (
        lambda: fastbn.rms_norm(X, skip=X.astype(np.float64)),
        TypeError,
        "skip has dtype float64, expected float32",
    ),
    "a mask of values": (
        lambda: fastbn.rms_norm(X, where=X > 0),
        ValueError,
        r"where has shape \(4, 5, 6\), expected \(4, 5, 1\)",
    ),
    "mean_square's shape": (
        lambda: fastbn.rms_norm_backward(X, X, np.ones(4)),
        ValueError,
        r"mean_square has shape \(4,\), expected \(4, 5\)",
    ),
    "a negative mean_square": (
        lambda: fastbn.rms_norm_backward(X, X, -STATISTIC),
        ValueError,
        r"mean_square\[0, 0\] is -1.0",
    ),
    "dsum and an activation": (
        lambda: fastbn.layer_norm_backward(
            X, X, STATISTIC, STATISTIC, axes="last", dsum=X, activation="relu", y=X
        ),
        ValueError,
        "dsum and activation are given, expected one of them",
    ),
    "out over dsum": (
        lambda: fastbn.rms_norm_backward(X, X, STATISTIC, dsum=X, out=X),
        ValueError,
        "out overlaps dsum",
    ),
    "integers": (
        lambda: fastbn.rms_norm(np.ones((3, 4), np.uint8)),
        TypeError,
        "x has dtype uint8",
    ),
}


@each_backend
@pytest.mark.no_kernel
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    call, error, message = BAD[case]
    with pytest.raises(error, match=f"^{message}"):
        call()
    np.testing.assert_array_equal(X, 1)


def test_empty() -> None:
    for shape in ((0, 3), (2, 0, 3), (2, 3, 0)):
        x = np.zeros(shape, np.float32)
        y, mean_square = fastbn.rms_norm(x)
        assert (y.shape, mean_square.shape) == (shape, shape[:-1])
        dx, dgamma = fastbn.rms_norm_backward(x, x, mean_square)
        assert dgamma is not None
        assert (dx.shape, dgamma.shape) == (shape, shape[-1:])
        assert fastbn.layer_norm(x, axes="last", skip=x).sum.shape == shape
