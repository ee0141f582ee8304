"""Second derivatives: against derivatives of the printed backward, the formulas in extended
precision, and PyTorch where it is installed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastbn
from oracle import formulas
from oracle.arrays import (
    DTYPES,
    HALVES,
    LAYOUTS,
    Array,
    channel_axis,
    channels_of,
    limits,
    rows,
    to_layout,
    vector,
    wide,
)
from oracle.bounds import bound_double_backward, double_backward_terms
from oracle.formulas import DoubleBackwardProblem, SecondDerivatives
from support.bits import assert_same_bits, of_channels
from support.judge import Judged, assert_within, derivative
from support.memory import FORMS, dense_in_its_order
from support.pairs import paired
from support.strategies import recipes
from support.variants import each_backend

ALL = (*DTYPES, *HALVES)
GRADIENTS = ("ddx", "ddgamma", "ddbeta")
CHOICES = [
    tuple(name for i, name in enumerate(GRADIENTS) if chosen >> i & 1) for chosen in range(1, 8)
]
"""Which of the three are given."""


@dataclass(frozen=True)
class Case:
    """The arguments of both functions."""

    ddx: Array | None
    ddgamma: Array | None
    ddbeta: Array | None
    dy: Array
    x: Array
    mean: Array
    var: Array
    gamma: Array | None
    eps: float = 1e-5
    layout: str = "NCHW"

    @staticmethod
    def of(x: Array, *, dy: Array | None = None, seed: int = 0, **fixed: Any) -> Case:
        """A case of an x and what is fixed; all else is of an ordinary size."""
        rng = np.random.default_rng(seed)
        layout = fixed.get("layout", "NCHW")
        channels, dtype = channels_of(x, layout), np.dtype(x.dtype.type)
        ddx, other = rng.normal(0.5, 1, (2, *x.shape)).astype(dtype)
        ddgamma, ddbeta, gamma = rng.normal(size=(3, channels))
        mean, var = fastbn.moments(x, layout=layout)
        dy = other if dy is None else dy
        made = {"ddx": ddx, "ddgamma": ddgamma, "ddbeta": ddbeta, "gamma": gamma}
        return Case(**(made | {"dy": dy, "x": x, "mean": mean, "var": var} | fixed))

    def only(self, chosen: tuple[str, ...]) -> Case:
        """The same with some of the three gradients alone."""
        absent: dict[str, Any] = {name: None for name in GRADIENTS if name not in chosen}
        return replace(self, **absent)

    def call(self, frozen: bool) -> fastbn.SecondGradients:
        """What the library gives."""
        verb = fastbn.normalize_double_backward if frozen else fastbn.batch_norm_double_backward
        given = self.ddx, self.ddgamma, self.ddbeta, self.dy, self.x, self.mean, self.var
        return verb(*given, self.gamma, eps=self.eps, layout=self.layout)

    def problem(self, frozen: bool) -> DoubleBackwardProblem:
        """The same as the oracle takes it."""
        channels = len(self.mean)
        ddx = None if self.ddx is None else wide(self.ddx, self.layout)
        ddgamma, ddbeta = (
            None if a is None else vector(a, 0, channels) for a in (self.ddgamma, self.ddbeta)
        )
        dy, x = (wide(a, self.layout) for a in (self.dy, self.x))
        mean, var, gamma = (vector(a, 1, channels) for a in (self.mean, self.var, self.gamma))
        return DoubleBackwardProblem(
            ddx, ddgamma, ddbeta, dy, x, mean, var, gamma, self.eps, frozen
        )

    def judged(self, frozen: bool, exact: SecondDerivatives | None = None) -> list[Judged]:
        """What the library gives, beside what it should, and how far it may be off."""
        got, p = self.call(frozen), self.problem(frozen)
        dtype = np.dtype(self.x.dtype.type)
        of_gamma = np.dtype(dtype if dtype.itemsize > 2 else np.float32)
        if self.gamma is not None:
            of_gamma = np.dtype(self.gamma.dtype.type)
        assert (got.ddy.dtype, got.dx.dtype, got.dgamma.dtype) == (dtype, dtype, of_gamma)
        found = rows(got.ddy, self.layout), rows(got.dx, self.layout), got.dgamma
        exact = formulas.double_backward(p) if exact is None else exact
        bounds = bound_double_backward(dtype, of_gamma, p)
        return list(map(Judged, found, exact, bounds, got._fields))

    def check(self) -> None:
        """Everything both functions give is within its bound, where its terms fit its type."""
        for frozen in (False, True):
            terms = double_backward_terms(self.problem(frozen))
            for (*arrays, name), sizes in zip(self.judged(frozen), terms, strict=True):
                fits = sizes < float(limits(arrays[0].dtype).max) / 2
                actual, expected, bound = (a[fits] for a in arrays)
                assert_within(actual, expected, bound, name)


def differentiated(case: Case, frozen: bool) -> SecondDerivatives:
    """Complex-step derivatives of the printed backward's part in the loss."""
    fixed = (case.mean, case.var) if frozen else None

    def loss(dy: Array, x: Array, gamma: Array) -> complex:
        results = formulas.textbook_backward(dy, x, gamma, case.eps, case.layout, fixed)
        by = case.ddx, case.ddgamma, case.ddbeta
        pairs = zip(by, results, strict=True)
        return complex(sum((a * b).sum() for a, b in pairs if a is not None))

    dy, x = (a.astype(np.float64) for a in (case.dy, case.x))
    gamma = vector(case.gamma, 1, len(case.mean)).astype(np.float64)
    ddy = derivative(lambda dy: loss(dy, x, gamma), dy)
    dx = derivative(lambda x: loss(dy, x, gamma), x)
    dgamma = derivative(lambda gamma: loss(dy, x, gamma), gamma)
    return SecondDerivatives(wide(ddy, case.layout), wide(dx, case.layout), vector(dgamma, 0, 0))


