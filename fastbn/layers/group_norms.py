"""Group, instance and layer norm as layers: the verbs with parameters and gradients.

1. One base does all; its layers differ in the verbs, which differ in what shares statistics.
2. There are no running statistics. Training and evaluation are the same, and a state that says
   otherwise is refused.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fastbn import checks
from fastbn._batch import Batch
from fastbn.functional import ActivationName
from fastbn.group_norms import (
    group_norm,
    group_norm_backward,
    instance_norm,
    instance_norm_backward,
    layer_norm,
    layer_norm_backward,
)
from fastbn.layers.base import AffineLayer
from fastbn.layers.saved import Saved
from fastbn.results import BatchNormResult, Gradients, ResidualGradients, SkipResult

Array = NDArray[Any]
Forward = Callable[..., BatchNormResult | SkipResult]
Backward = Callable[..., Gradients | ResidualGradients]


class SampleNorm(AffineLayer):
    """The base: each sample by statistics of its own."""

    def __init__(
        self,
        channels: int,
        *,
        eps: float = 1e-5,
        scale: bool = True,
        shift: bool = True,
        one_value: Literal["skip", "raise"] = "skip",
        frozen_affine: bool = False,
        layout: str = "NCHW",
        activation: ActivationName = None,
        dtype: DTypeLike = "float32",
    ) -> None:
        common: dict[str, Any] = {"eps": eps, "scale": scale, "shift": shift, "layout": layout}
        common |= {"frozen_affine": frozen_affine, "activation": activation, "dtype": dtype}
        super().__init__(channels, **common)
        self.one_value = checks.options.option("one_value", one_value, ("skip", "raise"))

    @property
    @abstractmethod
    def _verbs(self) -> tuple[Forward, Backward]:
        """The two functions that the layer is of."""

    def __call__(
        self,
        x: Array,
        *,
        residual: Array | None = None,
        where: Array | None = None,
        out: Array | None = None,
        keep: bool = True,
    ) -> Array:
        """Normalize `x`, in training and in evaluation alike.

        Parameters
        ----------
        x : ndarray
            Of C channels, as `fastbn.batch_norm` takes it.
        residual, where, out : ndarray, optional
            As given to `fastbn.group_norm`. After ``out=x`` there is no backward.
        keep : bool
            Whether the layer keeps the call for `backward`: x and, where there is an activation, y,
            neither copied. False: it keeps none, an earlier one neither.

        Returns
        -------
        y : ndarray
            As `fastbn.group_norm` returns it.

        Raises
        ------
        TypeError, ValueError
            An argument has a wrong type, shape or value. Nothing has been written.
        """
        keep = checks.options.flag("keep", keep)
        y: Array
        y, saved = self._forward(x, out, residual=residual, where=where)
        self._last = saved if keep else None
        return y

    def forward(
        self,
        x: Array,
        *,
        residual: Array | None = None,
        where: Array | None = None,
        out: Array | None = None,
    ) -> tuple[Array, Saved]:
        """A call of the layer that leaves what `backward` needs to the caller; of the layer nothing
        is written.

        Parameters
        ----------
        x, residual, where, out
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
        >>> layer, x = fastbn.LayerNorm(3), np.eye(3)
        >>> hidden, first = layer.forward(x)
        >>> y, second = layer.forward(hidden)
        >>> dhidden = layer.backward(np.ones_like(y), second)
        >>> dx = layer.backward(dhidden, first, accumulate=True)
        """
        found: tuple[Array, Saved] = self._forward(x, out, residual=residual, where=where)
        return found

    @property
    @abstractmethod
    def _pool(self) -> int:
        """How many channels share statistics."""

    def _counts(self, x: Array, where: Any) -> Array:
        """How many values what shares statistics has in each sample."""
        batch = Batch(x, self.layout, where)
        if batch.where is None:
            return np.full(len(x), batch.places // max(len(x), 1) * self._pool)
        seen = np.count_nonzero(batch.where, axis=tuple(range(1, x.ndim)))
        return np.asarray(seen * self._pool)

    def _fitting(self, x: Any) -> Array:
        """x as an array, which has the layer's channels."""
        return Batch(x, self.layout, made_for=(type(self).__name__, self.channels)).array

    def _forward(self, x: Any, out: Any, **given: Any) -> Any:
        """y; with a skip the sum; and what is saved."""
        x, options = self._fitting(x), self._options()
        if self.one_value == "raise":
            checks.layers.several_values_a_sample(self._counts(x, given["where"]))
        forward, _ = self._verbs
        parameters: dict[str, Any] = {"gamma": self.gamma, "beta": self.beta}
        y, mean, var, *total = forward(x, **parameters, **given, out=out, **options)
        read = total[0] if total else x
        kept = {"mean": mean, "var": var, "where": given.get("where")}
        return y, *total, self._saved(options, read, y, out, **kept)

    def _gradients(
        self, dy: Array, saved: Saved, options: dict[str, Any]
    ) -> Gradients | ResidualGradients:
        _, backward = self._verbs
        given: Any = dy, saved.x, saved.mean, saved.var
        return backward(*given, gamma=self._scale(), y=saved.y, where=saved.where, **options)


