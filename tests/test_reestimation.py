"""`reestimate`: what each layer gets, from whatever kind of batches, and that errors change
nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from rich.progress import track

import fastbn
from fastbn import BatchNorm, reestimate
from oracle.arrays import DTYPES, Array
from support.bits import assert_same_bits
from support.variants import each_backend

WIDTHS = (3, 5, 7, 4)
METHODS = ("exact", "average")
BEFORE = 7
"""Batches that the layers have seen."""


class Network:
    """Three layers, a matrix before each and ReLU after; it keeps what they were called on."""

    def __init__(self, **options: Any) -> None:
        rng = np.random.default_rng(0)
        self.weights = [rng.normal(size=shape).astype(np.float32) for shape in pairwise(WIDTHS)]
        self.layers = [BatchNorm(width, **options) for width in WIDTHS[1:]]
        self.inputs: list[list[Array]] = []
        for layer in self.layers:
            state: dict[str, Any] = {
                name: rng.uniform(0.5, 2, array.shape) for name, array in layer.state_dict().items()
            }
            layer.load_state_dict(state | {"num_batches_tracked": BEFORE})

    def __call__(self, x: Array) -> Array:
        self.inputs.append([])
        for layer, weight in zip(self.layers, self.weights, strict=True):
            x = x @ weight
            self.inputs[-1].append(x)
            x = np.maximum(layer(x), 0)
        return x


def data(method: str = "exact") -> list[Array]:
    """Batches of unequal sizes, of one value too where the method takes it."""
    rng = np.random.default_rng(1)
    sizes = (9, 1 if method == "exact" else 2, 20, 5)
    return [rng.normal(2, 3, (n, WIDTHS[0])).astype(np.float32) for n in sizes]


def modes(network: Network) -> list[tuple[bool, bool, bool]]:
    return [(a.training, a.frozen_statistics, a.frozen_affine) for a in network.layers]


def everything(network: Network) -> list[dict[str, bytes]]:
    """The bits of all layers' arrays."""
    return [{n: a.tobytes() for n, a in layer.state_dict().items()} for layer in network.layers]


def running(layer: BatchNorm) -> dict[str, Any]:
    return {"mean": layer.running_mean, "var": layer.running_var}


def assert_populations(
    network: Network, walked: Network, batches: list[Array], method: str, which: tuple[int, ...]
) -> None:
    """Layers have the statistics of what `walked`, taking the batches, calls its own on."""
    walked.inputs = []
    for batch in batches:
        walked(batch)
    for i in which:
        layer, inputs = network.layers[i], [of_batch[i] for of_batch in walked.inputs]
        mean, var, _ = fastbn.population_statistics(inputs, method=method)
        dtype = layer.state_dict()["running_mean"].dtype
        assert_same_bits(running(layer), {"mean": mean.astype(dtype), "var": var.astype(dtype)})
        assert layer.num_batches_tracked == BEFORE


def assert_sequential(
    network: Network,
    batches: list[Array],
    method: str = "exact",
    which: tuple[int, ...] = (0, 1, 2),
) -> None:
    """Layers have the statistics of their input in evaluation, where all have their new ones."""
    walked = copy.deepcopy(network)
    for layer in walked.layers:
        layer.eval()
    assert_populations(network, walked, batches, method, which)


@each_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_one_layer_after_the_other(method: str, dtype: Any) -> None:
    """Each layer gets the population of its input under the new statistics of those before it, by a
    walk of its own; gamma and beta stay."""
    network, batches = Network(dtype=dtype), data(method)
    before = [layer.state_dict() for layer in network.layers]
    reestimate(network.layers, network, batches, method=method)
    assert len(network.inputs) == 3 * len(batches)
    assert_sequential(network, batches, method)
    for layer, state in zip(network.layers, before, strict=True):
        parameters = {"weight": layer.gamma, "bias": layer.beta}
        assert_same_bits(parameters, {name: state[name] for name in parameters})  # type: ignore[arg-type]


@each_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_all_layers_together(method: str, dtype: Any) -> None:
    """One walk gives each layer the population of its input in training."""
    network, batches = Network(dtype=dtype), data(method)
    walked = copy.deepcopy(network)
    for layer in walked.layers:
        layer.one_value = "skip"
    reestimate(network.layers, network, batches, method=method, sequential=False)
    assert len(network.inputs) == len(batches)
    assert_populations(network, walked, batches, method, (0, 1, 2))


