"""Batch norm as a layer of which every rank has one: what `BatchNorm` does, by the whole batch.

A training call exchanges moments, and then goes on as `BatchNorm` does with them in place of the
batch's own: so running statistics, `one_value` and `nonfinite` go by the samples of all ranks.
Calls that go by running statistics, and evaluation without any, are this rank's alone.
"""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from fastbn import checks
from fastbn._batch import Batch
from fastbn.distributed import shares, verbs
from fastbn.distributed.communicators import Communicator
from fastbn.distributed.exchange import Share, refuse
from fastbn.layers.batch_norm import BatchNorm
from fastbn.layers.running import Running
from fastbn.layers.saved import Saved
from fastbn.statistics import Moments

Array = NDArray[Any]


class SyncBatchNorm(BatchNorm):
    """A `fastbn.BatchNorm` that normalizes, in training, by the statistics of all ranks' samples.

    ``y = activation(gamma * (x - mean) / sqrt(var + eps) + beta + residual)``, mean and variance
    over the samples of all ranks; the running statistics renewed by them are the same bits on every
    rank. Each rank has such a layer, made alike, and calls it as often as the others do, in the
    same order, with no samples where it has none. Evaluation, and calls with `frozen_statistics`,
    are a rank's own affair.

    Parameters
    ----------
    channels : int
        As given to `BatchNorm`.
    comm : Communicator
        What `mpi`, `process_group` or `one_process` gave. It may be assigned later; copies and
        pickles of the layer have None.
    merge_every : int, optional
        As given to `fastbn.distributed.batch_norm`: results are the same bits, on however many
        ranks the samples lie.
    gradients : {"local", "sum"}
        As given to `fastbn.distributed.batch_norm_backward`.
    **options
        As given to `BatchNorm`, but for `virtual_batch` and `renormalization`.

    Attributes
    ----------
    comm, merge_every, gradients
        As given; they may be set.

    All others are those of `BatchNorm`. `one_value` is about one value a channel on all ranks
    together, `nonfinite` about the statistics of all; `fastbn.reestimate`, called on all ranks with
    as many batches each, gives the statistics of all.

    Raises
    ------
    TypeError, ValueError, TimeoutError
        As of `BatchNorm`; in training calls and their backwards as of
        `fastbn.distributed.batch_norm`.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn import distributed
    >>> bn = distributed.SyncBatchNorm(3, comm=distributed.one_process(), momentum=1.0)
    >>> y = bn(np.float32([[1, 2, 3], [3, 4, 5]]))
    >>> dx = bn.backward(np.ones_like(y))
    >>> bn.running_mean, bn.dbeta
    (array([2., 3., 4.], dtype=float32), array([2., 2., 2.], dtype=float32))
    """

    def __init__(
        self,
        channels: int,
        *,
        comm: Communicator,
        merge_every: int | None = None,
        gradients: str = "local",
        **options: Any,
    ) -> None:
        super().__init__(channels, **options)
        self._check_whole()
        self.comm: Communicator | None = checks.distributed.communicator(comm, Communicator)
        self.merge_every = checks.distributed.merge_every(merge_every)
        self.gradients = checks.distributed.gradients(gradients)

    def _check_whole(self) -> None:
        """Refuse options that are about parts of a batch, or of one process."""
        others = {"virtual_batch": self.virtual_batch, "renormalization": self.renormalization}
        checks.distributed.whole_batch(**others)

    def _exchanges(self, running: Running) -> bool:
        """Whether a call by these running statistics takes part in an exchange."""
        if running.observe is not None:
            return True
        return self.training and not self.frozen_statistics and not running.is_frozen

    def _others_wait(self) -> bool:
        """Whether the other ranks are at an exchange, as far as this one can tell."""
        return any(map(self._exchanges, self._running.values()))

    def _takes_part(self, domain: Any) -> bool:
        """Whether a call takes part in an exchange, if only to tell that it is bad."""
        try:
            return self._exchanges(self._running_of(domain))
        except (TypeError, ValueError):
            return self._others_wait()

    def _forward(
        self,
        x: Any,
        residual: Any,
        where: Any,
        weights: Any,
        out: Any,
        domain: Any,
        update: Any,
        whole: Moments | None = None,
    ) -> tuple[Array, Saved]:
        given = {"residual": residual, "out": out, "activation": self.activation}

        def prepare() -> tuple[Share, Array]:
            batch = Batch(x, self.layout, where, weights, made_for=("SyncBatchNorm", self.channels))
            call = self._call(batch, domain, checks.options.flag("update", update))
            y = shares.output(batch, self.gamma, self.beta, given)
            return shares.moments_share(batch, self.merge_every, call), y

        if self._takes_part(domain):
            found, y = verbs.exchanged_moments(self.comm, prepare)
            whole, out = found if found.count else None, y if out is None else out
        return super()._forward(x, residual, where, weights, out, domain, update, whole)

    def _call(self, batch: Batch, domain: Any, update: bool) -> str:
        """A training call in words, with all that has to be the same on every rank."""
        self._check_whole()
        running = self._running_of(domain)
        told: dict[str, Any] = {"x": batch.array.dtype.name, "layout": batch.layout}
        told |= {"eps": checks.options.epsilon(self.eps), "activation": self.activation}
        told |= {"one_value": self.one_value, "unbiased": self.unbiased, "update": update}
        known = checks.options.option("nonfinite", self.nonfinite, checks.layers.NONFINITE)
        told |= {"nonfinite": known, "domain": domain}
        if running.exist:
            writes = update and running.observe is None
            running.checked(writes=writes, nan=known == "update")
            told["running statistics"] = shares.fingerprint(*running.held.values())
        return f"SyncBatchNorm({', '.join(f'{name}={a}' for name, a in told.items())})"

    def _going_back(self, dy: Any, saved: Any, accumulate: Any) -> tuple[Saved, dict[str, Any]]:
        try:
            return super()._going_back(dy, saved, accumulate)
        except (TypeError, ValueError) as error:
            known = self._last if saved is None else saved
            is_part = known.is_part if isinstance(known, Saved) else self._others_wait()
            if not is_part:
                raise
            refuse(checks.distributed.communicator(self.comm, Communicator), error)

    def _gradients(self, dy: Array, saved: Saved, options: dict[str, Any]) -> Any:
        if not saved.is_part:
            return super()._gradients(dy, saved, options)
        given: Any = dy, saved.x, saved.mean, saved.var, self._scale()
        options |= {"where": saved.where, "weights": saved.weights, "y": saved.y}
        options |= {"comm": self.comm}
        options |= {"merge_every": self.merge_every, "gradients": self.gradients}
        return verbs.batch_norm_backward(*given, **options)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"comm": None}

    def __repr__(self) -> str:
        others = f"merge_every={self.merge_every}, gradients={self.gradients!r}"
        return f"Sync{super().__repr__()[:-1]}, comm={self.comm!r}, {others})"
