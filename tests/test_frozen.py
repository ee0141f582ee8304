"""`FrozenBatchNorm`: what `normalize` gives, computed once, immutable, shared and moved about."""

from __future__ import annotations

import copy
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

import numpy as np
import pytest

import fastbn
from oracle.arrays import DTYPES, HALVES, LAYOUTS, Array, channels_of
from oracle.formulas import ACTIVATIONS
from support.bits import assert_same_bits
from support.memory import FORMS, WRITEABLE, dense
from support.pairs import paired
from support.variants import VARIANTS, Variant, activate, each_backend

SHAPES = [(3, 5), (60, 100), (4, 33, 7), (2, 16, 7, 7), (3, 8, 5, 5, 2), (300, 24), (2, 4000)]


def vectors(channels: int) -> tuple[Array, Array, Array, Array]:
    """mean, var, gamma and beta, of several types."""
    rng = np.random.default_rng(channels)
    mean, var = rng.normal(3, 1, channels), rng.exponential(size=channels)
    return mean, var.astype(np.float32), *rng.normal(size=(2, channels))


def made(x: Array, layout: str, **options: Any) -> tuple[fastbn.FrozenBatchNorm, tuple[Array, ...]]:
    given = vectors(channels_of(x, layout))
    return fastbn.FrozenBatchNorm(*given, layout=layout, **options), given


@pytest.mark.usefixtures("variant")
@paired(shape=SHAPES, dtype=[*DTYPES, *HALVES], layout=LAYOUTS)
def test_it_has_the_bits_of_normalize(shape: tuple[int, ...], dtype: Any, layout: str) -> None:
    """With any activation, with a residual and a mask and without, fresh or into `out`."""
    rng = np.random.default_rng(0)
    x, z = rng.normal(3, 2, (2, *shape)).astype(dtype)
    mask = rng.random((len(x), *[1] * (len(shape) - 1))) < 0.7
    for activation in ACTIVATIONS:
        frozen, given = made(x, layout, activation=activation, eps=1e-3)
        options: Any = {"activation": activation, "eps": 1e-3, "layout": layout}
        extras: list[dict[str, Any]] = [{}, {"residual": z}, {"where": mask}]
        for extra in (*extras, {"residual": z, "where": mask}):
            expected = fastbn.normalize(x, *given, **(options | extra))
            out = np.empty_like(x)
            assert frozen(x, **extra, out=out) is out
            assert_same_bits(
                {"y": frozen(x, **extra), "out": out}, dict.fromkeys(("y", "out"), expected)
            )


@each_backend
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_arrays_in_any_form(form: str, layout: str) -> None:
    """x, residual and out may lie in memory in any way; out may be x or the residual."""
    x, z = np.random.default_rng(0).normal(size=(2, 4, 6, 7, 6)).astype(np.float32)
    frozen, _ = made(x, layout)
    expected = {"y": frozen(x, residual=z)}
    assert_same_bits({"y": dense(frozen(FORMS[form](x), residual=FORMS[form](z)))}, expected)
    if form in WRITEABLE:
        for name in ("x", "z", "out"):
            mine = {n: WRITEABLE[form](a.copy()) for n, a in (("x", x), ("z", z), ("out", x))}
            assert frozen(mine["x"], residual=mine["z"], out=mine[name]) is mine[name]
            assert_same_bits({"y": dense(mine[name])}, expected)


@each_backend
def test_backward_is_normalize_backward() -> None:
    """With the activation that was given, and every option."""
    x, dy = np.random.default_rng(0).normal(size=(2, 4, 3, 5))
    frozen, (mean, var, gamma, _) = made(x, "NCHW", activation="relu")
    y = frozen(x)
    options: Any = {"activation": "relu", "y": y}
    expected = fastbn.normalize_backward(dy, x, mean, var, gamma, **options)
    assert_same_bits(frozen.backward(dy, x, y=y)._asdict(), expected._asdict())
    expected = fastbn.normalize_backward(dy, x, mean, var, gamma, dresidual=True, **options)
    into = np.empty_like(x), np.empty_like(x)
    got = frozen.backward(dy, x, y=y, dresidual=into[0], out=into[1])
    assert (got.dresidual, got.dx) == into
    assert_same_bits(got._asdict(), expected._asdict())
    lone = frozen.backward(dy, None, y=y, params=False)
    assert lone.dgamma is None
    assert_same_bits({"dx": lone.dx}, {"dx": expected.dx})


