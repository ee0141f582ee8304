"""Group, instance and layer norm: values and gradients within their bounds, bits, special values,
and what they are to each other, to batch norm and to PyTorch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastbn
from fastbn import _call
from oracle.arrays import DTYPES, HALVES, LAYOUTS, Array, by_sample, channel_axis
from oracle.formulas import ACTIVATIONS
from support.bits import assert_same_bits
from support.grid import TYPES
from support.judge import assert_within, derivative
from support.memory import FORMS, WRITEABLE, dense_in_its_order
from support.sample_norms import Norm, check, judge_backward, judge_forward, made
from support.strategies import recipes
from support.variants import CYTHON, Variant, activate, each_backend

SHAPES = (
    # rows: one column, broken lanes, whole ones, wide, of many samples, in pieces
    (7, 1),
    (37, 20),
    (9, 48, 1, 1),
    (33, 640),
    (300, 12),
    (2, 16400),
    # planes: of 1, 2, 9, 25, 49 and 196 values, few and many channels, ranks 3 to 5
    (6, 12, 1, 2),
    (10, 6, 3, 3),
    (3, 20, 25),
    (2, 640, 7, 7),
    (1, 48, 14, 14),
    (5, 6, 2, 3, 4),
    (40, 12, 17),
    # planes in pieces
    (2, 6, 130, 131),
)
"""As NCHW words."""
EVERY: list[str | int] = ["instance", "layer", 1, 2, 3, -1]
"""What shares statistics; -1 stands for as many groups as channels."""


def norm_of(kind: str | int, channels: int) -> Norm:
    """A norm of so many channels, of which numbers of groups are made divisors."""
    if isinstance(kind, str):
        return Norm(kind)
    return Norm(channels if kind < 0 or channels % kind else kind)


def problems() -> pytest.MarkDecorator:
    """Every shape and type; norms, layouts and activations in turn."""
    listed = [
        (shape, dtype, EVERY[(2 * i + j) % 6], LAYOUTS[(i + j) % 2], ACTIVATIONS[(i + 3 * j) % 4])
        for i, shape in enumerate(SHAPES)
        for j, dtype in enumerate(TYPES)
    ]
    return pytest.mark.parametrize(("shape", "dtype", "kind", "layout", "activation"), listed)


@pytest.mark.usefixtures("variant")
@problems()
def test_everything_is_within_its_bound(
    shape: tuple[int, ...], dtype: str, kind: str | int, layout: str, activation: Any
) -> None:
    """Plain, and with an activation, a residual and its gradient."""
    x, dy, z, gamma, beta = made(shape, layout, TYPES[dtype])
    norm = norm_of(kind, shape[1])
    fused = {"residual": z, "activation": activation, "dresidual": True}
    check(norm, x, dy, gamma, beta, layout=layout)
    check(norm, x, dy, gamma.astype(np.float32), None, layout=layout, eps=0.5, **fused)


MASKED = ((7, 4), (3, 6, 5), (5, 12, 9, 8), (3, 3, 30, 31), (2, 48, 1, 1), (4, 64, 3), (40, 6, 17))


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", MASKED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_masks(layout: str, shape: tuple[int, ...], dtype: str) -> None:
    """Each sample is as if what does not count were not there, whatever it holds; a sample of which
    nothing counts is 0, with statistics of 0."""
    x, dy, z, gamma, beta = made(shape, layout, TYPES[dtype])
    kind = EVERY[(len(shape) + shape[1]) % len(EVERY)]
    norm, activation = norm_of(kind, shape[1]), ACTIVATIONS[shape[0] % 4]
    rng = np.random.default_rng(1)
    where = rng.random((shape[0], 1, *shape[2:])) < 0.6
    where[0], where[1] = False, True
    hidden = np.broadcast_to(~where, shape)
    if layout == "NHWC":
        hidden, where = np.moveaxis(hidden, 1, -1), np.moveaxis(where, 1, -1)
    x[hidden], dy[hidden], z[hidden] = np.nan, np.inf, np.nan
    fused: dict[str, Any] = {"activation": activation, "layout": layout, "where": where}
    result = norm.forward(x, gamma=gamma, beta=beta, residual=z, **fused)
    y, mean, var = result
    assert not y[hidden].any()
    assert not mean[0].any()
    assert not var[0].any()
    kept = None if activation is None else y
    fused |= {"y": kept, "dresidual": True}
    got = norm.backward(dy, x, mean, var, gamma=gamma, **fused)
    assert not got.dx[hidden].any()
    assert not got.dresidual[hidden].any()
    groups, told = norm.groups(shape[1]), {"gamma": gamma, "activation": activation}
    sums = np.zeros((4, shape[1]), np.longdouble)
    for i in range(1, shape[0]):
        seen = where[i].reshape(-1)

        def of(a: Any, i: int = i, seen: Any = seen) -> Any:
            """What counts of a sample, as (1, C, P)."""
            some = np.moveaxis(a[i], -1, 0) if layout == "NHWC" else a[i]
            return np.ascontiguousarray(some.reshape(shape[1], -1)[:, seen])[None]

        if seen.any():
            some = fastbn.BatchNormResult(of(y), mean[i : i + 1], var[i : i + 1])
            judged = judge_forward(some, groups, of(x), residual=of(z), beta=beta, **told)
            gradients = got._replace(dx=of(got.dx), dresidual=of(got.dresidual))
            given = of(dy), of(x), mean[i : i + 1], var[i : i + 1]
            back = judge_backward(
                gradients, groups, *given, y=kept if kept is None else of(y), **told
            )
            of_sums = {j.what: j for j in back if j.what in ("dgamma", "dbeta")}
            sums += [
                of_sums["dgamma"].expected,
                of_sums["dgamma"].bound,
                of_sums["dbeta"].expected,
                of_sums["dbeta"].bound,
            ]
            for each in (*judged, *(j for j in back if j.what not in of_sums)):
                assert_within(*each)
    assert_within(got.dgamma, sums[0], sums[1], "dgamma")
    assert_within(got.dbeta, sums[2], sums[3], "dbeta")


@pytest.mark.usefixtures("variant")
@given(recipes((*DTYPES, *HALVES)), st.integers(0, 99), st.sampled_from(ACTIVATIONS))
def test_any_problem(problem: Any, chosen: int, activation: Any) -> None:
    """Any shape, layout, memory, distribution and number of groups."""
    p = problem
    divisors = [n for n in range(1, p.channels + 1) if p.channels % n == 0]
    kinds: list[str | int] = ["instance", "layer", *divisors]
    residual = p.dy if chosen % 2 else None
    fused = {"activation": activation, "residual": residual, "dresidual": chosen % 3 == 0}
    norm = Norm(kinds[chosen % len(kinds)])
    check(norm, p.x, p.dy, p.gamma, p.beta, params=chosen % 5 > 0, **fused, **p.options)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("kind", ["instance", "layer", 3])
@pytest.mark.parametrize(("dtype", "ratio"), [(np.float32, 4e5), (np.float64, 4e11)])
def test_large_means(dtype: Any, ratio: float, kind: Any) -> None:
    """Of samples, of up to a million deviations, and more in float64."""
    for shape in ((6, 12, 9, 9), (6, 12, 2), (40, 12)):
        for layout in LAYOUTS:
            x, dy, _, gamma, beta = made(shape, layout, dtype, ratio=ratio)
            check(Norm(kind), x, dy, gamma, beta, layout=layout)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("deviation", [1e-12, 1e12])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scales(dtype: Any, deviation: float) -> None:
    """Deviations far from 1 without eps; channels of a group of which some hardly vary."""
    for shape in ((6, 12, 5, 5), (30, 12)):
        norms = Norm("instance"), Norm("layer"), Norm(3)
        for norm in norms[len(shape) == 2 :]:  # a variance of 0 has no reciprocal
            x, dy, _, gamma, beta = made(shape, "NCHW", np.float64)
            x[:, 1::3] *= 1e-3
            arrays = ((deviation * x).astype(dtype), dy.astype(dtype))
            check(norm, *arrays, gamma, beta, eps=0.0)


def differentiated(
    dy: Array, x: Array, gamma: Array, beta: Array, groups: int, eps: float, layout: str
) -> tuple[Array, Array, Array]:
    """Complex-step derivatives of sum(dy * y) of the printed formula."""

    def loss(x: Array, gamma: Array, beta: Array) -> complex:
        nchw = np.moveaxis(x, channel_axis(x.ndim, layout), 1)
        grouped = nchw.reshape(len(x), groups, -1)
        centred = grouped - grouped.mean(2, keepdims=True)
        xhat = centred / np.sqrt((centred**2).mean(2, keepdims=True) + eps)
        shape = -1, *[1] * (x.ndim - 2)
        y = xhat.reshape(nchw.shape) * gamma.reshape(shape) + beta.reshape(shape)
        return complex((np.moveaxis(dy, channel_axis(x.ndim, layout), 1) * y).sum())

    return (
        derivative(lambda x: loss(x, gamma, beta), x),
        derivative(lambda gamma: loss(x, gamma, beta), gamma),
        derivative(lambda beta: loss(x, gamma, beta), beta),
    )


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_the_derivatives(dtype: Any, layout: str) -> None:
    """dx, dgamma and dbeta are the derivatives of the formula, in rows and planes."""
    for shape in ((3, 6), (2, 4, 2, 2)):
        x, dy, _, gamma, beta = made(shape, layout, dtype, ratio=1)
        for groups in (1, 2, shape[1]):
            norm = Norm(groups)
            options: dict[str, Any] = {"eps": 0.125, "layout": layout}
            _, mean, var = norm.forward(x, gamma=gamma, beta=beta, **options)
            got = norm.backward(dy, x, mean, var, gamma=gamma, **options)
            doubles = dy.astype(np.float64), x.astype(np.float64)
            dx, dgamma, dbeta = differentiated(*doubles, gamma, beta, groups, 0.125, layout)
            exact = by_sample(dx, layout), dgamma, dbeta
            judged = judge_backward(got, groups, dy, x, mean, var, gamma, **options)
            for one, expected in zip(judged, exact, strict=True):
                assert_within(*one._replace(expected=expected))


# ---- Bits ----


def run(
    norm: Norm, x: Array, dy: Array, gamma: Array, beta: Array, z: Array, **options: Any
) -> dict[str, Array]:
    """What both functions give, plain, fused and masked, by name."""
    y, mean, var = norm.forward(x, gamma=gamma, beta=beta, **options)
    found = {"y": y, "mean": mean, "var": var}
    got = norm.backward(dy, x, mean, var, gamma=gamma, **options)
    found |= got._asdict()
    fused = options | {"activation": "relu6"}
    y = norm.forward(x, gamma=gamma, beta=beta, residual=z, **fused).y
    got = norm.backward(dy, x, mean, var, gamma=gamma, y=y, dresidual=True, **fused)
    found |= {"fused y": y} | {f"fused {name}": a for name, a in got._asdict().items()}
    single = list(x.shape)
    single[channel_axis(x.ndim, options.get("layout", "NCHW"))] = 1
    places = np.arange(np.prod(single[1:])) * 7 % 10 < 7  # of every sample the same
    where = np.tile(places, len(x)).reshape(single)
    y, mean, var = norm.forward(x, gamma=gamma, beta=beta, where=where, **options)
    found |= {"masked y": y, "masked mean": mean, "masked var": var}
    got = norm.backward(dy, x, mean, var, gamma=gamma, where=where, **options)
    return found | {f"masked {name}": a for name, a in got._asdict().items()}


BITS: list[tuple[tuple[int, ...], Any, str, str]] = [
    (shape, kind, layout, dtype)
    for i, (shape, kind) in enumerate(
        [
            *[((700, 12), 3), ((33, 640), "layer"), ((1500, 20), 2), ((2, 16400), "layer")],
            *[((40, 12, 7, 7), "layer"), ((9, 64, 30, 31), 4), ((2, 6, 130, 131), 2)],
            *[((40, 20, 9), "instance"), ((600, 8, 2), 4), ((3, 3000, 5), 1000)],
        ]
    )
    for layout, dtype in zip(LAYOUTS, ("float32", list(TYPES)[i % 4]), strict=True)
]
BITS.append(((512, 16400), "layer", "NCHW", "float32"))  # long rows, of two pieces: a thread's each


def bits_of(name: str, number: int, threads: int) -> dict[str, Array]:
    """What a variant gives of one of these problems."""
    shape, kind, layout, dtype = BITS[number]
    x, dy, z, gamma, beta = made(shape, layout, TYPES[dtype])
    with activate(name), fastbn.use_num_threads(threads):
        return run(Norm(kind), x, dy, gamma, beta, z, layout=layout)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(BITS)), ids=lambda i: " ".join(map(str, BITS[i])))
def test_threads_and_instruction_sets(variant: Variant, number: int) -> None:
    """One to three threads, a second run, and every instruction set give the same bits."""
    first = CYTHON[0] if variant.name in CYTHON else variant.name
    expected = bits_of(first, number, 1)
    for threads in (1, 2, 3) if variant.name != "numpy" else (1,):
        assert_same_bits(bits_of(variant.name, number, threads), expected)


@each_backend
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_whatever_the_memory(layout: str, form: str) -> None:
    """Arrays in any memory have the bits of dense ones, and results lie as x does."""
    for shape, kind in (((6, 12, 5, 4), 3), ((5, 12, 6), "instance"), ((30, 12), "layer")):
        x, dy, z, gamma, beta = made(shape, "NCHW", np.float32)
        placed, others = FORMS[form](x), [FORMS[form](a) for a in (dy, z)]
        norm = norm_of(kind, placed.shape[channel_axis(x.ndim, layout)])
        gamma, beta = (
            np.resize(a, placed.shape[channel_axis(x.ndim, layout)]) for a in (gamma, beta)
        )
        before = [a.tobytes() for a in (placed, *others)]
        dense = dense_in_its_order(placed)
        expected = run(norm, dense, dy, gamma, beta, z, layout=layout)
        found = run(norm, placed, others[0], gamma, beta, others[1], layout=layout)
        assert_same_bits(found, expected)
        assert [a.tobytes() for a in (placed, *others)] == before
        for name in ("y", "dx", "fused y", "fused dx", "fused dresidual"):
            assert found[name].strides == expected[name].strides == dense.strides, name


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["layer", 2])
def test_one_sample_of_many_channels(kind: str | int, layout: str) -> None:
    """Groups that are larger than what else is worked on at a time."""
    for form in ("dense", "strided"):
        x, dy, _, gamma, beta = made((1, 6000, 2), layout, np.float32)
        check(Norm(kind), FORMS[form](x), FORMS[form](dy), gamma, beta, layout=layout)


@each_backend
@pytest.mark.parametrize("groups", [1, 3])
def test_rows_in_parts(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever a part begins, rows have the gamma and beta of their group."""
    monkeypatch.setattr(_call, "SMALLEST", 1)
    monkeypatch.setattr(_call, "scratch", lambda array_bytes, share: 512)
    x, dy, _, gamma, beta = made((40, 48), "NCHW", np.float32)
    apart = FORMS["strided"]
    check(Norm(groups), apart(x), apart(dy), gamma, beta)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("form", ["dense", "strided"])
