"""All calls with arrays that hold nothing, on every variant; for a process of its own."""

from __future__ import annotations

from typing import Any

import numpy as np

from oracle.arrays import LAYOUTS
from support.every_call import ALL, Given, results
from support.guarded_calls import Log
from support.random_arrays import in_layout
from support.variants import VARIANTS, activate

SHAPES = ((0, 3), (2, 0), (0, 0), (0, 3, 4), (2, 3, 0), (1, 0, 1), (5, 0, 2, 2), (3, 1, 0, 1))
"""As NCHW words: no samples, no channels, no places."""
REFUSE = (
    "Standardizer",
    "BatchNorm",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "RMSNorm",
    "reestimate",
    "population_statistics",
)
"""What may refuse, with a clear error: layers have a channel or more, populations a value."""
LIKE_X = ("y", "plain", "dx", "ddy", "dresidual")


def every(path: str) -> None:
    """Make all calls."""
    log = Log(path)
    for name in VARIANTS:
        with activate(name):
            for shape in SHAPES:
                for layout in LAYOUTS:
                    given = Given(in_layout(shape, layout), layout, np.float32)
                    for verb, ways in ALL.items():
                        for how, call in ways.items():
                            log.put(f"{verb} ({how}), {name}: {shape} {layout}")
                            check(verb, call, given)
    log.put("")


def check(verb: str, call: Any, given: Given) -> None:
    """An empty result, or an error that says what to do."""
    try:
        found = results(call(given))
    except (TypeError, ValueError) as error:
        if verb in REFUSE and "expected" in str(error):
            return
        raise
    for name, a in found.items():
        assert np.isfinite(a.astype(float)).all(), f"{name} is {a}"
        if name in LIKE_X and a.ndim > 1:
            shapes = given.shape, given.other_shape
            assert a.shape in shapes, f"{name} has shape {a.shape}"
