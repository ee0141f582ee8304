"""`GroupNorm`, `InstanceNorm` and `LayerNorm`: the verbs with parameters; their state, copies, and
every bad argument; PyTorch's layers, number for number."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fastbn
from oracle.arrays import DTYPES, HALVES, LAYOUTS, Array, to_layout
from oracle.bounds import unit
from oracle.formulas import ACTIVATIONS
from support.bits import assert_same_bits
from support.layers import fails, refused
from support.sample_norms import Norm
from support.variants import each_backend

CHANNELS = 6
KINDS: dict[str, Norm] = {"GroupNorm": Norm(3), "InstanceNorm": Norm("instance")}
KINDS["LayerNorm"] = Norm("layer")
every_kind = pytest.mark.parametrize("kind", KINDS)


def made(kind: str, **options: Any) -> Any:
    """A layer whose parameters, as far as it has them, are neither 0 nor 1."""
    sizes = (3, CHANNELS) if kind == "GroupNorm" else (CHANNELS,)
    layer = getattr(fastbn, kind)(*sizes, **options)
    rng = np.random.default_rng(0)
    state = layer.state_dict()
    layer.load_state_dict({name: 2 + rng.exponential(size=a.shape) for name, a in state.items()})
    return layer


def batch(shape: tuple[int, ...], layout: str = "NCHW", dtype: Any = np.float32) -> list[Array]:
    """x, dy and a residual of an NCHW shape."""
    values = np.random.default_rng(len(shape)).normal(1, 2, (3, *shape))
    return [to_layout(a, layout).astype(dtype) for a in values]


SHAPE = (4, CHANNELS, 3, 3)


def of_verbs(kind: str, layer: Any, x: Array, dy: Array, residual: Array | None) -> dict[str, Any]:
    """What the verbs make of the layer's parameters."""
    options = {"eps": layer.eps, "layout": layer.layout, "activation": layer.activation}
    norm = KINDS[kind]
    y, mean, var = norm.forward(x, gamma=layer.gamma, beta=layer.beta, residual=residual, **options)
    gate = None if layer.activation is None else y
    gamma = np.ones(CHANNELS, "f4") if layer.gamma is None else layer.gamma
    given = dy, x, mean, var
    found = norm.backward(*given, gamma=gamma, y=gate, dresidual=True, **options)
    return {"y": y, **found._asdict()}


def of_layer(layer: Any, x: Array, dy: Array, residual: Array | None) -> dict[str, Any]:
    """What a forward and a backward give, and leave in the layer."""
    found = {"y": layer(x, residual=residual), "dx": layer.backward(dy, dresidual=True)}
    return found | {name: getattr(layer, name) for name in ("dgamma", "dbeta", "dresidual")}


@each_backend
@pytest.mark.parametrize("layout", LAYOUTS)
@every_kind
def test_calls_have_the_bits_of_the_verbs(kind: str, layout: str) -> None:
    """Forward and backward, with any activation, with a residual and without, of any type; in
    evaluation as in training."""
    for dtype in (*DTYPES, *HALVES):
        for shape in ((7, CHANNELS), (4, CHANNELS, 6), (3, CHANNELS, 4, 4)):
            x, dy, z = batch(shape, layout, dtype)
            for activation in ACTIVATIONS:
                layer = made(kind, layout=layout, activation=activation, eps=1e-3)
                for residual in (None, z):
                    expected = of_verbs(kind, layer, x, dy, residual)
                    for mode in (layer.train, layer.eval):
                        assert_same_bits(of_layer(mode(), x, dy, residual), expected)


@each_backend
@every_kind
def test_results_go_where_they_are_asked_for(kind: str) -> None:
    """out and dresidual are what is returned and left; after out=x there is no backward."""
    x, dy, z = batch(SHAPE)
    layer = made(kind, activation="relu")
    expected = of_layer(copy.deepcopy(layer), x, dy, z)
    y, dx, dresidual = (np.empty_like(x) for _ in range(3))
    assert layer(x, residual=z, out=y) is y
    assert layer.backward(dy, dresidual=dresidual, out=dx) is dx
    assert layer.dresidual is dresidual
    for name, got in (("y", y), ("dx", dx), ("dresidual", dresidual)):
        assert_same_bits({name: got}, {name: expected[name]})
    assert_same_bits({"dx": layer.backward(dy)}, {"dx": dx})
    assert layer.dresidual is None
    overwritten = x.copy()
    assert_same_bits({"y": layer(overwritten, residual=z, out=overwritten)}, {"y": y})
    with refused(layer, ValueError, "x has been written over, by the layer's call"):
        layer.backward(dy)


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("scale", [True, False])
@every_kind
def test_each_part_may_be_missing(kind: str, scale: bool, shift: bool) -> None:
    """What is not there is None, has no gradient and no name."""
    layer = made(kind, scale=scale, shift=shift)
    x, dy, z = batch(SHAPE)
    has = {"gamma": scale, "beta": shift}
    assert {name: getattr(layer, name) is not None for name in has} == has
    names = [n for n, there in zip(("weight", "bias"), has.values(), strict=True) if there]
    assert list(layer.state_dict()) == names
    expected, got = of_verbs(kind, layer, x, dy, z), of_layer(layer, x, dy, z)
    for name in has:
        if not has[name]:
            assert got.pop(f"d{name}") is None
            del expected[f"d{name}"]
    assert_same_bits(got, expected)


