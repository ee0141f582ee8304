"""`update=False`: the bits of any call, and running statistics that stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fastbn
from oracle.arrays import LAYOUTS, Array
from support.bits import assert_same_bits
from support.layers import CHANNELS, batch, made, refused
from support.variants import each_backend

SHAPE = (6, CHANNELS, 3)
OPEN = fastbn.Renormalization(start=0, r_end=0, d_end=0)
WAYS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "training": ("training", {}, ()),
    "finite": ("training", {"nonfinite": "raise"}, ()),
    "average": ("training", {"momentum": None}, ()),
    "where": ("training", {}, ("where",)),
    "weights": ("training", {}, ("weights",)),
    "where and weights": ("training", {}, ("where", "weights")),
    "virtual batches": ("training", {"virtual_batch": 4}, ()),
    "renormalization": ("training", {"renormalization": OPEN}, ()),
    "renormalization, where": ("training", {"renormalization": OPEN}, ("where", "weights")),
    "without running statistics": ("training", {"track_running_stats": False}, ()),
    "evaluation": ("evaluation", {}, ()),
    "frozen statistics": ("frozen statistics", {}, ()),
}
"""Mode, options, and what selects."""


def selections(layout: str) -> dict[str, Array]:
    where = np.array([True, False, True])
    return {
        "where": where[None, None] if layout == "NCHW" else where[None, :, None],
        "weights": np.arange(1.0, 7),
    }


@each_backend
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("way", WAYS)
def test_the_same_bits_and_no_update(way: str, layout: str) -> None:
    """y, gradients and what is saved, with out and without, by a call and by forward; then the
    layer trains on as if they had not been."""
    mode, options, names = WAYS[way]
    x, dy, z = batch(SHAPE, layout)
    given: dict[str, Any] = {name: selections(layout)[name] for name in names}
    options = options | {"layout": layout, "activation": "relu"}
    bn, like = made(mode, **options), made(mode, **options)
    before = bn.state_dict()
    expected = {"y": like(x, residual=z, **given), "dx": like.backward(dy)}
    for out in (None, np.empty_like(x)):
        y = bn(x, residual=z, out=out, update=False, **given)
        assert_same_bits({"y": y, "dx": bn.backward(dy)}, expected)
        y, saved = bn.forward(x, residual=z, out=out, update=False, **given)
        assert_same_bits({"y": y, "dx": bn.backward(dy, saved)}, expected)
        assert_same_bits({"dgamma": bn.dgamma}, {"dgamma": like.dgamma})
        assert_same_bits(bn.state_dict(), before)
    bn(x, residual=z, update=np.True_, **given)
    assert_same_bits(bn.state_dict(), like.state_dict())


@each_backend
@pytest.mark.parametrize("renormalized", [False, True])
def test_checkpointing_counts_once(renormalized: bool) -> None:
    """The forward that is computed twice has the same bits both times; of renormalization where
    the second one updates."""
    x, dy, _ = batch(SHAPE)
    options = {"renormalization": OPEN if renormalized else None}
    bn, like = made(**options), made(**options)
    expected = {"y": like(x), "dx": like.backward(dy)}
    first = bn(x, keep=False, update=not renormalized)
    y, saved = bn.forward(x, update=renormalized)
    assert_same_bits({"y": y, "dx": bn.backward(dy, saved)}, expected)
    assert_same_bits({"y": first}, {"y": expected["y"]})
    assert_same_bits(bn.state_dict(), like.state_dict())


def test_running_statistics_need_not_be_renewable() -> None:
    """Read-only ones are as good, and lost ones where nothing goes by them; renormalization goes by
    them."""
    x, _, _ = batch(SHAPE)
    for policy in ("raise", "skip"):
        for options in ({}, {"renormalization": OPEN}):
            bn, like = (made(nonfinite=policy, **options) for _ in range(2))
            bn.running_var.flags.writeable = False
            with refused(bn, ValueError, "running_var is read-only"):
                bn(x)
            assert_same_bits({"y": bn(x, update=False)}, {"y": like(x)})
            bn.running_mean[2] = np.nan
            if not options:
                assert_same_bits({"y": bn(x, update=False)}, {"y": like(x)})
                continue
            with refused(bn, ValueError, "running_mean[2] is nan: not a number"):
                bn(x, update=False)


# ---- Policies ----


@each_backend
def test_one_value() -> None:
    """It is refused, skipped or normalized by running statistics as ever."""
    x, dy, _ = batch((1, CHANNELS))
    bn = made()
    with refused(bn, ValueError, "x has one value a channel, expected two or more"):
        bn(x, update=False)
    for policy in ("skip", "running"):
        bn, like = made(one_value=policy), made(one_value=policy)
        before = bn.state_dict()
        expected = {"y": like(x), "dx": like.backward(dy)}
        assert_same_bits({"y": bn(x, update=False), "dx": bn.backward(dy)}, expected)
        assert_same_bits(bn.state_dict(), before)


@each_backend
@pytest.mark.parametrize("options", [{}, {"virtual_batch": 4}, {"renormalization": OPEN}])
def test_batches_that_are_not_finite(options: dict[str, Any]) -> None:
    """With "raise" they are refused before anything is written, as where there are no running
    statistics; else y is as ever."""
    x, _, _ = batch(SHAPE)
    x[2, 1, 0] = np.nan
    for policy in ("update", "skip"):
        bn, like = (made(nonfinite=policy, **options) for _ in range(2))
        before = bn.state_dict()
        assert_same_bits({"y": bn(x, update=False)}, {"y": like(x)})
        assert_same_bits(bn.state_dict(), before)
    bn, out = made(nonfinite="raise", **options), np.zeros_like(x)
    for into in (None, out):
        with refused(bn, ValueError, "x has a mean of nan in channel 1", x, out):
            bn(x, update=False, out=into)


def test_what_running_statistics_would_become_does_not_matter() -> None:
    """A variance that float64 holds, and the float32 of the layer does not."""
    x = batch(SHAPE)[0].astype(np.float64)
    x[:, 1] *= 1e30
    bn, like = made(nonfinite="raise"), made()
    with refused(bn, ValueError, "running_var[1] would be inf"):
        bn(x)
    for out in (None, np.empty_like(x)):
        assert_same_bits({"y": bn(x, update=False, out=out)}, {"y": like(x)})


def test_a_flag_that_is_none() -> None:
    """It is refused in any mode."""
    x, _, _ = batch(SHAPE)
    for mode in ("training", "evaluation"):
        bn = made(mode)
        for call in (bn, bn.forward):
            with refused(bn, TypeError, "update is an int (0), expected True or False", x):
                call(x, update=0)


def test_estimates_leave_it_out() -> None:
    """A call that is computed once more counts once in `reestimate`."""
    batches = [batch(SHAPE)[i] for i in range(3)]
    bn, like = made(), made()

    def twice(x: Array) -> None:
        bn(x, keep=False)
        assert_same_bits({"y": bn(x, update=False)}, {"y": made()(x)})

    fastbn.reestimate([bn], twice, batches)
    fastbn.reestimate([like], like, batches)
    assert_same_bits(bn.state_dict(), like.state_dict())
