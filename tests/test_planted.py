"""The planted faults are of the library as it is."""

from __future__ import annotations

import pytest

from support.planted import FAULTS, ROOT


@pytest.mark.parametrize("name", FAULTS)
def test_a_text_to_break_stands_once(name: str) -> None:
    """In its file; what it becomes is something else."""
    fault = FAULTS[name]
    assert (ROOT / fault.file).read_text().count(fault.old) == 1
    assert fault.new != fault.old
    assert fault.breaks