@each_backend
def test_scale_and_shift_are_parameters_of_their_own() -> None:
    """normalize by mean 0, var 1, eps 0 with them as gamma and beta is the same function, whose
    backward gives their gradients."""
    x, dy = np.random.default_rng(0).normal(size=(2, 8, 3, 5))
    frozen, _ = made(x, "NCHW")
    mean, var = np.zeros(3), np.ones(3)
    y = fastbn.normalize(x, mean, var, frozen.scale, frozen.shift, eps=0.0)
    np.testing.assert_allclose(y, frozen(x), rtol=1e-13, atol=1e-13)
    dx, dscale, dshift = fastbn.normalize_backward(dy, x, mean, var, frozen.scale, eps=0.0)
    assert dscale is not None
    assert dshift is not None
    np.testing.assert_allclose(dx, frozen.backward(dy, x).dx, rtol=1e-13)
    np.testing.assert_allclose(dscale, (dy * x).sum((0, 2)), rtol=1e-12)
    np.testing.assert_allclose(dshift, dy.sum((0, 2)), rtol=1e-12)


def test_scale_and_shift() -> None:
    """scale = gamma / sqrt(var + eps) and shift = beta - mean * scale, in float64."""
    given = vectors(4)
    frozen = fastbn.FrozenBatchNorm(*given, eps=0.5)
    mean, var, gamma, beta = (v.astype(np.longdouble) for v in given)
    scale = gamma / np.sqrt(var + np.longdouble(0.5))
    assert frozen.scale.dtype == frozen.shift.dtype == np.float64
    np.testing.assert_allclose(frozen.scale, scale.astype(float), rtol=4 * 2.0**-52)
    np.testing.assert_allclose(
        frozen.shift, (beta - mean * scale).astype(float), rtol=0, atol=1e-14
    )


def test_it_cannot_be_changed() -> None:
    """Neither attributes, nor arrays, nor by what was given."""
    mean, var, gamma, beta = vectors(4)
    frozen = fastbn.FrozenBatchNorm(mean, var, gamma, beta)
    x = np.random.default_rng(0).normal(size=(3, 4))
    before = frozen(x)
    for a in (mean, var, gamma, beta):
        a[...] = 7
    np.testing.assert_array_equal(frozen(x), before)
    for name in ("mean", "var", "gamma", "beta", "scale", "shift"):
        a = getattr(frozen, name)
        assert a.flags.aligned
        with pytest.raises(ValueError, match="read-only"):
            a[0] = 1
        for array in (a, a[:], a.view(np.int64 if a.itemsize == 8 else np.int32)):
            with pytest.raises(ValueError, match="WRITEABLE"):
                array.flags.writeable = True
        with pytest.raises(AttributeError, match=f"cannot be changed: {name!r} cannot be set"):
            setattr(frozen, name, 1)
    with pytest.raises(AttributeError, match="cannot be deleted"):
        del frozen.eps
    with pytest.raises(AttributeError, match="'new' cannot be set"):
        frozen.new = 1


