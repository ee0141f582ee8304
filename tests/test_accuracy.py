"""``python -m benchmarks accuracy`` tells right from wrong, and says so in its tables."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import fastbn
from benchmarks import accuracy
from benchmarks.cells import Cell
from benchmarks.data import Results
from benchmarks.judge import HardData, worst
from benchmarks.libraries import AVX2, OURS, of_fastbn
from benchmarks.machine import Machine
from benchmarks.results import Judged, Measured, Outcome
from fastbn import backends
from oracle.arrays import to_layout
from oracle.formulas import rstd_of
from oracle.hard import hard_data

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SHAPE = (6, 12, 5, 4)
CELLS = accuracy.all_cells(SHAPE)
FORWARD = CELLS[0]
ORDINARY, POISONED = "ordinary: N(0, 1)", "NaN and infinity in two channels"
BACKENDS = [name for name in backends.usable() if name != "numba"]
"""numba would compile everything for each element type."""


def results_of(cell: Cell, case: str) -> tuple[HardData, Results]:
    """What fastbn makes of a case."""
    data = HardData(cell, case)
    task = of_fastbn.prepare(cell, data)
    assert task.read is not None
    return data, task.read(task.call())


@pytest.mark.parametrize("shape", [SHAPE, accuracy.SHAPE], ids=str)
@pytest.mark.parametrize("dtype", accuracy.DTYPES)
def test_hard_data_are_in_the_promised_domain(dtype: str, shape: tuple[int, ...]) -> None:
    """What docs/numerics.md asks of |mean|/s, of var and of its reciprocal."""
    limit, tiny = (1e6 if dtype == "float32" else 1e12), np.finfo(np.float64).tiny
    for name in hard_data(dtype):
        data = HardData(replace(FORWARD, dtype=dtype, shape=shape), name)
        mean, var = (v[np.isfinite(v)].astype(np.longdouble) for v in data.batch_statistics)
        assert mean.size == var.size, name
        assert float(np.max(np.abs(mean) * rstd_of(var, data.eps))) <= limit, name
        spread = var[var > 0]
        assert ((spread >= tiny) & (1 / spread >= tiny)).all(), name
        assert all(a.flags.c_contiguous for a in (data.x, data.dy)), name


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
@pytest.mark.parametrize("backend", BACKENDS)
def test_fastbn_keeps_its_promise(backend: str, cell: Cell) -> None:
    with fastbn.use_backend(backend):
        for case in hard_data(cell.dtype):
            figures = worst(cell, *results_of(cell, case))
            assert max(figures.values()) <= 1, (case, figures)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_a_wrong_result_is_above_1(cell: Cell) -> None:
    data, results = results_of(cell, ORDINARY)
    for name in ("main",) if cell.work == "forward" else ("main", "dgamma", "dbeta"):
        wrong = results._replace(**{name: getattr(results, name) * 1.01})
        assert 1 < max(worst(cell, data, wrong).values()) < np.inf


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_a_nan_that_leaves_its_channel_is_infinitely_wrong(cell: Cell) -> None:
    data, results = results_of(cell, POISONED)
    assert max(worst(cell, data, results).values()) <= 1
    plain = np.zeros(SHAPE, cell.dtype)
    plain[1, 1, 1, 1] = np.nan
    leak = results._replace(main=results.main + to_layout(plain, cell.layout))
    assert max(worst(cell, data, leak).values()) == np.inf


@pytest.mark.parametrize(
    ("units", "text"),
    [
        (0.0, "< 0.01"),
        (0.123, "0.12"),
        (3.44, "3.4"),
        (412.0, "412"),
        (2.1e5, "2e5"),
        (3e12, "3e12"),
        (np.inf, "inf"),
    ],
)
def test_figures(units: float, text: str) -> None:
    assert accuracy.figure(units) == text


def made_up(cell: Cell, units: float) -> Judged:
    """fastbn as good as that, a peer that failed, and one that has nothing for the cell."""
    outcomes = {OURS: Outcome.of([0.001] * 3), "JAX": Outcome("failed", "why")}
    return Judged(ORDINARY, Measured(cell, outcomes), {OURS: {"y": units}})


def test_the_worse_layout_counts_and_a_broken_promise_comes_first() -> None:
    nhwc = replace(FORWARD, layout="NHWC")
    broken, troubles, table = accuracy.grids([made_up(FORWARD, 0.5), made_up(nhwc, np.inf)])
    assert broken.rows == [(ORDINARY, nhwc.name, OURS, "y", "inf")]
    assert troubles.rows == [
        (ORDINARY, cell.name, "JAX", "failed", "why") for cell in (FORWARD, nhwc)
    ]
    assert table.headings == ("case", OURS, "JAX")
    assert table.rows[0] == (ORDINARY, "inf", "failed")
    assert table.rows[1:] == [("time, NCHW", "1 ms", "-"), ("time, NHWC", "1 ms", "-")]


def test_infinity_is_kept_as_strict_json() -> None:
    machine = Machine("a processor", 2, None, None, None, 1 << 34, "Linux", "3.11")
    found = accuracy.Accuracy(machine, "2026-01-01", {}, {}, [made_up(FORWARD, np.inf)])
    (entry,) = json.loads(accuracy.to_json(found))["judged"]
    assert Cell.from_json({name: entry[name] for name in FORWARD.to_json()}) == FORWARD
    assert entry["outcomes"][OURS]["units"] == {"y": "inf"}


def test_the_page_shows_the_run_that_is_kept() -> None:
    """And the run is within the bounds, as the page says."""
    found = accuracy.from_json(accuracy.RESULTS.read_text())
    assert accuracy.page(accuracy.PAGE.read_text(), found) == accuracy.PAGE.read_text()
    assert accuracy.broken_grid(found.judged).rows == []
    assert accuracy.to_json(found) == accuracy.RESULTS.read_text()
    for j in found.judged:
        assert j.units[AVX2] == j.units[OURS]  # which therefore has no column
    assert {j.case for j in found.judged} == {*hard_data("float32"), *hard_data("float64")}


def test_the_page_has_the_worst_and_leaves_out_what_is_below_a_hundredth() -> None:
    other = made_up(FORWARD, 0.001)._replace(case="other")
    judged = [made_up(FORWARD, 0.5), other]
    for j in judged:
        j.measured.outcomes.pop("JAX")
    assert accuracy.summary_grid(judged).rows == [
        ("float32, y", "ordinary data", "0.5"),
        ("float32, y", "all data", "0.5"),
    ]
    (grid,) = accuracy.case_grids(judged)
    assert grid.rows == [(ORDINARY, "0.5")]


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", "accuracy", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_run_has_a_row_for_every_case(tmp_path: Path) -> None:
    only = ("fastbn numpy", "NumPy", "float32", "backward", "NCHW")
    words = [argument for text in only for argument in ("--only", text)]
    done = command(*words, "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "accuracy.md").read_text()
    assert "promises\n\nnowhere\n" in text
    tables = text.split("### ")[2:]
    assert [table.split("\n")[0].rpartition(": ")[2] for table in tables] == [
        "dx",
        "dgamma and dbeta",
    ]
    for table in tables:
        assert "| case | fastbn numpy | NumPy |" in table
        assert all(f"| {case} | " in table for case in hard_data("float32"))
    judged = json.loads((tmp_path / "accuracy.json").read_text())["judged"]
    assert [entry["case"] for entry in judged] == list(hard_data("float32"))


def test_refusals() -> None:
    for words, said in ((["sideways"], "'sideways' is none of"), (["numpy.copyto"], "no library")):
        done = command(*(argument for word in words for argument in ("--only", word)))
        assert done.returncode == 2
        assert said in " ".join(done.stderr.split())
