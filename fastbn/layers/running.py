"""Running statistics: what training keeps of its batches, and evaluation goes by.

1. ``running = (1 - p) * running + p * statistic``, p the weight of the new batch: momentum, or
   1 - decay, or 1 / batches where momentum is None, which averages all batches so far.
2. What a batch makes of them is computed apart from writing it, so that a layer may look at it
   before anything is written.
3. While statistics are estimated anew (reestimation.py), `observe` takes each call's moments, and
   no call changes the running ones.
4. A layer has one set of them or, with domains, one for each, which share its rule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

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


class Rule(NamedTuple):
    """What a new batch weighs: momentum, or 1 - decay; with neither, as much as each before it."""

    momentum: float | None
    decay: float | None

    def weights(self, batches: int) -> tuple[float, float]:
        """Those of the old statistics and of the new ones, of which there are so many by now."""
        if self.decay is not None:
            return self.decay, 1 - self.decay
        new = 1 / batches if self.momentum is None else self.momentum
        return 1 - new, new


class Running:
    """A running mean and variance, and of how many batches they are; None where there are none."""

    def __init__(self, channels: int, dtype: str, *, tracks: bool, domain: str | None) -> None:
        self.channels = channels
        self.names = NAMES if domain is None else tuple(f"{name}.{domain}" for name in NAMES)
        self.mean: Array | None = np.zeros(channels, dtype) if tracks else None
        self.var: Array | None = np.ones(channels, dtype) if tracks else None
        self.batches: Array | None = np.array(0) if tracks else None
        self.observe: Callable[[Moments], None] | None = None
        self.is_frozen = False
        """Whether they are estimated already, and calls go by them until all are."""

    @property
    def exist(self) -> bool:
        """Whether there are any."""
        return self.mean is not None

    @property
    def held(self) -> dict[str, Any]:
        """The arrays, by name."""
        return dict(zip(self.names, (self.mean, self.var, self.batches), strict=True))

    def checked(self, *, writes: bool, nan: bool = False, of: str = "") -> tuple[Array, Array]:
        """Mean and variance, fit to be used or to be renewed; what is not finite is let in where
        `nan` says so. `of` tells whose, in names."""
        held = self.held
        if of:
            held = {f"{of}{name}": a for name, a in held.items()}
        return checks.layers.running(held, self.channels, writes=writes, nan=nan)

    @quiet
    def average(self, mean: Array, var: Array, rule: Rule) -> dict[str, Array]:
        """What a batch with these statistics makes of them, by name, each rounded once."""
        batches, averaged = 1, {}
        if self.batches is not None:
            batches = min(int(self.batches) + 1, checks.layers.MOST_BATCHES)
            averaged[self.names[2]] = np.array(batches)
        (old, new), held = rule.weights(batches), self.held
        for name, statistic in zip(self.names, (mean, var), strict=False):
            running = held[name]
            average = old * running.astype(np.float64) + new * statistic
            averaged[name] = average.astype(running.dtype)
        return averaged

    def renew(self, averaged: dict[str, Array]) -> None:
        """Write what `average` gave."""
        held = self.held
        write([held[name] for name in averaged], list(averaged.values()))

    def replace(self, mean: Array, var: Array) -> None:
        """Put estimated statistics in place of these, whatever those were."""
        write(self.checked(writes=True, nan=True), [mean, var])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"observe": None, "is_frozen": False}


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
