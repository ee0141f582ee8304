"""The parts of docs/performance.md on more kinds of work, each a function of the run."""

from __future__ import annotations

from benchmarks.cells import AWKWARD, FUSED, HALVES, MASKED, WORKS
from benchmarks.figures import (
    LAYOUTS,
    against,
    against_best,
    average,
    cells,
    figures,
    of_layout,
    ratio,
    score,
    table,
)
from benchmarks.libraries import NUMPY, OURS, SINGLE, TORCH, UNFUSED, UNMASKED
from benchmarks.report import NONE
from benchmarks.results import Run


def fused(run: Run) -> str:
    """Against the best peer, and against the steps one by one."""
    rows = []
    for work in FUSED:
        members = cells(run, [work])
        pairs = [
            average(of_layout(members, layout), figure)
            for figure in (against_best, against(UNFUSED))
            for layout in LAYOUTS[:2]
        ]
        rows.append((work, *pairs))
    names = [f"{what}, {layout}" for what in ("fastest peer", "unfused") for layout in LAYOUTS[:2]]
    return table(("work", *names), rows)


def halves(run: Run) -> str:
    """The part of float32's time, and against PyTorch."""
    rows = []
    for dtype in HALVES:
        groups = [cells(run, [work], dtype=dtype) for work in WORKS[:3]]
        parts = (average(group, lambda m: m.ratio(OURS, SINGLE)) for group in groups)
        rows.append((dtype, *parts, *(average(group, against(TORCH)) for group in groups)))
    names = [f"{what}, {work}" for what in ("time", "PyTorch") for work in WORKS[:3]]
    return table(("type", *names), rows)


def masked(run: Run) -> str:
    """The time over that of the same work where everything counts."""
    rows = []
    for work in MASKED:
        members = cells(run, [work])
        by_layout = (of_layout(members, layout) for layout in LAYOUTS)
        rows.append((work, *(average(m, lambda m: m.ratio(OURS, UNMASKED)) for m in by_layout)))
    return table(("work", *LAYOUTS), rows)


def grouped(run: Run) -> str:
    """Against PyTorch."""
    kinds = {
        "group": "group norm",
        "instance": "instance norm",
        "layer": "layer norm",
        "ghost": "virtual batches",
    }
    rows = []
    for kind, name in kinds.items():
        by_work = (cells(run, [f"{kind}-{work}"]) for work in ("forward", "backward"))
        found = [average(of_layout(m, f), against(TORCH)) for m in by_work for f in LAYOUTS]
        everything = cells(run, [f"{kind}-{work}" for work in ("forward", "backward")])
        rows.append((name, *found, *score(figures(everything, against(TORCH)))))
    names = [f"{work}, {layout}" for work in ("forward", "backward") for layout in LAYOUTS]
    return table(("", *names, "ahead", "level", "behind"), rows)


def awkward(run: Run) -> str:
    """Against NumPy, by kind of shape."""
    rows = []
    for what, shapes in AWKWARD.items():
        members = [m for m in run.compared if m.cell.shape in shapes]
        values = figures(members, against(NUMPY))
        ends = (ratio(min(values)), ratio(max(values))) if values else (NONE, NONE)
        rows.append((what, average(members, against(NUMPY)), *ends, *score(values)))
    return table(("shapes", "average", "least", "most", "ahead", "level", "behind"), rows)
