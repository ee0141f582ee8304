"""Batch norm of a batch that lies on several processes: `import fastbn.distributed`.

Every process, or rank, has some of the samples, and all of them make the same calls in the same
order. They normalize by the statistics of all samples together, which are gathered by MPI
(`pip install "fastbn[mpi]"`) or torch.distributed.
"""

from fastbn.distributed.communicators import Communicator, mpi, one_process, process_group
from fastbn.distributed.layer import SyncBatchNorm
from fastbn.distributed.verbs import (
    batch_norm,
    batch_norm_backward,
    moments,
    population_statistics,
)

__all__ = [
    "Communicator",
    "SyncBatchNorm",
    "batch_norm",
    "batch_norm_backward",
    "moments",
    "mpi",
    "one_process",
    "population_statistics",
    "process_group",
]
