"""The named tuples that the verbs return."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class BatchNormResult(NamedTuple):
    """What `fastbn.batch_norm` returns: y, and the float64 mean and biased variance it used."""

    y: NDArray[Any]
    mean: NDArray[np.float64]
    var: NDArray[np.float64]


class SkipResult(NamedTuple):
    """`BatchNormResult`, and x + skip, which y is of."""

    y: NDArray[Any]
    mean: NDArray[np.float64]
    var: NDArray[np.float64]
    sum: NDArray[Any]


class RMSNormResult(NamedTuple):
    """What `fastbn.rms_norm` returns: y, and the float64 mean square of each row."""

    y: NDArray[Any]
    mean_square: NDArray[np.float64]


class SkipRMSNormResult(NamedTuple):
    """`RMSNormResult`, and x + skip, which y is of."""

    y: NDArray[Any]
    mean_square: NDArray[np.float64]
    sum: NDArray[Any]


class RMSGradients(NamedTuple):
    """What `fastbn.rms_norm_backward` returns; dgamma is None with ``params=False``."""

    dx: NDArray[Any]
    dgamma: NDArray[Any] | None


class Statistics(NamedTuple):
    """What `fastbn.moments` returns: float64 mean and biased variance of each channel."""

    mean: NDArray[np.float64]
    var: NDArray[np.float64]


class Gradients(NamedTuple):
    """What the backward functions return; dgamma and dbeta are None with ``params=False``."""

    dx: NDArray[Any]
    dgamma: NDArray[Any] | None
    dbeta: NDArray[Any] | None


class ResidualGradients(NamedTuple):
    """`Gradients`, and what flows into the residual: dy, let through by the activation."""

    dx: NDArray[Any]
    dgamma: NDArray[Any] | None
    dbeta: NDArray[Any] | None
    dresidual: NDArray[Any]


def named(
    dx: NDArray[Any],
    dgamma: NDArray[Any] | None,
    dbeta: NDArray[Any] | None,
    dresidual: NDArray[Any] | None,
) -> Gradients | ResidualGradients:
    """The result, with a fourth field where it was asked for."""
    if dresidual is None:
        return Gradients(dx, dgamma, dbeta)
    return ResidualGradients(dx, dgamma, dbeta, dresidual)


class GradientSums(NamedTuple):
    """What `fastbn.gradient_sums` returns; those of parts add up to those of the whole."""

    dgamma: NDArray[np.float64]
    dbeta: NDArray[np.float64]
    count: float  # type: ignore[assignment]  # in place of tuple.count, which nobody misses


class SecondGradients(NamedTuple):
    """What the double backward functions return: gradients with respect to dy, x and gamma."""

    ddy: NDArray[Any]
    dx: NDArray[Any]
    dgamma: NDArray[Any]


class RunningStatistics(NamedTuple):
    """What `BatchNorm.running` returns: the layer's own arrays of a domain, to be read, or written
    in place."""

    mean: NDArray[Any]
    var: NDArray[Any]
    num_batches_tracked: NDArray[np.int64]


class PopulationStatistics(NamedTuple):
    """What `fastbn.population_statistics` returns: float64 mean and unbiased variance of each
    channel, and how many values they are of."""

    mean: NDArray[np.float64]
    var: NDArray[np.float64]
    count: float  # type: ignore[assignment]  # in place of tuple.count, which nobody misses


class Folded(NamedTuple):
    """What the folding functions return: a layer's new weight and bias."""

    weight: NDArray[Any]
    bias: NDArray[Any]
