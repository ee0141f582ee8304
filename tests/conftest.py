"""The fixture that runs a test on every variant, and the Hypothesis profile."""

from __future__ import annotations

from collections.abc import Iterator

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


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> Iterator[Variant]:
    """The test's calls run on this variant, and did so."""
    with activate(request.param) as active:
        before = active.calls()
        yield active
        ran = active.calls() > before
        refused = request.node.get_closest_marker("no_kernel") is not None
        assert ran != refused, f"{active.name} {'ran' if ran else 'did not run'} in this test"
