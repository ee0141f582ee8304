"""The verbs of `fastbn.distributed`, as cases that the ranks of a communicator run together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle, product
from typing import Any

import numpy as np

import fastbn
from fastbn import distributed
from fastbn.distributed import Communicator, SyncBatchNorm
from oracle.arrays import Array
from support.bits import assert_same_bits
from support.judge import assert_within, judge_backward, judge_forward
from support.ranks import (
    CHANNELS,
    MORE,
    SAMPLES,
    SHARES,
    SIDE,
    TYPES,
    K,
    case,
    outcome,
    own,
    parameters,
    refused,
    together,
    whole,
)


@case
def whole_batch_within_bounds(comm: Communicator) -> None:
    """Forward and backward are within the bounds of the whole batch's, of all types, with unequal
    and empty ranks."""
    gamma, beta = parameters()
    fusions: Any = [(None, False), ("relu", True)]
    layouts = dict(zip(SHARES, cycle(("NCHW", "NHWC")), strict=False))
    for dtype, (share, layout) in product(TYPES, layouts.items()):
        x, dy = whole(dtype, layout)
        mine = own(comm, share)
        for activation, has_residual in fusions:
            z = dy[::-1] if has_residual else None
            options: dict[str, Any] = {"layout": layout, "activation": activation}
            y, mean, var = distributed.batch_norm(
                x[mine], gamma, beta, comm=comm, residual=z if z is None else z[mine], **options
            )
            assert y.dtype == x.dtype
            all_y = together(comm, y)
            result = fastbn.BatchNormResult(all_y, mean, var)
            for judged in judge_forward(result, x, gamma, beta, residual=z, **options):
                assert_within(*judged._replace(bound=judged.bound * MORE))
            given: Any = {"comm": comm, "dresidual": True, "gradients": "sum", "y": y}
            found: Any = distributed.batch_norm_backward(
                dy[mine], x[mine], mean, var, gamma, **given, **options
            )
            dx, dresidual = together(comm, found.dx), together(comm, found.dresidual)
            got = found._replace(dx=dx, dresidual=dresidual)
            by = x, mean, var, gamma
            y_of_all = all_y if activation else None
            for judged in judge_backward(got, dy, *by, **options, y=y_of_all):
                assert_within(*judged._replace(bound=judged.bound * MORE))


def selections() -> Iterator[dict[str, Any]]:
    """Masks and weights of the whole, of which some rank has nothing that counts."""
    rng = np.random.default_rng(1)
    where = rng.random((SAMPLES, 1, SIDE, SIDE)) < 0.7
    where[8:] = False
    weights = rng.random(SAMPLES)
    weights[:8] = 0
    yield {}
    yield {"where": where}
    yield {"weights": weights}
    yield {"where": ~where, "weights": rng.random(SAMPLES) * 1e-3}


def cut(options: dict[str, Any], mine: slice) -> dict[str, Any]:
    """Masks and weights of a rank."""
    return {name: a[mine] for name, a in options.items()}


def through(comm: Communicator, x: Array, dy: Array, **options: Any) -> dict[str, Array]:
    """A forward and a backward."""
    gamma, beta = parameters()
    y, mean, var = distributed.batch_norm(x, gamma, beta, comm=comm, activation="relu", **options)
    options |= {"activation": "relu", "y": y, "gradients": "sum"}
    found = distributed.batch_norm_backward(dy, x, mean, var, gamma, comm=comm, **options)
    dx, dgamma, dbeta = found[:3]
    assert dgamma is not None
    assert dbeta is not None
    return {"y": y, "mean": mean, "var": var, "dx": dx, "dgamma": dgamma, "dbeta": dbeta}


@case
def same_bits_on_any_number_of_ranks(comm: Communicator) -> None:
    """With merge_every all results are those of one process, bit by bit."""
    alone = distributed.one_process()
    for selection, (dtype, k) in product(selections(), zip(TYPES, (1, K, 2, K), strict=True)):
        x, dy = whole(dtype)
        expected = through(alone, x, dy, merge_every=k, **selection)
        for mine in (own(comm, share) for share in SHARES):
            got = through(comm, x[mine], dy[mine], merge_every=k, **cut(selection, mine))
            got |= {name: together(comm, got[name]) for name in ("y", "dx")}
            assert_same_bits(got, expected)


@case
def masks_and_weights(comm: Communicator) -> None:
    """They are those of the whole batch; what does not count may be NaN."""
    for selection, share in product(selections(), SHARES):
        x, dy = whole(np.float64)
        if "where" in selection:
            x[~np.broadcast_to(selection["where"], x.shape)] = np.nan
        mine = own(comm, share)
        got = through(comm, x[mine], dy[mine], **cut(selection, mine))
        gamma, beta = parameters()
        y, mean, var = fastbn.batch_norm(x, gamma, beta, activation="relu", **selection)
        options: dict[str, Any] = {"activation": "relu", "y": y, **selection}
        dx, dgamma, dbeta = fastbn.batch_norm_backward(dy, x, mean, var, gamma, **options)[:3]
        expected = {"y": y[mine], "mean": mean, "var": var}
        expected |= {"dx": dx[mine], "dgamma": dgamma, "dbeta": dbeta}
        for name, a in expected.items():
            np.testing.assert_allclose(got[name], a, rtol=1e-5, atol=1e-12, err_msg=name)
        found = distributed.moments(x[mine], comm=comm, **cut(selection, mine))
        assert_same_bits(found._asdict(), {name: got[name] for name in ("mean", "var")})


@case
def nothing_at_all(comm: Communicator) -> None:
    """Ranks without samples, or in which nothing counts, are an empty batch."""
    x, dy = whole()
    nothing: list[tuple[slice, dict[str, Any]]] = [
        (slice(0), {}),
        (slice(5), {"where": np.zeros((5, 1, SIDE, SIDE), bool)}),
        (slice(5), {"weights": np.zeros(5)}),
    ]
    for some, selection in nothing:
        got = through(comm, x[some], dy[some], **selection)
        assert got["y"].shape == x[some].shape
        assert not any(a.any() for a in got.values())
        by = got["mean"], got["var"]
        found = distributed.batch_norm_backward(dy[some], x[some], *by, comm=comm, **selection)
        assert not any(a.any() for a in found if a is not None)
        bn = SyncBatchNorm(CHANNELS, comm=comm)
        assert not bn(x[some], **selection).any()
        assert not bn.backward(dy[some]).any()
        assert bn.num_batches_tracked == 0


@case
def integers(comm: Communicator) -> None:
    """Moments of integers, and of a population in which a rank has no batch."""
    x = np.random.default_rng(0).integers(0, 256, (SAMPLES, 2, 3), np.uint8)
    mine = own(comm)
    found = distributed.moments(x[mine], comm=comm)
    np.testing.assert_allclose(found, [x.mean((0, 2)), x.var((0, 2))], rtol=1e-13)
    for share in SHARES:
        some = own(comm, share)
        batches = (x[[i]] for i in range(some.start, some.stop))
        mean, var, count = distributed.population_statistics(batches, comm=comm)
        expected = [x.mean((0, 2)), x.var((0, 2), ddof=1)]
        np.testing.assert_allclose([mean, var], expected, rtol=1e-13)
        assert count == SAMPLES * 3
    words = "batches had no batch with values"
    refused(comm, lambda: distributed.population_statistics([], comm=comm), "ValueError", words)


@case
def nan_on_one_rank(comm: Communicator) -> None:
    """It is in its channel on all ranks, and in no other."""
    for layout in ("NCHW", "NHWC"):
        x, dy = whole(layout=layout)
        expected = through(distributed.one_process(), x, dy, layout=layout, merge_every=K)
        channel: Any = (-1, 1) if layout == "NCHW" else (-1, ..., 1)
        x[channel] = np.nan
        got = through(comm, x[own(comm)], dy[own(comm)], layout=layout, merge_every=K)
        for name, a in got.items():
            axis = 0 if a.ndim == 1 else 1 if layout == "NCHW" else a.ndim - 1
            of_whole = expected[name] if a.ndim == 1 else expected[name][own(comm)]
            if name not in ("y", "dbeta"):  # relu lets no gradient of a NaN through
                assert np.isnan(np.take(a, 1, axis)).all(), name
            assert_same_bits({name: np.delete(a, 1, axis)}, {name: np.delete(of_whole, 1, axis)})


@case
def gradients_of_parameters(comm: Communicator) -> None:
    """With "local" they are a rank's own sums, which add up to those of "sum", once; averaged they
    are these divided by the number of ranks."""
    x, dy = (a[own(comm)] for a in whole(np.float64))
    _, mean, var = distributed.batch_norm(x, comm=comm)
    of_ranks = distributed.batch_norm_backward(dy, x, mean, var, comm=comm)
    summed = distributed.batch_norm_backward(dy, x, mean, var, comm=comm, gradients="sum")
    sums = fastbn.gradient_sums(dy, x, mean, var)
    assert_same_bits({"dx": of_ranks.dx}, {"dx": summed.dx})
    all_x, all_dy = whole(np.float64)
    once = fastbn.batch_norm_backward(all_dy, all_x, *fastbn.batch_norm(all_x)[1:])
    for name in ("dgamma", "dbeta"):
        local, total = getattr(of_ranks, name), getattr(summed, name)
        assert_same_bits({name: local}, {name: getattr(sums, name)})
        close: Any = {"rtol": 1e-9, "atol": 1e-12}
        np.testing.assert_allclose(comm.allgather(local).sum(0), total, **close)
        np.testing.assert_allclose(total, getattr(once, name), **close)
        mean_of_ranks, of_one = comm.allgather(local).mean(0), getattr(once, name) / comm.size
        np.testing.assert_allclose(mean_of_ranks, of_one, **close)
    without = distributed.batch_norm_backward(dy, x, mean, var, comm=comm, params=False)
    assert without[1:] == (None, None)
    assert_same_bits({"dx": without.dx}, {"dx": summed.dx})


@case
def outputs(comm: Communicator) -> None:
    """`out` and `dresidual` are written and returned, in place too."""
    x, dy = (a[own(comm)] for a in whole())
    y, mean, var = distributed.batch_norm(x, comm=comm)
    same = x.copy()
    assert distributed.batch_norm(same, comm=comm, out=same).y is same
    options: dict[str, Any] = {"comm": comm, "activation": "relu", "y": y}
    expected: Any = distributed.batch_norm_backward(dy, x, mean, var, dresidual=True, **options)
    into, residual = np.empty_like(x), np.empty_like(x)
    options |= {"out": into, "dresidual": residual}
    found: Any = distributed.batch_norm_backward(dy, x, mean, var, **options)
    assert found.dx is into
    assert found.dresidual is residual
    assert_same_bits({"y": same}, {"y": y})
    assert_same_bits(found._asdict(), expected._asdict())


# ---- Errors ----


@case
def bad_arguments_of_one_rank(comm: Communicator) -> None:
    """All ranks raise the same, which names the rank, and nothing is written; then all is well."""
    x, dy = (a[own(comm)] for a in whole())
    bad = comm.size - 1
    is_bad = comm.rank == bad
    out = np.full_like(x, 7)

    def forward(**given: Any) -> Callable[[], object]:
        options: dict[str, Any] = {"comm": comm, "out": out} | (given if is_bad else {})
        return lambda: distributed.batch_norm(options.pop("x", x), **options)

    name = f"rank {bad}: "
    refused(comm, forward(x=x[:, 0, 0, 0]), "ValueError: ", name, "x has rank 1")
    refused(comm, forward(x=[1.0]), "TypeError: ", name, "x is a list")
    refused(comm, forward(gamma=np.ones(5)), "ValueError: ", name, "gamma has shape (5,)")
    refused(comm, forward(beta="b"), "TypeError: ", name, "beta is a str")
    refused(comm, forward(eps=-1), "ValueError: ", name, "eps is -1")
    refused(comm, forward(residual=dy[:0, :1]), "ValueError: ", name, "residual has shape")
    refused(comm, forward(activation="silu"), "ValueError: ", name, "activation is 'silu'")
    refused(comm, forward(out=out[:0, 0]), "ValueError: ", name, "out has shape")
    refused(comm, forward(merge_every=0), "ValueError: ", name, "merge_every is 0")
    refused(comm, forward(weights=-np.ones(len(x))), "ValueError: ", name, "weights[0] is -1")
    _, mean, var = distributed.batch_norm(x, comm=comm)

    def backward(**given: Any) -> Callable[[], object]:
        options: dict[str, Any] = {"comm": comm, "out": out} | (given if is_bad else {})
        a, m = options.pop("dy", dy), options.pop("mean", mean)
        return lambda: distributed.batch_norm_backward(a, x, m, var, **options)

    refused(comm, backward(dy=dy[:0]), "ValueError: ", name, "dy has shape (0, ")
    refused(comm, backward(mean=np.float32(mean)), "TypeError: ", name, "mean has dtype float32")
    refused(comm, backward(activation="relu"), "TypeError: ", name, "y is None")
    refused(comm, backward(gradients="all"), "ValueError: ", name, "gradients is 'all'")
    refused(comm, backward(params=1), "TypeError: ", name, "params is an int")
    refused(comm, backward(mean=mean + 1), "the ranks disagree", "statistics=")

    def batches() -> Iterator[Array]:
        yield x
        if is_bad:
            raise OSError("no such file")

    call = lambda: distributed.population_statistics(batches(), comm=comm)  # noqa: E731
    refused(comm, call, "RuntimeError: ", name, "OSError: no such file")
    assert (out == 7).all()
    assert outcome(comm, forward()) == "no error"


@case
def disagreement(comm: Communicator) -> None:
    """It is the same error on all ranks, which shows each one's call."""
    x = whole()[0][own(comm)]
    is_last = comm.rank == comm.size - 1

    def forward(a: Array = x, **given: Any) -> Callable[[], object]:
        return lambda: distributed.batch_norm(a, comm=comm, **(given if is_last else {}))

    words = "ValueError: the ranks disagree"
    refused(comm, forward(eps=1e-3), words, "eps=1e-05", f"rank {comm.size - 1}: ", "eps=0.001")
    refused(comm, forward(activation="relu"), words, "activation=None", "activation='relu'")
    refused(comm, forward(merge_every=2), words, "merge_every=None", "merge_every=2")
    refused(comm, forward(layout="NHWC"), words, "layout='NCHW'", "layout='NHWC'")
    other = x.astype(np.float64) if is_last else x
    refused(comm, forward(other), words, "x=float32", "x=float64")
    fewer = x[:, :2] if is_last else x
    refused(comm, forward(fewer), words, "3 channels", "2 channels")
    verb: Any = distributed.moments if is_last else distributed.batch_norm
    refused(comm, lambda: verb(x, comm=comm), words, "batch_norm(", "moments")
    _, mean, var = distributed.batch_norm(x, comm=comm)
    k = 3 if is_last else None
    backward = partial(distributed.batch_norm_backward, x, x, mean, var, comm=comm, merge_every=k)
    refused(comm, backward, words, "merge_every=None", "merge_every=3")
    ragged = np.zeros((4 + comm.rank, 3))
    if comm.size > 1:
        call = lambda: distributed.moments(ragged, comm=comm, merge_every=3)  # noqa: E731
        refused(comm, call, "rank 0 has ", "a multiple of merge_every, 3")
