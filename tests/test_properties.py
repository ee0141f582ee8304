"""What must hold for any batch: properties and metamorphic relations, by Hypothesis.

Two results that are each within a bound of the same exact value differ by the sum of the bounds:
that is every tolerance here.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

import fastbn
from oracle import bounds, formulas
from oracle.arrays import Array, Wide, rows, vector, wide
from oracle.bounds import bound_dbeta, bound_dgamma, bound_dx, bound_mean, bound_var, bound_y
from oracle.formulas import WideGradients
from support.bits import assert_same_bits, run_all
from support.judge import assert_within, check_everything
from support.strategies import Problem, problems, recipes, whole_numbers

pytestmark = pytest.mark.usefixtures("variant")


class Exact:
    """The exact forward results of a problem and their bounds, as rows."""

    def __init__(self, p: Problem) -> None:
        self.x = wide(p.x, p.layout)
        self.gamma, self.beta = vector(p.gamma, 1, p.channels), vector(p.beta, 0, p.channels)
        self.mean, self.var = formulas.moments(self.x)
        self.y = formulas.normalize(self.x, self.mean, self.var, self.gamma, self.beta, p.eps)
        dtype = p.x.dtype.type
        self.mean_bound = bound_mean(self.mean, self.var, p.eps)
        self.var_bound = bound_var(self.var)
        self.y_bound = bound_y(dtype, self.y, self.mean, self.var, self.gamma, self.beta, p.eps)
        self.rstd = formulas.rstd_of(self.var, p.eps)

    def gradients(self, p: Problem, dy: Array) -> tuple[WideGradients, Wide]:
        """The exact gradients for `dy`, and the bound of dx."""
        d = wide(dy, p.layout)
        exact = formulas.backward(d, self.x, self.mean, self.var, self.gamma, p.eps, frozen=False)
        bound = bound_dx(
            p.x.dtype.type, exact, d, self.mean, self.var, self.gamma, p.eps, frozen=False
        )
        return exact, bound


def forward(p: Problem, x: Array | None = None) -> fastbn.BatchNormResult:
    return fastbn.batch_norm(p.x if x is None else x, p.gamma, p.beta, **p.options)


def backward(p: Problem, dy: Array | None = None) -> tuple[Array, Array, Array]:
    _, mean, var = fastbn.batch_norm(p.x, **p.options)
    dx, dgamma, dbeta = fastbn.batch_norm_backward(
        p.dy if dy is None else dy, p.x, mean, var, p.gamma, **p.options
    )
    assert dgamma is not None
    assert dbeta is not None
    return dx, dgamma, dbeta


def assert_same_function(p: Problem, other: fastbn.BatchNormResult, y: Array) -> None:
    """`other`, with its y brought into p's order as `y`, is the same function of the same batch."""
    e = Exact(p)
    result = forward(p)
    assert_within(result.mean, other.mean.astype(e.x.dtype), 2 * e.mean_bound, "mean")
    assert_within(result.var, other.var.astype(e.x.dtype), 2 * e.var_bound, "var")
    assert_within(rows(result.y, p.layout), wide(y, p.layout), 2 * e.y_bound, "y")


@given(problems)
def test_every_function_is_within_its_bounds(p: Problem) -> None:
    """Every function, on any problem of the domain, is as right as promised."""
    check_everything(p.x, p.dy, p.gamma, p.beta, eps=p.eps, layout=p.layout)


@given(problems)
def test_zero_mean_and_unit_variance(p: Problem) -> None:
    """Without gamma and beta, y has mean 0 and variance var / (var + eps): 1 for eps = 0."""
    p = Problem(p.x, p.dy, None, None, p.eps, p.layout)
    e = Exact(p)
    mean, var = formulas.moments(wide(forward(p).y, p.layout))
    assert (abs(mean) <= e.y_bound.mean(1)).all()
    wanted = np.sqrt(e.var) * e.rstd
    assert (abs(np.sqrt(var) - wanted) <= e.y_bound.max(1)).all()


