"""How many instructions passes take for sixteen values, by valgrind's callgrind.

One process under valgrind makes the calls; before and after those of a pass it has callgrind write
down what it has counted since. As in a budget, the pass on two values of each channel is taken off:
what is left are the loops. Valgrind knows no AVX-512: counted are the AVX2 kernels, by one
thread.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import fastbn
from benchmarks.cells import Cell
from benchmarks.data import Data
from benchmarks.rounds import ROOT

VALUES, CALLS = 1 << 22, 300
"""In calls that are counted together, and so many of them at most: beside them what writing down
takes is little."""
COUNTED = {"FASTBN_ISA": "avx2", "FASTBN_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


def of_passes(cells: Sequence[Cell]) -> list[dict[str, float]]:
    """By cell, those of each pass; nothing where there is no valgrind."""
    if shutil.which("valgrind") is None:
        return [{} for _ in cells]
    with tempfile.TemporaryDirectory() as folder:
        tool = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={folder}/counts"]
        given = json.dumps([cell.to_json() for cell in cells])
        done = subprocess.run(
            [*tool, sys.executable, "-m", __name__, folder],
            cwd=ROOT,
            env=os.environ | COUNTED,
            input=given,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    found: list[dict[str, float]] = json.loads(done.stdout)
    return found


def main() -> None:
    from benchmarks.budget import few_values, passes

    fastbn.set_backend("cython")
    folder, found = Path(sys.argv[1]), []
    for fields in json.load(sys.stdin):
        cell = replace(Cell.from_json(fields), threads=1)  # others would be counted as they wait
        few = few_values(cell, cell.channels)
        values = math.prod(cell.shape)
        times, sixteens = min(max(VALUES // values, 1), CALLS), values / 16
        of_cell, of_few = (
            {name: counted(call, times, folder) for name, call in passes(c, Data(c)).items()}
            for c in (cell, few)
        )
        found.append({name: (of_cell[name] - of_few[name]) / sixteens for name in of_cell})
    print(json.dumps(found))


def counted(call: Callable[[], Any], times: int, folder: Path) -> float:
    """Instructions of a call: what an interval with calls has more than one without."""
    call()
    dump()
    dump()
    for _ in range(times):
        call()
    dump()
    without, with_calls = totals(folder)[-2:]
    return (with_calls - without) / times


def dump() -> None:
    """Have callgrind write down what it has counted, and begin anew."""
    control = ["callgrind_control", "--dump", str(os.getpid())]
    subprocess.run(control, check=True, stdout=subprocess.DEVNULL)


def totals(folder: Path) -> list[int]:
    """What was written down, in order."""
    files = sorted(folder.glob("counts.*"), key=lambda path: int(path.suffix[1:]))
    found = (re.findall(r"^totals: (\d+)", path.read_text(), re.MULTILINE) for path in files)
    return [int(total) for (total,) in found]


if __name__ == "__main__":
    main()
