"""Whatever subclass an argument is of: functions go on with the plain array, or the plain word.

`CALLS` are all public functions with array arguments, each as a call of good arguments by name.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastbn
from oracle.arrays import Array
from support.bits import assert_same_bits
from support.memory import Subclass
from support.variants import CYTHON, activate

DOORS = ("numpy", *CYTHON[:1])
"""Without plain entries, and with; the checks are the same for all."""


class Hostile(np.ndarray[Any, Any]):
    """Answers nothing: who calls any of its methods, or reads any attribute, fails."""

    def __getattribute__(self, name: str) -> Any:
        if name == "__class__":  # isinstance asks
            return Hostile
        raise RuntimeError(f"{name} of a subclass was used")

    def __array_function__(self, *call: Any) -> Any:
        raise RuntimeError("a function dispatched to a subclass")

    def __array_ufunc__(self, *call: Any, **options: Any) -> Any:
        raise RuntimeError("a ufunc dispatched to a subclass")

    def __getitem__(self, at: Any) -> Any:
        raise RuntimeError("a subclass was indexed")

    def __setitem__(self, at: Any, value: Any) -> None:
        raise RuntimeError("a subclass was written")

    def __len__(self) -> int:
        raise RuntimeError("a subclass was asked for its length")


def word(text: str) -> Any:
    """A member of a str-Enum, which equals its text and prints otherwise."""
    return Enum("Word", {"member": text}, type=str).member  # type: ignore[attr-defined]


SHAPE = (6, 4, 5)
rng = np.random.default_rng(0)
X, DY, DDX, RESIDUAL = rng.normal(1, 2, (4, *SHAPE)).astype(np.float32)
GAMMA, BETA, DDGAMMA, DDBETA = rng.normal(size=(4, 4))
Y, MEAN, VAR = fastbn.batch_norm(X, GAMMA, BETA, activation="relu", residual=RESIDUAL)
WHERE, WEIGHTS = rng.random((6, 1, 5)) < 0.7, rng.uniform(1, 2, 6)
SUMS = fastbn.gradient_sums(DY, X, MEAN, VAR)

_FORWARD = {"x": X, "gamma": GAMMA, "beta": BETA, "residual": RESIDUAL, "activation": "relu"}
_GIVEN = {"mean": MEAN, "var": VAR}
_BACKWARD = {"dy": DY, "x": X, "gamma": GAMMA, "y": Y, "activation": "relu"}
_SECOND = {"ddx": DDX, "ddgamma": DDGAMMA, "ddbeta": DDBETA, "dy": DY, "x": X, "gamma": GAMMA}
_OUT = {"out": X}
"""Stands for an array of its shape, full of what must not be left."""
_BOTH = {"out": X, "dresidual": X}
_SAMPLES = {"mean": MEAN[0] * np.ones((6, 2)), "var": VAR[0] * np.ones((6, 2))}
_FROZEN = {"mean": MEAN, "var": VAR, "gamma": GAMMA, "beta": BETA}


def split_sums(**given: Any) -> Any:
    """`batch_norm_backward` by sums of which each is an argument."""
    sums = given.pop("of_gamma"), given.pop("of_beta"), given.pop("count")
    return fastbn.batch_norm_backward(**given, sums=sums)


def layer(make: Callable[[], Any], training: bool = True, **given: Any) -> Any:
    """A layer's forward and backward, and the layer's arrays after it."""
    made = make().train(training)
    dy, back = given.pop("dy"), {k: given.pop(k) for k in ("dx", "dresidual") if k in given}
    y = made(**given)
    dx = made.backward(dy, dresidual=back.get("dresidual", False), out=back.get("dx"))
    return [y, dx, made.dgamma, made.dbeta, *made.state_dict().values()]


def frozen(**given: Any) -> Any:
    """A frozen batch norm's call and backward."""
    made = fastbn.FrozenBatchNorm(*(given.pop(name) for name in _FROZEN), activation="relu")
    x, residual, y, dy = (given.pop(name) for name in ("x", "residual", "y", "dy"))
    back = made.backward(dy, x, y=y, dresidual=given.pop("dresidual"), out=given.pop("dx"))
    return [made(x, residual=residual, **given), *back, made.scale, made.shift, made.gamma]


