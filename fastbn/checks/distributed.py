"""What the processes of a distributed call bring: communicators, options, and others' calls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fastbn.checks.options import option
from fastbn.checks.words import SOME, as_float, described, is_number, whole_number
from fastbn.errors import shown

GRADIENTS = ("local", "sum")


def communicator(value: Any, kind: type) -> Any:
    """What gathers arrays of all ranks."""
    if value is None:
        raise TypeError(
            "comm is None, expected a communicator; pass fastbn.distributed.mpi(), process_group() "
            "or one_process(). Copies of a layer have none: assign it, as layer.comm = comm"
        )
    if not isinstance(value, kind):
        raise TypeError(
            f"comm is {described(value)}, expected a communicator, with rank, size, timeout and "
            "allgather; make one of mpi4py's with fastbn.distributed.mpi(comm), of torch's groups "
            "with process_group(group)"
        )
    return value


def of_mpi(value: Any, kind: type) -> Any:
    """A communicator of mpi4py's, of one group of ranks."""
    if not isinstance(value, kind):
        raise TypeError(
            f"comm is {described(value)}, expected an mpi4py.MPI.{kind.__name__}; pass "
            "MPI.COMM_WORLD, or a part of it as its Split gives them"
        )
    return value


def timeout(value: Any) -> float | None:
    """Seconds to wait; None for no end."""
    if value is None:
        return None
    if not is_number(value):
        raise TypeError(
            f"timeout is {described(value)}, expected a number of seconds, above 0; pass None to "
            "wait without an end"
        )
    seconds = as_float(value)
    if not 0 < seconds < math.inf:
        raise ValueError(
            f"timeout is {seconds}, expected a finite number of seconds, above 0; pass None to "
            "wait without an end"
        )
    return seconds


def merge_every(value: Any) -> int | None:
    """How many consecutive samples have moments of their own on the way; None for a rank's all."""
    if value is None:
        return None
    remedy = "pass an int, or None for one group a rank"
    n = whole_number("merge_every", value, "a whole number of samples", remedy)
    if n < 1:
        raise ValueError(
            f"merge_every is {shown(n)}, expected 1 or more samples; pass None for one group a rank"
        )
    return n


def gradients(value: Any) -> str:
    """Of whose samples dgamma and dbeta are."""
    return option("gradients", value, GRADIENTS)


def whole_batch(**others: Any) -> None:
    """Options of a layer that do not go with statistics of several ranks."""
    for name, value in others.items():
        if value is not None:
            raise ValueError(
                f"{name} is {shown(value)}, expected None in a SyncBatchNorm, which normalizes by "
                f"the batch of all ranks; leave it out, or use BatchNorm with {name}"
            )


def ranks(numbers: Sequence[int]) -> str:
    """Some ranks, in words."""
    if len(numbers) == 1:
        return f"rank {numbers[0]}"
    more = f" and {len(numbers) - SOME} more" if len(numbers) > SOME else ""
    return f"ranks {', '.join(map(str, numbers[:SOME]))}{more}"


def late(rank: int, size: int, seconds: float, missing: Sequence[int]) -> TimeoutError:
    """Ranks that did not come within the timeout."""
    if not missing:
        return TimeoutError(
            f"rank {rank} came when the other ranks had given up after {seconds} s, expected all "
            f"{size} at the same call; look what kept it, or give a longer timeout"
        )
    return TimeoutError(
        f"rank {rank} waited {seconds} s for {ranks(missing)}, expected all {size} ranks at the "
        "same call; look whether they leave out a layer, call it in another order or have ended, "
        "or give a longer timeout"
    )


def usable(rank: int, *, is_given_up: bool) -> None:
    """A communicator whose last exchange came to its end."""
    if is_given_up:
        raise RuntimeError(
            f"comm of rank {rank} has given up an exchange that timed out, expected one whose "
            "ranks are together; end all processes, and start them again"
        )


def whole_groups(samples: Sequence[int], k: int | None) -> None:
    """Whole groups on every rank but the last that has samples; all ranks raise alike."""
    if k is None:
        return
    last = max((rank for rank, n in enumerate(samples) if n), default=0)
    for rank, n in enumerate(samples[:last]):
        if n % k:
            raise ValueError(
                f"rank {rank} has {n} samples, expected a multiple of merge_every, {k}, on every "
                f"rank but the last that has any, {last}: groups do not reach over ranks; give "
                "each rank whole groups"
            )


def refused(errors: dict[int, str], kind: type[Exception]) -> Exception:
    """Arguments that some ranks found bad; all ranks raise it."""
    return kind(_of_ranks(errors))


def apart(calls: dict[int, str]) -> Exception:
    """Calls that are not the same on all ranks; all ranks raise it."""
    return ValueError(
        "the ranks disagree, expected the same call on all; make them alike:\n" + _of_ranks(calls)
    )


def _of_ranks(texts: dict[int, str]) -> str:
    """Each text once, with the ranks that sent it."""
    senders: dict[str, list[int]] = {}
    for rank, text in texts.items():
        senders.setdefault(text, []).append(rank)
    return "\n".join(f"{ranks(some)}: {text}" for text, some in senders.items())
