"""Forked children work at once, in parallel where their threads can; the parent goes on."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from http.client import HTTPConnection
from pathlib import Path

import pytest

from fastbn import backends
from support.processes import TIMEOUT, finds_tests, output, python
from support.variants import RUNNERS

THREADS = 3
WORKERS = 3
Report = dict[str, int]

OS_FORK = """
import json, os
from support import import_time_calls
reading, writing = os.pipe()
child = os.fork()
if child == 0:
    os.write(writing, json.dumps(import_time_calls.report()).encode())
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print(json.dumps([json.loads(os.read(reading, 4096)), import_time_calls.report()]))
"""

POOL = """
import json, multiprocessing
from support import import_time_calls
context = multiprocessing.get_context("{method}")
context.set_forkserver_preload(["support.import_time_calls"])
if __name__ == "__main__":
    with context.Pool(1) as pool:
        child = pool.apply(import_time_calls.report)
    print(json.dumps([child, import_time_calls.report()]))
"""

FORKS = {
    "os.fork": OS_FORK,
    "fork": POOL.format(method="fork"),
    "forkserver": POOL.format(method="forkserver"),
}

BESIDE_A_CALL = """
import os
from support import blocking_calls, concurrency
expected = concurrency.digest(concurrency.LARGE)
blocking_calls.wait_at_forbidden_pages()
call = blocking_calls.BlockingCall(threads=2)
child = os.fork()
if child == 0:
    started = concurrency.started()
    os._exit(started if concurrency.digest(concurrency.LARGE) == expected else 99)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
assert concurrency.digest(concurrency.LARGE) == expected
assert call.release()
assert concurrency.digest(concurrency.LARGE) == expected
"""

KEEPS_ITS_THREADS = "int omp_pause_resource_all(int kind) { return kind > 0 ? -1 : 0; }"

SETTINGS = """
import json
control_socket_disable = True
def on_exit(server):
    from support import import_time_calls
    print(json.dumps(import_time_calls.report()))
"""


def environment(runner: str) -> dict[str, str]:
    """The variables for a process on `THREADS` threads that can import from here."""
    counts = {"FASTBN_NUM_THREADS": str(THREADS), "NUMBA_NUM_THREADS": str(THREADS)}
    return RUNNERS[runner] | finds_tests() | counts


def started_in_child(runner: str) -> int:
    """The threads that a child's first call starts: Numba can have none of GNU OpenMP there, and
    on its own layer has all of them beside the caller."""
    openmp = THREADS - 1 if backends.openmp() else 0
    return {"cython": openmp, "numba on workqueue": THREADS}.get(runner, 0)


@pytest.mark.slow
@pytest.mark.parametrize("how", FORKS)
@pytest.mark.parametrize("runner", RUNNERS)
def test_child_and_parent(runner: str, how: str) -> None:
    """A child of a process that has made calls, and then that process, or another beside it."""
    child, parent = json.loads(output(FORKS[how], **environment(runner)))
    assert child["process"] != child["importer"]  # whose threads it has lost
    assert (child["importer"] == parent["process"]) == (how != "forkserver")
    assert child["same"]
    assert parent["same"]
    assert child["started"] == started_in_child(runner)


@pytest.mark.parametrize("runner", [runner for runner in RUNNERS if runner != "numpy"])
def test_fork_while_another_thread_is_inside_a_call(runner: str) -> None:
    """The call does not go on in the child, nor does it count there."""
    assert int(output(BESIDE_A_CALL, **environment(runner))) == started_in_child(runner)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.skipif("cython" not in RUNNERS, reason="the compiled kernels are not built")
def test_child_is_serial_where_the_runtime_keeps_its_threads(tmp_path: Path) -> None:
    """An OpenMP that cannot give its threads up before a fork has lost them in the child."""
    library = tmp_path / "keeps.so"
    command = ["cc", "-shared", "-fPIC", "-o", str(library), "-xc", "-"]
    subprocess.run(command, input=KEEPS_ITS_THREADS, text=True, check=True)
    preloaded = f"{os.environ.get('LD_PRELOAD', '')} {library}"
    variables = environment("cython") | {"LD_PRELOAD": preloaded}
    child, parent = json.loads(output(OS_FORK, **variables))
    assert child["same"]
    assert parent["same"]
    assert child["started"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("runner", RUNNERS)
def test_gunicorn_preload(runner: str, tmp_path: Path) -> None:
    """Every worker answers, and in the end the master goes on."""
    settings = tmp_path / "settings.py"
    settings.write_text(SETTINGS)
    answers, master = served_by_gunicorn(settings, runner)
    workers = {answer["process"] for answer in answers}
    assert len(workers) == WORKERS
    assert master["process"] not in workers
    assert master["same"]
    for answer in answers:
        assert answer["importer"] == master["process"]  # whose threads it has lost
        assert answer["same"]
        assert answer["started"] == started_in_child(runner)


def served_by_gunicorn(settings: Path, runner: str) -> tuple[list[Report], Report]:
    """The reports of `WORKERS` workers, which answer at once, and then of the master."""
    arguments = ["-m", "gunicorn", "--preload", "--config", str(settings)]
    arguments += ["--timeout", str(TIMEOUT)]
    variables = environment(runner) | {"WEB_CONCURRENCY": str(WORKERS)}
    with ExitStack() as stack:
        listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        port = listening.getsockname()[1]
        arguments += ["--bind", f"fd://{listening.fileno()}", "support.wsgi_app:application"]
        process = stack.enter_context(python(arguments, variables, [listening.fileno()]))
        listening.close()  # so that nobody waits for a server that is gone
        clients = stack.enter_context(ThreadPoolExecutor(WORKERS))
        answers = list(clients.map(answer_of, [port] * WORKERS))
        process.terminate()
        printed, complaints = process.communicate(timeout=TIMEOUT)
        assert process.returncode == 0, complaints
    return answers, json.loads(printed)


def answer_of(port: int) -> Report:
    with closing(HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)) as connection:
        connection.request("GET", "/")
        response = connection.getresponse()
        assert response.status == 200
        report: Report = json.load(response)
    return report
