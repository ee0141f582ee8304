"""PyTorch's compiler: a training step whose forward and backward it has written. Fresh outputs.

Compiled forwards hand what backward needs to autograd, in new arrays; the environment lets PyTorch
keep the memory of those that were dropped.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.cells import Cell
from benchmarks.data import Data
from benchmarks.libraries import Task
from benchmarks.libraries.of_torch import batch_norm, by_autograd
from benchmarks.libraries.of_torch import version as version


def prepare(cell: Cell, data: Data) -> Task | None:
    if not cell.is_step:
        return None
    torch.set_num_threads(cell.threads)
    torch.compiler.reset()  # a function compiled for too many shapes is compiled no more

    def forward(x: Any, gamma: Any, beta: Any, *residual: Any) -> Any:
        y = batch_norm(x, gamma, beta, data.eps)
        return torch.relu(y + residual[0]) if residual else y

    return by_autograd(cell, data, torch.compile(forward, fullgraph=True, dynamic=False))
