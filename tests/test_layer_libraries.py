"""`BatchNorm.like`: what other libraries write, as formulas; and those that are installed, number
for number."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastbn
from oracle.arrays import DTYPES, Array, Wide, to_layout
from oracle.bounds import bound_y, unit
from oracle.formulas import normalize, rstd_of
from support.bits import assert_same_bits
from support.judge import assert_within
from support.running_averages import averaged
from support.variants import each_backend

CHANNELS = 5
Update = Callable[[Wide, Wide], Wide]


def batches(shape: tuple[int, ...], layout: str, dtype: Any, number: int = 4) -> list[Array]:
    """Batches of an NCHW shape, of different sizes."""
    rng = np.random.default_rng(len(shape))
    sizes = [shape[0] + 3 * i for i in range(number)]
    return [to_layout(rng.normal(1, 2, (n, *shape[1:])), layout).astype(dtype) for n in sizes]


WRITTEN: dict[str, tuple[dict[str, Any], Update]] = {
    # torch.nn.BatchNorm2d: (1 - momentum) * running + momentum * new, the variance unbiased
    "pytorch": (
        {"eps": 1e-5, "layout": "NCHW", "unbiased": True},
        lambda running, new: (1 - np.longdouble(0.1)) * running + np.longdouble(0.1) * new,
    ),
    # keras.layers.BatchNormalization: moving * momentum + new * (1 - momentum)
    "keras": (
        {"eps": 1e-3, "layout": "NHWC", "unbiased": False},
        lambda moving, new: moving * np.longdouble(0.99) + new * (1 - np.longdouble(0.99)),
    ),
    # flax.linen.BatchNorm: momentum * ra + (1 - momentum) * new
    "flax": (
        {"eps": 1e-5, "layout": "NHWC", "unbiased": False},
        lambda ra, new: np.longdouble(0.99) * ra + (1 - np.longdouble(0.99)) * new,
    ),
    # ONNX, BatchNormalization-15: input * momentum + current * (1 - momentum)
    "onnx": (
        {"eps": 1e-5, "layout": "NCHW", "unbiased": False},
        lambda given, new: given * np.longdouble(0.9) + new * (1 - np.longdouble(0.9)),
    ),
}
"""What their documentation says of the defaults, and their update of a running statistic."""


@each_backend
@pytest.mark.parametrize("library", WRITTEN)
def test_each_librarys_formula(library: str) -> None:
    """After several batches the running statistics are what its formula gives."""
    conventions, update = WRITTEN[library]
    for own in DTYPES:
        bn = fastbn.BatchNorm.like(library, CHANNELS, dtype=own)
        assert {name: getattr(bn, name) for name in conventions} == conventions
        given = batches((4, CHANNELS, 3, 5), bn.layout, np.float32)
        for x in given:
            y = bn(x)
        assert_same_bits({"y": y}, {"y": fastbn.batch_norm(x, eps=bn.eps, layout=bn.layout).y})
        for name, found in averaged(given, bn.layout, bn.unbiased, own).items():
            running = found.values[0]
            for new in found.values[1:]:
                running = update(running, new)
            assert_within(getattr(bn, name), running, found.bound, name)


@pytest.mark.parametrize(
    ("library", "options", "words"),
    [
        ("pytorch", {}, ""),
        ("keras", {}, ", eps=0.001, decay=0.99, unbiased=False, layout='NHWC'"),
        ("flax", {}, ", decay=0.99, unbiased=False, layout='NHWC'"),
        ("onnx", {}, ", decay=0.9, unbiased=False"),
        (
            "keras",
            {"momentum": None, "layout": "NCHW"},
            ", eps=0.001, momentum=None, unbiased=False",
        ),
        ("onnx", {"decay": 0.5, "shift": False}, ", decay=0.5, unbiased=False, shift=False"),
        ("pytorch", {"decay": 0.5}, ", decay=0.5"),
        ("pytorch", {"unbiased": False, "eps": 0.5}, ", eps=0.5, unbiased=False"),
    ],
)
def test_defaults_and_what_replaces_them(library: str, options: Any, words: str) -> None:
    """Options stand in place of the library's; a momentum in place of its decay, and so round."""
    assert repr(fastbn.BatchNorm.like(library, 3, **options)) == f"BatchNorm(3{words})"