@pytest.mark.parametrize("sequential", [True, False])
def test_modes_neither_matter_nor_change(sequential: bool) -> None:
    """Layers in evaluation or frozen get the statistics that others get, in the arrays that they
    have, and stay in their modes."""
    plain, network, batches = Network(), Network(), data()
    network.layers[0].eval()
    network.layers[1].frozen_statistics = True
    network.layers[2].frozen_affine = True
    network.layers[2].eval()
    before = modes(network)
    arrays = [layer.running_mean for layer in network.layers]
    for each in (plain, network):
        reestimate(each.layers, each, batches, sequential=sequential)
    assert everything(network) == everything(plain)
    assert modes(network) == before
    assert modes(plain) == [(True, False, False)] * 3
    assert all(a.running_mean is b for a, b in zip(network.layers, arrays, strict=True))


@pytest.mark.parametrize("policy", ["raise", "running", "skip"])
def test_batches_of_one_value(policy: str) -> None:
    """Together they have statistics, whatever a layer does with one value in training."""
    network, batches = Network(one_value=policy), list(data()[2][:, None])
    reestimate(network.layers, network, batches)
    assert_sequential(network, batches)


@pytest.mark.parametrize("policy", ["update", "raise", "skip"])
def test_lost_statistics(policy: str) -> None:
    """Running statistics that are NaN are replaced, whatever a layer does with them in training."""
    network = Network(nonfinite=policy)
    for layer in network.layers:
        for array in running(layer).values():
            array[...] = np.nan
    reestimate(network.layers, network, data())
    assert_sequential(network, data())


@pytest.mark.parametrize("policy", ["update", "raise", "skip"])
def test_batches_that_are_not_finite(policy: str) -> None:
    """They spoil their channel's statistics, whatever a layer does with them in training."""
    layer = BatchNorm(2, nonfinite=policy)
    reestimate([layer], layer, [np.array([[1, np.nan], [3, 5]])])
    np.testing.assert_array_equal(running(layer)["mean"], [2, np.nan])


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("mode", [True, False])
def test_a_forward_that_sets_modes(mode: bool, sequential: bool) -> None:
    """Statistics are what they are without, and each layer has its own mode again."""
    plain, network, batches = Network(), Network(), data()
    network.layers[1].eval()
    network.layers[2].frozen_statistics = True
    before = modes(network)

    def forward(x: Array) -> None:
        for layer in network.layers:
            layer.train(mode)
        network(x)
        for layer in network.layers:
            layer.train(not mode)

    reestimate(plain.layers, plain, batches, sequential=sequential)
    reestimate(network.layers, forward, batches, sequential=sequential)
    assert everything(network) == everything(plain)
    assert modes(network) == before


def test_statistics_beyond_the_layers_type() -> None:
    """They are infinite in float32, and nothing warns."""
    layer = BatchNorm(2)
    reestimate([layer], layer, [np.array([[1e30, 1.0], [-1e30, 3.0]])])
    np.testing.assert_array_equal(running(layer)["var"], [np.inf, 2])


@pytest.mark.parametrize("tracked", [0, 7])
def test_training_goes_on(tracked: int) -> None:
    """With momentum=None the new statistics weigh as much as the old ones did, and the limits of
    renormalization are as far open."""
    limits = fastbn.Renormalization(start=0, r_end=7, d_end=7)
    layer = BatchNorm(3, momentum=None, renormalization=limits, dtype="float64")
    layer.num_batches_tracked = held = np.array(tracked)
    x, *others = data()
    reestimate([layer], layer, others)
    assert layer.num_batches_tracked is held
    like = BatchNorm(3, momentum=1 / (tracked + 1), renormalization=limits, dtype="float64")
    like.load_state_dict(layer.state_dict())
    assert_same_bits({"y": layer(x)}, {"y": like(x)})
    assert_same_bits(layer.state_dict(), like.state_dict())
    assert held == tracked + 1


