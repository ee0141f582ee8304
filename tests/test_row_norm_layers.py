"""`RMSNorm` and `LayerNorm(axes="last")`: the verbs with parameters, a skip and a mask of rows;
what forwards leave, states, copies, and every bad argument; PyTorch's layers, number for number."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fastbn
from oracle.arrays import DTYPES, HALVES, Array
from oracle.bounds import unit
from support.bits import assert_same_bits
from support.layers import fails, refused
from support.variants import each_backend

CHANNELS = 6
SHAPE = (4, 3, CHANNELS)
KINDS: dict[str, dict[str, Any]] = {"RMSNorm": {}, "LayerNorm": {"axes": "last"}}
every_kind = pytest.mark.parametrize("kind", KINDS)
PARAMETERS = {"RMSNorm": ("gamma",), "LayerNorm": ("gamma", "beta")}


def made(kind: str, **options: Any) -> Any:
    """A layer whose parameters, as far as it has them, are neither 0 nor 1."""
    layer = getattr(fastbn, kind)(CHANNELS, **KINDS[kind], **options)
    rng = np.random.default_rng(0)
    state = layer.state_dict()
    layer.load_state_dict({name: 2 + rng.exponential(size=a.shape) for name, a in state.items()})
    return layer


def batch(shape: tuple[int, ...] = SHAPE, dtype: Any = np.float32) -> list[Array]:
    """x, dy, a skip and a dsum."""
    values = np.random.default_rng(len(shape)).normal(1, 2, (4, *shape))
    return [a.astype(dtype) for a in values]


def mask(shape: tuple[int, ...] = SHAPE) -> Array:
    return np.random.default_rng(5).random((*shape[:-1], 1)) < 0.6


def of_verbs(
    kind: str, layer: Any, x: Array, dy: Array, dsum: Array | None = None, **given: Any
) -> dict[str, Any]:
    """What the verbs make of the layer's parameters."""
    gamma = np.ones(CHANNELS, "f4") if layer.gamma is None else layer.gamma
    where = given.get("where")
    if kind == "RMSNorm":
        found: Any = fastbn.rms_norm(x, layer.gamma, eps=layer.eps, **given)
        read = getattr(found, "sum", x)
        back: Any = {"eps": layer.eps, "dsum": dsum, "where": where}
        gradients: Any = fastbn.rms_norm_backward(dy, read, found.mean_square, gamma, **back)
    else:
        options: Any = {"eps": layer.eps, "activation": layer.activation, "axes": "last"}
        found = fastbn.layer_norm(x, layer.gamma, layer.beta, **options, **given)
        read = getattr(found, "sum", x)
        options |= {"y": found.y, "dsum": dsum, "where": where}
        gradients = fastbn.layer_norm_backward(dy, read, found.mean, found.var, gamma, **options)
    sums = {"sum": found.sum} if "skip" in given else {}
    return {"y": found.y, **sums, **gradients._asdict()}


def gradients_of(layer: Any) -> dict[str, Array]:
    """Copies of those that there are."""
    named = {f"d{name}": getattr(layer, f"d{name}", None) for name in ("gamma", "beta")}
    return {name: a.copy() for name, a in named.items() if a is not None}


def of_layer(
    layer: Any, x: Array, dy: Array, dsum: Array | None = None, **given: Any
) -> dict[str, Any]:
    """What a call and a backward give, and leave in the layer."""
    found = layer(x, **given)
    outcome = {"y": found[0], "sum": found[1]} if "skip" in given else {"y": found}
    return outcome | {"dx": layer.backward(dy, dsum=dsum)} | gradients_of(layer)


@each_backend
@every_kind
def test_calls_have_the_bits_of_the_verbs(kind: str) -> None:
    """With a skip, a mask and dsum, or without, of any type and rank; in evaluation as in
    training."""
    for dtype in (*DTYPES, *HALVES):
        for shape in ((7, CHANNELS), SHAPE, (2, 3, 4, CHANNELS)):
            x, dy, skip, dsum = batch(shape, dtype)
            layer = made(kind, eps=1e-3)
            for given in ({}, {"skip": skip}, {"where": mask(shape), "skip": skip}):
                for added in (None, dsum):
                    expected = of_verbs(kind, layer, x, dy, added, **given)
                    for mode in (layer.train, layer.eval):
                        assert_same_bits(of_layer(mode(), x, dy, added, **given), expected)


