"""A layer's options, arrays and attributes, and its last call."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn.checks.arrays import ANY, WIDE, array
from fastbn.checks.memory import writeable
from fastbn.checks.options import flag, option
from fastbn.checks.vectors import Owner, channel_vector, mean, variance
from fastbn.checks.words import (
    as_float,
    described,
    first_bad,
    is_number,
    listed,
    whole_number,
    word_of,
    wrong_type_or_value,
)
from fastbn.elements import is_float
from fastbn.errors import shown

CLOSE = 0.8
"""From which ratio of difflib's on a name is taken for another one."""
ONE_VALUE = ("raise", "running", "skip")
NONFINITE = ("update", "raise", "skip")
MOST_BATCHES = int(np.iinfo(np.int64).max)
"""Where counting stops."""


def channels(value: Any) -> int:
    """How many channels a layer has: one or more."""
    n = whole_number("channels", value, "a whole number", "pass an int")
    if n < 1:
        raise ValueError(
            f"channels is {shown(n)}, expected one or more; pass those of the arrays to come"
        )
    return n


def momentum(momentum: Any, decay: Any, default: float) -> tuple[float | None, float | None]:
    """The weight of the new batch or that of the old; one of them, or the default."""
    if decay is not None and momentum is not default:
        raise ValueError(
            f"momentum is {shown(momentum)} and decay is {shown(decay)}, expected one of them: "
            "momentum is the weight of the new batch, decay the weight of the old; leave one out"
        )
    if decay is not None:
        return None, weight_of_old(decay)
    if momentum is None:
        return None, None
    return _weight("momentum", momentum, "of the new batch"), None


def weight_of_old(decay: Any) -> float:
    """decay alone."""
    return _weight("decay", decay, "of the old statistics")


def _weight(name: str, value: Any, whose: str) -> float:
    """A number from 0 to 1."""
    if not is_number(value):
        raise TypeError(
            f"{name} is {described(value)}, expected a number from 0 to 1; for the average of all "
            "batches pass momentum=None"
        )
    number = as_float(value)
    if not 0 <= number <= 1:
        raise ValueError(
            f"{name} is {number}, expected a number from 0 to 1: it is the weight {whose}, and the "
            f"other gets 1 - {name}"
        )
    return number


def one_value(value: Any, tracks: bool, virtual_batch: int | None) -> str:
    """What a layer does with one value a channel."""
    known = option("one_value", value, ONE_VALUE)
    if known == "running" and not tracks:
        raise ValueError(
            "one_value is 'running', expected 'raise' or 'skip' where track_running_stats is "
            "False: there are no running statistics to use"
        )
    if known == "running" and virtual_batch is not None:
        raise ValueError(
            f"one_value is 'running', expected 'raise' or 'skip' where virtual_batch is "
            f"{virtual_batch}: the groups of a batch are normalized alike; pass 'skip' to leave "
            "groups of one value out of the running statistics"
        )
    return known


def domains(value: Any, tracks: bool) -> tuple[str, ...] | None:
    """The names of a layer's sets of running statistics; None for one set without a name."""
    if value is None:
        return None
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise TypeError(
            f"domains is {described(value)}, expected a list or tuple of names, or None; pass "
            "(name,) for one domain"
        )
    if not value:
        raise ValueError(
            f"domains is {shown(value)}, expected one name or more; leave it out for one set of "
            "running statistics"
        )
    names: dict[str, int] = {}
    for i, given in enumerate(value):
        name = word_of(given)
        if not name:
            raise wrong_type_or_value(
                given,
                str,
                f"domains[{i}] is {shown(given)}, expected a name, a str that is not empty; give "
                "each domain one",
            )
        if name in names:
            raise ValueError(
                f"domains[{i}] is {shown(name)}, as domains[{names[name]}] is, expected distinct "
                "names; leave one of them out"
            )
        names[name] = i
    if not tracks:
        raise ValueError(
            f"domains is {shown(value)}, expected None where track_running_stats is False: there "
            "are no running statistics to keep apart; leave one of them out"
        )
    return tuple(names)


