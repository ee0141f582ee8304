from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from fastbn.activations import Activation
from fastbn.backends.base import Affine, Gate, GradientCoefficients, Selection, Table, Tail

Array = NDArray[Any]

def tune(**thresholds: int) -> dict[str, int]: ...
def walks(a: Array) -> bool: ...

ELEMENTS: tuple[str, ...]

class Engine:
    isa: str
    def __init__(self, isa: str, modules: tuple[Any, ...]) -> None: ...
    def calls(self) -> int: ...
    def moments(
        self, x: Array, threads: int, selection: Selection | None
    ) -> tuple[Table, Table]: ...
    def normalize(
        self,
        x: Array,
        affine: Affine,
        out: Array,
        threads: int,
        tail: Tail | None,
        selection: Selection | None,
    ) -> None: ...
    def gradient_moments(
        self,
        dy: Array,
        x: Array,
        mean: Table,
        threads: int,
        gate: Gate | None,
        selection: Selection | None,
    ) -> tuple[Table, Table]: ...
    def input_gradient(
        self,
        dy: Array,
        x: Array | None,
        coefficients: GradientCoefficients,
        out: Array,
        threads: int,
        gate: Gate | None,
        selection: Selection | None,
    ) -> None: ...
    def forward(
        self,
        x: Array,
        gamma: Table,
        beta: Table,
        eps: float,
        out: Array,
        threads: int,
        tail: Tail | None,
        selection: Selection | None,
        pool: int,
    ) -> tuple[Table, Table]: ...
    def backward(
        self,
        dy: Array,
        x: Array,
        mean: Table,
        var: Table,
        gamma: Table,
        eps: float,
        frozen: bool,
        out: Array,
        threads: int,
        gate: Gate | None,
        selection: Selection | None,
        pool: int,
    ) -> tuple[Table, Table]: ...
    def forward_rows(
        self,
        x: Array,
        gamma: Table,
        beta: Table,
        eps: float,
        out: Array,
        threads: int,
        tail: Tail | None,
    ) -> tuple[Table, Table]: ...
    def backward_rows(
        self,
        dy: Array,
        x: Array,
        mean: Table,
        var: Table,
        gamma: Table,
        eps: float,
        out: Array,
        threads: int,
        gate: Gate | None,
    ) -> Table: ...
    def frozen(
        self, affine: Affine, layout: str, activation: Activation
    ) -> Callable[..., Array | None]: ...
    def plain_moments(self, *arguments: Any) -> tuple[Table, Table] | None: ...
    def plain_batch_norm(self, *arguments: Any) -> tuple[Array, Table, Table] | None: ...
    def plain_samples(self, *arguments: Any) -> tuple[Array, Table, Table] | None: ...
    def plain_normalize(self, *arguments: Any) -> Array | None: ...
    def plain_backward(
        self, *arguments: Any
    ) -> tuple[Array, Array | None, Array | None, Array | None] | None: ...
    def plain_samples_backward(
        self, *arguments: Any
    ) -> tuple[Array, Array | None, Array | None, Array | None] | None: ...