@each_backend
def test_layer_norm_of_rows_fuses_all_else() -> None:
    """A residual, an activation and dresidual, whatever `layout` says."""
    x, dy, skip, z = batch()
    given: dict[str, Any] = {"skip": skip, "residual": z, "where": mask()}
    layer = made("LayerNorm", activation="relu", layout="NHWC")
    y, total = layer(x, **given)
    dx = layer.backward(dy, dresidual=True)
    options: Any = {"activation": "relu", "axes": "last"}
    found: Any = fastbn.layer_norm(x, layer.gamma, layer.beta, **given, **options)
    options |= {"y": found.y, "dresidual": True, "where": mask()}
    back: Any = fastbn.layer_norm_backward(
        dy, found.sum, found.mean, found.var, layer.gamma, **options
    )
    got = {"y": y, "sum": total, "dx": dx, "dresidual": layer.dresidual, **gradients_of(layer)}
    assert_same_bits(got, {"y": found.y, "sum": found.sum, **back._asdict()})


@each_backend
@every_kind
def test_results_go_where_they_are_asked_for(kind: str) -> None:
    """After out=x there is a backward where a skip was added, since x is not read."""
    x, dy, skip, dsum = batch()
    layer = made(kind)
    expected = of_layer(copy.deepcopy(layer), x, dy, dsum, skip=skip)
    over, into = x.copy(), np.empty_like(x)
    y, total = layer(over, skip=skip, out=over)
    assert y is over
    assert layer.backward(dy, dsum=dsum, out=into) is into
    assert_same_bits({"y": y, "sum": total, "dx": into, **gradients_of(layer)}, expected)
    assert_same_bits({"dx": layer.backward(dy, dsum=dsum, out=total)}, {"dx": into})
    with refused(layer, ValueError, "x has been written over, ... an earlier backward"):
        layer.backward(dy)
    layer(over, out=over)
    with refused(layer, ValueError, "x has been written over, by the layer's call"):
        layer.backward(dy)


@each_backend
@every_kind
def test_several_calls_before_their_backwards(kind: str) -> None:
    """Each has the bits of a call and its backward alone, in whichever order they go back; the
    layer's own last call stays."""
    alone, shared = made(kind), made(kind)
    calls = [batch(shape) for shape in (SHAPE, (3, CHANNELS), (2, 2, 2, CHANNELS))]
    given: list[dict[str, Any]] = [
        {"skip": calls[0][2], "where": mask()},
        {},
        {"skip": calls[2][2]},
    ]
    expected = [of_layer(alone, c[0], c[1], c[3], **g) for c, g in zip(calls, given, strict=True)]
    shared(calls[1][0])
    left = [shared.forward(c[0], **g) for c, g in zip(calls, given, strict=True)]
    for i in (1, 0, 2, 0):
        y, *total, saved = left[i]
        _, dy, _, dsum = calls[i]
        found = {"y": y, "dx": shared.backward(dy, saved, dsum=dsum), **gradients_of(shared)}
        sums = {"sum": total[0]} if total else {}
        assert_same_bits(found | sums, expected[i])
        assert saved.x is (total[0] if total else calls[i][0])
    dx = shared.backward(calls[1][1], dsum=calls[1][3])
    assert_same_bits({"dx": dx}, {"dx": expected[1]["dx"]})


@every_kind
def test_gradients_are_added(kind: str) -> None:
    """To what the arrays hold; dx is as ever."""
    (x, dy, skip, dsum), layer = batch(), made(kind)
    _, _, saved = layer.forward(x, skip=skip)
    dx = layer.backward(dy, saved, dsum=dsum)
    once = gradients_of(layer)
    again = layer.backward(dy, saved, dsum=dsum, accumulate=True)
    assert_same_bits({"dx": again}, {"dx": dx})
    assert_same_bits(gradients_of(layer), {name: 2 * a for name, a in once.items()})
    with refused(layer, TypeError, "accumulate is an int (1), expected True or False"):
        layer.backward(dy, saved, accumulate=1)


@every_kind
def test_a_call_that_is_not_kept(kind: str) -> None:
    """The layer holds nothing of it, nor of an earlier call, of which it held the sum."""
    (x, dy, skip, _), layer = batch(), made(kind)
    _, total = layer(x, skip=skip)
    assert layer._last.x is total
    other, beside = x.copy(), skip.copy()
    y, total = layer(other, skip=beside, keep=False)
    references = [weakref.ref(a) for a in (other, beside, y, total)]
    del other, beside, y, total
    gc.collect()
    assert [reference() for reference in references] == [None] * 4
    with refused(layer, ValueError, "backward was called without saved, ... keep=False; call"):
        layer.backward(dy)
    with refused(layer, TypeError, "keep is an int (1), expected True or False"):
        layer(x, keep=1)