@pytest.mark.parametrize("own", DTYPES)
@every_kind
def test_a_layers_type_is_its_own(kind: str, own: Any) -> None:
    """Whatever the arrays are; the parameters' gradients are of it too."""
    for dtype in (*DTYPES, *HALVES):
        x, dy, z = batch(SHAPE, dtype=dtype)
        layer = made(kind, dtype=own)
        assert_same_bits(of_layer(layer, x, dy, z), of_verbs(kind, layer, x, dy, z))
        assert layer.dgamma.dtype == layer.dbeta.dtype == own
        bare = made(kind, dtype=own, scale=False)
        of_layer(bare, x, dy, z)
        assert bare.dbeta.dtype == own


@every_kind
def test_a_frozen_affine_part(kind: str) -> None:
    """It has no gradients, not even those of an earlier backward; all other bits are the same."""
    x, dy, z = batch(SHAPE)
    layer = made(kind, activation="relu")
    expected = of_layer(layer, x, dy, z)
    layer.frozen_affine = True
    got = of_layer(layer.eval().train(), x, dy, z)
    for name in ("dgamma", "dbeta"):
        assert expected.pop(name) is not None
        assert got.pop(name) is None
    assert_same_bits(got, expected)


@every_kind
def test_modes_change_nothing(kind: str) -> None:
    """train and eval give the layer, and set the flag alone."""
    layer = made(kind)
    for call, training in (
        (layer.eval, False),
        (layer.train, True),
        (lambda: layer.train(False), False),
    ):
        before = {name: id(value) for name, value in vars(layer).items() if name != "_training"}
        assert call() is layer
        assert layer.training is training
        assert before == {n: id(value) for n, value in vars(layer).items() if n != "_training"}
    with refused(layer, TypeError, "mode is an int (1), expected True or False"):
        layer.train(1)


@every_kind
def test_backward_goes_by_its_forward(kind: str) -> None:
    """By the last call's statistics, and again."""
    x, dy, z = batch(SHAPE)
    layer = made(kind, activation="relu6")
    expected = of_verbs(kind, layer, x, dy, z)
    layer(x[:2])
    layer(x, residual=z)
    for _ in range(2):
        assert_same_bits({"dx": layer.backward(dy)}, {"dx": expected["dx"]})
        assert_same_bits({"dgamma": layer.dgamma}, {"dgamma": expected["dgamma"]})


@every_kind
def test_parameters_stay_the_same_objects(kind: str) -> None:
    """A step and a loaded state write them in place; the next call goes by what they hold."""
    x, dy, z = batch(SHAPE)
    layer = made(kind)
    gamma, beta = layer.gamma, layer.beta
    layer(x)
    layer.backward(dy)
    gamma -= 0.25 * layer.dgamma
    beta -= 0.25 * layer.dbeta
    assert_same_bits(of_layer(layer, x, dy, z), of_verbs(kind, layer, x, dy, z))
    before = layer.state_dict()
    layer.load_state_dict({"weight": beta, "bias": gamma})
    assert_same_bits(layer.state_dict(), {"weight": before["bias"], "bias": before["weight"]})
    assert (layer.gamma is gamma, layer.beta is beta) == (True, True)
    for a in layer.state_dict().values():
        a[...] = 7
    assert not (gamma == 7).any()


COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
}


