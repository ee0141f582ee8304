"""ONNX Runtime: a model of one BatchNormalization node. Inference, channels on axis 1."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from benchmarks.cells import Cell
from benchmarks.data import Data, Results
from benchmarks.libraries import Task


def version() -> str:
    return str(onnxruntime.__version__)


def prepare(cell: Cell, data: Data) -> Task | None:
    if cell.work != "inference" or cell.layout == "NHWC" or cell.is_half:
        return None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = cell.threads, 1
    session = onnxruntime.InferenceSession(model(cell, data), options, ["CPUExecutionProvider"])
    if cell.output == "fresh":
        feed = {"x": data.x}
        return Task(lambda: session.run(None, feed), lambda r: Results(r[0]))
    binding, kind = session.io_binding(), np.dtype(cell.dtype).type
    for bind, name, a in (
        (binding.bind_input, "x", data.x),
        (binding.bind_output, "y", data.out),
    ):
        bind(name, "cpu", 0, kind, a.shape, a.ctypes.data)
    return Task(lambda: session.run_with_iobinding(binding), lambda _: Results(data.out))


def model(cell: Cell, data: Data) -> bytes:
    """The model, with the parameters and statistics inside."""
    element = TensorProto.FLOAT if cell.dtype == "float32" else TensorProto.DOUBLE
    vectors = {name: getattr(data, name) for name in ("gamma", "beta", "mean", "var")}
    graph = helper.make_graph(
        [helper.make_node("BatchNormalization", ["x", *vectors], ["y"], epsilon=data.eps)],
        "batch_norm",
        [helper.make_tensor_value_info("x", element, cell.shape)],
        [helper.make_tensor_value_info("y", element, cell.shape)],
        [numpy_helper.from_array(v, name) for name, v in vectors.items()],
    )
    opset = [helper.make_opsetid("", 15)]
    made = helper.make_model(graph, opset_imports=opset, ir_version=8)
    onnx.checker.check_model(made)
    serialized: bytes = made.SerializeToString()
    return serialized
