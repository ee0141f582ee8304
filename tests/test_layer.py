"""`BatchNorm`: the verbs with running statistics, in each mode; its arrays, and copies of it."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import numpy as np
import pytest

import fastbn
from oracle.arrays import DTYPES, HALVES, LAYOUTS, Array
from oracle.formulas import ACTIVATIONS
from support.bits import Results, assert_same_bits
from support.judge import assert_within
from support.layers import CHANNELS, batch, made
from support.running_averages import averaged, equal, exponential
from support.variants import each_backend

MODES = ("training", "evaluation", "frozen statistics")


RUNNING = ("running_mean", "running_var", "num_batches_tracked")


def of_verbs(bn: Any, x: Array, dy: Array, residual: Array | None, *, fixed: bool) -> Results:
    """What the verbs make of the layer's arrays: by its running statistics where `fixed`."""
    options = {"eps": bn.eps, "layout": bn.layout, "activation": bn.activation}
    tail = {"residual": residual, **options}
    if fixed:
        backward: Any = fastbn.normalize_backward
        mean, var = bn.running_mean, bn.running_var
        y = fastbn.normalize(x, mean, var, bn.gamma, bn.beta, **tail)
    else:
        backward = fastbn.batch_norm_backward
        y, mean, var = fastbn.batch_norm(x, bn.gamma, bn.beta, **tail)
    gate = None if bn.activation is None else y
    found = backward(dy, x, mean, var, bn.gamma, y=gate, dresidual=True, **options)
    return {"y": y, **found._asdict()}


def of_layer(bn: Any, x: Array, dy: Array, residual: Array | None) -> dict[str, Any]:
    """What a forward and a backward give, and leave in the layer."""
    found = {"y": bn(x, residual=residual), "dx": bn.backward(dy, dresidual=True)}
    return found | {name: getattr(bn, name) for name in ("dgamma", "dbeta", "dresidual")}


@each_backend
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [*DTYPES, *HALVES])
def test_calls_have_the_bits_of_the_verbs(dtype: Any, layout: str, mode: str) -> None:
    """Forward and backward, with any activation, with a residual and without; only training
    renews the running statistics."""
    for shape in ((7, CHANNELS), (4, CHANNELS, 6), (3, CHANNELS, 4, 4)):
        x, dy, z = batch(shape, layout, dtype)
        for activation in ACTIVATIONS:
            bn = made(mode, layout=layout, activation=activation, eps=1e-3)
            for residual in (None, z):
                before = bn.state_dict()
                expected = of_verbs(bn, x, dy, residual, fixed=mode != "training")
                assert_same_bits(of_layer(bn, x, dy, residual), expected)
                count = before["num_batches_tracked"]
                if mode == "training":
                    assert bn.num_batches_tracked == count + 1
                else:
                    assert_same_bits(bn.state_dict(), before)


@each_backend
@pytest.mark.parametrize("mode", MODES)
def test_results_go_where_they_are_asked_for(mode: str) -> None:
    """out and dresidual are what is returned and left, with the same bits; the residual's gradient
    is there only after a backward that was asked for it."""
    x, dy, z = batch((3, CHANNELS, 4, 4))
    bn = made(mode, activation="relu")
    expected = of_layer(copy.deepcopy(bn), x, dy, z)
    y, dx, dresidual = (np.empty_like(x) for _ in range(3))
    assert bn(x, residual=z, out=y) is y
    assert bn.backward(dy, dresidual=dresidual, out=dx) is dx
    assert bn.dresidual is dresidual
    for name, got in (("y", y), ("dx", dx), ("dresidual", dresidual)):
        assert_same_bits({name: got}, {name: expected[name]})
    assert_same_bits({"dx": bn.backward(dy)}, {"dx": dx})
    assert bn.dresidual is None


