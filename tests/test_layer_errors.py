"""Every bad argument of `BatchNorm`: the kind of error, what its message says, no harm done."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fastbn
from support.bits import assert_same_bits
from support.layers import CHANNELS, batch, fails, made, refused
from support.variants import each_backend

SHAPE = (4, CHANNELS, 6)
LAST = CHANNELS - 1
Row = tuple[Any, type[Exception], str]
SWAPPED = np.dtype(ml_dtypes.bfloat16).newbyteorder()


def flags(name: str) -> list[Row]:
    """What is not True or False."""
    return [
        (1, TypeError, f"{name} is an int (1), expected True or False; pass one of them"),
        (None, TypeError, f"{name} is a NoneType ... expected True or False"),
    ]


def words(name: str, *known: str) -> list[Row]:
    """What is not one of a few words."""
    expected = f"expected one of {', '.join(map(repr, known))}; pass one of them"
    return [
        ("other", ValueError, f"{name} is 'other', {expected}"),
        (None, TypeError, f"{name} is None, {expected}"),
        (["skip"], TypeError, f"{name} is ['skip'], {expected}"),
    ]


def weights(name: str, whose: str) -> list[Row]:
    """What is not a weight."""
    expected = "expected a number from 0 to 1"
    return [
        *(
            (
                value,
                ValueError,
                f"{name} is {value}, {expected}: ... weight of the {whose}, ... 1 - {name}",
            )
            for value in (1.5, -0.1, float("nan"), float("inf"))
        ),
        (10**400, ValueError, f"{name} is inf, {expected}"),
        ("0.1", TypeError, f"{name} is a str ('0.1'), {expected}"),
        (True, TypeError, f"{name} is a bool (True), {expected}"),
        (np.ones(1), TypeError, f"{name} is an ndarray ... {expected}"),
    ]


NO_TYPES: tuple[Any, ...] = ("float16", "float31", "int32", np.longdouble, 3, {})
OPTIONS: dict[str, list[Row]] = {
    "channels": [
        (0, ValueError, "channels is 0, expected one or more; pass those of the arrays to come"),
        (-3, ValueError, "channels is -3, expected one or more"),
        (3.0, TypeError, "channels is a float (3.0), expected a whole number; pass an int"),
        (True, TypeError, "channels is a bool (True), expected a whole number"),
        (None, TypeError, "channels is a NoneType ... expected a whole number"),
        ("3", TypeError, "channels is a str ('3'), expected a whole number"),
    ],
    "eps": [
        (-1e-5, ValueError, "eps is -1e-05, expected a finite number, zero or more"),
        ("1e-5", TypeError, "eps is a str ('1e-5'), expected a number"),
    ],
    "momentum": weights("momentum", "new batch"),
    "decay": weights("decay", "old statistics"),
    **{name: flags(name) for name in ("unbiased", "scale", "shift", "track_running_stats")},
    "one_value": words("one_value", "raise", "running", "skip"),
    "nonfinite": words("nonfinite", "update", "raise", "skip"),
    "layout": [
        ("nchw", ValueError, "layout is 'nchw', expected 'NCHW' ... or 'NHWC'"),
        (1, TypeError, "layout is 1, expected 'NCHW'"),
    ],
    "activation": [
        ("gelu", ValueError, "activation is 'gelu', expected None, 'relu'"),
        (1, TypeError, "activation is 1, expected None"),
    ],
    "dtype": [
        (value, TypeError, f"dtype is {value!r}, expected 'float32' or 'float64': the type of")
        for value in NO_TYPES
    ],
}


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [(name, *row) for name, rows in OPTIONS.items() for row in rows],
)
def test_bad_option(name: str, value: Any, error: type[Exception], message: str) -> None:
    """No layer is made."""
    with fails(error, message):
        fastbn.BatchNorm(**({"channels": 3} | {name: value}))


@pytest.mark.parametrize("momentum", [None, 0.1, 0.5, "0.1"])
def test_momentum_and_decay(momentum: Any) -> None:
    """Both are refused, also where the momentum given is the default's number."""
    message = f"momentum is {momentum!r} and decay is 0.9, expected one of them: ... leave one out"
    with fails(ValueError, message):
        fastbn.BatchNorm(3, momentum=momentum, decay=0.9)
    for library in ("pytorch", "keras"):
        with fails(ValueError, message):
            fastbn.BatchNorm.like(library, 3, momentum=momentum, decay=0.9)


