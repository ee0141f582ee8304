"""Batch normalization as a layer: the verbs, with the state that training keeps.

1. Parameters and running statistics are plain arrays, written in place, so that an optimizer may
   hold them. Everything is checked, and computed, before the first of them is written: a call that
   fails leaves all as it was.
2. What a forward goes by is decided in one place, `_by_running`: the batch's own statistics, or the
   running ones (evaluation, `frozen_statistics`, `one_value="running"`). The backward follows it.
3. A batch has groups, each normalized by itself: one or, in training, its virtual batches. Their
   statistics enter the running ones together (running.py).
4. Renormalization is batch norm with another scale and shift for each batch (renormalization.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fastbn import checks
from fastbn._batch import Batch
from fastbn.backends.base import quiet
from fastbn.functional import (
    ActivationName,
    batch_norm_backward,
    normalize_backward,
)
from fastbn.layers import passes
from fastbn.layers.base import AffineLayer
from fastbn.layers.frozen import FrozenBatchNorm
from fastbn.layers.renormalization import Correction, Renormalization, correction
from fastbn.layers.running import MOMENTUM, Rule, Running, group_counts, over_groups
from fastbn.layers.saved import Saved
from fastbn.results import BatchNormResult, RunningStatistics
from fastbn.statistics import Moments

Array = NDArray[Any]

CONVENTIONS: dict[str, dict[str, Any]] = {
    "pytorch": {"eps": 1e-5, "momentum": 0.1, "unbiased": True, "layout": "NCHW"},
    "keras": {"eps": 1e-3, "decay": 0.99, "unbiased": False, "layout": "NHWC"},
    "flax": {"eps": 1e-5, "decay": 0.99, "unbiased": False, "layout": "NHWC"},
    "onnx": {"eps": 1e-5, "decay": 0.9, "unbiased": False, "layout": "NCHW"},
}
"""What those libraries do where they are told nothing."""


class BatchNorm(AffineLayer):
    """A batch normalization layer: parameters, running statistics, and the last call's gradients.

    In training ``y = activation(gamma * (x - mean) / sqrt(var + eps) + beta + residual)`` with the
    batch's own statistics (Ioffe & Szegedy 2015, Algorithm 1), and then, with momentum p,
    ``running = (1 - p) * running + p * statistic``. In evaluation the running statistics stand in
    place of the batch's (Algorithm 2).

    Parameters
    ----------
    channels : int
        Of the arrays to come, one or more.
    eps : float
        Added to the variance, zero or more.
    momentum : float from 0 to 1, or None
        The weight of the new batch; None: the average of all batches so far, each with the same
        weight.
    decay : float from 0 to 1, optional
        The weight of the old, in place of `momentum`.
    unbiased : bool
        Whether the variance that runs is the unbiased one, n / (n - 1) times the batch's; with
        weights w ``n = sum(w)**2 / sum(w**2)``.
    scale, shift : bool
        Whether there is a gamma, a beta.
    track_running_stats : bool
        Whether there are running statistics; without, evaluation too uses the batch's own.
    domains : sequence of str, optional
        Names of sets of running statistics, one for each kind of data, under the same gamma and
        beta; each call names the one that it is about.
    one_value : {"raise", "running", "skip"}
        What happens where a batch is normalized by its own statistics (in training; without
        running statistics in evaluation, too) and has one value a channel, which has no variance:
        an error; normalization by the running statistics; or y = beta, and no update.
    nonfinite : {"update", "raise", "skip"}
        What happens where NaN or infinity is in the batch's statistics, or would be in the running
        ones after it: an update as ever; an error; or y, and no update.
    virtual_batch : int, optional
        As given to `fastbn.batch_norm`, in training: the running statistics take the mean over
        groups of mean and variance, by the groups' numbers of values. A group of one value is what
        `one_value` is about, and left out; it cannot be "running" then.
    renormalization : Renormalization, optional
        Batch renormalization in training: ``xhat * r + d`` in place of xhat, with r and d that
        bring it to what the running statistics would give, within limits that open with
        `num_batches_tracked`. Without `virtual_batch`.
    frozen_statistics : bool
        Normalize by the running statistics in training, too, and leave them alone.
    frozen_affine : bool
        Compute no dgamma and dbeta.
    layout, activation
        As given to `fastbn.batch_norm`.
    dtype : {"float32", "float64"}
        Of parameters and running statistics, whatever the arrays are.

    Attributes
    ----------
    momentum, decay : float or None
        As given. Either may be set, and the other is None then.
    gamma, beta : ndarray of `dtype`, shape (C,), or None
        The parameters, at first 1 and 0.
    dgamma, dbeta : ndarray of `dtype`, shape (C,), or None
        Their gradients, of the last `backward`, at first 0; None where there is no such parameter,
        or it is frozen.
    dresidual : ndarray or None
        The residual's gradient, where the last `backward` was asked for it.
    domains : tuple of str, or None
        As given; it cannot be set. With domains, `running` has what follows, of each.
    running_mean, running_var : ndarray of `dtype`, shape (C,), or None
        At first 0 and 1.
    num_batches_tracked : ndarray of int64, shape ()
        How many batches they are of; or None. Set to such an array, it is that array; a number, or
        an array of another type, becomes one, so that no small type ends the counting.
    training : bool
        Set by `train` and `eval`.
    frozen_statistics, frozen_affine : bool
        As given; `train` and `eval` leave them as they are, and a state does not hold them.
        `frozen_affine` set to True fills the arrays that were dgamma and dbeta with 0, and they are
        those again once it is False.

    A layer has no other attributes: to set one is an AttributeError that names the nearest. A
    subclass may have its own. What its class body names and its `__init__` sets is free, and so is
    later what is not close to a name that the layer has.

    Raises
    ------
    TypeError, ValueError
        An argument has a wrong type or value, or both momentum and decay are given.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x = np.random.default_rng(0).normal(5.0, 3.0, (32, 4, 8, 8)).astype(np.float32)
    >>> bn = fastbn.BatchNorm(4, momentum=None)
    >>> y = bn(x)
    >>> dx = bn.backward(np.ones_like(y))
    >>> bn.dbeta
    array([2048., 2048., 2048., 2048.], dtype=float32)
    >>> bool(np.allclose(bn.eval()(x), y, atol=0.01)), int(bn.num_batches_tracked)
    (True, 1)
    """

    def __init__(
        self,
        channels: int,
        *,
        eps: float = 1e-5,
        momentum: float | None = MOMENTUM,
        decay: float | None = None,
        unbiased: bool = True,
        scale: bool = True,
        shift: bool = True,
        track_running_stats: bool = True,
        domains: Sequence[str] | None = None,
        one_value: str = "raise",
        nonfinite: str = "update",
        virtual_batch: int | None = None,
        renormalization: Renormalization | None = None,
        frozen_statistics: bool = False,
        frozen_affine: bool = False,
        layout: str = "NCHW",
        activation: ActivationName = None,
        dtype: DTypeLike = "float32",
    ) -> None:
        common: dict[str, Any] = {"eps": eps, "scale": scale, "shift": shift, "layout": layout}
        common |= {"frozen_affine": frozen_affine, "activation": activation, "dtype": dtype}
        super().__init__(channels, **common)
        tracks = checks.options.flag("track_running_stats", track_running_stats)
        self._rule = Rule(*checks.layers.momentum(momentum, decay, MOMENTUM))
        self._domains = checks.layers.domains(domains, tracks)
        self._running = {
            domain: Running(self.channels, self._dtype_name, tracks=tracks, domain=domain)
            for domain in self._domains or (None,)
        }
        self.unbiased = checks.options.flag("unbiased", unbiased)
        self.virtual_batch = checks.options.virtual_batch(virtual_batch)
        self.renormalization = checks.layers.renormalization(
            renormalization, Renormalization, tracks, self.virtual_batch
        )
        self.one_value = checks.layers.one_value(one_value, tracks, self.virtual_batch)
        self.nonfinite = checks.options.option("nonfinite", nonfinite, checks.layers.NONFINITE)
        self.frozen_statistics = checks.layers.frozen_statistics(frozen_statistics, tracks)

    @classmethod
    def like(cls, library: str, channels: int, **options: Any) -> Self:
        """A layer with the eps, momentum, variance and layout of another library's defaults.

        Parameters
        ----------
        library : {"pytorch", "keras", "flax", "onnx"}
            Whose; Keras as from version 3 on, ONNX's operator in training mode.
        channels
            As given to `BatchNorm`.
        **options
            Others of `BatchNorm`'s, in place of that library's or beside them.

        Examples
        --------
        >>> import fastbn
        >>> fastbn.BatchNorm.like("keras", 8)
        BatchNorm(8, eps=0.001, decay=0.99, unbiased=False, layout='NHWC')
        """
        given = CONVENTIONS[checks.options.option("library", library, tuple(CONVENTIONS))]
        if "momentum" in options or "decay" in options:
            given = {name: v for name, v in given.items() if name not in ("momentum", "decay")}
        return cls(channels, **(given | options))

    @property
    def momentum(self) -> float | None:
        return self._rule.momentum

    @momentum.setter
    def momentum(self, value: float | None) -> None:
        self._rule = Rule(*checks.layers.momentum(value, None, MOMENTUM))

    @property
    def decay(self) -> float | None:
        return self._rule.decay

    @decay.setter
    def decay(self, value: float | None) -> None:
        if value is None and self.decay is None:
            return  # as where a layer's options are copied to another
        self._rule = Rule(None, checks.layers.weight_of_old(value))

    @property
    def domains(self) -> tuple[str, ...] | None:
        return self._domains

    def running(self, domain: str) -> RunningStatistics:
        """The running statistics of a domain.

        Parameters
        ----------
        domain : str
            One of `domains`.

        Returns
        -------
        mean, var : ndarray of `dtype`, shape (C,)
        num_batches_tracked : ndarray of int64, shape ()
            The layer's own arrays, to be read, or written in place.

        Raises
        ------
        TypeError, ValueError
            There is no such domain.

        Examples
        --------
        >>> import fastbn
        >>> bn = fastbn.BatchNorm(3, domains=("day", "night"))
        >>> bn.running("night").var
        array([1., 1., 1.], dtype=float32)
        """
        held: Any = self._running_of(domain).held
        return RunningStatistics(*held.values())

    def _running_of(self, domain: Any, owner: str = "the layer") -> Running:
        return self._running[checks.layers.domain(domain, self._domains, owner)]

    def _only_running(self, name: str) -> Running:
        """The one set of running statistics, where there are no domains."""
        checks.layers.no_domains(name, self._domains)
        return self._running[None]

    @property
    def running_mean(self) -> Array | None:
        return self._only_running("running_mean").mean

    @running_mean.setter
    def running_mean(self, value: Array | None) -> None:
        self._only_running("running_mean").mean = value

    @property
    def running_var(self) -> Array | None:
        return self._only_running("running_var").var

    @running_var.setter
    def running_var(self, value: Array | None) -> None:
        self._only_running("running_var").var = value

    @property
    def num_batches_tracked(self) -> Array | None:
        return self._only_running("num_batches_tracked").batches

    @num_batches_tracked.setter
    def num_batches_tracked(self, value: Array | int | None) -> None:
        running = self._only_running("num_batches_tracked")
        running.batches = None if value is None else checks.layers.counter(value)

    @property
    def frozen_statistics(self) -> bool:
        return self._frozen_statistics

    @frozen_statistics.setter
    def frozen_statistics(self, value: bool) -> None:
        self._frozen_statistics = checks.options.flag("frozen_statistics", value)

    def train(self, mode: bool = True) -> Self:
        """Use the batch's own statistics from now on, or the running ones; gives the layer."""
        return super().train(mode)

    def eval(self) -> Self:
        """Use the running statistics from now on; gives the layer."""
        return self.train(False)

    def __call__(
        self,
        x: Array,
        *,
        residual: Array | None = None,
        where: Array | None = None,
        weights: Array | None = None,
        out: Array | None = None,
        domain: str | None = None,
        update: bool = True,
        keep: bool = True,
    ) -> Array:
        """Normalize `x`, and in training renew the running statistics.

        Parameters
        ----------
        x : ndarray
            Of C channels, as `fastbn.batch_norm` takes it.
        residual, where, weights, out : ndarray, optional
            As given to `fastbn.batch_norm`. After ``out=x`` there is no backward.
        domain : str, optional
            One of `domains`, where the layer has some: whose running statistics the call goes by,
            and renews.
        update : bool
            False: y is the same, and the running statistics stay as they are, by which
            `renormalization` goes. `nonfinite` then looks at the batch's own statistics alone.
        keep : bool
            Whether the layer keeps the call for `backward`: x and, where there is an activation, y,
            neither copied. False: it keeps none, an earlier one neither.

        Returns
        -------
        y : ndarray
            As `fastbn.batch_norm` returns it.

        Raises
        ------
        TypeError, ValueError
            An argument has a wrong type, shape or value, the running statistics are no statistics,
            or a policy says so. Nothing has been written.
        """
        keep = checks.options.flag("keep", keep)
        y, saved = self._forward(x, residual, where, weights, out, domain, update)
        self._last = saved if keep else None
        return y

    def forward(
        self,
        x: Array,
        *,
        residual: Array | None = None,
        where: Array | None = None,
        weights: Array | None = None,
        out: Array | None = None,
        domain: str | None = None,
        update: bool = True,
    ) -> tuple[Array, Saved]:
        """A call of the layer that leaves what `backward` needs to the caller; of the layer only
        running statistics are written, in training.

        Parameters
        ----------
        x, residual, where, weights, out, domain, update
            As a call takes them.

        Returns
        -------
        y : ndarray
            As a call returns it.
        saved : Saved
            To be passed to `backward`.

        Raises
        ------
        TypeError, ValueError
            As of a call.

        Examples
        --------
        >>> import numpy as np, fastbn
        >>> bn, x = fastbn.BatchNorm(3), np.eye(3)
        >>> hidden, first = bn.forward(x)
        >>> y, second = bn.forward(hidden)
        >>> dhidden = bn.backward(np.ones_like(y), second)
        >>> dx = bn.backward(dhidden, first, accumulate=True)
        """
        return self._forward(x, residual, where, weights, out, domain, update)

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
        """`whole`: the moments of a batch of which x is a part, in place of x's own."""
        running = self._running_of(domain)
        update = checks.options.flag("update", update)
        batch = Batch(x, self.layout, where, weights, made_for=("BatchNorm", self.channels))
        x, options = batch.array, self._options()
        effective = batch.effective if whole is None else whole.effective_count
        fused: dict[str, Any] = {"activation": self.activation, "residual": residual, "out": out}
        k, corrected = None, None
        if by_running := self._by_running(running, effective):
            mean, var = (a.copy() for a in running.checked(writes=False))
            vectors = {"mean": mean, "var": var, "gamma": self.gamma, "beta": self.beta}
            y = passes.normalize(batch, None, vectors, self.eps, fused, is_fixed=True)
        else:
            if self.training or running.observe is not None:
                k = checks.options.virtual_batch(self.virtual_batch)
            (y, mean, var), corrected = self._by_batch(running, batch, k, fused, update, whole)
        is_part = whole is not None and not by_running
        kept: dict[str, Any] = {"mean": mean, "var": var, "is_fixed": by_running}
        kept |= {"where": where, "weights": weights, "virtual_batch": k, "correction": corrected}
        return y, self._saved(options, x, y, out, is_part=is_part, **kept)

    def _by_batch(
        self,
        running: Running,
        batch: Batch,
        k: int | None,
        fused: dict[str, Any],
        update: bool,
        whole: Moments | None,
    ) -> tuple[BatchNormResult, Correction | None]:
        """Normalize by the batch's own statistics, or those of the whole of which it is a part, and
        see to the running ones."""
        nonfinite = checks.options.option("nonfinite", self.nonfinite, checks.layers.NONFINITE)
        checks.layers.renormalization(self.renormalization, Renormalization, True, k)
        effective = batch.effective if whole is None else whole.effective_count
        counts = group_counts(len(batch.array), effective, k)
        fits, corrected = self._fits(running, counts, update), None
        updates, renormalizes = fits and update, fits and self.renormalization is not None
        looks_first = nonfinite == "raise" and fused["out"] is not None and counts.any()
        if whole is not None or renormalizes or looks_first:
            mean, var = passes.moments(batch, k) if whole is None else (whole.mean, whole.var)
            renewed = self._renewed(running, mean, var, counts, updates)  # before y is written
            gamma, beta = self.gamma, self.beta
            if renormalizes:
                corrected = self._correction(running, mean, var, update)
                gamma, beta = corrected.parameters(gamma, beta)
            vectors = {"mean": mean, "var": var, "gamma": gamma, "beta": beta}
            y = passes.normalize(batch, k, vectors, self.eps, fused, is_fixed=False)
            result = BatchNormResult(y, mean, var)
        else:
            result = passes.batch_norm(batch, k, self.gamma, self.beta, self.eps, fused)
            renewed = self._renewed(running, result.mean, result.var, counts, updates)
        running.renew(renewed)
        if update and running.observe is not None:
            if whole is None:
                mean, var = result[1:] if k is None else passes.moments(batch, None)
                whole = Moments(batch.count, mean, var, effective_count=effective)
            running.observe(whole)
        return result, corrected

    def _correction(self, running: Running, mean: Array, var: Array, update: bool) -> Correction:
        """r and d of a batch with these statistics, by the running ones as they are."""
        assert self.renormalization is not None
        known = running.checked(writes=update, nan=self.nonfinite == "update")
        limits = self.renormalization.at(checks.layers.batches(running.batches))
        return correction(mean, var, *known, self.eps, limits)

    def _gradients(self, dy: Array, saved: Saved, options: dict[str, Any]) -> Any:
        given: Any = dy, saved.x, saved.mean, saved.var
        options |= {"y": saved.y, "where": saved.where}
        backward: Callable[..., Any] = normalize_backward
        if not saved.is_fixed:
            backward = batch_norm_backward
            options |= {"weights": saved.weights, "virtual_batch": saved.virtual_batch}
        if saved.correction is None:
            return backward(*given, self._scale(), **options)
        gamma, _ = saved.correction.parameters(self.gamma, self.beta)
        found = backward(*given, gamma, **options)
        if found.dgamma is None:
            return found
        of_parameters = saved.correction.gradients(found.dgamma, found.dbeta, self._dtype_name)
        return found._replace(**of_parameters)

    def _held(self) -> dict[str, Any]:
        running = (pair for each in self._running.values() for pair in each.held.items())
        return super()._held() | {name: a for name, a in running if a is not None}

    def state_dict(self) -> dict[str, Array]:
        """Copies of the layer's arrays, by PyTorch's names; what the layer has not is left out.

        "weight" is gamma, "bias" is beta; then "running_mean", "running_var" and
        "num_batches_tracked"; with domains these of each, as "running_mean.day".

        Examples
        --------
        >>> import fastbn
        >>> list(fastbn.BatchNorm(3, shift=False, track_running_stats=False).state_dict())
        ['weight']
        """
        return super().state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over all arrays of a layer with the same channels, and no others.

        Parameters
        ----------
        state : mapping of str to array-like
            As `state_dict` gives it, or PyTorch's `BatchNorm1d`, `2d` or `3d`. Values, of half
            types too, are copied into the layer's arrays and rounded to its dtype; what is too
            large for it becomes infinite. Without "num_batches_tracked" it counts from 0.

        Raises
        ------
        TypeError, ValueError
            A name is missing or too many, an array is of another shape or holds no numbers, or
            running statistics are NaN or a negative variance, by which evaluation could not go
            either. Nothing has been changed.
        """
        self._restore(checks.states.state(state, self._arrays()))

    def to_frozen(self, *, domain: str | None = None) -> FrozenBatchNorm:
        """A `FrozenBatchNorm` that does what the layer does in evaluation; it has copies of all.

        Parameters
        ----------
        domain : str, optional
            One of `domains`, where the layer has some.

        Raises
        ------
        TypeError, ValueError
            There is no such domain, there are no running statistics, or they are no statistics.
        """
        mean, var = self._running_of(domain).checked(writes=False)
        options: dict[str, Any] = {"eps": self.eps, "layout": self.layout}
        return FrozenBatchNorm(
            mean, var, self.gamma, self.beta, activation=self.activation, **options
        )

    def _by_running(self, running: Running, n: float) -> bool:
        """Whether this call normalizes by the running statistics."""
        if running.observe is not None:
            return False
        if self.frozen_statistics or running.is_frozen:
            return True
        one = n > 0 and self._is_one(n)
        return running.exist and (not self.training or (one and self.one_value == "running"))

    def _is_one(self, n: Any) -> Any:
        """Whether an effective number of values is that of one or, where n / (n - 1) is asked for,
        cannot be told from it."""
        return n <= (1 + checks.statistics.ROUNDING if self.unbiased else 1)

    def _fits(self, running: Running, counts: Array, update: bool) -> bool:
        """Whether the batch's own statistics are fit for the running ones, and these, where it is
        to `update` them, for the batch's."""
        if running.observe is not None or not counts.any():
            return False
        one = self._is_one(counts)
        if one.any():
            options = running.exist, self.virtual_batch
            checks.layers.several_values(self.one_value, counts, *options)
        if one.all() or not (running.exist or self.renormalization):
            return False
        if update:
            running.checked(writes=True, nan=self.nonfinite == "update")
        return True

    @quiet
    def _renewed(
        self, running: Running, mean: Array, var: Array, counts: Array, updates: bool
    ) -> dict[str, Array]:
        """The running arrays after a batch with these statistics; none where they stay.

        The policy looks at both: what is finite here may be infinite in the layer's type.
        """
        if running.observe is not None:
            return {}
        each = var.reshape(len(counts), -1)
        unbiased = each * (counts / (counts - 1))[:, None] if self.unbiased else each
        mean, var, unbiased = (over_groups(a, counts) for a in (mean, each, unbiased))
        renewed = running.average(mean, unbiased, self._rule) if updates else {}
        if self.nonfinite == "raise":
            checks.layers.finite({"mean": mean, "variance": var}, renewed)
        elif self.nonfinite == "skip":
            is_finite = all(np.isfinite(a).all() for a in (mean, var, *renewed.values()))
            return renewed if is_finite else {}
        return renewed

    def __repr__(self) -> str:
        tracks = all(running.exist for running in self._running.values())
        momentum = self.momentum if self.decay is None else MOMENTUM
        return self._described(
            BatchNorm, self.channels, track_running_stats=tracks, momentum=momentum
        )