_LAYER = {"x": X, "dy": DY, "residual": RESIDUAL, "out": X, "dx": X, "dresidual": X}
_BN = partial(fastbn.BatchNorm, 4, activation="relu")
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "batch_norm": (fastbn.batch_norm, _FORWARD | _OUT),
    "batch_norm of some": (
        fastbn.batch_norm,
        _FORWARD | _OUT | {"where": WHERE, "weights": WEIGHTS},
    ),
    "normalize": (fastbn.normalize, _FORWARD | _GIVEN | _OUT | {"where": WHERE}),
    "batch_norm_backward": (
        fastbn.batch_norm_backward,
        _BACKWARD | _GIVEN | _BOTH | {"where": WHERE, "weights": WEIGHTS},
    ),
    "by sums": (
        split_sums,
        {"dy": DY, "x": X, "of_gamma": SUMS[0], "of_beta": SUMS[1], "count": np.array(99.0)}
        | _GIVEN,
    ),
    "normalize_backward": (fastbn.normalize_backward, _BACKWARD | _GIVEN | _BOTH),
    "dx alone": (
        partial(fastbn.normalize_backward, x=None, params=False),
        {"dy": DY, "gamma": GAMMA} | _GIVEN | _OUT,
    ),
    "batch_norm_double_backward": (fastbn.batch_norm_double_backward, _SECOND | _GIVEN),
    "normalize_double_backward": (fastbn.normalize_double_backward, _SECOND | _GIVEN),
    "moments": (fastbn.moments, {"x": X, "where": WHERE, "weights": WEIGHTS}),
    "gradient_sums": (
        fastbn.gradient_sums,
        {"dy": DY, "x": X, "y": Y, "activation": "relu", "where": WHERE, "weights": WEIGHTS}
        | _GIVEN,
    ),
    "group_norm": (partial(fastbn.group_norm, groups=2), _FORWARD | _OUT),
    "instance_norm": (fastbn.instance_norm, _FORWARD | _OUT),
    "layer_norm": (fastbn.layer_norm, _FORWARD | _OUT),
    "layer_norm of rows": (fastbn.layer_norm, {"x": X[:, :, 0].copy(), "gamma": GAMMA}),
    "group_norm_backward": (
        partial(fastbn.group_norm_backward, groups=2),
        _BACKWARD | _SAMPLES | _BOTH,
    ),
    "Moments": (lambda **given: fastbn.Moments(12, **given).to_array(), _GIVEN),
    "Moments.of": (
        lambda **given: fastbn.Moments.of(**given).to_array(),
        {"x": X, "where": WHERE, "weights": WEIGHTS},
    ),
    "sums of Moments": (
        lambda sums, about: fastbn.Moments.from_sums(sums, about).to_sums(about),
        {"sums": fastbn.Moments.of(X).to_sums(GAMMA), "about": GAMMA},
    ),
    "Moments.from_array": (
        lambda array: fastbn.Moments.from_array(array).to_array(),
        {"array": fastbn.Moments.of(X).to_array()},
    ),
    "population_statistics": (lambda x: fastbn.population_statistics([X, x]), {"x": X}),
    "FrozenBatchNorm": (frozen, _FROZEN | _LAYER | {"y": Y}),
    "BatchNorm": (partial(layer, _BN), _LAYER | {"where": WHERE, "weights": WEIGHTS}),
    "BatchNorm in evaluation": (partial(layer, _BN, False), _LAYER | {"weights": WEIGHTS}),
    "BatchNorm, renormalized": (
        partial(layer, partial(_BN, renormalization=fastbn.Renormalization(start=0, r_end=1))),
        {"x": X, "dy": DY, "residual": RESIDUAL, "where": WHERE},
    ),
    "GroupNorm": (partial(layer, partial(fastbn.GroupNorm, 2, 4, activation="relu")), _LAYER),
    "fold_into_conv": (
        fastbn.fold_into_conv,
        {"weight": X[0].copy(), "bias": BETA.astype(np.float32)} | _FROZEN,
    ),
    "fold_into_linear": (fastbn.fold_into_linear, {"weight": X[0], "bias": BETA} | _FROZEN),
    "fold_into_linear, before": (
        partial(fastbn.fold_into_linear, before=True),
        {"weight": np.ascontiguousarray(X[0].T), "bias": DDGAMMA[[0, 1, 2, 3, 0]]} | _FROZEN,
    ),
}
WRITTEN = ("out", "dx", "dresidual")