def test_a_bad_momentum_set_later() -> None:
    """It is refused as one that a layer is made with; and a decay is not taken back."""
    bn, expected = made(decay=0.5), "expected a number from 0 to 1"
    for name, value, kind in (
        ("momentum", "0.5", "momentum is a str ('0.5')"),
        ("momentum", 2, "momentum is 2.0"),
        ("decay", -1, "decay is -1.0"),
        ("decay", None, "decay is a NoneType (None)"),
    ):
        error = ValueError if isinstance(value, int) else TypeError
        with refused(bn, error, f"{kind}, {expected}"):
            setattr(bn, name, value)
    with refused(bn, TypeError, "decay is ... the average of all batches pass momentum=None"):
        bn.decay = None


def test_bad_numbers_of_batches() -> None:
    """They are refused where they are set."""
    bn = made()
    for value, words in (
        ("7", "a str ('7'), expected a whole number, or a numpy.ndarray of int64 and shape ()"),
        (True, "a bool (True), expected a whole number"),
        (np.array(True), "an ndarray ... expected a whole number"),
        (np.ones(1, int), "an ndarray ... expected a whole number"),
        (np.ma.masked_array(7), "a MaskedArray ... expected a whole number"),
    ):
        with refused(bn, TypeError, f"num_batches_tracked is {words}"):
            bn.num_batches_tracked = value
    for bad in (-1, 2**63, np.array(-1), 7.5, np.float32(0.5), math.nan, math.inf, 2.0**63):
        with refused(bn, ValueError, f"num_batches_tracked is {bad}, expected a whole"):
            bn.num_batches_tracked = bad
    bn.num_batches_tracked[...] = -1
    with refused(bn, ValueError, "num_batches_tracked is -1, expected a whole"):
        bn(batch(SHAPE)[0])


def test_words_of_layers() -> None:
    """A policy that needs running statistics, an unknown library, a mode that is no flag."""
    with fails(
        ValueError, "one_value is 'running', expected 'raise' or 'skip' where track_running"
    ):
        fastbn.BatchNorm(3, one_value="running", track_running_stats=False)
    expected = "expected one of 'pytorch', 'keras', 'flax', 'onnx'"
    for library, error in (("torch", ValueError), (None, TypeError)):
        with fails(error, f"library is {library!r}, {expected}"):
            fastbn.BatchNorm.like(library, 3)  # type: ignore[arg-type]
    bn = made()
    for value, kind in ((1, "an int (1)"), ("eval", "a str ('eval')")):
        with refused(bn, TypeError, f"mode is {kind}, expected True or False"):
            bn.train(value)


def used(**options: Any) -> Any:
    """A layer that has been called, and has gradients."""
    bn = made(**options)
    x, dy, _ = batch(SHAPE)
    bn(x)
    bn.backward(dy, dresidual=True)
    return bn


