"""The instruction sets of the compiled kernels: which there are, were built, and run here."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

from fastbn._ext import cpu
from fastbn.errors import BackendError, shown

_BUILD = "in a checkout run: FASTBN_BUILD_ISA={} python -m pip install -e ."


@cache
def built() -> tuple[str, ...]:
    """Those of this architecture that were built, the best first."""
    kernels = {isa: f"fastbn._ext.kernels_{isa}_f32" for isa in cpu.instruction_sets()}
    return tuple(isa for isa, module in kernels.items() if find_spec(module) is not None)


def usable() -> tuple[str, ...]:
    """Those of them that this processor runs."""
    runs = cpu.instruction_sets()
    return tuple(isa for isa in built() if runs[isa])


def foreign() -> tuple[str, ...]:
    """The others of them, each with why it cannot run here."""
    runs = cpu.instruction_sets()
    return tuple(f"{isa}: built, and not of this processor" for isa in built() if not runs[isa])


def why_none() -> str:
    """Why no kernels run here, where none are `usable`."""
    runs = [isa for isa, runs in cpu.instruction_sets().items() if runs]
    return (
        f"the compiled kernels were built for {', '.join(built()) or 'no instruction set'}, and "
        f"this processor runs {', '.join(runs)}; {_BUILD.format('native')}"
    )


def check(name: str, isa: str) -> None:
    """Refuse what is none of the `usable`; `name` is what it was given as."""
    if isa in usable():
        return
    runs = cpu.instruction_sets().get(isa)
    why = ""
    if runs:
        why = f"which was not built ({_BUILD.format(','.join((*built(), isa)))}), "
    elif runs is not None:
        why = "which this processor does not have, "
    raise BackendError(
        f"{name} is {shown(isa)}, {why}expected one of the instruction sets that can run here: "
        f"auto, {', '.join(usable())}; set one of them, or unset it"
    )
