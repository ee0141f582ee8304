"""The benchmark measures what it says: cells, right results, comparison, reports.

No time is asserted. Peers are optional: the test of one that is not installed is skipped.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastbn
from benchmarks import compare, fold_or_fuse, report, rounds
from benchmarks.cells import (
    AWKWARD,
    CURVED,
    FAMILIES,
    FUSED,
    GHOST,
    GROUPED,
    HALVES,
    IMAGES,
    MASKED,
    MB,
    OF_ROWS,
    ROWS,
    SERIES,
    STEPS,
    TABLES,
    WORKS,
    Cell,
    all_cells,
    layouts_of,
    quick_cells,
)
from benchmarks.cli import chosen
from benchmarks.data import Data, Results, complaint, expected
from benchmarks.libraries import (
    BY_COPY,
    COMPILED,
    FROZEN,
    LIBRARIES,
    NUMPY,
    ONEDNN,
    OURS,
    SINGLE,
    TORCH,
    UNFUSED,
    UNMASKED,
    of_fastbn,
    of_numpy,
)
from benchmarks.machine import Machine, cache_size
from benchmarks.results import Measured, Outcome, Run

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PNG = b"\x89PNG\r\n\x1a\n"
THREADS = 2
WRONG = 1.03125
"""A factor that bfloat16 holds: its arrays times a Python number are rounded to it before."""

ALWAYS = [name for name, library in LIBRARIES.items() if library.is_fastbn]
ALWAYS += [name for name, library in LIBRARIES.items() if library.kind == "limit"]
ALWAYS.append("NumPy")

MACHINE = Machine("a processor", THREADS, 1 << 15, 1 << 20, 1 << 25, 1 << 34, "Linux", "3.11")


# --- cells --------------------------------------------------------------------------------------


def test_no_cell_is_listed_twice() -> None:
    for threads in (1, THREADS):
        for cells in (all_cells(threads), quick_cells(threads)):
            assert len(cells) == len(set(cells))


@pytest.mark.parametrize("work", WORKS)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_cells_cover_every_kind(work: str, layout: str) -> None:
    cells = [c for c in all_cells(THREADS) if (c.work, c.layout) == (work, layout)]
    plain = [c for c in cells if (c.dtype, c.output, c.threads) == ("float32", "ready", THREADS)]
    assert {c.channels for c in plain} >= {1, 3}
    assert any(c.channels % 16 and c.channels > 3 for c in plain)
    assert {c.shape[2:] for c in plain} >= {(7, 7), (1, 1), (13, 17)}
    assert any(c.shape[0] == 1 for c in plain)
    assert min(c.bytes for c in plain) < 0.5 * MB
    assert max(c.bytes for c in plain) > 400 * MB
    for field, value in (("dtype", "float64"), ("output", "fresh"), ("threads", 1)):
        assert any(getattr(c, field) == value for c in cells)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_cells_cover_fused_works_and_halves(layout: str) -> None:
    for listed, least in ((all_cells(THREADS), 100 * MB), (quick_cells(THREADS), 50 * MB)):
        cells = [c for c in listed if c.layout == layout]
        for work in FUSED:
            assert max(c.bytes for c in cells if c.work == work) > least
        for work in ("forward", "inference", "backward"):
            halves = [c for c in cells if c.work == work and c.is_half]
            assert 2 * max(c.bytes for c in halves) > least
            assert HALVES[-1] in {c.dtype for c in halves}


@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "NC"])
def test_cells_cover_steps(layout: str) -> None:
    works = STEPS[:1] if layout == "NC" else STEPS
    for output in ("ready", "fresh"):
        cells = [c for c in all_cells(THREADS) if (c.layout, c.output) == (layout, output)]
        for work in works:
            assert max(c.bytes for c in cells if c.work == work) > 10 * MB
            assert min(c.bytes for c in cells if c.work == work) < 10 * MB


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("work", WORKS[:3])
def test_cells_cover_reordered_outputs(work: str, layout: str) -> None:
    cells = [c for c in all_cells(THREADS) if c.is_reordered]
    cells = [c for c in cells if (c.work, c.layout) == (work, layout)]
    assert {c.channels for c in cells} == {3, 64}
    assert max(c.bytes for c in cells) > 100 * MB


@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "NC"])
def test_cells_cover_masked_works(layout: str) -> None:
    cells = [c for c in all_cells(THREADS) if c.layout == layout]
    for work in MASKED:
        assert max(c.bytes for c in cells if c.work == work) > 50 * MB
    assert any(c.is_masked and c.bytes > 50 * MB for c in quick_cells(THREADS))


def test_cells_cover_awkward_shapes() -> None:
    cells = [c for c in all_cells(THREADS) if c.is_awkward]
    assert {(c.dtype, c.output, c.threads) for c in cells} == {("float32", "ready", 1)}
    for shapes in AWKWARD.values():
        for shape in shapes:
            listed = {(c.work, c.layout) for c in cells if c.shape == shape}
            assert listed == {(w, f) for w in (*WORKS, *GROUPED) for f in layouts_of(shape)}
    for work, figure in (("group", "groups"), ("ghost", "run")):
        assert {1, 2} < {getattr(c, figure) for c in cells if c.work.startswith(work)}


def test_rows_and_the_series_span_their_sizes() -> None:
    assert {shape[0] for shape in ROWS} >= {1, 65536}
    assert all(layouts_of(shape) == ("NC",) for shape in ROWS)
    sizes = [4 * math.prod(shape) for shape in SERIES]
    assert sizes == sorted(sizes)
    assert sizes[0] == 1024
    assert sizes[-1] > 400 * MB


def test_a_cell_survives_json() -> None:
    for cell in quick_cells(THREADS):
        assert Cell.from_json(json.loads(json.dumps(cell.to_json()))) == cell


def test_only_takes_any_of_one_kind_and_all_of_several() -> None:
    cells, libraries = chosen(
        all_cells(THREADS), ["forward", "inference", "nhwc", "60x100", "pytorch", "NC", "1 thread"]
    )
    assert {c.work for c in cells} == {"forward", "inference"}
    assert {c.name.split(maxsplit=1)[1] for c in cells} == {"NC float32 60x100 ready 1 thread"}
    assert libraries == ["PyTorch"]
    halves, libraries = chosen(all_cells(THREADS), ["bfloat16", "backward", "float32"])
    assert {(c.work, c.dtype) for c in halves} == {("backward", t) for t in ("bfloat16", "float32")}
    assert libraries == list(LIBRARIES)
    fused, libraries = chosen(quick_cells(THREADS), ["fused-inference", OURS, UNFUSED])
    assert {c.work for c in fused} == {"fused-inference"}
    assert libraries == [OURS, UNFUSED]
    masked, libraries = chosen(all_cells(THREADS), ["weighed-backward", UNMASKED])
    assert {c.work for c in masked} == {"weighed-backward"}
    assert libraries == [UNMASKED]
    for family, works in FAMILIES.items():
        assert {c.work for c in chosen(all_cells(THREADS), [family])[0]} == set(works)
    with pytest.raises(ValueError, match=r"'sideways' is none of: .*; a library: fastbn cython"):
        chosen(cells, ["sideways"])
    with pytest.raises(ValueError, match="no cell is left by: NCHW, 60x100"):
        chosen(all_cells(THREADS), ["NCHW", "60x100"])


# --- libraries ----------------------------------------------------------------------------------

SMALL = [
    Cell(work, layout, dtype, shape, output, THREADS)
    for shape in ((3, 16, 5, 4), (2, 5, 3, 3), (12, 20))
    for layout in layouts_of(shape)
    for dtype, output in (("float32", "ready"), ("float32", "fresh"), ("float64", "ready"))
    for work in WORKS
]
PLAIN = [cell for cell in SMALL if (cell.dtype, cell.output) == ("float32", "ready")]
HALF = [replace(c, dtype=dtype) for c in PLAIN for dtype in HALVES if c.work != WORKS[3]]
VARIANTS = [replace(c, work=w) for c in PLAIN if c.work == "forward" for w in (*FUSED, *MASKED)]
SMALL += HALF + VARIANTS
SMALL += [
    Cell(work, layout, "float32", (2 * GHOST, 64, 5, 4), "ready", THREADS)
    for layout in ("NCHW", "NHWC")
    for work in GROUPED
]
SMALL += [Cell(work, "NC", "float32", (20, 96), "ready", THREADS) for work in GROUPED[2::4]]
SMALL += [
    replace(c, work=work, output=output)
    for c in PLAIN
    if c.work == "forward"
    for work in STEPS
    for output in ("ready", "fresh")
]


SMALL += [
    Cell(IMAGES, "NHWC", "uint8", (2, 3, 9, 8), output, THREADS) for output in ("ready", "fresh")
]
SMALL += [Cell(work, "NC", "float32", (50, 7), "fresh", THREADS) for work in TABLES]
SMALL += [
    Cell(work, layout, dtype, shape, "ready", THREADS)
    for layout, dtype, shape in (
        ("NC", "float32", (60, 20)),
        ("NC", "bfloat16", (60, 20)),
        ("NHWC", "float32", (2, 20, 3)),
    )
    for work in OF_ROWS
]
SMALL += [replace(c, work=work) for c in PLAIN if c.work == "inference" for work in CURVED]
SMALL += [replace(c, output="reordered") for c in PLAIN if c.layout != "NC" and c.work != WORKS[3]]


def has_nothing(name: str, cell: Cell) -> bool:
    """Where a library that is always there says that it cannot."""
    only = {
        UNFUSED: cell.is_fused and not cell.is_step,
        UNMASKED: cell.is_masked,
        SINGLE: cell.is_half,
        FROZEN: cell.work == "inference" and not cell.is_reordered,
        BY_COPY: cell.is_reordered,
        "NumPy": not (cell.is_fused or cell.is_half),
        "numpy.copyto": cell.plain_work not in ("backward", "step")
        and not (cell.is_fused or cell.has_skip),
    }
    return not only.get(name, True)


@pytest.fixture
def worker(request: pytest.FixtureRequest) -> Iterator[rounds.Worker]:
    """The process of the library named by the test's parameter."""
    made = rounds.Worker(LIBRARIES[request.param], THREADS)
    try:
        made.started()
    except rounds.MissingError as why:
        made.stop()
        pytest.skip(f"{request.param} cannot run here: {why}")
    yield made
    made.stop()