def called(name: str, wrap: Callable[[str, Array], Any]) -> dict[str, Array]:
    """A call's results as plain arrays, with its array arguments wrapped; those that it was given
    to write are what it gives back."""
    function, given = CALLS[name]
    arrays = {k: a for k, a in given.items() if isinstance(a, np.ndarray)}
    memory = {k: np.full_like(a, 77) if k in WRITTEN else a.copy() for k, a in arrays.items()}
    wrapped = {k: wrap(k, a) for k, a in memory.items()}
    results = function(**(given | wrapped))
    results = list(results) if isinstance(results, tuple | list) else [results]
    for k in set(memory) & {"out", "dx"}:
        assert any(result is wrapped[k] for result in results), f"{k} is not given back"
    written = {k: memory[k] for k in memory if k in WRITTEN}
    assert not any((a == 77).any() for a in written.values())
    for result in results:
        back = any(result is a for a in wrapped.values())
        assert back or type(result) in (np.ndarray, int, float, type(None)), type(result)
    found = {
        str(i): np.asarray(a, getattr(a, "dtype", None) if type(a) is np.ndarray else None)
        for i, a in enumerate(results)
        if a is not None
    }
    return found | written


def array_arguments() -> Iterator[Any]:
    for call, (_, given) in CALLS.items():
        names = [name for name, value in given.items() if isinstance(value, np.ndarray)]
        for name in (*names, "all"):
            yield pytest.param(call, name, id=f"{call}-{name}")


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(("call", "name"), list(array_arguments()))
def test_a_subclass_is_seen_as_its_data(call: str, name: str, door: str) -> None:
    """Nothing of it is called: the results are those of plain arrays, and plain themselves."""

    def hostile(k: str, a: Array) -> Any:
        return np.ndarray.view(a, Hostile) if name in (k, "all") else a

    with activate(door):
        assert_same_bits(called(call, hostile), called(call, lambda _, a: a))


def matrix(a: Array) -> Any:
    """An array as numpy.matrix, without the warning of its constructor."""
    return np.ndarray.view(a, np.matrix)


@pytest.mark.parametrize("door", DOORS)
def test_matrices_are_arrays(door: str) -> None:
    """No product of matrices, and no rank that stays 2: of x, its gradient, and weights."""
    flat = {name: a[:, :, 0].copy() for name, a in {"x": X, "dy": DY, "residual": RESIDUAL}.items()}
    x, matrices = flat["x"], {name: matrix(a) for name, a in flat.items()}
    weight = rng.normal(size=(4, 4))
    with activate(door):
        for verb in (fastbn.batch_norm, fastbn.layer_norm):
            expected = verb(x, residual=flat["residual"])
            found = verb(matrices["x"], residual=matrices["residual"])
            assert_same_bits(found._asdict(), expected._asdict())
            assert type(found.y) is np.ndarray
        mean, var = fastbn.moments(x)
        back = fastbn.batch_norm_backward
        gradients = back(flat["dy"], x, mean, var), back(matrices["dy"], matrices["x"], mean, var)
        assert_same_bits(gradients[1]._asdict(), gradients[0]._asdict())
    folds: list[Callable[..., Any]] = [fastbn.fold_into_conv, fastbn.fold_into_linear]
    folds.append(partial(fastbn.fold_into_linear, before=True))
    for fold in folds:
        folded, plain = (fold(w, BETA, MEAN, VAR, GAMMA) for w in (matrix(weight), weight))
        assert_same_bits(folded._asdict(), plain._asdict())
        assert type(folded.weight) is np.ndarray


