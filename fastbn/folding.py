"""Batch norm with given statistics, folded into the weights of its neighbour.

Normalization is affine, ``y = scale * x + (beta - scale * mean)`` with ``scale = gamma /
sqrt(var + eps)`` (Jacob et al. 2018, section 3.2), and so are linear layers and convolutions: one
of them after the other is one of them. What is folded costs nothing at run time. It does cost
digits where a mean is large, which is why `fastbn.normalize` computes from ``x - mean``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastbn import checks, fixed
from fastbn.backends.base import Affine, quiet
from fastbn.results import Folded

Array = NDArray[Any]


def fold_into_conv(
    weight: Array,
    bias: Array | None,
    mean: Array,
    var: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    eps: float = 1e-5,
    transposed: bool = False,
    groups: int = 1,
) -> Folded:
    """Fold batch norm into the convolution before it.

    ``weight * scale`` and ``(bias - mean) * scale + beta``, ``scale = gamma / sqrt(var + eps)``,
    for each output channel: Jacob et al. (2018), section 3.2. Batch norm *before* a convolution
    does not fold: padding adds zeros that it has not seen.

    Parameters
    ----------
    weight : ndarray of float32, float64, float16 or bfloat16
        (out, in / groups, ...), or (in, out / groups, ...) where `transposed`; any rank from 2 up.
    bias : ndarray of shape (out,), or None
        The convolution's own; None is 0.
    mean, var, gamma, beta, eps
        As given to `normalize`, one value an output channel.
    transposed : bool
        Whether the convolution is a transposed one.
    groups : int
        Of the convolution; where it is not transposed, its weights do not depend on them.

    Returns
    -------
    weight, bias : ndarray
        New arrays in the types of `weight` and `bias`, float32 in place of half types, computed in
        float64. What is below the normal numbers of its type becomes 0: such weights can make a
        layer several times slower.

    Raises
    ------
    TypeError, ValueError
        An argument has a wrong type, shape or value, or a channel has no finite weights.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> rng = np.random.default_rng(0)
    >>> x, weight = rng.normal(size=(6, 4)), rng.normal(size=(3, 4, 1))
    >>> mean, var = rng.normal(size=3), rng.uniform(1, 2, 3)
    >>> folded, bias = fastbn.fold_into_conv(weight, None, mean, var)
    >>> y = fastbn.normalize(x @ weight[:, :, 0].T, mean, var)
    >>> bool(np.allclose(x @ folded[:, :, 0].T + bias, y))
    True
    """
    weight = checks.folding.weight(weight)
    transposed = checks.options.flag("transposed", transposed)
    groups = checks.folding.groups(groups, weight)
    norm = _Norm.of(mean, var, gamma, beta, eps, checks.folding.outputs(weight, groups, transposed))
    factors = norm.affine.scale[:, None]
    if transposed:
        # An input channel reaches the output channels of its group alone.
        factors = np.repeat(
            norm.affine.scale.reshape(groups, -1), weight.shape[0] // groups, axis=0
        )
    return norm.after(weight, factors, bias)


def fold_into_linear(
    weight: Array,
    bias: Array | None,
    mean: Array,
    var: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    eps: float = 1e-5,
    before: bool = False,
) -> Folded:
    """Fold batch norm into the linear layer before it, or (`before`) after it.

    As `fold_into_conv`; batch norm before the layer gives ``weight * scale`` for each input and
    ``bias + weight @ (beta - mean * scale)``.

    Parameters
    ----------
    weight : ndarray of float32, float64, float16 or bfloat16, shape (out, in)
        Of the layer ``y = x @ weight.T + bias``; where batch norm comes after it, any further axes.
    bias : ndarray of shape (out,), or None
        The layer's own; None is 0.
    mean, var, gamma, beta, eps
        As given to `normalize`: one value an output, or an input where batch norm is `before`.
    before : bool
        Whether batch norm comes before the layer.

    Returns
    -------
    weight, bias : ndarray
        As of `fold_into_conv`.

    Raises
    ------
    TypeError, ValueError
        An argument has a wrong type, shape or value, or a channel has no finite weights.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> rng = np.random.default_rng(0)
    >>> x, weight = rng.normal(size=(6, 4)), rng.normal(size=(3, 4))
    >>> mean, var = rng.normal(size=4), rng.uniform(1, 2, 4)
    >>> folded, bias = fastbn.fold_into_linear(weight, None, mean, var, before=True)
    >>> y = fastbn.normalize(x, mean, var) @ weight.T
    >>> bool(np.allclose(x @ folded.T + bias, y))
    True
    """
    weight = checks.folding.weight(weight)
    if not checks.options.flag("before", before):
        owner = checks.folding.outputs(weight, 1, transposed=False)
        norm = _Norm.of(mean, var, gamma, beta, eps, owner)
        return norm.after(weight, norm.affine.scale[:, None], bias)
    owner = checks.folding.inputs(weight)
    return _Norm.of(mean, var, gamma, beta, eps, owner).before(weight, bias)


class _Norm(NamedTuple):
    """Batch norm as an affine map, and whose channels it normalizes."""

    affine: Affine
    owner: checks.vectors.Owner

    @staticmethod
    def of(
        mean: Any, var: Any, gamma: Any, beta: Any, eps: Any, owner: checks.vectors.Owner
    ) -> _Norm:
        vectors = fixed.checked(mean, var, gamma, beta, owner)
        return _Norm(fixed.affine(vectors, checks.options.epsilon(eps), owner.channels), owner)

    @quiet
    def after(self, weight: Array, factors: Array, bias: Any) -> Folded:
        """Of what a layer gives; `factors` stand for the weight's first axes."""
        bias = None if bias is None else checks.vectors.channel_vector("bias", bias, self.owner)
        factors = factors.reshape(*factors.shape, *[1] * (weight.ndim - factors.ndim))
        mean, scale, beta = self.affine
        shifted = (_wide(bias) - mean) * scale + beta
        return _rounded(weight, weight * factors, bias, shifted)

    @quiet
    def before(self, weight: Array, bias: Any) -> Folded:
        """Of what a linear layer takes."""
        owner = checks.folding.outputs(weight, 1, transposed=False)
        bias = None if bias is None else checks.vectors.channel_vector("bias", bias, owner)
        mean, scale, beta = self.affine
        shift = weight.astype(np.float64) @ (beta - mean * scale)
        return _rounded(weight, weight * scale, bias, _wide(bias) + shift)


def _wide(bias: Array | None) -> Array:
    return np.zeros(1) if bias is None else bias.astype(np.float64)


def _rounded(weight: Array, wide: Array, bias: Array | None, shifted: Array) -> Folded:
    """Both in their own types, without subnormal numbers."""
    rounded = (
        _flushed(name, values, like.dtype.newbyteorder("="))
        for name, values, like in (
            ("weight", wide, weight),
            ("bias", shifted, weight if bias is None else bias),
        )
    )
    return Folded(*rounded)


def _flushed(name: str, values: Array, dtype: Any) -> Array:
    """The values in a type; what it has no normal number for becomes 0."""
    result: Array = values.astype(dtype, order="C", subok=False)
    checks.folding.folded(name, result)
    result[np.abs(result) < np.finfo(dtype).smallest_normal] = 0
    return result