@pytest.mark.parametrize("worker", LIBRARIES, indirect=True)
def test_a_library_is_right(worker: rounds.Worker, request: pytest.FixtureRequest) -> None:
    """A worker says "ready" only of a cell whose results it has compared with the oracle."""
    name = request.node.callspec.params["worker"]
    able = 0
    for cell in SMALL:
        if not rounds.taking_part(cell, [name]):
            continue
        if name == "fastbn numba" and cell.dtype != "float32":
            continue  # everything would be compiled once more
        if name == COMPILED and (cell.shape != SMALL[0].shape or cell.output == "fresh"):
            continue  # seconds each, and an output is fresh anyway
        if name == TORCH and cell.is_half and cell.work.endswith("layer-backward"):
            continue  # 2.13 adds up dgamma in the half type: wrong, as a run then says
        answer = worker.ask(do="prepare", cell=cell.to_json())
        assert answer["status"] in ("ready", "cannot"), (cell.name, answer)
        if answer["status"] == "ready":
            able += 1
            assert len(worker.ask(do="run", samples=2, loops=2, budget=9)["seconds"]) == 2
        elif name in ALWAYS:
            assert has_nothing(name, cell), cell.name
        worker.ask(do="release", keep=True)
    assert able


@pytest.mark.parametrize("work", [*OF_ROWS, *CURVED])
def test_rows_and_curves_are_for_fastbn_and_two_peers(work: str) -> None:
    names = rounds.taking_part(replace(PLAIN[0], work=work), list(LIBRARIES))
    assert [name for name in names if LIBRARIES[name].is_foreign] == [NUMPY, TORCH]