@given(recipes())
def test_unit_variance_at_eps_zero(p: Problem) -> None:
    """With eps = 0 the variance of y is 1, but for a channel that has none."""
    scattered = formulas.moments(wide(p.x, p.layout))[1] > 1e-6
    y = fastbn.batch_norm(p.x, eps=0.0, layout=p.layout).y
    _, var = formulas.moments(wide(y, p.layout))
    largest = abs(wide(y, p.layout)).max(1)
    mean, own = formulas.moments(wide(p.x, p.layout))
    k = bounds.factor(p.x.dtype.type, mean, formulas.rstd_of(own, 0.0))
    off = abs(np.sqrt(var) - 1)
    assert (off <= k * (largest + 1))[scattered].all()
    assert (var[own == 0] == 0).all()


@given(problems)
def test_mean_and_variance_of_y_are_set_by_the_parameters(p: Problem) -> None:
    """mean(y) = beta and var(y) = gamma**2 var / (var + eps)."""
    e = Exact(p)
    mean, var = formulas.moments(wide(forward(p).y, p.layout))
    assert (abs(mean - e.beta) <= e.y_bound.mean(1)).all()
    wanted = abs(e.gamma) * np.sqrt(e.var) * e.rstd
    assert (abs(np.sqrt(var) - wanted) <= e.y_bound.max(1)).all()


@given(problems)
def test_identity_recovery(p: Problem) -> None:
    """gamma = sqrt(var + eps) and beta = mean give x back."""
    mean, var = fastbn.moments(p.x, layout=p.layout)
    restoring = Problem(p.x, p.dy, np.sqrt(var + p.eps), mean, p.eps, p.layout)
    y = forward(restoring).y
    assert_within(rows(y, p.layout), wide(p.x, p.layout), Exact(restoring).y_bound, "y")


@given(problems)
def test_layouts_agree(p: Problem) -> None:
    """An array and its transposed twin in the other layout give the same, transposed."""
    if p.layout == "NHWC":
        twin, name, back = np.moveaxis(p.x, -1, 1), "NCHW", (1, -1)
    else:
        twin, name, back = np.moveaxis(p.x, 1, -1), "NHWC", (-1, 1)
    other = fastbn.batch_norm(np.ascontiguousarray(twin), p.gamma, p.beta, eps=p.eps, layout=name)
    assert_same_function(p, other, np.moveaxis(other.y, *back))


@given(problems, st.randoms(use_true_random=False))
def test_order_of_samples_and_places_does_not_matter(p: Problem, random: object) -> None:
    """Permuting samples and spatial places permutes y and leaves the statistics."""
    x, y_back = np.asarray(p.x), []
    for axis in range(x.ndim):
        if axis != p.channel_axis:
            order = np.random.default_rng(axis).permutation(x.shape[axis])
            x = x.take(order, axis)
            y_back.append((axis, np.argsort(order)))
    other = forward(p, x)
    y = other.y
    for axis, order in y_back:
        y = y.take(order, axis)
    assert_same_function(p, other, y)


@given(problems, st.integers(0, 9))
def test_order_of_channels_does_not_matter_to_any_bit(p: Problem, seed: int) -> None:
    """Permuting the channels permutes every result exactly: no channel is treated specially."""
    order = np.random.default_rng(seed).permutation(p.channels)
    x, dy = memory_twin(p.x), memory_twin(p.dy)
    gamma = None if p.gamma is None else p.gamma[order]
    beta = None if p.beta is None else p.beta[order]
    axis = p.channel_axis
    expected = run_all(x, dy, p.gamma, p.beta, **p.options)
    permuted = run_all(x.take(order, axis), dy.take(order, axis), gamma, beta, **p.options)
    for name, value in expected.items():
        expected[name] = value.take(order, axis if value.ndim > 1 else 0)
    assert_same_bits(permuted, expected)


def memory_twin(a: Array) -> Array:
    """A dense copy in C order, the order that `take` leaves."""
    return np.array(a, a.dtype.newbyteorder("="), order="C", subok=False)


