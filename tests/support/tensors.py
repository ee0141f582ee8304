"""Arrays of a library of nobody's, for DLPack."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn.checks import dlpack

Array = NDArray[Any]


class Tensor:
    """Somebody's array, which knows DLPack and nothing of NumPy."""

    def __init__(self, a: Array, device: int = dlpack.CPU, requires_grad: bool = False) -> None:
        self.array, self.device, self.requires_grad = a, device, requires_grad

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device, 0

    def __dlpack__(self, **options: Any) -> Any:
        if self.requires_grad:
            raise BufferError("it requires gradients")
        if self.array.dtype.name != "bfloat16":
            return self.array.__dlpack__(**options)
        capsule = self.array.view(np.uint16).__dlpack__()
        address = dlpack._pointer_of(capsule, dlpack.NAME)
        dlpack._Tensor.from_address(address).code = dlpack.BFLOAT
        return capsule

    def detach(self) -> Tensor:
        return Tensor(self.array, self.device)

    def cpu(self) -> Tensor:
        return Tensor(self.array, requires_grad=self.requires_grad)
