"""What fastbn wants to reach, as data: which cells, which figure, which bound.

The bounds are for all threads (one, of awkward shapes) and ready outputs. Level means within 3 % of
noise. A figure that a run has no numbers for is left out; a target without any figure counts as not
measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf

from benchmarks.cells import AWKWARD, CALL, GROUPED, HALVES, MASKED, MB, Shape
from benchmarks.libraries import FROZEN, NUMPY, OURS, SINGLE, TORCH, UNFUSED, UNMASKED
from benchmarks.results import Measured, Run

LEVEL = 0.97
AVX2, NUMBA, ONEDNN = "fastbn cython avx2", "fastbn numba", "oneDNN"
COPYTO = "numpy.copyto"
ROW = (60, 100)

Figure = Callable[[Run, Measured], float | None]
Where = Callable[[Run, Measured], bool]


@dataclass(frozen=True)
class Target:
    work: str
    """Which cells, in words."""
    demand: str
    """The bound, in words."""
    where: Where
    figure: Figure
    bound: float | Callable[[Measured], float]
    at_most: bool
    unit: str

    def bound_at(self, m: Measured) -> float:
        return self.bound(m) if callable(self.bound) else self.bound


@dataclass(frozen=True)
class Check:
    """One target at one cell."""

    measured: Measured | None
    """None for what is measured once in a run."""
    figure: float
    bound: float
    at_most: bool

    @property
    def shortfall(self) -> float:
        """How far on the wrong side of the bound, as a factor: above 1 is a miss."""
        return self.figure / self.bound if self.at_most else self.bound / self.figure

    @property
    def reached(self) -> bool:
        return self.shortfall <= 1


@dataclass(frozen=True)
class Verdict:
    target: Target
    checks: list[Check]

    @property
    def worst(self) -> Check | None:
        return max(self.checks, key=lambda check: check.shortfall, default=None)

    @property
    def missed(self) -> list[Check]:
        return [check for check in self.checks if not check.reached]

    @property
    def answer(self) -> str:
        if not self.checks:
            return "not measured"
        return "no" if self.missed else "yes"


def verdicts(run: Run) -> list[Verdict]:
    """Every target, at every cell of the run that it speaks of."""
    found = []
    for target in TARGETS:
        checks = []
        for m in run.compared:
            if not target.where(run, m):
                continue
            figure = target.figure(run, m)
            if figure is not None:
                checks.append(Check(m, figure, target.bound_at(m), target.at_most))
        found.append(Verdict(target, checks))
    once = [] if run.import_seconds is None else [Check(None, run.import_seconds, 0.020, True)]
    return [*found, Verdict(IMPORT, once)]


# --- which cells --------------------------------------------------------------------------------

PLANES, ROWS = ("NCHW",), ("NHWC", "NC")
"""Channels outside, channels inside."""
EVERY = (*PLANES, *ROWS)


def where(
    work: str | None = None,
    layouts: tuple[str, ...] = EVERY,
    least: float = 0,
    below: float = inf,
    *,
    dtype: str = "float32",
    also: Where = lambda run, m: True,
) -> Where:
    """Cells of a work (any where None), of some layouts, from `least` to under `below` bytes."""

    def matches(run: Run, m: Measured) -> bool:
        cell = m.cell
        plain = (cell.dtype, cell.output, cell.threads) == (dtype, "ready", run.machine.cores)
        fits = work in (None, cell.work) and cell.layout in layouts and not cell.is_awkward
        return plain and fits and least <= cell.bytes < below and also(run, m)

    return matches


def channels_in_l2(least: int, most: float = inf) -> Where:
    """Where at least `least` channels of one array fit in a core's L2, and fewer than `most`."""

    def matches(run: Run, m: Measured) -> bool:
        return run.machine.l2 is not None and least <= run.machine.l2 / m.cell.channel_bytes < most

    return matches


def onednn_jit(run: Run, m: Measured) -> bool:
    """Where oneDNN generates code for the cell, instead of one of its general loops."""
    outcome = m.outcomes.get(ONEDNN)
    return outcome is not None and "jit" in outcome.note


def no_onednn_jit(run: Run, m: Measured) -> bool:
    return not onednn_jit(run, m)


def needs_teamwork(run: Run, m: Measured) -> bool:
    """Few or odd channels, or one image."""
    cell = m.cell
    return len(cell.shape) == 4 and (cell.channels % 2 == 1 or cell.shape[0] == 1)


def is_row(run: Run, m: Measured) -> bool:
    return m.cell.shape == ROW


def is_smallest(run: Run, m: Measured) -> bool:
    return m.cell.shape == CALL


# --- which figure -------------------------------------------------------------------------------


def peer(run: Run, m: Measured) -> float | None:
    return m.against_peer


def torch(run: Run, m: Measured) -> float | None:
    return m.ratio(TORCH)


