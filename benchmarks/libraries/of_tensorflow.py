"""TensorFlow's fused batch norm and its gradient, as a graph. float32, no ready outputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from benchmarks.cells import Cell
from benchmarks.data import Data, Results
from benchmarks.libraries import Task


def version() -> str:
    return str(tf.__version__)


def prepare(cell: Cell, data: Data) -> Task | None:
    if cell.dtype != "float32" or cell.is_fused:
        return None
    gamma = tf.constant(data.gamma)
    options = {"epsilon": data.eps, "data_format": "NCHW" if cell.layout == "NCHW" else "NHWC"}
    normalize, differentiate = tf.raw_ops.FusedBatchNormV3, tf.raw_ops.FusedBatchNormGradV3
    training = cell.work in ("forward", "backward")
    options["is_training"] = training
    mean, var = tf.constant(data.mean), tf.constant(data.var)
    if cell.work in ("forward", "inference"):
        x, beta = four_dimensional(data.x), tf.constant(data.beta)
        call = tf.function(
            lambda: normalize(x=x, scale=gamma, offset=beta, mean=mean, variance=var, **options)[0]
        ).get_concrete_function()
        return Task(call, lambda y: Results(y.numpy().reshape(data.shape)))
    dy = four_dimensional(data.dy)
    x, saved = dy, (mean, var, tf.zeros(0))
    if training:
        x = four_dimensional(data.x)
        saved = normalize(x=x, scale=gamma, offset=gamma, mean=mean, variance=var, **options)[3:6]
    spaces = {f"reserve_space_{number}": space for number, space in enumerate(saved, 1)}
    call = tf.function(
        lambda: differentiate(y_backprop=dy, x=x, scale=gamma, **spaces, **options)[:3]
    ).get_concrete_function()
    return Task(call, lambda r: read_gradients(r, data))


def four_dimensional(a: Any) -> Any:
    """A tensor; the operators take no rows, but images of one pixel."""
    return tf.constant(a[:, None, None, :] if a.ndim == 2 else a)


def read_gradients(results: Any, data: Data) -> Results:
    dx, dgamma, dbeta = (np.asarray(r) for r in results)
    return Results(dx.reshape(data.shape), dgamma, dbeta)
