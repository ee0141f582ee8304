"""A differential fuzzer: random public calls on one variant, held against the oracles.

    PYTHONPATH=tests python -m support.fuzz --variant cython-avx512 --cases 50000
    PYTHONPATH=tests python -m support.fuzz --variant cython-avx512 --cases 1 --seed 12345

Each case comes from a seed, which is printed where it fails with the command that repeats it. Cases
run in a child process, so that a crash has a seed as well.
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import struct
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

from support.fuzz.bad import bad
from support.fuzz.cases import VERBS, Case
from support.fuzz.layers import LAYERS
from support.random_arrays import Source
from support.variants import VARIANTS, activate

DRAWS: dict[Callable[[Source], Case], int] = VERBS | LAYERS | {bad: 8}
MOST_FAILURES = 10


def draw(variant: str, seed: int) -> Case:
    """The case of a seed."""
    s = Source(seed, few=variant == "numba")
    (made,) = s.random.choices(list(DRAWS), list(DRAWS.values()))
    case = made(s)
    case.threads = s.choice((1, 1, 2, 3))
    return case


def command(variant: str, seed: int) -> str:
    return f"PYTHONPATH=tests python -m support.fuzz --variant {variant} --cases 1 --seed {seed}"


def report(variant: str, seed: int, what: str) -> None:
    """A failure, in words."""
    words = draw(variant, seed).words()
    print(f"\nseed {seed} on {variant}: {what}\n{words}\n{command(variant, seed)}", flush=True)


def check(variant: str, seed: int) -> bool:
    """Whether the case of a seed is as it should be."""
    try:
        draw(variant, seed).run()
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        at = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames[-4:]))
        report(variant, seed, f"{type(error).__name__}: {error}\n    at {at}")
        return False
    return True


class Progress:
    """A child's seed, and how many cases failed, in memory that both processes see."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 16)

    def get(self) -> tuple[int, int]:
        return struct.unpack("QQ", self.memory[:16])

    def put(self, seed: int, failures: int) -> None:
        self.memory[:16] = struct.pack("QQ", seed, failures)


def work(variant: str, seeds: range, until: float, progress: Progress) -> None:
    """All cases, until the time is up; the child's part."""
    with activate(variant) as active, warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in seeds:
            _, failures = progress.get()
            if time.monotonic() > until or failures >= MOST_FAILURES:
                break
            progress.put(seed, failures)
            ok = check(variant, seed)
            progress.put(seed + 1, failures + (not ok))
        assert active.calls(), f"{variant} did not run"


def run(variant: str, seed: int, cases: int, seconds: float) -> bool:
    """Run so many cases from a seed on, at most for so long; whether none failed."""
    start, progress = time.monotonic(), Progress()
    progress.put(seed, 0)
    last, ok = seed + cases, True
    while True:
        at, failures = progress.get()
        if at >= last or time.monotonic() - start > seconds or failures >= MOST_FAILURES:
            break
        child = os.fork()
        if child == 0:
            status = 1
            try:
                work(variant, range(at, last), start + seconds, progress)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            at, failures = progress.get()
            report(variant, at, f"died of signal {os.WTERMSIG(status)}")
            progress.put(at + 1, failures + 1)
        elif status:
            ok = False
            break
    at, failures = progress.get()
    spent = time.monotonic() - start
    done = at - seed
    print(
        f"{variant}: {done} cases from seed {seed} in {spent:.1f} s, "
        f"{done / max(spent, 1e-9):.0f} a second, {failures} failed",
        flush=True,
    )
    return ok and not failures


def main() -> int:
    parser = argparse.ArgumentParser(prog="support.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--variant", choices=VARIANTS, action="append", help="all without")
    parser.add_argument("--cases", type=int, default=1 << 40, help="how many, at most")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="how long, at most")
    parser.add_argument("--seed", type=int, help="of the first case; without, a new one each time")
    given = parser.parse_args()
    seed = random.SystemRandom().randrange(1 << 40) if given.seed is None else given.seed
    results = [run(v, seed, given.cases, given.seconds) for v in given.variant or VARIANTS]
    return 0 if all(results) else 1
