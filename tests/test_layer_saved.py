"""What a forward leaves for its backward: kept by the layer, given to the caller, or by nobody; and
gradients that are added up."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fastbn
from oracle.arrays import DTYPES, Array
from support.bits import assert_same_bits
from support.layers import CHANNELS, batch, refused
from support.layers import made as batch_norm
from support.variants import each_backend

SHAPE = (6, CHANNELS, 3)
OPEN = fastbn.Renormalization(start=0, r_end=0, d_end=0)


def sample_norm(kind: Callable[..., Any], *sizes: int) -> Callable[..., Any]:
    """Makes such layers with parameters that are neither 1 nor 0."""

    def make(**options: Any) -> Any:
        layer = kind(*sizes, CHANNELS, **options)
        rng = np.random.default_rng(0)
        layer.load_state_dict({name: rng.uniform(2, 3, CHANNELS) for name in ("weight", "bias")})
        return layer

    return make


LAYERS: dict[str, Callable[..., Any]] = {
    "training": batch_norm,
    "evaluation": lambda **options: batch_norm("evaluation", **options),
    "frozen statistics": lambda **options: batch_norm("frozen statistics", **options),
    "virtual batches": lambda **options: batch_norm(virtual_batch=4, **options),
    "renormalization": lambda **options: batch_norm(renormalization=OPEN, **options),
    "GroupNorm": sample_norm(fastbn.GroupNorm, 1),
    "InstanceNorm": sample_norm(fastbn.InstanceNorm),
    "LayerNorm": sample_norm(fastbn.LayerNorm),
}
every_layer = pytest.mark.parametrize("kind", LAYERS)


def gradients(layer: Any) -> dict[str, Array]:
    return {name: getattr(layer, name).copy() for name in ("dgamma", "dbeta")}


# ---- Given to the caller ----


@each_backend
@pytest.mark.parametrize("activation", [None, "relu"])
@every_layer
def test_several_calls_before_their_backwards(kind: str, activation: Any) -> None:
    """Each has the bits of a call and its backward alone, in whichever order they go back."""
    calls = [batch(shape) for shape in (SHAPE, (3, CHANNELS, 7), (4, CHANNELS))]
    alone, shared = (LAYERS[kind](activation=activation) for _ in range(2))
    expected, left = [], []
    for x, dy, z in calls:
        found = {"y": alone(x, residual=z), "dx": alone.backward(dy, dresidual=True)}
        expected.append(found | gradients(alone) | {"dresidual": alone.dresidual})
        left.append(shared.forward(x, residual=z))
    assert_same_bits(shared.state_dict(), alone.state_dict())
    for i in (1, 0, 2, 0):
        y, saved = left[i]
        found = {"y": y, "dx": shared.backward(calls[i][1], saved, dresidual=True)}
        found |= gradients(shared) | {"dresidual": shared.dresidual}
        assert_same_bits(found, expected[i])


@pytest.mark.parametrize("kind", ["training", "evaluation", "frozen statistics"])
def test_masks_and_weights_are_saved(kind: str) -> None:
    """A backward goes by those of its forward."""
    (x, dy, _), layer, like = batch(SHAPE), LAYERS[kind](), LAYERS[kind]()
    given: dict[str, Any] = {"where": np.array([[[True, False, True]]])}
    given["weights"] = np.arange(1.0, 7)
    y, saved = layer.forward(x, **given)
    assert_same_bits({"y": y}, {"y": like(x, **given)})
    layer.forward(2 * x)
    assert_same_bits({"dx": layer.backward(dy, saved)}, {"dx": like.backward(dy)})


@every_layer
def test_a_forward_leaves_the_last_call_alone(kind: str) -> None:
    """What an earlier call kept is what backward goes through."""
    (x, dy, _), layer = batch(SHAPE), LAYERS[kind](activation="relu")
    layer(x)
    expected = layer.backward(dy)
    layer.forward(3 * x)
    assert_same_bits({"dx": layer.backward(dy)}, {"dx": expected})


def test_a_saved_forward_is_of_then() -> None:
    """Whatever became of the layer's running statistics, mode and options; gamma is as it is."""
    (x, dy, _), bn = batch(SHAPE), batch_norm("evaluation", activation="relu", eps=1e-3)
    _, saved = bn.forward(x)
    expected = {"dx": bn.backward(dy, saved)}
    bn.train()
    bn.running_mean[...], bn.running_var[...], bn.eps, bn.activation = 7, 7, 1.0, None
    assert_same_bits({"dx": bn.backward(dy, saved)}, expected)
    bn.gamma *= 2
    assert_same_bits({"dx": bn.backward(dy, saved)}, {"dx": 2 * expected["dx"]})