def test_a_matrix_has_no_channels() -> None:
    """Its rank stays 2, so that `reshape(-1)` alone would not help."""
    with pytest.raises(ValueError, match=r"^gamma has shape \(1, 4\) .* numpy.asarray\(gamma\)"):
        fastbn.batch_norm(X, matrix(GAMMA[None]))
    gamma = matrix(GAMMA[None])
    fastbn.batch_norm(X, np.asarray(gamma).reshape(-1))


@pytest.mark.parametrize("door", DOORS)
def test_mapped_files(tmp_path: Path, door: str) -> None:
    """x, what is written, and a parameter, as numpy.memmap has them."""
    mapped = [
        np.memmap(tmp_path / name, np.float32, "w+", shape=shape)
        for name, shape in (("x", SHAPE), ("y", SHAPE), ("gamma", (4,)))
    ]
    x, out, gamma = mapped
    x[...], gamma[...] = X, GAMMA
    with activate(door):
        result = fastbn.batch_norm(x, gamma, out=out)
        expected = fastbn.batch_norm(X, GAMMA.astype(np.float32))
    assert result.y is out
    assert_same_bits({"y": np.asarray(out)}, {"y": expected.y})
    assert type(result.mean) is np.ndarray


def test_masks_are_still_refused() -> None:
    """Also those of subclasses of MaskedArray, and as `where` and `out`."""

    class Masked(np.ma.MaskedArray[Any, Any]):
        pass

    for name, a in (("x", X), ("gamma", GAMMA), ("where", WHERE), ("out", X), ("weights", WEIGHTS)):
        given: dict[str, Any] = {"x": X, name: Masked(a)}
        came = rf"^{name} is a (numpy\.ma\.MaskedArray|Masked)"
        with pytest.raises(TypeError, match=came):
            fastbn.batch_norm(**given)


def test_what_only_says_that_it_is_an_array() -> None:
    """Objects whose __class__ is somebody else's, as lazy proxies have it, are none."""

    class Proxy:
        __class__ = np.ndarray  # type: ignore[assignment]

    with pytest.raises(TypeError, match=r"^x is a Proxy, expected a numpy.ndarray"):
        fastbn.batch_norm(Proxy())  # type: ignore[arg-type]


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("activation", ["relu", "relu6", ("leaky_relu", 0.25)])
def test_words_of_enumerations(activation: Any, layout: str, door: str) -> None:
    """layout and activation, in every function that takes them."""
    fancy: Any = word(activation) if isinstance(activation, str) else (word("leaky_relu"), 0.25)
    x, dy, c = X[:, :, :4].copy(), DY[:, :, :4].copy(), 4
    mean, var = MEAN, VAR

    def results(layout: Any, activation: Any) -> dict[str, Array]:
        both: dict[str, Any] = {"layout": layout, "activation": activation}
        y, *_ = fastbn.batch_norm(x, GAMMA, BETA, **both)
        back: dict[str, Any] = both | {"y": y}
        found: list[Any] = [
            y,
            fastbn.normalize(x, mean, var, **both),
            fastbn.moments(x, layout=layout).mean,
        ]
        found += fastbn.batch_norm_backward(dy, x, mean, var, **back)
        found += fastbn.gradient_sums(dy, x, mean, var, **back)[:2]
        found += fastbn.batch_norm(x, where=np.ones((6, 1, 1), bool), layout=layout)
        found += fastbn.batch_norm_double_backward(dy, None, None, dy, x, mean, var, layout=layout)
        found += fastbn.group_norm(x, 2, **both)
        found += fastbn.instance_norm_backward(dy, x, *np.ones((2, 6, c)), **back)
        found.append(fastbn.Moments.of(x, layout=layout).to_array())
        found.append(fastbn.population_statistics([x, x], layout=layout).var)
        frozen = fastbn.FrozenBatchNorm(mean, var, **both)
        found += [frozen(x), frozen(x[::2]), frozen.backward(dy, x, y=y).dx]
        for norm in (fastbn.BatchNorm(c, **both), fastbn.InstanceNorm(c, **both)):
            found += [norm(x), norm.backward(dy)]
            assert norm.layout in repr(norm) or norm.layout == "NCHW"
            for made in (norm, frozen):
                copied = pickle.loads(pickle.dumps(made))
                assert type(copied.layout) is str
                kind = activation[0] if isinstance(activation, tuple) else activation
                kept = made.activation[0] if isinstance(made.activation, tuple) else made.activation
                assert type(kept) is str
                assert kept == kind
        return {str(i): a for i, a in enumerate(found)}

    with activate(door):
        assert_same_bits(results(word(layout), fancy), results(layout, activation))


