"""Running Python in processes of its own, with chosen environment variables and a deadline."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

OURS = (
    "FASTBN_BACKEND",
    "FASTBN_NUM_THREADS",
    "FASTBN_ISA",
    "FASTBN_POOL",
    "OMP_NUM_THREADS",
)
TIMEOUT = 120  # seconds; numba may have to compile


def finds_tests() -> dict[str, str]:
    """The environment variable with which a process can import `support`."""
    inherited = os.environ.get("PYTHONPATH", "")
    return {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), inherited])}


@contextmanager
def python(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    files: Sequence[int] = (),
    started_by: Sequence[str] = (),
) -> Iterator[subprocess.Popen[str]]:
    """Python while the block runs; of the variables that fastbn reads, only those given are set."""
    inherited = {k: v for k, v in os.environ.items() if k not in OURS}
    with subprocess.Popen(
        [*started_by, sys.executable, *arguments],
        env={**inherited, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=files,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        except BaseException:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)  # with the children it may have forked
            raise


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` as `python` does, until it ends."""
    with python(["-c", code], environment) as process:
        stdout, stderr = process.communicate(timeout=TIMEOUT)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def output(code: str, **environment: str) -> str:
    """What `code` prints; it must succeed."""
    done = run(code, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def error(code: str, **environment: str) -> str:
    """The last line of the traceback that `code` must end with."""
    done = run(code, **environment)
    assert done.returncode == 1, f"succeeded: {done.stdout}{done.stderr}"
    return done.stderr.strip().splitlines()[-1]


def mpiexec() -> str | None:
    """What starts processes that MPI connects: that beside Python, as mpich's package has it, or
    another; None where there is none."""
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return shutil.which("mpiexec", path=beside)


def by_mpi(
    size: int, arguments: Sequence[str], timeout: float = TIMEOUT
) -> subprocess.CompletedProcess[str]:
    """So many processes of `python -m mpi4py`, each with a thread, until all have ended."""
    found = mpiexec()
    assert found is not None
    start = [found, "-n", str(size)]
    environment = {"FASTBN_NUM_THREADS": "1", **finds_tests()}
    with python(["-m", "mpi4py", *arguments], environment, started_by=start) as process:
        stdout, stderr = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
