"""`BatchNorm` where a batch has one value a channel, NaN or infinity, or nothing at all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fastbn
from oracle.arrays import Array, to_layout
from support.bits import Results, assert_same_bits, of_channels
from support.layers import CHANNELS, batch, made, refused
from support.variants import each_backend

ONE = [((1, CHANNELS), "NCHW"), ((1, CHANNELS, 1, 1), "NCHW"), ((1, CHANNELS, 1, 1), "NHWC")]
one_value = pytest.mark.parametrize(("shape", "layout"), ONE)


@each_backend
@one_value
@pytest.mark.no_kernel
def test_one_value_is_refused(shape: tuple[int, ...], layout: str) -> None:
    """In training, and in evaluation where there are no running statistics."""
    x, _, _ = batch(shape, layout)
    out = np.full_like(x, np.nan)
    words = "x has one value a channel, expected two or more: ... larger batch, ... one_value="
    for tracks, mode in ((True, "training"), (False, "training"), (False, "evaluation")):
        bn = made(mode, layout=layout, track_running_stats=tracks)
        for into in (None, out, x):
            remedies = "'running' (use the running statistics) or 'skip'" if tracks else "'skip'"
            with refused(bn, ValueError, words + remedies + " (y = beta)", x, out):
                bn(x, out=into)


@each_backend
@one_value
def test_one_value_by_running_statistics(shape: tuple[int, ...], layout: str) -> None:
    """With "running" forward and backward are those of given statistics, and there is no update;
    with any policy they are so in evaluation."""
    x, dy, _ = batch(shape, layout)
    options: Any = {"layout": layout, "activation": "relu"}
    cases = [("training", "running"), *(("evaluation", p) for p in ("raise", "running", "skip"))]
    for mode, policy in cases:
        bn = made(mode, one_value=policy, **options)
        before = bn.state_dict()
        statistics = bn.running_mean, bn.running_var
        y = fastbn.normalize(x, *statistics, bn.gamma, bn.beta, **options)
        expected = fastbn.normalize_backward(dy, x, *statistics, bn.gamma, y=y, **options)
        assert_same_bits({"y": bn(x)}, {"y": y})
        found = fastbn.Gradients(bn.backward(dy), bn.dgamma, bn.dbeta)
        assert_same_bits(found._asdict(), expected._asdict())
        assert_same_bits(bn.state_dict(), before)


@each_backend
@one_value
def test_one_value_is_skipped(shape: tuple[int, ...], layout: str) -> None:
    """With "skip" y = beta, dx = 0, and there is no update."""
    x, dy, _ = batch(shape, layout)
    bn = made(one_value="skip", layout=layout)
    before = bn.state_dict()
    np.testing.assert_array_equal(bn(x).reshape(-1), bn.beta)
    np.testing.assert_array_equal(bn.backward(dy), np.zeros_like(x))
    assert_same_bits(bn.state_dict(), before)


SHAPE = (4, CHANNELS, 6)
BAD = 1
"""The channel with a value that is not finite."""
nonfinite = pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])


def poisoned(value: float, layout: str = "NCHW") -> Array:
    """A batch with this value in one channel."""
    x, _, _ = batch(SHAPE)
    x[2, BAD, 3] = value
    return to_layout(x, layout)


def assert_same_elsewhere(results: Results, expected: Results, layout: str) -> None:
    """All other channels have the same bits."""
    others = np.arange(CHANNELS) != BAD
    assert_same_bits(*(of_channels(r, others, layout) for r in (results, expected)))


@each_backend
@nonfinite
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_nonfinite_statistics_enter(value: float, layout: str) -> None:
    """With "update" the channel's are lost, and evaluation says so; all others have the bits that
    a clean batch gives."""
    clean, dy, _ = batch(SHAPE, layout)
    results = []
    layers = made(layout=layout), made(layout=layout)
    for bn, x in zip(layers, (poisoned(value, layout), clean), strict=True):
        gradients = {"y": bn(x), "dx": bn.backward(dy), "dgamma": bn.dgamma, "dbeta": bn.dbeta}
        results.append(gradients | {name: a for name, a in bn.state_dict().items() if a.ndim})
        assert bn.num_batches_tracked == made().num_batches_tracked + 1
    assert_same_elsewhere(results[0], results[1], layout)
    bn, _ = layers
    for _ in range(2):
        assert not np.isfinite([bn.running_mean[BAD], bn.running_var[BAD]]).any()
        bn(clean)
    with refused(bn.eval(), ValueError, f"running_ ... [{BAD}] is nan: ... channel {BAD}'s"):
        bn(clean)


@each_backend
@nonfinite
def test_nonfinite_statistics_are_skipped(value: float) -> None:
    """With "skip" y and the gradient are the verbs', and running statistics what they would be
    without that batch."""
    x, dy, other = poisoned(value), *batch(SHAPE)[1:]
    bn, clean = made(nonfinite="skip"), made()
    y, mean, var = fastbn.batch_norm(x, bn.gamma, bn.beta)
    expected = fastbn.batch_norm_backward(dy, x, mean, var, bn.gamma)
    assert_same_bits({"y": bn(x)}, {"y": y})
    found = fastbn.Gradients(bn.backward(dy), bn.dgamma, bn.dbeta)
    assert_same_bits(found._asdict(), expected._asdict())
    assert_same_bits(bn.state_dict(), clean.state_dict())
    bn(other)
    clean(other)
    assert_same_bits(bn.state_dict(), clean.state_dict())


@each_backend
@nonfinite
@pytest.mark.parametrize("tracks", [True, False])
def test_nonfinite_statistics_are_refused(value: float, tracks: bool) -> None:
    """With "raise" nothing is written: not out, fresh or x, and the saved forward stays in use.
    Running statistics need not be there."""
    bn, x = made(nonfinite="raise", track_running_stats=tracks), poisoned(value)
    clean, dy, _ = batch(SHAPE)
    bn(clean)
    dx, out = bn.backward(dy), np.full_like(x, np.nan)
    words = f"x has a mean of ... in channel {BAD}, expected finite statistics; ... 'skip'"
    for into in (None, out, x):
        with refused(bn, ValueError, words, x, out):
            bn(x, out=into)
    assert_same_bits({"dx": bn.backward(dy)}, {"dx": dx})
    assert np.isfinite(bn(clean, out=out)).all()


BEYOND: dict[str, tuple[float, Any, str]] = {
    "running_var": (1e30, np.float32, "x has a mean of ... variance of ... wider dtype"),
    "running_mean": (1e40, np.float64, "x has a mean of 1e+40"),
}
"""Values whose statistics are finite in float64, and the layer's would not be in float32."""