@pytest.mark.parametrize(
    ("shape", "groups"), [((3, 1002), 501), ((2, 802, 1, 1), 401), ((70, 6, 2), 3), ((70, 6, 1), 6)]
)
def test_many_groups_of_few_values(shape: tuple[int, ...], groups: int, form: str) -> None:
    """Groups that are no rows, and runs of one sample that are worked on as channels of one."""
    for layout in LAYOUTS:
        x, dy, _, gamma, beta = made(shape, layout, np.float32)
        check(Norm(groups), FORMS[form](x), FORMS[form](dy), gamma, beta, layout=layout)


@each_backend
@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_beyond_the_type_of_gamma_are_infinite(groups: int) -> None:
    """Without a warning, as of batch norm."""
    x = np.random.default_rng(0).normal(size=(3, 2, 5))
    mean, var = np.zeros((3, groups)), np.ones((3, groups))
    found = fastbn.group_norm_backward(
        np.full_like(x, 1e39), x, mean, var, groups, np.ones(2, np.float32)
    )
    assert found.dbeta is not None
    assert np.isposinf(found.dbeta).all()


@each_backend
@pytest.mark.parametrize("form", WRITEABLE)
def test_results_go_where_they_are_asked_for(form: str) -> None:
    """In place and elsewhere, in any memory, with the same bits; what lies beside is untouched."""
    for shape, kind in (((6, 12, 5, 4), 3), ((30, 12), "layer"), ((5, 12, 6), "instance")):
        x, dy, z, gamma, beta = made(shape, "NCHW", np.float32)
        norm = Norm(kind)
        x = dense_in_its_order(WRITEABLE[form](x))  # its memory order decides on bits

        def make(a: Array) -> Array:
            return WRITEABLE[form](a.copy())

        y, mean, var = norm.forward(x, gamma=gamma, beta=beta, residual=z, activation="relu")
        told: dict[str, Any] = {"gamma": gamma, "activation": "relu", "y": y}
        expected = norm.backward(dy, x, mean, var, dresidual=True, **told)
        for in_place in (True, False):
            a = make(x)
            out = a if in_place else make(z)
            fused = {"residual": z, "activation": "relu", "out": out}
            assert norm.forward(a, gamma=gamma, beta=beta, **fused).y is out
            assert_same_bits({"y": np.asarray(out)}, {"y": y})
        for own in ("x", "dy", "other"):
            a, b, through = make(x), make(dy), make(dy)
            out = {"x": a, "dy": b, "other": make(z)}[own]
            got = norm.backward(b, a, mean, var, dresidual=through, out=out, **told)
            assert got.dx is out
            assert got.dresidual is through
            arrays = {name: np.asarray(v) for name, v in got._asdict().items()}
            assert_same_bits(arrays, expected._asdict())