def test_what_is_saved() -> None:
    """x and y themselves, and statistics; nothing of x or y that no backward reads."""
    (x, _, _), bn = batch(SHAPE), batch_norm(activation="relu")
    y, saved = bn.forward(x)
    assert isinstance(saved, fastbn.Saved)
    assert (saved.x is x, saved.y is y) == (True, True)
    statistics = {name: getattr(saved, name) for name in ("mean", "var")}
    assert_same_bits(statistics, fastbn.moments(x)._asdict())
    assert repr(saved) == f"Saved(BatchNorm, shape={SHAPE})"
    _, plain = batch_norm().forward(x)
    assert plain.y is None
    over = x.copy()
    _, overwritten = bn.forward(over, out=over)
    assert overwritten.x is None
    _, fixed = bn.eval().forward(x)
    assert_same_bits({"mean": fixed.mean}, {"mean": bn.running_mean})
    assert not np.shares_memory(fixed.mean, bn.running_mean)


@every_layer
def test_dx_written_over_x_ends_it(kind: str) -> None:
    """The first backward is as ever; a later one, which would take dx for x, is refused."""
    x, dy, _ = batch(SHAPE)
    like = LAYERS[kind]()
    like(x)
    expected = like.backward(dy)
    for keeps in (True, False):
        layer, over = LAYERS[kind](), x.copy()
        given: tuple[Any, ...] = (dy,)
        if keeps:
            layer(over)
        else:
            given = dy, layer.forward(over)[1]
        assert_same_bits({"dx": layer.backward(*given, out=over)}, {"dx": expected})
        with refused(layer, ValueError, "x has been written over, ... an earlier backward", over):
            layer.backward(*given)


def test_dx_written_over_x_where_x_is_not_read() -> None:
    """By fixed statistics, without dgamma and dbeta."""
    (x, dy, _), bn = batch(SHAPE), batch_norm("evaluation", frozen_affine=True)
    _, saved = bn.forward(x)
    expected = bn.backward(dy, saved)
    for _ in range(2):
        assert_same_bits({"dx": bn.backward(dy, saved, out=x)}, {"dx": expected})


@pytest.mark.parametrize("how", [copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))])
@every_layer
def test_copies(kind: str, how: Callable[[Any], Any]) -> None:
    """A copy of a layer is another one; what is copied with what its forward left fits it."""
    (x, dy, _), layer = batch(SHAPE), LAYERS[kind](activation="relu")
    _, saved = layer.forward(x)
    words = f"saved is {saved!r} of another layer, expected what ... a copy is another one"
    with refused(other := how(layer), ValueError, words):
        other.backward(dy, saved)
    other, of_other = how((layer, saved))
    assert_same_bits({"dx": other.backward(dy, of_other)}, {"dx": layer.backward(dy, saved)})
    assert_same_bits(other.state_dict(), layer.state_dict())


# ---- Kept by nobody ----


@every_layer
def test_a_call_that_is_not_kept(kind: str) -> None:
    """The same bits; the layer holds neither x nor y, nor those of an earlier call."""
    x, dy, _ = batch(SHAPE)
    layer, like = (LAYERS[kind](activation="relu") for _ in range(2))
    given, other = x.copy(), x.copy()
    layer(given)
    like(given)
    y = layer(other, keep=False)
    assert_same_bits({"y": y}, {"y": like(other)})
    assert_same_bits(layer.state_dict(), like.state_dict())
    references = [weakref.ref(a) for a in (given, other, y)]
    del given, other, y, like
    gc.collect()
    assert [reference() for reference in references] == [None] * 3
    with refused(layer, ValueError, "backward was called without saved, ... keep=False; call"):
        layer.backward(dy)
    layer(x)
    layer.backward(dy)


@every_layer
def test_a_forward_is_held_by_the_caller_alone(kind: str) -> None:
    """x is free once what the forward left is."""
    layer = LAYERS[kind](activation="relu")
    x = batch(SHAPE)[0].copy()
    y, saved = layer.forward(x)
    references = [weakref.ref(a) for a in (x, y, saved.mean)]
    del x, y, saved
    assert [reference() for reference in references] == [None] * 3


@every_layer
def test_a_call_that_fails_keeps_the_last_one(kind: str) -> None:
    """keep=False or not."""
    (x, dy, z), layer = batch(SHAPE), LAYERS[kind]()
    layer(x)
    dx = layer.backward(dy)
    for call in (layer, layer.forward):
        with refused(layer, ValueError, "residual has shape"):
            call(2 * x, residual=z[1:], **({"keep": False} if call is layer else {}))
    with refused(layer, TypeError, "keep is an int (1), expected True or False"):
        layer(x, keep=1)
    assert_same_bits({"dx": layer.backward(dy)}, {"dx": dx})


# ---- Gradients that are added up ----


@each_backend
@pytest.mark.parametrize("own", DTYPES)
@every_layer
def test_gradients_are_added(kind: str, own: Any) -> None:
    """To what the arrays hold, in their type, with one rounding; dx and dresidual are as ever."""
    (x, dy, z), layer = batch(SHAPE), LAYERS[kind](dtype=own, activation="relu")
    _, first = layer.forward(x)
    _, second = layer.forward(3 * x, residual=z)
    of_each = []
    for saved in (first, second):
        found = {"dx": layer.backward(dy, saved, dresidual=True), "dz": layer.dresidual}
        of_each.append((found, gradients(layer)))
    held = layer.dgamma, layer.dbeta
    expected = gradients(layer)
    for saved, (found, added) in zip((first, second), of_each, strict=True):
        got = layer.backward(dy, saved, dresidual=True, accumulate=True)
        assert_same_bits({"dx": got, "dz": layer.dresidual}, found)
        expected = {name: expected[name] + added[name] for name in added}
        assert_same_bits(gradients(layer), expected)
    assert (layer.dgamma is held[0], layer.dbeta is held[1]) == (True, True)


