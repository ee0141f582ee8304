"""Every example runs; an experiment prints its tables, saves its plot, and repeats."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from types import ModuleType

import experiment
import numpy as np
import pytest
import saturating_sigmoids
import scale_invariance

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[1] / "examples"
EXPERIMENTS = (
    "saturating_sigmoids",
    "learning_rates",
    "why_it_works",
    "small_batches",
    "fine_tuning",
    "scale_invariance",
)
WITH_PLOTS = (*EXPERIMENTS, "images", "data_parallel")
OTHERS = ("in_place",)
PNG = b"\x89PNG\r\n\x1a\n"


def test_every_example_is_tested() -> None:
    """A script that is added is named above, or is the module they share."""
    found = {path.stem for path in EXAMPLES.glob("*.py")}
    assert found == {*WITH_PLOTS, *OTHERS, experiment.__name__}


@pytest.mark.parametrize("name", OTHERS)
def test_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The example ends without an error and has something to show."""
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert capsys.readouterr().out


@pytest.mark.parametrize("name", WITH_PLOTS)
def test_experiment(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In short, it ends with a table and a plot."""
    plot = tmp_path / "plot.png"
    monkeypatch.setattr(sys, "argv", [name, "--quick", "--output", str(plot)])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    shown = capsys.readouterr().out
    assert "────" in shown
    assert str(plot) in shown
    assert plot.read_bytes().startswith(PNG)


@pytest.mark.parametrize("module", [saturating_sigmoids, scale_invariance])
def test_experiment_repeats(module: ModuleType) -> None:
    """The same numbers on every run."""
    with experiment.repeatable():
        assert module.measure(True, list) == module.measure(True, list)


def test_spread_of_seeds() -> None:
    """Median, extremes, and what never comes."""
    assert experiment.spread([3, 1, 2, 5]) == (1, 2.5, 5)
    assert experiment.spread([1, np.inf, np.inf]).text(".0f") == "never (1 to never)"
    assert experiment.spread([0.5, 0.5]).text() == "50.0%"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_is_documented(name: str) -> None:
    """The document has a section on the script, with its plot, which is small."""
    folder = EXAMPLES.parent / "docs"
    text = (folder / "experiments.md").read_text()
    assert f"`{name}.py`" in text
    assert f"(experiments/{name}.png)" in text
    assert (folder / "experiments" / f"{name}.png").stat().st_size < 150_000
