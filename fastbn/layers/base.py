"""What all layers have: parameters of channels and their gradients, a mode and a state.

1. Arrays are written in place, so that an optimizer may hold them, and after all is checked and
   computed: what fails leaves a layer as it was. `write` writes those that belong together.
2. A layer has the attributes of its class and those that its constructor has set; to set another is
   a mistake in a name. A subclass may have its own.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from itertools import repeat
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fastbn import checks
from fastbn.backends.base import quiet
from fastbn.functional import ActivationName
from fastbn.layers.saved import Saved

Array = NDArray[Any]

PARAMETERS = {"weight": "gamma", "bias": "beta"}
"""PyTorch's names of a layer's parameters, and ours."""


def at_once(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    """All these calls as one loop in C (deque over map). Python handles signals between its own
    instructions, so KeyboardInterrupt comes before all of them or after."""
    return partial(deque, map(function, *arguments), 0)


@quiet
def write(arrays: Sequence[Array], values: Sequence[Any]) -> None:
    """Write values, known to fit, into arrays, of which some may be those; rounded before."""
    rounded = [np.array(value, a.dtype) for a, value in zip(arrays, values, strict=True)]
    at_once(np.ndarray.__setitem__, arrays, repeat(...), rounded)()


def _closing(init: Callable[..., None]) -> Callable[..., None]:
    """Wrap a class's __init__: when the outermost returns, __setattr__ begins to refuse unknown
    names."""

    @wraps(init)
    def closing(self: AffineLayer, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if type(self).__init__ is closing:
            self._is_made = True

    return closing


class AffineLayer(ABC):
    """The base of the layers: each adds its own forward and backward."""

    _is_made = False
    """Whether the constructor is through."""

    def __init__(
        self,
        channels: int,
        *,
        eps: float,
        scale: bool,
        shift: bool,
        layout: str,
        frozen_affine: bool,
        activation: ActivationName,
        dtype: DTypeLike,
    ) -> None:
        self.channels = checks.layers.channels(channels)
        self.eps = checks.options.epsilon(eps)
        self.layout = checks.options.layout(layout)
        self.activation: ActivationName = checks.options.activation_name(activation)
        of_type = checks.layers.parameter_type(dtype)
        self._dtype_name = of_type.name
        has_scale = checks.options.flag("scale", scale)
        has_shift = checks.options.flag("shift", shift)
        self.gamma: Array | None = np.ones(self.channels, of_type) if has_scale else None
        self.beta: Array | None = np.zeros(self.channels, of_type) if has_shift else None
        self._dgamma, self._dbeta = (np.zeros(self.channels, of_type) for _ in range(2))
        self.dresidual: Array | None = None
        self.training, self.frozen_affine = True, frozen_affine
        self._identity = object()
        """What tells the layer from others; copied, it is another."""
        self._last: Saved | None = None
        """Of the last call, if that was to be kept."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "__init__" in vars(cls):
            cls.__init__ = _closing(cls.__init__)  # type: ignore[method-assign]

    def __setattr__(self, name: str, value: Any) -> None:
        if self._is_made and name not in vars(self) and not name.startswith("_"):
            checks.layers.attribute(self, name, value, PARAMETERS)
        super().__setattr__(name, value)

    @property
    def training(self) -> bool:
        return self._training

    @training.setter
    def training(self, value: bool) -> None:
        self._training = checks.options.flag("training", value)

    @property
    def frozen_affine(self) -> bool:
        return self._frozen_affine

    @frozen_affine.setter
    def frozen_affine(self, value: bool) -> None:
        is_frozen = checks.options.flag("frozen_affine", value)
        if is_frozen:  # for an optimizer that holds them
            write([self._dgamma, self._dbeta], [0, 0])
        self._frozen_affine = is_frozen

    @property
    def dgamma(self) -> Array | None:
        return None if self.gamma is None or self.frozen_affine else self._dgamma

    @dgamma.setter
    def dgamma(self, value: Array) -> None:
        self._dgamma = checks.layers.gradient("dgamma", value, self.channels)

    @property
    def dbeta(self) -> Array | None:
        return None if self.beta is None or self.frozen_affine else self._dbeta

    @dbeta.setter
    def dbeta(self, value: Array) -> None:
        self._dbeta = checks.layers.gradient("dbeta", value, self.channels)

    def _set_mode(self, mode: Any) -> Self:
        self.training = checks.options.flag("mode", mode)
        return self

    def _scale(self) -> Array:
        """gamma, or ones: it tells the gradients' type, too."""
        return np.ones(self.channels, self._dtype_name) if self.gamma is None else self.gamma

    def _wants_parameters(self) -> bool:
        """Whether a backward gives dgamma or dbeta, and may write it."""
        held = {"dgamma": self.dgamma, "dbeta": self.dbeta}
        for name, a in held.items():
            if a is not None:
                checks.memory.writeable(name, a, "a backward writes it; assign a copy")
        return any(a is not None for a in held.values())

    def _options(self) -> dict[str, Any]:
        """What forward and backward are told alike."""
        return {"eps": self.eps, "layout": self.layout, "activation": self.activation}

    def _saved(self, options: dict[str, Any], x: Array, y: Array, out: Any, *others: Any) -> Saved:
        """What of a forward a backward needs: x, if y was not written over it, and y, if its slope
        is asked for."""
        is_lost = out is not None and checks.memory.share(out, x)
        x_kept, y_kept = None if is_lost else x, None if options["activation"] is None else y
        of_layer = self._identity, type(self).__name__, options
        return Saved(*of_layer, x.shape, x_kept, y_kept, *others)

    def backward(
        self,
        dy: Array,
        saved: Saved | None = None,
        *,
        dresidual: bool | Array = False,
        accumulate: bool = False,
        out: Array | None = None,
    ) -> Array:
        """The gradient of a forward with respect to x; leaves `dgamma` and `dbeta`.

        Parameters
        ----------
        dy : ndarray
            Gradient with respect to y, of its shape and dtype.
        saved : Saved, optional
            Which forward: what `forward` gave beside y. It serves any number of backwards, until
            one writes dx over x. None: the last call, if it was kept.
        dresidual, out
            As given to `fastbn.batch_norm_backward`; the residual's gradient is left in
            `dresidual`.
        accumulate : bool
            Add to `dgamma` and `dbeta`, in their dtype, instead of overwriting them. `dresidual` is
            this backward's in any case.

        Returns
        -------
        dx : ndarray
            As `fastbn.batch_norm_backward` returns it.

        Raises
        ------
        TypeError, ValueError
            An argument has a wrong type, shape or value, `saved` is of another layer, or there was
            no forward to go back through. Nothing has been written.
        """
        saved, options = self._going_back(dy, saved, accumulate)
        found = self._gradients(dy, saved, options | {"dresidual": dresidual, "out": out})
        if out is not None and saved.x is not None and checks.memory.share(out, saved.x):
            saved.x = None
        self.dresidual = getattr(found, "dresidual", None)
        self._leave([(self.dgamma, found.dgamma), (self.dbeta, found.dbeta)], accumulate)
        dx: Array = found.dx
        return dx

    def _going_back(self, dy: Any, saved: Any, accumulate: Any) -> tuple[Saved, dict[str, Any]]:
        """What a backward goes by, once its arguments are checked but for those of its function."""
        params = self._wants_parameters()
        checks.options.flag("accumulate", accumulate)
        saved = checks.layers.last_call(self._last) if saved is None else saved
        known: Saved = checks.layers.saved(saved, Saved, self._identity)
        checks.layers.gone_through(known, dy, params)
        return known, known.options | {"params": params, "y": known.y}

    @quiet
    def _leave(self, pairs: Sequence[tuple[Array | None, Any]], accumulate: bool) -> None:
        """Write gradients into the arrays that are held, or add them."""
        wanted = [(held, a) for held, a in pairs if held is not None]
        values = [held + a if accumulate else a for held, a in wanted]
        write([held for held, _ in wanted], values)

    @abstractmethod
    def _gradients(self, dy: Array, saved: Saved, options: dict[str, Any]) -> Any:
        """What a backward function gives for a forward, by these options of it."""

    def _arrays(self) -> dict[str, Array]:
        """The layer's arrays, by the names that they have in a state."""
        held = checks.states.arrays(self._held())
        outside = {ours: name for name, ours in PARAMETERS.items()}
        return {outside.get(ours, ours): a for ours, a in held.items()}

    def _held(self) -> dict[str, Any]:
        """What there is of a state, by the layer's own names."""
        own = {"gamma": self.gamma, "beta": self.beta}
        return {name: a for name, a in own.items() if a is not None}

    def _copied(self) -> dict[str, Array]:
        """The layer's state."""
        return {name: array.copy() for name, array in self._arrays().items()}

    def _restore(self, arrays: Mapping[str, Array]) -> None:
        """Write a state that is known to fit."""
        own = self._arrays()
        write(list(own.values()), [arrays[name] for name in own])

    def __getstate__(self) -> dict[str, Any]:
        # A copy is of the layer, not of the arrays of its last call.
        return self.__dict__ | {"_last": None}

    def _described(self, kind: type[AffineLayer], *sizes: int, **others: Any) -> str:
        """A call of `kind` that makes such a layer, with the options that are not the default."""
        defaults: dict[str, Any] = inspect.unwrap(kind.__init__).__kwdefaults__ or {}
        told = {name: getattr(self, name) for name in defaults if hasattr(self, name)}
        told |= {"scale": self.gamma is not None, "shift": self.beta is not None}
        told |= {"dtype": self._dtype_name} | others
        words = [f"{n}={told[n]!r}" for n in defaults if n in told and told[n] != defaults[n]]
        return f"{kind.__name__}({', '.join([*map(str, sizes), *words])})"
