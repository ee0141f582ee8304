"""The fixture that runs a test on every variant, and the Hypothesis profile."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from variants import VARIANTS, Variant, activate

settings.register_profile(
    "fastbn",
    max_examples=40,
    deadline=None,  # a numba variant compiles during its first example
    print_blob=True,
    # The fixture `variant` only chooses a backend: nothing in it needs a reset between examples.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("fastbn")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "no_kernel: the test's calls are refused or empty, so that no kernel may run"
    )
    config.addinivalue_line(
        "markers", "large(gigabytes): the test needs so much memory, and runs where there is more"
    )


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
