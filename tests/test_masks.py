"""Masks and weights: places that do not count change nothing, and samples weigh in statistics."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import pytest

import fastbn
from fastbn.backends.base import BackwardTables, ForwardTables, Selection
from oracle.arrays import Array, channel_axis, rows, wide
from oracle.bounds import bound_mean, bound_var, factor, stored
from oracle.formulas import backward, moments, rstd_of
from support.bits import assert_same_bits
from support.grid import TYPES
from support.judge import assert_within, judge_backward, judge_forward
from support.machines import ALWAYS_STREAM, pretend
from support.memory import against_a_page
from support.pairs import paired
from support.variants import Variant, each_backend

SHAPES = (
    (4, 3, 5, 5),
    (2, 17, 33),
    (5, 20),
    (70, 3),
    (900, 5),
    (300, 100),
    (3, 64, 40),
    (2, 3, 140, 130),
    (9, 1, 4),
    (9, 1),
    (4001, 3, 2, 2),
    (20, 70, 7, 7),
    (40, 3000),
)
"""As NCHW words: planes, chunks of them, pieces; rows, folded and not, and in parts."""
SEVERAL = ((900, 5, 3), (301, 1, 3), (1001, 3), (130, 12), (33, 24), (700, 100), (70, 2, 1, 7))
"""The same, of several samples in a row or a vector; in NHWC some of them weigh alike."""
Test = TypeVar("Test", bound=Callable[..., None])


class Masked:
    """A problem whose masked places hold what must not be looked at."""

    def __init__(self, shape: tuple[int, ...], layout: str, dtype: Any, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        if layout == "NHWC":
            shape = (shape[0], *shape[2:], shape[1])
        axis = channel_axis(len(shape), layout)
        single = (*shape[:axis], 1, *shape[axis + 1 :])
        self.layout, self.axis = layout, axis
        self.where = rng.random(single) < rng.choice([0.2, 0.7, 0.95])
        self.where.flat[rng.integers(self.where.size, size=2)] = True
        self.x = (3 + 2 * rng.normal(size=shape)).astype(dtype)
        self.dy, self.residual = (rng.normal(size=shape).astype(dtype) for _ in range(2))
        for array, value in ((self.x, np.nan), (self.dy, np.inf), (self.residual, np.nan)):
            np.copyto(array, np.asarray(value, array.dtype), where=~self.where)
        self.gamma, self.beta = rng.normal(size=(2, shape[axis]))
        self.weights = rng.integers(0, 4, shape[0]).astype(np.float64)
        self.weights[self.samples.argmax()] = 2

    @property
    def samples(self) -> Array:
        """How many places count in each sample."""
        counts: Array = self.where.reshape(len(self.where), -1).sum(1)
        return counts

    def counted(self, a: Array, repeated: Array | None = None) -> Array:
        """What counts of an array like x, as rows of channels; samples perhaps several times."""
        a, kept = np.moveaxis(a, self.axis, -1), self.where.take(0, self.axis)
        if repeated is not None:
            a, kept = np.repeat(a, repeated, axis=0), np.repeat(kept, repeated, axis=0)
        return np.asarray(a[kept])

    def is_zero_elsewhere(self, a: Array) -> bool:
        return not a[~np.broadcast_to(self.where, a.shape)].astype(np.float64).any()


def problems(*shapes: tuple[int, ...]) -> Callable[[Test], Test]:
    """Every shape and type once, the layouts in turn."""
    listed = [
        (shape, ("NCHW", "NHWC")[(i + j) % 2], dtype)
        for i, shape in enumerate(shapes)
        for j, dtype in enumerate(TYPES)
    ]
    return pytest.mark.parametrize(("shape", "layout", "dtype"), listed)


@paired(shape=SHAPES, layout=["NCHW", "NHWC"], dtype=TYPES, activation=[None, "relu6"])
def test_masked_forward_and_backward(
    variant: Variant, shape: tuple[int, ...], layout: str, dtype: str, activation: Any
) -> None:
    """What counts is as if it stood alone, within the bounds; the rest is 0."""
    p = Masked(shape, layout, TYPES[dtype])
    options: dict[str, Any] = {"layout": layout, "activation": activation, "where": p.where}
    tail: dict[str, Any] = {"residual": p.residual if activation else None}
    y, mean, var = fastbn.batch_norm(p.x, p.gamma, p.beta, **options, **tail)
    alone: dict[str, Any] = {"layout": "NHWC", "activation": activation}
    x, residual = p.counted(p.x), p.counted(p.residual) if activation else None
    result = fastbn.BatchNormResult(p.counted(y), mean, var)
    for judged in judge_forward(result, x, p.gamma, p.beta, residual=residual, **alone):
        assert_within(*judged)
    again = fastbn.normalize(p.x, mean, var, p.gamma, p.beta, **options, **tail)
    assert np.array_equal(again, y)
    kept = y if activation else None
    for frozen, verb in ((False, fastbn.batch_norm_backward), (True, fastbn.normalize_backward)):
        backward: Any = verb
        got = backward(p.dy, p.x, mean, var, p.gamma, y=kept, dresidual=True, **options)
        of_counted = got._replace(dx=p.counted(got.dx), dresidual=p.counted(got.dresidual))
        given = p.counted(p.dy), x, mean, var, p.gamma
        told = alone | {"frozen": frozen, "y": None if kept is None else p.counted(y)}
        for judged in judge_backward(of_counted, *given, **told):
            assert_within(*judged)
        assert all(p.is_zero_elsewhere(a) for a in (y, got.dx, got.dresidual))


@problems(*SHAPES, *SEVERAL)
def test_weighed_statistics(
    variant: Variant, shape: tuple[int, ...], layout: str, dtype: str
) -> None:
    """A sample that weighs w counts as w samples; one that weighs nothing may hold NaN."""
    p = Masked(shape, layout, TYPES[dtype])
    mean, var = moments(wide(p.counted(p.x, p.weights.astype(int)), "NHWC"))
    p.x[p.weights == 0] = np.nan
    options: dict[str, Any] = {"layout": layout, "where": p.where, "weights": p.weights}
    found = fastbn.moments(p.x, **options)
    for got in (found, fastbn.batch_norm(p.x, **options)[1:]):
        assert_within(got[0], mean, bound_mean(mean, var, 1e-5), "mean")
        assert_within(got[1], var, bound_var(var), "var")


@problems(*SHAPES, *SEVERAL)
def test_gradient_through_weighed_statistics(
    variant: Variant, shape: tuple[int, ...], layout: str, dtype: str
) -> None:
    """Of w * mean(dy) and w * mean(dy * xhat), the means taken over the sum of the weights."""
    p = Masked(shape, layout, TYPES[dtype])
    options: dict[str, Any] = {"layout": layout, "where": p.where, "weights": p.weights}
    _, mean, var = fastbn.batch_norm(p.x, **options)
    got = fastbn.batch_norm_backward(p.dy, p.x, mean, var, p.gamma, **options)
    x, dy = (wide(p.counted(a), "NHWC") for a in (p.x, p.dy))
    m, v, gamma = (a.astype(np.longdouble) for a in (mean, var, p.gamma))
    places = np.repeat(p.weights, p.samples)
    exact = backward(dy, x, m, v, gamma, 1e-5, frozen=False)
    share = places / (p.samples @ p.weights)
    rstd = rstd_of(v, 1e-5)[:, None]
    means = (exact.dbeta[:, None], exact.dgamma[:, None] * exact.xhat)
    dx = gamma[:, None] * rstd * (dy - share * (means[0] + means[1]))
    k = factor(p.x.dtype, m, rstd[:, 0])[:, None]
    n = dy.shape[1]
    size = np.abs(dy) + share * n * (
        exact.mean_dy[:, None] + np.abs(exact.xhat) * exact.mean_dy_xhat[:, None]
    )
    bound = 2 * k * np.abs(gamma[:, None]) * rstd * size
    dtype_of = np.dtype(p.x.dtype.type)
    assert_within(rows(p.counted(got.dx), "NHWC"), dx, stored(dtype_of, dx, bound), "dx")


def everything(p: Masked, **options: Any) -> dict[str, Array]:
    """What all verbs give."""
    selected = {"layout": p.layout, "where": p.where, **options}
    y, mean, var = fastbn.batch_norm(p.x, p.gamma, p.beta, residual=p.residual, **selected)
    got = fastbn.batch_norm_backward(p.dy, p.x, mean, var, p.gamma, dresidual=True, **selected)
    sums = fastbn.gradient_sums(p.dy, p.x, mean, var, **selected)
    found = {"y": y, "mean": mean, "var": var, **got._asdict()}
    found |= {"sum of dgamma": sums.dgamma, "sum of dbeta": sums.dbeta}
    return found | {"count": np.asarray(sums.count)}


@pytest.mark.parametrize("weighs", [False, True])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("shape", SHAPES[::2])
def test_whatever_is_masked(
    variant: Variant, shape: tuple[int, ...], layout: str, weighs: bool
) -> None:
    """Results have the same bits whatever stands where nothing counts, in whatever memory, on one
    thread or three."""
    p = Masked(shape, layout, np.float32)
    weights = p.weights if weighs else None
    expected = everything(p, weights=weights)
    for name in ("x", "dy", "residual"):
        setattr(p, name, np.where(p.where, getattr(p, name), np.float32(1e30)))
    p.where = np.asfortranarray(p.where)
    with fastbn.use_num_threads(3):
        found = everything(p, weights=weights)
    for name, a in expected.items():
        assert np.array_equal(found[name], a), name


@pytest.mark.parametrize("offset", [0, 1, 3, 13])
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((700, 4), "NCHW"),
        ((130, 16), "NCHW"),
        ((700, 100), "NCHW"),
        ((70, 256), "NCHW"),
        ((50, 4, 8), "NCHW"),
        ((50, 8, 7), "NHWC"),
        ((20, 3, 50), "NCHW"),
    ],
)
def test_streamed_to_any_address(
    variant: Variant, shape: tuple[int, ...], layout: str, offset: int
) -> None:
    """Vectors that go round the end of a row have the weights and masks of both its sides."""
    p = Masked(shape, layout, np.float32)
    options: dict[str, Any] = {"layout": layout, "where": p.where, "weights": p.weights}
    y, mean, var = fastbn.batch_norm(p.x, **options)
    dx = fastbn.batch_norm_backward(p.dy, p.x, mean, var, **options).dx
    buffer = np.zeros(p.x.size + 32, np.float32)
    first = -buffer.ctypes.data % 64 // 4 + offset
    out = buffer[first : first + p.x.size].reshape(p.x.shape)
    with pretend(**ALWAYS_STREAM):
        fastbn.batch_norm(p.x, out=out, **options)
        assert np.array_equal(out, y)
        fastbn.batch_norm_backward(p.dy, p.x, mean, var, out=out, **options)
        assert np.array_equal(out, dx)


@pytest.mark.parametrize(
    "shape", [(1, 5, 3, 1), (1, 901, 1, 1), (1, 77, 20, 1), (2, 41, 3, 5), (1, 9, 2, 17)]
)
def test_nothing_is_read_past_the_end(variant: Variant, shape: tuple[int, ...]) -> None:
    """Of a mask and weights that lie before a page that nobody may read."""
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(2, *shape))
    runs, samples, channels, size = shape
    mask = against_a_page(rng.random((runs, samples, size)) < 0.7)
    weights = against_a_page(rng.uniform(0.5, 1.5, (runs, samples)))
    weights[..., -1], mask[..., -1] = 1.0, True
    one, out = np.ones((runs, channels)), np.empty_like(x)
    for run in range(runs):
        weights[run] *= 100 / (mask[run].sum(1) @ weights[run])
    selection = Selection(mask, weights, np.full(len(mask), 100.0))
    tables = ForwardTables(one, one, 1e-5)
    mean, var = variant.backend.forward(x, tables, out, 1, selection=selection)
    counted = np.broadcast_to((mask * weights[..., None])[:, :, None], shape) / 100
    expected = (counted * x).sum((1, 3))
    assert np.allclose(mean, expected, rtol=1e-12)
    assert np.allclose(var, (counted * (x - expected[:, None, :, None]) ** 2).sum((1, 3)))
    assert not out[~np.broadcast_to(mask[:, :, None], shape)].any()
    given = BackwardTables(mean, var, one, 1e-5)
    _, dbeta = variant.backend.backward(dy, x, given, out, 1, selection=selection)
    assert np.allclose(dbeta, (dy * mask[:, :, None]).sum((1, 3)))


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("shape", SHAPES[::3])
def test_masks_that_select_everything(
    variant: Variant, shape: tuple[int, ...], weights: bool
) -> None:
    """All places, each with a weight of 1, give what no mask gives; and a mask broadcasts."""
    x = np.random.default_rng(0).normal(size=shape)
    ones = np.ones(len(x)) if weights else None
    mean, var = moments(wide(x, "NCHW"))
    found = fastbn.moments(x, where=np.ones((1,) * x.ndim, bool), weights=ones)
    assert_within(found.mean, mean, bound_mean(mean, var, 1e-5), "mean")
    assert_within(found.var, var, bound_var(var), "var")


@each_backend
@pytest.mark.no_kernel
@pytest.mark.parametrize("how", ["where", "weights"])
def test_nothing_counts(variant: Variant, how: str) -> None:
    """The batch is as an empty one: results of zeros, statistics of zeros, zero gradients."""
    x = np.full((4, 3, 5), np.nan, np.float32)
    option = {"where": np.zeros((4, 1, 5), bool), "weights": np.zeros(4)}
    selected: dict[str, Any] = {how: option[how]}
    out = np.full_like(x, 7)
    y, mean, var = fastbn.batch_norm(x, out=out, **selected)
    assert y is out
    got = fastbn.batch_norm_backward(x, x, mean, var, dresidual=True, **selected)
    for a in (y, mean, var, *got, *fastbn.moments(x, **selected)):
        assert not np.asarray(a).any()


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_in_place(variant: Variant, layout: str) -> None:
    """`out=x` and `out=dy` give what a fresh array gets."""
    p = Masked((4, 20, 5, 6), layout, np.float32)
    options: dict[str, Any] = {"layout": layout, "where": p.where, "weights": p.weights}
    y, mean, var = fastbn.batch_norm(p.x, **options)
    dx = fastbn.batch_norm_backward(p.dy, p.x, mean, var, **options).dx
    dy, x = p.dy.copy(), p.x.copy()
    fastbn.batch_norm_backward(dy, x, mean, var, out=dy, **options)
    fastbn.batch_norm(x, out=x, **options)
    assert np.array_equal(dy, dx)
    assert np.array_equal(x, y)


BAD: tuple[tuple[str, Any, type[Exception], tuple[str, ...]], ...] = (
    ("where", np.ones((4, 1, 5), np.uint8), TypeError, ("where has dtype uint8", "bool")),
    ("where", [True], TypeError, ("where is a list", "numpy.ndarray of bool")),
    ("where", np.ma.ones((4, 1, 5), bool), TypeError, ("MaskedArray", "filled(False)")),
    ("where", np.ones((4, 5), bool), ValueError, ("(4, 5)", "expand_dims(where, 1)")),
    ("where", np.ones((4, 3, 5), bool), ValueError, ("(4, 3, 5)", "the same for all channels")),
    ("where", np.ones((3, 1, 5), bool), ValueError, ("(3, 1, 5)", "(4, 1, 5)")),
    ("weights", np.ones(5), ValueError, ("weights has shape (5,)", "(4,)")),
    ("weights", np.ones((4, 1)), ValueError, ("weights has shape (4, 1)", "one value a sample")),
    ("weights", np.ones(4, int), TypeError, ("weights has dtype int64",)),
    ("weights", np.array([1, 1, -0.5, 1]), ValueError, ("weights[2] is -0.5", "zero or more")),
    ("weights", np.array([1, np.nan, 1, 1]), ValueError, ("weights[1] is nan",)),
    ("weights", np.array([1, 1, 1, np.inf]), ValueError, ("weights[3] is inf", "finite")),
)


@each_backend
@pytest.mark.no_kernel
@pytest.mark.parametrize(("name", "value", "error", "words"), BAD)
def test_bad_masks_and_weights(
    variant: Variant, name: str, value: Any, error: type[Exception], words: tuple[str, ...]
) -> None:
    """They are refused, and nothing has been written."""
    x, mean, var = np.zeros((4, 3, 5), np.float32), np.zeros(3), np.ones(3)
    out = np.full_like(x, 7)
    given: dict[str, Any] = {name: value}
    calls: list[Callable[[], object]] = [
        lambda: fastbn.moments(x, **given),
        lambda: fastbn.batch_norm(x, out=out, **given),
        lambda: fastbn.batch_norm_backward(x, x, mean, var, out=out, **given),
        lambda: fastbn.gradient_sums(x, x, mean, var, **given),
    ]
    if name == "where":
        calls += [
            lambda: fastbn.normalize(x, mean, var, out=out, **given),
            lambda: fastbn.normalize_backward(x, x, mean, var, out=out, **given),
        ]
    for call in calls:
        with pytest.raises(error) as caught:
            call()
        assert all(word in str(caught.value) for word in words), str(caught.value)
    assert (out == 7).all()


@each_backend
@pytest.mark.no_kernel
def test_out_may_not_overlap_a_mask(variant: Variant) -> None:
    """Nor weights."""
    memory = np.zeros(64)
    x, out = np.ones((4, 2)), memory[:8].reshape(4, 2)
    with pytest.raises(ValueError, match="out overlaps weights"):
        fastbn.batch_norm(x, weights=memory[4:8], out=out)
    with pytest.raises(ValueError, match="out overlaps where"):
        fastbn.batch_norm(x, where=memory.view(bool)[:4, None], out=out)


SCALES = (2.0**1000, 2.0**-1060)
"""Weights that many times the usual ones overflow as squares and in float32, and are subnormal."""


@each_backend
@problems((4, 3, 5, 5), (33, 24), (2, 17, 33))
def test_weights_of_any_scale(
    variant: Variant, shape: tuple[int, ...], layout: str, dtype: str
) -> None:
    """Weights times a power of two give the same bits, but for the count, which is theirs, and
    nothing warns."""
    p = Masked(shape, layout, TYPES[dtype])
    expected = everything(p, weights=p.weights)
    count = expected.pop("count")
    for scale in SCALES:
        weights = p.weights * scale
        with np.errstate(all="raise"):
            found = everything(p, weights=weights)
        assert found.pop("count") == count * scale
        assert_same_bits(found, expected)


@each_backend
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_weights_of_any_scale_and_roundings(variant: Variant, layout: str) -> None:
    """Results are as near the usual ones as roundings of the weights allow."""
    p = Masked((20, 3, 5, 5), layout, np.float32)
    expected = everything(p, weights=p.weights)
    for scale in (1e304, 1e-310):
        found = everything(p, weights=p.weights * scale)
        assert np.isclose(found["count"], p.samples @ p.weights * scale, rtol=1e-12, atol=0)
        for name in expected.keys() - {"count"}:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-5)


@each_backend
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("shape", [(40, 3), (20, 3, 5, 5)])
def test_the_weight_of_a_masked_sample(
    variant: Variant, shape: tuple[int, ...], layout: str
) -> None:
    """It changes nothing, however far from the others it is."""
    p = Masked(shape, layout, np.float32)
    p.where[1] = False
    p.weights[:2] = 1.0, 0.0
    expected = everything(p, weights=p.weights)
    for weight in (1e300, 1e-300):
        p.weights[1] = weight
        assert_same_bits(everything(p, weights=p.weights), expected)


def test_nan_in_a_sample_that_hardly_weighs(variant: Variant) -> None:
    """It is seen, though beside the others its weight is none that float64 holds."""
    x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    x[2, 1] = np.nan
    for heavy in (1.0, 2.0, 1e307):
        with np.errstate(all="raise"):
            mean, _ = fastbn.moments(x, weights=np.array([heavy, heavy, 5e-324, 0.0]))
        assert np.array_equal(np.isnan(mean), [False, True, False])


@each_backend
@pytest.mark.no_kernel
def test_weights_that_float64_cannot_add_up(variant: Variant) -> None:
    """They are refused, and nothing has been written; what the message says to do works."""
    x, out = np.ones((4, 3, 5), np.float32), np.full((4, 3, 5), 7, np.float32)
    weights = np.full(4, 1e307)  # their sum would fit, that over the places does not
    mean, var = np.zeros(3), np.ones(3)
    bn = fastbn.BatchNorm(3)
    calls: list[Callable[[], object]] = [
        lambda: fastbn.moments(x, weights=weights),
        lambda: fastbn.batch_norm(x, weights=weights, out=out),
        lambda: fastbn.batch_norm_backward(x, x, mean, var, weights=weights, out=out),
        lambda: fastbn.gradient_sums(x, x, mean, var, weights=weights),
        lambda: fastbn.Moments.of(x, weights=weights),
        lambda: bn(x, weights=weights, out=out),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"^weights add up to .* divide them by the largest$"):
            call()
    assert (out == 7).all()
    assert int(np.asarray(bn.num_batches_tracked)) == 0


def test_weights_divided_by_the_largest() -> None:
    """As the message about their sum says; and sums are of the places that count."""
    x, where = np.random.default_rng(0).normal(size=(4, 3, 5)), np.arange(5)[None, None] < 2
    weights = np.array([1.5e308, 1.5e308, 0.5e308, 0.0])
    mean, _ = fastbn.moments(x, weights=weights / weights.max())
    assert np.allclose(mean, np.average(x.mean(2), 0, [3, 3, 1, 0]))
    masked = fastbn.moments(x, where=where, weights=weights / 8)
    expected = fastbn.moments(x[:, :, :2], weights=weights / 8)
    np.testing.assert_allclose(masked, expected, rtol=1e-12)


@each_backend
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("weighs", [False, True])
def test_the_layer(variant: Variant, weighs: bool, unbiased: bool) -> None:
    """It does what the verbs do; n of n / (n - 1) is how many values count or, with weights, their
    effective number."""
    p = Masked((6, 3, 4, 5), "NCHW", np.float32)
    selected: dict[str, Any] = {"where": p.where, "weights": p.weights if weighs else None}
    bn = fastbn.BatchNorm(3, momentum=1.0, unbiased=unbiased, dtype="float64")
    y, dx = bn(p.x, **selected), bn.backward(p.dy)
    expected, mean, var = fastbn.batch_norm(p.x, bn.gamma, bn.beta, **selected)
    got = fastbn.batch_norm_backward(p.dy, p.x, mean, var, bn.gamma, **selected)
    n = p.samples @ p.weights
    n = n**2 / (p.samples @ p.weights**2) if weighs else p.where.sum()
    for found, wanted in ((y, expected), (dx, got.dx), (bn.dgamma, got.dgamma)):
        assert np.array_equal(np.asarray(found), np.asarray(wanted))
    assert bn.running_mean is not None
    assert bn.running_var is not None
    assert np.array_equal(bn.running_mean, mean)
    assert np.allclose(bn.running_var, var * (n / (n - 1) if unbiased else 1), rtol=1e-15)


@each_backend
def test_the_layer_in_evaluation(variant: Variant) -> None:
    """Masked places are 0 on both ways, and the gradients are those of what counts."""
    p = Masked((6, 3, 4, 5), "NCHW", np.float32)
    bn = fastbn.BatchNorm(3, activation="relu").eval()
    y, dx = bn(p.x, where=p.where), bn.backward(p.dy)
    assert p.is_zero_elsewhere(y)
    assert p.is_zero_elsewhere(dx)
    assert bn.dbeta is not None
    assert np.allclose(bn.dbeta, p.counted(np.where(y > 0, p.dy, 0)).sum(0), atol=1e-4)
    frozen = bn.to_frozen()
    served = frozen(p.x, where=p.where)
    assert_same_bits({"y": served}, {"y": y})
    got = frozen.backward(p.dy, p.x, y=served, where=p.where)
    assert_same_bits(got._asdict(), fastbn.Gradients(dx, bn.dgamma, bn.dbeta)._asdict())


@each_backend
def test_weights_of_a_softmax(variant: Variant) -> None:
    """They are several values, whose unbiased variance is as numpy.cov has it, at any scale."""
    for seed in range(40):
        x = np.random.default_rng(seed).normal(5, 2, (256, 4))
        weights = np.exp(3 * np.random.default_rng(seed + 1).normal(size=256))
        weights /= weights.sum()
        expected = np.diag(np.cov(x.T, aweights=weights))
        for scale in (1.0, 100.0, 2.0**1000, 2.0**-900):
            bn = fastbn.BatchNorm(4, momentum=1.0, dtype="float64")
            bn(x, weights=weights * scale)
            np.testing.assert_allclose(np.asarray(bn.running_var), expected, rtol=1e-9)


@each_backend
def test_equal_weights(variant: Variant) -> None:
    """Whatever they are, running statistics are those without weights."""
    p = Masked((6, 3, 4, 5), "NCHW", np.float32)
    plain = fastbn.BatchNorm(3)
    plain(p.x, where=p.where)
    for weight in (1 / 512, 2.0**1000):
        bn = fastbn.BatchNorm(3)
        bn(p.x, where=p.where, weights=np.full(6, weight))
        for name, a in plain.state_dict().items():
            np.testing.assert_allclose(bn.state_dict()[name], a, rtol=2e-7)


HARDLY = np.array([0, 1, 1e-14, 0, 1e-200])
"""Weights of three values whose effective number is 1, but for roundings."""


@each_backend
@pytest.mark.parametrize("policy", ["raise", "skip", "running"])
def test_one_value_that_weighs(variant: Variant, policy: str) -> None:
    """It is one value, whatever it weighs; so are several that n / (n - 1) cannot be told from it
    of, where that is asked for."""
    x = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    alone = np.array([0.0, 1, 0, 0, 0])
    cases = itertools.product((0.3, 1.0, 40.0, *SCALES), (alone, HARDLY), (True, False))
    for scale, weights, unbiased in cases:
        if weights is HARDLY and not unbiased:
            continue
        bn = fastbn.BatchNorm(3, one_value=policy, unbiased=unbiased)
        if policy == "raise":
            with pytest.raises(ValueError, match="one value a channel"):
                bn(x, weights=weights * scale)
            bn.eval()
        y = bn(x, weights=weights * scale)
        by_running = fastbn.normalize(x, np.zeros(3), np.ones(3), bn.gamma, bn.beta)
        assert np.array_equal(y, by_running) == (policy != "skip")
        assert int(np.asarray(bn.num_batches_tracked)) == 0


@each_backend
@pytest.mark.parametrize("policy", ["raise", "skip", "running"])
def test_a_biased_variance_needs_no_factor(variant: Variant, policy: str) -> None:
    """Several values are several, however little all but one weigh."""
    x = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    for weights in (HARDLY, HARDLY * 1e-3, np.full(5, 0.01)):
        bn = fastbn.BatchNorm(3, one_value=policy, unbiased=False, momentum=1.0, dtype="float64")
        bn(x, weights=weights)
        mean, var = fastbn.moments(x, weights=weights)
        np.testing.assert_array_equal((bn.running_mean, bn.running_var), (mean, var))
        assert int(np.asarray(bn.num_batches_tracked)) == 1


@each_backend
@pytest.mark.parametrize("scale", [1.0, *SCALES])
def test_moments_of_what_counts(variant: Variant, scale: float) -> None:
    """Parts with masks and weights merge into the whole."""
    p = Masked((6, 3, 4, 5), "NCHW", np.float64)
    weights = p.weights * scale
    parts = [
        fastbn.Moments.of(p.x[s], where=p.where[s], weights=weights[s])
        for s in (slice(2), slice(2, 3), slice(3, 6))
    ]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    whole = fastbn.Moments.of(p.x, where=p.where, weights=weights)
    assert merged.count == whole.count == p.samples @ p.weights * scale
    assert np.isclose(merged.effective_count, whole.effective_count, rtol=1e-14, atol=0)
    assert np.allclose(merged.mean, whole.mean, rtol=1e-14)
    assert np.allclose(merged.var, whole.var, rtol=1e-13)
    places = np.repeat(p.weights, p.samples)
    expected = np.diag(np.cov(p.counted(p.x).T, aweights=places))
    for m in (merged, whole):
        np.testing.assert_allclose(m.unbiased_var, expected, rtol=1e-13)
