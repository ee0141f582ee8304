"""PyTorch's own operators on the same memory.

Its backward, group, instance, layer and RMS norm have no ready output: the environment lets it keep
the memory of results that were dropped, so that it pays for no new pages either.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.cells import Cell
from benchmarks.data import Array, Data, Results
from benchmarks.libraries import Task

BACKWARD = torch.ops.aten.native_batch_norm_backward.default
FEW = 16
"""Channels below this are faster as planes, others channels last."""
CURVES = {"silu": torch.nn.functional.silu, "hard_swish": torch.nn.functional.hardswish}
GATE = torch.ops.aten.threshold_backward.grad_input


def version() -> str:
    return str(torch.__version__)


def prepare(cell: Cell, data: Data) -> Task:
    torch.set_num_threads(cell.threads)
    gamma, eps = torch.from_numpy(data.gamma), data.eps
    if cell.is_grouped:
        return grouped(cell, data, gamma)
    if cell.is_of_rows:
        return rows(cell, data, gamma)
    if cell.is_reordered:
        return reordered(cell, data)
    if cell.is_fused and cell.is_step:
        return fused_step(cell, data)
    if cell.is_step:
        return step(cell, data, gamma)
    if cell.plain_work in ("forward", "inference"):
        call = normalization(cell, data, gamma)
        if cell.curve:
            activate = CURVES[cell.curve]
            return Task(
                lambda: activate(call()[0], inplace=True), lambda y: Results(array(cell, y))
            )
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


def reordered(cell: Cell, data: Data) -> Task:
    """A copy, before or after the call: forwards are computed in the order of memory that suits
    them. Given an output in another order than x, PyTorch computes something else."""
    out = tensor(cell, data.reordered)
    suits = cell.work == "backward" or (cell.layout == "NHWC") == (cell.channels >= FEW)
    task = prepare(replace(cell, output="ready"), data) if suits else prepare(*data.in_place(cell))
    x, read = tensor(cell, data.x), task.read
    assert read is not None

    def copy_after() -> Any:
        result = task.call()
        out.copy_(result[0])
        return result

    def copy_before() -> Any:
        out.copy_(x)
        return task.call()

    return Task(
        copy_after if suits else copy_before, lambda r: read(r)._replace(main=data.reordered)
    )


def step(cell: Cell, data: Data, gamma: Any) -> Task:
    """A forward, and the backward by its statistics."""
    forward = normalization(cell.forward_and_backward[0], data, gamma)
    x, dy, eps, wanted = tensor(cell, data.x), tensor(cell, data.dy), data.eps, [True] * 3

    def call() -> Any:
        y, mean, rstd = forward()
        return y, *BACKWARD(dy, x, gamma, None, None, mean, rstd, True, eps, wanted)

    return Task(call, step_results(cell))


def fused_step(cell: Cell, data: Data) -> Task:
    """As modules do it, with as much as they can in place, and by autograd."""

    def forward(x: Any, gamma: Any, beta: Any, residual: Any) -> Any:
        return torch.relu_(batch_norm(x, gamma, beta, data.eps).add_(residual))

    return by_autograd(cell, data, forward)


def batch_norm(x: Any, gamma: Any, beta: Any, eps: float) -> Any:
    return torch.nn.functional.batch_norm(x, None, None, gamma, beta, training=True, eps=eps)


def by_autograd(cell: Cell, data: Data, forward: Callable[..., Any]) -> Task:
    """A forward of x, gamma, beta and, fused, the residual; then the gradients of all of them."""
    images = [data.x, data.residual] if cell.is_fused else [data.x]
    x, *residual = (tensor(cell, a) for a in images)
    leaves = (x, torch.from_numpy(data.gamma), torch.from_numpy(data.beta), *residual)
    for leaf in leaves:
        leaf.requires_grad_()
    dy = tensor(cell, data.dy)

    def call() -> Any:
        y = forward(*leaves)
        return y.detach(), *torch.autograd.grad(y, leaves, dy)

    return Task(call, step_results(cell))


def step_results(cell: Cell) -> Any:
    """How y, and the gradients of x, gamma, beta and perhaps the residual are read."""

    def read(r: Any) -> Results:
        y, dx, dgamma, dbeta, *dresidual = r
        images = (array(cell, a) for a in dresidual)
        gradients = Results(array(cell, dx), dgamma.numpy(), dbeta.numpy(), *images)
        return gradients._replace(y=array(cell, y))

    return read


def grouped(cell: Cell, data: Data, gamma: Any) -> Task:
    """Virtual batches one after the other, and group, instance and layer norm."""
    kind, forward = cell.work.partition("-")[0], cell.plain_work == "forward"
    x, dy, beta, eps = (
        tensor(cell, data.x),
        tensor(cell, data.dy),
        torch.from_numpy(data.beta),
        1e-5,
    )
    mean, rstd = (torch.from_numpy(v).to(gamma.dtype) for v in inverse(data.statistics(cell)))
    wanted = [True, True, True]
    if kind == "ghost":
        return ghost(cell, data, gamma, beta, (mean, rstd))
    if kind == "layer" and cell.layout == "NC":
        shape = [cell.channels]
        if forward:
            call = torch.native_layer_norm  # given an output, it makes another and copies that
            return Task(lambda: call(x, shape, gamma, beta, eps), results(cell))
        call = torch.ops.aten.native_layer_norm_backward
        return Task(lambda: call(dy, x, shape, mean, rstd, gamma, beta, wanted), results(cell))
    if kind == "instance":
        return instance(cell, x, dy, gamma, beta, (mean, rstd))
    shape = [cell.shape[0], cell.channels, x[0, 0].numel(), cell.groups]
    if forward:
        call = torch.native_group_norm
        return Task(lambda: call(x, gamma, beta, *shape, eps), results(cell))
    call = torch.ops.aten.native_group_norm_backward
    return Task(lambda: call(dy, x, mean, rstd, gamma, *shape, wanted), results(cell))


def rows(cell: Cell, data: Data, gamma: Any) -> Task:
    """Layer and RMS norm along the last axis, of x or of x + skip."""
    cell = replace(cell, layout="NC")  # the axes stay where they are in memory
    x, beta, eps = tensor(cell, data.x), torch.from_numpy(data.beta), data.eps
    if cell.plain_work == "backward":
        return rows_backward(cell, data, x, gamma, beta)
    shape = [cell.channels]

    def norm(x: Any) -> Any:
        if cell.is_centred:
            return torch.native_layer_norm(x, shape, gamma, beta, eps)[0]
        return torch.nn.functional.rms_norm(x, shape, gamma, eps)

    if not cell.has_skip:
        return Task(lambda: norm(x), lambda y: Results(array(cell, y)))
    skip, total = tensor(cell, data.residual), tensor(cell, data.sum)
    return Task(
        lambda: norm(torch.add(x, skip, out=total)), lambda y: Results(array(cell, y), sum=data.sum)
    )


def rows_backward(cell: Cell, data: Data, x: Any, gamma: Any, beta: Any) -> Task:
    """Their gradients, and what else reaches x + skip. That of RMS norm has no operator here, and
    comes from autograd."""
    dy, dsum, shape = tensor(cell, data.dy), tensor(cell, data.residual), [cell.channels]
    if cell.is_centred:
        saved = inverse(data.statistics(cell))
        mean, rstd = (torch.from_numpy(v[..., None]).to(gamma.dtype) for v in saved)
        backward = torch.ops.aten.native_layer_norm_backward
        gradients = partial(backward, dy, x, shape, mean, rstd, gamma, beta, [True] * 3)
    else:
        leaves = x.requires_grad_(), gamma.requires_grad_()
        y = torch.nn.functional.rms_norm(x, shape, gamma, data.eps)
        gradients = partial(torch.autograd.grad, y, leaves, dy, retain_graph=True)

    def call() -> Any:
        dx, *sums = gradients()
        return dx.add_(dsum) if cell.has_skip else dx, *sums

    return Task(call, lambda r: Results(array(cell, r[0]), *(v.numpy() for v in r[1:])))


def instance(cell: Cell, x: Any, dy: Any, gamma: Any, beta: Any, statistics: Any) -> Task:
    """As torch.nn.functional.instance_norm and its gradient: planes are channels of one sample."""
    n, planes = cell.shape[0], (1, -1, *cell.shape[2:])
    if cell.plain_work == "forward":
        call = torch.nn.functional.instance_norm
        return Task(lambda: (call(x, weight=gamma, bias=beta),), results(cell))
    mean, rstd = (v.reshape(-1) for v in statistics)

    def backward() -> Any:
        rows = (a.contiguous().reshape(planes) for a in (dy, x))
        rest = (gamma.repeat(n), None, None, mean, rstd, True, 1e-5, [True, True, True])
        dx, dgamma, dbeta = BACKWARD(*rows, *rest)
        return dx.reshape(x.shape), *(v.reshape(n, -1).sum(0) for v in (dgamma, dbeta))

    return Task(backward, results(cell))


def ghost(cell: Cell, data: Data, gamma: Any, beta: Any, statistics: Any) -> Task:
    """Batch norm of each virtual batch."""
    x, dy, eps = tensor(cell, data.x), tensor(cell, data.dy), data.eps
    size = cell.run
    starts = range(0, len(x), size)
    if cell.plain_work == "forward":
        y = tensor(cell, data.out)
        saved = [torch.empty(cell.channels, dtype=gamma.dtype) for _ in range(2)]
        given = gamma, beta, None, None, True, 0.1, eps

        def forward() -> Any:
            for i in starts:
                out = (y[i : i + size], *saved)
                torch.native_batch_norm(x[i : i + size], *given, out=out)
            return (y,)

        return Task(forward, results(cell))

    def backward() -> Any:
        parts = []
        for i, mean, rstd in zip(starts, *statistics, strict=True):
            some = slice(i, i + size)
            rest = gamma, None, None, mean, rstd, True, eps, [True, True, True]
            parts.append(BACKWARD(dy[some], x[some], *rest))
        return parts

    def read(parts: Any) -> Results:
        dx, dgamma, dbeta = zip(*parts, strict=True)
        sums = (torch.stack(v).sum(0).numpy() for v in (dgamma, dbeta))
        return Results(array(cell, torch.cat(dx)), *sums)

    return Task(backward, read)


def inverse(statistics: tuple[Array, Array]) -> tuple[Array, Array]:
    """Mean and 1 / sqrt(var + eps)."""
    mean, var = statistics
    return mean, (var + Data.eps) ** -0.5


def results(cell: Cell) -> Any:
    """How y, or dx and its sums, are read."""
    if cell.plain_work == "forward":
        return lambda r: Results(array(cell, r[0]))
    return lambda r: Results(array(cell, r[0]), r[1].numpy(), r[2].numpy())


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
