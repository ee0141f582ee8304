"""The verbs on a batch that a layer has checked; where all of it counts, by their plain entries."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from fastbn import _run, functional
from fastbn._batch import Batch
from fastbn._call import Call
from fastbn.config import current
from fastbn.results import BatchNormResult, Statistics

Array = NDArray[Any]


def moments(batch: Batch, k: int | None) -> Statistics:
    """Of the batch, or of each k samples."""
    if batch.counts_all:
        return functional.moments(batch.array, layout=batch.layout, virtual_batch=k)
    return _run.moments(Call(current(), batch, virtual_batch=k))


def batch_norm(
    batch: Batch, k: int | None, gamma: Any, beta: Any, eps: float, fused: dict[str, Any]
) -> BatchNormResult:
    """By the batch's own statistics."""
    if batch.counts_all:
        options: dict[str, Any] = {"eps": eps, "layout": batch.layout, "virtual_batch": k}
        return functional.batch_norm(batch.array, gamma, beta, **options, **fused)
    call = Call(current(), batch, virtual_batch=k, gamma=gamma, beta=beta)
    return _run.batch_norm(call, eps, **fused)


def normalize(
    batch: Batch,
    k: int | None,
    vectors: dict[str, Any],
    eps: float,
    fused: dict[str, Any],
    *,
    is_fixed: bool,
) -> Array:
    """By mean, var, gamma and beta as given; NaN stays in its channel where they are the batch's
    own."""
    if is_fixed and batch.counts_all:
        options: dict[str, Any] = {"eps": eps, "layout": batch.layout}
        return functional.normalize(batch.array, **vectors, **options, **fused)
    call = Call(current(), batch.unweighed(), virtual_batch=k, is_fixed=is_fixed, **vectors)
    return _run.normalize(call, eps, **fused)
