"""Calls beside those of other threads and processes; for processes of their own to import."""

from __future__ import annotations

import os
from hashlib import sha256
from typing import NamedTuple

import numpy as np

import fastbn


class Problem(NamedTuple):
    """What a call works on."""

    shape: tuple[int, ...]
    layout: str
    dtype: str


LARGE = Problem((16, 24, 60, 61), "NCHW", "float32")
"""Work for many threads."""

MIXED = (
    LARGE,
    Problem((2, 3), "NCHW", "float64"),
    Problem((40, 7, 9, 50), "NHWC", "float32"),
    Problem((1, 64, 56, 56), "NCHW", "float32"),
    Problem((8, 300, 33), "NHWC", "float64"),
    Problem((3, 700, 5), "NCHW", "float64"),
)
"""Work of all sizes, for both families of kernels."""


def digest(problem: Problem) -> str:
    """All results of training and inference on a problem."""
    x = np.random.default_rng(0).normal(3, 2, problem.shape).astype(problem.dtype)
    layout = problem.layout
    y, mean, var = fastbn.batch_norm(x, layout=layout)
    dx, dgamma, dbeta = fastbn.batch_norm_backward(y, x, mean, var, layout=layout, params=True)
    inference = fastbn.normalize(x, mean, var, layout=layout)
    found = sha256()
    for result in (y, mean, var, dx, dgamma, dbeta, inference):
        found.update(np.ascontiguousarray(result).tobytes())
    return found.hexdigest()


def native_threads() -> set[str]:
    """The threads of this process, Python's and all others."""
    return set(os.listdir("/proc/self/task"))  # noqa: PTH208


def started() -> int:
    """How many threads the process has started for a call on the large problem."""
    before = native_threads()
    digest(LARGE)
    return len(native_threads() - before)