def domain(value: Any, known: tuple[str, ...] | None, owner: str) -> str | None:
    """The set of running statistics that a call is about."""
    if known is None:
        if value is not None:
            raise ValueError(
                f"domain is {shown(value)}, expected None: {owner} has no domains; leave it out, "
                "or make the layer with domains, a tuple of their names"
            )
        return None
    name = word_of(value)
    if name not in known:
        raise wrong_type_or_value(
            value,
            str,
            f"domain is {shown(value)}, expected one of {listed(known)}, the domains of {owner}; "
            "pass one of them",
        )
    return name


def no_domains(name: str, domains: tuple[str, ...] | None) -> None:
    """An attribute of layers with one set of running statistics."""
    if domains is not None:
        raise AttributeError(
            f"{name} is an attribute of layers without domains, and this one has "
            f"{listed(domains)}; take layer.running({domains[0]!r}), whose arrays can be written "
            "in place"
        )


def renormalization(value: Any, kind: type, tracks: bool, virtual_batch: int | None) -> Any:
    """What a layer's renormalization is limited by; None for none."""
    if value is None:
        return None
    if not isinstance(value, kind):
        raise TypeError(
            f"renormalization is {described(value)}, expected a fastbn.{kind.__name__} or None; "
            f"pass fastbn.{kind.__name__}() for the limits of the paper"
        )
    if not tracks:
        raise ValueError(
            "renormalization is given, expected None where track_running_stats is False: it goes "
            "by the running statistics; leave one of them out"
        )
    if virtual_batch is not None:
        raise ValueError(
            "renormalization and virtual_batch are both given, expected one of them: r and d are "
            "of the batch as a whole; leave one out"
        )
    return value


def frozen_statistics(value: Any, tracks: bool) -> bool:
    """Whether a layer goes by its running statistics always."""
    is_frozen = flag("frozen_statistics", value)
    if is_frozen and not tracks:
        raise ValueError(
            "frozen_statistics is True, expected False where track_running_stats is False: there "
            "are no running statistics to go by; leave one of them out"
        )
    return is_frozen


def limit(name: str, value: Any, least: float, meaning: str) -> float:
    """How far renormalization goes at most."""
    if not is_number(value):
        raise TypeError(
            f"{name} is {described(value)}, expected a number, {least} or more; pass a float"
        )
    number = as_float(value)
    if not least <= number < math.inf:
        raise ValueError(
            f"{name} is {shown(value)}, expected a finite number, {least} or more; it says "
            f"{meaning}"
        )
    return number


def schedule(start: Any, **ends: Any) -> dict[str, int]:
    """Numbers of batches between which limits open."""
    numbers = {
        name: whole_number(name, value, "a whole number of batches", "pass an int")
        for name, value in ({"start": start} | ends).items()
    }
    start = numbers["start"]
    if start < 0:
        raise ValueError(
            f"start is {shown(start)}, expected a number of batches, zero or more; pass 0"
        )
    for name, end in numbers.items():
        if end < start:
            raise ValueError(
                f"{name} is {shown(end)}, expected {shown(start)} or more, as start is: limits "
                "open from start on; pass the same for limits that are open at once"
            )
    return numbers


def batches(value: Any) -> int:
    """How many batches running statistics are of, where something goes by it."""
    if value is None:
        raise ValueError(
            "num_batches_tracked is None, expected a number of batches: renormalization's limits "
            "go by it; set it"
        )
    return int(value)


def parameter_type(value: Any) -> np.dtype[Any]:
    """The type of a layer's arrays."""
    is_long = isinstance(value, str | bytes) and len(value) > 100  # which NumPy would parse
    try:
        found: np.dtype[Any] = np.dtype(object if is_long else value)
    except Exception:  # NumPy's, and those of what it prints into its message
        found = np.dtype(object)
    if value is None or not is_float(found):
        raise TypeError(
            f"dtype is {shown(value)}, expected 'float32' or 'float64': the type of parameters and "
            "running statistics, whatever the arrays are"
        )
    return found.newbyteorder("=")