@every_kind
def test_each_part_may_be_missing_or_frozen(kind: str) -> None:
    """What is not there is None, has no gradient and no name; other bits are the same."""
    x, dy, skip, dsum = batch()
    bare = made(kind, scale=False)
    assert (bare.gamma, bare.dgamma) == (None, None)
    assert list(bare.state_dict()) == (["bias"] if kind == "LayerNorm" else [])
    expected = of_verbs(kind, bare, x, dy, dsum, skip=skip)
    del expected["dgamma"]
    expected = {name: a for name, a in expected.items() if a is not None}
    assert_same_bits(of_layer(bare, x, dy, dsum, skip=skip), expected)
    layer = made(kind)
    expected, held = of_layer(layer, x, dy, dsum, skip=skip), layer.dgamma
    assert held.any()
    layer.frozen_affine = True
    assert not held.any()
    assert layer.dgamma is None
    got = of_layer(layer, x, dy, dsum, skip=skip)
    assert_same_bits(got, {name: expected[name] for name in ("y", "sum", "dx")})
    layer.frozen_affine = False
    layer.backward(dy)
    assert layer.dgamma is held


@pytest.mark.parametrize("own", DTYPES)
@every_kind
def test_a_layers_type_is_its_own(kind: str, own: Any) -> None:
    """Whatever the arrays are; the parameters' gradients are of it too."""
    for dtype in (*DTYPES, *HALVES):
        (x, dy, skip, dsum), layer = batch(dtype=dtype), made(kind, dtype=own)
        expected = of_verbs(kind, layer, x, dy, dsum, skip=skip)
        assert_same_bits(of_layer(layer, x, dy, dsum, skip=skip), expected)
        assert {a.dtype for a in gradients_of(layer).values()} == {np.dtype(own)}


@every_kind
def test_parameters_and_gradients_stay_the_same_objects(kind: str) -> None:
    """A step, a backward and a loaded state write them in place."""
    (x, dy, skip, dsum), layer = batch(), made(kind)
    pairs = [(getattr(layer, n), getattr(layer, f"d{n}")) for n in PARAMETERS[kind]]
    layer(x)
    layer.backward(dy)
    for parameter, gradient in pairs:
        assert gradient.any()
        parameter -= 0.25 * gradient
    expected = of_verbs(kind, layer, x, dy, dsum, skip=skip)
    assert_same_bits(of_layer(layer, x, dy, dsum, skip=skip), expected)
    layer.load_state_dict({name: np.full(CHANNELS, 3.0) for name in layer.state_dict()})
    assert all((parameter == 3).all() for parameter, _ in pairs)
    buffer = np.full(CHANNELS, 7.0)
    layer.dgamma = buffer
    layer.backward(dy, dsum=dsum)
    assert layer.dgamma is buffer
    assert (buffer != 7).all()


@pytest.mark.parametrize("how", [copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))])
@every_kind
def test_copies_and_pickles(kind: str, how: Callable[[Any], Any]) -> None:
    """They have equal arrays and flags, and no last call; what is copied with what its forward left
    fits it."""
    (x, dy, skip, dsum), layer = batch(), made(kind, eps=0.5).eval()
    _, _, saved = layer.forward(x, skip=skip)
    other = how(layer)
    assert (repr(other), other.training) == (repr(layer), False)
    with refused(other, ValueError, f"saved is {saved!r} of another layer, expected what"):
        other.backward(dy, saved)
    other, of_other = how((layer, saved))
    assert_same_bits(
        {"dx": other.backward(dy, of_other, dsum=dsum)},
        {"dx": layer.backward(dy, saved, dsum=dsum)},
    )
    assert_same_bits(other.state_dict(), layer.state_dict())
    before = layer.state_dict()
    other.gamma[...] = 7
    assert_same_bits(layer.state_dict(), before)


@every_kind
def test_what_there_is_of_it(kind: str) -> None:
    """Modes, which change nothing; attributes, which can be set to what they are; a repr that makes
    such a layer."""
    layer = made(kind, eps=0.5, scale=False, frozen_affine=True, dtype=np.float64)
    options = {"RMSNorm": "", "LayerNorm": "axes='last', "}[kind]
    words = f"{kind}(6, eps=0.5, scale=False, frozen_affine=True, {options}dtype='float64')"
    assert repr(layer) == words
    assert repr(eval(words, {kind: getattr(fastbn, kind)})) == words
    assert layer.eval() is layer
    assert not layer.training
    layer = made(kind)
    for name in {name for name in (*vars(layer), *dir(layer)) if not name.startswith("_")}:
        setattr(layer, name, getattr(layer, name))
    with refused(layer, AttributeError, f"{kind} has no attribute 'frozen', ... 'frozen_"):
        layer.frozen = True
    with refused(layer, TypeError, "mode is an int (1), expected True or False"):
        layer.train(1)


