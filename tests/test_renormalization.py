"""`BatchNorm` with small or unlike batches: virtual ones, and renormalization."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest

import fastbn
from fastbn import Renormalization
from oracle.arrays import LAYOUTS, Array, rows, wide
from oracle.bounds import bound_y
from oracle.formulas import ACTIVATIONS, moments, normalize
from support.bits import assert_same_bits
from support.grid import TYPES
from support.judge import assert_within, judge_backward, judge_y
from support.layers import CHANNELS, batch, fails, made, refused
from support.variants import each_backend

SHAPE = (11, CHANNELS, 4, 4)
K = 4
"""Groups of 4, 4 and 3 samples."""
OPEN = {"start": 0, "r_end": 0, "d_end": 0}
"""Limits that are open from the first batch on."""


def groups_of(x: Array) -> list[Array]:
    return [x[start : start + K] for start in range(0, len(x), K)]


# --- virtual batches ----------------------------------------------------------------------------


@each_backend
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_training_is_by_groups(layout: str, activation: Any) -> None:
    """Forward and backward are the verbs'; evaluation does not know of groups."""
    x, dy, z = batch(SHAPE, layout)
    bn = made(virtual_batch=K, layout=layout, activation=activation)
    plain = made("evaluation", layout=layout, activation=activation)
    options: Any = {"layout": layout, "activation": activation, "virtual_batch": K}
    y, mean, var = fastbn.batch_norm(x, bn.gamma, bn.beta, residual=z, **options)
    gate = None if activation is None else y
    got = fastbn.batch_norm_backward(dy, x, mean, var, bn.gamma, y=gate, dresidual=True, **options)
    assert_same_bits({"y": bn(x, residual=z)}, {"y": y})
    found = {"dx": bn.backward(dy, dresidual=True), "dgamma": bn.dgamma, "dbeta": bn.dbeta}
    assert_same_bits(found | {"dresidual": bn.dresidual}, got._asdict())
    plain.load_state_dict(bn.state_dict())
    assert_same_bits({"y": bn.eval()(x, residual=z)}, {"y": plain(x, residual=z)})


@each_backend
@pytest.mark.parametrize("unbiased", [True, False])
def test_running_statistics_take_the_groups_mean(unbiased: bool) -> None:
    """By their counts, of mean and (unbiased) variance."""
    x, _, _ = batch(SHAPE, dtype=np.float64)
    bn = made(virtual_batch=K, momentum=0.25, unbiased=unbiased, dtype="float64")
    before = bn.state_dict()
    bn(x)
    axes = (0, 2, 3)
    sizes = [len(g) for g in groups_of(x)]
    means = [g.mean(axes) for g in groups_of(x)]
    variances = [g.var(axes, ddof=int(unbiased)) for g in groups_of(x)]
    for name, each in (("running_mean", means), ("running_var", variances)):
        expected = 0.75 * before[name] + 0.25 * np.average(each, 0, sizes)
        np.testing.assert_allclose(getattr(bn, name), expected, rtol=1e-12)
    assert bn.num_batches_tracked == before["num_batches_tracked"] + 1


@each_backend
def test_a_group_of_one_value() -> None:
    """It is refused, or left out: y = beta there, and the others' statistics run."""
    x, dy, _ = batch((2 * K + 1, CHANNELS))
    words = f"x has one value a channel in group 2 of 3 (virtual_batch is {K}), expected two or"
    bn = made(virtual_batch=K)
    with refused(bn, ValueError, words, x):
        bn(x)
    bn, others = (made(virtual_batch=K, one_value="skip") for _ in range(2))
    y, dx = bn(x), bn.backward(dy)
    np.testing.assert_array_equal(y[-1], bn.beta)
    assert not dx[-1].any()
    others(x[:-1])
    assert_same_bits(bn.state_dict(), others.state_dict())
    before = bn.state_dict()
    for alone in (x[:1], x[:0]):
        bn(alone)
        assert_same_bits(bn.state_dict(), before)


