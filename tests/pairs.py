"""Combinations of options, of which any two values of two options meet: where two things together
go wrong that are right by themselves, all combinations would say no more."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import combinations, product
from typing import Any

Row = dict[int, int]
"""The place of a value among those of each option."""


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
        row = dict(min(missing))
        for option, values in enumerate(places):
            if option not in row:
                row[option] = max(values, key=partial(_brings, missing, row, option))
        chosen = sorted(row.items())
        missing -= set(combinations(chosen, 2))
        rows.append(tuple(options[option][value] for option, value in chosen))
    return rows


def _brings(missing: set[Any], row: Row, option: int, value: int) -> int:
    """How many missing pairs a value makes with the row's others."""
    return sum(tuple(sorted([other, (option, value)])) in missing for other in row.items())
