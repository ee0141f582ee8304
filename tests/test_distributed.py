"""`fastbn.distributed` on several processes, which MPI or torch.distributed connects.

The cases are in `support/distributed_verbs.py` and `support/distributed_layers.py`; all processes
run all of them, so that there are few starts.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import support.run_ranks
from support.processes import TIMEOUT, by_mpi, finds_tests, mpiexec, python
from support.ranks import CASES

RUN = support.run_ranks.__name__
DEADLINE = 30  # seconds for processes of which one fails


@pytest.fixture(scope="session")
def mpi() -> None:
    """Skips where MPI cannot start processes."""
    pytest.importorskip("mpi4py")
    if mpiexec() is None:
        pytest.skip("mpiexec is not there")


def gloo(arguments: list[str], ranks: int = 2) -> list[str]:
    """What processes of torch.distributed print, that are told their rank and number."""
    found, environment = [], {"FASTBN_NUM_THREADS": "1", **finds_tests()}
    with ExitStack() as stack:
        places = [[*arguments, str(rank), str(ranks)] for rank in range(ranks)]
        running = [stack.enter_context(python(place, environment)) for place in places]
        for process in running:
            stdout, stderr = process.communicate(timeout=TIMEOUT)
            assert process.returncode == 0, stderr
            found.append(stdout)
    return found


def check(folder: Path, size: int) -> None:
    """All ranks ran all cases."""
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]
    failures = [each["failure"] for each in found if each["failure"]]
    assert not failures, "\n".join(failures)
    names = [case.__name__ for case in CASES]
    assert "layer_is_that_of_the_whole_batch" in names
    assert all(each == {"size": size, "ran": names, "failure": ""} for each in found)


def test_over_mpi(mpi: None, tmp_path: Path) -> None:
    """Three ranks have what one process makes of the whole batch, and raise the same errors."""
    done = by_mpi(3, ["-m", RUN, "mpi", str(tmp_path)])
    assert done.returncode == 0, done.stderr
    check(tmp_path, 3)


@pytest.mark.slow
def test_over_gloo(torch: Any, tmp_path: Path) -> None:
    """So do two of torch.distributed; with merge_every both have the bits of one process."""
    gloo(["-m", RUN, "gloo", str(tmp_path)])
    check(tmp_path, 2)


@pytest.mark.parametrize("end", ["raise OSError('no data')", "os.kill(os.getpid(), 9)"])
def test_a_rank_that_dies(mpi: None, end: str) -> None:
    """Under python -m mpi4py the others, which wait without a timeout, end with it."""
    code = f"""
import os
import numpy as np
from fastbn import distributed

comm = distributed.mpi()
distributed.moments(np.eye(3), comm=comm)
if comm.rank == 1:
    {end}
distributed.moments(np.eye(3), comm=comm)
print("went on")
"""
    done = by_mpi(3, ["-c", code], timeout=DEADLINE)
    assert done.returncode != 0
    assert "went on" not in done.stdout


SKIPS = """
import sys
import time
from pathlib import Path
import numpy as np
from fastbn import distributed
from support.run_ranks import connected

comm = connected(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
bn = distributed.SyncBatchNorm(3, comm=comm)
x = np.random.default_rng(0).normal(size=(4, 3))
bn(x)
comm.timeout = 1.0
if comm.rank == 1:
    time.sleep(2.5)
for _ in range(2):
    try:
        bn(x)
    except (TimeoutError, RuntimeError) as error:
        print(f"{type(error).__name__}: {error}", flush=True)
time.sleep(3)  # until all have found out
"""


def check_skipped(lines: list[str], ranks: int) -> None:
    """Those that waited name the one that did not come, and do not go on afterwards."""
    waited = [line for line in lines if line.startswith("TimeoutError") and "waited 1.0 s" in line]
    assert len(waited) == ranks - 1, lines
    assert all(f"for rank 1, expected all {ranks} ranks" in line for line in waited)
    given_up = [line for line in lines if "has given up an exchange that timed out" in line]
    assert len(given_up) >= ranks - 1


@pytest.mark.slow
def test_a_rank_that_leaves_out_a_call_of_mpi(mpi: None, tmp_path: Path) -> None:
    """It is named by the others within twice the timeout, and told that it is late."""
    done = by_mpi(3, ["-c", SKIPS, "mpi", str(tmp_path)], timeout=DEADLINE)
    lines = done.stdout.splitlines()
    check_skipped(lines, 3)
    assert any("rank 1 came when the other ranks had given up" in line for line in lines)


@pytest.mark.slow
def test_a_rank_that_leaves_out_a_call_of_gloo(torch: Any, tmp_path: Path) -> None:
    """The same of torch.distributed, whose own error tells the late rank."""
    found = gloo(["-c", SKIPS, "gloo", str(tmp_path)], ranks=3)
    lines = "".join(found).splitlines()
    check_skipped(lines, 3)
    assert len(lines) == 6, lines


@pytest.mark.slow
def test_data_parallel_training(mpi: None, torch: Any, tmp_path: Path) -> None:
    """The example's losses are the same bits on one, two and four ranks, whatever connects them."""
    example = [str(Path(__file__).parents[1] / "examples" / "data_parallel.py"), "--quick"]
    example += ["--output", str(tmp_path / "plot.png")]
    found = [by_mpi(ranks, example).stdout for ranks in (1, 2, 4)]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *example]
    with python(torchrun, {"FASTBN_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}) as process:
        found.append(process.communicate(timeout=TIMEOUT)[0])
    losses = [line for text in found for line in text.splitlines() if "losses by all" in line]
    assert len(losses) == 4, found
    assert len(set(losses)) == 1, losses