def test_copies_and_pickles() -> None:
    """A copy has the same words and gives the same bits."""
    x = np.random.default_rng(0).normal(size=(3, 7, 4)).astype(np.float32)
    frozen, _ = made(x, "NHWC", activation=("leaky_relu", 0.25), eps=0.125)
    frozen(x)
    for other in (copy.copy(frozen), copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        assert repr(other) == repr(frozen)
        assert "4 channels, eps=0.125, layout='NHWC', activation=('leaky_relu', 0.25)" in repr(
            other
        )
        assert_same_bits({"y": other(x)}, {"y": frozen(x)})


class Named(fastbn.FrozenBatchNorm):
    """With an attribute of its own, and another constructor."""

    def __init__(self, name: str, *vectors: Array) -> None:
        super().__init__(*vectors, activation="relu")
        object.__setattr__(self, "name", name)


class Slotted(Named):
    """The same, where there is no dictionary to find it in."""

    __slots__ = ("name",)


@pytest.mark.parametrize("kind", [Named, Slotted])
def test_subclasses_stay_what_they_are(kind: type[Named]) -> None:
    """Copied and pickled, with what they have added; and weak references to them work."""
    x = np.random.default_rng(0).normal(size=(3, 4, 7)).astype(np.float32)
    frozen = kind("block 1", *vectors(4))
    for other in (copy.copy(frozen), copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        assert type(other) is kind
        assert other.name == "block 1"  # type: ignore[attr-defined]
        assert_same_bits({"y": other(x)}, {"y": frozen(x)})
        with pytest.raises(AttributeError, match="cannot be changed"):
            other.name = "block 2"
    assert weakref.ref(frozen)() is frozen
    plain = fastbn.FrozenBatchNorm(*vectors(4))
    assert weakref.WeakSet([plain, frozen])


def test_the_backend_is_looked_up_at_each_call() -> None:
    """One object runs on every variant."""
    x = np.random.default_rng(0).normal(size=(3, 7, 4)).astype(np.float32)
    frozen, given = made(x, "NCHW")
    for name in (*VARIANTS, *VARIANTS[:2]):
        with activate(name) as active:
            before = active.calls()
            y = frozen(x)
            assert active.calls() > before, name
            assert_same_bits({"y": y}, {"y": fastbn.normalize(x, *given)})


@each_backend
def test_threads_may_share_it(variant: Variant) -> None:
    """Sixteen threads, the first calls at once."""
    x = np.random.default_rng(0).normal(size=(4, 64, 9, 9)).astype(np.float32)
    frozen, given = made(x, "NCHW")
    expected = fastbn.normalize(x, *given)
    with ThreadPoolExecutor(16) as pool:
        futures = [pool.submit(copy_context().run, frozen, x) for _ in range(64)]
        for future in futures:
            assert_same_bits({"y": future.result(timeout=60)}, {"y": expected})


@each_backend
def test_parameters_may_be_missing(variant: Variant) -> None:
    """gamma is 1 and beta 0 where not given; an empty batch stays empty."""
    x = np.random.default_rng(0).normal(size=(4, 3, 5))
    mean, var, gamma, beta = vectors(3)
    for parameters in ((None, None), (gamma, None), (None, beta)):
        frozen = fastbn.FrozenBatchNorm(mean, var, *parameters)
        expected = fastbn.normalize(x, mean, var, *parameters)
        assert_same_bits({"y": frozen(x)}, {"y": expected})
        assert frozen(x[:0]).shape == (0, 3, 5)


BAD: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    r"mean is a list \(\[0.0\]\), expected a numpy.ndarray": (TypeError, {"mean": [0.0]}),
    r"mean has shape \(3, 1\), expected rank 1": (ValueError, {"mean": np.zeros((3, 1))}),
    r"mean\[1\] is nan": (ValueError, {"mean": np.array([0, np.nan, 0])}),
    r"var has shape \(2,\) but mean has 3 channels": (ValueError, {"var": np.ones(2)}),
    r"var\[2\] is -1.0: a variance cannot be negative": (
        ValueError,
        {"var": np.array([1, 0, -1.0])},
    ),
    r"var\[0\] is nan: not a number": (ValueError, {"var": np.array([np.nan, 0, -1.0])}),
    r"gamma has dtype int64, expected float16, bfl": (TypeError, {"gamma": np.ones(3, int)}),
    r"beta has shape \(4,\) but mean has 3 channels": (ValueError, {"beta": np.ones(4)}),
    r"eps is -1.0, expected a finite number": (ValueError, {"eps": -1.0}),
    r"layout is 'CHWN', expected 'NCHW'": (ValueError, {"layout": "CHWN"}),
    r"activation is 'gelu', expected None, 'relu', 'relu6'": (ValueError, {"activation": "gelu"}),
    r"activation is \('leaky_relu', 1.5\), .* 0 < slope < 1": (
        ValueError,
        {"activation": ("leaky_relu", 1.5)},
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message: str) -> None:
    """A clear error says what is wrong with them."""
    error, changed = BAD[message]
    with pytest.raises(error, match=f"^{message}"):
        fastbn.FrozenBatchNorm(**({"mean": np.zeros(3), "var": np.ones(3)} | changed))


@each_backend
def test_bad_arrays(variant: Variant) -> None:
    """Arrays that do not fit are refused, and nothing runs or is written."""
    frozen = fastbn.FrozenBatchNorm(np.zeros(3), np.ones(3))
    x, out = np.ones((4, 3, 5), np.float32), np.full((4, 3, 5), 7, np.float32)
    frozen(x)  # makes what every call uses
    before = variant.calls()
    with pytest.raises(ValueError, match=r"^x has 5 channels .* expected 3.* layout='NHWC'"):
        frozen(np.ones((4, 5, 3), np.float32), out=out)
    with pytest.raises(ValueError, match=r"^x has 2 channels .* expected 3.* pass another"):
        frozen(np.ones((4, 2), np.float32), out=out)
    with pytest.raises(TypeError, match=r"^x has dtype int64"):
        frozen(np.ones((4, 3), np.int64), out=out)
    with pytest.raises(ValueError, match=r"^residual has shape \(3, 5\), expected \(4, 3, 5\)"):
        frozen(x, residual=np.ones((3, 5), np.float32), out=out)
    with pytest.raises(TypeError, match=r"^residual has dtype float64, expected float32"):
        frozen(x, residual=x.astype(np.float64), out=out)
    with pytest.raises(ValueError, match=r"^where has shape \(4, 3\), expected \(4, 1, 5\)"):
        frozen(x, where=np.ones((4, 3), bool), out=out)
    with pytest.raises(ValueError, match=r"^x has 2 channels .* expected 3.* pass another"):
        frozen(np.ones((4, 2), np.float32), where=np.ones((4, 1), bool))
    assert (out == 7).all()
    assert variant.calls() == before