@each_backend
def test_vectors_of_either_type() -> None:
    """gamma decides the type of its gradient; swapped bytes and strides do not matter."""
    for shape, kind in (((6, 12, 5, 4), 3), ((30, 12), "layer")):
        for dtype in TYPES.values():
            x, dy, _, gamma, beta = made(shape, "NCHW", dtype)
            for own in ("f4", "f8", ">f4", ">f8"):
                check(Norm(kind), x, dy, gamma.astype(own), beta[::-1].astype(own))
            check(Norm(kind), x, dy)
            check(Norm(kind), x, dy, params=False, dresidual=True)


# ---- Special values ----


def apart_from(results: dict[str, Array], sample: int, groups: int, layout: str) -> Any:
    """The results without those of a sample's last group."""
    kept = {}
    for name, a in results.items():
        channels_first = np.moveaxis(a, channel_axis(a.ndim, layout), 1) if a.ndim > 1 else a[None]
        size = channels_first.shape[1] // groups
        others = np.ones(channels_first.shape[:2], bool)
        others[sample if a.ndim > 1 else 0, -size:] = False
        kept[name] = channels_first[others]
    return kept


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_not_finite_stays_in_its_group(layout: str, value: float) -> None:
    """All other groups of all samples keep their bits, and nothing warns."""
    for shape, groups in (((4, 12, 5, 5), 3), ((20, 12), 2), ((40, 12), 1), ((3, 12, 9), 12)):
        x, dy, z, gamma, beta = made(shape, layout, np.float32)
        expected = run(Norm(groups), x, dy, gamma, beta, z, layout=layout)
        for place in ("x", "dy"):
            changed = {"x": x.copy(), "dy": dy.copy()}
            np.moveaxis(changed[place], channel_axis(x.ndim, layout), -1)[1, ..., -1] = value
            found = run(Norm(groups), changed["x"], changed["dy"], gamma, beta, z, layout=layout)
            assert np.isnan(found["dx"][1]).any()
            kept = (apart_from(results, 1, groups, layout) for results in (found, expected))
            assert_same_bits(*kept)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_constant_groups(eps: float) -> None:
    """Their variance is exactly 0, y is beta, and without eps there is no gradient."""
    for shape, kind in (((3, 12, 5, 5), 3), ((3, 12), "layer"), ((3, 12, 9), "instance")):
        for dtype in TYPES.values():
            x, dy, _, gamma, beta = made(shape, "NCHW", dtype)
            x[...] = dtype(0.1)
            (y, mean, var), got = check(Norm(kind), x, dy, gamma, beta, eps=eps)
            assert not var.any()
            assert (mean == float(dtype(0.1))).all()
            assert (np.moveaxis(y, 1, -1) == beta.astype(dtype)).all()
            if eps == 0:
                assert not got.dx.any()
                assert not got.dgamma.any()


