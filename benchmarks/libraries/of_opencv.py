"""OpenCV: images by blobFromImages, which subtracts means, and a division."""

from __future__ import annotations

import cv2
import numpy as np

from benchmarks.cells import Cell
from benchmarks.data import Data, Results
from benchmarks.libraries import Task


def version() -> str:
    return str(cv2.__version__)


def prepare(cell: Cell, data: Data) -> Task | None:
    if not cell.is_images:
        return None
    cv2.setNumThreads(cell.threads)
    images, std = list(data.x), np.sqrt(data.var).reshape(-1, 1, 1)
    mean = [float(m) * 255 for m in data.mean]

    def call() -> object:
        blob = cv2.dnn.blobFromImages(images, 1 / 255, mean=mean, swapRB=False)
        return np.divide(blob, std, out=blob)

    return Task(call, Results)
