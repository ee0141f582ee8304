"""What all layers have: parameters of channels and their gradients, a mode and a state.

`Layer` has a scale; `AffineLayer` has a shift, a layout, an activation and a residual besides.

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
SWITCHES = {"gamma": "scale", "beta": "shift"}
"""The options that say whether a layer has them."""


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
    def closing(self: Layer, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if type(self).__init__ is closing:
            self._is_made = True

    return closing


class Layer(ABC):
    """The base of the layers: each adds its own forward and backward."""

    _is_made = False
    """Whether the constructor is through."""
    _parameters: tuple[str, ...] = ("gamma",)
    """The names of those that there may be."""

    def __init__(
        self, channels: int, *, eps: float, scale: bool, frozen_affine: bool, dtype: DTypeLike
    ) -> None:
        self.channels = checks.layers.channels(channels)
        self.eps = checks.options.epsilon(eps)
        of_type = checks.layers.parameter_type(dtype)
        self._dtype_name = of_type.name
        has_scale = checks.options.flag("scale", scale)
        self.gamma: Array | None = np.ones(self.channels, of_type) if has_scale else None
        self._dgamma = np.zeros(self.channels, of_type)
        self.training = True
        self._frozen_affine = checks.options.flag("frozen_affine", frozen_affine)
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
            held = [getattr(self, f"_d{name}") for name in self._parameters]
            write(held, [0] * len(held))
        self._frozen_affine = is_frozen

    @property
    def dgamma(self) -> Array | None:
        return None if self.gamma is None or self.frozen_affine else self._dgamma

    @dgamma.setter
    def dgamma(self, value: Array) -> None:
        self._dgamma = checks.layers.gradient("dgamma", value, self.channels)

    def train(self, mode: bool = True) -> Self:
        """Set `training`, which changes nothing else; gives the layer."""
        self.training = checks.options.flag("mode", mode)
        return self

    def eval(self) -> Self:
        """Clear `training`, which changes nothing else; gives the layer."""
        return self.train(False)

    def _scale(self) -> Array:
        """gamma, or ones: it tells the gradients' type, too."""
        return np.ones(self.channels, self._dtype_name) if self.gamma is None else self.gamma

    def _wants_parameters(self) -> bool:
        """Whether a backward gives dgamma or dbeta, and may write it."""
        held = self._gradients_held()
        for name, a in held.items():
            checks.memory.writeable(name, a, "a backward writes it; assign a copy")
        return bool(held)

    def _gradients_held(self) -> dict[str, Array]:
        """Those that there are."""
        names = (f"d{name}" for name in self._parameters)
        return {name: a for name in names if (a := getattr(self, name)) is not None}

    def _options(self) -> dict[str, Any]:
        """What forward and backward are told alike."""
        return {"eps": self.eps}

    def _saved(self, options: dict[str, Any], x: Array, y: Array, out: Any, **others: Any) -> Saved:
        """What of a forward a backward needs: x, if y was not written over it, and y, if its slope
        is asked for."""
        is_lost = out is not None and checks.memory.share(out, x)
        x_kept, y_kept = None if is_lost else x, None if options.get("activation") is None else y
        of_layer = self._identity, type(self).__name__, options
        return Saved(*of_layer, x.shape, x_kept, y_kept, **others)

    def _go_back(self, dy: Any, saved: Any, accumulate: Any, **given: Any) -> Array:
        """A backward, told what else the layer's own is given; `out` is among it."""
        known, options = self._going_back(dy, saved, accumulate)
        found = self._gradients(dy, known, options | given)
        out = given["out"]
        if out is not None and known.x is not None and checks.memory.share(out, known.x):
            known.x = None
        self._leave(found, accumulate)
        dx: Array = found.dx
        return dx

    def _going_back(self, dy: Any, saved: Any, accumulate: Any) -> tuple[Saved, dict[str, Any]]:
        """What a backward goes by, once its arguments are checked but for those of its function."""
        params = self._wants_parameters()
        checks.options.flag("accumulate", accumulate)
        if saved is None:
            saved = checks.layers.last_call(self._last)
        known: Saved = checks.layers.saved(saved, Saved, self._identity)
        checks.layers.gone_through(known, dy, params)
        return known, known.options | {"params": params}

    @quiet
    def _leave(self, found: Any, accumulate: bool) -> None:
        """Write gradients into the arrays that are held, or add them."""
        held = self._gradients_held()
        values = {name: getattr(found, name) for name in held}
        if accumulate:
            values = {name: held[name] + a for name, a in values.items()}
        write(list(held.values()), list(values.values()))

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
        own = {name: getattr(self, name) for name in self._parameters}
        return {name: a for name, a in own.items() if a is not None}

    def state_dict(self) -> dict[str, Array]:
        """Copies of gamma, as "weight", and beta, as "bias", PyTorch's names; what the layer has
        not is left out."""
        return {name: array.copy() for name, array in self._arrays().items()}

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
        options = [SWITCHES[name] for name in self._parameters]
        checks.states.own_statistics(state, own, type(self).__name__, options)
        self._restore(checks.states.state(state, own, " and ".join(options)))

    def _restore(self, arrays: Mapping[str, Array]) -> None:
        """Write a state that is known to fit."""
        own = self._arrays()
        write(list(own.values()), [arrays[name] for name in own])

    def __getstate__(self) -> dict[str, Any]:
        # A copy is of the layer, not of the arrays of its last call.
        return self.__dict__ | {"_last": None}

    def __repr__(self) -> str:
        return self._described(type(self), self.channels)

    def _described(self, kind: type[Layer], *sizes: int, **others: Any) -> str:
        """A call of `kind` that makes such a layer, with the options that are not the default."""
        defaults: dict[str, Any] = inspect.unwrap(kind.__init__).__kwdefaults__ or {}
        told = {name: getattr(self, name) for name in defaults if hasattr(self, name)}
        told |= {SWITCHES[name]: getattr(self, name) is not None for name in self._parameters}
        told |= {"dtype": self._dtype_name} | others
        words = [f"{n}={told[n]!r}" for n in defaults if n in told and told[n] != defaults[n]]
        return f"{kind.__name__}({', '.join([*map(str, sizes), *words])})"


class AffineLayer(Layer):
    """The base of the layers with a shift, a layout, an activation and a residual."""

    _parameters = ("gamma", "beta")

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
        options: dict[str, Any] = {"eps": eps, "scale": scale, "dtype": dtype}
        super().__init__(channels, frozen_affine=frozen_affine, **options)
        self.layout = checks.options.layout(layout)
        self.activation: ActivationName = checks.options.activation_name(activation)
        has_shift = checks.options.flag("shift", shift)
        self._dbeta = np.zeros(self.channels, self._dtype_name)
        self.beta: Array | None = self._dbeta.copy() if has_shift else None
        self.dresidual: Array | None = None

    @property
    def dbeta(self) -> Array | None:
        return None if self.beta is None or self.frozen_affine else self._dbeta

    @dbeta.setter
    def dbeta(self, value: Array) -> None:
        self._dbeta = checks.layers.gradient("dbeta", value, self.channels)

    def _options(self) -> dict[str, Any]:
        return {"eps": self.eps, "layout": self.layout, "activation": self.activation}

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
        return self._go_back(dy, saved, accumulate, dresidual=dresidual, out=out)

    def _leave(self, found: Any, accumulate: bool) -> None:
        self.dresidual = getattr(found, "dresidual", None)
        super()._leave(found, accumulate)
