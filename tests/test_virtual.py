"""Virtual batches: each group of samples is normalized by its own statistics."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fastbn
from oracle.arrays import Array, to_layout
from support.grid import TYPES
from support.judge import Judged, assert_within, judge_backward, judge_forward
from support.memory import FORMS
from support.pairs import paired
from support.variants import Variant, each_backend

SHAPES = (
    (10, 3, 5, 5),
    (7, 17, 33),
    (37, 20),
    (500, 5),
    (64, 70, 40),
    (5, 3, 140, 130),
    (33, 2000),
    (12, 70, 7, 7),
    (7, 1),
)
"""As NCHW words: planes, rows that could be folded, pieces, parts."""
GROUPS = (2, 3, 4, 100)


def made(shape: tuple[int, ...], layout: str, dtype: str) -> tuple[Array, ...]:
    """x, dy, a residual, gamma and beta; every sample has a mean of its own."""
    rng = np.random.default_rng(0)
    x, dy, residual = rng.normal(size=(3, *shape))
    x += 10 * rng.normal(size=(len(x), *[1] * (x.ndim - 1)))
    arrays = (to_layout(a, layout).astype(TYPES[dtype]) for a in (x, dy, residual))
    return *arrays, *rng.normal(size=(2, shape[1]))


def groups_of(n: int, k: int) -> list[slice]:
    return [slice(start, min(start + k, n)) for start in range(0, n, k)]


@paired(shape=SHAPES, k=GROUPS, layout=["NCHW", "NHWC"], dtype=TYPES, activation=[None, "relu6"])
def test_each_group_is_a_batch(
    variant: Variant, shape: tuple[int, ...], k: int, layout: str, dtype: str, activation: Any
) -> None:
    """y, dx and the residual's gradient are within a batch's bounds, group by group; dgamma and
    dbeta are the groups' sums."""
    x, dy, residual, gamma, beta = made(shape, layout, dtype)
    told: dict[str, Any] = {"layout": layout, "activation": activation}
    z = residual if activation else None
    y, mean, var = fastbn.batch_norm(x, gamma, beta, residual=z, virtual_batch=k, **told)
    kept = y if activation else None
    backward: Any = fastbn.batch_norm_backward
    options = told | {"virtual_batch": k, "dresidual": True}
    got = backward(dy, x, mean, var, gamma, y=kept, **options)
    groups = groups_of(len(x), k)
    assert mean.shape == var.shape == (len(groups), shape[1])
    parts: dict[str, list[Judged]] = {"dgamma": [], "dbeta": []}
    for i, s in enumerate(groups):
        of_group = fastbn.BatchNormResult(y[s], mean[i], var[i])
        for judged in judge_forward(
            of_group, x[s], gamma, beta, residual=None if z is None else z[s], **told
        ):
            assert_within(*judged)
        given = dy[s], x[s], mean[i], var[i], gamma
        of_kept = None if kept is None else kept[s]
        alone = backward(*given, y=of_kept, dresidual=True, **told)
        found = alone._replace(dx=got.dx[s], dresidual=got.dresidual[s])
        for judged in judge_backward(found, *given, frozen=False, y=of_kept, **told):
            assert_within(*judged)
            if judged.what in parts:
                parts[judged.what].append(judged)
    for name, listed in parts.items():
        assert_within(getattr(got, name), *total_of(listed), name)


def total_of(parts: list[Judged]) -> tuple[Array, Array]:
    """The sums of what is expected, and of the bounds."""
    expected, bounds = (np.array([p[i] for p in parts]) for i in (1, 2))
    return expected.sum(0), bounds.sum(0)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("k", [10, 11])
def test_one_group_is_the_batch(variant: Variant, layout: str, k: int) -> None:
    """With the same bits, and tables of one row."""
    x, dy, _, gamma, beta = made((10, 20, 6, 6), layout, "float32")
    y, mean, var = fastbn.batch_norm(x, gamma, beta, layout=layout)
    found = fastbn.batch_norm(x, gamma, beta, layout=layout, virtual_batch=k)
    for a, b in zip(found, (y, mean[None], var[None]), strict=True):
        assert np.array_equal(a, b)
    expected = fastbn.batch_norm_backward(dy, x, mean, var, gamma, layout=layout)
    options: dict[str, Any] = {"layout": layout, "virtual_batch": k}
    got = fastbn.batch_norm_backward(dy, x, mean[None], var[None], gamma, **options)
    for name, wanted in expected._asdict().items():
        assert np.array_equal(getattr(got, name), wanted), name


