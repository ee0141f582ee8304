"""``python -m benchmarks.fold_or_fuse``: what follows a convolution, folded or fused.

A folded batch norm leaves a bias to add, and perhaps ReLU; NumPy needs a pass over memory for each.
`FrozenBatchNorm` does all of it in one. In place, of (N, 32, 32, 32) in float32, as it comes out of
a convolution; medians over rounds in which the ways take turns.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fastbn

CHANNELS = 32
BATCHES = (1, 4, 32)
ROUNDS = 201

Way = Callable[[], Any]


def ways(x: NDArray[np.float32]) -> dict[str, Way]:
    """Each way to finish x, in place."""
    rng = np.random.default_rng(1)
    mean, gamma, beta = rng.normal(size=(3, CHANNELS))
    var = rng.uniform(0.5, 2, CHANNELS)
    bias = rng.normal(size=(CHANNELS, 1, 1)).astype(x.dtype)
    norm = fastbn.FrozenBatchNorm(mean, var, gamma, beta)
    relu = fastbn.FrozenBatchNorm(mean, var, gamma, beta, activation="relu")

    def bias_and_relu() -> None:
        np.add(x, bias, out=x)
        np.maximum(x, 0, out=x)

    return {
        "folded: bias": lambda: np.add(x, bias, out=x),
        "not folded: FrozenBatchNorm": lambda: norm(x, out=x),
        "folded: bias and ReLU": bias_and_relu,
        "not folded: FrozenBatchNorm with ReLU": lambda: relu(x, out=x),
    }


def microseconds(batch: int, rounds: int) -> dict[str, float]:
    """The median time of each way."""
    x = np.random.default_rng(0).normal(size=(batch, CHANNELS, 32, 32)).astype(np.float32)
    fresh, all_ways = x.copy(), ways(x)
    taken: dict[str, list[float]] = {name: [] for name in all_ways}
    for _ in range(rounds):
        for name, way in all_ways.items():
            way()  # wakes threads and fills caches
            np.copyto(x, fresh)
            start = perf_counter()
            way()
            taken[name].append(perf_counter() - start)
    return {name: median(seconds) * 1e6 for name, seconds in taken.items()}


def main(rounds: int = ROUNDS) -> None:
    """Print a row for each way, in microseconds of each batch."""
    columns = [microseconds(batch, rounds) for batch in BATCHES]
    print(f"us of batches {BATCHES}, {fastbn.get_num_threads()} threads")
    for name in columns[0]:
        print(f"{name:40}", *(f"{column[name]:7.1f}" for column in columns))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