def test_masked_works_are_for_fastbn_and_the_limits() -> None:
    for work in MASKED:
        names = rounds.taking_part(replace(PLAIN[0], work=work), list(LIBRARIES))
        assert names == [n for n, one in LIBRARIES.items() if one.is_fastbn or one.kind == "limit"]


def test_steps_are_for_fastbn_and_four_peers() -> None:
    for work in STEPS:
        names = rounds.taking_part(replace(PLAIN[0], work=work), list(LIBRARIES))
        foreign = [name for name in names if LIBRARIES[name].is_foreign]
        assert foreign == [NUMPY, TORCH, COMPILED, ONEDNN]


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_a_reordered_output_has_the_memory_of_the_other_layout(layout: str) -> None:
    cell = Cell("inference", layout, "float32", (3, 16, 5, 4), "reordered", THREADS)
    data = Data(cell)
    other = Data(replace(cell, layout=cell.other_layout))
    assert data.reordered.shape == data.shape
    assert np.moveaxis(data.reordered, data.axis, other.axis).flags.c_contiguous
    assert not data.reordered.flags.c_contiguous
    task = of_fastbn.prepare(cell, data)
    assert task.read is not None
    results = task.read(task.call())
    assert results.main is data.reordered
    assert complaint(cell, data, Results(np.ascontiguousarray(results.main)))
    names = rounds.taking_part(cell, list(LIBRARIES))
    assert [name for name in names if LIBRARIES[name].is_foreign] == [NUMPY, TORCH]