@pytest.mark.parametrize("how", COPIES)
@every_kind
def test_copies_and_pickles(kind: str, how: str) -> None:
    """They have equal arrays, flags and gradients of their own, and no last call."""
    x, dy, z = batch(SHAPE)
    layer = made(kind, activation="relu", layout="NCHW").eval()
    layer.frozen_affine = True
    expected = of_layer(layer, x, dy, z)
    other = COPIES[how](layer)
    assert repr(other) == repr(layer)
    assert (other.training, other.frozen_affine) == (False, True)
    assert_same_bits({"dz": other.dresidual}, {"dz": layer.dresidual})
    with fails(ValueError, "backward was called without saved, and"):
        other.backward(dy)
    assert_same_bits({"y": other(x, residual=z)}, {"y": expected["y"]})
    state = layer.state_dict()
    other.gamma[...] = 7
    assert_same_bits(layer.state_dict(), state)
    layer.backward(dy)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, ""),
        ({"eps": 1e-5, "dtype": np.float32}, ""),
        ({"eps": np.float32(0.5), "dtype": np.float64}, ", eps=0.5, dtype='float64'"),
        ({"scale": False, "shift": False}, ", scale=False, shift=False"),
        ({"frozen_affine": np.True_}, ", frozen_affine=True"),
        (
            {"layout": np.str_("NHWC"), "activation": ("leaky_relu", np.float64(0.5))},
            ", layout='NHWC', activation=('leaky_relu', 0.5)",
        ),
    ],
)
@every_kind
def test_repr(kind: str, options: dict[str, Any], words: str) -> None:
    """It makes such a layer, and says what is not the default."""
    layer = made(kind, **options)
    sizes = f"3, {CHANNELS}" if kind == "GroupNorm" else f"{CHANNELS}"
    assert repr(layer) == f"{kind}({sizes}{words})"
    assert repr(eval(repr(layer), {kind: getattr(fastbn, kind)})) == repr(layer)


# ---- What is refused ----

OPTIONS: list[tuple[str, Any, type[Exception], str]] = [
    ("channels", 0, ValueError, "channels is 0, expected one or more"),
    ("channels", 6.0, TypeError, "channels is a float (6.0), expected a whole number"),
    ("channels", True, TypeError, "channels is a bool (True), expected a whole number"),
    ("eps", -1e-5, ValueError, "eps is -1e-05, expected a finite number, zero or more"),
    ("scale", 1, TypeError, "scale is an int (1), expected True or False"),
    ("shift", None, TypeError, "shift is a NoneType (None), expected True or False"),
    ("frozen_affine", 1, TypeError, "frozen_affine is an int (1), expected True or False"),
    ("layout", "nchw", ValueError, "layout is 'nchw', expected 'NCHW' ... or 'NHWC'"),
    ("activation", "gelu", ValueError, "activation is 'gelu', expected None, 'relu'"),
    ("dtype", "float16", TypeError, "dtype is 'float16', expected 'float32' or 'float64'"),
]


@pytest.mark.parametrize(("name", "value", "error", "words"), OPTIONS)
@every_kind
def test_bad_option(kind: str, name: str, value: Any, error: type[Exception], words: str) -> None:
    """No layer is made."""
    given = {"channels": CHANNELS} | ({"groups": 3} if kind == "GroupNorm" else {}) | {name: value}
    with fails(error, words):
        getattr(fastbn, kind)(**given)


def test_groups_that_do_not_fit() -> None:
    """Groups come before channels, as in PyTorch."""
    with fails(ValueError, "groups is 6, expected a divisor of 3, the number of channels"):
        fastbn.GroupNorm(6, 3)


CALLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "channels": (
        {"x": np.ones((4, 3, CHANNELS), np.float32)},
        ValueError,
        "x has 3 channels ... expected 6, as the {kind} has; make the {kind} with layout='NHWC'",
    ),
    "rank": ({"x": np.ones(CHANNELS, np.float32)}, ValueError, "x has rank 1 ... 2 or more"),
    "list": ({"x": [[1.0]]}, TypeError, "x is a list ([[1.0]]), expected a numpy.ndarray"),
    "residual": (
        {"residual": np.ones((4, CHANNELS), np.float32)},
        ValueError,
        f"residual has shape (4, 6), expected {SHAPE}, the shape of x",
    ),
    "out": ({"out": np.ones(SHAPE)}, TypeError, "out has dtype float64, expected float32"),
}


@pytest.mark.parametrize("name", CALLS)
@every_kind
def test_bad_call(kind: str, name: str) -> None:
    """Nothing is written, and the backward is that of the call before."""
    changed, error, words = CALLS[name]
    x, dy, _ = batch(SHAPE)
    layer = made(kind, activation="relu")
    layer(x)
    dx = layer.backward(dy)
    given = {"x": x, "residual": x, "out": np.full_like(x, 7)} | changed
    arrays = [a for a in given.values() if isinstance(a, np.ndarray)]
    with refused(layer, error, words.format(kind=kind), *arrays):
        layer(**given)
    assert_same_bits({"dx": layer.backward(dy)}, {"dx": dx})