def numpy(run: Run, m: Measured) -> float | None:
    return m.ratio(NUMPY)


def copies(run: Run, m: Measured) -> float | None:
    return m.copies()


def seconds(run: Run, m: Measured) -> float | None:
    return m.ours


def against_copyto(run: Run, m: Measured) -> float | None:
    return m.ratio(COPYTO)


def against_one_thread(run: Run, m: Measured) -> float | None:
    alone = run.at(replace(m.cell, threads=1))
    return alone.ours / m.ours if alone and alone.ours and m.ours else None


def unfused(run: Run, m: Measured) -> float | None:
    return m.ratio(UNFUSED)


def against_float32(run: Run, m: Measured) -> float | None:
    return m.ratio(OURS, SINGLE)


def against_unmasked(run: Run, m: Measured) -> float | None:
    return m.ratio(OURS, UNMASKED)


def frozen_call(run: Run, m: Measured) -> float | None:
    return m.seconds(FROZEN)


def numba(run: Run, m: Measured) -> float | None:
    return m.ratio(NUMBA, OURS)


def avx2(run: Run, m: Measured) -> float | None:
    return m.ratio(AVX2, OURS)


# --- the table ----------------------------------------------------------------------------------


def at_least(work: str, demand: str, cells: Where, figure: Figure, bound: float) -> Target:
    return Target(work, demand, cells, figure, bound, False, "times")


def at_most(work: str, bound: float, cells: Where, figure: Figure, unit: str = "copies") -> Target:
    text = f"under {bound * 1e6:g} us" if unit == "us" else f"at most {bound:g} {unit}"
    return Target(work, text, cells, figure, bound, True, unit)


@dataclass(frozen=True)
class Rival:
    """Whom the ratios are against: the best of all peers in float32, PyTorch in float64."""

    name: str
    dtype: str
    figure: Figure
    seconds: Callable[[Measured], float | None]

    def row(
        self,
        text: str,
        bound: float,
        layouts: tuple[str, ...] = EVERY,
        least: float = 0,
        below: float = inf,
        also: Where = lambda run, m: True,
    ) -> Target:
        """At least `bound` times as fast; 1 is level. The text's first word is the work."""
        work = text.partition(",")[0]
        cells = where(work, layouts, least, below, dtype=self.dtype, also=also)
        title = text if self.dtype == "float32" else f"{text}, {self.dtype}"
        if bound == 1:
            return at_least(title, f"level with {self.name}, or better", cells, self.figure, LEVEL)
        return at_least(title, f"{bound:g} times {self.name}", cells, self.figure, bound)

    def near_the_limit(self, m: Measured) -> float:
        """1.5 times, or level where the rival is at 1.2 copies already."""
        seconds, copy = self.seconds(m), m.best_copy
        return LEVEL if seconds and copy and seconds <= 1.2 * copy else 1.5


ALL_PEERS = Rival(
    "the best peer", "float32", peer, lambda m: m.best_peer[1] if m.best_peer else None
)
ONLY_TORCH = Rival(TORCH, "float64", torch, lambda m: m.seconds(TORCH))


def ratios(rival: Rival) -> list[Target]:
    """The rows that speak of peers; the one of oneDNN's JIT, which is float32's, aside."""
    row = rival.row
    backward = row("backward, NCHW, under 50 MB", 1.5, PLANES, 0, 50 * MB)
    return [
        row("forward, NCHW, 50 MB and up", 4, PLANES, 50 * MB),
        row("forward, NCHW, 10 to 50 MB", 2.5, PLANES, 10 * MB, 50 * MB),
        row("forward, NHWC, 10 MB and up", 1.3, ROWS, 10 * MB),
        row("forward, under 10 MB, no JIT of oneDNN", 2, below=10 * MB, also=no_onednn_jit),
        row("backward, NCHW, 50 MB and up", 3, PLANES, 50 * MB),
        replace(
            backward,
            demand=f"{backward.demand}; level where that is at 1.2 copies",
            bound=rival.near_the_limit,
        ),
        row("backward, NHWC, 50 MB and up", 1.3, ROWS, 50 * MB),
        row("backward, NHWC, under 50 MB", 1, ROWS, 0, 50 * MB),
        row("inference, under 50 MB", 1, below=50 * MB),
    ]


JIT = ALL_PEERS.row("forward, under 10 MB, oneDNN's JIT", 1.2, below=10 * MB, also=onednn_jit)


