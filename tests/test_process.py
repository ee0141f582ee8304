"""Never in the way: fork, threads at exit; each variant in its own process."""

from __future__ import annotations

import pytest

from fastbn import backends
from support.processes import output
from support.variants import VARIANTS, environment, proof

pytestmark = pytest.mark.slow

PRELUDE = """
import os, sys
import numpy as np
import fastbn
x = np.random.default_rng(0).normal(size=(16, 24, 60, 61)).astype(np.float32)
def work():
    y, mean, var = fastbn.batch_norm(x)
    return fastbn.batch_norm_backward(y, x, mean, var).dx.tobytes() + y.tobytes()
"""

FORK = """
expected = work()
for generation in range(2):
    child = os.fork()
    if child == 0:
        os._exit(0 if work() == expected else 3)
    assert os.waitpid(child, 0)[1] == 0
    assert work() == expected
print("ok")
"""

# Whoever else uses the same OpenMP: its threads are lost in the child as well.
OTHERS = """
other = "cython" if fastbn.get_backend() == "numba" else "numba"
expected = work()
with fastbn.use_backend(other):
    work()
child = os.fork()
if child == 0:
    os._exit(0 if work() == expected else 3)
assert os.waitpid(child, 0)[1] == 0
print("ok")
"""

POOL = """
import multiprocessing
if __name__ == "__main__":
    expected = work()
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert all(r == expected for r in pool.map(job, range(4)))
    print("ok")
"""

THREADS_END = """
import threading
failures = []
def several():
    try:
        for _ in range(5):
            assert work() == expected
    except BaseException as error:
        failures.append(error)
expected = work()
threads = [threading.Thread(target=several) for _ in range(4)]
for t in threads: t.start()
for t in threads: t.join()
print("ok" if not failures else failures)
"""


@pytest.mark.parametrize("variant_name", VARIANTS)
@pytest.mark.parametrize(
    "code",
    [FORK, "def job(_): return work()\n" + POOL, THREADS_END],
    ids=["fork", "pool", "threads"],
)
def test_in_a_process_of_its_own(variant_name: str, code: str) -> None:
    """Works after fork, in a pool, in threads."""
    variables = environment(variant_name) | {"FASTBN_NUM_THREADS": "2"}
    assert output(PRELUDE + proof(variant_name) + code, **variables) == "ok"


@pytest.mark.skipif(
    not {"cython", "numba"} <= set(backends.usable()), reason="needs both compiled backends"
)
@pytest.mark.parametrize("backend", ["cython", "numba"])
def test_fork_after_another_backend_used_openmp(backend: str) -> None:
    """A child computes although another user of the same OpenMP had made the parent's threads."""
    variables = {"FASTBN_BACKEND": backend, "FASTBN_NUM_THREADS": "2"}
    first = "expected = work()\n"
    for code in (OTHERS, OTHERS.replace(first, "").replace("== expected", "!= b''")):
        assert output(PRELUDE + code, **variables) == "ok"