@each_backend
@pytest.mark.parametrize("policy", ["update", "raise", "skip"])
def test_nan_in_a_group(policy: str) -> None:
    """The policy sees it, in whichever group it is, before anything is written."""
    x, _, _ = batch(SHAPE)
    x[-1, 1, 0, 0] = np.nan
    bn, out = made(virtual_batch=K, nonfinite=policy), np.zeros_like(x)
    before = bn.state_dict()
    if policy == "raise":
        with refused(bn, ValueError, "x has a mean of nan in channel 1", x, out):
            bn(x, out=out)
        return
    y = bn(x, out=out)
    assert np.isnan(y[2 * K :, 1]).all()
    assert np.isfinite(y[: 2 * K]).all()
    assert np.isnan(bn.running_mean[1]) == (policy == "update")
    if policy == "skip":
        assert_same_bits(bn.state_dict(), before)


@each_backend
def test_estimates_are_of_whole_batches() -> None:
    """Those of a layer with virtual batches are those of one without."""
    batches = [batch(SHAPE)[i] for i in range(3)]
    batches += [batches[0][:0], batches[0][:, :, :0]]
    bn, plain = made(virtual_batch=K), made()
    for layer in (bn, plain):
        fastbn.reestimate([layer], layer, batches)
    assert_same_bits(bn.state_dict(), plain.state_dict())


# --- renormalization ----------------------------------------------------------------------------


@pytest.mark.no_kernel
def test_limits_open_in_time() -> None:
    """They are closed up to the start, open in proportion, and stay open."""
    by_paper = Renormalization()
    for batches, r, d in (
        (0, 1, 0),
        (5000, 1, 0),
        (15000, 1 + 2 * 10 / 35, 2.5),
        (25000, 1 + 2 * 20 / 35, 5),
        (40000, 3, 5),
        (10**9, 3, 5),
    ):
        assert by_paper.at(batches) == pytest.approx((r, d))
    assert Renormalization(r_max=2, d_max=1, **OPEN).at(0) == (2, 1)
    assert pickle.loads(pickle.dumps(by_paper)) == by_paper


def by_formula(bn: Any, x: Array, limits: tuple[float, float]) -> tuple[Array, Array, Array, Array]:
    """r, d and the batch's statistics: Ioffe (2017), Algorithm 1, in extended precision."""
    mean, var = moments(wide(x, bn.layout))
    running_mean, running_var = (a.astype(np.longdouble) for a in (bn.running_mean, bn.running_var))
    deviation, running = np.sqrt(var + bn.eps), np.sqrt(running_var + bn.eps)
    r = np.clip(deviation / running, 1 / limits[0], limits[0])
    d = np.clip((mean - running_mean) / running, -limits[1], limits[1])
    return r, d, mean, var


LIMITS = ((1.0, 0.0), (1.2, 0.3), (100.0, 100.0))
"""Batch norm; some channels clipped; none."""


@each_backend
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_training_is_renormalized(
    dtype: Any, activation: Any, limits: tuple[float, float], layout: str
) -> None:
    """y and its gradients, r and d being constants, are within batch norm's bounds at gamma * r and
    beta + gamma * d; the running statistics are batch norm's."""
    x, dy, z = batch(SHAPE, layout, dtype)
    told: Any = {"layout": layout, "activation": activation, "dtype": "float64"}
    r_max, d_max = limits
    bn = made(renormalization=Renormalization(r_max=r_max, d_max=d_max, **OPEN), **told)
    plain = made(**told)
    r, d, mean, var = by_formula(bn, x, limits)
    gamma = bn.gamma * r
    beta = bn.beta + bn.gamma * d
    y, _ = bn(x, residual=z), plain(x, residual=z)
    exact = normalize(wide(x, layout), mean, var, gamma, beta, bn.eps)
    bound = bound_y(np.dtype(dtype), exact, mean, var, gamma, beta, bn.eps)
    assert_within(*judge_y(y, exact, bound, layout, activation, z))
    assert_same_bits(bn.state_dict(), plain.state_dict())
    dx = bn.backward(dy, dresidual=True)
    given = dy, x, *fastbn.moments(x, layout=layout), gamma.astype(float)
    gate: Any = {"y": None if activation is None else y, "activation": activation}
    raw: Any = fastbn.batch_norm_backward(*given, dresidual=True, layout=layout, **gate)
    found = raw._replace(dx=dx, dresidual=bn.dresidual)
    for judged in judge_backward(found, *given, frozen=False, layout=layout, **gate):
        assert_within(*judged)
    np.testing.assert_allclose(bn.dgamma, r * raw.dgamma + d * raw.dbeta, rtol=1e-9)
    np.testing.assert_allclose(bn.dbeta, raw.dbeta, rtol=1e-12)


