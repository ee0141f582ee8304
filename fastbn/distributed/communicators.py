"""Communicators: what gathers the same array of all ranks, on other libraries' transports.

A gather is begun without blocking and then looked at, so that a timeout can be kept, and
KeyboardInterrupt comes through. One that is not through in time is given up: the ranks that waited
call the roll, each by a message to every other one, and whoever does not answer is named.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from fastbn import checks

Array = NDArray[Any]
IsDone = Callable[[], bool]

BUSY, NAP = 2e-4, 5e-5
"""Seconds for which a gather is looked at all the time, and then between two looks."""
TAG = 0xBA7
"""Of messages of the roll."""


@runtime_checkable
class Communicator(Protocol):
    """What the calls of this package need: anything with these will do.

    Attributes
    ----------
    rank, size : int
        Which process this is, from 0 on, and how many there are.
    timeout : float or None
        Seconds after which `allgather` raises a TimeoutError.
    """

    rank: int
    size: int
    timeout: float | None

    def allgather(self, array: Array) -> Array:
        """The arrays of all ranks, which have one shape and type, as (size, ...), in the order of
        ranks."""
        ...


class _OneProcess:
    """The communicator of a process by itself."""

    rank, size = 0, 1
    timeout: float | None = None

    def allgather(self, array: Array) -> Array:
        return array[None]


class _Polled(ABC):
    """The base of those on other libraries."""

    def __init__(self, rank: int, size: int, timeout: float | None) -> None:
        self.rank, self.size, self.timeout = rank, size, checks.distributed.timeout(timeout)
        self._given_up: Any = None
        """What a late rank may still write to."""

    def allgather(self, array: Array) -> Array:
        checks.distributed.usable(self.rank, is_given_up=self._given_up is not None)
        sent = np.array(array, order="C")
        received = np.empty((self.size, *sent.shape), sent.dtype)
        is_done = self._begin(sent, received)
        if not _wait(is_done, self.timeout):
            assert self.timeout is not None
            self._given_up = is_done, sent, received
            # Whoever came in time gives up no later than so long after us.
            answered = self._call_roll(self.timeout)
            missing = sorted({*range(self.size)} - {self.rank} - answered)
            raise checks.distributed.late(self.rank, self.size, self.timeout, missing)
        return received

    @abstractmethod
    def _begin(self, sent: Array, received: Array) -> IsDone:
        """Begin to gather; gives what tells whether it is through."""

    @abstractmethod
    def _call_roll(self, seconds: float) -> set[int]:
        """Send a message to every other rank; gives those whose own came within this time."""

    def __repr__(self) -> str:
        return f"<communicator, rank {self.rank} of {self.size}>"


class _MPI(_Polled):
    def __init__(self, comm: Any, timeout: float | None) -> None:
        super().__init__(comm.Get_rank(), comm.Get_size(), timeout)
        self._comm = comm

    def _begin(self, sent: Array, received: Array) -> IsDone:
        test: IsDone = self._comm.Iallgather(sent, received).Test
        return test

    def _call_roll(self, seconds: float) -> set[int]:
        others = [rank for rank in range(self.size) if rank != self.rank]
        ours, theirs = np.zeros(1, np.uint8), np.zeros((self.size, 1), np.uint8)
        sent = [self._comm.Isend(ours, rank, TAG) for rank in others]
        coming = {rank: self._comm.Irecv(theirs[rank], rank, TAG) for rank in others}
        self._given_up = self._given_up, sent, coming, ours, theirs
        _wait(lambda: all(each.Test() for each in coming.values()), seconds)
        return {rank for rank, each in coming.items() if each.Test()}


class _ProcessGroup(_Polled):
    def __init__(self, torch: Any, group: Any, timeout: float | None) -> None:
        self._torch, self._group = torch, group
        rank, size = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
        super().__init__(rank, size, timeout)

    def _begin(self, sent: Array, received: Array) -> IsDone:
        here = self._torch.from_numpy(sent)
        there = list(self._torch.from_numpy(received).unbind())
        work = self._torch.distributed.all_gather(there, here, group=self._group, async_op=True)
        return lambda: bool(work.is_completed() and work.wait())

    def _call_roll(self, seconds: float) -> set[int]:
        torch, end, answered = self._torch, time.monotonic() + seconds, set()
        group = torch.distributed.group.WORLD if self._group is None else self._group
        ours, theirs = torch.zeros(1), torch.zeros(self.size, 1)
        coming, sent = {}, []
        for rank in range(self.size):
            if rank != self.rank:
                place = torch.distributed.get_global_rank(group, rank), group, TAG
                sent.append(torch.distributed.isend(ours, *place))
                coming[rank] = torch.distributed.irecv(theirs[rank], *place)
        self._given_up = self._given_up, sent, ours, theirs
        for rank, each in coming.items():
            left = max(end - time.monotonic(), 0.01)
            with suppress(RuntimeError):  # nothing came, or the connection is lost
                each.wait(timedelta(seconds=left))
                answered.add(rank)
        return answered


def _wait(is_done: IsDone, timeout: float | None) -> bool:
    """Look until it is done; False where it is not in time."""
    start = time.monotonic()
    while not is_done():
        waited = time.monotonic() - start
        if timeout is not None and waited > timeout:
            return False
        if waited < BUSY:
            os.sched_yield()
        else:
            time.sleep(NAP)
    return True


def one_process() -> Communicator:
    """A communicator of this process alone: for trying out, and programs started without others.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn import distributed
    >>> comm = distributed.one_process()
    >>> comm.size, comm.allgather(np.zeros(3)).shape
    (1, (1, 3))
    """
    return _OneProcess()


def mpi(comm: Any = None, *, timeout: float | None = None) -> Communicator:
    """A communicator on one of mpi4py's.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm, optional
        Whose ranks; MPI.COMM_WORLD where not given. Where other threads gather on it as well, pass
        ``comm.Dup()``.
    timeout : float, optional
        Seconds to wait for other ranks. What is raised comes within twice that time, since the
        ranks that did come find out of each other who did not.

    Raises
    ------
    ImportError
        mpi4py, or an MPI, is not installed.
    TypeError, ValueError
        `comm` is none of mpi4py's, or the timeout no number of seconds.

    Examples
    --------
    Under ``mpiexec -n 4 python -m mpi4py script.py``::

        comm = fastbn.distributed.mpi(timeout=60)
        y, mean, var = fastbn.distributed.batch_norm(x, comm=comm)
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # the latter where it finds no MPI
        raise ImportError(
            f"mpi4py cannot be imported ({error}), expected it and an MPI for "
            'fastbn.distributed.mpi; install them with python -m pip install "fastbn[mpi]" mpich, '
            "or mpi4py alone where the machine has an MPI of its own"
        ) from error
    known = MPI.COMM_WORLD if comm is None else checks.distributed.of_mpi(comm, MPI.Intracomm)
    return _MPI(known, timeout)


def process_group(group: Any = None, *, timeout: float | None = None) -> Communicator:
    """A communicator on a process group of torch.distributed, of the backend gloo.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup, optional
        Whose ranks; the default group where not given, which init_process_group has made.
    timeout : float, optional
        As of `mpi`, and shorter than the group's own, which is half an hour by default.

    Raises
    ------
    ImportError
        torch is not installed.
    TypeError, ValueError
        The timeout is no number of seconds, or there is no process group.

    Examples
    --------
    Under ``torchrun --nproc-per-node 4 script.py``::

        torch.distributed.init_process_group("gloo")
        comm = fastbn.distributed.process_group(timeout=60)
    """
    try:
        import torch
        import torch.distributed
    except ImportError as error:
        raise ImportError(
            f"torch cannot be imported ({error}), expected it for "
            "fastbn.distributed.process_group; install it with python -m pip install torch"
        ) from error
    return _ProcessGroup(torch, group, timeout)
