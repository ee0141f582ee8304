"""Fixed statistics, checked, and the affine map that they make of batch norm.

``y = (x - mean) * scale + beta`` with ``scale = gamma / sqrt(var + eps)``: Ioffe & Szegedy (2015),
Algorithm 2, step 11. A frozen batch norm applies it; folding moves it into a neighbour's weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn import checks
from fastbn.backends.base import Affine, normal_scale

Vectors = dict[str, NDArray[Any] | None]

_DEFAULTS = {"mean": 0.0, "var": 1.0, "gamma": 1.0, "beta": 0.0}


def checked(mean: Any, var: Any, gamma: Any, beta: Any, owner: checks.vectors.Owner) -> Vectors:
    """The vectors as given, each with one value for a channel of `owner`."""

    def of(name: str, value: Any) -> NDArray[Any]:
        return checks.vectors.channel_vector(name, value, owner)

    return {
        "mean": checks.vectors.mean(of("mean", mean)),
        "var": checks.vectors.variance(of("var", var), nan=False),
        "gamma": None if gamma is None else of("gamma", gamma),
        "beta": None if beta is None else of("beta", beta),
    }


def affine(vectors: Vectors, eps: float, channels: int) -> Affine:
    """The affine map, as new vectors of float64."""
    mean, var, gamma, beta = (
        np.full(channels, default) if vectors[name] is None else np.array(vectors[name], np.float64)
        for name, default in _DEFAULTS.items()
    )
    return Affine(mean, normal_scale(gamma, var, eps), beta)
