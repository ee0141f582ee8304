"""Two runs against each other: where fastbn has become slower beyond the spread."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.cells import Cell
from benchmarks.libraries import LIBRARIES
from benchmarks.results import Outcome, Run


@dataclass(frozen=True)
class Change:
    """One library at one cell, in both runs."""

    cell: Cell
    library: str
    old: Outcome
    new: Outcome

    @property
    def factor(self) -> float:
        """How many times the old time the new one is."""
        return self.new.median / self.old.median

    def is_regression(self, threshold: float) -> bool:
        """Slower by more than the threshold, and the middle halves of the samples lie apart."""
        return self.factor > 1 + threshold and self.new.q1 > self.old.q3


def changes(old: Run, new: Run) -> list[Change]:
    """What both runs timed of fastbn."""
    found = []
    for m in new.measured:
        before = old.at(m.cell)
        for name, outcome in m.outcomes.items():
            earlier = before.outcomes.get(name) if before else None
            if not LIBRARIES[name].is_fastbn or earlier is None:
                continue
            if earlier.status == outcome.status == "timed":
                found.append(Change(m.cell, name, earlier, outcome))
    return found


def regressions(old: Run, new: Run, threshold: float) -> list[Change]:
    """The regressions, the worst first."""
    slower = [change for change in changes(old, new) if change.is_regression(threshold)]
    return sorted(slower, key=lambda change: -change.factor)


def broken(old: Run, new: Run) -> list[tuple[Cell, str, Outcome]]:
    """What fastbn could do in the old run and no longer can."""
    found = []
    for m in new.measured:
        before = old.at(m.cell)
        for name, outcome in m.outcomes.items():
            was = before.outcomes.get(name) if before else None
            timed = was is not None and was.status == "timed"
            if timed and outcome.status != "timed" and LIBRARIES[name].is_fastbn:
                found.append((m.cell, name, outcome))
    return found
