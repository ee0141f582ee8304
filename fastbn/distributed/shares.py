"""What a rank brings to an exchange: the checked arguments of a call, and a row for each group of
samples."""

from __future__ import annotations

from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from fastbn import checks, functional
from fastbn._batch import Batch
from fastbn._call import Call
from fastbn.config import current
from fastbn.distributed.exchange import Share
from fastbn.statistics import Moments

Array = NDArray[Any]

COUNTS, SUMMED = 2, 1
"""Numbers before the two vectors in a row: of moments, and of sums of gradients."""


class Prepared(NamedTuple):
    """What a rank keeps of a backward while the sums are gathered."""

    wanted: dict[str, Any]
    """What there is to be written, made beforehand, and a checked y."""
    rows: Array
    gradients: str


def groups(batch: Batch, k: int | None) -> list[tuple[slice, Batch]]:
    """Every k samples of a batch, or all of them as one group; none of a batch without samples."""
    n = len(batch.array)
    found = []
    for start in range(0, n, k or max(n, 1)):
        some = slice(start, start + (k or n))
        where, weights = (None if a is None else a[some] for a in (batch.where, batch.weights))
        of_group = batch.array[some], batch.layout, where, weights
        found.append((some, Batch(*of_group, types=checks.arrays.DATA)))
    return found


def moments_share(batch: Batch, merge_every: Any, call: str) -> Share:
    """The moments of a checked batch's groups."""
    k = checks.distributed.merge_every(merge_every)
    rows = [Moments._of(some).to_array() for _, some in groups(batch, k)]
    table = np.reshape(rows, (-1, COUNTS + 2 * batch.channels))
    return Share(f"{call}, merge_every={k}", batch.channels, len(batch.array), k, table)


def output(batch: Batch, gamma: Any, beta: Any, fused: dict[str, Any]) -> Array:
    """Where y goes, once all arguments of a forward are checked."""
    call = Call(current(), batch, gamma=gamma, beta=beta)
    epilogue = call.epilogue(fused["activation"], fused["residual"])
    in_place = {"x": batch.array, "residual": epilogue and epilogue.residual}
    return call.output("out", fused["out"], in_place)


def fingerprint(*arrays: Any) -> str:
    """Arrays in eight digits, to be compared with those of other ranks."""
    return f"{crc32(b''.join(np.asarray(a).tobytes() for a in arrays)):08x}"


def in_words(batch: Batch, eps: Any, activation: Any) -> str:
    """What has to be the same on all ranks, in words."""
    dtype, name = batch.array.dtype.name, checks.options.activation_name(activation)
    words = f"x={dtype}, layout={batch.layout!r}, eps={checks.options.epsilon(eps)!r}"
    return f"{words}, activation={name!r}"


def gradients_share(
    dy: Any,
    x: Any,
    mean: Array,
    var: Array,
    gamma: Any,
    options: dict[str, Any],
    wanted: dict[str, Any],
    merge_every: Any,
    gradients: str,
) -> tuple[Share, Prepared]:
    """The sums of a backward's groups, once all its arguments are checked. `wanted`: params, y,
    dresidual and out, as they were given."""
    batch = Batch(x, options["layout"], options["where"], options["weights"])
    vectors: dict[str, Any] = {"gamma": gamma, "mean": mean, "var": var}
    call = Call(current(), batch, is_fixed=False, is_part=True, **vectors)
    dy, given = checks.arrays.companion("dy", dy, "x", batch.array), dict(wanted)
    given["params"] = checks.options.flag("params", wanted["params"])
    activation, dresidual, out = options["activation"], wanted["dresidual"], wanted["out"]
    _, given["y"] = checks.arrays.activation_grad(wanted["y"], activation, "x", batch.array)
    grad, dx = call.backward_outputs(activation, given["y"], dresidual, out, dy, batch.array)
    if out is None:
        given["out"] = dx
    if dresidual is True and grad is not None:
        given["dresidual"] = grad.dresidual
    k = checks.distributed.merge_every(merge_every)
    rows = _gradient_rows(batch, k, dy, given["y"], mean, var, options)
    statistics = f"statistics={fingerprint(mean, var)}, merge_every={k}"
    words = f"batch_norm_backward({in_words(batch, options['eps'], activation)}), {statistics}"
    share = Share(words, batch.channels, len(dy), k, rows)
    return share, Prepared(given, rows, gradients)


def _gradient_rows(
    batch: Batch,
    k: int | None,
    dy: Array,
    y: Array | None,
    mean: Array,
    var: Array,
    options: dict[str, Any],
) -> Array:
    """The sums of a checked batch's groups."""
    rows = []
    for some, group in groups(batch, k):
        apart: dict[str, Any] = {"where": group.where, "weights": group.weights}
        apart["y"] = None if y is None else y[some]
        found = functional.gradient_sums(dy[some], group.array, mean, var, **(options | apart))
        rows.append(np.concatenate([[found.count], found.dgamma, found.dbeta]))
    return np.reshape(rows, (-1, SUMMED + 2 * batch.channels))