def test_rms_norm_has_a_scale_alone() -> None:
    """What would have no effect is no attribute."""
    layer = made("RMSNorm")
    for name in ("beta", "bias", "dbeta", "layout", "activation", "dresidual", "axes"):
        with refused(layer, AttributeError, f"RMSNorm has no attribute {name!r}"):
            setattr(layer, name, None)
    with fails(TypeError, "RMSNorm.__call__() got an unexpected keyword argument 'residual'"):
        layer(batch()[0], residual=batch()[2])


# ---- What is refused ----

OPTIONS: list[tuple[str, Any, type[Exception], str]] = [
    ("channels", 0, ValueError, "channels is 0, expected one or more"),
    ("eps", -1e-5, ValueError, "eps is -1e-05, expected a finite number, zero or more"),
    ("scale", 1, TypeError, "scale is an int (1), expected True or False"),
    ("frozen_affine", 1, TypeError, "frozen_affine is an int (1), expected True or False"),
    ("dtype", "float16", TypeError, "dtype is 'float16', expected 'float32' or 'float64'"),
]


@pytest.mark.parametrize(("name", "value", "error", "words"), OPTIONS)
@every_kind
def test_bad_option(kind: str, name: str, value: Any, error: type[Exception], words: str) -> None:
    """No layer is made."""
    with fails(error, words):
        getattr(fastbn, kind)(**{"channels": CHANNELS, name: value} | KINDS[kind])


@pytest.mark.parametrize("value", ["rows", -1, None])
def test_bad_axes(value: Any) -> None:
    """As the layer is made, and where they are set later."""
    error = ValueError if isinstance(value, str) else TypeError
    words = f"axes is {value!r}, expected one of 'sample', 'last'"
    with fails(error, words):
        fastbn.LayerNorm(CHANNELS, axes=value)
    layer = fastbn.LayerNorm(CHANNELS)
    layer.axes = value
    with refused(layer, error, words):
        layer(np.ones((2, CHANNELS)))


CALLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "channels": (
        {"x": np.ones((4, CHANNELS, 3), np.float32)},
        ValueError,
        "x has rows of 3 values (the last axis of shape (4, 6, 3)), expected 6, as the {kind} has "
        "channels; pass another array, or move the axis of the channels to the end",
    ),
    "rank": ({"x": np.ones(CHANNELS, np.float32)}, ValueError, "x has rank 1 ... 2 or more"),
    "list": ({"x": [[1.0]]}, TypeError, "x is a list ([[1.0]]), expected a numpy.ndarray"),
    "skip": (
        {"skip": np.ones((4, CHANNELS), np.float32)},
        ValueError,
        f"skip has shape (4, 6), expected {SHAPE}, the shape of x",
    ),
    "skip's type": (
        {"skip": np.ones(SHAPE)},
        TypeError,
        "skip has dtype float64, expected float32",
    ),
    "where": (
        {"where": np.ones(SHAPE, bool)},
        ValueError,
        "where has shape (4, 3, 6), expected (4, 3, 1)",
    ),
    "out": ({"out": np.ones(SHAPE)}, TypeError, "out has dtype float64, expected float32"),
}


@pytest.mark.parametrize("name", CALLS)
@every_kind
def test_bad_call(kind: str, name: str) -> None:
    """Nothing is written, and the backward is that of the call before."""
    changed, error, words = CALLS[name]
    (x, dy, skip, _), layer = batch(), made(kind)
    layer(x, skip=skip)
    dx = layer.backward(dy)
    given = {"x": x, "skip": skip, "out": np.full_like(x, 7)} | changed
    arrays = [a for a in given.values() if isinstance(a, np.ndarray)]
    for call in (layer, layer.forward):
        with refused(layer, error, words.format(kind=kind), *arrays):
            call(**given)
    assert_same_bits({"dx": layer.backward(dy)}, {"dx": dx})


@every_kind
def test_bad_backward(kind: str) -> None:
    """Of another shape or type, into what is no result; of another layer."""
    (x, dy, skip, dsum), layer = batch(), made(kind)
    with refused(layer, ValueError, "backward was called without saved, and"):
        layer.backward(dy)
    layer(x, skip=skip)
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"dy": dy[:1]}, ValueError, f"dy has shape {dy[:1].shape}, expected {SHAPE}"),
        ({"dy": dy.astype(float)}, TypeError, "dy has dtype float64, expected float32"),
        ({"dsum": dsum[:1]}, ValueError, f"dsum has shape {dsum[:1].shape}, expected {SHAPE}"),
        ({"dsum": dsum.tolist()}, TypeError, "dsum is a list"),
        ({"dsum": dsum, "out": dsum}, ValueError, "out overlaps dsum"),
        ({"saved": made(kind).forward(x)[1]}, ValueError, "saved is Saved("),
        ({"saved": layer.forward(x)}, TypeError, "saved is a tuple"),
    ]
    for changed, error, words in cases:
        with refused(layer, error, words, x, dy, dsum):
            layer.backward(**{"dy": dy} | changed)