WIDE = np.ones((4, 6, CHANNELS), np.float32)
CALLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "channels of the other layout": (
        {"x": WIDE},
        ValueError,
        f"x has 6 channels (axis 1 of shape {WIDE.shape}, layout 'NCHW'), expected {CHANNELS}, as "
        "the BatchNorm has; make the BatchNorm with layout='NHWC'",
    ),
    "channels": (
        {"x": WIDE[:, :, 1:]},
        ValueError,
        f"x has 6 channels ... expected {CHANNELS}, ... pass another array",
    ),
    "rank": ({"x": np.ones(CHANNELS, np.float32)}, ValueError, "x has rank 1 ... 2 or more"),
    "integers": ({"x": np.ones(SHAPE, int)}, TypeError, "x has dtype int64, expected float16"),
    "list": ({"x": [[1.0]]}, TypeError, "x is a list ([[1.0]]), expected a numpy.ndarray"),
    "residual": (
        {"residual": WIDE},
        ValueError,
        f"residual has shape {WIDE.shape}, expected {SHAPE}, the shape of x",
    ),
    "residual's type": (
        {"residual": np.ones(SHAPE)},
        TypeError,
        "residual has dtype float64, expected float32, the dtype of x",
    ),
    "out": ({"out": WIDE}, ValueError, f"out has shape {WIDE.shape}, expected {SHAPE}"),
    "out's type": ({"out": np.ones(SHAPE)}, TypeError, "out has dtype float64, expected float32"),
}


@each_backend
@pytest.mark.no_kernel
@pytest.mark.parametrize("mode", ["training", "evaluation"])
@pytest.mark.parametrize("name", CALLS)
def test_bad_call(name: str, mode: str) -> None:
    """Nothing is written, and no kernel runs."""
    changed, error, message = CALLS[name]
    bn, x = made(mode), batch(SHAPE)[0]
    given = {"x": x, "residual": x, "out": np.full_like(x, np.nan)} | changed
    with refused(bn, error, message, *(a for a in given.values() if isinstance(a, np.ndarray))):
        bn(**given)


@pytest.mark.parametrize("mode", ["training", "evaluation", "frozen statistics"])
def test_a_failed_call_leaves_the_last_one_in_use(mode: str) -> None:
    """The backward is that of the call before it."""
    x, dy, _ = batch(SHAPE)
    bn = made(mode, activation="relu")
    bn(x)
    dx = bn.backward(dy)
    with refused(bn, ValueError, "residual has shape"):
        bn(2 * x, residual=x[1:])
    if mode == "training":
        with refused(bn, ValueError, "x has one value a channel"):
            bn(x[:1, :, :1])
    assert_same_bits({"dx": bn.backward(dy)}, {"dx": dx})


def frozen(a: Any) -> Any:
    """A copy that cannot be written."""
    a = a.copy()
    a.flags.writeable = False
    return a


def with_last(value: float) -> Callable[[Any], Any]:
    """A copy with this value in its last channel."""

    def changed(a: Any) -> Any:
        a = a.copy()
        a[-1] = value
        return a

    return changed


SHAPED = f"but the layer has {CHANNELS} channels; expected shape ({CHANNELS},)"
EVERYWHERE = {"update": True, "raise": True, "skip": True, "evaluation": True}
TRAINING = EVERYWHERE | {"evaluation": False}
UNLESS_UPDATED = EVERYWHERE | {"update": False}
"""Where running statistics are refused: in training with a policy for what is not finite, and in
evaluation."""