def test_a_layers_layout_set_to_an_enumeration() -> None:
    """What is assigned later is looked at by every call."""
    bn = fastbn.BatchNorm(5)
    bn.layout = word("NHWC")
    assert_same_bits({"y": bn(X)}, {"y": fastbn.BatchNorm(5, layout="NHWC")(X)})
    bn.layout = "nhwc"
    with pytest.raises(ValueError, match=r"^layout is 'nhwc', expected 'NCHW'"):
        bn(X)


def test_policies_of_enumerations() -> None:
    """method, one_value, nonfinite, like, dtype, and the backend's name do what they say."""
    batches = [X, X[:2], 3 * X[:4]]
    for method in ("exact", "average"):
        expected = fastbn.population_statistics(batches, method=method)
        found = fastbn.population_statistics(batches, method=word(method))
        assert_same_bits({"var": found.var}, {"var": expected.var})
        layers = fastbn.BatchNorm(4), fastbn.BatchNorm(4)
        for bn, how in zip(layers, (method, word(method)), strict=True):
            fastbn.reestimate([bn], bn, batches, method=how)
        assert_same_bits(layers[1].state_dict(), layers[0].state_dict())
    single = np.ones((1, 4), np.float32)
    for policy in ("running", "skip"):
        bn = fastbn.BatchNorm(4, one_value=word(policy))
        assert_same_bits({"y": bn(single)}, {"y": fastbn.BatchNorm(4, one_value=policy)(single)})
        assert type(bn.one_value) is str
    bn = fastbn.BatchNorm(4, nonfinite=word("skip"))
    bn(np.full(SHAPE, np.nan, np.float32))
    assert bn.state_dict()["running_mean"].tolist() == [0, 0, 0, 0]
    assert repr(fastbn.BatchNorm.like(word("keras"), 4)) == repr(fastbn.BatchNorm.like("keras", 4))
    assert repr(fastbn.BatchNorm(4, dtype=word("float64"))) == "BatchNorm(4, dtype='float64')"
    with fastbn.use_backend(word("numpy")):
        assert fastbn.get_backend() == "numpy"
        assert type(fastbn.get_backend()) is str


def test_a_subclass_that_adds_nothing() -> None:
    """Is given back as what it is, where it was to be written."""
    out = np.empty_like(X).view(Subclass)
    assert fastbn.batch_norm(X, out=out).y is out


def test_numbers_of_other_types() -> None:
    """A layer keeps Python's own, in which it computes."""
    numbers: dict[str, Any] = {"r_max": np.float32(1.1), "start": np.int8(3), "r_end": np.int64(9)}
    limits = fastbn.Renormalization(**numbers)
    assert {type(value) for value in vars(limits).values()} == {int, float}
    assert limits.at(6).r_max == 1 + 0.5 * (float(np.float32(1.1)) - 1)