def test_dsum_goes_with_rows_alone() -> None:
    """A layer norm of samples refuses what is of rows, and layers of others do not know it; beside
    an activation there is no dsum."""
    x, dy, skip, dsum = batch()
    layer: Any = fastbn.LayerNorm(SHAPE[1])
    layer(x)
    with refused(layer, ValueError, "dsum is given and axes is 'sample', expected axes='last'"):
        layer.backward(dy, dsum=dsum)
    with refused(layer, ValueError, "skip is given and axes is 'sample', expected axes='last'"):
        layer(x, skip=skip)
    group: Any = fastbn.GroupNorm(1, SHAPE[1])
    group(x)
    with fails(TypeError, "AffineLayer.backward() got an unexpected keyword argument 'dsum'"):
        group.backward(dy, dsum=dsum)
    fused = made("LayerNorm", activation="relu")
    fused(x)
    with refused(fused, ValueError, "dsum and activation are given, expected one of them"):
        fused.backward(dy, dsum=dsum)


ONES = np.ones(CHANNELS)
STATES: dict[str, tuple[dict[str, Any], str]] = {
    "of layer norm": (
        {"weight": ONES, "bias": ONES},
        "state has not the layer's names, expected 'weight'; not known are 'bias'; make the layer "
        "with the scale of the one that was saved",
    ),
    "nothing": ({}, "state has not the layer's names, expected 'weight'; missing are 'weight'"),
    "elementwise": (
        {"weight": np.ones((3, CHANNELS))},
        "state['weight'] has shape (3, 6), expected (6,): parameters are of channels, not of "
        "elements; make the RMSNorm with scale=False, and apply them yourself",
    ),
    "running statistics": (
        {"weight": ONES, "running_var": ONES},
        "state has 'running_var', expected parameters alone: a RMSNorm goes by x's own statistics",
    ),
}


@pytest.mark.parametrize("name", STATES)
def test_bad_state(name: str) -> None:
    """Nothing is changed."""
    state, words = STATES[name]
    layer = made("RMSNorm")
    with refused(layer, ValueError, words):
        layer.load_state_dict(state)


# ---- PyTorch ----


@pytest.mark.parametrize("rank", [2, 3, 4])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@every_kind
def test_pytorch_number_for_number(torch: Any, kind: str, dtype: str, rank: int) -> None:
    """y, the stream's gradient and the parameters' of its layers, from their state; PyTorch takes
    ours strictly."""
    torch.manual_seed(rank)
    theirs = getattr(torch.nn, kind)(CHANNELS, eps=1e-5, dtype=getattr(torch, dtype))
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)
    ours = made(kind, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    state = {name: np.asarray(a) for name, a in theirs.state_dict().items()}
    assert_same_bits(ours.state_dict(), state)
    theirs.load_state_dict({n: torch.from_numpy(a) for n, a in ours.state_dict().items()})
    x, dy, skip, dsum = batch((5, 7, 4, CHANNELS)[4 - rank :], dtype=dtype)
    leaf = torch.tensor(x, requires_grad=True)
    total = leaf + torch.tensor(skip)
    expected = theirs(total)
    torch.autograd.backward([expected, total], [torch.tensor(dy), torch.tensor(dsum)])
    y, stream = ours(x, skip=skip)
    assert_same_bits({"sum": stream}, {"sum": total.detach().numpy()})
    pairs = {"y": (y, expected.detach()), "dx": (ours.backward(dy, dsum=dsum), leaf.grad)}
    pairs["dgamma"] = ours.dgamma, theirs.weight.grad
    if kind == "LayerNorm":
        pairs["dbeta"] = ours.dbeta, theirs.bias.grad
    roundings = 2 * x.size + 8  # of two sums over all values, and a few products
    for name, (a, tensor) in pairs.items():
        b = np.asarray(tensor)
        assert (a.shape, a.dtype) == (b.shape, b.dtype), name
        off = np.abs(a.astype(np.longdouble) - b).max()
        assert off <= (1e-10 + roundings * unit(dtype)) * max(1, np.abs(b).max()), name