RUNNING: dict[str, tuple[str, Callable[[Any], Any], dict[str, bool], type[Exception], str]] = {
    **{
        f"read-only {name}": (
            name,
            frozen,
            TRAINING,
            ValueError,
            f"{name} is read-only, expected a writeable array: ... copy, or set frozen_statistics",
        )
        for name in ("running_mean", "running_var", "num_batches_tracked")
    },
    "shape": (
        "running_mean",
        lambda a: a[1:],
        EVERYWHERE,
        ValueError,
        f"running_mean has shape ({LAST},) {SHAPED}",
    ),
    "scalar": (
        "running_var",
        lambda a: a[:1].reshape(()),
        EVERYWHERE,
        ValueError,
        f"running_var has shape () {SHAPED}",
    ),
    "list": (
        "running_var",
        lambda a: a.tolist(),
        EVERYWHERE,
        TypeError,
        "running_var is a list ... expected a numpy.ndarray of float32 or float64",
    ),
    "half": (
        "running_mean",
        lambda a: a.astype(np.float16),
        EVERYWHERE,
        TypeError,
        "running_mean has dtype float16, expected float32 or float64",
    ),
    "missing": (
        "running_var",
        lambda _: None,
        EVERYWHERE,
        ValueError,
        "running_mean and running_var are None, ... track_running_stats=True",
    ),
    "NaN mean": (
        "running_mean",
        with_last(np.nan),
        UNLESS_UPDATED,
        ValueError,
        f"running_mean[{LAST}] is nan: not a number; ... channel {LAST}'s statistics",
    ),
    "NaN variance": (
        "running_var",
        with_last(np.nan),
        UNLESS_UPDATED,
        ValueError,
        f"running_var[{LAST}] is nan: not a number; ... channel {LAST}'s statistics",
    ),
    "negative variance": (
        "running_var",
        with_last(-0.5),
        EVERYWHERE,
        ValueError,
        f"running_var[{LAST}] is -0.5: a variance cannot be negative; ... channel {LAST}'s",
    ),
    **{
        f"infinite {name}": (
            name,
            with_last(value),
            {"update": False, "raise": True, "skip": True, "evaluation": False},
            ValueError,
            f"{name}[{LAST}] is {value}, expected a finite number: no batch makes it one again",
        )
        for name, value in (("running_mean", -np.inf), ("running_var", np.inf))
    },
}


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize("case", RUNNING)
def test_bad_running_statistics(case: str, where: str) -> None:
    """They are refused before anything is written, in evaluation and where training goes by them or
    renews them; elsewhere the call is as ever."""
    name, changed, refuses, error, message = RUNNING[case]
    x, _, _ = batch(SHAPE)
    options = {} if where == "evaluation" else {"nonfinite": where}
    bn = used(**options).train(where != "evaluation")
    setattr(bn, name, changed(getattr(bn, name)))
    out = np.full_like(x, np.nan)
    if refuses[where]:
        with refused(bn, error, message, out):
            bn(x, out=out)
    else:
        assert not np.isnan(bn(x, out=out)[:, :LAST]).any()
    if refuses["evaluation"]:
        with refused(bn, error, message):
            bn.to_frozen()
        bn.frozen_statistics = True
        with refused(bn, error, message, out):
            bn(x, out=out)


def test_without_running_statistics() -> None:
    """What goes by them is refused where the layer was made without."""
    bn = used(track_running_stats=False)
    message = "running_mean and running_var are None, expected arrays: ... track_running_stats=True"
    with refused(bn, ValueError, message):
        bn.to_frozen()
    bn.frozen_statistics = True
    for training in (True, False):
        out = np.full(SHAPE, np.nan, np.float32)
        with refused(bn.train(training), ValueError, message, out):
            bn(batch(SHAPE)[0], out=out)


def test_bad_parameters() -> None:
    """gamma and beta of another shape or type are refused, and the running statistics stay."""
    x, _, _ = batch(SHAPE)
    for name in ("gamma", "beta"):
        bn = used()
        setattr(bn, name, np.ones(3))
        with refused(bn, ValueError, f"{name} has shape (3,) but x has {CHANNELS} channels"):
            bn(x)
        setattr(bn, name, [1.0] * CHANNELS)
        with refused(bn, TypeError, f"{name} is a list"):
            bn(x)


def test_backward_before_forward() -> None:
    """There is nothing to go back through."""
    bn = made()
    with refused(bn, ValueError, "backward was called without saved, and the layer keeps no call"):
        bn.backward(batch(SHAPE)[1])


