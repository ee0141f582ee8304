"""Objects that cannot be changed: what `FrozenBatchNorm` and `Moments` have in common."""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn

import numpy as np
from numpy.typing import NDArray


def locked(a: NDArray[Any]) -> NDArray[Any]:
    """A native copy over bytes, which nobody can make writeable."""
    dtype = a.dtype.newbyteorder("=")
    return np.ndarray(a.shape, dtype, np.asarray(a, dtype).tobytes())


class Immutable:
    """Cannot be changed; copies and pickles keep what a subclass has added."""

    __slots__ = ()
    _called: ClassVar[str]
    """The object's name in messages, and its remedy."""
    _remedy: ClassVar[str]

    def _set(self, attributes: dict[str, Any]) -> None:
        for name, value in attributes.items():
            object.__setattr__(self, name, value)

    def _added(self, kind: type) -> dict[str, Any] | None:
        """What a subclass of `kind` adds to its attributes: the state of a copy."""
        own: Any = object.__getstate__(self)
        attributes, slots = own  # the first None where there is no dictionary
        every = (attributes or {}) | slots
        known = {name for base in kind.__mro__ for name in vars(base)}
        return {n: value for n, value in every.items() if n not in known} or None

    def __setstate__(self, added: dict[str, Any]) -> None:
        self._set(added)

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise AttributeError(
            f"{self._called} cannot be changed: {name!r} cannot be set; {self._remedy}"
        )

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"{self._called} cannot be changed: {name!r} cannot be deleted; {self._remedy}"
        )