RULES: dict[str, tuple[dict[str, Any], Any]] = {
    "default": ({}, partial(exponential, 0.1)),
    "momentum": ({"momentum": 0.75}, partial(exponential, 0.75)),
    "momentum 0": ({"momentum": 0}, partial(exponential, 0)),
    "momentum 1": ({"momentum": 1}, partial(exponential, 1)),
    "decay": ({"decay": 0.9}, partial(exponential, 1 - np.longdouble(0.9))),
    "cumulative": ({"momentum": None}, equal),
}
"""How a layer is made, and the weights of its initial value and of each batch so far."""


@each_backend
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_running_statistics(layout: str, unbiased: bool, rule: str) -> None:
    """After each of several batches of different sizes, the weighted mean of what they had."""
    options, weights = RULES[rule]
    shapes = [(2, CHANNELS), (9, CHANNELS), (3, CHANNELS, 7), (4, CHANNELS, 5, 6)]
    for dtype in (*DTYPES, *HALVES):
        batches = [batch(shape, layout, dtype)[0] for shape in shapes]
        for own in DTYPES:
            bn = fastbn.BatchNorm(CHANNELS, layout=layout, unbiased=unbiased, dtype=own, **options)
            for k, x in enumerate(batches, 1):
                bn(x)
                for name, found in averaged(batches[:k], layout, unbiased, own).items():
                    running = getattr(bn, name)
                    assert running.dtype == own
                    assert_within(running, weights(k) @ found.values, found.bound, name)
                assert bn.num_batches_tracked == k