@every_layer
def test_gradients_of_the_last_call_are_added(kind: str) -> None:
    """Without saved, too; what is frozen or not there is left out."""
    (x, dy, _), layer = batch(SHAPE), LAYERS[kind]()
    layer(x)
    layer.backward(dy, accumulate=True)  # to the zeros of the beginning
    once = gradients(layer)
    layer.backward(dy, accumulate=True)
    assert_same_bits(gradients(layer), {name: 2 * a for name, a in once.items()})
    layer.beta = None
    layer.backward(dy, accumulate=True)
    np.testing.assert_allclose(layer.dgamma, 3 * once["dgamma"], rtol=2.0**-23)
    layer.frozen_affine = True
    layer.backward(dy, accumulate=True)
    assert (layer.dgamma, layer.dbeta) == (None, None)


@every_layer
def test_gradients_are_added_in_the_arrays_own_type(kind: str) -> None:
    """To arrays of another type than the parameters'."""
    (x, dy, _), layer = batch(SHAPE), LAYERS[kind]()
    layer(x)
    layer.backward(dy)
    expected = {name: 1 + a.astype(float) for name, a in gradients(layer).items()}
    layer.dgamma, layer.dbeta = np.ones((2, CHANNELS))
    layer.backward(dy, accumulate=True)
    assert_same_bits(gradients(layer), expected)


def test_gradients_beyond_the_layers_type() -> None:
    """They become infinite, and nothing warns."""
    (x, dy, _), bn = batch(SHAPE), batch_norm()
    bn(x)
    bn.dbeta[...] = np.finfo(np.float32).max
    bn.backward(np.full_like(dy, 1e38), accumulate=True)
    assert np.isinf(bn.dbeta).all()


# ---- From several threads ----


@pytest.mark.parametrize("kind", ["training", "evaluation", "frozen statistics", "LayerNorm"])
def test_forwards_from_several_threads(kind: str) -> None:
    """Of a layer that none of them changes, each gets its own."""
    x, dy, _ = batch(SHAPE)
    layer, like = (LAYERS[kind](activation="relu") for _ in range(2))
    given: dict[str, Any] = {"update": False} if kind == "training" else {}
    before = layer.state_dict()
    found: dict[int, list[tuple[Array, Any]]] = {}

    def work(i: int) -> None:
        found[i] = [layer.forward(np.float32(i) * x, **given) for _ in range(50)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert_same_bits(layer.state_dict(), before)
    for i, calls in found.items():
        expected = {"y": like(np.float32(i) * x), "dx": like.backward(dy)}
        for y, saved in calls:
            assert_same_bits({"y": y, "dx": layer.backward(dy, saved)}, expected)


# ---- What is refused ----


@every_layer
def test_what_was_not_saved_by_the_layer(kind: str) -> None:
    """Another layer's, what is none, a dy of another call, a flag that is none; state, gradients
    and what was saved stay."""
    (x, dy, _), layer, twin = batch(SHAPE), LAYERS[kind](), LAYERS[kind]()
    y, saved = layer.forward(x)
    expected = layer.backward(dy, saved, dresidual=True)
    name, other = type(twin).__name__, fastbn.InstanceNorm(CHANNELS)
    out, before = np.full_like(x, np.nan), layer.state_dict()
    for value, error, words in (
        (twin.forward(x)[1], ValueError, f"saved is Saved({name}, ... of another layer, expected"),
        (other.forward(x)[1], ValueError, "saved is Saved(InstanceNorm, ... of another layer"),
        ((y, saved), TypeError, "saved is a tuple ... expected a fastbn.Saved; pass ... = layer."),
        (y, TypeError, "saved is an ndarray, expected a fastbn.Saved; pass what forward gave"),
        (True, TypeError, "saved is a bool (True), expected a fastbn.Saved"),
    ):
        with refused(layer, error, words, out):
            layer.backward(dy, value, out=out)
    words = f"dy has shape {dy[1:].shape}, expected {SHAPE}, the shape of the x ... or the saved"
    with refused(layer, ValueError, words, out):
        layer.backward(dy[1:], saved, out=out)
    with refused(layer, TypeError, "dy has dtype float64, expected float32", out):
        layer.backward(dy.astype(float), saved, out=out)
    with refused(layer, TypeError, "accumulate is an int (1), expected True or False", out):
        layer.backward(dy, saved, accumulate=1, out=out)
    with refused(layer, ValueError, "backward was called without saved, and the layer keeps no"):
        layer.backward(dy)
    assert_same_bits(layer.state_dict(), before)
    assert_same_bits({"dx": layer.backward(dy, saved)}, {"dx": expected})