def test_a_layer_called_twice() -> None:
    """Its population is of all its calls."""
    layer, inputs = BatchNorm(3), []

    def forward(x: Array) -> None:
        for shift in (0, 5):
            inputs.append(x + np.float32(shift))
            layer(inputs[-1])

    reestimate([layer], forward, data())
    mean, var, _ = fastbn.population_statistics(inputs)
    assert_same_bits(running(layer), {"mean": mean.astype("f4"), "var": var.astype("f4")})
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e150])
def test_batches_that_weigh(scale: float, method: str, sequential: bool) -> None:
    """Their unbiased variance is as numpy.cov has it: of all values together or, on average, of
    each batch's."""
    rng = np.random.default_rng(2)
    batches = [(x, scale * rng.exponential(size=len(x)) ** 2) for x in data("average")]
    layer = BatchNorm(3, dtype="float64")
    reestimate(
        [layer], lambda b: layer(b[0], weights=b[1]), batches, method=method, sequential=sequential
    )
    if method == "exact":
        x, weights = (np.concatenate(of_batches) for of_batches in zip(*batches, strict=True))
        batches = [(x, weights)]
    var = np.mean([np.diag(np.cov(x.T, aweights=w)) for x, w in batches], 0)
    mean = np.mean([np.average(x, 0, w) for x, w in batches], 0)
    np.testing.assert_allclose(running(layer)["mean"], mean, rtol=1e-6)
    np.testing.assert_allclose(running(layer)["var"], var, rtol=1e-6)


def test_copies_made_meanwhile() -> None:
    """They are layers as any other, in training: before, in and after the layer's turn."""
    network, batches, copies = Network(), data(), []

    def forward(x: Array) -> None:
        copies.append(copy.deepcopy(network.layers[1]))
        network(x)

    reestimate(network.layers, forward, batches)
    x = batches[0][:, :1] * np.ones(WIDTHS[2], np.float32)
    for layer in copies:
        like = BatchNorm(WIDTHS[2])
        like.load_state_dict(layer.state_dict())
        assert_same_bits({"y": layer(x)}, {"y": like(x)})
        assert_same_bits(layer.state_dict(), like.state_dict())


def test_layers_left_out() -> None:
    """In evaluation they stay as they are, and the others follow what they do."""
    network, batches = Network(), data()
    network.layers[1].eval()
    before = everything(network)[1]
    reestimate([network.layers[0], network.layers[2]], network, batches)
    assert everything(network)[1] == before
    assert_sequential(network, batches, which=(0, 2))


class BrokenError(Exception):
    """What a forward raises."""