@pytest.mark.parametrize("mode", ["training", "evaluation"])
def test_bad_backward(mode: str) -> None:
    """A dy that belongs to no call, or not to the last; a bad dresidual or out; gradients stay."""
    bn, (x, dy, _) = used().train(mode == "training"), batch(SHAPE)
    bn(x)
    bn.backward(dy, dresidual=True)
    bn(x[1:])
    out = np.full_like(x, np.nan)
    with refused(
        bn, ValueError, f"dy has shape {SHAPE}, expected {x[1:].shape}, the shape of", out
    ):
        bn.backward(dy, out=out)
    dy, out = dy[1:], out[1:]
    with refused(bn, TypeError, "dy has dtype float64, expected float32", out):
        bn.backward(dy.astype(np.float64), out=out)
    with refused(bn, TypeError, "dy is a list", out):
        bn.backward(dy.tolist(), out=out)
    with refused(bn, TypeError, "dresidual is an int (1), expected True or False", out):
        bn.backward(dy, dresidual=1, out=out)
    with refused(bn, ValueError, f"out has shape {SHAPE}, expected {dy.shape}", dy):
        bn.backward(dy, out=np.empty_like(x))


@pytest.mark.parametrize(
    ("mode", "frozen_affine"), [("training", False), ("training", True), ("evaluation", False)]
)
def test_backward_after_x_was_written_over(mode: str, frozen_affine: bool) -> None:
    """After out=x, where the gradient needs x."""
    bn, (x, dy, _) = made(mode), batch(SHAPE)
    bn.frozen_affine = frozen_affine
    bn(x, out=x)
    with refused(bn, ValueError, "x has been written over, by the layer's call or ... another out"):
        bn.backward(dy)


STATES: dict[str, tuple[dict[Any, Any], type[Exception], str]] = {
    "missing": (
        {"bias": None},
        ValueError,
        "state has not the layer's names, ... missing are 'bias'; make",
    ),
    "unknown": (
        {"gamma": 1, "beta": 1},
        ValueError,
        "state has not the layer's names, expected 'weight', 'bias', 'running_mean', "
        "'running_var', 'num_batches_tracked'; not known are 'gamma', 'beta'; make the layer with",
    ),
    "both": (
        {"bias": None, 3: 1},
        ValueError,
        "state has ... missing are 'bias'; not known are 3;",
    ),
    "shape": (
        {"running_var": np.ones(3)},
        ValueError,
        f"state['running_var'] has shape (3,), expected ({CHANNELS},), as the layer has",
    ),
    "scalar": ({"weight": 1.0}, ValueError, "state['weight'] has shape (), expected"),
    "words": (
        {"bias": ["a"] * CHANNELS},
        TypeError,
        "state['bias'] has dtype <U1, expected float32",
    ),
    "masked": (
        {"running_mean": np.ma.masked_array(np.ones(CHANNELS), [True] + [False] * LAST)},
        TypeError,
        "state['running_mean'] is a numpy.ma.MaskedArray, expected a plain array: ... pass",
    ),
    "masked number of batches": (
        {"num_batches_tracked": np.ma.masked_array(7)},
        TypeError,
        "state['num_batches_tracked'] is a numpy.ma.MaskedArray, expected a plain array",
    ),
    "untyped bytes": (
        {"weight": np.zeros(CHANNELS, "V4")},
        TypeError,
        "state['weight'] has dtype |V4, expected float32 or what rounds to it; convert it to",
    ),
    "complex": (
        {"bias": np.ones(CHANNELS, complex)},
        TypeError,
        "state['bias'] has dtype complex128",
    ),
    "ragged": (
        {"bias": [1, [2, 3]]},
        TypeError,
        "state['bias'] is a list ([1, [2, 3]]), expected an array; NumPy says: setting an array",
    ),
    "swapped bfloat16": (
        {"bias": np.ones(CHANNELS, ml_dtypes.bfloat16).view(SWAPPED)},
        TypeError,
        "state['bias'] has dtype byte-swapped bfloat16, expected float32",
    ),
    "NaN mean": (
        {"running_mean": [0, 0, np.nan, 0, 0]},
        ValueError,
        "running_mean[2] is nan: not a number",
    ),
    "NaN variance": (
        {"running_var": [0, 0, np.nan, 0, 0]},
        ValueError,
        "running_var[2] is nan: not a number",
    ),
    "negative variance": (
        {"running_var": [0, 0, 0, -1.0, -2.0]},
        ValueError,
        "running_var[3] is -1.0: a variance cannot be negative",
    ),
    **{
        f"number of batches: {n}": (
            {"num_batches_tracked": n},
            ValueError,
            f"state['num_batches_tracked'] is {n}, expected a whole number, zero or more",
        )
        for n in (-1, 2.5, 2**63)
    },
    "number of batches: True": (
        {"num_batches_tracked": True},
        TypeError,
        "state['num_batches_tracked'] is an ndarray (array(True)), expected a whole number",
    ),
}


