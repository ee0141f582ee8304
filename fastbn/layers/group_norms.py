"""Group, instance and layer norm as layers: the verbs with parameters and gradients.

1. One base does all; its layers differ in the verbs, which differ in what shares statistics.
2. There are no running statistics. Training and evaluation are the same, and a state that says
   otherwise is refused.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Self

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
from fastbn.results import BatchNormResult, Gradients, ResidualGradients

Array = NDArray[Any]
Forward = Callable[..., BatchNormResult]
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
        frozen_affine: bool = False,
        layout: str = "NCHW",
        activation: ActivationName = None,
        dtype: DTypeLike = "float32",
    ) -> None:
        common: dict[str, Any] = {"eps": eps, "scale": scale, "shift": shift, "layout": layout}
        common |= {"frozen_affine": frozen_affine, "activation": activation, "dtype": dtype}
        super().__init__(channels, **common)

    def __repr__(self) -> str:
        return self._described(type(self), self.channels)

    @property
    @abstractmethod
    def _verbs(self) -> tuple[Forward, Backward]:
        """The two functions that the layer is of."""

    def train(self, mode: bool = True) -> Self:
        """Set `training`, which changes nothing else; gives the layer."""
        return self._set_mode(mode)

    def eval(self) -> Self:
        """Clear `training`, which changes nothing else; gives the layer."""
        return self.train(False)

    def __call__(
        self,
        x: Array,
        *,
        residual: Array | None = None,
        out: Array | None = None,
        keep: bool = True,
    ) -> Array:
        """Normalize `x`, in training and in evaluation alike.

        Parameters
        ----------
        x : ndarray
            Of C channels, as `fastbn.batch_norm` takes it.
        residual, out : ndarray, optional
            As given to `fastbn.batch_norm`. After ``out=x`` there is no backward.
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
        y, saved = self._forward(x, residual, out)
        self._last = saved if keep else None
        return y

    def forward(
        self, x: Array, *, residual: Array | None = None, out: Array | None = None
    ) -> tuple[Array, Saved]:
        """A call of the layer that leaves what `backward` needs to the caller; of the layer nothing
        is written.

        Parameters
        ----------
        x, residual, out
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
        return self._forward(x, residual, out)

    def _forward(self, x: Any, residual: Any, out: Any) -> tuple[Array, Saved]:
        x = Batch(x, self.layout, made_for=(type(self).__name__, self.channels)).array
        (forward, _), options = self._verbs, self._options()
        given: dict[str, Any] = {"gamma": self.gamma, "beta": self.beta, "residual": residual}
        y, mean, var = forward(x, **given, out=out, **options)
        return y, self._saved(options, x, y, out, mean, var)

    def _gradients(
        self, dy: Array, saved: Saved, options: dict[str, Any]
    ) -> Gradients | ResidualGradients:
        _, backward = self._verbs
        return backward(dy, saved.x, saved.mean, saved.var, gamma=self._scale(), **options)

    def state_dict(self) -> dict[str, Array]:
        """Copies of gamma, as "weight", and beta, as "bias", PyTorch's names; what the layer has
        not is left out."""
        return self._copied()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over all arrays of a layer with the same channels, and no others.

        Parameters
        ----------
        state : mapping of str to array-like
            As `state_dict` gives it, or PyTorch's layer. Values, of half types too, are copied into
            the layer's arrays and rounded to its dtype; what is too large for it becomes infinite.

        Raises
        ------
        TypeError, ValueError
            A name is missing or too many (running statistics are), or an array is of another shape
            (elementwise ones are) or holds no numbers. Nothing has been changed.
        """
        own = self._arrays()
        checks.states.sample_state(state, own, type(self).__name__)
        self._restore(checks.states.state(state, own, "scale and shift"))


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
        frozen_affine: bool = False,
        layout: str = "NCHW",
        activation: ActivationName = None,
        dtype: DTypeLike = "float32",
    ) -> None:
        common: dict[str, Any] = {"eps": eps, "scale": scale, "shift": shift, "layout": layout}
        common |= {"frozen_affine": frozen_affine, "activation": activation, "dtype": dtype}
        super().__init__(channels, **common)
        self.groups = checks.options.divisor(checks.options.groups(groups), self.channels)

    @property
    def _verbs(self) -> tuple[Forward, Backward]:
        return group_norm, group_norm_backward

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
    channels, eps, scale, shift, frozen_affine, layout, activation, dtype
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


class LayerNorm(SampleNorm):
    """A layer normalization layer: parameters, and the last call's gradients.

    ``y = activation(gamma * (x - mean) / sqrt(var + eps) + beta + residual)``, with mean and
    variance of each sample, over all axes but the first (Ba et al. 2016). There are no running
    statistics: training and evaluation are the same.

    Parameters
    ----------
    channels, eps, scale, shift, frozen_affine, layout, activation, dtype
        As given to `GroupNorm`; gamma and beta are of channels, not of elements.

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
    """

    @property
    def _verbs(self) -> tuple[Forward, Backward]:
        return layer_norm, layer_norm_backward
