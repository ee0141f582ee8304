"""Planted faults: whether the tests catch what `planted.toml` breaks, one fault at a time.

    PYTHONPATH=tests python -m support.planted
    PYTHONPATH=tests python -m support.planted --fault rows-tail-of-a-sum --fault memory-order

Each fault goes into a copy of the tree. Where it is in the kernels, those of the best instruction
set are built there. The fast selection of the tests runs until the first failure and, where it
finds nothing, all of them do.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
KERNELS = "fastbn/_ext"
BUILT = {"FASTBN_BUILD_ISA": "native"}
"""The variable by which `setup.py` builds for the best instruction set alone."""
LAST = ("masks", "frozen", "double_backward", "layouts", "hard_data", "same_bits")
"""The tests that take longest, by their files' names."""
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info")
FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+?\[.*?\]|\S+)(?: - |$)", re.MULTILINE)


class Fault(NamedTuple):
    """A text that stands once in a file, and what it becomes."""

    file: str
    old: str
    new: str
    breaks: str

    def plant(self, tree: Path) -> None:
        """Into a copy of the tree."""
        path = tree / self.file
        text = path.read_text()
        if text.count(self.old) != 1:
            raise SystemExit(f"{self.file} has {self.old!r} {text.count(self.old)} times, not once")
        path.write_text(text.replace(self.old, self.new))


FAULTS = {
    name: Fault(**fields)
    for name, fields in tomllib.loads(Path(__file__).with_suffix(".toml").read_text()).items()
}


def run(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in a tree that is its own library."""
    environment = os.environ | BUILT | {"PYTHONPATH": str(tree)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)


def build(tree: Path) -> None:
    """The kernels anew, and no others beside them."""
    for library in (tree / KERNELS).glob("kernels_*.so"):
        library.unlink()
    done = run(tree, "setup.py", "build_ext", "--inplace")
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)


def in_turn(tree: Path) -> list[str]:
    """The files of tests, those that take longest at the end; not the one that looks for the texts
    of faults, which have become others."""
    last = [tree / "tests" / f"test_{name}.py" for name in LAST]
    first = sorted({*(tree / "tests").glob("test_*.py")} - {*last, tree / "tests/test_planted.py"})
    return [str(path) for path in (*first, *last)]


def caught(tree: Path, *options: str) -> str | None:
    """The first test that fails, if any does."""
    done = run(tree, "-m", "pytest", "-x", "-q", *options, *in_turn(tree))
    if done.returncode == 0:
        return None
    found = FAILED.search(done.stdout)
    return found[1] if found else (done.stdout + done.stderr)[-2000:]


def judge(name: str) -> bool:
    """Whether the tests catch a fault; tells which, and how soon."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=LEFT_OUT)
        fault = FAULTS[name]
        fault.plant(tree)
        if fault.file.startswith(KERNELS):
            build(tree)
        for selection, options in (("fast", ["--fast"]), ("all", [])):
            start = time.monotonic()
            test = caught(tree, *options)
            spent = time.monotonic() - start
            if test is not None:
                print(f"{name}: {selection}, {spent:.0f} s: {test}", flush=True)
                return True
    print(f"{name}: MISSED. {fault.breaks}", flush=True)
    return False


def main() -> int:
    parser = argparse.ArgumentParser(prog="support.planted", description=__doc__.splitlines()[0])
    parser.add_argument("--fault", choices=FAULTS, action="append", help="all without")
    names = parser.parse_args().fault or list(FAULTS)
    missed = [name for name in names if not judge(name)]
    print(f"{len(names) - len(missed)} of {len(names)} caught", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