def test_a_step_is_gated_by_its_own_y() -> None:
    """Where y is 0 but for rounding, the gradient may pass or not, as y says."""
    cell = Cell("fused-step", "NC", "float64", (12, 20), "ready", THREADS)
    data = Data(cell)
    forward = expected(replace(cell, work="fused-forward"), data, 0)["main"]
    data.residual[0, 0] -= forward[0]
    task = of_fastbn.prepare(cell, data)
    assert task.read is not None
    results = task.read(task.call())
    assert results.y is not None
    for rounding in (0.0, 1e-12):
        assert results.y[0, 0] < 1e-12
        y, passed = results.y.copy(), results.y > 0
        y[0, 0] = rounding
        assert bool(complaint(cell, data, results._replace(y=y))) == (
            passed[0, 0] != (rounding > 0)
        )


def test_awkward_cells_are_for_the_cython_backend_and_numpy() -> None:
    """Here with shapes like theirs, all of them small."""
    shapes = ((16, 5, 3), (5, 6, 2), (6, 64, 1, 1), (4, 1, 4), (9, 7), (30, 2), (1, 300), (1, 1, 1))
    for shape in shapes:
        for layout in layouts_of(shape):
            for work in (*WORKS, *GROUPED):
                cell = Cell(work, layout, "float32", shape, "ready", 1)
                data = Data(cell)
                for library in (of_fastbn, of_numpy):
                    data.out.fill(np.nan)
                    task = library.prepare(cell, data)
                    assert task is not None
                    assert task.read is not None
                    assert complaint(cell, data, task.read(task.call())) is None, cell.name
    for cell in all_cells(THREADS):
        if cell.is_awkward:
            assert rounds.taking_part(cell, list(LIBRARIES)) == [OURS, NUMPY]