@every_kind
def test_bad_backward(kind: str) -> None:
    """Before a forward, of another shape or type, into what is no result."""
    x, dy, _ = batch(SHAPE)
    layer = made(kind)
    with refused(layer, ValueError, "backward was called without saved, and"):
        layer.backward(dy)
    layer(x)
    layer.backward(dy)
    for given, options, error, words in (
        (dy[:1], {}, ValueError, f"dy has shape {dy[:1].shape}, expected {SHAPE}"),
        (dy.astype(float), {}, TypeError, "dy has dtype float64, expected float32"),
        (dy.tolist(), {}, TypeError, "dy is a list"),
        (dy, {"out": x[:1]}, ValueError, "out has shape"),
        (dy, {"dresidual": 1}, TypeError, "dresidual is an int (1)"),
    ):
        with refused(layer, error, words, x, dy):
            layer.backward(given, **options)
    layer.gamma = layer.gamma[1:]
    with refused(layer, ValueError, "gamma has shape (5,) but x has 6 channels"):
        layer.backward(dy)


ONES = np.ones(CHANNELS)
STATES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "running statistics": (
        {"running_mean": ONES, "running_var": ONES, "num_batches_tracked": 3},
        ValueError,
        "state has 'running_mean' and 'running_var', expected parameters alone: a {kind} goes by "
        "x's own statistics, in evaluation too; leave out what runs",
    ),
    "elementwise": (
        {"weight": np.ones((CHANNELS, 3, 3)), "bias": np.ones((CHANNELS, 3, 3))},
        ValueError,
        "state['weight'] has shape (6, 3, 3), expected (6,): parameters are of channels, not "
        "of elements; make the {kind} with scale=False and shift=False",
    ),
    "channels": (
        {"bias": np.ones(5)},
        ValueError,
        "state['bias'] has shape (5,), expected (6,), as the layer has",
    ),
    "words": (
        {"bias": np.array(["a"] * CHANNELS)},
        TypeError,
        "state['bias'] has dtype <U1, expected float32",
    ),
    "too many": (
        {"gamma": ONES},
        ValueError,
        "state has not the layer's names, expected 'weight', 'bias'; not known are 'gamma'; make "
        "the layer with the scale and shift of the one that was saved",
    ),
}


@pytest.mark.parametrize("name", STATES)
@every_kind
def test_bad_state(kind: str, name: str) -> None:
    """Nothing is changed."""
    changed, error, words = STATES[name]
    layer = made(kind)
    with refused(layer, error, words.format(kind=kind)):
        layer.load_state_dict({"weight": ONES, "bias": ONES} | changed)


@every_kind
def test_states_that_are_none(kind: str) -> None:
    """Of a layer without parameters, of other kinds, into what cannot be written."""
    layer = made(kind)
    with refused(layer, ValueError, "state has not ... missing are 'weight', 'bias'; make"):
        layer.load_state_dict({})
    with refused(layer, TypeError, "state is a list"):
        layer.load_state_dict([ONES, ONES])
    layer.gamma.flags.writeable = False
    with refused(layer, ValueError, "the layer's 'weight' is read-only"):
        layer.load_state_dict({"weight": ONES, "bias": ONES})


# ---- PyTorch ----


def theirs_of(torch: Any, kind: str, rank: int, **options: Any) -> Any:
    """PyTorch's layer of this kind, with parameters that are not 1 and 0."""
    torch.manual_seed(rank)
    if kind == "GroupNorm":
        layer = torch.nn.GroupNorm(3, CHANNELS, **options)
    elif kind == "InstanceNorm":
        of_rank = torch.nn.InstanceNorm2d if rank == 4 else torch.nn.InstanceNorm1d
        layer = of_rank(CHANNELS, affine=True, **options)
    else:
        layer = torch.nn.LayerNorm(CHANNELS, **options)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer


THEIRS = [(kind, rank) for kind in ("GroupNorm", "InstanceNorm") for rank in (3, 4)]
"""PyTorch's layers that are ours; of layer norm, which is over the last axes, that of (N, C)."""