class GroupNorm(SampleNorm):
    """A group normalization layer: parameters, and the last call's gradients.

    ``y = activation(gamma * (x - mean) / sqrt(var + eps) + beta + residual)``, with mean and
    variance of each sample's groups of consecutive channels, over all places (Wu & He 2018). There
    are no running statistics: training and evaluation are the same.

    Parameters
    ----------
    groups : int
        A divisor of `channels`.
    channels : int
        Of the arrays to come, one or more.
    eps : float
        Added to the variance, zero or more.
    scale, shift : bool
        Whether there is a gamma, a beta.
    one_value : {"skip", "raise"}
        What happens where a group of a sample has one value, and so no variance: y = beta, or an
        error.
    frozen_affine : bool
        Compute no dgamma and dbeta.
    layout, activation
        As given to `fastbn.group_norm`.
    dtype : {"float32", "float64"}
        Of parameters, whatever the arrays are.

    Attributes
    ----------
    gamma, beta : ndarray of `dtype`, shape (C,), or None
        The parameters, at first 1 and 0.
    dgamma, dbeta : ndarray of `dtype`, shape (C,), or None
        Their gradients, of the last `backward`, at first 0; None where there is no such parameter,
        or it is frozen.
    dresidual : ndarray or None
        The residual's gradient, where the last `backward` was asked for it.
    training : bool
        Set by `train` and `eval`; no call goes by it.
    frozen_affine : bool
        As given. Set to True, it fills the arrays that were dgamma and dbeta with 0, and they are
        those again once it is False.

    Raises
    ------
    TypeError, ValueError
        An argument has a wrong type or value.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x = np.random.default_rng(0).normal(5.0, 3.0, (8, 6, 4, 4)).astype(np.float32)
    >>> layer = fastbn.GroupNorm(2, 6)
    >>> y = layer(x)
    >>> dx = layer.backward(np.ones_like(y))
    >>> layer.dbeta
    array([128., 128., 128., 128., 128., 128.], dtype=float32)
    >>> bool(np.array_equal(layer.eval()(x[:1]), y[:1])), layer
    (True, GroupNorm(2, 6))
    """

    def __init__(
        self,
        groups: int,
        channels: int,
        *,
        eps: float = 1e-5,
        scale: bool = True,
        shift: bool = True,
        one_value: Literal["skip", "raise"] = "skip",
        frozen_affine: bool = False,
        layout: str = "NCHW",
        activation: ActivationName = None,
        dtype: DTypeLike = "float32",
    ) -> None:
        common: dict[str, Any] = {"eps": eps, "scale": scale, "shift": shift, "layout": layout}
        common |= {"frozen_affine": frozen_affine, "activation": activation, "dtype": dtype}
        super().__init__(channels, one_value=one_value, **common)
        self.groups = checks.options.divisor(checks.options.groups(groups), self.channels)

    @property
    def _verbs(self) -> tuple[Forward, Backward]:
        return group_norm, group_norm_backward

    @property
    def _pool(self) -> int:
        return self.channels // self.groups

    def _options(self) -> dict[str, Any]:
        return super()._options() | {"groups": self.groups}

    def __repr__(self) -> str:
        return self._described(GroupNorm, self.groups, self.channels)


