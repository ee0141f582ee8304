"""`fastbn.distributed` as far as one process shows it: groups, options, what is installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fastbn
from fastbn import checks, distributed
from fastbn.distributed import SyncBatchNorm
from oracle.arrays import Array, to_layout
from support.bits import assert_same_bits
from support.processes import error, output, run
from support.variants import each_backend

COMM = distributed.one_process()


class Watched:
    """A communicator of one process, which keeps what it is given."""

    rank, size = 0, 1
    timeout: float | None = None

    def __init__(self) -> None:
        self.given: list[Array] = []

    def allgather(self, array: Array) -> Array:
        self.given.append(array.copy())
        return array[None]


def rows_of(x: Array, dy: Array, k: int, **options: Any) -> tuple[Array, Array]:
    """What a rank sends of its groups, forward and backward."""
    comm = Watched()
    distributed.moments(x, comm=comm, merge_every=k, **options)
    mean, var = np.arange(3.0), np.arange(1.0, 4.0)
    options |= {"comm": comm, "merge_every": k}
    distributed.batch_norm_backward(dy, x, mean, var, **options)
    assert len(comm.given) == 4
    return comm.given[1], comm.given[3]


@each_backend
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("shape", [(6, 3, 5, 7), (6, 3)])
def test_a_group_does_not_depend_on_others(shape: tuple[int, ...], layout: str) -> None:
    """Its bits are the same in a call of its own as in one of all groups, on each backend."""
    rng = np.random.default_rng(0)
    x, dy = (to_layout(a, layout) for a in rng.normal(3, 2, (2, *shape)).astype(np.float32))
    for k in (1, 4):
        of_all = rows_of(x, dy, k, layout=layout)
        for i, start in enumerate(range(0, len(x), k)):
            some = slice(start, start + k)
            alone = rows_of(x[some].copy(), dy[some].copy(), k, layout=layout)
            for together, one in zip(of_all, alone, strict=True):
                assert_same_bits({"group": together[i : i + 1]}, {"group": one})
        virtual = fastbn.moments(x, layout=layout, virtual_batch=k)
        assert_same_bits({"var": of_all[0][:, 5:]}, {"var": virtual.var})


def test_what_is_sent() -> None:
    """Each direction is one header of fixed size, and one row of float64 for each group: two
    numbers, or one, and two vectors. Evaluation sends nothing."""
    comm = Watched()
    bn = SyncBatchNorm(5, comm=comm, merge_every=4)
    x = np.random.default_rng(0).normal(size=(10, 5, 3)).astype(np.float32)
    dx = bn.backward(bn(x))
    assert dx.dtype == x.dtype
    sizes = [(a.dtype.name, a.shape) for a in comm.given]
    header = ("int64", (6,))
    assert sizes == [header, ("float64", (3, 12)), header, ("float64", (3, 11))]
    bn.eval().backward(bn(x))
    bn.train().frozen_statistics = True
    bn.backward(bn(x))
    assert len(comm.given) == 4


def test_refused() -> None:
    """What does not go with the batch of all ranks, or is no communicator."""
    cases: list[tuple[type[Exception], str, Callable[[], object]]] = [
        (ValueError, "virtual_batch is 4, expected None", lambda: make(virtual_batch=4)),
        (
            ValueError,
            "renormalization is <Renormalization>, expected None",
            lambda: make(renormalization=fastbn.Renormalization()),
        ),
        (TypeError, "merge_every is a float (2.0)", lambda: make(merge_every=2.0)),
        (ValueError, "merge_every is 0, expected 1 or more", lambda: make(merge_every=0)),
        (ValueError, "gradients is 'mean', expected one of", lambda: make(gradients="mean")),
        (TypeError, "comm is None, expected a communicator", lambda: make(comm=None)),
        (TypeError, "comm is an int (3), expected a communicator", lambda: make(comm=3)),
    ]
    for kind, words, call in cases:
        with pytest.raises(kind) as caught:
            call()
        assert words in str(caught.value)
        assert str(caught.value).count(";") >= 1
    bn = make()
    bn.virtual_batch = 4
    with pytest.raises(ValueError, match="virtual_batch is 4"):
        bn(np.eye(3))


def make(**options: Any) -> SyncBatchNorm:
    given: dict[str, Any] = {"comm": COMM} | options
    return SyncBatchNorm(3, **given)


def test_a_communicator_of_mpi4py() -> None:
    """One of its own, whose allgather is another one, is not taken for one of ours."""
    pytest.importorskip("mpi4py")
    code = """