@pytest.mark.parametrize(("kind", "rank"), [*THEIRS, ("LayerNorm", 2)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_pytorch_number_for_number(torch: Any, kind: str, dtype: str, rank: int) -> None:
    """y and gradients of its layers from their state; PyTorch takes ours strictly."""
    theirs = theirs_of(torch, kind, rank, dtype=getattr(torch, dtype))
    ours = made(kind, dtype=dtype)
    state = {name: np.asarray(a) for name, a in theirs.state_dict().items()}
    ours.load_state_dict(theirs.state_dict())
    assert_same_bits(ours.state_dict(), state)
    theirs.load_state_dict({n: torch.from_numpy(a) for n, a in ours.state_dict().items()})
    x, dy, _ = batch((5, CHANNELS, 7, 4)[:rank], dtype=dtype)
    leaf = torch.tensor(x, requires_grad=True)
    y = theirs(leaf)
    y.backward(torch.tensor(dy))
    pairs = {"y": (ours(x), y.detach()), "dx": (ours.backward(dy), leaf.grad)}
    pairs |= {"dgamma": (ours.dgamma, theirs.weight.grad), "dbeta": (ours.dbeta, theirs.bias.grad)}
    roundings = 2 * x.size + 8  # of two sums over all values, and a few products
    for name, (a, tensor) in pairs.items():
        b = np.asarray(tensor)
        assert (a.shape, a.dtype) == (b.shape, b.dtype), name
        off = np.abs(a.astype(np.longdouble) - b).max()
        assert off <= (1e-10 + roundings * unit(dtype)) * max(1, np.abs(b).max()), name


def test_pytorch_states_that_say_something_else(torch: Any) -> None:
    """Elementwise parameters, and running statistics, are told apart from ours."""
    elementwise = torch.nn.LayerNorm((CHANNELS, 3, 3)).state_dict()
    with fails(ValueError, "state['weight'] has shape (6, 3, 3), expected"):
        made("LayerNorm").load_state_dict(elementwise)
    tracking = torch.nn.InstanceNorm2d(CHANNELS, affine=True, track_running_stats=True)
    with fails(ValueError, "state has 'running_mean' and 'running_var', expected parameters"):
        made("InstanceNorm").load_state_dict(tracking.state_dict())


@each_backend
@every_kind
@pytest.mark.parametrize("layout", LAYOUTS)
def test_masks(kind: str, layout: str) -> None:
    """What the verbs do with them, and the backward is of the same places."""
    x, dy, _ = batch(SHAPE, layout)
    where = np.random.default_rng(1).random((SHAPE[0], 1, *SHAPE[2:])) < 0.7
    where = to_layout(where, layout)
    layer, norm = made(kind, layout=layout), KINDS[kind]
    told: dict[str, Any] = {"gamma": layer.gamma, "where": where, "layout": layout}
    expected = norm.forward(x, beta=layer.beta, **told)
    gradients = norm.backward(dy, x, expected.mean, expected.var, **told)
    assert_same_bits({"y": layer(x, where=where)}, {"y": expected.y})
    assert_same_bits({"dx": layer.backward(dy)}, {"dx": gradients.dx})
    _, saved = layer.forward(x, where=where)
    layer(x)
    assert_same_bits({"dx": layer.backward(dy, saved)}, {"dx": gradients.dx})


ONE: dict[str, tuple[dict[str, Any], Any]] = {
    "InstanceNorm": ({}, np.ones((2, CHANNELS), np.float32)),
    "GroupNorm": ({}, np.ones((2, 3, 1), np.float32)),
    "LayerNorm": ({"axes": "last"}, np.ones((2, 4, 1), np.float32)),
}


@pytest.mark.parametrize("kind", ONE)
def test_one_value(kind: str) -> None:
    """y = beta, or an error if the layer was made so."""
    options, x = ONE[kind]
    channels = 1 if kind == "LayerNorm" else x.shape[1]
    sizes = (3, channels) if kind == "GroupNorm" else (channels,)
    layer = getattr(fastbn, kind)(*sizes, **options)
    layer.beta[...] = 5
    np.testing.assert_array_equal(layer(x), 5)
    layer = getattr(fastbn, kind)(*sizes, one_value="raise", **options)
    assert "one_value='raise'" in repr(layer)
    with pytest.raises(ValueError, match=r"^x has one value in each group of sample 0"):
        layer(x)
    assert layer(x[:0]).shape == x[:0].shape


def test_one_value_of_what_counts() -> None:
    """A sample of which one place counts; none is fine."""
    layer = fastbn.InstanceNorm(2, one_value="raise")
    x, where = np.ones((3, 2, 4), np.float32), np.ones((3, 1, 4), bool)
    where[1], where[2, 0, 1:] = False, False
    with pytest.raises(ValueError, match=r"^x has one value in each group of sample 2"):
        layer(x, where=where)
    layer(x[:2], where=where[:2])
    with pytest.raises(ValueError, match=r"^one_value is 'running', expected one of"):
        fastbn.InstanceNorm(2, one_value="running")  # type: ignore[arg-type]
