"""Running Python in a process of its own, with chosen environment variables and a deadline."""

from __future__ import annotations

import os
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
    arguments: Sequence[str], environment: Mapping[str, str], files: Sequence[int] = ()
) -> Iterator[subprocess.Popen[str]]:
    """Python while the block runs; of the variables that fastbn reads, only those given are set."""
    inherited = {k: v for k, v in os.environ.items() if k not in OURS}
    with subprocess.Popen(
        [sys.executable, *arguments],
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
