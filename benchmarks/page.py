"""``python -m benchmarks page``: docs/performance.md from the results that are committed.

The page is written by hand but for its tables and the sentences with figures. Each of these follows
a comment with the name of the function in `parts.py` that makes it, and ends at an empty line.
Sections whose cells the results lack are only their comments.
"""

from __future__ import annotations

import argparse
import re
import sys
from hashlib import sha256
from pathlib import Path

from benchmarks import plots
from benchmarks.cells import WORKS
from benchmarks.cli import saved
from benchmarks.parts import PARTS
from benchmarks.results import Run

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "run.json"
PAGE = ROOT / "docs" / "performance.md"
PICTURES = ROOT / "docs" / "performance"
PART = re.compile(r"^<!-- (\w+) -->\n(?:.+\n)*", re.MULTILINE)
COMMAND = "python -m benchmarks page"


def main() -> None:
    arguments = parse()
    if arguments.check:
        sys.exit("\n".join(stale()) or 0)
    if arguments.results:
        RESULTS.parent.mkdir(exist_ok=True)
        arguments.results.save(RESULTS)
    write()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument(
        "--results",
        type=saved,
        metavar="FILE.json",
        help="the results.json of a run, to become the committed one",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing: exit code 1 if the page or a picture is not what the results give",
    )
    return parser.parse_args(sys.argv[2:])


def write() -> None:
    run = Run.load(RESULTS)
    PAGE.write_text(filled(PAGE.read_text(), run))
    for picture in PICTURES.glob("*.png"):
        picture.unlink()
    plots.draw_all(run, PICTURES, WORKS, origin())


def stale() -> list[str]:
    """What is not what the committed results give: none where all is well."""
    text = PAGE.read_text()
    found = []
    if text != filled(text, Run.load(RESULTS)):
        found.append(f"{PAGE.name} is not what {RESULTS.name} gives; run: {COMMAND}")
    wanted, there = linked(text), {path.name for path in PICTURES.glob("*.png")}
    for name in sorted(wanted | there):
        if name not in there:
            found.append(f"{PAGE.name} shows {name}, which is not there")
        elif name not in wanted:
            found.append(f"{PAGE.name} does not show {name}")
        elif origin().encode() not in (PICTURES / name).read_bytes():
            found.append(f"{name} is of other results; run: {COMMAND}")
    return found


def filled(text: str, run: Run) -> str:
    """The page with every part as the run gives it; ValueError where the parts do not fit."""
    names = [match[1] for match in PART.finditer(text)]
    if sorted(names) != sorted(PARTS):
        raise ValueError(f"parts of the page: {sorted(names)}, expected: {sorted(PARTS)}")
    return PART.sub(lambda match: lines(match[1], run), text)


def lines(name: str, run: Run) -> str:
    """A part below its comment; some runs have nothing for some parts."""
    part = PARTS[name](run)
    return f"<!-- {name} -->\n" + (f"{part}\n" if part else "")


def linked(text: str) -> set[str]:
    """The files of the pictures in the page."""
    return set(re.findall(rf"!\[[^]]*\]\({PICTURES.name}/([^)]*)\)", text))


def origin() -> str:
    """What a picture carries inside, to tell of which results it is."""
    return f"results {sha256(RESULTS.read_bytes()).hexdigest()[:16]}"
