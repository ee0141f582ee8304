"""One of several processes that run all cases together, until one fails.

    mpiexec -n 3 python -m mpi4py -m support.run_ranks mpi FOLDER
    python -m support.run_ranks gloo FOLDER RANK SIZE

Each writes what it ran, and what failed, into a file of the folder.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path

import support.distributed_layers
import support.distributed_verbs  # noqa: F401  # whose cases are collected
from fastbn import distributed
from fastbn.distributed import Communicator
from support.ranks import CASES

TIMEOUT = 30  # seconds that a rank waits for the others


def connected(transport: str, folder: Path, *place: str, timeout: float = TIMEOUT) -> Communicator:
    """A communicator of all processes."""
    if transport == "mpi":
        return distributed.mpi(timeout=timeout)
    import torch

    rank, size = map(int, place)
    where = f"file://{folder / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=size)
    return distributed.process_group(timeout=timeout)


def main(transport: str, folder: Path, *place: str) -> None:
    comm, ran, failure = connected(transport, folder, *place), [], ""
    for case in CASES:
        try:
            case(comm)
        except Exception:
            failure = f"{case.__name__} on rank {comm.rank}: {traceback.format_exc()}"
            break  # the ranks are no longer at the same call
        ran.append(case.__name__)
    found = {"size": comm.size, "ran": ran, "failure": failure}
    (folder / f"{comm.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
