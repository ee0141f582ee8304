"""Data as it comes: integers, results of other types, and in the other layout.

The oracle of y is the same call on float32 in its own order, rounded by NumPy and ml_dtypes; that
call has oracles of its own elsewhere. Sums of integers are compared with Python's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import fastbn
from fastbn import affine_map, functional, integers
from fastbn.backends import base
from oracle.arrays import DTYPES, HALVES, LAYOUTS, channel_axis, channels_of, rows, to_layout
from support.bits import assert_same_bits
from support.strategies import AROUND_LANES, any_order
from support.variants import CYTHON, activate, each_backend

Array = NDArray[Any]
INTEGERS: tuple[Any, ...] = (np.uint8, np.int8, np.uint16, np.int16)
ROUNDINGS = 4
"""Of float64, that mean and variance of integers may be off by: the promise."""

shapes = st.lists(st.sampled_from((*AROUND_LANES, 3, 4, 64, 70)), min_size=2, max_size=4).filter(
    lambda shape: math.prod(shape) <= 30_000
)


def any_integers(rng: np.random.Generator, shape: Any, dtype: Any) -> Array:
    """All of them, the ends more often than others."""
    ends = np.iinfo(dtype)
    values: Array = rng.integers(ends.min, ends.max, shape, dtype, endpoint=True)
    values[rng.random(shape) < 0.1] = ends.min
    values[rng.random(shape) < 0.1] = ends.max
    return values


def statistics(rng: np.random.Generator, channels: int) -> tuple[Array, ...]:
    """mean, var, gamma and beta."""
    some = rng.normal(size=(3, channels)) * [[100], [1], [1]]
    mean, gamma, beta = some
    return mean, rng.uniform(0.5, 2, channels) * 1e4, gamma.astype(np.float32), beta


def cast(y: Array, dtype: Any) -> Array:
    """Rounded as NumPy and ml_dtypes do."""
    with np.errstate(all="ignore"):
        rounded: Array = y.astype(dtype)
    return rounded


def same(actual: Array, expected: Array) -> None:
    assert_same_bits({"y": actual}, {"y": expected})


# ---- y ----


@pytest.mark.usefixtures("variant")
@given(st.data(), shapes, st.sampled_from(LAYOUTS), st.integers(0, 9), st.sampled_from([1, 2, 3]))
def test_y_has_the_bits_of_float32(
    data: st.DataObject, shape: list[int], layout: str, seed: int, threads: int
) -> None:
    """Integers and float32, in memory of any order and into such, of float32 and half types, fused
    and not, in any layout."""
    draw, rng = data.draw, np.random.default_rng(seed)
    x = draw(any_order(tuple(shape), draw(st.sampled_from([*INTEGERS, np.float32]))))
    x[...] = any_integers(rng, shape, x.dtype if x.dtype.kind != "f" else np.int16)
    dtype = np.dtype(draw(st.sampled_from([np.float32, *HALVES])))
    to = draw(st.sampled_from([None, *LAYOUTS]))
    moved = to is not None and to != layout
    activation = draw(st.sampled_from([None, "relu6", ("leaky_relu", 0.25)]))
    residual = None
    if not moved and draw(st.booleans()):
        residual = draw(any_order(tuple(shape), dtype))
        residual[...] = rng.normal(size=shape)
    options: dict[str, Any] = {"layout": layout, "activation": activation}
    vectors = statistics(rng, channels_of(x, layout))
    wide = x.astype(np.float32, order="C")
    beside = None if residual is None else residual.astype(np.float32)
    expected = fastbn.normalize(wide, *vectors, residual=beside, **options)
    if to is not None:
        expected = np.moveaxis(
            expected, channel_axis(len(shape), layout), channel_axis(len(shape), to)
        )
    expected = cast(expected, dtype)
    out = draw(any_order(expected.shape, dtype)) if draw(st.booleans()) else None
    options |= {"residual": residual, "out_layout": to, "out": out}
    with fastbn.use_num_threads(threads):
        y = fastbn.normalize(x, *vectors, dtype=dtype, **options)
        assert out is None or y is out
        same(y, expected)
        if moved and out is None and len(shape) > 2:
            assert y.flags.c_contiguous
        frozen = fastbn.FrozenBatchNorm(
            *vectors, layout=layout, activation=activation, dtype=dtype, out_layout=to
        )
        same(frozen(x, residual=residual), expected)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, *DTYPES, *HALVES])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(7, 3), (2, 5, 6), (2, 5, 6, 7), (2, 3, 4, 5, 6)])
@pytest.mark.parametrize("name", CYTHON)
def test_contiguous_arrays_are_plain(
    name: str, shape: tuple[int, ...], layout: str, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is checked in Python; results are those of what is not plain."""
    rng = np.random.default_rng(3)
    x = to_layout(any_integers(rng, shape, np.uint8).astype(dtype), layout)
    vectors = statistics(rng, shape[1])
    results = [] if dtype in (np.float64, *HALVES) else [np.float32, *HALVES]
    forms = [(to, kind) for to in (None, *LAYOUTS) for kind in (None, *map(np.dtype, results))]

    def calls() -> list[Array]:
        found = []
        for to, kind in forms:
            options: dict[str, Any] = {"layout": layout, "out_layout": to}
            frozen = fastbn.FrozenBatchNorm(*vectors, **options, dtype=kind)
            y = fastbn.normalize(x, *vectors, **options, dtype=kind)
            out = np.empty_like(y)
            fastbn.normalize(x, *vectors, **options, out=out)
            found += [y, out, frozen(x), frozen(x, out=np.empty_like(y))]
        return found

    with activate(name) as active, monkeypatch.context() as patch:
        for module in (functional, affine_map):
            patch.setattr(module, "Call", None)
        before, plain = active.calls(), calls()
        assert active.calls() >= before + len(plain)
    with activate(name) as active, monkeypatch.context() as patch:
        patch.setattr(active.backend, "plain_normalize", base._never_plain)
        patch.setattr(active.backend, "plain_frozen", lambda *fixed: base._never_plain)
        for actual, expected in zip(plain, calls(), strict=True):
            same(actual, expected)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", [*DTYPES, *HALVES])