@given(problems, st.data())
def test_channels_do_not_see_each_other(p: Problem, data: st.DataObject) -> None:
    """A slice of the channels gives that slice of the result; elementwise, to the bit."""
    first = data.draw(st.integers(0, p.channels - 1))
    part = slice(first, data.draw(st.integers(first + 1, p.channels)))
    cut = (slice(None),) * p.channel_axis + (part,)
    gamma = None if p.gamma is None else p.gamma[part]
    beta = None if p.beta is None else p.beta[part]
    whole = forward(p)
    sliced = Problem(p.x[cut], p.dy[cut], gamma, beta, p.eps, p.layout)
    assert_same_function(sliced, forward(sliced), whole.y[cut])
    y = fastbn.normalize(p.x[cut], whole.mean[part], whole.var[part], gamma, beta, **p.options)
    again = fastbn.normalize(p.x, whole.mean, whole.var, p.gamma, p.beta, **p.options)
    assert_same_bits({"y": y}, {"y": again[cut]})


@given(whole_numbers(), st.sampled_from([1, -7, 1000, 100_000]))
def test_a_shift_of_x_changes_the_mean_alone(p: Problem, c: int) -> None:
    """x + c gives the same y and var; the tolerance grows with |c| / s."""
    shifted = Problem(p.x + p.x.dtype.type(c), p.dy, p.gamma, p.beta, p.eps, p.layout)
    a, b, e, f = forward(p), forward(shifted), Exact(p), Exact(shifted)
    assume((abs(f.mean) * f.rstd <= 1e6).all())
    mean_bound, var_bound = e.mean_bound + f.mean_bound, e.var_bound + f.var_bound
    assert_within(b.mean, a.mean.astype(e.x.dtype) + c, mean_bound, "mean")
    assert_within(b.var, a.var.astype(e.x.dtype), var_bound, "var")
    assert_within(rows(b.y, p.layout), wide(a.y, p.layout), e.y_bound + f.y_bound, "y")


FEW_BITS_LEFT = Problem(
    np.array([[[42.15213, 0]], [[0, 0]], [[0, 0]]], np.float32).reshape(1, 3, 2),
    np.array(
        [[-0.34385484, -0.05138009], [-0.97227365, -1.1344875], [0.30570522, -1.851685]], np.float32
    ).reshape(1, 3, 2),
    np.array([-8.0193143e-04, -1.3243589, -248.36162], np.float32),
    None,
    1e-5,
    "NCHW",
)
"""dx is what two numbers a hundred million times as large leave, in whatever type they are."""


@given(recipes(), st.integers(-20, 20))
@example(FEW_BITS_LEFT, 19)
def test_a_power_of_two_in_x_changes_no_bit_of_y(p: Problem, k: int) -> None:
    """x * 2**k with eps * 4**k: y, dgamma and dbeta keep their bits, the rest scales exactly."""
    factor = 2.0**k
    x = (p.x * factor).astype(p.x.dtype)
    plain = run_all(p.x, p.dy, p.gamma, p.beta, layout=p.layout, eps=p.eps)
    scaled = run_all(x, p.dy, p.gamma, p.beta, layout=p.layout, eps=p.eps * factor**2)
    for name in plain:
        if name.endswith("mean"):
            scaled[name] /= factor
        elif name.endswith("var"):
            scaled[name] /= factor**2
        elif name.endswith("dx"):
            scaled[name] *= scaled[name].dtype.type(factor)
    assert_same_bits(scaled, plain)


@given(problems)
def test_a_duplicated_batch_has_the_same_statistics(p: Problem) -> None:
    """The batch twice over has the same mean and biased variance, and the same y twice."""
    other = forward(p, np.concatenate([p.x, p.x], axis=0))
    half = p.x.shape[0] if p.channel_axis != 0 else 0
    assert_same_function(p, other, other.y[:half])
    assert_same_function(p, other, other.y[half:])


@given(problems)
def test_dx_is_orthogonal_to_what_normalization_removes(p: Problem) -> None:
    """sum(dx) = 0, and sum(dx * xhat) = gamma/s * dgamma * eps / (var + eps)."""
    e = Exact(p)
    exact, bound = e.gradients(p, p.dy)
    dx, dgamma, _ = backward(p)
    d = wide(dx, p.layout)
    tiny = np.longdouble(np.finfo(dx.dtype).smallest_subnormal) * d.shape[1]
    assert (abs(d.sum(1)) <= bound.sum(1) + tiny).all()
    coefficient = e.gamma * e.rstd * np.longdouble(p.eps) * e.rstd**2
    dgamma_bound = bound_dgamma(dgamma.dtype, exact, e.mean, e.var, p.eps)
    slack = (bound * abs(exact.xhat)).sum(1) + abs(coefficient) * dgamma_bound + tiny
    assert (abs((d * exact.xhat).sum(1) - coefficient * dgamma) <= slack).all()


