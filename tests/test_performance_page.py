"""docs/performance.md says what the committed results give, and what any run would."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import behind as of_budgets
from benchmarks import page
from benchmarks.cells import Cell, all_cells
from benchmarks.libraries import BY_COPY, LIBRARIES, NUMPY, OURS, TORCH
from benchmarks.machine import Machine
from benchmarks.parts import PARTS, behind, lost, verdict
from benchmarks.results import Measured, Outcome, Run

MACHINE = Machine("a processor", 2, 1 << 15, 1 << 20, 1 << 25, 1 << 34, "Linux", "3.11")
LARGE = Cell("forward", "NCHW", "float32", (32, 256, 56, 56), "ready", 2)


def run_of(*measured: Measured) -> Run:
    return Run(MACHINE, "2026-01-01", {}, {}, 0.015, list(measured), 9)


def timed(cell: Cell, **seconds: float) -> Measured:
    outcomes = {name: Outcome.of([value]) for name, value in seconds.items()}
    return Measured(cell, {OURS if name == "ours" else name: o for name, o in outcomes.items()})


@pytest.fixture(autouse=True)
def check(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command is to check."""
    monkeypatch.setattr("sys.argv", ["benchmarks", "page", "--check"])


def test_the_page_and_its_pictures_are_what_the_committed_results_give() -> None:
    assert page.stale() == []
    with pytest.raises(SystemExit) as end:
        page.main()
    assert end.value.code == 0


def test_what_is_out_of_date_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run.load(page.RESULTS)
    replace(run, date="2001-02-03").save(tmp_path / "run.json")
    monkeypatch.setattr(page, "RESULTS", tmp_path / "run.json")
    first, *pictures = page.stale()
    assert "performance.md is not what run.json gives" in first
    assert pictures
    assert all(" is of other results; run: python -m benchmarks page" in p for p in pictures)
    with pytest.raises(SystemExit, match="is not what run"):
        page.main()


def test_a_run_is_small_and_survives_json(tmp_path: Path) -> None:
    note = Outcome("timed", "bnorm_jit", 1.5e-6, 1.234e-6, 0.1235, 7)
    outcomes = {OURS: note, NUMPY: Outcome.of([1 / 3, 1e-7]), TORCH: Outcome("wrong", "y")}
    run = run_of(Measured(LARGE, outcomes))
    run.save(tmp_path / "run.json")
    assert Run.load(tmp_path / "run.json") == run
    assert '"fastbn cython":[1.5,1.234,123500,7,"bnorm_jit"]' in (tmp_path / "run.json").read_text()
    assert page.RESULTS.stat().st_size < 400_000


def test_every_part_comes_out_of_any_run() -> None:
    """Without any cell, with fastbn alone, and with everything alike; no part has empty lines."""
    bare = [Measured(cell, {OURS: Outcome.of([0.001])}) for cell in all_cells(2)]
    full = [Measured(c, {name: Outcome.of([0.001]) for name in LIBRARIES}) for c in all_cells(2)]
    for run in (run_of(), run_of(*bare), run_of(*full)):
        text = page.filled(page.PAGE.read_text(), run)
        assert page.filled(text, run) == text
        for name, part in PARTS.items():
            lines = part(run).splitlines()
            assert "\n".join([f"<!-- {name} -->", *lines, "", ""]) in text
            assert all(lines)
    assert "1.00" in PARTS["ratios"](run)


def test_sections_of_steps_and_reordered_outputs() -> None:
    """They are there with their cells, and without them nothing but comments is."""
    step = Cell("step", "NHWC", "float32", (8, 64, 56, 56), "fresh", 2)
    output = replace(step, work="inference", output="reordered")
    times = {"PyTorch": 0.02, "torch.compile": 0.03, "numpy.copyto": 0.005}
    run = run_of(
        timed(step, ours=0.01, **times),
        timed(output, ours=0.01, **times, **{BY_COPY: 0.015}),
    )
    assert PARTS["step_ratios"](run).splitlines()[2:] == [
        "| step | fresh | NHWC | - | 2.00 | 3.00 | - | 2.00 | 1 | 0 | 0 |"
    ]
    assert "fastbn is 2.00 and - times" in " ".join(PARTS["steps"](run).split())
    assert PARTS["reordered_ratios"](run).splitlines()[2:] == [
        "| inference | NHWC | 1.50 | 0.50 | - | 2.00 | 1 | 0 | 0 |"
    ]
    text = page.filled(page.PAGE.read_text(), run)
    assert "**A training step**" in text
    assert "**An output in another order of memory**" in text
    empty = page.filled(text, run_of())
    assert "<!-- steps -->\n\n<!-- step_ratios -->\n\n**Half" in empty
    assert "<!-- reordered -->\n\n<!-- reordered_ratios -->\n\n**Awkward" in empty