def limits() -> list[Target]:
    """The rows that speak of copies."""
    forward, backward = "forward, NCHW, 50 MB and up", "backward, NCHW, 50 MB and up"

    def large(work: str, least: int, most: float = inf) -> Where:
        return where(work, PLANES, 50 * MB, also=channels_in_l2(least, most))

    return [
        at_most(f"{forward}, two channels in L2", 1.25, large("forward", 2), copies),
        at_most(f"{forward}, one channel in L2", 1.6, large("forward", 1, 2), copies),
        at_most(
            "forward, NCHW, 10 to 50 MB", 1.6, where("forward", PLANES, 10 * MB, 50 * MB), copies
        ),
        at_most("forward, NHWC, 10 MB and up", 1.5, where("forward", ROWS, 10 * MB), copies),
        at_most(f"{backward}, x and dy in L2", 1.35, large("backward", 2), copies),
        at_most(f"{backward}, else", 1.8, large("backward", 0, 2), copies),
        at_most("inference, 50 MB and up", 1.1, where("inference", EVERY, 50 * MB), copies),
        at_most("frozen backward, dx alone", 1.15, where("frozen"), copies),
    ]


def others() -> list[Target]:
    faster = where("inference", EVERY, 10 * MB)
    teamwork = where(None, EVERY, 4 * MB, also=needs_teamwork)
    text = "C = 3, C = 1, C odd, one image; 4 MB and up"
    return [
        at_least("inference, 10 MB and up", "faster than numpy.copyto", faster, against_copyto, 1),
        at_least(text, "1.7 times its own one thread", teamwork, against_one_thread, 1.7),
        *(
            at_most(f"(60, 100), {work}", bound, where(work, also=is_row), seconds, "us")
            for work, bound in (("inference", 2e-6), ("forward", 5e-6), ("backward", 6e-6))
        ),
        at_least("(60, 100)", "never slower than a peer", where(also=is_row), peer, LEVEL),
        at_most(
            "numba backend, 1 to 32 MB",
            1.3,
            where(None, EVERY, 1 * MB, 32 * MB),
            numba,
            "times the cython backend",
        ),
        at_most(
            "numba backend, beyond 32 MB",
            2,
            where(None, EVERY, 32 * MB),
            numba,
            "times the cython backend",
        ),
        at_most(
            "AVX2 build, 10 MB and up",
            1.25,
            where(None, EVERY, 10 * MB),
            avx2,
            "times the best build",
        ),
    ]


def fused() -> list[Target]:
    """The rows of what is fused, and of what is prepared."""
    large = where("fused-inference", EVERY, 50 * MB)
    calls = where("inference", also=is_smallest)
    text, demand = "fused-inference, 50 MB and up", "2 times normalize, numpy.add, numpy.maximum"
    return [
        at_least(text, demand, large, unfused, 2),
        at_most(text, 1.15, large, copies),
        at_most(f"{FROZEN}, a call beyond its kernel", 0.5e-6, calls, frozen_call, "us"),
    ]


def halves() -> list[Target]:
    """The rows of half types, on arrays of 100 MB and up in float32."""
    unit, found = "of float32's time", []
    for work, bound in (("inference", 0.65), ("forward", 0.75), ("backward", 0.75)):
        for dtype in HALVES:
            text, large = f"{work}, {dtype}, 50 MB and up", where(work, EVERY, 50 * MB, dtype=dtype)
            found.append(at_most(text, bound, large, against_float32, unit))
            if dtype == "bfloat16":
                found.append(at_least(text, f"faster than {TORCH}", large, torch, 1))
    return found


def masked() -> list[Target]:
    """The rows of masks and weights."""
    unit = f"times {UNMASKED}"
    return [
        at_most(f"{work}, 50 MB and up", 1.5, where(work, EVERY, 50 * MB), against_unmasked, unit)
        for work in MASKED
    ]


def grouped() -> list[Target]:
    """The rows of virtual batches and siblings."""
    found = []
    for work in GROUPED:
        large, middle = where(work, EVERY, 50 * MB), where(work, EVERY, 10 * MB, 50 * MB)
        found.append(at_least(f"{work}, 50 MB and up", f"1.3 times {TORCH}", large, torch, 1.3))
        text, demand = f"{work}, 10 to 50 MB", f"level with {TORCH}, or better"
        found.append(at_least(text, demand, middle, torch, LEVEL))
    return found


def awkward() -> list[Target]:
    """The rows of awkward shapes: plain and grouped works in all layouts."""

    def among(shapes: tuple[Shape, ...]) -> Where:
        return lambda run, m: m.cell.shape in shapes

    demand = f"never slower than {NUMPY}"
    return [
        at_least(f"{text}, one thread", demand, among(shapes), numpy, LEVEL)
        for text, shapes in AWKWARD.items()
    ]


TARGETS = [
    *ratios(ALL_PEERS),
    JIT,
    *limits(),
    *others(),
    *fused(),
    *halves(),
    *masked(),
    *grouped(),
    *awkward(),
    *ratios(ONLY_TORCH),
]

IMPORT = Target(
    "import fastbn",
    "at most 20 ms over import numpy",
    lambda run, m: False,
    lambda run, m: None,
    0.020,
    True,
    "ms",
)