def several_values(
    policy: str, counts: NDArray[Any], tracks: bool, virtual_batch: int | None
) -> None:
    """More than one value a channel in each group, where the layer's policy asks for it."""
    if one_value(policy, tracks, virtual_batch) != "raise":
        return
    came, running = "one value a channel", "'running' (use the running statistics) or "
    if len(counts) > 1:
        came += f" in group {counts.argmin()} of {len(counts)} (virtual_batch is {virtual_batch})"
    if not tracks or virtual_batch is not None:
        running = ""
    raise ValueError(
        f"x has {came}, expected two or more: one value has no variance to normalize by; give "
        f"a larger batch, or make the layer with one_value={running}'skip' (y = beta)"
    )


def several_values_a_sample(counts: NDArray[Any]) -> None:
    """More than one value in what shares statistics in each sample, or none."""
    sample = first_bad(counts == 1)
    if sample is not None:
        raise ValueError(
            f"x has one value in each group of sample {sample}, expected two or more: one value "
            "has no variance to normalize by; make the layer with one_value='skip' (y = beta)"
        )


def finite(found: dict[str, NDArray[Any]], renewed: dict[str, NDArray[Any]]) -> None:
    """Statistics of a batch, and running ones renewed by them, without NaN and infinity."""
    for name, a in found.items():
        channel = first_bad(~np.isfinite(a))
        if channel is not None:
            raise ValueError(
                f"x has a {name} of {a[channel]} in channel {channel}, expected finite statistics; "
                "look for them in x, or make the layer with nonfinite='skip' or 'update'"
            )
    for name, a in renewed.items():
        channel = first_bad(~np.isfinite(a))
        if channel is not None:
            of_x = ", ".join(f"a {word} of {b[channel]}" for word, b in found.items())
            raise ValueError(
                f"{name}[{channel}] would be {a[channel]}, expected a finite number in {a.dtype}: "
                f"x has {of_x} there; scale x, or make the layer with a wider dtype or with "
                "nonfinite='skip' or 'update'"
            )


def running(
    held: dict[str, Any], channels: int, *, writes: bool, nan: bool
) -> tuple[NDArray[Any], NDArray[Any]]:
    """A layer's running mean, variance and number of batches, by name: of its channels, to be
    written where `writes` says so.

    Infinity is let in where they are only used, as `normalize` lets it in; what is to be written
    and may not become NaN has to be finite.
    """
    mean_name, var_name, counted = held
    if held[mean_name] is None or held[var_name] is None:
        raise ValueError(
            f"{mean_name} and {var_name} are None, expected arrays: the layer keeps no "
            "running statistics; make it with track_running_stats=True"
        )
    owner = Owner(channels, f"the layer has {channels} channels")
    own = {name: channel_vector(name, held[name], owner, WIDE) for name in (mean_name, var_name)}
    running_mean, running_var = own.values()
    if writes:
        batches = held[counted]
        tracked = {} if batches is None else {counted: counter(batches, counted)}
        for name, a in (own | tracked).items():
            writeable(name, a, "training renews it; assign a copy, or set frozen_statistics")
    if not nan:
        mean(running_mean, mean_name)
    variance(running_var, nan=nan, name=var_name)
    if writes and not nan:
        for name, a in own.items():
            _renewable(name, a)
    return running_mean, running_var


def _renewable(name: str, a: NDArray[Any]) -> None:
    """Running statistics that a batch can change."""
    channel = first_bad(np.isinf(a))
    if channel is not None:
        raise ValueError(
            f"{name}[{channel}] is {a[channel]}, expected a finite number: no batch makes it one "
            "again; write a finite number, or make the layer with nonfinite='update'"
        )