@pytest.mark.usefixtures("variant")
@paired(chosen=CHOICES, with_gamma=[True, False], layout=LAYOUTS, dtype=DTYPES)
def test_they_are_the_derivatives(
    dtype: Any, layout: str, with_gamma: bool, chosen: tuple[str, ...]
) -> None:
    """ddy, dx and dgamma are the derivatives of the loss, through the statistics and without."""
    x = to_layout(np.random.default_rng(1).normal(1.5, 2, (3, 3, 2, 2)), layout).astype(dtype)
    fixed: dict[str, Any] = {"layout": layout, "eps": 0.125}
    if not with_gamma:
        fixed["gamma"] = None
    case = Case.of(x, **fixed).only(chosen)
    for frozen in (False, True):
        for judged in case.judged(frozen, differentiated(case, frozen)):
            assert_within(*judged)


@pytest.mark.usefixtures("variant")
@given(recipes(ALL), st.sampled_from(CHOICES), st.integers(0, 9))
def test_they_are_within_their_bounds(problem: Any, chosen: tuple[str, ...], seed: int) -> None:
    """Any shape, layout, memory form and distribution, against the formulas."""
    p = problem
    Case.of(p.x, dy=p.dy, gamma=p.gamma, seed=seed, **p.options).only(chosen).check()


SHAPES = [(6, 5), (2, 20_003), (4, 3, 5, 7), (9, 24, 15, 31), (3, 2, 2, 3, 5)]
"""The second has so many channels that they are worked on in parts."""


