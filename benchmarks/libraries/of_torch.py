"""PyTorch's own operators on the same memory; its backward has no ready output."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from benchmarks.cells import Cell
from benchmarks.data import Array, Data, Results
from benchmarks.libraries import Task

BACKWARD = torch.ops.aten.native_batch_norm_backward.default
GATE = torch.ops.aten.threshold_backward.grad_input


def version() -> str:
    return str(torch.__version__)


def prepare(cell: Cell, data: Data) -> Task:
    torch.set_num_threads(cell.threads)
    gamma, eps = torch.from_numpy(data.gamma), data.eps
    if cell.plain_work in ("forward", "inference"):
        call = normalization(cell, data, gamma)
        if not cell.is_fused:
            return Task(call, lambda r: Results(array(cell, r[0])))
        residual = tensor(cell, data.residual)
        return Task(
            lambda: torch.relu_(call()[0].add_(residual)), lambda y: Results(array(cell, y))
        )
    dy = tensor(cell, data.dy)
    if cell.plain_work == "backward":
        x = tensor(cell, data.x)
        mean, var = data.batch_statistics
        rstd = (var + eps) ** -0.5
        saved = [torch.from_numpy(v).to(gamma.dtype) for v in (mean, rstd)]
        rest = (x, gamma, None, None, *saved, True, eps, [True, True, True])
        if not cell.is_fused:
            return Task(
                lambda: BACKWARD(dy, *rest),
                lambda r: Results(array(cell, r[0]), r[1].numpy(), r[2].numpy()),
            )
        y, gated = tensor(cell, data.y), tensor(cell, data.dresidual)
        return Task(
            lambda: BACKWARD(GATE(dy, y, 0, grad_input=gated), *rest),
            lambda r: Results(array(cell, r[0]), r[1].numpy(), r[2].numpy(), data.dresidual),
        )
    mean, var = torch.from_numpy(data.mean), torch.from_numpy(data.var)
    wanted = [True, False, False]
    # x is not read where its gradient alone is wanted, but must be there.
    return Task(
        lambda: BACKWARD(dy, dy, gamma, mean, var, None, None, False, eps, wanted),
        lambda r: Results(array(cell, r[0])),
    )


def normalization(cell: Cell, data: Data, gamma: Any) -> Any:
    """A forward, by the batch's statistics or by given ones."""
    x, beta, eps = tensor(cell, data.x), torch.from_numpy(data.beta), data.eps
    training = cell.plain_work == "forward"
    mean = None if training else torch.from_numpy(data.mean)
    var = None if training else torch.from_numpy(data.var)
    call = torch.native_batch_norm
    if cell.output == "fresh":
        return lambda: call(x, gamma, beta, mean, var, training, 0.1, eps)
    saved = (torch.empty(cell.channels if training else 0, dtype=gamma.dtype) for _ in range(2))
    out = (tensor(cell, data.out), *saved)
    return lambda: call(x, gamma, beta, mean, var, training, 0.1, eps, out=out)


def tensor(cell: Cell, a: Array) -> Any:
    """The same memory; channels last, as PyTorch has it, is a permuted NHWC array."""
    bits = a.view(np.int16) if cell.is_half else a  # it does not know others' bfloat16
    t = torch.from_numpy(bits).view(getattr(torch, cell.dtype))
    return t.permute(0, 3, 1, 2) if cell.layout == "NHWC" else t


def array(cell: Cell, t: Any) -> Array:
    t = t.permute(0, 2, 3, 1) if cell.layout == "NHWC" else t
    a: Array = t.view(torch.int16).numpy().view(cell.dtype) if cell.is_half else t.numpy()
    return a
