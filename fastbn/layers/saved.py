"""What a forward leaves for its backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from fastbn.layers.renormalization import Correction

Array = NDArray[Any]


@dataclass(eq=False, repr=False, slots=True)
class Saved:
    """What one forward of a layer leaves for its backward; a layer's `forward` makes it.

    It refers to x and y without a copy, so they must not be overwritten before the backward, and
    holds two values a channel (or a group, or a row) besides. gamma is the layer's own, as it is
    when the backward runs.

    Attributes
    ----------
    x : ndarray or None
        As it was given, or x + skip, which the call returned; None once y or dx has been written
        over it (``out=x``).
    y : ndarray or None
        Where there is an activation, whose slope it tells.
    mean, var : ndarray or None
        What x was normalized by: the statistics of the batch, of each virtual batch, sample or row,
        or a copy of the running ones.
    mean_square : ndarray or None
        In their place, of an `RMSNorm`.
    where, weights : ndarray or None
        As given.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> layer = fastbn.BatchNorm(3)
    >>> y, saved = layer.forward(np.eye(3))
    >>> saved
    Saved(BatchNorm, shape=(3, 3))
    >>> dx = layer.backward(np.ones((3, 3)), saved)
    """

    layer: object
    """The layer's identity, which its copies have not."""
    kind: str
    options: dict[str, Any]
    """What forward and backward are told alike."""
    shape: tuple[int, ...]
    x: Array | None
    y: Array | None
    mean: Array | None = None
    var: Array | None = None
    mean_square: Array | None = None
    is_fixed: bool = False
    """Whether mean and var are the running ones, and let no gradient through."""
    is_part: bool = False
    """Whether they are those of a batch of which x is a part."""
    where: Array | None = None
    weights: Array | None = None
    virtual_batch: int | None = None
    correction: Correction | None = None

    def needs_x(self, params: bool) -> bool:
        """Whether a backward, of the parameters too or not, reads x."""
        return params or not self.is_fixed

    def __repr__(self) -> str:
        return f"Saved({self.kind}, shape={self.shape})"
