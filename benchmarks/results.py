"""What a run found, as it is kept in JSON, and the figures that follow from it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import quantiles
from typing import Any, NamedTuple

from benchmarks.cells import Cell
from benchmarks.libraries import BEST_COPY, LIBRARIES, OURS
from benchmarks.machine import Machine

FORMAT = 2
DIGITS = 4
"""Of a time: noise begins before."""
DISTURBED = 0.5
"""A middle half of the samples this wide, in medians: the machine had something else to do."""


@dataclass(frozen=True)
class Outcome:
    """What became of one library at one cell."""

    status: str
    """timed; or wrong, failed, died, left out: then the note says more."""
    note: str = ""
    median: float = 0.0
    """Seconds a call; as are the quartiles."""
    q1: float = 0.0
    q3: float = 0.0
    samples: int = 0

    @property
    def is_disturbed(self) -> bool:
        """Whether its samples lie too far apart."""
        return self.status == "timed" and self.q3 - self.q1 > DISTURBED * self.median

    @classmethod
    def of(cls, seconds: Sequence[float], note: str = "") -> Outcome:
        several = [*seconds, *seconds[:1]] if len(seconds) == 1 else seconds
        q1, middle, q3 = map(rounded, quantiles(several, method="inclusive"))
        return cls("timed", note, middle, q1, q3, len(seconds))

    def to_json(self) -> list[Any]:
        """Median and quartiles in us, samples and note; or the status of what was not timed."""
        if self.status != "timed":
            return [self.status, self.note]
        times = map(microseconds, (self.median, self.q1, self.q3))
        return [*times, self.samples, *([self.note] if self.note else [])]

    @classmethod
    def from_json(cls, fields: list[Any]) -> Outcome:
        if isinstance(fields[0], str):
            return cls(*fields)
        median, q1, q3 = (float(f"{value}e-6") for value in fields[:3])
        samples, note, *_ = *fields[3:], ""
        return cls("timed", note, median, q1, q3, samples)


def rounded(seconds: float) -> float:
    return float(f"{seconds:.{DIGITS}g}")


def microseconds(seconds: float) -> float:
    """As short as may be written, and exact for what is rounded."""
    value = float(f"{seconds * 1e6:.{DIGITS}g}")
    return int(value) if value.is_integer() else value


@dataclass(frozen=True)
class Measured:
    """One cell, and what became of each library that has something for it."""

    cell: Cell
    outcomes: dict[str, Outcome]

    def seconds(self, library: str) -> float | None:
        outcome = self.outcomes.get(library)
        return outcome.median if outcome and outcome.status == "timed" else None

    @property
    def ours(self) -> float | None:
        return self.seconds(OURS)

    @property
    def best_peer(self) -> tuple[str, float] | None:
        """The fastest peer and its time."""
        peers = {
            name: seconds
            for name in self.outcomes
            if LIBRARIES[name].kind == "peer" and (seconds := self.seconds(name))
        }
        return min(peers.items(), key=lambda peer: peer[1]) if peers else None

    @property
    def is_disturbed(self) -> bool:
        """Whether any library's samples lie too far apart."""
        return any(outcome.is_disturbed for outcome in self.outcomes.values())

    @property
    def best_copy(self) -> float | None:
        """The time of the faster kind of copy of the same bytes."""
        return min(filter(None, map(self.seconds, BEST_COPY)), default=None)

    def ratio(self, slower: str, faster: str = OURS) -> float | None:
        """How many times the one library's time is the other's."""
        above, below = self.seconds(slower), self.seconds(faster)
        return above / below if above and below else None

    @property
    def against_peer(self) -> float | None:
        """How many times as fast as the best peer fastbn is: 1 is level, less is a loss."""
        return self.best_peer[1] / self.ours if self.best_peer and self.ours else None

    def copies(self, library: str = OURS) -> float | None:
        """A time in copies of the same bytes."""
        seconds, copy = self.seconds(library), self.best_copy
        return seconds / copy if seconds and copy else None


class Judged(NamedTuple):
    """One cell with hard data: what became of each library, and its errors."""

    case: str
    measured: Measured
    units: dict[str, dict[str, float]]
    """By library and result, the largest error in units of its bound."""


@dataclass(frozen=True)
class Run:
    """Everything that one run found."""

    machine: Machine
    date: str
    versions: dict[str, str]
    missing: dict[str, str]
    """Libraries that are not here, and why."""
    import_seconds: float | None
    """Of ``import fastbn`` after ``import numpy``."""
    measured: list[Measured]
    rounds: int
    _by_cell: dict[Cell, Measured] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_cell", {m.cell: m for m in self.measured})

    def at(self, cell: Cell) -> Measured | None:
        return self._by_cell.get(cell)

    @property
    def compared(self) -> list[Measured]:
        """All cells but the series, which is for the plot alone."""
        return [m for m in self.measured if not m.cell.in_series]

    @property
    def lost(self) -> list[Measured]:
        """The cells where a peer is faster, the worst first."""
        ratios = [(m.against_peer, m) for m in self.compared]
        losing = [(ratio, m) for ratio, m in ratios if ratio is not None and ratio < 1]
        return [m for _, m in sorted(losing, key=lambda pair: pair[0])]

    def renewed(self, later: Run) -> Run:
        """This run with the cells that a later one measured again."""
        measured = [later.at(m.cell) or m for m in self.measured]
        return replace(self, measured=measured, date=later.date)

    def libraries(self, among: Iterable[Measured] | None = None) -> list[str]:
        """The libraries with an outcome, in the order of the tables."""
        seen = {name for m in (self.measured if among is None else among) for name in m.outcomes}
        return [name for name in LIBRARIES if name in seen]

    def save(self, path: Path) -> None:
        """A line for each cell, so that a run of all of them is small."""
        fields = {
            "format": FORMAT,
            "date": self.date,
            "machine": asdict(self.machine),
            "versions": self.versions,
            "missing": self.missing,
            "import_seconds": self.import_seconds,
            "rounds": self.rounds,
        }
        compact = json.JSONEncoder(separators=(",", ":")).encode
        head = ",\n".join(f"{compact(key)}:{compact(value)}" for key, value in fields.items())
        cells = ",\n".join(
            compact([m.cell.name, {name: o.to_json() for name, o in m.outcomes.items()}])
            for m in self.measured
        )
        path.write_text("{" + head + ',\n"cells":[\n' + cells + "\n]}\n")

    @classmethod
    def load(cls, path: Path) -> Run:
        """Read what `save` wrote; ValueError where it is something else."""
        try:
            fields: dict[str, Any] = json.loads(path.read_text())
            if fields["format"] != FORMAT:
                raise ValueError(f"format {fields['format']}, expected {FORMAT}")
            measured = [
                Measured(Cell.from_name(name), {k: Outcome.from_json(o) for k, o in entry.items()})
                for name, entry in fields["cells"]
            ]
            kept = ("date", "versions", "missing", "import_seconds", "rounds")
            known = {key: fields[key] for key in kept}
            return cls(machine=Machine(**fields["machine"]), measured=measured, **known)
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} holds no results of this benchmark: {error}") from error