def numpy_of(tensor: Any) -> Array:
    """A tensor's values."""
    return np.asarray(tensor.detach() if hasattr(tensor, "detach") else tensor)


def assert_near(ours: Any, theirs: Any, roundings: int, what: str) -> None:
    """Apart by at most what is promised of a variance in float64, and by so many roundings of the
    largest value in the type at hand."""
    expected = numpy_of(theirs)
    assert (ours.shape, ours.dtype) == (expected.shape, expected.dtype), what
    off = np.abs(ours.astype(np.longdouble) - expected).max()
    largest = max(1, np.abs(expected).max())
    assert off <= (1e-10 + roundings * unit(ours.dtype)) * largest, what


def pytorch_layer(torch: Any, rank: int, **options: Any) -> Any:
    """A BatchNorm1d or 2d whose parameters are not 1 and 0."""
    torch.manual_seed(rank)
    kind = torch.nn.BatchNorm2d if rank == 4 else torch.nn.BatchNorm1d
    layer = kind(CHANNELS, **options)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer


@pytest.mark.parametrize("momentum", [0.1, 0.6, None])
@pytest.mark.parametrize("rank", [2, 3, 4])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_pytorch_number_for_number(
    torch: Any, dtype: str, rank: int, momentum: float | None
) -> None:
    """y, gradients and running statistics of several steps, and y in evaluation after them, but for
    the roundings of two sums and a few products that PyTorch makes in each step."""
    theirs = pytorch_layer(torch, rank, momentum=momentum, dtype=getattr(torch, dtype))
    ours = fastbn.BatchNorm.like("pytorch", CHANNELS, momentum=momentum, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    given = batches((4, CHANNELS, 6, 5)[:rank], "NCHW", dtype)
    roundings = 0
    for training in (True, False):
        theirs.train(training)
        ours.train(training)
        for x in given:
            dy = np.sin(x)
            roundings += roundings_of(x)
            leaf = torch.tensor(x, requires_grad=True)
            y = theirs(leaf)
            theirs.zero_grad()
            y.backward(torch.tensor(dy))
            assert_near(ours(x), y, roundings, "y")
            assert_near(ours.backward(dy), leaf.grad, roundings, "dx")
            assert_near(ours.dgamma, theirs.weight.grad, roundings, "dgamma")
            assert_near(ours.dbeta, theirs.bias.grad, roundings, "dbeta")
            for name, tensor in theirs.state_dict().items():
                assert_near(ours.state_dict()[name], tensor, roundings, name)


def roundings_of(x: Array) -> int:
    """Of two sums over a channel's values and a few products, as such a layer may make them."""
    return 2 * x.size // CHANNELS + 8


def with_parameters(library: str, **options: Any) -> Any:
    """Our layer like theirs, whose parameters and running statistics are not 1 and 0."""
    bn = fastbn.BatchNorm.like(library, CHANNELS, **options)
    rng = np.random.default_rng(0)
    bn.load_state_dict(
        {name: rng.uniform(1, 2, a.shape).astype(a.dtype) for name, a in bn.state_dict().items()}
    )
    return bn


def onnx_operator(onnx: Any, dtype: str, rank: int, training: bool) -> Any:
    """BatchNormalization of opset 15, with the attributes that it has by default."""

    def shape_of(name: str) -> list[None]:
        return [None] * (rank if name in ("x", "y") else 1)

    given = ["x", "gamma", "beta", "running_mean", "running_var"]
    results = ["y", *(given[3:] if training else ())]
    node = onnx.helper.make_node(
        "BatchNormalization",
        given,
        ["y", *(f"new_{name}" for name in results[1:])],
        training_mode=int(training),
    )
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    inputs, outputs = (
        [onnx.helper.make_tensor_value_info(name, kind, shape_of(name)) for name in names]
        for names in (given, node.output)
    )
    graph = onnx.helper.make_graph([node], "batch norm", inputs, outputs)
    opset = onnx.helper.make_opsetid("", 15)
    model = onnx.helper.make_model(graph, opset_imports=[opset])
    onnx.checker.check_model(model)
    return onnx.reference.ReferenceEvaluator(model)


@pytest.mark.parametrize("rank", [2, 3, 4])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_onnx_number_for_number(dtype: str, rank: int) -> None:
    """y and running statistics of several steps, and y in inference after them, as its reference
    operator has them, whose attributes are float32."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnx.reference")
    plain = fastbn.BatchNorm.like("onnx", CHANNELS)
    rounded = {name: float(np.float32(getattr(plain, name))) for name in ("eps", "decay")}
    ours = with_parameters("onnx", dtype=dtype, **rounded)
    names = ("gamma", "beta", "running_mean", "running_var")
    theirs = {name: getattr(ours, name).copy() for name in names}
    given = batches((4, CHANNELS, 6, 5)[:rank], "NCHW", dtype)
    roundings = 0
    for training in (True, False):
        ours.train(training)
        operator = onnx_operator(onnx, dtype, rank, training)
        for x in given:
            roundings += roundings_of(x)
            y, *renewed = operator.run(None, {"x": x} | theirs)
            assert_near(ours(x), y, roundings, "y")
            theirs |= dict(zip(names[2:], renewed, strict=False))
            for name in names[2:]:
                assert_near(getattr(ours, name), theirs[name], roundings, name)


def masked(x: Array) -> Array:
    """A mask of places, (N, ...), of channels-last arrays: some of each sample."""
    mask = np.random.default_rng(0).random(x.shape[:-1]) < 0.6
    mask[:2] = True
    return mask


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("rank", [2, 3, 4])
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras's own
def test_keras_number_for_number(
    rank: int, masks: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """y and moving statistics of several steps, and y in inference after them, with a mask and
    without; on Keras's NumPy backend, if no other was chosen."""
    monkeypatch.setenv("KERAS_BACKEND", os.environ.get("KERAS_BACKEND", "numpy"))
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    keras = pytest.importorskip("keras")
    ours, theirs = with_parameters("keras"), keras.layers.BatchNormalization()
    given = batches((4, CHANNELS, 6, 5)[:rank], "NHWC", np.float32)
    theirs.build(given[0].shape)
    theirs.set_weights([ours.gamma, ours.beta, ours.running_mean, ours.running_var])
    roundings = 0
    for training in (True, False):
        ours.train(training)
        for x in given:
            roundings += roundings_of(x)
            mask = masked(x) if masks else np.ones(x.shape[:-1], bool)
            y = theirs(x, training=training, mask=mask if masks else None)
            ours_y = ours(x, where=mask[..., None] if masks else None)
            moving = theirs.moving_mean.value, theirs.moving_variance.value
            y, mean, var = map(keras.ops.convert_to_numpy, (y, *moving))
            assert_near(ours_y[mask], y[mask], roundings, "y")
            assert_near(ours.running_mean, mean, roundings, "moving_mean")
            assert_near(ours.running_var, var, roundings, "moving_variance")


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("rank", [2, 3, 4])
def test_flax_number_for_number(rank: int, masks: bool) -> None:
    """y and running averages of several steps, and y in inference after them, with a mask and
    without."""
    linen = pytest.importorskip("flax.linen")
    ours = with_parameters("flax")
    variables = {
        "params": {"scale": ours.gamma.copy(), "bias": ours.beta.copy()},
        "batch_stats": {"mean": ours.running_mean.copy(), "var": ours.running_var.copy()},
    }
    roundings = 0
    for training in (True, False):
        ours.train(training)
        theirs = linen.BatchNorm(use_running_average=not training)
        for x in batches((4, CHANNELS, 6, 5)[:rank], "NHWC", np.float32):
            roundings += roundings_of(x)
            mask = masked(x) if masks else np.ones(x.shape[:-1], bool)
            y, renewed = theirs.apply(
                variables, x, mask=mask[..., None] if masks else None, mutable=["batch_stats"]
            )
            variables |= renewed
            ours_y = ours(x, where=mask[..., None] if masks else None)
            assert_near(ours_y[mask], numpy_of(y)[mask], roundings, "y")
            for name, running in (("mean", ours.running_mean), ("var", ours.running_var)):
                assert_near(running, variables["batch_stats"][name], roundings, name)


@pytest.mark.parametrize("tracks", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_a_state_passes_both_ways(torch: Any, affine: bool, tracks: bool) -> None:
    """Names, order, shapes, types and values; PyTorch takes ours strictly."""
    options = {"affine": affine, "track_running_stats": tracks}
    theirs, back = (pytorch_layer(torch, 4, **options) for _ in range(2))
    for x in batches((4, CHANNELS, 3, 5), "NCHW", np.float32):
        theirs(torch.tensor(x))
    ours = fastbn.BatchNorm.like(
        "pytorch", CHANNELS, scale=affine, shift=affine, track_running_stats=tracks
    )
    ours.load_state_dict(theirs.state_dict())
    state = ours.state_dict()
    back.load_state_dict({name: torch.from_numpy(a) for name, a in state.items()})
    for layer in (theirs, back):
        expected = {name: numpy_of(tensor) for name, tensor in layer.state_dict().items()}
        assert list(state) == list(expected)
        assert_same_bits(state, expected)


def trained(torch: Any, widths: tuple[int, ...], x: Array) -> Any:
    """A network of linear layers, each with batch norm and relu, and running statistics."""
    blocks = [
        (torch.nn.Linear(n, m), torch.nn.BatchNorm1d(m), torch.nn.ReLU())
        for n, m in pairwise(widths)
    ]
    network = torch.nn.Sequential(*(part for block in blocks for part in block)).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape) / 4)
        for part in np.split(x, 4):
            network(torch.tensor(part))
    return network.eval()