@each_backend
@pytest.mark.parametrize("name", BEYOND)
def test_statistics_beyond_the_layers_type(name: str) -> None:
    """The policy is heeded where the running statistics alone would be infinite; a layer of float64
    takes them."""
    value, dtype, words = BEYOND[name]
    x = batch(SHAPE, dtype=dtype)[0]
    x[:, BAD] = value if name == "running_mean" else x[:, BAD] * dtype(value)
    bn = made(nonfinite="raise")
    before, out = bn.state_dict(), np.full_like(x, np.nan)
    for into in (None, out, x):
        message = f"{name}[{BAD}] would be inf, expected a finite number in float32: {words}"
        with refused(bn, ValueError, message, x, out):
            bn(x, out=into)
    bn = made(nonfinite="skip")
    assert_same_bits({"y": bn(x)}, {"y": fastbn.batch_norm(x, bn.gamma, bn.beta).y})
    assert_same_bits(bn.state_dict(), before)
    bn = made()
    bn(x)
    assert np.isinf(getattr(bn, name)[BAD])
    for policy in ("update", "raise", "skip"):
        bn = made(nonfinite=policy, dtype="float64")
        bn(x)
        assert np.isfinite(getattr(bn, name)).all()
        assert bn.num_batches_tracked == before["num_batches_tracked"] + 1


def test_an_unbiased_variance_beyond_float64() -> None:
    """It is refused though the biased one is finite."""
    x = np.zeros((2, CHANNELS))
    x[:, BAD] = 1.1e154, -1.1e154
    bn = made(nonfinite="raise", dtype="float64")
    with refused(bn, ValueError, f"running_var[{BAD}] would be inf, expected ... in float64"):
        bn(x)
    bn.unbiased = False
    bn(x)


def test_a_variance_alone_may_be_refused() -> None:
    """Values whose mean is finite and whose squares are not."""
    bn, x = made(nonfinite="raise"), batch(SHAPE, dtype=np.float64)[0]
    x[:, 2] *= 1e200
    with refused(bn, ValueError, "x has a variance of inf in channel 2, expected finite"):
        bn(x)


def test_one_value_is_not_skipped_where_it_is_nonfinite() -> None:
    """Beside one_value="skip", nonfinite="raise" is heeded: with out and without."""
    bn, x = made(nonfinite="raise", one_value="skip"), np.full((1, CHANNELS), np.nan)
    out = np.zeros_like(x)
    for into in (None, out):
        with refused(bn, ValueError, "x has a mean of nan in channel 0", out):
            bn(x, out=into)


@each_backend
@pytest.mark.no_kernel
@pytest.mark.parametrize("mode", ["training", "evaluation", "frozen statistics"])
@pytest.mark.parametrize("shape", [(0, CHANNELS), (0, CHANNELS, 4, 4), (2, CHANNELS, 0)], ids=str)
def test_an_empty_batch_passes_through(shape: tuple[int, ...], mode: str) -> None:
    """Whatever the policies: empty results, gradients of zero, and no update."""
    x = np.zeros(shape, np.float32)
    policies: list[dict[str, str]] = [{"one_value": p} for p in ("raise", "running", "skip")]
    policies += [{"nonfinite": p} for p in ("raise", "skip")]
    for policy in policies:
        bn = made(mode, activation="relu", **policy)
        before, out = bn.state_dict(), np.empty_like(x)
        assert bn(x, residual=x, out=out) is out
        assert bn(x).shape == bn.backward(x, dresidual=True).shape == shape
        np.testing.assert_array_equal((bn.dgamma, bn.dbeta), np.zeros((2, CHANNELS)))
        assert_same_bits(bn.state_dict(), before)


@each_backend
@pytest.mark.no_kernel
@pytest.mark.parametrize(("policy", "samples"), [("nonfinite", 4), ("one_value", 1)])
def test_a_policy_set_later_is_checked(policy: str, samples: int) -> None:
    """A word that is none is not taken for another."""
    x, _, _ = batch((samples, CHANNELS), "NCHW")
    bn = made("training")
    setattr(bn, policy, "warn")
    with refused(bn, ValueError, f"{policy} is 'warn', expected one of", x):
        bn(x)