@pytest.mark.parametrize("cell", SMALL, ids=lambda cell: cell.name)
def test_a_wrong_result_is_noticed(cell: Cell) -> None:
    data = Data(cell)
    task = of_fastbn.prepare(cell, data)
    assert task.read is not None
    results = task.read(task.call())
    assert complaint(cell, data, results) is None
    assert complaint(cell, data, results._replace(main=results.main * WRONG))
    assert complaint(cell, data, results._replace(main=results.main[:-1]))
    assert complaint(cell, data, results._replace(main=np.full_like(results.main, np.nan)))
    if cell.is_masked:
        less = replace(cell, work=cell.work.replace("weighed", "masked"))
        for other in {replace(cell, work=cell.plain_work), less} - {cell}:
            task = of_fastbn.prepare(other, data)
            assert task.read is not None
            assert complaint(cell, data, task.read(task.call()))
    if cell.has_skip and cell.plain_work == "forward":
        assert results.sum is not None
        assert complaint(cell, data, results._replace(sum=None))
        assert complaint(cell, data, results._replace(sum=results.sum * WRONG))
    if cell.is_step:
        assert results.y is not None
        assert complaint(cell, data, results._replace(y=None))
        assert complaint(cell, data, results._replace(y=results.y * WRONG))
    if cell.is_fused and cell.plain_work in ("backward", "step"):
        assert results.dresidual is not None
        assert complaint(cell, data, results._replace(dresidual=data.dy))
    if cell.plain_work in ("backward", "step"):
        assert results.dgamma is not None
        assert complaint(cell, data, results._replace(dgamma=results.dgamma * WRONG))
        assert complaint(cell, data, Results(results.main))


@pytest.mark.parametrize("kind", ["ordinary", "streaming"])
@pytest.mark.parametrize("values", [1, 15, 16, 17, 1000, 40001])
def test_a_copy_copies(kind: str, values: int) -> None:
    pytest.importorskip("benchmarks.libraries.copies", exc_type=ImportError)
    library = LIBRARIES[f"copy, {kind} stores"].load()
    for work in (*WORKS, *FUSED, *STEPS, *MASKED, *OF_ROWS):
        cell = Cell(work, "NC", "float32", (1, values), "ready", THREADS)
        data = Data(cell)
        task = library.prepare(cell, data)
        assert task is not None
        task.call()
        for out, *sources in data.moved(cell):
            assert np.array_equal(out, sum(sources[1:], sources[0]))


def test_numpy_copies_into_another_order() -> None:
    cell = Cell("forward", "NHWC", "float32", (3, 16, 5, 4), "reordered", THREADS)
    data = Data(cell)
    task = LIBRARIES["numpy.copyto"].load().prepare(cell, data)
    assert task is not None
    task.call()
    assert np.array_equal(data.reordered, data.x)


def test_the_oracle_is_batch_norm() -> None:
    cell = Cell("backward", "NC", "float64", (50, 3), "ready", 1)
    data = Data(cell)
    forward = expected(replace(cell, work="forward"), data, 1)["main"]
    assert forward.mean() == pytest.approx(data.beta[1])
    assert forward.std() == pytest.approx(data.gamma[1], rel=1e-4)
    gradients = expected(cell, data, 1)
    assert abs(gradients["main"].mean()) < 1e-12
    assert gradients["dbeta"] == pytest.approx(data.dy[:, 1].sum())


@pytest.mark.parametrize("kind", ["", "masked-", "weighed-"])
def test_the_oracle_of_backward_is_the_gradient(kind: str) -> None:
    """Of sum(dy * y), y the oracle of forward: that of x by small steps, two others exactly."""
    backward = Cell(f"{kind}backward", "NC", "float64", (9, 3), "ready", 1)
    forward, data = replace(backward, work=f"{kind}forward"), Data(backward)
    assert 1 < data.where.sum() < data.where.size

    def slope(place: int) -> float:
        ends = []
        for step in (1e-6, -1e-6):
            data.x[place, 1] += step
            ends.append(data.dy[:, 1] @ expected(forward, data, 1)["main"])
            data.x[place, 1] -= step
        return float(ends[0] - ends[1]) / 2e-6

    gradients = expected(backward, data, 1)
    assert gradients["main"] == pytest.approx([slope(place) for place in range(9)], abs=1e-7)
    loss = data.dy[:, 1] @ expected(forward, data, 1)["main"]
    exact = data.gamma[1] * gradients["dgamma"] + data.beta[1] * gradients["dbeta"]
    assert exact == pytest.approx(loss)