@pytest.mark.slow
@pytest.mark.usefixtures("variant")
def test_gradients_of_zero_have_no_sign() -> None:
    """A negative sum times a scale of 0 is -0, and 0 once it is added to others: everywhere."""
    x, mean, var = np.zeros((1, 3)), np.ones((1, 3)), np.zeros((1, 3))
    gamma = np.ones(6)
    expected = {name: np.zeros(3) for name in ("dgamma", "dbeta")}
    for vector in (gamma[:3], gamma[::2]):
        found = fastbn.instance_norm_backward(x, x + 2, mean, var, vector, eps=0.0)._asdict()
        assert_same_bits({name: found[name] for name in expected}, expected)
        found = fastbn.instance_norm_backward(x - 1, x + 2, mean, var, vector, eps=0.0)._asdict()
        assert_same_bits({"dgamma": found["dgamma"]}, {"dgamma": np.zeros(3)})
    single = gamma.astype(np.float32)
    found, strided = (
        fastbn.instance_norm_backward(x - 1e-60, x + 2, mean, mean, vector)._asdict()
        for vector in (single[:3], single[::2])
    )
    assert_same_bits(found, strided)  # a sum that is not 0, and rounded to it, keeps its sign


@pytest.mark.usefixtures("variant")
def test_nothing_warns() -> None:
    """Half types round what is too large to infinity, and parts of a batch add up, quietly."""
    with np.errstate(all="raise", under="ignore"):
        for shape in ((6, 12), (6, 12, 3)):
            x, dy, _, gamma, _ = made(shape, "NCHW", np.float16)
            norm, told = Norm("layer"), {"gamma": gamma * 1e6}
            y, mean, var = norm.forward(x, **told)
            assert np.isinf(y).any()
            assert np.isinf(norm.backward(dy, x, mean, var, **told).dx).any()
        x = np.tile(np.array([[1, 2, 3, 4]], np.float32), (2 << 16, 1))
        dy = np.full_like(x, np.inf)
        dy[1 << 16 :] *= -1  # where parts of rows begin
        _, mean, var = fastbn.layer_norm(x)
        dbeta = fastbn.layer_norm_backward(dy, x, mean, var).dbeta
        assert np.isnan(np.asarray(dbeta)).all()


