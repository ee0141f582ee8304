"""The verbs on a batch that lies on several ranks.

Forward, what is gathered are moments, merged in the order of ranks in pairs of pairs; backward the
sums of gradients, added in that order: every rank has the same bits. With `merge_every` they are
those of groups of samples, in the order of samples, so that the bits do not depend on how the
samples lie on ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn import checks, functional
from fastbn._batch import Batch
from fastbn.backends.base import quiet
from fastbn.distributed.communicators import Communicator
from fastbn.distributed.exchange import Share, exchange
from fastbn.distributed.shares import (
    COUNTS,
    SUMMED,
    Prepared,
    gradients_share,
    in_words,
    moments_share,
    output,
)
from fastbn.functional import ActivationName
from fastbn.layers import passes
from fastbn.results import (
    BatchNormResult,
    Gradients,
    GradientSums,
    PopulationStatistics,
    ResidualGradients,
    Statistics,
)
from fastbn.statistics import Moments, Population

Array = NDArray[Any]


def moments(
    x: Array,
    *,
    comm: Communicator,
    layout: str = "NCHW",
    where: Array | None = None,
    weights: Array | None = None,
    merge_every: int | None = None,
) -> Statistics:
    """`fastbn.moments` of the samples of all ranks.

    Parameters
    ----------
    x, layout, where, weights
        As given to `fastbn.moments`, of this rank's samples.
    comm, merge_every
        As in `batch_norm`.

    Returns
    -------
    mean, var : ndarray of float64, shape (C,)
        The same bits on every rank. Integers are exact in each group.

    Raises
    ------
    TypeError, ValueError, TimeoutError
        As of `batch_norm`.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn import distributed
    >>> distributed.moments(np.float32([[1, 7], [3, 7]]), comm=distributed.one_process())
    Statistics(mean=array([2., 7.]), var=array([1., 0.]))
    """

    def prepare() -> tuple[Share, None]:
        batch = Batch(x, layout, where, weights, types=checks.arrays.DATA)
        return moments_share(batch, merge_every, "moments"), None

    whole, _ = exchanged_moments(comm, prepare)
    return Statistics(whole.mean.copy(), whole.var.copy())


def batch_norm(
    x: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    comm: Communicator,
    eps: float = 1e-5,
    layout: str = "NCHW",
    activation: ActivationName = None,
    residual: Array | None = None,
    where: Array | None = None,
    weights: Array | None = None,
    merge_every: int | None = None,
    out: Array | None = None,
) -> BatchNormResult:
    """`fastbn.batch_norm` of this rank's samples, by the statistics of those of all ranks.

    ``y = gamma * (x - mean) / sqrt(var + eps) + beta``. All ranks call it, in the same order as
    other calls with `comm`; those without samples pass an array of none.

    Parameters
    ----------
    x, gamma, beta, eps, layout, activation, residual, where, weights, out
        As given to `fastbn.batch_norm`, of this rank's samples; x's dtype, eps, layout and
        activation are the same on all ranks, and gamma and beta should be.
    comm : Communicator
        What `mpi`, `process_group` or `one_process` gave.
    merge_every : int, optional
        Gather the moments of every so many consecutive samples, and merge them in the order of
        samples: mean, var and y are then the same bits, on however many ranks the samples lie.
        Every rank but the last that has samples must have whole groups. Where not given, what is
        gathered are the moments of each rank.

    Returns
    -------
    y : ndarray
        As `fastbn.batch_norm` returns it.
    mean, var : ndarray of float64, shape (C,)
        Of all ranks' samples, the same bits on every rank.

    Raises
    ------
    TypeError, ValueError
        An argument is bad on some rank, or ranks disagree: the same error on all, which names
        them. Nothing has been written.
    TimeoutError
        A rank did not come, and the communicator has a timeout.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn import distributed
    >>> comm = distributed.one_process()
    >>> y, mean, var = distributed.batch_norm(np.eye(4), comm=comm, merge_every=2)
    >>> mean
    array([0.25, 0.25, 0.25, 0.25])
    """
    fused: dict[str, Any] = {"activation": activation, "residual": residual, "out": out}

    def prepare() -> tuple[Share, tuple[Batch, Array]]:
        batch = Batch(x, layout, where, weights)
        y = output(batch, gamma, beta, fused)
        call = f"batch_norm({in_words(batch, eps, activation)})"
        return moments_share(batch, merge_every, call), (batch, y)

    whole, (batch, y) = exchanged_moments(comm, prepare)
    if out is None:
        fused["out"] = y
    if not whole.count:
        return passes.batch_norm(batch, None, gamma, beta, eps, fused)
    mean, var = whole.mean.copy(), whole.var.copy()
    vectors = {"mean": mean, "var": var, "gamma": gamma, "beta": beta}
    y = passes.normalize(batch, None, vectors, eps, fused, is_fixed=False)
    return BatchNormResult(y, mean, var)


def batch_norm_backward(
    dy: Array,
    x: Array,
    mean: Array,
    var: Array,
    gamma: Array | None = None,
    *,
    comm: Communicator,
    eps: float = 1e-5,
    layout: str = "NCHW",
    params: bool = True,
    activation: ActivationName = None,
    y: Array | None = None,
    dresidual: bool | Array = False,
    where: Array | None = None,
    weights: Array | None = None,
    merge_every: int | None = None,
    gradients: str = "local",
    out: Array | None = None,
) -> Gradients | ResidualGradients:
    """`fastbn.batch_norm_backward` of this rank's samples, through the statistics of all ranks'.

    ``dx = gamma / sqrt(var + eps) * (dy - mean(dy) - xhat * mean(dy * xhat))``, the means over the
    samples of all ranks.

    Parameters
    ----------
    dy, x, mean, var, gamma, eps, layout, params, activation, y, dresidual, where, weights, out
        As given to `fastbn.batch_norm_backward`, of this rank's samples; mean and var as
        `batch_norm` returned them.
    comm, merge_every
        As in `batch_norm`. With `merge_every` dx, and summed gradients, are the same bits on
        however many ranks the samples lie.
    gradients : {"local", "sum"}
        Whether dgamma and dbeta are sums over this rank's samples, as a trainer wants them that
        adds up or averages the gradients of all parameters; or over those of all ranks.

    Returns
    -------
    dx, dgamma, dbeta, dresidual
        As `fastbn.batch_norm_backward` returns them.

    Raises
    ------
    TypeError, ValueError, TimeoutError
        As of `batch_norm`.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn import distributed
    >>> comm, x = distributed.one_process(), np.eye(4)
    >>> y, mean, var = distributed.batch_norm(x, comm=comm)
    >>> distributed.batch_norm_backward(np.ones((4, 4)), x, mean, var, comm=comm).dbeta
    array([4., 4., 4., 4.])
    """
    options: dict[str, Any] = {"eps": eps, "layout": layout, "activation": activation}
    options |= {"where": where, "weights": weights}
    wanted: dict[str, Any] = {"params": params, "y": y, "dresidual": dresidual, "out": out}

    def prepare() -> tuple[Share, Prepared]:
        by = merge_every, checks.distributed.gradients(gradients)
        return gradients_share(dy, x, mean, var, gamma, options, wanted, *by)

    rows, kept = exchange(_checked(comm), SUMMED, prepare)
    total, own = (_sums(_added(some)) for some in (rows, kept.rows))
    given = options | kept.wanted | {"sums": total if total.count else None}
    found: Any = functional.batch_norm_backward(dy, x, mean, var, gamma, **given)
    if found.dgamma is not None and total.count and kept.gradients == "local":
        found = _with_parameters(found, own)
    result: Gradients | ResidualGradients = found
    return result


def population_statistics(
    batches: Iterable[Array], *, comm: Communicator, layout: str = "NCHW"
) -> PopulationStatistics:
    """`fastbn.population_statistics` over the batches of all ranks, ``method="exact"``.

    Parameters
    ----------
    batches : iterable of ndarray
        This rank's, as many as it has; none will do.
    comm
        As in `batch_norm`.
    layout
        As given to `fastbn.population_statistics`.

    Returns
    -------
    mean, var : ndarray of float64, shape (C,)
        var is unbiased.
    count : int
        Values of a channel, on all ranks.

    Raises
    ------
    TypeError, ValueError, TimeoutError
        As of `batch_norm`, or there are fewer than two values a channel on all ranks together.
    RuntimeError
        `batches` raised something else on some rank; it names both.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn import distributed
    >>> batches = np.float32([[[1], [2]], [[3], [4]]])
    >>> distributed.population_statistics(batches, comm=distributed.one_process()).mean
    array([2.5])
    """

    def prepare() -> tuple[Share, None]:
        population = Population("exact")
        checks.statistics.reiterable(batches)
        for x in batches:
            population.add_batch(Batch(x, layout, types=checks.arrays.DATA))
        merged = population.merged
        call = f"population_statistics(layout={checks.options.layout(layout)!r})"
        if merged is None:
            return Share(call, None, 0, None, np.zeros((0, COUNTS))), None
        return Share(call, len(merged.mean), 1, None, merged.to_array()[None]), None

    whole, _ = exchanged_moments(comm, prepare)
    population = Population("exact")
    population.add(whole)
    return population.statistics("batches")


def exchanged_moments(comm: Any, prepare: Any) -> tuple[Moments, Any]:
    """The moments of all ranks' samples, and what this rank kept."""
    rows, kept = exchange(_checked(comm), COUNTS, prepare)
    return _merged([Moments.from_array(row) for row in rows], rows.shape[1] // 2 - 1), kept


def _merged(parts: list[Moments], channels: int) -> Moments:
    """The moments of all, merged in their order in pairs of pairs, which rounds least."""
    if not parts:
        return Moments(0, *np.zeros((2, channels)))
    while len(parts) > 1:
        pairs = [a.merge(b) for a, b in zip(parts[::2], parts[1::2], strict=False)]
        parts = pairs + parts[2 * len(pairs) :]
    return parts[0]


def _checked(comm: Any) -> Communicator:
    known: Communicator = checks.distributed.communicator(comm, Communicator)
    return known


@quiet
def _added(rows: Array) -> Array:
    """Rows of sums, added in their order."""
    return reduce(np.add, rows, np.zeros(rows.shape[1]))


def _sums(row: Array) -> GradientSums:
    dgamma, dbeta = row[SUMMED:].reshape(2, -1)
    return GradientSums(dgamma, dbeta, float(row[0]))


@quiet
def _with_parameters(found: Any, sums: GradientSums) -> Any:
    """A backward's result with these gradients of gamma and beta, in their type."""
    dtype = found.dgamma.dtype
    return found._replace(dgamma=sums.dgamma.astype(dtype), dbeta=sums.dbeta.astype(dtype))