# --- a process that fails -----------------------------------------------------------------------


def test_a_worker_that_dies_marks_its_cell_and_is_started_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cell = Cell("forward", "NC", "float32", (12, 20), "ready", THREADS)
    team = rounds.Team(["NumPy"], THREADS)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(rounds, "TURN", "no number")
            outcome = team.measure(cell, ["NumPy"], 1).outcomes["NumPy"]
        assert outcome.status == "died"
        assert "TypeError" in outcome.note
        assert team.measure(cell, ["NumPy"], 1).outcomes["NumPy"].status == "timed"
    finally:
        team.stop()


def test_a_worker_that_hangs_is_given_up() -> None:
    worker = rounds.Worker(LIBRARIES["NumPy"], THREADS)
    try:
        worker.started()
        with pytest.raises(rounds.DiedError, match="no answer for 0 s"):
            worker.receive(limit=0.01)
    finally:
        worker.stop()


def test_a_library_that_is_not_there_says_so() -> None:
    worker = rounds.Worker(replace(LIBRARIES["NumPy"], name="no such library"), THREADS)
    try:
        with pytest.raises(rounds.MissingError, match="no such library"):
            worker.started()
    finally:
        worker.stop()


# --- figures ------------------------------------------------------------------------------------


def made_up(cell: Cell, **seconds: float) -> Measured:
    """A cell with exact times, by names with _ for spaces."""
    outcomes = {name.replace("_", " "): Outcome.of([value] * 3) for name, value in seconds.items()}
    return Measured(cell, outcomes)


def times(outcome: Outcome, factor: float) -> Outcome:
    """The same, so many times slower."""
    numbers = {name: getattr(outcome, name) * factor for name in ("median", "q1", "q3")}
    return replace(outcome, **numbers)


def run_of(*measured: Measured) -> Run:
    return Run(MACHINE, "2026-01-01", {}, {}, 0.015, list(measured), 9)


LARGE = Cell("forward", "NCHW", "float32", (32, 256, 56, 56), "ready", THREADS)
COPY = "copy, streaming stores"


def test_what_is_lost_comes_first() -> None:
    lost = made_up(LARGE, fastbn_cython=0.03, PyTorch=0.02, oneDNN=0.01)
    won = made_up(replace(LARGE, layout="NHWC"), fastbn_cython=0.01, PyTorch=0.02)
    run = run_of(won, lost)
    assert run.lost == [lost]
    assert report.lost_grid(run).rows == [(LARGE.name, "oneDNN", "30 ms", "10 ms", "0.33")]
    text = report.markdown(run)
    assert text.index("peer is faster") < text.index("### forward")


def test_another_layout_the_limits_and_fastbn_itself_are_no_peers() -> None:
    others = {COPY: 0.005, "JAX": 0.06, "fastbn unfused": 0.02}
    m = made_up(LARGE, fastbn_cython=0.03, oneDNN_blocked=0.01, **others)
    assert m.best_peer == ("JAX", 0.06)
    assert m.copies() == pytest.approx(6)


# --- keeping and comparing ----------------------------------------------------------------------