@pytest.mark.no_kernel
@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("shape", [(0, 6), (0, 6, 4), (3, 6, 0), (3, 0, 4)], ids=str)
def test_empty(shape: tuple[int, ...]) -> None:
    """Empty arrays, and zeros, of the shapes that full ones have."""
    x = np.zeros(shape, np.float32)
    for kind in ("instance", "layer", 2):
        norm = Norm(kind)
        y, mean, var = norm.forward(x)
        assert (y.shape, y.dtype) == (shape, np.float32)
        assert mean.shape == var.shape
        assert len(mean) == shape[0]
        assert not mean.any()
        assert not var.any()
        got = norm.backward(x, x, mean, var, dresidual=True)
        assert got.dx.shape == got.dresidual.shape == shape
        for gradient in (got.dgamma, got.dbeta):
            np.testing.assert_array_equal(gradient, np.zeros(shape[1], np.float32), strict=True)


# ---- What they are to each other ----


@each_backend
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TYPES)
def test_one_is_another(dtype: str, layout: str) -> None:
    """Layer norm is one group; instance norm as many as channels, and virtual batches of one."""
    for shape in ((4, 12, 5, 5), (30, 12)):
        x, dy, z, gamma, beta = made(shape, layout, TYPES[dtype])
        for kind, groups in (("layer", 1), ("instance", 12)):
            expected, found = (
                run(Norm(n), x, dy, gamma, beta, z, layout=layout) for n in (kind, groups)
            )
            tables = {
                name: found[name].reshape(expected[name].shape)
                for name in ("mean", "var", "masked mean", "masked var")
            }
            assert_same_bits(found | tables, expected)
        options: dict[str, Any] = {"layout": layout, "virtual_batch": 1}
        y, mean, var = fastbn.batch_norm(x, gamma, beta, **options)
        got = fastbn.batch_norm_backward(dy, x, mean, var, gamma, **options)
        of_batches = {"y": y, "mean": mean, "var": var, **got._asdict()}
        assert_same_bits(of_batches, {name: expected[name] for name in of_batches})


