"""Random public calls, some seconds of them in every run (`support.fuzz` runs any number), and that
the fuzzer finds what it is for."""

from __future__ import annotations

import re

import pytest

from support.processes import finds_tests, run
from support.variants import VARIANTS

pytestmark = pytest.mark.slow

SECONDS = 12 / len(VARIANTS)


def fuzzed(name: str, seconds: float = SECONDS, first: str = "pass") -> tuple[int, str]:
    """Whether all cases were right, and what was printed."""
    seed = "random.SystemRandom().randrange(1 << 40)"
    code = f"import random, sys\nfrom support.fuzz import runner\n{first}\n"
    code += f"sys.exit(not runner.run({name!r}, {seed}, 1 << 40, {seconds}))"
    done = run(code, **finds_tests())
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("name", VARIANTS)
def test_random_calls(name: str) -> None:
    """Nothing is wrong, on any variant."""
    status, words = fuzzed(name)
    assert status == 0, words


WRONG = {
    "a wrong y": (
        "of = fastbn.batch_norm; fastbn.batch_norm = lambda **a: "
        "(r := of(**a))._replace(y=r.y if 'out' in a else r.y * r.y.dtype.type(1.001))"
    ),
    "a write beside out": (
        "of = fastbn.normalize\ndef wrong(x, *a, out=None, **b):\n"
        "    y = of(x, *a, out=out, **b)\n"
        "    if out is not None and out.base is not None: out.base.obj[-1] = 7\n    return y\n"
        "fastbn.normalize = wrong"
    ),
    "an argument that is changed": (
        "of = fastbn.moments\ndef wrong(x, **a):\n    found = of(x, **a)\n"
        "    if x.flags.writeable: x[...] = 0\n    return found\nfastbn.moments = wrong"
    ),
    "an illegal argument that is taken": (
        "runner.DRAWS = {runner.bad: 1}  # few would be of this verb and of eps\n"
        "of = fastbn.batch_norm_backward\ndef wrong(eps, **a):\n"
        "    return of(eps=abs(eps) if type(eps) is float else eps, **a)\n"
        "fastbn.batch_norm_backward = wrong"
    ),
    "a crash": "fastbn.gradient_sums = lambda **a: os.kill(os.getpid(), 11)",
}
"""Faults of the library, as code that makes them."""


@pytest.mark.parametrize("fault", WRONG)
def test_faults_are_found(fault: str) -> None:
    """Each is told with a seed, the call, and the command that repeats it."""
    status, words = fuzzed(
        "numpy", 100, f"import os, fastbn\nrunner.MOST_FAILURES = 1\n{WRONG[fault]}"
    )
    assert status == 1, words
    command = r"PYTHONPATH=tests python -m support.fuzz --variant numpy --cases 1 --seed (\d+)"
    found = re.search(r"\nseed (\d+) on numpy: .*\n(?:.*\n)*?" + command, words)
    assert found, words
    assert found[1] == found[2], words
