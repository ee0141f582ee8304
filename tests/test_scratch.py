"""How much memory a call takes besides its results: tables between the passes, and copies."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

import fastbn
from oracle.arrays import DTYPES, LAYOUTS, Array, channels_of, to_layout
from support.memory import FORMS, strided
from support.pairs import paired
from support.variants import CYTHON, VARIANTS, Variant, activate

pytestmark = pytest.mark.slow

COMPILED = [name for name in VARIANTS if name == "numba"] + [*CYTHON[-1:]]
SHAPES = [
    (2, 50_000),
    (300, 5000),
    (2048, 2048),
    (1, 40_000, 4),
    (3, 10_000, 2, 2),
    (2048, 2056),
    (8160, 79),
    (20_000, 67),
    (64, 64, 17, 17),
    (1, 1, 500_000),
]
"""As NCHW: wide with few values a channel, tall, narrow, folded, planes, one channel."""
ALWAYS_ALLOWED, PART = 1 << 20, 50
NARROW, LANES, SHORT = 64, 16, 128


def temporary(call: Callable[[], object]) -> int:
    """Bytes at the worst moment of a call beyond what it leaves behind."""
    call()
    tracemalloc.start()
    try:
        results = call()
        left, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert results is not None
    return most - left


def calls_of(x: Array, dy: Array, layout: str, gamma: Array) -> dict[str, Callable[[], object]]:
    """Every function with a ready output."""
    out = np.empty(x.shape, x.dtype)
    mean, var = fastbn.moments(x, layout=layout)
    ready: dict[str, Any] = {"layout": layout, "out": out}
    return {
        "moments": lambda: fastbn.moments(x, layout=layout),
        "batch_norm": lambda: fastbn.batch_norm(x, gamma, gamma, **ready),
        "normalize": lambda: fastbn.normalize(x, mean, var, gamma, gamma, **ready),
        "batch_norm_backward": lambda: fastbn.batch_norm_backward(dy, x, mean, var, gamma, **ready),
        "normalize_backward": lambda: fastbn.normalize_backward(dy, x, mean, var, gamma, **ready),
        "dx alone": lambda: fastbn.normalize_backward(
            dy, None, mean, var, gamma, params=False, **ready
        ),
        "double backward": lambda: fastbn.batch_norm_double_backward(
            dy, gamma, gamma, dy, x, mean, var, gamma, layout=layout
        ),
    }


@pytest.fixture(params=COMPILED)
def compiled(request: pytest.FixtureRequest) -> Any:
    """The reference is left out: it is written to be read, and holds float64 copies."""
    with activate(request.param) as active:
        before = active.calls()
        yield active
        assert active.calls() > before


@paired(shape=SHAPES, way=["plain", "walked", "rows apart"], dtype=DTYPES, layout=LAYOUTS)
def test_tables_are_small_beside_x(
    compiled: Variant, shape: tuple[int, ...], dtype: Any, layout: str, way: str
) -> None:
    """At most 2 % of x or 1 MiB, whichever is more, by the plain entry and by the walked path."""
    x = to_layout(np.random.default_rng(0).normal(size=shape), layout).astype(dtype)
    channels = channels_of(x, layout)
    gamma = np.ones(2 * channels, dtype)[:: 1 if way == "plain" else 2][:channels]
    if way == "rows apart":
        x = FORMS["padded inside"](x)
    allowed = max(ALWAYS_ALLOWED, x.nbytes // PART)
    # Copies come on top: of narrow rows that lie apart, and of the parts of short planes.
    narrow = x.shape[-1] < NARROW or channels % LANES > 0
    short = compiled.name == "numba" and 1 < x[0, 0].size < LANES
    if (way == "rows apart" and narrow) or short:
        allowed += 3 * x.size * x.itemsize
    for name, call in calls_of(x, x, layout, gamma).items():
        assert temporary(call) <= allowed, name


def group_norm_calls_of(x: Array, layout: str, gamma: Array) -> dict[str, Callable[[], object]]:
    """Group, instance and layer norm, and their backward functions, with a ready output."""
    out = np.empty(x.shape, x.dtype)
    calls: dict[str, Callable[[], object]] = {}
    verbs: dict[str, Any] = {"instance": fastbn.instance_norm, "layer": fastbn.layer_norm}
    verbs["group"] = partial(fastbn.group_norm, groups=2)
    backward: dict[str, Any] = {"instance": fastbn.instance_norm_backward}
    backward["layer"] = fastbn.layer_norm_backward
    backward["group"] = partial(fastbn.group_norm_backward, groups=2)
    for kind, verb in verbs.items():
        _, mean, var = verb(x, layout=layout)
        ready: dict[str, Any] = {"gamma": gamma, "layout": layout, "out": out}
        back = partial(backward[kind], x, x, mean, var, **ready)
        calls |= {kind: partial(verb, x, beta=gamma, **ready), f"{kind}, back": back}
    return calls


@paired(
    shape=[(40_000, 64), (300, 5000), (64, 64, 17, 17), (5000, 6, 40), (9, 128, 4096)],
    step=[1, 2],
    dtype=DTYPES,
    layout=LAYOUTS,
)
def test_tables_of_group_norms_are_small_beside_x(
    compiled: Variant, shape: tuple[int, ...], step: int, dtype: Any, layout: str
) -> None:
    """As above, and 16 bytes for each of a sample's groups and channels, and 60 a column; on Numba
    650 a channel of short planes."""
    x = to_layout(np.random.default_rng(0).normal(size=shape), layout).astype(dtype)
    channels = channels_of(x, layout)
    gamma = np.ones(2 * channels, dtype)[::step][:channels]
    for name, call in group_norm_calls_of(x, layout, gamma).items():
        if name.startswith("instance") and x.ndim == 2:
            continue  # statistics of single values
        groups = {"instance": channels, "layer": 1, "group": 2}[name.split(",")[0]]
        allowed = max(ALWAYS_ALLOWED, x.nbytes // PART)
        statistics = groups + (channels if x.ndim > 2 else 0)
        allowed += 16 * len(x) * statistics + 60 * channels
        if compiled.name == "numba" and 1 < x[0].size // channels < SHORT:
            allowed += 650 * len(x) * channels
        assert temporary(call) <= allowed, name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_array_whose_axes_do_not_collapse_is_copied_once(
    compiled: Variant, dtype: Any, layout: str
) -> None:
    """Strided arrays cost one copy each, and nothing more."""
    x, dy = (strided(np.ones((40, 24, 24, 24), dtype)) for _ in range(2))
    gamma = np.ones(24, dtype)
    for name, call in calls_of(x, dy, layout, gamma).items():
        copies = 1 if name in ("moments", "batch_norm", "normalize", "dx alone") else 2
        copies += name == "double backward"
        assert temporary(call) <= ALWAYS_ALLOWED + copies * x.size * x.itemsize, name
