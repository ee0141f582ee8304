"""albumentations: Normalize of each image, and a transpose."""

from __future__ import annotations

import albumentations
import numpy as np

from benchmarks.cells import Cell
from benchmarks.data import Data, Results
from benchmarks.libraries import Task


def version() -> str:
    return str(albumentations.__version__)


def prepare(cell: Cell, data: Data) -> Task | None:
    if not cell.is_images:
        return None
    normalize = albumentations.Normalize(data.mean.tolist(), np.sqrt(data.var).tolist())
    x, ready = data.x, None if cell.output == "fresh" else data.out

    def call() -> object:
        out = np.empty(data.result_shape, data.result_dtype) if ready is None else ready
        for image, y in zip(x, out, strict=True):
            y[...] = normalize(image=image)["image"].transpose(2, 0, 1)
        return out

    return Task(call, Results)
