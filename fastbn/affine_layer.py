"""What all layers have: parameters of channels and their gradients, a mode and a state.

Arrays are written in place, so that an optimizer may hold them, and after all is checked and
computed: what fails leaves a layer as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fastbn import checks
from fastbn.backends.base import quiet
from fastbn.functional import ActivationName

Array = NDArray[Any]

PARAMETERS = {"weight": "gamma", "bias": "beta"}
"""PyTorch's names of a layer's parameters, and ours."""


class AffineLayer:
    """The base of the layers: each adds its own forward and backward."""

    _state_names: ClassVar[Mapping[str, str]] = PARAMETERS
    """Of a layer's arrays: those of its state, and its own."""

    def __init__(
        self,
        channels: int,
        *,
        eps: float,
        scale: bool,
        shift: bool,
        layout: str,
        activation: ActivationName,
        dtype: DTypeLike,
    ) -> None:
        self.channels = checks.channels(channels)
        self.eps = checks.epsilon(eps)
        self.layout = checks.layout(layout)
        self.activation: ActivationName = checks.activation_name(activation)
        of_type = checks.parameter_type(dtype)
        self._dtype_name = of_type.name
        has_scale, has_shift = checks.flag("scale", scale), checks.flag("shift", shift)
        self.gamma: Array | None = np.ones(self.channels, of_type) if has_scale else None
        self.beta: Array | None = np.zeros(self.channels, of_type) if has_shift else None
        self.dgamma: Array | None = None
        self.dbeta: Array | None = None
        self.dresidual: Array | None = None
        self.training, self.frozen_affine = True, False
        self._forward: Any = None
        """What the backward of the last call needs."""

    def _set_mode(self, mode: Any) -> Self:
        self.training = checks.flag("mode", mode)
        return self

    def _scale(self) -> Array:
        """gamma, or ones: it tells the gradients' type, too."""
        return np.ones(self.channels, self._dtype_name) if self.gamma is None else self.gamma

    def _wants_parameters(self) -> bool:
        """Whether a backward gives dgamma and dbeta."""
        return not self.frozen_affine and (self.gamma is not None or self.beta is not None)

    def _leave(self, found: Any, dgamma: Array | None, dbeta: Array | None) -> Array:
        """Keep a backward's gradients as far as the layer has what they are of; gives dx."""
        self.dgamma = None if self.gamma is None else dgamma
        self.dbeta = None if self.beta is None else dbeta
        self.dresidual = getattr(found, "dresidual", None)
        dx: Array = found.dx
        return dx

    def _arrays(self) -> dict[str, Array]:
        own = {ours: getattr(self, ours) for ours in self._state_names.values()}
        held = checks.arrays({ours: array for ours, array in own.items() if array is not None})
        return {name: held[ours] for name, ours in self._state_names.items() if ours in held}

    def _copied(self) -> dict[str, Array]:
        """The layer's state."""
        return {name: array.copy() for name, array in self._arrays().items()}

    @quiet
    def _restore(self, arrays: Mapping[str, Array]) -> None:
        """Write arrays, known to fit, into the layer's own, of which some may be those."""
        own = self._arrays()
        rounded = {name: np.array(arrays[name], a.dtype) for name, a in own.items()}
        for name, a in own.items():
            a[...] = rounded[name]

    def __getstate__(self) -> dict[str, Any]:
        # A copy is of the layer, not of the arrays of its last call.
        return self.__dict__ | {"_forward": None}

    def _described(self, kind: type[AffineLayer], *sizes: int, **others: Any) -> str:
        """A call of `kind` that makes such a layer, with the options that are not the default."""
        defaults: dict[str, Any] = kind.__init__.__kwdefaults__ or {}
        told = {name: getattr(self, name) for name in defaults if hasattr(self, name)}
        told |= {"scale": self.gamma is not None, "shift": self.beta is not None}
        told |= {"dtype": self._dtype_name} | others
        words = [f"{n}={told[n]!r}" for n in defaults if told[n] != defaults[n]]
        return f"{kind.__name__}({', '.join([*map(str, sizes), *words])})"
