"""No floating-point mode is changed, nor what warns; each variant in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from support import floating_point_mode
from support.processes import output
from support.variants import VARIANTS, environment, proof

pytestmark = pytest.mark.slow

PRELUDE = f"""
import os, sys, warnings
from concurrent.futures import ThreadPoolExecutor
import numpy as np
sys.path.append({str(Path(__file__).parent)!r})
from support import floating_point_mode
warnings.simplefilter("error", RuntimeWarning)
old = ThreadPoolExecutor(1)
old.submit(int).result()

def everywhere(function):
    "In this thread, in one from before the import, and in a new one."
    with ThreadPoolExecutor(1) as new:
        others = [pool.submit(function) for pool in (old, new)]
        return [function(), *(other.result() for other in others)]

before = everywhere(floating_point_mode.state)
assert before == 3 * before[:1]
assert np.float32(1e-40) * np.float32(0.5) == np.float32(5e-41) != 0, "subnormals are flushed"
variables = dict(os.environ)
import fastbn
x, dy = np.random.default_rng(0).normal(size=(2, 16, 24, 60, 61)).astype(np.float32)
mean, var = np.zeros(24), np.ones(24)
CALLS = {{
    "batch_norm": lambda: fastbn.batch_norm(x),
    "moments": lambda: fastbn.moments(x),
    "normalize": lambda: fastbn.normalize(x, mean, var),
    "batch_norm_backward": lambda: fastbn.batch_norm_backward(dy, x, mean, var),
    "normalize_backward": lambda: fastbn.normalize_backward(dy, x, mean, var),
}}
def all_calls():
    for call in CALLS.values():
        call()
"""

LEFT_ALONE = """
assert everywhere(floating_point_mode.state) == before, "importing changed the mode"
everywhere(all_calls)
assert everywhere(floating_point_mode.state) == before, "calling changed the mode"
assert dict(os.environ) == variables
"""

RAISING = """
with np.errstate(all="raise", under="ignore"):
    modes = np.geterr()
    all_calls()
    # What the values are is the data's affair: no flag of theirs reaches the caller.
    fastbn.batch_norm(np.full((64, 3, 9), np.inf, np.float32))
    fastbn.batch_norm(np.full((64, 3, 9), 3e38, np.float32), np.full(3, 1e30), eps=0.0)
    fastbn.normalize(x, np.zeros(24), np.zeros(24), eps=1e-300)
    assert np.geterr() == modes
"""

# The first call is made in the usual mode: Numba keeps on disk what it compiles then.
CALLERS = """
everywhere(all_calls)
def called():
    for mode in (floating_point_mode.flushing, floating_point_mode.upward):
        with mode():
            callers = floating_point_mode.state()
            assert callers != before[0], f"{mode.__name__} is not in force"
            for verb, call in CALLS.items():
                call()
                assert floating_point_mode.state() == callers, f"{verb} changed {mode.__name__}"
everywhere(called)
assert everywhere(floating_point_mode.state) == before
"""

SUBNORMALS = """
x, dy = (a * np.float32(1e-39) for a in (x, dy))
x[np.abs(x) < 1e-42] = 1e-41
assert 0 < np.abs(x).min() and np.abs(x).max() < np.finfo(np.float32).tiny
def results():
    y, mean, var = fastbn.batch_norm(x, eps=0.0)
    gradients = fastbn.batch_norm_backward(dy, x, mean, var, np.full(24, 1e-39), eps=0.0)
    same = fastbn.normalize(x, np.zeros(24), np.ones(24), eps=0.0)
    kept = fastbn.normalize_backward(dy, x, np.zeros(24), np.ones(24), eps=0.0)
    assert np.array_equal(same, x) and np.array_equal(kept.dx, dy), "subnormals are flushed"
    return b"".join(a.tobytes() for a in (y, mean, var, *gradients, *kept))
def alike():
    with fastbn.use_num_threads(1):
        one = results()
    for threads in (2, 3, 7):
        with fastbn.use_num_threads(threads):
            assert results() == one, f"{threads} threads"
"""

WORKERS = SUBNORMALS + "everywhere(alike)\n"

# Threads that a call starts in the caller's mode are still there when the caller has another.
LATER_WORKERS = (
    SUBNORMALS
    + """
def first_flushing():
    with floating_point_mode.flushing(), fastbn.use_num_threads(7):
        all_calls()
    alike()
everywhere(first_flushing)
"""
)

READS = pytest.mark.skipif(
    not floating_point_mode.READABLE,
    reason="where MXCSR is found is known of x86-64 with glibc alone",
)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(
    "code",
    [
        pytest.param(LEFT_ALONE, id="left alone"),
        pytest.param(RAISING, id="raising"),
        pytest.param(CALLERS, id="caller's", marks=READS),
        pytest.param(WORKERS, id="workers"),
        pytest.param(LATER_WORKERS, id="later workers", marks=READS),
    ],
)
def test_modes(code: str, name: str) -> None:
    """The mode is left alone by import and calls, the caller's own too; no worker flushes."""
    variables = environment(name) | {"FASTBN_NUM_THREADS": "2", "NUMBA_NUM_THREADS": "7"}
    assert output(PRELUDE + proof(name) + code + "print('ok')", **variables) == "ok"