@pytest.mark.usefixtures("variant")
@given(recipes(), st.integers(0, 99))
def test_groups_have_mean_0_and_variance_1(problem: Any, chosen: int) -> None:
    """But for eps and what rounding does to y, which is of the size of 1 / s."""
    p = problem
    divisors = [n for n in range(1, p.channels + 1) if p.channels % n == 0]
    groups = divisors[chosen % len(divisors)]
    result = fastbn.group_norm(p.x, groups, **p.options)
    y = by_sample(result.y, p.layout).reshape(len(p.x), groups, -1)
    *_, judged = judge_forward(result, groups, p.x, **p.options)
    off = np.asarray(judged.bound).reshape(y.shape)
    assert (np.abs(y.mean(2)) <= off.mean(2)).all()
    wanted = result.var / (result.var + p.eps)
    bound = (off * (2 * np.abs(y) + off)).mean(2) + 1e-9 * wanted
    assert (np.abs(np.square(y).mean(2) - wanted) <= bound).all()


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", TYPES)
def test_samples_are_apart(dtype: str) -> None:
    """A sample by itself is what it is among others; its gradients of parameters add up."""
    for shape, kind in (((5, 12, 6, 6), 3), ((50, 12), "layer"), ((6, 12, 20), "instance")):
        x, dy, z, gamma, beta = made(shape, "NCHW", TYPES[dtype])
        whole = run(Norm(kind), x, dy, gamma, beta, z)
        parts = [
            run(Norm(kind), x[i : i + 1], dy[i : i + 1], gamma, beta, z[i : i + 1])
            for i in range(len(x))
        ]
        for name, a in whole.items():
            if name.endswith(("dgamma", "dbeta")):
                together = sum(part[name].astype(np.longdouble) for part in parts)
                size = np.abs(by_sample(dy, "NCHW")).sum()
                assert np.abs(a - together).max() <= 1e-12 * size, name
            else:
                each = np.concatenate([part[name] for part in parts])
                assert_same_bits({name: a}, {name: each})