def test_a_run_survives_json(tmp_path: Path) -> None:
    run = run_of(made_up(LARGE, fastbn_cython=0.03), Measured(LARGE, {OURS: Outcome("wrong", "?")}))
    run.save(tmp_path / "run.json")
    assert Run.load(tmp_path / "run.json") == run
    (tmp_path / "other.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"other\.json holds no results of this benchmark"):
        Run.load(tmp_path / "other.json")


def test_what_was_disturbed_is_measured_again() -> None:
    """Cells whose samples lie apart by more than half of their median, whoever's; others stay."""
    still = made_up(LARGE, fastbn_cython=0.01)
    apart = Outcome.of([0.01, 0.01, 0.02, 0.03])
    other = replace(LARGE, layout="NHWC")
    disturbed = Measured(other, {OURS: Outcome.of([0.01] * 3), "PyTorch": apart})
    old = run_of(still, disturbed)
    assert [m.cell for m in old.measured if m.is_disturbed] == [other]
    again = made_up(other, fastbn_cython=0.02, PyTorch=0.02)
    assert old.renewed(run_of(again)).measured == [still, again]


def test_compare_finds_regressions_beyond_the_spread() -> None:
    old = run_of(made_up(LARGE, fastbn_cython=0.010, fastbn_numba=0.02, PyTorch=0.1))
    new = run_of(made_up(LARGE, fastbn_cython=0.012, fastbn_numba=0.02, PyTorch=0.9))
    assert [c.library for c in compare.regressions(old, new, 0.1)] == [OURS]
    assert compare.regressions(old, new, 0.3) == []
    assert compare.regressions(new, old, 0.1) == []
    wide = Measured(LARGE, {OURS: Outcome("timed", "", 0.010, 0.008, 0.013, 9)})
    assert compare.regressions(run_of(wide), new, 0.1) == []
    gone = run_of(Measured(LARGE, {OURS: Outcome("died", "why")}))
    assert [found[1:] for found in compare.broken(old, gone)] == [(OURS, Outcome("died", "why"))]


def test_compare_sees_all_of_fastbn() -> None:
    old, new = (run_of(made_up(LARGE, FrozenBatchNorm=t, PyTorch=t)) for t in (0.1, 0.2))
    assert [c.library for c in compare.regressions(old, new, 0.1)] == [FROZEN]


def test_cache_sizes_are_read(tmp_path: Path) -> None:
    for name, level, kind, size in (
        ("index0", "1", "Data", "48K"),
        ("index2", "2", "Unified", "2048K"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        for file, text in (("level", level), ("type", kind), ("size", size)):
            (folder / file).write_text(text + "\n")
    assert cache_size("1", "Data", tmp_path) == 48 << 10
    assert cache_size("2", "Unified", tmp_path) == 2 << 20
    assert cache_size("3", "Unified", tmp_path) is None


def test_folded_and_fused_are_the_same_work(capsys: pytest.CaptureFixture[str]) -> None:
    x = np.random.default_rng(0).normal(size=(2, fold_or_fuse.CHANNELS, 3, 3)).astype(np.float32)
    given, results = x.copy(), {}
    for name, way in fold_or_fuse.ways(x).items():
        np.copyto(x, given)
        way()
        results[name] = x.copy()
    bias, norm, bias_and_relu, relu = results.values()
    np.testing.assert_array_equal(bias_and_relu, np.maximum(bias, 0))
    np.testing.assert_array_equal(relu, np.maximum(norm, 0))
    fold_or_fuse.main(rounds=1)
    assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()[1:]] == [*results]


# --- the budget ---------------------------------------------------------------------------------

TINY = [
    Cell(work, layout, "float32", shape, "ready", threads)
    for shape in ((3, 17, 5, 4), (20, 33))
    for layout in layouts_of(shape)
    for work in WORKS[:3]
    for threads in (1, THREADS)
]


@pytest.fixture
def budget() -> Any:
    """The module, which needs the compiled kernels."""
    return pytest.importorskip("benchmarks.budget", exc_type=ImportError)


@pytest.mark.parametrize("cell", TINY, ids=lambda cell: cell.name)
def test_the_passes_of_a_budget_are_the_work(budget: Any, cell: Cell) -> None:
    whole, data = Data(cell), Data(cell)
    task = of_fastbn.prepare(cell, whole)
    task.call()
    passes = budget.passes(cell, data)
    assert tuple(passes) == budget.PASSES[cell.work]
    for call in passes.values():
        call()
    np.testing.assert_allclose(data.out, whole.out, rtol=1e-5, atol=1e-5)


def test_few_values_are_of_the_same_channels_and_family_of_layouts(budget: Any) -> None:
    for cell in TINY:
        few = Data(budget.few_values(cell, cell.channels)).x
        assert few.size == 2 * cell.channels
        families = [budget.view(cell, a).shape[3] > 1 for a in (few, Data(cell).x)]
        assert families == [cell.layout == "NCHW"] * 2


def test_a_budget_is_the_sum_or_the_copy(budget: Any) -> None:
    parts = {"call": 1.0, "finalize": 2.0, "team": 0.5, "passes": {"moments": 3.0, "normalize": 4}}
    made = budget.Budget(TINY[0], **parts, copy=6.0, measured=21.0)
    assert (made.total, made.ratio) == (10.5, 2)
    assert replace(made, copy=42.0).ratio == 0.5
    (row,) = budget.grid([made]).rows
    assert row[:4] == ("forward", "NCHW", "3x17x5x4", "1")


def test_a_team_is_dismissed(budget: Any) -> None:
    from fastbn._ext import entry

    before = fastbn.get_num_threads(), entry.tune()
    with budget.team_of(1, divided=True):
        assert fastbn.get_num_threads() == 1
        assert entry.tune() == before[1] | {"serial_below": 1}
    assert (fastbn.get_num_threads(), entry.tune()) == before


def test_a_tiny_budget(budget: Any, tmp_path: Path) -> None:
    words = ("4x16x28x28", "backward", "NHWC", "1 thread")
    only = [argument for text in words for argument in ("--only", text)]
    done = command("budget", *only, "--rounds", "1", "--output", str(tmp_path), NO_COLOR="1")
    assert done.returncode == 0, done.stderr
    assert "4x16x28x28" in done.stdout
    (found,) = json.loads((tmp_path / "budget.json").read_text())["budgets"]
    assert found["team"] == 0
    assert set(found["passes"]) == {"gradient_moments", "input_gradient"}
    parts = [found[name] for name in ("call", "finalize", "team")] + [*found["passes"].values()]
    assert found["total"] == pytest.approx(max(sum(parts), found["copy"]))
    assert found["ratio"] == pytest.approx(found["measured"] / found["total"])
    done = command("budget", "--only", "PyTorch")
    assert done.returncode == 2
    assert "takes no library" in done.stderr


# --- from end to end ----------------------------------------------------------------------------


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m benchmarks`` with `arguments`."""
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_tiny_run_writes_everything(tmp_path: Path) -> None:
    output = tmp_path / "results"
    only = ("60x100", "1x64x2x2", "forward", "fastbn cython", "NumPy", "numpy.copyto")
    words = [argument for text in only for argument in ("--only", text)]
    done = command("--quick", *words, "--output", str(output), NO_COLOR="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.index("Cells where a peer is faster") < done.stdout.index("forward, NC")
    run = Run.load(output / "results.json")
    assert {m.cell.shape for m in run.measured} == {(60, 100), (1, 64, 2, 2)}
    assert all(o.status == "timed" for m in run.measured for o in m.outcomes.values())
    assert "### forward, NC" in (output / "results.md").read_text()
    for name in ("ratio-forward.png", "sizes.png"):
        assert (output / name).read_bytes().startswith(PNG)

    again = tmp_path / "again"
    saved = str(output / "results.json")
    done = command("--report", saved, "--output", str(again))
    assert done.returncode == 0, done.stderr
    assert (again / "results.md").read_text() == (output / "results.md").read_text()

    slower = [
        replace(m, outcomes={n: times(o, 9) for n, o in m.outcomes.items()}) for m in run.measured
    ]
    replace(run, measured=slower).save(tmp_path / "slower.json")
    done = command("--compare", saved, str(tmp_path / "slower.json"))
    assert done.returncode == 1, done.stderr
    assert "9.00" in done.stdout
    assert command("--compare", saved, saved).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--only", "sideways"), "'sideways' is none of"),
        (("--rounds", "0"), "is no whole number from 1 up"),
        (("--report", "no-such-file.json"), "No such file"),
    ],
)
def test_refusals(arguments: tuple[str, ...], said: str) -> None:
    done = command(*arguments)
    assert done.returncode == 2
    assert said in " ".join(done.stderr.split())