@each_backend
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_whatever_the_memory(variant: Variant, layout: str, form: str) -> None:
    """Three threads, in place or not, wherever x and dy lie: results are within their bounds."""
    x, dy, _, gamma, beta = made((11, 20, 6, 6), layout, "float32")
    options: dict[str, Any] = {"layout": layout, "virtual_batch": 4}
    a, b = FORMS[form](x), FORMS[form](dy)
    with fastbn.use_num_threads(3):
        found = fastbn.batch_norm(a, gamma, beta, **options)
        got = fastbn.batch_norm_backward(b, a, *found[1:], gamma, **options)
        placed = x.copy()
        fastbn.batch_norm(placed, gamma, beta, out=placed, **options)
    parts: dict[str, list[Judged]] = {"dgamma": [], "dbeta": []}
    for i, s in enumerate(groups_of(len(x), 4)):
        statistics = found.mean[i], found.var[i]
        for y in (found.y, placed):
            of_group = fastbn.BatchNormResult(y[s], *statistics)
            for judged in judge_forward(of_group, x[s], gamma, beta, layout=layout):
                assert_within(*judged)
        of_dx, *sums = judge_backward(
            got._replace(dx=got.dx[s]), dy[s], x[s], *statistics, gamma, layout=layout
        )
        assert_within(*of_dx)
        for judged in sums:
            parts[judged.what].append(judged)
    for name, listed in parts.items():
        assert_within(getattr(got, name), *total_of(listed), name)


@each_backend
@pytest.mark.no_kernel
def test_empty_batches(variant: Variant) -> None:
    """No samples have no groups; groups of nothing have zeros."""
    for shape, groups in (((0, 3, 4), 0), ((5, 3, 0), 3), ((5, 0, 4), 3)):
        x = np.zeros(shape, np.float32)
        y, mean, var = fastbn.batch_norm(x, virtual_batch=2)
        assert y.shape == shape
        assert mean.shape == var.shape == (groups, shape[1])
        got = fastbn.batch_norm_backward(x, x, mean, var, virtual_batch=2)
        assert not np.asarray(got.dgamma).any()


BAD: tuple[tuple[dict[str, Any], type[Exception], str], ...] = (
    ({"virtual_batch": 0}, ValueError, "virtual_batch is 0, expected 1 or more"),
    ({"virtual_batch": -3}, ValueError, "virtual_batch is -3"),
    ({"virtual_batch": 2.0}, TypeError, "virtual_batch is a float"),
    ({"virtual_batch": True}, TypeError, "virtual_batch is"),
    ({"virtual_batch": 2, "where": np.ones((5, 1, 4), bool)}, ValueError, "and where are both"),
    ({"virtual_batch": 2, "weights": np.ones(5)}, ValueError, "and weights are both"),
)


@each_backend
@pytest.mark.no_kernel
@pytest.mark.parametrize(("options", "error", "words"), BAD)
def test_bad_groups(
    variant: Variant, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    """They are refused, and nothing has been written."""
    x, out = np.zeros((5, 3, 4), np.float32), np.full((5, 3, 4), 7, np.float32)
    mean, var = np.zeros((3, 3)), np.ones((3, 3))
    with pytest.raises(error, match=words):
        fastbn.batch_norm(x, out=out, **options)
    with pytest.raises(error, match=words):
        fastbn.batch_norm_backward(x, x, mean, var, out=out, **options)
    assert (out == 7).all()


@each_backend
@pytest.mark.no_kernel
def test_bad_statistics_of_groups(variant: Variant) -> None:
    """A row each, float64, no negative variance; and no sums of others."""
    x, mean, var = np.zeros((5, 3, 4), np.float32), np.zeros((3, 3)), np.ones((3, 3))
    negative = var.copy()
    negative[1, 2] = -1
    sums: Any = np.zeros(3), np.zeros(3), 20
    backward: Any = fastbn.batch_norm_backward
    for given, options, words in (
        ((mean[0], var[0]), {}, r"mean has shape \(3,\), expected \(3, 3\)"),
        ((mean[:2], var[:2]), {}, r"mean has shape \(2, 3\)"),
        ((mean, negative), {}, r"var\[1, 2\] is -1"),
        ((mean, var), {"sums": sums}, "virtual_batch and sums are both given"),
    ):
        with pytest.raises(ValueError, match=words):
            backward(x, x, *given, virtual_batch=2, **options)