@each_backend
def test_masks_and_weights() -> None:
    """r and d are of what counts, and y is 0 elsewhere."""
    x, dy, _ = batch(SHAPE)
    where = np.random.default_rng(1).random((SHAPE[0], 1, *SHAPE[2:])) < 0.7
    weights = np.arange(SHAPE[0]) % 3 / 2
    bn = made(renormalization=Renormalization(**OPEN))
    mean, var = fastbn.moments(x, where=where, weights=weights)
    rstd = 1 / np.sqrt(bn.running_var + bn.eps)
    r = np.clip(np.sqrt(var + bn.eps) * rstd, 1 / 3, 3)
    d = np.clip((mean - bn.running_mean) * rstd, -5, 5)
    gamma, beta = bn.gamma * r, bn.gamma * d + bn.beta
    y = bn(x, where=where, weights=weights)
    given = *(a.astype(np.longdouble) for a in (mean, var, gamma, beta)), bn.eps
    exact = normalize(wide(x, "NCHW"), *given)
    bound = bound_y(y.dtype, exact, *given)
    counts = rows(np.broadcast_to(where, x.shape), "NCHW")
    judged = judge_y(y, exact, bound, "NCHW", None, None)
    expected, bound = (np.where(counts, a, 0) for a in judged[1:3])
    assert_within(judged.actual, expected, bound, "y")
    dx = bn.backward(dy)
    assert not dx[~np.broadcast_to(where, dx.shape)].any()


@each_backend
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_types(dtype: str) -> None:
    """y of a half type is within its bound."""
    x = batch(SHAPE)[0].astype(TYPES[dtype])
    limits = 3.0, 5.0
    bn = made(renormalization=Renormalization(**OPEN), dtype="float64")
    r, d, mean, var = by_formula(bn, x, limits)
    given = mean, var, bn.gamma * r, bn.beta + bn.gamma * d, bn.eps
    exact = normalize(wide(x, "NCHW"), *given)
    bound = bound_y(x.dtype, exact, *given)
    assert_within(*judge_y(bn(x), exact, bound, "NCHW", None, None))


@each_backend
def test_closed_limits_are_batch_norm() -> None:
    """Up to the start of the schedule, and where nothing runs; evaluation is so always."""
    x, dy, _ = batch(SHAPE)
    bn, plain = made(renormalization=Renormalization(start=10, r_end=10, d_end=10)), made()
    results = []
    for layer in (bn, plain):
        layer.num_batches_tracked = 9
        found = {"y": layer(x), "dx": layer.backward(dy)}
        results.append(found | {"dgamma": layer.dgamma, "dbeta": layer.dbeta})
    for name, wanted in results[1].items():
        np.testing.assert_allclose(results[0][name], wanted, rtol=1e-6, atol=1e-6)
    assert abs(bn(x) - plain(x)).max() > 0.1
    assert_same_bits({"y": bn.eval()(x)}, {"y": plain.eval()(x)})
    again = copy.deepcopy(bn.train())
    assert_same_bits({"y": again(x)}, {"y": bn(x)})


@each_backend
def test_one_value_and_nan() -> None:
    """One value a channel is for `one_value`, as ever; a NaN stays in its channel."""
    x, _, _ = batch(SHAPE)
    options: Any = {"renormalization": Renormalization(**OPEN)}
    bn = made(one_value="skip", **options)
    np.testing.assert_array_equal(bn(x[:1, :, 0, 0])[0], bn.beta)
    x[3, 2, 1, 1] = np.nan
    for policy in ("update", "skip"):
        y = made(nonfinite=policy, **options)(x)
        assert np.isnan(y[:, 2]).all()
        assert np.isfinite(np.delete(y, 2, 1)).all()
    bn = made(nonfinite="raise", **options)
    with refused(bn, ValueError, "x has a mean of nan in channel 2", x):
        bn(x, out=x)


