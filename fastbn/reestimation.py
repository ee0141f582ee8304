"""The running statistics of a trained network, estimated anew.

Running averages lag behind the weights, and small batches make them noisy. Here every layer gets
the statistics of a whole data set under the network as it is: Ioffe & Szegedy (2015), Algorithm 2,
for one layer after the other, since each one's input depends on those before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from typing import Any

import numpy as np

from fastbn import checks
from fastbn.layers.base import at_once
from fastbn.layers.batch_norm import BatchNorm
from fastbn.statistics import Moments, Population


def reestimate(
    layers: Sequence[BatchNorm],
    forward: Callable[[Any], object],
    batches: Iterable[Any],
    *,
    method: str = "exact",
    sequential: bool = True,
    domain: str | None = None,
) -> None:
    """Give the layers of a network the statistics of all batches as running statistics.

    Parameters
    ----------
    layers : sequence of BatchNorm
        Those to renew, in the order in which `forward` calls them. Others do in these calls what
        they do in any.
    forward : callable
        Takes a batch through the network: it calls the layers. What it sets their modes to
        changes nothing, and they get theirs back.
    batches : iterable
        What `forward` takes. With `sequential` it is walked once a layer: a list, or something
        that starts anew, in the same order or another.
    method : {"exact", "average"}
        As of `fastbn.population_statistics`. The variance is the unbiased one.
    sequential : bool
        Whether each layer is renewed by a walk of its own, in which those before it are already
        renewed. False: one walk for all, in which all of them normalize by the batches' own
        statistics, as in training.
    domain : str, optional
        Whose running statistics to renew, of layers with domains: one that all of them have, and
        that `forward` calls them with. Calls with another one do what they do otherwise.

    `num_batches_tracked` stays: renormalization's limits are as far open as before, and where
    momentum is None the new statistics weigh in the average as the old ones did. Those of a layer
    that has seen no batch in training weigh nothing, and the next one replaces them, unless
    `num_batches_tracked` is set.

    There is no `backward` through these calls, and what NaN in the batches does to statistics no
    layer's `nonfinite` changes. Calls with ``update=False`` do not count.

    Raises
    ------
    TypeError, ValueError
        An argument is of a wrong type or value, or a layer was not called, or has no running
        statistics. Whatever is raised, by `forward` too: all layers are as they were.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> batches = np.random.default_rng(0).normal(3.0, 2.0, (10, 32, 4)).astype(np.float32)
    >>> first, second = fastbn.BatchNorm(4), fastbn.BatchNorm(4)
    >>> fastbn.reestimate([first, second], lambda x: second(2 * first(x)), batches)
    >>> bool(np.allclose(first.running_mean, 3, atol=0.3)), second.running_var.round(2)
    (True, array([4., 4., 4., 4.], dtype=float32))
    """
    method = checks.options.option("method", method, checks.options.METHODS)
    sequential = checks.options.flag("sequential", sequential)
    checks.statistics.layers(layers, BatchNorm)
    runnings = [layer._running_of(domain, f"layers[{i}]") for i, layer in enumerate(layers)]
    for i, running in enumerate(runnings):
        running.checked(writes=True, nan=True, of=f"layers[{i}].")
    checks.statistics.network(forward)
    walks = [[i] for i in range(len(layers))] if sequential else [list(range(len(layers)))]
    checks.statistics.reiterable(batches, len(walks))
    restore_modes = at_once(
        dict.update,
        [*map(vars, layers), *map(vars, runnings)],
        [*map(_modes, layers), *({"observe": None, "is_frozen": False} for _ in runnings)],
    )
    every = (a for layer in layers for a in layer._arrays().values())
    arrays = [a for a in every if a.flags.writeable]
    copies = [a.copy() for a in arrays]
    restore_arrays = at_once(np.ndarray.__setitem__, arrays, repeat(...), copies)
    # No function in Python stands between what is raised and these two calls.
    try:
        for running in runnings:
            running.observe = _ignore
        for walk in walks:
            populations = [Population(method) for _ in walk]
            for i, population in zip(walk, populations, strict=True):
                runnings[i].observe = population.add
            for batch in batches:
                forward(batch)
            for i, population in zip(walk, populations, strict=True):
                found = population.statistics(f"layers[{i}]")
                runnings[i].replace(found.mean, found.var)
                runnings[i].observe, runnings[i].is_frozen = None, True
    except BaseException:
        restore_arrays()
        raise
    finally:
        restore_modes()


def _modes(layer: BatchNorm) -> dict[str, Any]:
    """What a layer has again afterwards."""
    names = "_training", "_frozen_statistics"
    return {name: vars(layer)[name] for name in names} | {"_last": None}


def _ignore(batch: Moments) -> None:
    """For layers whose turn has not come."""
