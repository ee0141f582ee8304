"""Layers under test: one whose arrays all have values of their own, and calls that it refuses."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

import fastbn
from oracle.arrays import Array, to_layout

CHANNELS = 5


def made(mode: str = "training", /, **options: Any) -> Any:
    """A layer in a mode, whose arrays, as far as it has them, are neither 0 nor 1."""
    bn = fastbn.BatchNorm(CHANNELS, **options)
    rng = np.random.default_rng(0)
    bn.load_state_dict(
        {
            name: (3 + rng.exponential(size=a.shape)).astype(a.dtype)
            for name, a in bn.state_dict().items()
        }
    )
    bn.frozen_statistics = mode == "frozen statistics"
    return bn.train(mode != "evaluation")


def batch(shape: tuple[int, ...], layout: str = "NCHW", dtype: Any = np.float32) -> Array:
    """x, dy and a residual, stacked, of an NCHW shape."""
    values = np.random.default_rng(len(shape)).normal(1, 2, (3, *shape))
    return np.stack([to_layout(a, layout) for a in values]).astype(dtype)


@contextmanager
def fails(error: type[Exception], words: str) -> Iterator[None]:
    """The block raises just this error; the message starts with the words, "..." for any."""
    pattern = ".*".join(map(re.escape, re.split(r" ?\.\.\. ?", words)))
    with pytest.raises(error, match=f"^{pattern}") as caught:
        yield
    assert type(caught.value) is error


@contextmanager
def refused(bn: Any, error: type[Exception], words: str, *given: Array) -> Iterator[None]:
    """The block fails so, and leaves all that the layer holds, and the arrays given, as it was."""
    before, arrays = _held(bn), [a.tobytes() for a in given]
    with fails(error, words):
        yield
    assert [a.tobytes() for a in given] == arrays
    assert _held(bn) == before


def _held(bn: Any) -> dict[str, Any]:
    """What a layer has, by name: arrays by their bytes, all else by identity."""
    return {
        name: value.tobytes() if isinstance(value, np.ndarray) else id(value)
        for name, value in vars(bn).items()
    }