@pytest.mark.parametrize("case", STATES)
def test_bad_state(case: str) -> None:
    """No array is changed where one, or a name, is wrong."""
    changed, error, message = STATES[case]
    bn = used()
    state = {name: a + 1 for name, a in bn.state_dict().items()} | changed
    with refused(bn, error, message):
        bn.load_state_dict({name: a for name, a in state.items() if a is not None})


def test_what_is_no_state() -> None:
    """No mapping, or the state of a layer with other parts."""
    bn = used()
    with refused(bn, TypeError, "state is a list ... expected a mapping, as state_dict gives it"):
        bn.load_state_dict(list(bn.state_dict().items()))
    for options, words in (
        ({"scale": False}, "missing are 'weight'"),
        ({"track_running_stats": False}, "missing are 'running_mean', 'running_var'; make"),
    ):
        other = made(**options)
        with refused(bn, ValueError, f"state has not the layer's names, ... {words}"):
            bn.load_state_dict(other.state_dict())
        with refused(other, ValueError, "state has not the layer's names, ... not known are"):
            other.load_state_dict(bn.state_dict())


def test_a_state_of_what_is_no_array() -> None:
    """It is neither given nor taken."""
    bn = used()
    state = bn.state_dict()
    bn.beta = bn.beta.tolist()
    words = "beta is a list ... expected a numpy.ndarray of float32 or float64"
    with refused(bn, TypeError, words):
        bn.state_dict()
    with refused(bn, TypeError, words):
        bn.load_state_dict(state)


@pytest.mark.parametrize("name", ["gamma", "running_var", "num_batches_tracked"])
def test_a_state_for_a_read_only_array(name: str) -> None:
    """No array is changed where one cannot be."""
    bn = used()
    state = {name: a + 1 for name, a in bn.state_dict().items()}
    setattr(bn, name, frozen(getattr(bn, name)))
    with refused(
        bn, ValueError, "the layer's '... is read-only, expected a writeable array: ... copy"
    ):
        bn.load_state_dict(state)


def saved(a: Any) -> Any:
    """An array as it comes back from a file."""
    file = io.BytesIO()
    np.save(file, a)
    file.seek(0)
    return np.load(file)


BITS: dict[str, Callable[[Any], Any]] = {
    "from a file": saved,
    "uint16": lambda a: a.view(np.uint16),
    "int16": lambda a: a.view(np.int16),
    "a list": lambda a: list(a.view(np.uint16)),
    "swapped": lambda a: a.view(np.uint16).byteswap().view(SWAPPED),
}
"""bfloat16 that no longer is of its type."""


@pytest.mark.parametrize("how", BITS)
def test_the_bits_of_bfloat16(how: str) -> None:
    """They are refused, not taken for numbers; what the message says to pass is what was saved."""
    bn = made()
    rounded = {n: a.astype(ml_dtypes.bfloat16) for n, a in made().state_dict().items() if a.ndim}
    state: dict[str, Any] = {n: BITS[how](a) for n, a in rounded.items()}
    for name in rounded:
        with refused(bn, TypeError, f"state['{name}'] has dtype ... rounds to it; pass numpy."):
            bn.load_state_dict(state)
        remedy = code(bn, state, r"pass (numpy\.asarray\S+bfloat16\))")
        state[name] = eval(remedy, {"numpy": np, "ml_dtypes": ml_dtypes, "state": state})
    bn.load_state_dict(state)
    expected = {name: a.astype(np.float32) for name, a in rounded.items()}
    assert_same_bits(bn.state_dict(), expected | {"num_batches_tracked": np.array(0)})


