"""What a layer's attributes may be set to, and that it has no others; gradients that stay the same
arrays; subclasses with attributes of their own."""

from __future__ import annotations

import copy
import pickle
import weakref
from typing import Any
from unittest import mock

import numpy as np
import pytest

import fastbn
from support.bits import assert_same_bits
from support.layers import CHANNELS, batch, fails, made, refused

SHAPE = (6, CHANNELS, 3)
KINDS: dict[str, tuple[int, ...]] = {
    "BatchNorm": (CHANNELS,),
    "GroupNorm": (1, CHANNELS),
    "InstanceNorm": (CHANNELS,),
    "LayerNorm": (CHANNELS,),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def fresh(kind: str, **options: Any) -> Any:
    return getattr(fastbn, kind)(*KINDS[kind], **options)


# ---- Names ----

MISTAKES = {
    "freeze_statistics": "frozen_statistics",
    "freeze_affine": "frozen_affine",
    "trainin": "training",
    "trainable": "training",
    "moment": "momentum",
    "runing_mean": "running_mean",
    "weight": "gamma",
    "bias": "beta",
}
"""Names that a layer has not, and what is nearest."""


@pytest.mark.parametrize("name", [*MISTAKES, "x", "requires_grad"])
def test_unknown_attributes(name: str) -> None:
    """They are refused, with the nearest that there is."""
    bn = made()
    nearest = f"the nearest is {MISTAKES[name]!r}" if name in MISTAKES else "the nearest is '"
    words = f"BatchNorm has no attribute {name!r}, expected one that it has; {nearest}"
    for layer in (bn, copy.deepcopy(bn), pickle.loads(pickle.dumps(bn))):
        with refused(layer, AttributeError, words):
            setattr(layer, name, False)


@every_kind
def test_every_attribute_can_be_set(kind: str) -> None:
    """All that there are, public ones, to what they are."""
    layer = fresh(kind)
    names = {name for name in (*vars(layer), *dir(layer)) if not name.startswith("_")}
    for name in names - {"domains"}:
        setattr(layer, name, getattr(layer, name))
    with refused(layer, AttributeError, f"{kind} has no attribute 'frozen', ... 'frozen_"):
        layer.frozen = True


def test_methods_are_not_flags() -> None:
    """`bn.train = False` would change nothing; what is called in a method's place may be."""
    bn = made()
    for name in ("train", "eval", "backward", "to_frozen"):
        with refused(bn, AttributeError, f"BatchNorm.{name} is a method, ... layer.{name}()"):
            setattr(bn, name, True)
    with mock.patch.object(bn, "backward") as backward:
        bn.backward(1)
    backward.assert_called_once_with(1)
    assert "backward" not in vars(bn)


class Plain(fastbn.BatchNorm):
    """A subclass without attributes of its own."""


class Declared(fastbn.GroupNorm):
    """One that names them in its class body, near ones too."""

    frozen: bool
    grops = 3


class Whole(fastbn.BatchNorm):
    """One that sets them in its constructor, near ones too, before and after the base's."""

    def __init__(self, channels: int, *, running_max: float = 0.0, **options: Any) -> None:
        self.started = True
        super().__init__(channels, **options)
        self.running_max = running_max
        self.channel = 0

    def __call__(self, x: Any, **options: Any) -> Any:
        self.calls = getattr(self, "calls", 0) + 1
        self.running_max = max(self.running_max, float(x.max()))
        return super().__call__(x, **options)


class Deep(Whole):
    """One of such a subclass, with more."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, running_max=-1.0, momentum=None)
        self.momentums = [self.momentum]


@pytest.mark.parametrize("kind", [Plain, Whole, Deep])
def test_subclasses(kind: Any) -> None:
    """They have what they set, and mistakes in names are found as in a layer."""
    layer, (x, dy, _) = kind(CHANNELS), batch(SHAPE)
    plain = fastbn.BatchNorm(CHANNELS, momentum=layer.momentum)
    for each in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(each) is kind
        for name in ("freeze_statistics", "trainin"):
            with refused(each, AttributeError, f"{kind.__name__} has no attribute {name!r}"):
                setattr(each, name, True)
        each.history = []  # nothing is near
        assert_same_bits({"y": each(x)}, {"y": plain(x)})
        assert each.backward(dy).shape == x.shape
        assert weakref.ref(each)() is each
    assert repr(layer).startswith("BatchNorm(5")
    if kind is not Plain:
        assert layer.calls == 1
        assert layer.running_max == x.max()
        layer.running_max, layer.channel = 3.0, 1


def test_a_subclass_that_names_its_attributes() -> None:
    """They can be set afterwards, however near."""
    layer: Any = Declared(1, CHANNELS)
    layer.frozen, layer.grops = True, 4
    assert (layer.frozen, layer.grops, Declared.grops) == (True, 4, 3)
    assert repr(layer) == "GroupNorm(1, 5)"


def test_the_repr_of_a_subclass_with_options() -> None:
    """An option of which there is no attribute is left out."""

    class Mine(fastbn.InstanceNorm):
        def __init__(self, channels: int, *, eps: float = 1.0, label: str = "") -> None:
            super().__init__(channels, eps=eps)

    assert repr(Mine(3, eps=0.5, label="x")) == "Mine(3, eps=0.5)"


# ---- Flags ----


@every_kind
def test_flags_are_bools(kind: str) -> None:
    """Python's or NumPy's; a word that sounds like one is refused, wherever it is set."""
    layer = fresh(kind)
    flags = ["training", "frozen_affine"]
    if kind == "BatchNorm":
        flags.append("frozen_statistics")
    for flag in flags:
        for value in (np.True_, False, True, np.False_):
            setattr(layer, flag, value)
            assert getattr(layer, flag) is bool(value)
        for other in ("eval", 0, 1, None, np.zeros(1, bool)):
            with refused(layer, TypeError, f"{flag} is a"):
                setattr(layer, flag, other)
        if flag != "training":
            with fails(TypeError, f"{flag} is an int (1), expected True or False"):
                fresh(kind, **{flag: 1})


def test_frozen_from_the_start() -> None:
    """As if set afterwards; a state does not say so, and changes nothing of it."""
    x, dy, _ = batch(SHAPE)
    bn = fastbn.BatchNorm(CHANNELS, frozen_statistics=True, frozen_affine=True)
    bn.load_state_dict(made().state_dict())
    assert (bn.frozen_statistics, bn.frozen_affine) == (True, True)
    before = bn.state_dict()
    assert_same_bits({"y": bn(x)}, {"y": made("evaluation")(x)})
    bn.backward(dy)
    assert (bn.dgamma, bn.dbeta) == (None, None)
    assert_same_bits(bn.state_dict(), before)
    with fails(ValueError, "frozen_statistics is True, expected False where track_running_stats"):
        fastbn.BatchNorm(CHANNELS, frozen_statistics=True, track_running_stats=False)


# ---- Gradients ----


@every_kind
def test_gradients_are_written_in_place(kind: str) -> None:
    """What is held from the start has each backward's; frozen, it is 0 and not there, and then the
    same again."""
    x, dy, _ = batch(SHAPE)
    layer, like = fresh(kind), fresh(kind)
    held = layer.dgamma, layer.dbeta
    assert not np.any(held)
    for scale in (1, 3):
        for each in (layer, like):
            each(x)
            each.backward(np.float32(scale) * dy)
        assert all(a is b for a, b in zip(held, (layer.dgamma, layer.dbeta), strict=True))
        expected = {"dgamma": like.dgamma.copy(), "dbeta": like.dbeta.copy()}
        assert_same_bits(dict(zip(expected, held, strict=True)), expected)
    layer.frozen_affine = True
    assert (layer.dgamma, layer.dbeta) == (None, None)
    assert not np.any(held)
    layer.backward(dy)
    assert not np.any(held)
    layer.frozen_affine = False
    assert layer.dgamma is held[0]
    layer.backward(np.float32(3) * dy)
    assert_same_bits(dict(zip(expected, held, strict=True)), expected)


@every_kind
def test_gradients_that_are_set(kind: str) -> None:
    """Parts of one buffer, of another type too, are written from then on; what operators in place
    set is what they were."""
    x, dy, _ = batch(SHAPE)
    layer, like, buffer = fresh(kind), fresh(kind), np.full((2, CHANNELS), 7.0)
    layer.dgamma, layer.dbeta = buffer
    for each in (layer, like):
        each(x)
        each.backward(dy)
    np.testing.assert_array_equal(buffer, (like.dgamma, like.dbeta))
    layer.dgamma *= 0
    assert not buffer[0].any()


@every_kind
def test_gradients_of_what_is_not_there(kind: str) -> None:
    """They are None; a gamma that is set later has one."""
    x, dy, _ = batch(SHAPE)
    layer, like = fresh(kind, scale=False), fresh(kind)
    for each in (layer, like):
        each(x)
        each.backward(dy)
    missing = layer.dgamma
    assert missing is None
    layer.gamma = np.ones(CHANNELS, np.float32)
    layer.backward(dy)
    assert_same_bits({"dgamma": layer.dgamma}, {"dgamma": like.dgamma})
    layer.beta = None
    assert layer.dbeta is None
    layer.backward(dy)


@every_kind
def test_gradients_that_cannot_be_written(kind: str) -> None:
    """They are refused as they are set or, where they became so later, before a backward."""
    x, dy, _ = batch(SHAPE)
    layer = fresh(kind)
    layer(x)
    layer.backward(dy)
    for value, error, words in (
        (None, TypeError, "is a NoneType"),
        ([1.0] * CHANNELS, TypeError, "is a list"),
        (np.ones(CHANNELS, int), TypeError, "has dtype int64"),
        (np.ones(CHANNELS, np.float16), TypeError, "has dtype float16"),
        (np.ones(3), ValueError, f"has shape (3,) but the layer has {CHANNELS} channels"),
    ):
        for name in ("dgamma", "dbeta"):
            with refused(layer, error, f"{name} {words}"):
                setattr(layer, name, value)
    layer.dbeta.flags.writeable = False
    with refused(layer, ValueError, "dbeta is read-only, expected a writeable array: a backward"):
        layer.backward(dy)


# ---- The counter ----


@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u4", ">i8", "f2", "f8"])
def test_counters_of_other_types(dtype: str) -> None:
    """They are counted in int64, which does not end; an array of it is itself written."""
    x, _, _ = batch(SHAPE)
    given = np.array(127, dtype)
    for bn in (made(), made(momentum=None)):
        bn.num_batches_tracked = given
        bn(x)
        assert bn.num_batches_tracked.dtype == np.int64
        assert bn.num_batches_tracked == 128
        assert given == 127
        bn.load_state_dict(bn.state_dict() | {"num_batches_tracked": given})
        assert bn.num_batches_tracked == 127
    held = np.array(127)
    bn.num_batches_tracked = held
    bn(x)
    assert bn.num_batches_tracked is held
    assert held == 128


def test_the_last_number() -> None:
    """It stays, and all else goes on."""
    x, _, _ = batch(SHAPE)
    bn = made()
    bn.num_batches_tracked = last = np.array(2**63 - 1)
    before = bn.running_mean.copy()
    bn(x)
    assert last == 2**63 - 1
    assert (bn.running_mean != before).all()