@pytest.mark.slow
@each_backend
@paired(shape=SHAPES, dtype=ALL, layout=LAYOUTS)
def test_larger_arrays(shape: tuple[int, ...], dtype: Any, layout: str) -> None:
    """They are within their bounds, and have the same bits by several threads."""
    x = to_layout(np.random.default_rng(0).normal(-100, 2, shape), layout).astype(dtype)
    case = Case.of(x, layout=layout)
    case.check()
    for frozen in (False, True):
        found = []
        for threads in (1, 3):
            with fastbn.use_num_threads(threads):
                found.append(case.call(frozen)._asdict())
        assert_same_bits(found[1], found[0])


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("of_others", [0.0, 1e6])
@pytest.mark.parametrize(("dtype", "ratio"), [(np.float32, 1e6), (np.float64, 1e12)])
def test_large_means(dtype: Any, ratio: float, of_others: float) -> None:
    """x, dy and ddx with means of up to a million deviations, and more in float64."""
    rng = np.random.default_rng(2)
    noise = rng.normal(size=(3, 16, 4, 9, 9))
    x, dy, ddx = noise + np.array([ratio, of_others, -of_others])[:, None, None, None, None]
    case = Case.of(x.astype(dtype), dy=dy.astype(dtype), ddx=ddx.astype(dtype))
    case.check()
    case.only(("ddx",)).check()


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("deviation", [1e-12, 1e12])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scales(dtype: Any, deviation: float) -> None:
    """Deviations of which the square of the reciprocal is far from 1, without eps."""
    rng = np.random.default_rng(3)
    x = (deviation * rng.normal(2, 1, (8, 5, 3, 4))).astype(dtype)
    Case.of(x, eps=0.0).check()


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_where_nothing_varies(layout: str) -> None:
    """Where var + eps is 0, ddy is ddbeta, and dx and dgamma are 0."""
    x = to_layout(np.full((4, 3, 5), 7.0), layout)
    case = Case.of(x, eps=0.0, layout=layout)
    for frozen in (False, True):
        got = case.call(frozen)
        assert (np.moveaxis(got.ddy, channel_axis(3, layout), -1) == case.ddbeta).all()
        assert not got.dx.any()
        assert not got.dgamma.any()


@each_backend
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("place", ["ddx", "dy", "x", "gamma", "ddgamma", "ddbeta", "mean", "var"])
def test_what_is_not_finite_stays_in_its_channel(place: str, value: float) -> None:
    """The results of other channels keep their bits, and nothing warns."""
    case = Case.of(np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32))
    changed: dict[str, Any] = {place: getattr(case, place).copy()}
    changed[place][..., 1] = value
    for frozen in (False, True):
        if frozen and place == "var" and np.isnan(value):
            continue  # refused
        cases = case, replace(case, **changed)
        left, right = (
            of_channels(c.call(frozen)._asdict(), np.array([True, False, True]), "NCHW")
            for c in cases
        )
        assert_same_bits(left, right)


@each_backend
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str, layout: str) -> None:
    """Arrays in any memory have the bits of dense ones, are not changed, and not given back;
    results lie as x does."""
    x = np.random.default_rng(0).normal(size=(3, 6, 5, 4))
    make = FORMS[form]
    case = Case.of(make(x), layout=layout)
    twin = replace(case, x=dense_in_its_order(case.x))
    arrays: dict[str, Any] = {name: make(getattr(case, name)) for name in ("ddx", "dy")}
    before = {name: a.tobytes() for name, a in arrays.items()}
    for frozen in (False, True):
        got, expected = replace(case, **arrays).call(frozen), twin.call(frozen)
        assert_same_bits(got._asdict(), expected._asdict())
        assert got.ddy.strides == got.dx.strides == twin.x.strides
        for result in got:
            assert result.flags.writeable
            assert not any(np.may_share_memory(result, a) for a in (case.x, *arrays.values()))
    assert {name: a.tobytes() for name, a in arrays.items()} == before


@each_backend
@pytest.mark.parametrize("given_dtype", [None, *DTYPES])
@pytest.mark.parametrize("dtype", ALL)
def test_vectors_of_either_type(dtype: Any, given_dtype: Any) -> None:
    """dgamma is of gamma's type or, without gamma, of x's; float32 beside half types. Zeros too."""
    x = np.random.default_rng(0).normal(size=(4, 3, 5)).astype(dtype)
    swapped = None if given_dtype is None else np.ones(3, np.dtype(given_dtype).newbyteorder("S"))
    case = Case.of(x, gamma=swapped, ddgamma=np.ones(3, given_dtype or "f8"))
    case.check()
    case.only(("ddgamma",)).check()