@pytest.mark.parametrize("shape", [(2, 3, 40, 40), (3, 70, 7, 9), (2, 300, 5), (1, 4, 3000)])
def test_floats_in_the_other_layout(shape: tuple[int, ...], dtype: Any) -> None:
    """Both ways, by `out_layout` and by `out`: the bits of the same layout."""
    rng = np.random.default_rng(0)
    x, vectors = rng.normal(size=shape).astype(dtype), statistics(rng, shape[1])
    last, y = to_layout(x, "NHWC"), fastbn.normalize(x, *vectors)
    y_last = np.ascontiguousarray(np.moveaxis(y, 1, -1))
    same(fastbn.normalize(x, *vectors, out_layout="NHWC"), y_last)
    same(fastbn.normalize(last, *vectors, layout="NHWC", out_layout="NCHW"), y)
    out = np.full_like(x, np.nan)
    fastbn.normalize(last, *vectors, layout="NHWC", out=np.moveaxis(out, 1, -1))
    same(out, y)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize(
    "shape", [(3, 3, 97, 101), (2, 4, 64, 130), (40, 5, 64, 64), (9, 1500, 17)]
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_pieces(shape: tuple[int, ...], layout: str) -> None:
    """More than threads have at a time, and streamed past the caches, whatever these are."""
    rng = np.random.default_rng(1)
    x, vectors = any_integers(rng, shape, np.uint8), statistics(rng, shape[1])
    y = fastbn.normalize(x.astype(np.float32), *vectors)
    x = to_layout(x, layout)
    for to in LAYOUTS:
        for threads in (1, 3):
            with fastbn.use_num_threads(threads):
                got = fastbn.normalize(x, *vectors, layout=layout, out_layout=to)
            same(got, to_layout(y, to))


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", [None, *HALVES])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_masked(layout: str, dtype: Any) -> None:
    rng, shape = np.random.default_rng(2), (3, 5, 20, 21)
    x = to_layout(any_integers(rng, shape, np.uint8), layout)
    where = rng.random(np.moveaxis(x, channel_axis(4, layout), 0)[:1].shape) < 0.7
    where = np.moveaxis(where, 0, channel_axis(4, layout))
    vectors = statistics(rng, 5)
    options: dict[str, Any] = {"where": where, "layout": layout}
    wide = x.astype(np.float32)
    residual = rng.normal(size=x.shape).astype(dtype or np.float32)
    for beside in (None, residual):
        given = None if beside is None else beside.astype(np.float32)
        y = fastbn.normalize(wide, *vectors, residual=given, **options)
        got = fastbn.normalize(x, *vectors, residual=beside, dtype=dtype, **options)
        same(got, cast(y, dtype or np.float32))


@pytest.mark.usefixtures("variant")
def test_every_value_of_a_half_is_kept() -> None:
    """Through the float32 kernels into a half: NaN, subnormals, infinities, and rounding."""
    with np.errstate(all="ignore"):
        bits = np.arange(2**16, dtype=np.uint32)
        x = np.concatenate([bits << 16, (bits << 16) + 0x8000, (bits << 16) + 0xFFF, bits << 13])
    x = x.astype(np.uint32).view(np.float32).reshape(256, -1)
    ones = np.ones(x.shape[1])
    y = fastbn.normalize(x, 0 * ones, ones, eps=0.0)
    for half in HALVES:
        same(fastbn.normalize(x, 0 * ones, ones, eps=0.0, dtype=half), cast(y, half))


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)])
@pytest.mark.no_kernel
def test_nothing(shape: tuple[int, ...]) -> None:
    x, vectors = np.zeros(shape, np.uint8), statistics(np.random.default_rng(0), shape[1])
    y = fastbn.normalize(x, *vectors, out_layout="NHWC", dtype=np.float16)
    assert (y.shape, y.dtype) == (np.moveaxis(x, 1, -1).shape, np.dtype(np.float16))
    mean, var = fastbn.moments(x)
    assert mean.tolist() == var.tolist() == [0.0] * shape[1]