CLOSED = Renormalization()
BAD: tuple[tuple[Any, type[Exception], str], ...] = (
    ({"virtual_batch": 0}, ValueError, "virtual_batch is 0, expected 1 or more"),
    ({"virtual_batch": "8"}, TypeError, "virtual_batch is a str"),
    (
        {"virtual_batch": 8, "one_value": "running"},
        ValueError,
        "one_value is 'running', expected 'raise' or 'skip' where virtual_batch is 8",
    ),
    ({"renormalization": True}, TypeError, "renormalization is a bool (True), expected a fastbn."),
    (
        {"renormalization": CLOSED, "track_running_stats": False},
        ValueError,
        "renormalization is given, expected None where track_running_stats is False",
    ),
    (
        {"renormalization": CLOSED, "virtual_batch": 8},
        ValueError,
        "renormalization and virtual_batch are both given",
    ),
)


@pytest.mark.no_kernel
@pytest.mark.parametrize(("options", "error", "words"), BAD)
def test_layers_that_make_no_sense(options: Any, error: type[Exception], words: str) -> None:
    """They are refused when they are made."""
    with fails(error, words):
        fastbn.BatchNorm(CHANNELS, **options)


@pytest.mark.no_kernel
@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"r_max": 0.5}, ValueError, "r_max is 0.5, expected a finite number, 1 or more"),
        ({"r_max": np.inf}, ValueError, "r_max is inf, expected a finite number"),
        ({"r_max": np.nan}, ValueError, "r_max is nan, expected a finite number"),
        ({"r_max": "3"}, TypeError, "r_max is a str ('3'), expected a number"),
        ({"d_max": -1}, ValueError, "d_max is -1, expected a finite number, 0 or more"),
        ({"d_max": True}, TypeError, "d_max is a bool (True), expected a number"),
        ({"start": -1}, ValueError, "start is -1, expected a number of batches, zero or more"),
        ({"start": 1.5}, TypeError, "start is a float (1.5), expected a whole number"),
        ({"r_end": 100}, ValueError, "r_end is 100, expected 5000 or more, as start is"),
        ({"d_end": 4999}, ValueError, "d_end is 4999, expected 5000 or more"),
    ],
)
def test_limits_that_make_no_sense(options: Any, error: type[Exception], words: str) -> None:
    """They are refused."""
    with fails(error, words):
        Renormalization(**options)


@pytest.mark.no_kernel
def test_state_that_renormalization_cannot_go_by() -> None:
    """It is refused when it is missed, and nothing is written."""
    x, _, _ = batch(SHAPE)
    bn = made(renormalization=Renormalization(**OPEN))
    bn.num_batches_tracked = None
    with refused(bn, ValueError, "num_batches_tracked is None, expected a number of batches", x):
        bn(x)
    bn = made(renormalization=Renormalization(**OPEN))
    bn.running_mean = bn.running_var = None
    with refused(bn, ValueError, "running_mean and running_var are None, expected arrays", x):
        bn(x)


@pytest.mark.no_kernel
def test_masks_do_not_go_with_groups() -> None:
    """A layer with virtual batches says so, and nothing is written."""
    x, _, _ = batch(SHAPE)
    bn = made(virtual_batch=K)
    with refused(bn, ValueError, "virtual_batch and where are both given", x):
        bn(x, where=np.ones((SHAPE[0], 1, 1, 1), bool))


def test_closed_limits_ask_nothing_of_running_statistics() -> None:
    """Batch norm, also after a batch that left NaN in them."""
    x = batch(SHAPE)[0]
    bad = x.copy()
    bad[0, 1] = np.nan
    plain, closed = made(), made(renormalization=Renormalization())
    for layer in (plain, closed):
        layer(bad)
    assert_same_bits({"y": closed(x)}, {"y": plain(x)})


@pytest.mark.parametrize("k", [0, -1, 1.5, "a"])
def test_what_is_set_later_is_checked(k: Any) -> None:
    """By the call, in the words of the constructor."""
    layer, other = made(), made()
    layer.virtual_batch, other.renormalization = k, k
    with pytest.raises((TypeError, ValueError), match=r"^virtual_batch is "):
        layer(batch(SHAPE)[0])
    with pytest.raises(TypeError, match=r"^renormalization is "):
        other(batch(SHAPE)[0])