@given(whole_numbers(), st.integers(0, 9))
def test_backward_is_linear_in_dy(p: Problem, seed: int) -> None:
    """The gradients of 2 dy - 3 dz are 2 times those of dy less 3 times those of dz."""
    dz = np.random.default_rng(seed).integers(-8, 9, p.x.shape).astype(p.x.dtype)
    combined = 2 * p.dy - 3 * dz
    e = Exact(p)
    parts = [(1, combined), (2, p.dy), (-3, dz)]
    got = [backward(p, dy) for _, dy in parts]
    exact = [e.gradients(p, dy) for _, dy in parts]
    weights = [abs(w) for w, _ in parts]
    slack = sum(w * b for w, (_, b) in zip(weights, exact, strict=True))
    combination = 2 * wide(got[1][0], p.layout) - 3 * wide(got[2][0], p.layout)
    assert_within(rows(got[0][0], p.layout), combination, slack, "dx")
    of_sums = (bound_dgamma, bound_dbeta)
    for i, (name, bound) in enumerate(zip(("dgamma", "dbeta"), of_sums, strict=True), start=1):
        dtype = got[0][i].dtype
        slack = sum(
            w * bound(dtype, g, e.mean, e.var, p.eps)
            for w, (g, _) in zip(weights, exact, strict=True)
        )
        sums = [g[i].astype(np.longdouble) for g in got]
        assert_within(got[0][i], 2 * sums[1] - 3 * sums[2], slack, name)


@given(whole_numbers(), st.integers(0, 9))
def test_backward_is_the_adjoint_of_the_derivative(p: Problem, seed: int) -> None:
    """<dy, J v> = <dx, v>, with J v by a complex step through the textbook formula."""
    v = np.random.default_rng(seed).normal(size=p.x.shape)
    e = Exact(p)
    gamma, beta = e.gamma.astype(np.float64), e.beta.astype(np.float64)
    step = formulas.textbook(p.x + 1e-200j * v, gamma, beta, p.eps, p.layout)
    forward_product = wide(p.dy, p.layout) * wide(step.imag / 1e-200, p.layout)
    dx, _, _ = backward(p)
    exact, bound = e.gradients(p, p.dy)
    backward_product = wide(dx, p.layout) * wide(v, p.layout)
    slack = (bound * abs(wide(v, p.layout))).sum(1)
    # The textbook formula runs in double precision: its own rounding, a few units of each term.
    n, size = exact.dx.shape[1], abs(e.gamma) * e.rstd
    own = abs(wide(v, p.layout)).max(1) * (exact.mean_dy + exact.mean_dy_xhat) * n
    spread = 1 + abs(exact.xhat).max(1) + abs(e.mean) * e.rstd
    slack += 64 * 2.0**-52 * size * own * spread
    assert (abs(forward_product.sum(1) - backward_product.sum(1)) <= slack).all()


@given(problems, st.integers(0, 9))
def test_inference_is_an_affine_map(p: Problem, seed: int) -> None:
    """`normalize` is a x + c with a = gamma/s and c = beta - a mean, for any statistics."""
    rng = np.random.default_rng(seed)
    mean, var = rng.normal(size=p.channels), rng.exponential(size=p.channels)
    y = fastbn.normalize(p.x, mean, var, p.gamma, p.beta, **p.options)
    e = Exact(p)
    m, v = mean.astype(np.longdouble), var.astype(np.longdouble)
    a = e.gamma * formulas.rstd_of(v, p.eps)
    affine = a[:, None] * e.x + (e.beta - a * m)[:, None]
    bound = bound_y(p.x.dtype.type, affine, m, v, e.gamma, e.beta, p.eps)
    own = 2.0**-60 * (abs(a)[:, None] * (abs(e.x) + abs(m)[:, None]) + abs(e.beta)[:, None])
    assert_within(rows(y, p.layout), affine, bound + own, "y")
