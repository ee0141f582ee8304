"""No call reads or writes beyond any of its arrays, at either end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from support.guarded_calls import Log
from support.memory import Guarded
from support.processes import finds_tests, python, run
from support.variants import VARIANTS

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "numpy"])
def test_nothing_is_touched_beyond_an_array(name: str, tmp_path: Path) -> None:
    """Every public function, its masks, weights and vectors too, in sizes around a vector's."""
    path = str(tmp_path / "at")
    code = f"from support.guarded_calls import every; every({name!r}, {path!r}, {name == 'numba'})"
    with python(["-c", code], finds_tests()) as process:
        _, errors = process.communicate(timeout=600)  # numba may have to compile
    assert process.returncode == 0, f"{Log.read(path)}: status {process.returncode}\n{errors}"


@pytest.mark.parametrize("behind", [True, False])
def test_pages_are_guarded(behind: bool, tmp_path: Path) -> None:
    """A byte too far ends a process, which leaves word of where it was."""
    path, at = str(tmp_path / "at"), 5 if behind else -1
    code = f"""
import ctypes, numpy
from support import guarded_calls, memory
guarded_calls.Log({path!r}).put("here")
a = memory.Guarded(5).place(numpy.zeros(5, numpy.uint8), behind={behind})
ctypes.c_uint8.from_address(a.ctypes.data + {at}).value
"""
    assert run(code, **finds_tests()).returncode == -11
    assert Log.read(path) == "here"
    placed = Guarded(24).place(np.arange(3), behind=behind)
    np.testing.assert_array_equal(placed, np.arange(3))
