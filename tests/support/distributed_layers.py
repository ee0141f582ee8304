"""`SyncBatchNorm`, as cases that the ranks of a communicator run together."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest

import fastbn
from fastbn import distributed
from fastbn.distributed import Communicator, SyncBatchNorm
from oracle.arrays import Array
from support.bits import assert_same_bits
from support.ranks import (
    CHANNELS,
    SHARES,
    K,
    case,
    outcome,
    own,
    refused,
    whole,
)


def layers(comm: Communicator, **options: Any) -> tuple[SyncBatchNorm, SyncBatchNorm]:
    """The same layer of all ranks, and of one process."""
    given: dict[str, Any] = {"merge_every": K, "gradients": "sum", **options}
    both = tuple(
        SyncBatchNorm(CHANNELS, comm=each, **given) for each in (comm, distributed.one_process())
    )
    return both[0], both[1]


@case
def layer_is_that_of_the_whole_batch(comm: Communicator) -> None:
    """y, dx, gradients and running statistics of two steps: bit by bit those of one process, and
    close to BatchNorm's; unequal counts do not bias the variance."""
    cases: list[dict[str, Any]] = [{}, {"unbiased": False, "momentum": None}, {"decay": 0.9}]
    cases += [{"activation": "relu", "dtype": "float64"}, {"scale": False, "eps": 1e-3}]
    cases += [{"track_running_stats": False}]
    for options, share in product(cases, SHARES):
        several, one = layers(comm, **options)
        plain = fastbn.BatchNorm(CHANNELS, **options)
        mine = own(comm, share)
        for seed in range(2):
            x, dy = whole(seed=seed)
            y, dx = several(x[mine]), several.backward(dy[mine])
            both = {"y": one(x)[mine], "dx": one.backward(dy)[mine]}
            assert_same_bits({"y": y, "dx": dx}, both)
            expected = plain(x), plain.backward(dy)
            np.testing.assert_allclose(y, expected[0][mine], rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(dx, expected[1][mine], rtol=1e-5, atol=1e-5)
            for name in ("dgamma", "dbeta"):
                found, of_one = getattr(several, name), getattr(one, name)
                if found is not None:
                    assert_same_bits({name: found}, {name: of_one})
                    close = getattr(plain, name)
                    np.testing.assert_allclose(found, close, rtol=1e-4, atol=1e-4)
        several.gradients = "local"
        several(x[mine])
        several.backward(dy[mine])
        for name in ("dgamma", "dbeta"):
            local = getattr(several, name)
            if local is not None:
                added = comm.allgather(local.astype(np.float64)).sum(0)
                np.testing.assert_allclose(added, getattr(one, name), rtol=1e-4, atol=1e-4)
        one(x)
        plain(x)
        assert_same_bits(several.state_dict(), one.state_dict())
        for name, a in plain.state_dict().items():
            np.testing.assert_allclose(several.state_dict()[name], a, rtol=1e-6)


@case
def one_value(comm: Communicator) -> None:
    """One value a rank is enough where all together have two; one in all goes by the policy."""
    x = np.array([[1, 2, 3], [3, 0, 5], [2, 4, 1]], np.float32)[: comm.size]
    several, one = layers(comm, merge_every=None)
    if comm.size > 1:
        mine = slice(comm.rank, comm.rank + 1)
        np.testing.assert_allclose(several(x[mine]), one(x)[mine], rtol=1e-6, atol=1e-7)
        found, expected = several.state_dict(), one.state_dict()
        np.testing.assert_allclose(found["running_var"], expected["running_var"], rtol=1e-6)
    single = x[:1] if comm.rank == comm.size - 1 else x[:0]
    refused(comm, lambda: several(single), "ValueError: x has one value a channel")
    skips, _ = layers(comm, one_value="skip")
    assert not skips(single).any()
    assert skips.num_batches_tracked == 0
    runs, _ = layers(comm, one_value="running", eps=0.0)
    assert_same_bits({"y": runs(single)}, {"y": single})
    assert_same_bits({"dx": runs.backward(single)}, {"dx": single})


@case
def nonfinite(comm: Communicator) -> None:
    """The policy looks at the statistics of all ranks."""
    x, _ = whole()
    x[0, 1] = np.inf
    x = x[own(comm)]
    raises, _ = layers(comm, nonfinite="raise")
    before, out = raises.state_dict(), np.zeros_like(x)
    refused(comm, lambda: raises(x, out=out), "ValueError: x has a mean of", "in channel 1")
    assert not out.any()
    skips, _ = layers(comm, nonfinite="skip")
    skips(x)
    assert_same_bits(raises.state_dict(), before)
    assert_same_bits(skips.state_dict(), before)
    updates, _ = layers(comm)
    updates(x)
    assert not np.isfinite(updates.running_var[1])  # type: ignore[index]


@case
def evaluation_is_a_rank_s_own(comm: Communicator) -> None:
    """Evaluation, with running statistics and without, and frozen statistics: on some ranks only,
    forward and backward."""
    x, dy = (a[own(comm)] for a in whole())
    cases: list[dict[str, Any]] = [{}, {"track_running_stats": False}]
    for options in cases:
        bn, _ = layers(comm, **options)
        bn(x)
        if comm.rank == 0:
            bn.eval()
            with pytest.raises(ValueError, match=r"^x has rank"):
                bn(x[:, 0, 0, 0])
            plain = fastbn.BatchNorm(CHANNELS, **options).eval()
            plain.load_state_dict(bn.state_dict())
            assert_same_bits({"y": bn(x)}, {"y": plain(x)})
            assert_same_bits({"dx": bn.backward(dy)}, {"dx": plain.backward(dy)})
        bn.train()
        bn(x)
    bn, _ = layers(comm)
    bn.frozen_statistics = comm.rank == 0
    if comm.rank == 0:
        bn(x)
        bn.backward(dy)
        assert bn.num_batches_tracked == 0


@case
def several_calls(comm: Communicator) -> None:
    """`forward`, `update=False`, `keep=False` and `accumulate` do what they do in BatchNorm."""
    x, dy = whole()
    mine = own(comm)
    several, one = layers(comm, activation="relu")

    def twice(bn: SyncBatchNorm, x: Array, dy: Array) -> dict[str, Array]:
        y, first = bn.forward(x)
        again, second = bn.forward(y, update=False)
        dhidden = bn.backward(dy, second)
        dx = bn.backward(dhidden, first, accumulate=True)
        bn(x, keep=False)
        return {"again": again, "dhidden": dhidden, "dx": dx}

    got, expected = twice(several, x[mine], dy[mine]), twice(one, x, dy)
    assert_same_bits(got, {name: a[mine] for name, a in expected.items()})
    assert_same_bits(several.state_dict(), one.state_dict())
    assert several.num_batches_tracked == 2
    assert_same_bits({"dgamma": several.dgamma}, {"dgamma": one.dgamma})  # type: ignore[dict-item]
    refused(comm, lambda: several.backward(dy[mine]), "ValueError: ", "the layer keeps no call")


@case
def bad_calls_of_a_layer(comm: Communicator) -> None:
    """All ranks raise the same, and no layer is changed."""
    x, dy = (a[own(comm)] for a in whole())
    is_bad, name = comm.rank == 0, "rank 0: "
    bn, _ = layers(comm, domains=("day", "night"))

    def call(a: Array = x, **given: Any) -> Callable[[], object]:
        options: dict[str, Any] = {"domain": "day"} | (given if is_bad else {})
        return lambda: bn(a, **options)

    before = bn.state_dict()
    refused(comm, call(domain="dusk"), "ValueError: ", name, "domain is 'dusk'")
    refused(comm, call(update=1), "TypeError: ", name, "update is an int")
    refused(comm, call(x[:, :2] if is_bad else x), "ValueError: ", name, "x has 2 channels")
    if comm.size > 1:
        refused(comm, call(domain="night"), "the ranks disagree", "domain=night", "domain=day")
        refused(comm, call(update=False), "the ranks disagree", "update=False", "update=True")
    assert_same_bits(bn.state_dict(), before)
    assert outcome(comm, call()) == "no error"
    some = dy[:0, :1] if is_bad else dy
    refused(comm, lambda: bn.backward(some), "ValueError: ", name, "dy has shape")
    accumulate: Any = 1 if is_bad else False
    refused(comm, lambda: bn.backward(dy, accumulate=accumulate), "TypeError: ", name, "accumulate")
    if is_bad:
        bn.running("day").mean[:] = 3
    if comm.size > 1:
        refused(comm, call(), "the ranks disagree", "running statistics=")


@case
def reestimated(comm: Communicator) -> None:
    """The statistics are those of all ranks' batches."""
    x, _ = whole()
    mine = own(comm)
    first, second = (SyncBatchNorm(CHANNELS, comm=comm) for _ in range(2))
    batches = [x[mine], 2 * x[mine]]
    fastbn.reestimate([first, second], lambda a: second(first(a) ** 2), batches)
    plain, other = (fastbn.BatchNorm(CHANNELS) for _ in range(2))
    fastbn.reestimate([plain, other], lambda a: other(plain(a) ** 2), [x, 2 * x])
    for found, expected in ((first, plain), (second, other)):
        for name, a in expected.state_dict().items():
            np.testing.assert_allclose(found.state_dict()[name], a, rtol=1e-5)


@case
def copies(comm: Communicator) -> None:
    """A copy asks for a communicator, and with one does what the layer does."""
    x = whole()[0][own(comm)]
    bn, _ = layers(comm)
    for twin in (copy.deepcopy(bn), pickle.loads(pickle.dumps(bn))):
        assert twin.comm is None
        refused(comm, partial(twin, x), "TypeError: comm is None", "layer.comm = comm")
        twin.eval()(x)
        twin.train().comm = comm
        assert_same_bits({"y": twin(x)}, {"y": bn(x, update=False)})