def counter(value: Any, name: str = "num_batches_tracked") -> NDArray[np.int64]:
    """How many batches running statistics are of: an array of int64 and shape () as it is; any
    other whole number (7.0 is one) as such an array."""
    is_scalar = isinstance(value, np.ndarray | np.generic) and value.shape == ()
    n: Any = value.item() if is_scalar else value
    is_number = isinstance(n, Real) and not isinstance(n, bool)
    if not is_number or isinstance(value, np.ma.MaskedArray):
        raise TypeError(
            f"{name} is {described(value)}, expected a whole number, or a numpy.ndarray of int64 "
            "and shape (), or None; it is how many batches the running statistics are of"
        )
    if not (0 <= n <= MOST_BATCHES and n == int(n)):
        raise ValueError(
            f"{name} is {shown(n)}, expected a whole number, zero or more: how many batches the "
            "running statistics are of; set it to 0 to start anew"
        )
    if isinstance(value, np.ndarray) and value.dtype == np.int64 and value.dtype.isnative:
        return value
    return np.array(int(n), np.int64)


def gradient(name: str, value: Any, channels: int) -> NDArray[Any]:
    """Where a layer's backward is to write dgamma or dbeta."""
    return channel_vector(name, value, Owner(channels, f"the layer has {channels} channels"), WIDE)


def attribute(layer: Any, name: str, value: Any, aliases: Mapping[str, str]) -> None:
    """An attribute that a layer's class has; a subclass of somebody's may have others, with names
    that are not close to one of the layer's."""
    kind = type(layer)

    def is_method(known: str) -> bool:
        return inspect.isroutine(getattr(kind, known, None))

    if is_method(name) and not callable(value):
        raise AttributeError(
            f"{kind.__name__}.{name} is a method, expected something callable in its place; call "
            f"it, as layer.{name}()"
        )
    if hasattr(kind, name):
        return
    if any(name in inspect.get_annotations(each) for each in kind.__mro__):
        return
    import difflib  # that takes a part of a millisecond, which no import of fastbn should

    names = [n for n in (*vars(layer), *dir(kind)) if not n.startswith("_") and not is_method(n)]
    is_ours = kind.__module__.startswith(__name__.removesuffix("checks.layers"))
    cutoff = 0 if is_ours else CLOSE
    nearest = difflib.get_close_matches(aliases.get(name, name), names, 1, cutoff)
    if nearest:
        raise AttributeError(
            f"{kind.__name__} has no attribute {name!r}, expected one that it has; the nearest is "
            f"{nearest[0]!r}; a subclass names its own in its class body, or sets them in __init__"
        )


def keeps_form(dtype: Any, out_layout: Any) -> None:
    """Whether y is as x is, so that there is a gradient."""
    for name, value in (("dtype", dtype), ("out_layout", out_layout)):
        if value is not None:
            raise ValueError(
                f"backward was called of a FrozenBatchNorm with {name}={str(value)!r}, expected "
                "None: y is not of x's type and layout, and so is no dy; make one without it for "
                "training"
            )


def last_call(last: Any) -> Any:
    """What a layer's last call left."""
    if last is None:
        raise ValueError(
            "backward was called without saved, and the layer keeps no call: there was none, or "
            "the last one was with keep=False; call the layer on x first, or pass what its "
            "forward gave as saved"
        )
    return last


def saved(value: Any, kind: type, identity: object) -> Any:
    """What a forward of the layer with this identity left."""
    if not isinstance(value, kind):
        raise TypeError(
            f"saved is {described(value)}, expected a fastbn.{kind.__name__}; pass what forward "
            "gave beside y, as in y, saved = layer.forward(x)"
        )
    known: Any = value
    if known.layer is not identity:
        raise ValueError(
            f"saved is {known!r} of another layer, expected what this layer's own forward "
            "gave; call backward of that layer, of which a copy is another one"
        )
    return known


def gone_through(saved: Any, dy: Any, params: bool) -> None:
    """A dy that belongs to what a forward left, which still has what the gradient needs."""
    shape = array("dy", dy, ANY).shape
    if shape != saved.shape:
        raise ValueError(
            f"dy has shape {shape}, expected {saved.shape}, the shape of the x that the layer was "
            "called on; pass the dy of that call's y, or the saved that belongs to this dy"
        )
    if saved.x is None and saved.needs_x(params):
        raise ValueError(
            "x has been written over, by the layer's call or an earlier backward (out=x), and the "
            "gradient needs x; give them another out"
        )
