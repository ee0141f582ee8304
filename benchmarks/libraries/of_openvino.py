"""OpenVINO: a model of one BatchNormInference. Inference, float32, channels on axis 1.

Its own output is made once and used again, so only ready outputs are a fair comparison.
"""

from __future__ import annotations

import openvino
from openvino import opset13 as ops

from benchmarks.cells import Cell
from benchmarks.data import Data, Results
from benchmarks.libraries import Task


def version() -> str:
    return str(openvino.__version__).split("-")[0]


def prepare(cell: Cell, data: Data) -> Task | None:
    wanted = cell.work, cell.dtype, cell.output
    if wanted != ("inference", "float32", "ready") or cell.layout == "NHWC":
        return None
    x = ops.parameter(list(cell.shape), openvino.Type.f32)
    vectors = (ops.constant(v) for v in (data.gamma, data.beta, data.mean, data.var))
    model = openvino.Model([ops.batch_norm_inference(x, *vectors, epsilon=data.eps)], [x])
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": cell.threads,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = openvino.compile_model(model, "CPU", options).create_infer_request()
    request.set_input_tensor(openvino.Tensor(data.x, shared_memory=True))
    request.set_output_tensor(openvino.Tensor(data.out, shared_memory=True))

    def call() -> None:
        request.start_async()
        request.wait()

    return Task(call, lambda _: Results(data.out))
