"""Axes of length 1, whose strides mean nothing, and axes of length 0."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastbn
from oracle.arrays import Array
from support import every_call
from support.bits import assert_same_bits
from support.grid import TYPES
from support.guarded_calls import Log
from support.processes import finds_tests, run
from support.strategies import layouts, shapes_of_ones, unit_strides
from support.variants import Variant, each_backend

NO_ARRAYS = {
    *("BackendError", "Renormalization", "Saved", "clear_pool", "get_backend", "get_config"),
    *(
        "get_num_threads",
        "set_backend",
        "set_num_threads",
        "show_config",
        "use_backend",
        "use_num_threads",
    ),
}


@each_backend
@settings(max_examples=25)
@given(shapes_of_ones(), layouts, st.sampled_from(sorted(TYPES)), unit_strides())
def test_strides_of_axes_of_length_1_mean_nothing(
    variant: Variant,
    shape: tuple[int, ...],
    layout: str,
    dtype: str,
    place: Callable[[Array], Array],
) -> None:
    """Of any array argument of any public function: results have the bits of dense arrays."""
    of_type = TYPES["float32" if variant.name == "numba" else dtype]
    odd, dense = (every_call.Given(shape, layout, of_type, how) for how in (place, np.array))
    for verb, ways in every_call.ALL.items():
        for how, call in ways.items():
            got, expected = (every_call.results(call(arrays)) for arrays in (odd, dense))
            try:
                assert_same_bits(got, expected)
            except AssertionError as error:
                raise AssertionError(f"{verb} ({how}): {error}") from None


def test_every_public_function_is_called() -> None:
    """All that take arrays are in the table of calls."""
    of_results = {n for n in fastbn.__all__ if hasattr(getattr(fastbn, n), "_fields")}
    assert every_call.ALL.keys() == set(fastbn.__all__) - NO_ARRAYS - of_results


def test_nothing_at_all(tmp_path: Path) -> None:
    """No samples, channels or places give an empty result or a clear error, on every variant."""
    path = str(tmp_path / "at")
    done = run(f"from support.empty_calls import every; every({path!r})", **finds_tests())
    assert done.returncode == 0, f"{Log.read(path)}: status {done.returncode}\n{done.stderr}"


@pytest.mark.parametrize(
    "call",
    [
        lambda x: fastbn.group_norm(x, 0),
        lambda x: fastbn.group_norm_backward(x, x, np.zeros((2, 0)), np.zeros((2, 0)), 0),
        lambda x: fastbn.GroupNorm(0, 4),
        lambda x: fastbn.batch_norm(x, virtual_batch=0),
        lambda x: fastbn.fold_into_conv(x, None, np.zeros(4), np.ones(4), groups=0),
    ],
)
def test_no_groups(call: Callable[[Array], Any]) -> None:
    """They are refused."""
    with pytest.raises(ValueError, match="expected"):
        call(np.zeros((2, 4, 3)))
