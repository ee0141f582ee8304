"""Combinations of options, of which any two values of two options meet: where two things together
go wrong that are right by themselves, all combinations would say no more."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product
from typing import Any

Row = list[int | None]


def pairs(*options: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Rows of a value for each of the options, made one after the other: each begins with a pair
    that is missing, and takes what other values bring the most missing ones."""
    places = [range(len(values)) for values in options]
    missing = {
        ((i, a), (j, b))
        for (i, first), (j, second) in combinations(enumerate(places), 2)
        for a, b in product(first, second)
    }
    rows: list[tuple[Any, ...]] = []
    while missing:
        row: Row = [None] * len(options)
        for option, value in min(missing):
            row[option] = value
        for option, values in enumerate(places):
            if row[option] is None:
                row[option] = max(values, key=lambda v, o=option: _brings(row, o, v, missing))
        missing -= set(combinations(enumerate(row), 2))
        rows.append(tuple(values[i] for values, i in zip(options, row, strict=True)))
    return rows


def _brings(row: Row, option: int, value: int, missing: set[Any]) -> int:
    """How many missing pairs a value makes with the row's others."""
    others = [(i, v) for i, v in enumerate(row) if v is not None]
    return sum(tuple(sorted([other, (option, value)])) in missing for other in others)