@pytest.mark.parametrize("error", [BrokenError, KeyboardInterrupt])
@pytest.mark.parametrize(
    ("walk", "sequential"), [(0, True), (1, True), (2, True), (0, False)], ids=str
)
def test_an_error_in_forward(
    walk: int, sequential: bool, error: type[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    """In whichever walk, it is passed on, all layers are as they were, and training goes on."""
    network, batches = Network(), data()
    network.layers[1].eval()
    network.layers[2].frozen_statistics = True
    network.layers[0].gamma.flags.writeable = False  # type: ignore[union-attr]
    before, its_modes, raised = everything(network), modes(network), error()

    def forward(x: Array) -> None:
        network(x)
        if len(network.inputs) == walk * len(batches) + 2:
            raise raised

    with pytest.raises(error) as caught:
        reestimate(network.layers, forward, batches, sequential=sequential)
    assert caught.value is raised
    assert everything(network) == before
    assert modes(network) == its_modes
    network(batches[0])
    assert [int(layer.state_dict()["num_batches_tracked"]) for layer in network.layers] == [8, 7, 7]
    assert capsys.readouterr() == ("", "")


class Anew:
    """Batches behind a progress bar that shows nothing, in another order at every walk."""

    def __init__(self, batches: list[Array]) -> None:
        self.batches, self.walks = batches, 0

    def __iter__(self) -> Iterator[Array]:
        self.walks += 1
        turned = self.batches[self.walks :] + self.batches[: self.walks]
        return iter(track(turned, disable=True))


def test_batches_that_start_anew() -> None:
    """Anything that gives the batches once a walk will do, in any order."""
    network, batches = Network(), Anew(data())
    reestimate(network.layers, network, batches)
    assert batches.walks == 3
    layer = network.layers[0]
    mean, var, _ = fastbn.population_statistics([batch @ network.weights[0] for batch in data()])
    # Another order changes a float64 sum, and with it at most a rounding to float32.
    np.testing.assert_allclose(running(layer)["mean"], mean, rtol=2.0**-23)
    np.testing.assert_allclose(running(layer)["var"], var, rtol=2.0**-23)


@pytest.mark.parametrize(
    "once",
    [iter, lambda b: (x for x in b), lambda b: track(b, disable=True)],
    ids=["iterator", "generator", "progress"],
)
def test_batches_that_can_be_walked_over_once(
    once: Callable[[list[Array]], Iterator[Array]], capsys: pytest.CaptureFixture[str]
) -> None:
    """A generator or a progress bar serves one walk, and is refused, untouched, for several."""
    network, listed, batches = Network(), Network(), once(data())
    before = everything(network)
    with pytest.raises(TypeError, match=r"^batches is a.* 3 walks.*a list, or sequential=False"):
        reestimate(network.layers, network, batches)
    assert everything(network) == before
    assert not network.inputs
    reestimate(network.layers, network, batches, sequential=False)
    reestimate(listed.layers, listed, data(), sequential=False)
    assert everything(network) == everything(listed)
    for each, given in ((network, once(data())), (listed, data())):
        each.layers[1].eval()
        each.layers[2].eval()
        reestimate(each.layers[:1], each, given)
    assert everything(network) == everything(listed)
    assert capsys.readouterr() == ("", "")


def test_batches_of_any_kind() -> None:
    """A batch is what forward takes."""
    network, plain = Network(), Network()
    named = [{"x": x, "label": 1} for x in data()]
    reestimate(network.layers, lambda batch: network(batch["x"]), named)
    reestimate(tuple(plain.layers), plain, data())
    assert everything(network) == everything(plain)


def without_statistics(n: Network) -> dict[str, Any]:
    return {"layers": [*n.layers, BatchNorm(4, track_running_stats=False)]}


def read_only(n: Network) -> dict[str, Any]:
    running(n.layers[1])["var"].flags.writeable = False
    return {}


def never_called(n: Network) -> dict[str, Any]:
    return {"layers": [n.layers[0], BatchNorm(4), *n.layers[1:]]}


X = data()[0]
ONE = [X[:1]]
NONE = [X[:0], X[:0]]
BAD: dict[str, tuple[type[Exception], Callable[[Network], dict[str, Any]]]] = {
    r"layers\[1\] had no batch with values, .* what forward calls it on": (
        ValueError,
        never_called,
    ),
    r"layers\[3\] is there twice": (
        ValueError,
        lambda n: {"layers": [*n.layers, n.layers[1]]},
    ),
    r"layers\[0\] is an ufunc, expected a BatchNorm": (TypeError, lambda n: {"layers": [np.tanh]}),
    r"layers\[0\] is an int \(1\), .* leave out": (TypeError, lambda n: {"layers": [1, *n.layers]}),
    r"layers is an int \(5\), expected a list of BatchNorm": (TypeError, lambda n: {"layers": 5}),
    r"layers is a dict": (TypeError, lambda n: {"layers": dict(enumerate(n.layers))}),
    r"forward is a NoneType \(None\), expected a callable that takes a batch": (
        TypeError,
        lambda n: {"forward": None},
    ),
    r"forward is a list": (TypeError, lambda n: {"forward": data(), "batches": n}),
    r"layers\[0\] is a str": (TypeError, lambda n: {"layers": "bn"}),
    r"layers is a BatchNorm, .* pass \[layer\]": (TypeError, lambda n: {"layers": n.layers[0]}),
    r"layers is a list \(\[\]\)": (TypeError, lambda n: {"layers": []}),
    r"layers is a generator": (TypeError, lambda n: {"layers": (a for a in n.layers)}),
    r"layers\[3\]\.running_mean and layers\[3\]\.running_var are None": (
        ValueError,
        without_statistics,
    ),
    r"layers\[1\]\.running_var is read-only": (ValueError, read_only),
    r"batches is an int \(5\), expected an iterable": (TypeError, lambda n: {"batches": 5}),
    r"layers\[0\] had no batch with values": (ValueError, lambda n: {"batches": []}),
    r"layers\[0\] had no batch": (ValueError, lambda n: {"batches": NONE}),
    r"count is 1, expected more than 1": (ValueError, lambda n: {"batches": ONE}),
    r"count is 1, expected more": (
        ValueError,
        lambda n: {"batches": [X, *ONE], "method": "average"},
    ),
    r"x has 2 channels": (ValueError, lambda n: {"forward": lambda x: n.layers[0](x[:, :2])}),
    r"method is 'mean', expected one of": (ValueError, lambda n: {"method": "mean"}),
    r"method is None, expected one of": (TypeError, lambda n: {"method": None}),
    r"sequential is an int \(1\), expected True or False": (TypeError, lambda n: {"sequential": 1}),
}


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message: str, sequential: bool) -> None:
    """A clear error says what is wrong, and all layers are as they were."""
    network = Network()
    error, changed = BAD[message]
    given: dict[str, Any] = {"layers": network.layers, "forward": network, "batches": data()}
    given |= {"sequential": sequential} | changed(network)
    before, its_modes = everything(network), modes(network)
    with pytest.raises(error, match=f"^{message}"):
        reestimate(**given)
    assert everything(network) == before
    assert modes(network) == its_modes