def test_sections_of_rows_curves_images_and_tables() -> None:
    """A line for each cell, a column for each peer that was measured; without cells, nothing."""
    row = Cell("rows-skip-rms-forward", "NHWC", "float32", (32, 768, 128), "ready", 2)
    half = replace(row, work="rows-layer-backward", dtype="bfloat16")
    curve = replace(row, work="silu-inference", shape=(8, 64, 56, 56))
    image = Cell("images", "NHWC", "uint8", (1, 3, 224, 224), "fresh", 2)
    scaled = Cell("table-fit", "NC", "float32", (1000, 20), "fresh", 2)
    run = run_of(
        timed(row, ours=0.01, NumPy=0.04, PyTorch=0.02),
        timed(half, ours=0.01, PyTorch=0.03),
        timed(curve, ours=0.01, PyTorch=0.02),
        timed(image, ours=0.01, OpenCV=0.02, albumentations=0.05),
        timed(scaled, ours=0.01, **{"scikit-learn": 0.02}),
    )
    assert PARTS["row_times"](run).splitlines() == [
        "| work | shape | how | fastbn | NumPy | PyTorch |",
        "| :-- | :-- | :-- | --: | --: | --: |",
        "| rows-skip-rms-forward | 32x768x128 | NHWC, float32, ready | 10 ms | 4.00 | 2.00 |",
        "| rows-layer-backward | 32x768x128 | NHWC, bfloat16, ready | 10 ms | - | 3.00 |",
    ]
    times = {name: PARTS[name](run) for name in ("curve_times", "image_times", "table_times")}
    assert [text.splitlines()[2] for text in times.values()] == [
        "| silu-inference | 8x64x56x56 | NHWC, float32, ready | 10 ms | 2.00 |",
        "| images | 1x3x224x224 | NHWC, uint8, fresh | 10 ms | 2.00 | 5.00 |",
        "| table-fit | 1000x20 | NC, float32, fresh | 10 ms | 2.00 |",
    ]
    text = page.filled(page.PAGE.read_text(), run)
    for said in ("**Rows along", "**Activations of inference**", "**Images**", "**Tables**"):
        assert said in text
    kinds = ("row", "curve", "image", "table")
    parts = [part for kind in kinds for part in (f"{kind}s", f"{kind}_times")]
    nothing = "\n".join(f"<!-- {name} -->\n" for name in parts)
    assert f"{nothing}\n<!-- reordered -->" in page.filled(text, run_of())


def test_a_page_with_other_parts_is_refused() -> None:
    with pytest.raises(ValueError, match="parts of the page"):
        page.filled("<!-- verdict -->\n", run_of())


def test_the_verdict_and_what_is_lost() -> None:
    run = run_of(
        timed(LARGE, ours=0.01, NumPy=0.08, PyTorch=0.008),
        timed(replace(LARGE, layout="NHWC"), ours=0.01, NumPy=0.02, PyTorch=0.02),
        timed(replace(LARGE, work="inference"), ours=0.01, NumPy=0.05, PyTorch=0.0099),
    )
    said = " ".join(verdict(run).split())
    assert "**Against NumPy**, times as fast on average: `batch_norm` 4.00 and `normalize`" in said
    assert "**Against PyTorch**, times as fast on average: `batch_norm` 1.26 and" in said
    assert "**oneDNN** was not measured." in said
    assert "from 0.80 to 2.00. Ahead in 1 of 3 cases, behind in 1." in said
    assert "faster on average in `batch_norm` in NCHW 50 MB and up (PyTorch, 0.80). Nor" in said
    assert lost(run).startswith("In 1 of 3 cells")
    assert behind(run).splitlines()[2:] == [
        "| forward | NCHW | 32x256x56x56 | float32, ready, 2 threads | PyTorch | 0.80 |"
    ]


def test_passes_of_cells_that_stay_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the run alone, with what sixteen values take, and none of a cell that is ahead."""
    cell = Cell("backward", "NC", "float32", (16, 1000), "ready", 2)
    passes = {"gradient_moments": 10e-6, "input_gradient": -1e-6}
    counts = {"gradient_moments": 34.2, "input_gradient": 30.0}
    budget = {"cell": cell.to_json(), "passes": passes, "instructions": counts, "ratio": 1.2}
    (tmp_path / "budget.json").write_text(json.dumps({"clock": 2e9, "budgets": [budget]}))
    monkeypatch.setattr(of_budgets, "BUDGETS", tmp_path / "budget.json")
    assert PARTS["passes_behind"](run_of(timed(cell, ours=1e-5, oneDNN=1.5e-5))) == ""
    made = PARTS["passes_behind"](run_of(timed(cell, ours=2e-5, oneDNN=1.5e-5)))
    head = "| backward, NC | 16x1000, 2 | 20 us | 15 us (oneDNN) | 1.20 "
    assert made.splitlines()[2:] == [
        head + "| `gradient_moments` | 0.128 | 34.2 | 40 |",
        "|  |  |  |  |  | `input_gradient` | 0.192 | - | - |",
    ]
