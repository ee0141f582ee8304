"""Python threads that call at once: the same bits, on cores that the calls share."""

from __future__ import annotations

import importlib
import pkgutil
import re
import sysconfig
from pathlib import Path

import pytest

from fastbn import _ext, backends
from support.processes import finds_tests, output
from support.variants import RUNNERS

pytestmark = pytest.mark.slow

EXTENSIONS = [module.name for module in pkgutil.iter_modules(_ext.__path__)]

AT_ONCE = """
import threading
from concurrent.futures import ThreadPoolExecutor
from support.concurrency import MIXED, digest
expected = [digest(problem) for problem in MIXED]
ready = threading.Barrier({callers})
def differing(first):
    ready.wait()
    order = [(first + i) % len(MIXED) for i in range(len(MIXED))]
    return [k for k in order if digest(MIXED[k]) != expected[k]]
with ThreadPoolExecutor({callers}) as pool:
    print(sum(pool.map(differing, range({callers})), []))
"""

SHARING = """
from support import blocking_calls, concurrency
blocking_calls.wait_at_forbidden_pages()
calls = [blocking_calls.BlockingCall(threads=2) for _ in range(7)]
team, teams = 1, []
for others in (7, 3, 1, 0):
    while len(calls) > others:
        assert calls.pop().release()
    team += concurrency.started()
    teams.append(team)
print(teams)
"""

ONE_AT_A_TIME = """
from support import blocking_calls, concurrency
blocking_calls.wait_at_forbidden_pages()
call = blocking_calls.BlockingCall(threads=2)
beside = concurrency.started()
assert call.release()
print(beside, concurrency.started())
"""

AFTER_A_FAILURE = """
import numpy as np, fastbn
from fastbn import config
from fastbn.backends.base import Affine
from support import concurrency
endless = np.broadcast_to(np.float32(0), (1, 1, 1 << 58, 1))
row = np.broadcast_to(0.0, 1 << 58)
for _ in range(8):
    try:
        config.current()[0].normalize(endless, Affine(row, row, row), endless, 1)
    except MemoryError as error:
        assert "tables of sums" in str(error), error
    else:
        raise AssertionError("tables for an endless row")
print(concurrency.started())
"""


def environment(runner: str, threads: int) -> dict[str, str]:
    counts = {"FASTBN_NUM_THREADS": str(threads), "NUMBA_NUM_THREADS": str(threads)}
    return RUNNERS[runner] | finds_tests() | counts


needs_openmp = pytest.mark.skipif(
    backends.openmp() is None, reason="the kernels are not built with OpenMP: no call has threads"
)


@pytest.mark.parametrize("callers", [1, 8, 64])
@pytest.mark.parametrize("runner", RUNNERS)
def test_calls_at_once(runner: str, callers: int) -> None:
    """All sizes of work at the same time, each with the bits that it has alone."""
    assert output(AT_ONCE.format(callers=callers), **environment(runner, 3)) == "[]"


@needs_openmp
def test_calls_in_flight_share_the_threads() -> None:
    """Of eight threads a call takes 1, 2, 4 or 8 while 7, 3, 1 or no others are in flight."""
    assert output(SHARING, **environment("cython", 8)) == "[1, 2, 4, 8]"


@pytest.mark.skipif("numba" not in backends.usable(), reason="needs numba")
def test_numba_runs_one_call_at_a_time_in_parallel() -> None:
    """While one is in flight another starts no threads; later it does."""
    assert output(ONE_AT_A_TIME, **environment("numba on omp", 3)) == "0 2"


@needs_openmp
def test_a_call_that_fails_is_no_longer_in_flight() -> None:
    """Memory for the tables was refused; the next call has all threads."""
    assert output(AFTER_A_FAILURE, **environment("cython", 8)) == "7"


@pytest.mark.parametrize("name", EXTENSIONS)
def test_is_declared_safe_without_the_gil(name: str) -> None:
    """What a Python without the GIL would be told, as generated for every module."""
    path = Path(str(importlib.import_module(f"fastbn._ext.{name}").__file__))
    source = path.with_name(f"{name}.c")
    if not source.exists():
        pytest.skip("the C from which the kernels were built is not installed with them")
    told = re.findall(r"#define __Pyx_FREETHREADING_COMPATIBLE (\w+)", source.read_text())
    assert told[-1] == "Py_MOD_GIL_NOT_USED"


@pytest.mark.skipif(not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="Python has a GIL")
def test_import_leaves_the_gil_off() -> None:
    """Python would turn it on for a module that does not declare itself."""
    code = "import sys, fastbn; fastbn.set_backend('cython'); print(sys._is_gil_enabled())"
    assert output(code) == "False"
