from typing import Any

from fastbn.backends.base import Backend

ELEMENTS: tuple[str, ...]

def tune(**thresholds: int) -> dict[str, int]: ...

class Engine(Backend):
    isa: str
    def __init__(self, isa: str, modules: tuple[Any, ...]) -> None: ...
    def calls(self) -> int: ...
    # As `Backend` declares them:
    moments: Any
    normalize: Any
    gradient_moments: Any
    input_gradient: Any
    forward_rows: Any
    backward_rows: Any
