"""The variant that is asked for is the one that runs, and no other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fastbn
from oracle.arrays import DTYPES, LAYOUTS
from support.bits import Array
from support.variants import VARIANTS, Variant, activate

ONES = np.ones(3)

VERBS: dict[str, Callable[[Array, str], object]] = {
    "batch_norm": lambda x, layout: fastbn.batch_norm(x, layout=layout),
    "moments": lambda x, layout: fastbn.moments(x, layout=layout),
    "normalize": lambda x, layout: fastbn.normalize(x, ONES, ONES, layout=layout),
    "batch_norm_backward": lambda x, layout: fastbn.batch_norm_backward(
        x, x, ONES, ONES, layout=layout
    ),
    "normalize_backward": lambda x, layout: fastbn.normalize_backward(
        x, x, ONES, ONES, layout=layout
    ),
    "normalize_backward, dx alone": lambda x, layout: fastbn.normalize_backward(
        x, None, ONES, ONES, layout=layout, params=False
    ),
}


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("verb", VERBS)
def test_every_call_runs_on_the_variant(
    variant: Variant, verb: str, layout: str, dtype: Any, dense: bool
) -> None:
    """Each function, plain or by way of the checks, runs the variant's own kernels."""
    x = np.ones((3, 3, 3), dtype)
    x = x if dense else x[::-1, ::-1, ::-1]
    before = variant.calls()
    VERBS[verb](x, layout)
    assert variant.calls() > before
    assert fastbn.get_backend() == variant.backend.name == variant.name.partition("-")[0]


@pytest.mark.parametrize("other", VARIANTS)
def test_no_other_variant_runs(variant: Variant, other: str) -> None:
    """A call counts on its own variant and on no other."""
    with activate(other) as watched:
        before = watched.calls()
        with activate(variant.name) as active:
            started = active.calls()
            fastbn.batch_norm(np.ones((2, 3), np.float32))
            assert active.calls() > started
        assert (watched.calls() > before) == (other == variant.name)


def test_numpy_is_always_there() -> None:
    """The reference backend needs nothing else."""
    assert VARIANTS[0] == "numpy"