# ---- Sums ----


def exact(x: Array, layout: str, where: Array | None) -> list[tuple[Fraction, Fraction]]:
    """Mean and variance of each channel, by Python's integers."""
    found = []
    counted = None if where is None else rows(np.broadcast_to(where, x.shape), layout)
    for channel, values in enumerate(rows(x, layout)):
        some = values if counted is None else values[counted[channel]]
        n, total = len(some), sum(map(int, some))
        squares = sum(int(v) ** 2 for v in some)
        found.append((Fraction(total, n), Fraction(n * squares - total**2, n * n)))
    return found


def assert_rounded(actual: Array, expected: list[Fraction]) -> None:
    for got, true in zip(actual.tolist(), expected, strict=True):
        assert abs(Fraction(got) - true) <= ROUNDINGS * Fraction(abs(true)) / 2**53


@each_backend
@given(st.data(), shapes, st.sampled_from(INTEGERS), st.sampled_from(LAYOUTS), st.integers(0, 9))
@settings(max_examples=60)
def test_moments_are_exact(
    data: st.DataObject, shape: list[int], dtype: Any, layout: str, seed: int
) -> None:
    rng, draw = np.random.default_rng(seed), data.draw
    x = draw(any_order(tuple(shape), dtype))
    x[...] = any_integers(rng, shape, dtype)
    where = None
    if draw(st.booleans()):
        axis = channel_axis(len(shape), layout)
        where = rng.random((*shape[:axis], 1, *shape[axis + 1 :])) < 0.5
        where.flat[0] = True
    found = exact(x, layout, where)
    with fastbn.use_num_threads(draw(st.sampled_from([1, 2, 3]))):
        mean, var = fastbn.moments(x, layout=layout, where=where)
    assert_rounded(mean, [m for m, _ in found])
    assert_rounded(var, [v for _, v in found])


