"""What OpenMP knows of threads: the processors, where it binds threads to them, and its number for
the calling thread, which limits a call."""

from __future__ import annotations

import os

import pytest

from fastbn import backends
from fastbn._cpus import available_cpus
from support.processes import finds_tests, output
from support.variants import RUNNERS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(backends.openmp() is None, reason="the kernels are not built with OpenMP"),
]

ALLOWED = sorted(os.sched_getaffinity(0))
EVERY = " ".join(map(str, ALLOWED))

WORKING = """
import fastbn
from support import concurrency
with fastbn.use_num_threads(1):
    concurrency.started()  # what a first call imports may have threads of its own
print(fastbn.get_num_threads(), concurrency.started())
"""

LIMITED = """
import threading, fastbn
from support import concurrency
from threadpoolctl import threadpool_limits
def tell(*more):
    config = fastbn.get_config()
    print(fastbn.get_num_threads() == config["threads"], config["threads"],
          config["threads_source"], *more)
tell()
with threadpool_limits(1):
    concurrency.started()  # what a first call imports may have threads of its own
    tell(concurrency.started())
    thread = threading.Thread(target=tell)
    thread.start(), thread.join()
    with fastbn.use_num_threads(3):
        tell()
    fastbn.set_num_threads(2)
    tell()
"""

FORKED = """
import os, fastbn
from threadpoolctl import threadpool_limits
with threadpool_limits(2):
    child = os.fork()
    if child == 0:
        os._exit(fastbn.get_num_threads())
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), fastbn.get_num_threads())
"""

BINDING = [
    {"OMP_PROC_BIND": "true"},
    {"OMP_PROC_BIND": "close"},
    {"OMP_PROC_BIND": "spread"},
    {"OMP_PLACES": "threads"},
    {"OMP_PLACES": "cores", "OMP_PROC_BIND": "close"},
    {"GOMP_CPU_AFFINITY": EVERY},
]


COUNT = "import fastbn; print(fastbn.get_num_threads())"
FIRST = {"alone": "", "after OpenMP": "import ctypes; ctypes.CDLL('libgomp.so.1')\n"}


@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("variables", BINDING, ids=str)
def test_bound_threads_have_all_processors(variables: dict[str, str], first: str) -> None:
    """Loading OpenMP leaves the main thread one of them; whoever has loaded it."""
    assert int(output(FIRST[first] + COUNT, **variables)) == min(available_cpus(), 1024)


@pytest.mark.parametrize("runner", RUNNERS)
def test_bound_threads_work(runner: str) -> None:
    """On every backend as many run as without binding."""
    variables = RUNNERS[runner] | finds_tests()
    assert output(WORKING, **variables, OMP_PROC_BIND="true") == output(WORKING, **variables)


def test_places_are_processors() -> None:
    """Where places are a part of the processors, threads can run on that part alone."""
    for variables in ({"GOMP_CPU_AFFINITY": f"{ALLOWED[0]}"}, {"OMP_PLACES": f"{{{ALLOWED[0]}}}"}):
        assert output(COUNT, **variables) == "1"


@pytest.mark.parametrize("runner", ["cython", "numba on omp", "numba on workqueue"])
def test_the_calling_threads_number_is_a_limit(runner: str) -> None:
    """Whoever sets it, for the thread that sets it, where nobody gave fastbn a number."""
    if runner not in RUNNERS:
        pytest.skip("needs numba")
    counts = {"OMP_NUM_THREADS": "4", "NUMBA_NUM_THREADS": "4"}
    assert output(LIMITED, **RUNNERS[runner], **finds_tests(), **counts).splitlines() == [
        "True 4 OMP_NUM_THREADS",
        "True 1 omp_get_max_threads 0",
        "True 4 OMP_NUM_THREADS",
        "True 3 use_num_threads",
        "True 2 set_num_threads",
    ]


def test_fastbns_own_variable_is_not_limited() -> None:
    """FASTBN_NUM_THREADS holds whatever OpenMP is told."""
    code = "from threadpoolctl import threadpool_limits\nwith threadpool_limits(1):\n    " + COUNT
    assert output(code, FASTBN_NUM_THREADS="3") == "3"


def test_the_limit_in_a_forked_child() -> None:
    """A child's thread has the number of the thread that it was forked from."""
    assert output(FORKED, OMP_NUM_THREADS="3") == "2 3"
