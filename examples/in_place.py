"""Normalize a stream of channels-last images without a fresh array: statistics, then in place.

    python examples/in_place.py

Two sweeps over made images with a large mean: the first collects each batch's moments, the second
normalizes every batch where it lies, with the statistics of all.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

import fastbn

BATCHES, SHAPE = 8, (16, 64, 64, 3)  # N, H, W, C


def images(seed: int) -> NDArray[Any]:
    """One batch: colours around 1000, 2000 and 3000, with deviations of 5, 10 and 20."""
    rng = np.random.default_rng(seed)
    colours: NDArray[Any] = rng.standard_normal(SHAPE, np.float32)
    colours *= [5, 10, 20]
    colours += [1000, 2000, 3000]
    return colours


def main() -> None:
    each = [fastbn.moments(images(seed), layout="NHWC") for seed in range(BATCHES)]
    means = np.array([batch.mean for batch in each])
    mean = means.mean(axis=0)
    # Equal batches: the variance of all is the mean variance plus the variance of the means.
    var = np.mean([batch.var for batch in each], axis=0) + means.var(axis=0)
    print("mean     ", mean.round(2))
    print("deviation", np.sqrt(var).round(3))

    for seed in range(BATCHES):
        x = images(seed)
        y = fastbn.normalize(x, mean, var, layout="NHWC", out=x)
        assert y is x
        print(f"batch {seed}: mean {y.mean():+.4f}, deviation {y.std():.4f}")


if __name__ == "__main__":
    main()
