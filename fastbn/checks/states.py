"""A layer's state: arrays by PyTorch's names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn.checks.arrays import array
from fastbn.checks.layers import counter
from fastbn.checks.memory import writeable
from fastbn.checks.vectors import mean, variance
from fastbn.checks.words import described, dtype_words, listed
from fastbn.elements import is_half


def arrays(own: dict[str, Any]) -> dict[str, NDArray[Any]]:
    """A layer's arrays as it has them, by their names in it."""
    return {
        # The layer checks it when it is set.
        name: a if _kind(name) == "num_batches_tracked" else array(name, a)
        for name, a in own.items()
    }


def _kind(name: str) -> str:
    """What an array is, of whichever domain."""
    return name.partition(".")[0]


def state(
    value: Any,
    own: dict[str, NDArray[Any]],
    options: str = "scale, shift, track_running_stats and domains",
) -> dict[str, NDArray[Any]]:
    """A layer's arrays, by name: as many, of the shapes and kinds that it has, which `options`
    decide."""
    if not isinstance(value, Mapping):
        raise TypeError(f"state is {described(value)}, expected a mapping, as state_dict gives it")
    needed = [name for name in own if _kind(name) != "num_batches_tracked"]
    missing = [name for name in needed if name not in value]
    unknown = [name for name in value if name not in own]
    expected = f"expected {listed(list(own))}"
    prefixes = _prefixes(value, needed) if missing else []
    if prefixes:
        plural = "es" if len(prefixes) > 1 else ""
        raise ValueError(
            f"state has a network's names, {expected}; these stand after {len(prefixes)} "
            f"prefix{plural}; strip one: set prefix = {prefixes[0]!r} and pass "
            "{name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)}"
        )
    if missing or unknown:
        odd = "; ".join(
            f"{what} {listed(names)}"
            for what, names in (("missing are", missing), ("not known are", unknown))
            if names
        )
        raise ValueError(
            f"state has not the layer's names, {expected}; {odd}; make the layer with the "
            f"{options} of the one that was saved"
        )
    for name, a in own.items():
        writeable(f"the layer's {name!r}", a, "a state is written into it; assign a copy")
    # PyTorch's states had no counter at first.
    return {name: _state_array(name, value.get(name, 0), a) for name, a in own.items()}


def _prefixes(state: Mapping[Any, Any], names: Sequence[str]) -> list[str]:
    """What stands before all of a layer's names, where the state is a network's."""
    found = [
        name.removesuffix(names[0])
        for name in state
        if names and isinstance(name, str) and name.endswith(names[0])
    ]
    return [p for p in found if all(p + name in state for name in names)]


def own_statistics(
    value: Any, own: dict[str, NDArray[Any]], made: str, options: Sequence[str]
) -> None:
    """A state of a layer that keeps parameters of channels alone, which these options decide; what
    else is wrong, `state` tells."""
    if not isinstance(value, Mapping):
        return
    running = [name for name in value if name in ("running_mean", "running_var")]
    if running:
        raise ValueError(
            f"state has {' and '.join(map(repr, running))}, expected parameters alone: a {made} "
            "goes by x's own statistics, in evaluation too; leave out what runs, or use "
            "fastbn.FrozenBatchNorm to normalize by it"
        )
    for name, a in own.items():
        shape = tuple(getattr(value.get(name), "shape", ()))
        if len(shape) > 1:
            raise ValueError(
                f"state[{name!r}] has shape {shape}, expected {a.shape}: parameters are of "
                f"channels, not of elements; make the {made} with "
                f"{' and '.join(f'{name}=False' for name in options)}, and apply them yourself"
            )


def _state_array(name: str, value: Any, own: NDArray[Any]) -> NDArray[Any]:
    """One of them, in the layer's type."""
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(
            f"state[{name!r}] is a numpy.ma.MaskedArray, expected a plain array: a mask would be "
            f"ignored; pass state[{name!r}].filled(value), or state[{name!r}].data to ignore it"
        )
    try:
        given = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"state[{name!r}] is {described(value)}, expected an array; NumPy says: {error}"
        ) from error
    if given.shape != own.shape:
        raise ValueError(
            f"state[{name!r}] has shape {given.shape}, expected {own.shape}, as the layer has; "
            "pass the state of a layer with as many channels"
        )
    if own.dtype.kind in "iu" and (given.dtype.kind != "V" or is_half(given.dtype)):
        return counter(given, f"state[{name!r}]")
    may_be_bits = given.dtype.kind in "iu" and given.dtype.itemsize == 2
    if may_be_bits or (given.dtype.kind not in "fiu" and not is_half(given.dtype)):
        raise TypeError(
            f"state[{name!r}] has dtype {dtype_words(given.dtype)}, expected {own.dtype} or what "
            f"rounds to it; {_remedy(name, given.dtype, own.dtype)}"
        )
    if _kind(name) == "running_var":
        variance(given, nan=False, name=name)
    elif _kind(name) == "running_mean":
        mean(given, name)
    return given


def _remedy(name: str, came: np.dtype[Any], wanted: np.dtype[Any]) -> str:
    """What to do about an array of another type in a state: NumPy, which has no bfloat16, saves one
    as two bytes without a type, and others save its bits as whole numbers."""
    given = f"numpy.asarray(state[{name!r}])"
    if came.name == "bfloat16":
        return f"pass {given}.view(numpy.uint16).byteswap().view(ml_dtypes.bfloat16)"
    if came.itemsize != 2 or came.kind not in "iuV":
        return f"convert it to {wanted}"
    bits = f"pass {given}.view(ml_dtypes.bfloat16) if these are bfloat16's bits"
    return bits if came.kind == "V" else f"{bits}, or {given}.astype(numpy.{wanted}) if numbers"