def test_a_checkpoint(torch: Any) -> None:
    """A network's evaluation output from its saved weights: both are within twice what roundings
    of each layer, carried through those after it, come to."""
    torch.manual_seed(0)
    widths = (6, 9, 7, 4)
    x = np.random.default_rng(0).normal(1, 2, (64, widths[0]))
    network, file = trained(torch, widths, x), io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    checkpoint = {name: numpy_of(a) for name, a in torch.load(file, weights_only=True).items()}
    y, bound = x, np.zeros(x.shape, np.longdouble)
    for i, width in enumerate(widths[1:]):
        weight, bias = checkpoint[f"{3 * i}.weight"], checkpoint[f"{3 * i}.bias"]
        prefix = f"{3 * i + 1}."
        state = {n.removeprefix(prefix): a for n, a in checkpoint.items() if n.startswith(prefix)}
        bn = fastbn.BatchNorm.like("pytorch", width, activation="relu", dtype="float64")
        bn.load_state_dict(state)
        size = np.abs(y) @ np.abs(weight).T + np.abs(bias)
        bound = bound @ np.abs(weight).T + (len(weight.T) + 1) * 2.0**-52 * size
        z = y @ weight.T + bias
        bound = bound_of_evaluation(bn, z, bound)
        y = bn.eval()(z)
    assert (y > 0).any()
    assert_within(y, numpy_of(network(torch.tensor(x))).astype(np.longdouble), 2 * bound, "y")


def bound_of_evaluation(bn: fastbn.BatchNorm, z: Array, bound: Wide) -> Wide:
    """How far a layer's (N, C) output may be off where its input is within a bound."""
    state = {name: a.astype(np.longdouble) for name, a in bn.state_dict().items()}
    mean, var, gamma, beta = (
        state[name] for name in ("running_mean", "running_var", "weight", "bias")
    )
    exact = normalize(z.T.astype(np.longdouble), mean, var, gamma, beta, bn.eps)
    own = bound_y(np.float64, exact, mean, var, gamma, beta, bn.eps)
    scale = np.abs(gamma) * rstd_of(var, bn.eps)
    return bound * scale + own.T
