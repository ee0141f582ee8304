"""What the ranks of a communicator share that run cases together.

Every rank makes the same whole batch, of which it takes its own samples, and compares with what one
process makes of the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import ml_dtypes
import numpy as np

from fastbn.distributed import Communicator
from oracle.arrays import Array, to_layout

SAMPLES, CHANNELS, SIDE, K = 13, 3, 4, 4
SHARES = {
    "unequal": {1: [13], 2: [8, 5], 3: [8, 4, 1]},
    "empty last": {1: [13], 2: [13, 0], 3: [8, 5, 0]},
    "empty first": {1: [13], 2: [0, 13], 3: [0, 12, 1]},
    "empty between": {1: [13], 2: [8, 5], 3: [8, 0, 5]},
}
"""How many of the samples each rank has; all but the last have whole groups of K."""
TYPES = np.float32, np.float64, np.float16, ml_dtypes.bfloat16
MORE = 1 + 2 * 3 * 2.0**-52 / 1e-12
"""What bounds grow by where moments and sums of three parts are merged and added."""

CASES: list[Callable[[Communicator], None]] = []


def case(function: Callable[[Communicator], None]) -> Callable[[Communicator], None]:
    """One of `CASES`."""
    CASES.append(function)
    return function


def own(comm: Communicator, share: str = "unequal") -> slice:
    """The rank's samples of the whole."""
    ends = [0, *accumulate(SHARES[share][comm.size])]
    return slice(ends[comm.rank], ends[comm.rank + 1])


def whole(dtype: Any = np.float32, layout: str = "NCHW", seed: int = 0) -> tuple[Array, Array]:
    """x and dy of all ranks."""
    rng = np.random.default_rng(seed)
    x, dy = rng.normal(2, 3, (2, SAMPLES, CHANNELS, SIDE, SIDE))
    x[SAMPLES // 2 :] += 5  # ranks differ in mean
    return to_layout(x.astype(dtype), layout), to_layout(dy.astype(dtype), layout)


def parameters() -> tuple[Array, Array]:
    """gamma and beta."""
    return np.array([0.5, 2, -1], np.float32), np.array([1, 0, 3], np.float32)


def together(comm: Communicator, a: Array) -> Array:
    """The parts of all ranks, one after the other."""
    sizes = comm.allgather(np.array(len(a)))
    padded = np.zeros((int(sizes.max()), *a.shape[1:]), a.dtype)
    padded[: len(a)] = a
    words = comm.allgather(np.ascontiguousarray(padded).view(np.uint8))
    return np.concatenate([part.view(a.dtype)[:n] for part, n in zip(words, sizes, strict=True)])


def outcome(comm: Communicator, call: Callable[[], object]) -> str:
    """The error of a call, the same on all ranks."""
    try:
        call()
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
    else:
        text = "no error"
    texts = together(comm, np.array([text], "U2000"))
    assert len(set(texts)) == 1, list(texts)
    return text


def refused(comm: Communicator, call: Callable[[], object], *words: str) -> None:
    """The call raises the same on all ranks, with these words in this order."""
    text = rest = outcome(comm, call)
    for word in words:
        _, found, rest = rest.partition(word)
        assert found, f"{word!r} is not in {text!r}"
