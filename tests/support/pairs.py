"""Combinations of options, of which any two values of two options meet: where two things together
go wrong that are right by themselves, all combinations would say no more."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import combinations, product
from typing import Any

import pytest

Row = dict[int, int]
"""The place of a value among those of each option."""


def paired(**options: Iterable[Any]) -> pytest.MarkDecorator:
    """Parameters of a test, by name: rows of a value for each, made one after the other. Each row
    begins with a pair that is missing, and takes what other values bring the most missing ones."""
    values = [list(of) for of in options.values()]
    places = [range(len(of)) for of in values]
    missing = {
        ((i, a), (j, b))
        for (i, first), (j, second) in combinations(enumerate(places), 2)
        for a, b in product(first, second)
    }
    rows: list[tuple[Any, ...]] = []
    while missing:
        row = dict(min(missing))
        for option, some in enumerate(places):
            if option not in row:
                row[option] = max(some, key=partial(_brings, missing, row, option))
        chosen = sorted(row.items())
        missing -= set(combinations(chosen, 2))
        rows.append(tuple(values[option][place] for option, place in chosen))
    return pytest.mark.parametrize(tuple(options), rows, ids=_word)


def _brings(missing: set[Any], row: Row, option: int, place: int) -> int:
    """How many missing pairs a value makes with the row's others."""
    return sum(tuple(sorted([other, (option, place)])) in missing for other in row.items())


def _word(value: Any) -> str | None:
    """What pytest has no word for."""
    return str(value) if isinstance(value, tuple) else None
