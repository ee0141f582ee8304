"""The checked array of a call, and what of it counts: looked at once, for a layer and its verb."""

from __future__ import annotations

from copy import copy
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn import checks
from fastbn.layouts import channel_axis
from fastbn.weights import Weights, scaled

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
        made: tuple[str, int] | None = None,
    ) -> None:
        """`made` names what the array is for, and its number of channels."""
        self.array = x = checks.arrays.batch(name, x)
        self.layout = checks.options.layout(layout)
        self.name = name
        self.channels: int = x.shape[channel_axis(self.layout, x.ndim)]
        if made is not None:
            checks.arrays.made_for(x, self.layout, *made)
        self.where, self.weights = where, weights
        if where is not None:
            self.where = checks.arrays.where(where, name, x, self.layout)
        self.places = self._places()
        self.count: float = self.places
        self.scaled: Weights | None = None
        if weights is not None:
            self.weights = checks.arrays.weights(weights, name, x)
            self.scaled = scaled(self.weights, x, self.channels, self.where)
            self.count = self.scaled.count

    def _places(self) -> int:
        """How many values of a channel count."""
        if self.where is not None:
            return int(np.count_nonzero(self.where))
        return self.array.size // self.channels if self.channels else 0

    def unweighed(self) -> Batch:
        """The same where nothing goes by the samples' weights."""
        if self.weights is None:
            return self
        same = copy(self)
        same.weights, same.scaled, same.count = None, None, self.places
        return same

    @property
    def counts_all(self) -> bool:
        """Whether all values count, and alike."""
        return self.where is None and self.weights is None

    @property
    def effective(self) -> float:
        """As many values that weigh the same have as little bias in their variance."""
        if self.scaled is None:
            return self.count
        return self.scaled.effective if self.count else 0
