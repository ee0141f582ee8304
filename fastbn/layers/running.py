"""Running statistics: what training keeps of its batches, and evaluation goes by.

1. ``running = (1 - p) * running + p * statistic``, p the weight of the new batch: momentum, or
   1 - decay, or 1 / batches where momentum is None, which averages all batches so far.
2. What a batch makes of them is computed apart from writing it, so that a layer may look at it
   before anything is written.
3. While statistics are estimated anew (reestimation.py), `observe` takes each call's moments, and
   no call changes the running ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn import checks
from fastbn.backends.base import quiet
from fastbn.layers.base import write
from fastbn.statistics import Moments

Array = NDArray[Any]

MOMENTUM = 0.1
"""The default, told from an explicit 0.1 by its identity."""
NAMES = "running_mean", "running_var", "num_batches_tracked"
"""PyTorch's names of what runs, and ours."""


class RunningStatistics:
    """A layer's running mean and variance, and of how many batches they are; None where there are
    none."""

    def __init__(self, channels: int, dtype: str, tracks: bool, momentum: Any, decay: Any) -> None:
        self.channels = channels
        self.momentum, self.decay = checks.layers.momentum(momentum, decay, MOMENTUM)
        self.mean: Array | None = np.zeros(channels, dtype) if tracks else None
        self.var: Array | None = np.ones(channels, dtype) if tracks else None
        self.batches: Array | None = np.array(0) if tracks else None
        self.observe: Callable[[Moments], None] | None = None

    @property
    def exist(self) -> bool:
        """Whether there are any."""
        return self.mean is not None

    def checked(self, *, writes: bool, nan: bool = False) -> tuple[Array, Array]:
        """Mean and variance, fit to be used or to be renewed; what is not finite is let in where
        `nan` says so."""
        held = self.mean, self.var, self.batches
        return checks.layers.running(*held, self.channels, writes=writes, nan=nan)

    @quiet
    def average(self, mean: Array, var: Array) -> dict[str, Array]:
        """What a batch with these statistics makes of them, by name, each rounded once."""
        batches = 1
        if self.batches is not None:
            batches = min(int(self.batches) + 1, checks.layers.MOST_BATCHES)
        if self.decay is not None:
            new, old = 1 - self.decay, self.decay
        else:
            new = 1 / batches if self.momentum is None else self.momentum
            old = 1 - new
        averaged = {} if self.batches is None else {"num_batches_tracked": np.array(batches)}
        for name, statistic in zip(NAMES, (mean, var), strict=False):
            running = self._held[name]
            average = old * running.astype(np.float64) + new * statistic
            averaged[name] = average.astype(running.dtype)
        return averaged

    @property
    def _held(self) -> dict[str, Any]:
        return dict(zip(NAMES, (self.mean, self.var, self.batches), strict=True))

    def renew(self, averaged: dict[str, Array]) -> None:
        """Write what `average` gave."""
        write([self._held[name] for name in averaged], list(averaged.values()))

    def replace(self, mean: Array, var: Array) -> None:
        """Put estimated statistics in place of these, whatever those were."""
        write(self.checked(writes=True, nan=True), [mean, var])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"observe": None}


def group_counts(samples: int, n: float, k: int | None) -> Array:
    """Effective numbers of values of a channel in each group, of so many in the batch."""
    if k is None or not n:
        return np.array([n], np.float64)
    sizes = np.full(-(-samples // k), float(k))
    sizes[-1] -= len(sizes) * k - samples
    return sizes * (n / samples)


@quiet
def over_groups(statistic: Array, counts: Array) -> Array:
    """The mean over groups, by their counts; those of one value are left out where there are
    others."""
    if len(counts) == 1:
        return statistic.reshape(-1)
    kept = counts > 1 if (counts > 1).any() else counts > 0
    weights = counts[kept] / counts[kept].sum()
    return np.asarray((weights[:, None] * statistic.reshape(len(counts), -1)[kept]).sum(0))
