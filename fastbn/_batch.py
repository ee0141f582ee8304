"""The checked array of a call, and what of it counts."""

from __future__ import annotations

from copy import copy
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn import checks
from fastbn.elements import is_integer
from fastbn.layouts import channel_axis
from fastbn.weights import Weights, scale

Array = NDArray[Any]


class Batch:
    """An array, its layout, and the places and samples that count."""

    def __init__(
        self,
        x: Any,
        layout: Any,
        where: Any = None,
        weights: Any = None,
        *,
        name: str = "x",
        made_for: tuple[str, int] | None = None,
        types: checks.arrays.Types = checks.arrays.ANY,
    ) -> None:
        """`made_for`: what has to fit, a layer's name and its number of channels."""
        self.array = x = checks.arrays.batch(name, x, types)
        self.layout = checks.options.layout(layout)
        self.name = name
        self.channels: int = x.shape[channel_axis(self.layout, x.ndim)]
        if made_for is not None:
            checks.arrays.made_for(x, self.layout, *made_for)
        self.where, self.weights = where, weights
        if where is not None:
            self.where = checks.arrays.where(where, name, x, self.layout)
        self.places = self._places()
        self.count: float = self.places
        self.scaled_weights: Weights | None = None
        if weights is not None:
            self.weights = checks.arrays.weights(weights, name, x)
            self.scaled_weights = scale(self.weights, x, self.channels, self.where)
            self.count = self.scaled_weights.count

    def _places(self) -> int:
        """How many values of a channel count."""
        if self.where is not None:
            return int(np.count_nonzero(self.where))
        return self.array.size // self.channels if self.channels else 0

    def of(self, x: Array) -> Batch:
        """The same of another array of this shape."""
        same = copy(self)
        same.array = x
        return same

    def unweighed(self) -> Batch:
        """The batch without its weights, for y by given statistics, which they do not change."""
        if self.weights is None:
            return self
        same = copy(self)
        same.weights, same.scaled_weights, same.count = None, None, self.places
        return same

    @property
    def is_integer(self) -> bool:
        """Whether it holds integers."""
        return is_integer(self.array.dtype)

    @property
    def counts_all(self) -> bool:
        """Whether all values count, and alike."""
        return self.where is None and self.weights is None

    @property
    def effective(self) -> float:
        """The effective number of values: so many of equal weight give a variance as biased
        (weights.py)."""
        if self.scaled_weights is None:
            return self.count
        return self.scaled_weights.effective if self.count else 0