@each_backend
@pytest.mark.parametrize("dtype", INTEGERS)
def test_sums_do_not_overflow(dtype: Any) -> None:
    """More values of the largest size than lanes of 32 bits hold, by rows and by planes; and a
    constant channel has no variance."""
    size = np.iinfo(dtype).min or np.iinfo(dtype).max
    rows_of = np.full((70_000, 3), size, dtype)
    planes = np.full((1, 2, 1 << 21, 2), size, dtype)
    planes[0, 1, ::2] = 0
    for x in (rows_of, planes):
        mean, var = fastbn.moments(x)
        assert (mean[0], var[0]) == (size, 0)
    assert (mean[1], var[1]) == (size / 2, (size / 2) ** 2)


@each_backend
def test_more_than_are_summed_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes beyond 64 bits is added by Python."""
    x = any_integers(np.random.default_rng(0), (7, 3, 50), np.uint16)
    expected = fastbn.moments(x)
    for most in (1, 49, 120):
        monkeypatch.setattr(integers, "MOST", most)
        for got, whole in zip(fastbn.moments(x), expected, strict=True):
            np.testing.assert_array_equal(got, whole)


@each_backend
@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_populations_do_not_depend_on_the_cut(layout: str, dtype: Any) -> None:
    x = to_layout(any_integers(np.random.default_rng(3), (23, 3, 9, 10), dtype), layout)
    whole = fastbn.population_statistics([x], layout=layout)
    for cuts in ([1], [5, 6], range(1, 23)):
        parts = fastbn.population_statistics(np.split(x, list(cuts)), layout=layout)
        for got, expected in zip(parts, whole, strict=True):
            np.testing.assert_array_equal(got, expected)
    true = exact(x, layout, None)
    n = 23 * 90
    assert_rounded(whole.mean, [m for m, _ in true])
    assert_rounded(whole.var, [v * n / (n - 1) for _, v in true])


@each_backend
def test_populations_of_integers_and_floats() -> None:
    """Batches of both are merged, and averages are those of each batch."""
    rng = np.random.default_rng(4)
    ints = any_integers(rng, (20, 3, 5), np.uint8)
    floats = rng.normal(size=(10, 3, 5)).astype(np.float32)
    got = fastbn.population_statistics([floats, ints[:7], ints[7:]])
    both = fastbn.Moments.of(floats).merge(fastbn.Moments.of(ints))
    assert got.count == both.count
    np.testing.assert_array_equal(got.mean, both.mean)
    np.testing.assert_array_equal(got.var, both.unbiased_var)
    averages = fastbn.population_statistics([ints[:7], ints[7:]], method="average")
    parts = [fastbn.Moments.of(some) for some in (ints[:7], ints[7:])]
    np.testing.assert_allclose(averages.var, sum(p.unbiased_var for p in parts) / 2, rtol=1e-15)


@each_backend
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_and_virtual_batches(layout: str) -> None:
    """As of float32."""
    rng = np.random.default_rng(5)
    x = to_layout(any_integers(rng, (9, 4, 6, 5), np.int16), layout)
    wide, weights = x.astype(np.float32), rng.uniform(0, 1, 9)
    cases: list[dict[str, Any]] = [{"weights": weights}, {"virtual_batch": 4}]
    for options in cases:
        for got, expected in zip(
            fastbn.moments(x, layout=layout, **options),
            fastbn.moments(wide, layout=layout, **options),
            strict=True,
        ):
            np.testing.assert_array_equal(got, expected)
    one = fastbn.Moments.of(x, layout=layout, weights=weights)
    assert one == fastbn.Moments.of(wide, layout=layout, weights=weights)


# ---- What is refused ----

IMAGES = np.zeros((2, 4, 4, 3), np.uint8)
ONES = np.ones(3)
TO_NCHW: dict[str, Any] = {"layout": "NHWC", "out_layout": "NCHW"}
REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "int32": (IMAGES.astype(np.int32), {}, r"x has dtype int32, .*x\.astype\(numpy\.float32\)"),
    "bool": (IMAGES.astype(bool), {}, r"x has dtype bool, .*x\.astype\(numpy\.float32\)"),
    "float64 of integers": (IMAGES, {"dtype": np.float64}, r"dtype is float64, expected float32"),
    "half of float64": (
        IMAGES.astype(float),
        {"dtype": "f2"},
        "dtype is float16, expected float64",
    ),
    "float32 of half": (IMAGES.astype("f2"), {"dtype": "f4"}, "dtype is float32, expected float16"),
    "an integer result": (IMAGES, {"dtype": np.uint8}, "dtype is .*uint8.*expected float16"),
    "no type": (IMAGES, {"dtype": "half a float"}, "dtype is 'half a float', expected float16"),
    "out of float64": (IMAGES, {"out": np.empty(IMAGES.shape)}, "out has dtype float64, expected"),
    "out of another type than asked for": (
        IMAGES,
        {"out": np.empty(IMAGES.shape, "f4"), "dtype": "f2"},
        "out has dtype float32, expected float16",
    ),
    "out of x's layout": (
        IMAGES,
        {**TO_NCHW, "out": np.empty(IMAGES.shape, "f4")},
        r"out has shape \(2, 4, 4, 3\), expected \(2, 3, 4, 4\)",
    ),
    "no layout": (IMAGES, {"out_layout": "CHW"}, "out_layout is 'CHW', expected 'NCHW'"),
    "a number as layout": (IMAGES, {"out_layout": 1}, "out_layout is 1, expected 'NCHW'"),
    "a residual in the other layout": (
        IMAGES,
        {**TO_NCHW, "residual": np.zeros(IMAGES.shape, "f4")},
        "out_layout is 'NCHW', not that of x, and residual is given",
    ),
    "a mask in the other layout": (
        IMAGES,
        {**TO_NCHW, "where": np.ones((2, 4, 4, 1), bool)},
        "out_layout is 'NCHW', not that of x, and where is given",
    ),
    "a residual of x's type": (IMAGES, {"residual": IMAGES}, "residual has dtype uint8"),
    "a residual of another type than y's": (
        IMAGES,
        {"residual": np.zeros(IMAGES.shape, "f4"), "dtype": "f2"},
        "residual has dtype float32, expected float16",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.no_kernel
@each_backend
def test_refused(case: str) -> None:
    """With a reason, and nothing written."""
    x, options, message = REFUSED[case]
    options = {"layout": "NHWC"} | options
    out = options.get("out")
    if out is not None:
        out.fill(7)
    with pytest.raises((TypeError, ValueError), match=message):
        fastbn.normalize(x, ONES, ONES, **options)
    assert out is None or (out == 7).all()


@pytest.mark.no_kernel
@each_backend
def test_integers_have_no_gradients() -> None:
    """Nor do the verbs of training take them."""
    floats, ones = IMAGES.astype(np.float32), np.ones(4)
    layer = fastbn.BatchNorm(4)
    calls: list[Callable[[], Any]] = [
        lambda: fastbn.batch_norm(IMAGES),
        lambda: fastbn.batch_norm_backward(floats, IMAGES, ones, ones),
        lambda: fastbn.group_norm(IMAGES, 2),
        lambda: layer(IMAGES),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=r"x has dtype uint8, expected float16, .*astype"):
            call()
    frozen = fastbn.FrozenBatchNorm(ones, ones, dtype=np.float16)
    with pytest.raises(ValueError, match=r"with dtype='float16', expected None"):
        frozen.backward(floats, floats)