# ---- PyTorch ----


def through_torch(torch: Any, norm: Norm, x: Array, dy: Array, gamma: Array, beta: Array) -> Any:
    """y, dx, dgamma and dbeta of its functional, by autograd."""
    functional = torch.nn.functional
    leaves = [torch.tensor(a, requires_grad=True) for a in (x, gamma, beta)]
    tensor, weight, bias = leaves
    if norm.kind == "instance":
        y = functional.instance_norm(tensor, weight=weight, bias=bias, eps=1e-5)
    elif norm.kind == "layer" and x.ndim == 2:
        y = functional.layer_norm(tensor, x.shape[1:], weight, bias, 1e-5)
    else:
        y = functional.group_norm(tensor, norm.groups(x.shape[1]), weight, bias, 1e-5)
    y.backward(torch.tensor(dy))
    return [np.asarray(a.detach()) for a in (y, *(leaf.grad for leaf in leaves))]


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("kind", ["instance", "layer", 3])
def test_pytorch_number_for_number(torch: Any, kind: Any) -> None:
    """By autograd in float64, whose statistics lose as many digits as ours may."""
    norm = Norm(kind)
    for shape in ((7, 12), (7, 12, 6), (4, 12, 6, 5), (2, 12, 3, 3, 2)):
        if kind == "instance" and len(shape) == 2:
            continue  # which PyTorch refuses: one value has no variance
        x, dy, _, gamma, beta = made(shape, "NCHW", np.float64, ratio=1)
        result, got = check(norm, x, dy, gamma, beta)
        groups = norm.groups(12)
        y, dx, dgamma, dbeta = through_torch(torch, norm, x, dy, gamma, beta)
        theirs = {"y": by_sample(y, "NCHW"), "dx": by_sample(dx, "NCHW")}
        theirs |= {"dgamma": dgamma.astype(np.longdouble), "dbeta": dbeta.astype(np.longdouble)}
        judged = judge_forward(result, groups, x, gamma, beta)
        judged += judge_backward(got, groups, dy, x, *result[1:], gamma)
        for one in judged:
            if one.what in theirs:
                assert_within(*one._replace(expected=theirs[one.what], bound=2 * one.bound))