@each_backend
@pytest.mark.no_kernel
@pytest.mark.parametrize("chosen", CHOICES, ids=" ".join)
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 3, 0)], ids=str)
def test_empty(shape: tuple[int, ...], chosen: tuple[str, ...]) -> None:
    """Empty arrays, and zeros."""
    case = Case.of(np.zeros(shape, np.float32), mean=np.zeros(3), var=np.ones(3)).only(chosen)
    for frozen in (False, True):
        ddy, dx, dgamma = case.call(frozen)
        assert ddy.shape == dx.shape == shape
        assert ddy.dtype == dx.dtype == np.float32
        np.testing.assert_array_equal(dgamma, np.zeros(3), strict=True)


@pytest.mark.usefixtures("variant")
def test_an_activation_apart() -> None:
    """What the error about an activation advises gives the derivatives away from its kinks."""
    slope, layout = 0.25, "NCHW"
    case = Case.of(np.random.default_rng(4).normal(1.5, 2, (3, 3, 2, 2)), eps=0.125)
    y = fastbn.batch_norm(case.x, case.gamma, eps=case.eps).y
    slopes = np.where(y > 0, 1, slope)
    apart = replace(case, dy=case.dy * slopes)

    def loss(dy: Array, x: Array) -> complex:
        through = dy * slopes
        dx, dgamma, dbeta = formulas.textbook_backward(through, x, case.gamma, 0.125, layout, None)  # type: ignore[arg-type]
        pairs = ((case.ddx, dx), (case.ddgamma, dgamma), (case.ddbeta, dbeta))
        return complex(sum((a * b).sum() for a, b in pairs))

    bounds = bound_double_backward(np.float64, np.float64, apart.problem(False))
    got = apart.call(False)
    ddy = derivative(lambda dy: loss(dy, case.x), case.dy)
    dx = derivative(lambda x: loss(case.dy, x), case.x)
    assert_within(rows(got.ddy * slopes, layout), wide(ddy, layout), bounds.ddy, "ddy")
    assert_within(rows(got.dx, layout), wide(dx, layout), bounds.dx, "dx")


def through_torch(torch: Any, case: Case, frozen: bool) -> SecondDerivatives:
    """Differentiated twice by autograd."""
    arrays = case.dy, case.x, case.gamma, np.zeros_like(case.mean)
    dy, x, gamma, beta = (torch.tensor(a, requires_grad=True) for a in arrays)
    statistics = (torch.tensor(a) for a in (case.mean, case.var)) if frozen else (None, None)
    y = torch.nn.functional.batch_norm(
        x, *statistics, gamma, beta, training=not frozen, eps=case.eps
    )
    backward = torch.autograd.grad(y, (x, gamma, beta), dy, create_graph=True)
    by = [torch.tensor(a) for a in (case.ddx, case.ddgamma, case.ddbeta)]
    results = torch.autograd.grad(backward, (dy, x, gamma), by)
    ddy, dx, dgamma = (np.asarray(tensor) for tensor in results)
    return SecondDerivatives(wide(ddy, "NCHW"), wide(dx, "NCHW"), vector(dgamma, 0, 0))


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("rank", [2, 3, 4])
@pytest.mark.parametrize("frozen", [False, True])
def test_pytorch_number_for_number(torch: Any, frozen: bool, rank: int) -> None:
    """By autograd in float64, whose statistics lose as many digits as ours may."""
    case = Case.of(np.random.default_rng(rank).normal(1, 2, (7, 5, 6, 3)[:rank]))
    for judged in case.judged(frozen, through_torch(torch, case, frozen)):
        assert_within(*judged)
