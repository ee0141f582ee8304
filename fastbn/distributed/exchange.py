"""An exchange: every rank's share of a call, checked and gathered.

1. All of a rank's own work is done before, so that whatever is wrong there can be told to the
   others: after the exchange all ranks know the same, and raise the same or nothing.
2. First a header of fixed size is gathered: whether the rank's arguments are good, its channels,
   samples and rows, and a hash of the call, which has to be the same on all. Then the rows, padded
   to the largest number of them. Where the headers tell of an error, the ranks' words about it are
   gathered in place of the rows: two gathers in any case.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b
from typing import Any, NamedTuple, NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray

from fastbn import checks
from fastbn.distributed.communicators import Communicator

Array = NDArray[Any]
Kept = TypeVar("Kept")

KINDS: tuple[type[Exception], ...] = (TypeError, ValueError, RuntimeError)
"""What is raised on all ranks, by its number in a header, from 1 on."""


class Share(NamedTuple):
    """What a rank brings."""

    call: str
    """The call in words: the same on all ranks."""
    channels: int | None
    """None where the rank has seen no array."""
    samples: int
    merge_every: int | None
    rows: Array
    """Float64, in the order of samples, a row for each group: some counts and two vectors."""


class Header(NamedTuple):
    """Of one rank, or as columns of all; each a number of 64 bits."""

    error: Any
    """0, or which of `KINDS`."""
    channels: Any
    """-1 where they are not known."""
    samples: Any
    rows: Any
    text_bytes: Any
    hash: Any


def exchange(
    comm: Communicator, counts: int, prepare: Callable[[], tuple[Share, Kept]]
) -> tuple[Array, Kept]:
    """All ranks' rows, of `counts` and two vectors each, in the order of ranks; and what this rank
    kept beside its share."""
    try:
        share, kept = prepare()
    except Exception as error:
        refuse(comm, error)
    known = share.channels is not None
    text = f"{share.call}, {share.channels} channels" if known else f"{share.call}, no array"
    own = Header(0, share.channels if known else -1, share.samples, len(share.rows), 0, 0)
    headers = _agreed(comm, own, share.call, text)
    checks.distributed.whole_groups(headers.samples.tolist(), share.merge_every)
    channels = max(headers.channels.max(), 0)
    padded = np.zeros((max(headers.rows.max(), 1), counts + 2 * channels))
    if own.rows:
        padded[: own.rows] = share.rows
    gathered = comm.allgather(padded)
    return np.concatenate([a[:n] for a, n in zip(gathered, headers.rows, strict=True)]), kept


def refuse(comm: Communicator, error: Exception) -> NoReturn:
    """Tell the other ranks, which are at an exchange, that this one's arguments are bad; all raise
    the same."""
    kind = next(i for i, each in enumerate(KINDS, 1) if i == len(KINDS) or type(error) is each)
    text = str(error) if kind < len(KINDS) else f"{type(error).__name__}: {error}"
    try:
        _agreed(comm, Header(kind, -1, 0, 0, 0, 0), "", text)
    except KINDS as same:
        raise same from error
    raise AssertionError("headers with an error are never agreed")


def _agreed(comm: Communicator, own: Header, call: str, text: str) -> Header:
    """The headers of all ranks, whose arguments are good and whose calls are the same."""
    message = text.encode(errors="replace")
    digest = int.from_bytes(blake2b(call.encode(), digest_size=8).digest(), signed=True)
    own = own._replace(text_bytes=len(message), hash=digest)
    headers = Header(*comm.allgather(np.array(own, np.int64)).T)
    known = headers.channels[headers.channels >= 0]
    bad = np.flatnonzero(headers.error).tolist()
    if not bad and all((a == a[:1]).all() for a in (headers.hash, known)):
        return headers
    padded = np.zeros(headers.text_bytes.max(), np.uint8)
    padded[: len(message)] = np.frombuffer(message, np.uint8)
    gathered = comm.allgather(padded)
    texts = {
        rank: a[:n].tobytes().decode(errors="replace")
        for rank, (a, n) in enumerate(zip(gathered, headers.text_bytes, strict=True))
    }
    if bad:
        kind = KINDS[headers.error[bad[0]] - 1]
        raise checks.distributed.refused({rank: texts[rank] for rank in bad}, kind)
    raise checks.distributed.apart(texts)