@pytest.mark.parametrize("tracks", [True, False])
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("scale", [True, False])
def test_each_part_may_be_missing(scale: bool, shift: bool, tracks: bool) -> None:
    """What is not there is None, has no gradient and no name; results are the verbs' without it."""
    bn = made(scale=scale, shift=shift, track_running_stats=tracks)
    x, dy, z = batch((6, CHANNELS, 3))
    has = {"gamma": scale, "beta": shift}
    has |= dict.fromkeys(("running_mean", "running_var", "num_batches_tracked"), tracks)
    assert {name: getattr(bn, name) is not None for name in has} == has
    names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert list(bn.state_dict()) == [
        n for n, there in zip(names, has.values(), strict=True) if there
    ]
    for training in (True, False):
        expected = of_verbs(bn.train(training), x, dy, z, fixed=tracks and not training)
        got = of_layer(bn, x, dy, z)
        for name in ("gamma", "beta"):
            if not has[name]:
                assert got.pop(f"d{name}") is None
                del expected[f"d{name}"]
        assert_same_bits(got, expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("own", DTYPES)
def test_a_layers_type_is_its_own(own: Any, mode: str) -> None:
    """Whatever the arrays are, the parameters' gradients are rounded to the layer's type, and to no
    other before, with a gamma and without."""
    for dtype in (*DTYPES, *HALVES):
        x, dy, z = batch((6, CHANNELS, 3), dtype=dtype)
        for scale in (True, False):
            bn = made(mode, dtype=own, scale=scale)
            like = made(mode, dtype=own)
            like.load_state_dict({"weight": np.ones(CHANNELS)} | bn.state_dict())
            expected = of_verbs(like, x, dy, z, fixed=mode != "training")
            if not scale:
                del expected["dgamma"]
            got = of_layer(bn, x, dy, z)
            assert_same_bits({name: got[name] for name in expected}, expected)
            assert all(a.dtype == own for a in bn.state_dict().values() if a.ndim)


@pytest.mark.parametrize("mode", MODES)
def test_a_frozen_affine_part(mode: str) -> None:
    """It has no gradients, not even those of an earlier backward; all other bits are the same."""
    x, dy, z = batch((6, CHANNELS, 3))
    bn = made(mode, activation="relu")
    expected = of_layer(bn, x, dy, z)
    assert bn.dgamma is not None
    bn.frozen_affine = True
    before = bn.gamma.copy(), bn.beta.copy()
    got = of_layer(bn, x, dy, z)
    for name in ("dgamma", "dbeta"):
        assert got.pop(name) is None
        del expected[name]
    assert_same_bits(got, expected)
    np.testing.assert_array_equal((bn.gamma, bn.beta), before)


@pytest.mark.parametrize("made_with", [{"momentum": 0.5}, {"decay": 0.5}, {"momentum": None}])
@pytest.mark.parametrize("then", [{"momentum": 0.25}, {"momentum": None}, {"decay": 0.25}])
def test_a_momentum_set_later(made_with: dict[str, Any], then: dict[str, Any]) -> None:
    """It is what counts from then on, as of a layer made with it; and so is a decay."""
    (name, value), (x, other, _) = *then.items(), batch((6, CHANNELS, 3))
    bn, like = fastbn.BatchNorm(CHANNELS, **made_with), fastbn.BatchNorm(CHANNELS, **then)
    bn(x)
    like.load_state_dict(bn.state_dict())
    setattr(bn, name, value)
    assert repr(bn) == repr(like)
    bn(other)
    like(other)
    assert_same_bits(bn.state_dict(), like.state_dict())
    third = fastbn.BatchNorm(CHANNELS, **made_with)
    third.momentum, third.decay = bn.momentum, bn.decay
    assert repr(third) == repr(bn)


def test_a_number_of_batches_set_later() -> None:
    """However it is counted on or written, it is an array that training renews."""
    x, _, _ = batch((6, CHANNELS, 3))
    bn: Any = fastbn.BatchNorm(CHANNELS)
    held = bn.num_batches_tracked
    bn.num_batches_tracked += 1
    assert bn.num_batches_tracked is held
    for i, value in enumerate((held + 1, 7, np.int32(7), np.array(7), 7.0, np.array(7, "f2")), 1):
        bn.num_batches_tracked = value
        before = int(value)
        assert bn.state_dict()["num_batches_tracked"] == before
        bn(x)
        assert bn.num_batches_tracked == before + 1
        assert bn.num_batches_tracked.shape == (), i
        bn.load_state_dict(bn.state_dict() | {"num_batches_tracked": 3})
        assert bn.num_batches_tracked == 3
    bn.num_batches_tracked = None
    bn(x)
    assert list(bn.state_dict()) == ["weight", "bias", "running_mean", "running_var"]


def test_modes() -> None:
    """train and eval give the layer, and leave what is frozen alone."""
    bn = fastbn.BatchNorm(3)
    assert (bn.training, bn.frozen_statistics, bn.frozen_affine) == (True, False, False)
    bn = fastbn.BatchNorm(3, frozen_statistics=True, frozen_affine=True)
    for call, training in ((bn.eval, False), (bn.train, True), (partial(bn.train, False), False)):
        assert call() is bn
        assert (bn.training, bn.frozen_statistics, bn.frozen_affine) == (training, True, True)


@pytest.mark.parametrize("mode", MODES)
def test_backward_goes_by_its_forward(mode: str) -> None:
    """By the statistics and the mode of then, whatever became of the layer; and again."""
    x, dy, z = batch((6, CHANNELS, 3))
    bn = made(mode, activation="relu6")
    expected = of_verbs(bn, x, dy, z, fixed=mode != "training")
    bn(x[:2])
    bn(x, residual=z)
    bn.running_mean[...], bn.running_var[...] = 7, 7
    bn.train(mode == "evaluation").frozen_statistics = mode == "training"
    for _ in range(2):
        assert_same_bits({"dx": bn.backward(dy)}, {"dx": expected["dx"]})
        assert_same_bits({"dgamma": bn.dgamma}, {"dgamma": expected["dgamma"]})


def test_in_place_there_is_only_the_gradient_that_needs_no_x() -> None:
    """After out=x: by fixed statistics, dx alone."""
    x, dy, z = batch((6, CHANNELS, 3))
    bn = made("evaluation", activation="relu")
    bn.frozen_affine = True
    expected = of_layer(bn, x, dy, z)
    overwritten = x.copy()
    assert bn(overwritten, residual=z, out=overwritten) is overwritten
    assert_same_bits({"dx": bn.backward(dy)}, {"dx": expected["dx"]})


def test_out_beside_x_in_one_buffer() -> None:
    """Channels of one larger array, neither of which is written over: there is a backward."""
    x, dy, _ = batch((6, CHANNELS, 3))
    buffer = np.concatenate([x, x], 1)
    here, beside = buffer[:, :CHANNELS], buffer[:, CHANNELS:]
    bn = fastbn.BatchNorm(CHANNELS)
    expected = {"y": bn(here), "dx": bn.backward(dy)}
    assert_same_bits({"y": bn(here, out=beside), "dx": bn.backward(dy)}, expected)


def test_arrays_stay_the_same_objects() -> None:
    """A step, training and a loaded state write them in place; the next call goes by what they
    hold."""
    x, dy, z = batch((6, CHANNELS, 3))
    bn: Any = fastbn.BatchNorm(CHANNELS)
    names = ("gamma", "beta", "dgamma", "dbeta", *RUNNING)
    before = [getattr(bn, name) for name in names]
    gamma, beta, dgamma, dbeta, *_ = before
    assert not np.any([dgamma, dbeta])
    bn(x)
    bn.backward(dy)
    gamma -= 0.25 * dgamma
    beta -= 0.25 * dbeta
    assert_same_bits(of_layer(bn, x, dy, z), of_verbs(bn, x, dy, z, fixed=False))
    state = made().state_dict()
    bn.load_state_dict(state)
    assert_same_bits(bn.state_dict(), state)
    assert_same_bits(of_layer(bn, x, dy, z), of_verbs(bn, x, dy, z, fixed=False))
    assert all(getattr(bn, name) is a for name, a in zip(names, before, strict=True))


def test_a_state_is_copied_and_rounded() -> None:
    """Neither side of it shares memory with the layer; values become those of the layer's type."""
    bn = made(dtype="float64")
    before = bn.state_dict()
    for a in bn.state_dict().values():
        a[...] = 7
    assert_same_bits(bn.state_dict(), before)
    small = fastbn.BatchNorm(CHANNELS)
    given = {name: a.tolist() for name, a in before.items()}
    given["running_var"] = [1e300, *given["running_var"][1:]]
    small.load_state_dict(given)
    with np.errstate(over="ignore"):
        rounded = {name: np.array(a, small.state_dict()[name].dtype) for name, a in given.items()}
    assert_same_bits(small.state_dict(), rounded)
    small.load_state_dict(rounded)
    rounded["weight"][...] = 7
    assert small.gamma is not None
    assert (small.gamma != 7).all()


@pytest.mark.parametrize("dtype", [*HALVES, np.dtype(np.float16).newbyteorder(), int, ">f8"])
@pytest.mark.parametrize("own", DTYPES)
def test_a_state_of_other_types(own: Any, dtype: Any) -> None:
    """Half types, whole numbers and swapped bytes come with the values that they have."""
    given = {name: a.astype(dtype) for name, a in made(dtype=own).state_dict().items() if a.ndim}
    bn = made(dtype=own)
    bn.load_state_dict(given | {"num_batches_tracked": 3})
    expected = {name: a.astype(own) for name, a in given.items()}
    assert_same_bits(bn.state_dict(), expected | {"num_batches_tracked": np.array(3)})


def test_a_state_with_infinity() -> None:
    """It is loaded, and evaluation goes by it as `normalize` does: an infinite variance leaves
    beta."""
    x, _, _ = batch((6, CHANNELS, 3))
    bn = made("evaluation")
    state = bn.state_dict()
    state["running_var"][2] = state["weight"][1] = np.inf
    bn.load_state_dict(state)
    assert_same_bits(bn.state_dict(), state)
    y = fastbn.normalize(x, state["running_mean"], state["running_var"], bn.gamma, bn.beta)
    assert_same_bits({"y": bn(x)}, {"y": y})
    assert (y[:, 2] == bn.beta[2]).all()


def test_a_state_of_the_layers_own_arrays() -> None:
    """All are read before one is written."""
    bn = made()
    before = bn.state_dict()
    bn.load_state_dict(before | {"weight": bn.beta, "bias": bn.gamma})
    assert_same_bits(bn.state_dict(), before | {"weight": before["bias"], "bias": before["weight"]})


@each_backend
@pytest.mark.parametrize("layout", LAYOUTS)
def test_to_frozen(layout: str) -> None:
    """The bits of evaluation, of copies, whatever the mode; the layer stays as it was."""
    x, _, z = batch((3, CHANNELS, 4, 4), layout)
    for options in ({}, {"scale": False}, {"shift": False, "activation": ("leaky_relu", 0.1)}):
        bn = made(layout=layout, eps=1e-2, **options)
        before = bn.state_dict()
        frozen = bn.to_frozen()
        assert bn.training
        assert_same_bits(bn.state_dict(), before)
        expected = {"y": bn.eval()(x, residual=z)}
        bn.running_mean[...] = 7
        assert_same_bits({"y": frozen(x, residual=z)}, expected)
        assert frozen.layout == layout


COPIES = {
    "copy": copy.deepcopy,
    "pickle": lambda bn: pickle.loads(pickle.dumps(bn)),
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_and_pickles(how: str) -> None:
    """They have equal arrays, flags and gradients of their own, and no last call."""
    x, dy, z = batch((6, CHANNELS, 3))
    bn = made("frozen statistics", activation="relu", momentum=None, one_value="skip")
    bn.frozen_affine = True
    of_layer(bn, x, dy, z)
    other = COPIES[how](bn)
    assert repr(other) == repr(bn)
    assert (other.training, other.frozen_statistics, other.frozen_affine) == (True, True, True)
    assert_same_bits({"dz": other.dresidual}, {"dz": bn.dresidual})
    with pytest.raises(ValueError, match="backward was called without saved, and"):
        other.backward(dy)
    bn.backward(dy)
    state = bn.state_dict()
    assert_same_bits(other.state_dict(), state)
    other.frozen_statistics = False
    other(x)
    other.gamma[...] = 7
    assert_same_bits(bn.state_dict(), state)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "5"),
        ({"momentum": 0.1, "eps": 1e-5}, "5"),
        ({"momentum": None, "dtype": np.float64}, "5, momentum=None, dtype='float64'"),
        ({"decay": 0.9, "unbiased": False}, "5, decay=0.9, unbiased=False"),
        (
            {"scale": False, "shift": False, "track_running_stats": False},
            "5, scale=False, shift=False, track_running_stats=False",
        ),
        (
            {"one_value": "skip", "nonfinite": "raise", "layout": "NHWC", "activation": "relu"},
            "5, one_value='skip', nonfinite='raise', layout='NHWC', activation='relu'",
        ),
        (
            {"one_value": np.str_("skip"), "layout": np.str_("NHWC"), "eps": np.float32(0.5)},
            "5, eps=0.5, one_value='skip', layout='NHWC'",
        ),
        (
            {"activation": (np.str_("leaky_relu"), np.float64(0.5)), "decay": np.float32(0.5)},
            "5, decay=0.5, activation=('leaky_relu', 0.5)",
        ),
        ({"activation": np.str_("relu")}, "5, activation='relu'"),
        ({"frozen_statistics": True}, "5, frozen_statistics=True"),
        ({"frozen_affine": np.True_, "dtype": "float64"}, "5, frozen_affine=True, dtype='float64'"),
    ],
)
def test_repr(options: dict[str, Any], words: str) -> None:
    """It makes such a layer, and says what is not the default."""
    bn = fastbn.BatchNorm(CHANNELS, **options)
    assert repr(bn) == f"BatchNorm({words})"
    assert repr(eval(repr(bn), {"BatchNorm": fastbn.BatchNorm})) == repr(bn)
