"""Running a few lines of Python in a process of their own, with chosen environment variables."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

OURS = ("FASTBN_BACKEND", "FASTBN_NUM_THREADS", "FASTBN_ISA", "OMP_NUM_THREADS")
TIMEOUT = 120  # seconds; numba may have to compile


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code`; of the variables that fastbn reads, only those given are set."""
    inherited = {k: v for k, v in os.environ.items() if k not in OURS}
    command = [sys.executable, "-c", code]
    with subprocess.Popen(
        command,
        env=inherited | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            stdout, stderr = process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with the children it may have forked
            raise
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


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