def test_small_whole_numbers() -> None:
    """They are taken as what they are where the message's other remedy says so."""
    bn, state = made(), dict(made().state_dict())
    state["bias"] = np.arange(CHANNELS, dtype=np.int16)
    remedy = code(bn, state, r"or (numpy\.asarray\S+float32\)) if numbers$")
    bn.load_state_dict(state | {"bias": eval(remedy, {"numpy": np, "state": state})})
    np.testing.assert_array_equal(bn.beta, state["bias"])


def code(bn: Any, state: Any, pattern: str) -> str:
    """What the message about a state says to pass."""
    with pytest.raises((TypeError, ValueError)) as caught:
        bn.load_state_dict(state)
    found = re.search(pattern, str(caught.value))
    assert found, caught.value
    return found[1]


def network(*prefixes: str) -> dict[str, Any]:
    """A network's state: such layers stand after these prefixes, and others beside them."""
    state: dict[str, Any] = {"conv.weight": np.ones((5, 5, 3, 3)), "conv.bias": np.ones(5)}
    for prefix in prefixes:
        state |= {f"{prefix}{name}": a for name, a in made().state_dict().items()}
    return state


@pytest.mark.parametrize(
    ("prefixes", "words"),
    [
        (["module."], "1 prefix; strip one: set prefix = 'module.' and"),
        (
            [f"layer{i}.0.bn1." for i in range(300)],
            "300 prefixes; ... prefix = 'layer0.0.bn1.' and",
        ),
        (["bn/", "encoder/bn/"], "2 prefixes; strip one: set prefix = 'bn/' and"),
    ],
    ids=["of one", "of many", "slashes"],
)
def test_a_networks_state(prefixes: list[str], words: str) -> None:
    """The message is short and says to strip a prefix; that works."""
    bn, state = fastbn.BatchNorm(CHANNELS), network(*prefixes)
    with refused(bn, ValueError, f"state has a network's names, ... these stand after {words}"):
        bn.load_state_dict(state)
    prefix = code(bn, state, r"prefix = (\S+) and")
    remedy = code(bn, state, r"pass (\{.*\})$")
    bn.load_state_dict(eval(remedy, {"state": state, "prefix": eval(prefix)}))
    assert_same_bits(bn.state_dict(), made().state_dict())


class Hostile(str):
    """A name that does not let itself be shown."""

    __slots__ = ()

    def __repr__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize("prefix", ["", "layer.", "x" * 10_000])
def test_messages_about_states_are_short(prefix: str) -> None:
    """However many names are wrong, and however they are written."""
    bn = used()
    for names in ([f"{prefix}{i}" for i in range(10_000)], [Hostile(i) for i in range(10)]):
        state = dict.fromkeys(names, 1.0)
        with refused(bn, ValueError, "state has not the layer's names, ... more; make the layer"):
            bn.load_state_dict(state)
        with pytest.raises(ValueError, match="state has not") as caught:
            bn.load_state_dict(state)
        assert len(str(caught.value)) < 1000


def test_a_state_without_a_counter() -> None:
    """It is that of 0 batches, as PyTorch takes its own of before there was one."""
    bn, state = used(), made().state_dict()
    held = bn.num_batches_tracked
    assert held != 0
    del state["num_batches_tracked"]
    bn.load_state_dict(state)
    assert_same_bits(bn.state_dict(), state | {"num_batches_tracked": np.array(0)})
    assert bn.num_batches_tracked is held