import numpy as np
from mpi4py import MPI
from fastbn import distributed
comm = distributed.mpi(MPI.COMM_SELF, timeout=3)
print(comm, comm.timeout, distributed.moments(np.eye(2), comm=comm).mean)
try:
    distributed.mpi(comm)
except TypeError as error:
    print(error)
distributed.moments(np.eye(2), comm=MPI.COMM_SELF)
"""
    done = run(code)
    made, refused = done.stdout.splitlines()
    assert made == "<communicator, rank 0 of 1> 3.0 [0.5 0.5]"
    assert "expected an mpi4py.MPI.Intracomm; pass MPI.COMM_WORLD" in refused
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("TypeError: comm is an Intracomm, expected a communicator")
    assert "make one of mpi4py's with fastbn.distributed.mpi(comm)" in message


def test_timeouts() -> None:
    """They are seconds, above 0."""
    assert checks.distributed.timeout(3) == 3.0
    assert checks.distributed.timeout(None) is None
    for timeout in (0, -1, np.nan, np.inf):
        with pytest.raises(ValueError, match=r"timeout is .* seconds, above 0; pass None"):
            checks.distributed.timeout(timeout)
    with pytest.raises(TypeError, match="timeout is a str"):
        checks.distributed.timeout("1")


def test_a_layer_like_others() -> None:
    """Conventions of libraries, and what a layer says of itself."""
    bn = SyncBatchNorm.like("keras", 3, comm=COMM, merge_every=4)
    assert repr(bn).startswith("SyncBatchNorm(3, eps=0.001, decay=0.99, unbiased=False, layout=")
    assert repr(bn).endswith(", merge_every=4, gradients='local')")
    assert isinstance(bn, fastbn.BatchNorm)
    bn.gradients = "sum"
    with pytest.raises(AttributeError, match="the nearest is 'merge_every'"):
        bn.merge_evry = 4


def test_nothing_is_imported_before_it_is_asked_for() -> None:
    """`import fastbn` leaves the package out, and that leaves its libraries out."""
    code = "import sys, fastbn; print('fastbn.distributed' in sys.modules); "
    code += "import fastbn.distributed; print({'mpi4py', 'torch'} & set(sys.modules))"
    assert output(code).split("\n") == ["False", "set()"]


@pytest.mark.parametrize(("name", "call"), [("mpi4py", "mpi"), ("torch", "process_group")])
def test_a_library_that_is_missing(name: str, call: str) -> None:
    """The error says what to install."""
    code = f"import sys, fastbn.distributed; sys.modules[{name!r}] = None; "
    message = error(code + f"fastbn.distributed.{call}()")
    assert message.startswith(f"ImportError: {name} cannot be imported")
    assert "python -m pip install" in message


def test_sums_of_weights_are_rounded() -> None:
    """Weights that were added up in parts may come to a little less than all at once."""
    weights = np.random.default_rng(0).random(1000)
    x = np.random.default_rng(1).normal(size=(1000, 2))
    mean, var = fastbn.moments(x, weights=weights)
    sums = fastbn.gradient_sums(x, x, mean, var, weights=weights)
    less = sums._replace(count=sums.count * (1 - 2.0**-50))
    expected = fastbn.batch_norm_backward(x, x, mean, var, weights=weights).dx
    found = fastbn.batch_norm_backward(x, x, mean, var, weights=weights, sums=less).dx
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