class InstanceNorm(SampleNorm):
    """An instance normalization layer: parameters, and the last call's gradients.

    ``y = activation(gamma * (x - mean) / sqrt(var + eps) + beta + residual)``, with mean and
    variance of each channel of each sample, over its places (Ulyanov et al. 2016). There are no
    running statistics: training and evaluation are the same.

    Parameters
    ----------
    channels, eps, scale, shift, one_value, frozen_affine, layout, activation, dtype
        As given to `GroupNorm`.

    Attributes
    ----------
    gamma, beta, dgamma, dbeta, dresidual, training, frozen_affine
        As `GroupNorm` has them.

    Raises
    ------
    TypeError, ValueError
        An argument has a wrong type or value.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> fastbn.InstanceNorm(2, eps=0.0)(np.float32([[[1, 3], [10, 30]]]))
    array([[[-1.,  1.],
            [-1.,  1.]]], dtype=float32)
    """

    @property
    def _verbs(self) -> tuple[Forward, Backward]:
        return instance_norm, instance_norm_backward

    @property
    def _pool(self) -> int:
        return 1


class LayerNorm(SampleNorm):
    """A layer normalization layer: parameters, and the last call's gradients.

    ``y = activation(gamma * (x - mean) / sqrt(var + eps) + beta + residual)``, with mean and
    variance of each sample, over all axes but the first, or of each row along the last axis (Ba et
    al. 2016). There are no running statistics: training and evaluation are the same.

    Parameters
    ----------
    channels, eps, scale, shift, one_value, frozen_affine, layout, activation, dtype
        As given to `GroupNorm`; gamma and beta are of channels, not of elements.
    axes : {"sample", "last"}
        What is normalized together, as given to `fastbn.layer_norm`. With "last" the channels are
        the last axis, whatever `layout` says.

    Attributes
    ----------
    gamma, beta, dgamma, dbeta, dresidual, training, frozen_affine
        As `GroupNorm` has them.

    Raises
    ------
    TypeError, ValueError
        An argument has a wrong type or value.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> fastbn.LayerNorm(2, eps=0.0)(np.float32([[1, 3], [10, 30]]))
    array([[-1.,  1.],
           [-1.,  1.]], dtype=float32)
    >>> layer = fastbn.LayerNorm(64, axes="last")
    >>> tokens, attention = np.random.default_rng(0).normal(size=(2, 8, 128, 64))
    >>> y, stream = layer(tokens, skip=attention)
    >>> dx = layer.backward(np.ones_like(y), dsum=stream)
    >>> bool(abs(dx - stream).max() < 1e-12)  # of a constant added to y
    True
    """

    def __init__(
        self,
        channels: int,
        *,
        eps: float = 1e-5,
        scale: bool = True,
        shift: bool = True,
        one_value: Literal["skip", "raise"] = "skip",
        frozen_affine: bool = False,
        layout: str = "NCHW",
        axes: Literal["sample", "last"] = "sample",
        activation: ActivationName = None,
        dtype: DTypeLike = "float32",
    ) -> None:
        common: dict[str, Any] = {"eps": eps, "scale": scale, "shift": shift, "layout": layout}
        common |= {"frozen_affine": frozen_affine, "activation": activation, "dtype": dtype}
        super().__init__(channels, one_value=one_value, **common)
        self.axes = checks.options.axes(axes)

    @overload
    def __call__(
        self,
        x: Array,
        *,
        residual: Array | None = ...,
        skip: None = ...,
        where: Array | None = ...,
        out: Array | None = ...,
        keep: bool = ...,
    ) -> Array: ...
    @overload
    def __call__(
        self,
        x: Array,
        *,
        residual: Array | None = ...,
        skip: Array,
        where: Array | None = ...,
        out: Array | None = ...,
        keep: bool = ...,
    ) -> tuple[Array, Array]: ...
    def __call__(
        self,
        x: Array,
        *,
        residual: Array | None = None,
        skip: Array | None = None,
        where: Array | None = None,
        out: Array | None = None,
        keep: bool = True,
    ) -> Array | tuple[Array, Array]:
        """Normalize `x`, or `x` + `skip`, in training and in evaluation alike.

        Parameters
        ----------
        x : ndarray
            Of C channels, as `fastbn.layer_norm` takes it.
        residual, skip, where, out : ndarray, optional
            As given to `fastbn.layer_norm`. After ``out=x`` without `skip` there is no backward.
        keep : bool
            Whether the layer keeps the call for `backward`: x or, with `skip`, the sum; where there
            is an activation, y; and `where`, none of them copied. False: it keeps none, an earlier
            one neither.

        Returns
        -------
        y : ndarray
            As `fastbn.layer_norm` returns it.
        sum : ndarray
            With `skip`: x + skip. A backward reads it, so it must not be overwritten before.

        Raises
        ------
        TypeError, ValueError
            An argument has a wrong type, shape or value. Nothing has been written.
        """
        keep = checks.options.flag("keep", keep)
        y, *total, saved = self._forward(x, out, residual=residual, skip=skip, where=where)
        self._last = saved if keep else None
        return (y, *total) if total else y

    @overload
    def forward(
        self,
        x: Array,
        *,
        residual: Array | None = ...,
        skip: None = ...,
        where: Array | None = ...,
        out: Array | None = ...,
    ) -> tuple[Array, Saved]: ...
    @overload
    def forward(
        self,
        x: Array,
        *,
        residual: Array | None = ...,
        skip: Array,
        where: Array | None = ...,
        out: Array | None = ...,
    ) -> tuple[Array, Array, Saved]: ...
    def forward(
        self,
        x: Array,
        *,
        residual: Array | None = None,
        skip: Array | None = None,
        where: Array | None = None,
        out: Array | None = None,
    ) -> tuple[Array, Saved] | tuple[Array, Array, Saved]:
        """A call of the layer that leaves what `backward` needs to the caller; of the layer nothing
        is written.

        Parameters
        ----------
        x, residual, skip, where, out
            As a call takes them.

        Returns
        -------
        y, sum : ndarray
            As a call returns them; the sum only with `skip`.
        saved : Saved
            To be passed to `backward`.

        Raises
        ------
        TypeError, ValueError
            As of a call.

        Examples
        --------
        >>> import numpy as np, fastbn
        >>> layer, x = fastbn.LayerNorm(3, axes="last"), np.eye(3)
        >>> y, saved = layer.forward(x)
        >>> y, stream, saved = layer.forward(x, skip=x)
        >>> dx = layer.backward(np.ones_like(y), saved, dsum=np.ones_like(stream))
        """
        found: tuple[Array, Saved] | tuple[Array, Array, Saved]
        found = self._forward(x, out, residual=residual, skip=skip, where=where)
        return found

    def _fitting(self, x: Any) -> Array:
        if self.axes == "last":
            return checks.arrays.rows_made_for(x, type(self).__name__, self.channels)
        return super()._fitting(x)

    def backward(
        self,
        dy: Array,
        saved: Saved | None = None,
        *,
        dresidual: bool | Array = False,
        dsum: Array | None = None,
        accumulate: bool = False,
        out: Array | None = None,
    ) -> Array:
        """The gradient of a forward with respect to x, and to `skip`; leaves `dgamma` and `dbeta`.

        Parameters
        ----------
        dy, saved, dresidual, accumulate, out
            As given to `GroupNorm.backward`.
        dsum : ndarray, optional
            As given to `fastbn.layer_norm_backward`: the gradient that reaches x + skip by its
            other uses, which is added to dx.

        Returns
        -------
        dx : ndarray
            As `fastbn.layer_norm_backward` returns it.

        Raises
        ------
        TypeError, ValueError
            As of `GroupNorm.backward`. Nothing has been written.
        """
        return self._go_back(dy, saved, accumulate, dresidual=dresidual, dsum=dsum, out=out)

    @property
    def _verbs(self) -> tuple[Forward, Backward]:
        return layer_norm, layer_norm_backward

    @property
    def _pool(self) -> int:
        return self.channels

    def _counts(self, x: Array, where: Any) -> Array:
        if self.axes == "last":
            return np.full(min(x.size, 1), self.channels)
        return super()._counts(x, where)

    def _options(self) -> dict[str, Any]:
        return super()._options() | {"axes": self.axes}
