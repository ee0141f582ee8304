"""``python -m fastbn``: what it prints and writes, and what it says when it cannot."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest

import fastbn
from fastbn import demo

pytestmark = pytest.mark.slow

PNG = b"\x89PNG\r\n\x1a\n"


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m fastbn`` with `arguments`."""
    return subprocess.run(
        [sys.executable, "-m", "fastbn", *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_info_prints_the_configuration() -> None:
    done = command("info")
    assert done.returncode == 0, done.stderr
    told = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert list(told) == list(fastbn.get_config())
    assert told["version"] == fastbn.get_config()["version"]


@pytest.mark.parametrize("backend", fastbn.get_config()["backends"])
def test_info_tells_what_is_used(backend: str) -> None:
    """An instruction set and OpenMP only of the kernels that use them."""
    told = dict(
        line.split(maxsplit=1)
        for line in command("info", FASTBN_BACKEND=backend).stdout.splitlines()
    )
    assert told["backend"] == backend
    assert (told["isa"] == "None", told["openmp"] == "None") == (backend != "cython",) * 2


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("FASTBN_BACKEND", "cuda"),
        ("FASTBN_ISA", "quantum"),
        ("FASTBN_NUM_THREADS", "5000"),
        ("FASTBN_NUM_THREADS", "many"),
    ],
)
def test_a_bad_variable_is_one_line(variable: str, value: str) -> None:
    for arguments in (("info",), ("demo", "--quick")):
        done = command(*arguments, **{variable: value})
        assert (done.returncode, done.stdout) == (2, "")
        (line,) = done.stderr.splitlines()
        assert line.startswith("python -m fastbn: error: environment variable " + variable)
        assert value in line


def test_demo_shows_its_work_and_writes_a_plot(tmp_path: Path) -> None:
    plot = tmp_path / "plot.png"
    done = command("demo", "--quick", "--output", str(plot), COLUMNS="100", NO_COLOR="1")
    assert done.returncode == 0, done.stderr
    assert plot.read_bytes().startswith(PNG)
    assert demo.what_runs() in done.stdout
    for name in fastbn.get_config()["backends"]:
        assert f"fastbn, {demo.backend_label(name)}" in done.stdout
    assert str(plot) in done.stdout


def test_batch_norm_trains_the_network_and_repeats() -> None:
    from rich.progress import Progress

    with Progress(disable=True) as silent:
        first, again = (demo.train_both(demo.load_digits(), 400, silent) for _ in range(2))
    assert first == again
    with_, without = (mean(curve.accuracy[-5:]) for curve in first.values())
    assert with_ > 0.95
    assert without < 0.5


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "required: command"),
        (("demo", "--output", "no/such/folder/plot.png"), "cannot write a file at"),
    ],
)
def test_refusals(arguments: tuple[str, ...], said: str) -> None:
    done = command(*arguments)
    assert done.returncode == 2
    assert said in done.stderr.splitlines()[-1]


def test_demo_names_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo, "EXTRA", ("numpy", "no_such_package"))
    with pytest.raises(SystemExit, match=r'no_such_package; .* install "fastbn\[demo\]"'):
        demo.run(tmp_path / "plot.png")
