"""The fixture that runs a test on every variant, the options, and the Hypothesis profiles."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from support.variants import CYTHON, VARIANTS, Variant, activate

for profile, examples in (("all", 40), ("fast", 10)):
    settings.register_profile(
        profile,
        max_examples=examples,
        deadline=None,  # a numba variant compiles during its first example
        print_blob=True,
        # The fixture `variant` only chooses a backend: no example needs a reset of it.
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )

LEFT_OUT = {*VARIANTS[1:]} - {*CYTHON[:1]}
"""Variants that the fast selection has not."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fast",
        action="store_true",
        help="a selection for development: NumPy and the best kernels, and no slow tests",
    )
    parser.addoption(
        "--largest",
        action="store_true",
        help="tests with arrays of gigabytes as well, as far as memory allows",
    )


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile("fast" if config.getoption("fast") else "all")
    config.addinivalue_line("markers", "slow: the fast selection leaves the test out")
    config.addinivalue_line(
        "markers", "no_kernel: the test's calls are refused or empty, so that no kernel may run"
    )
    config.addinivalue_line(
        "markers", "large(gigabytes): the test needs so much memory, and runs where there is more"
    )


def is_fast(item: pytest.Item) -> bool:
    """Whether a test is in the fast selection."""
    made = getattr(item, "callspec", None)
    words = [value for value in made.params.values() if isinstance(value, str)] if made else []
    return (
        LEFT_OUT.isdisjoint(word.split(" on ")[0] for word in words)
        and item.get_closest_marker("slow") is None
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [item for item in items if config.getoption("fast") and not is_fast(item)]
    if left_out:
        items[:] = [item for item in items if is_fast(item)]
        config.hook.pytest_deselected(items=left_out)


def available_gigabytes() -> float:
    """The memory that this machine could give without swapping."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return int(kilobytes) / 1e6


@pytest.fixture(autouse=True)
def large(request: pytest.FixtureRequest) -> Iterator[None]:
    """One large test at a time, in whatever process, and only where memory allows."""
    marker = request.node.get_closest_marker("large")
    if marker is None:
        yield
        return
    if not request.config.getoption("largest"):
        pytest.skip("arrays of gigabytes: by the option --largest")
    needed = 1.2 * marker.kwargs["gigabytes"]
    with (Path(tempfile.gettempdir()) / f"fastbn-large-{os.getuid()}").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        available = available_gigabytes()
        if available < needed:
            pytest.skip(f"needs {needed:.1f} GB of memory, {available:.1f} GB are available")
        yield


@pytest.fixture(scope="session")
def torch() -> Any:
    """PyTorch; where it is missing, a test is skipped before `variant` expects a call of it, since
    fixtures of the session come first."""
    return pytest.importorskip("torch")


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> Iterator[Variant]:
    """The test's calls run on this variant, and did so."""
    with activate(request.param) as active:
        before = active.calls()
        yield active
        ran = active.calls() > before
        refused = request.node.get_closest_marker("no_kernel") is not None
        assert ran != refused, f"{active.name} {'ran' if ran else 'did not run'} in this test"
