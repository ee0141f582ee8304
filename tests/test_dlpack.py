"""Arrays of other libraries: read where they lie, or refused with what to do."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

import fastbn
from fastbn.checks import arrays, dlpack
from support.bits import assert_same_bits
from support.tensors import Tensor
from support.variants import each_backend

Array = NDArray[Any]
BFLOAT16 = ml_dtypes.bfloat16


def some(dtype: Any) -> Array:
    a: Array = np.random.default_rng(0).normal(100, 10, (4, 3, 6, 5)).astype(dtype)
    return a


@pytest.mark.parametrize(
    "dtype", [np.float32, np.float64, np.float16, BFLOAT16, np.uint8, np.int16, bool]
)
def test_no_copy(dtype: Any) -> None:
    """Of any strides; the array lives as long as what was made of it."""
    a = some(dtype).transpose(0, 2, 3, 1)[::2, ::-1]
    got = dlpack.imported("x", Tensor(a))
    assert got is not None
    assert (got.dtype, got.strides, got.ctypes.data) == (a.dtype, a.strides, a.ctypes.data)


@each_backend
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, BFLOAT16])
def test_wherever_an_array_is(dtype: Any) -> None:
    """Inputs, parameters, statistics, masks, weights: the results of NumPy's arrays."""
    x, dy = some(dtype), some(dtype)[::-1].copy()
    gamma = np.linspace(0.5, 2, 3).astype(dtype)
    where, weights = x[:, :1] > 95, np.linspace(1, 2, 4)

    def results(wrapped: Any) -> dict[str, Array]:
        layer: Any = fastbn.BatchNorm(3)
        one, options = wrapped(x), {"where": wrapped(where), "weights": wrapped(weights)}
        y, mean, var = fastbn.batch_norm(one, wrapped(gamma), residual=wrapped(dy), **options)
        moments = wrapped(mean), wrapped(var)
        got = fastbn.batch_norm_backward(wrapped(dy), one, *moments, wrapped(gamma), **options)
        population = fastbn.population_statistics([one, one])
        return {
            "y": y,
            "dx": got.dx,
            "dgamma": np.asarray(got.dgamma),
            "layer": layer(one),
            "frozen": fastbn.FrozenBatchNorm(*moments)(one),
            "standardized": fastbn.Standardizer.of(one)(one),
            "group": fastbn.group_norm(one, 3).y,
            "population": population.mean,
        }

    assert_same_bits(results(Tensor), results(lambda a: a))


@pytest.mark.no_kernel
@each_backend
def test_refused() -> None:
    """What is elsewhere, or has a gradient, and a tensor as output."""
    x = some(np.float32)
    with pytest.raises(TypeError, match=r"x is a support Tensor on another device .*x\.cpu"):
        fastbn.batch_norm(Tensor(x, device=2))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"x is .* \(it requires gradients\).*pass x\.detach\(\)"):
        fastbn.batch_norm(Tensor(x, requires_grad=True))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="out is a Tensor"):
        fastbn.batch_norm(x, out=Tensor(x))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="x has dtype int64"):
        fastbn.batch_norm(Tensor(np.zeros((2, 3), np.int64)))  # type: ignore[arg-type]


def test_bfloat16_without_its_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ml_dtypes", None)
    with pytest.raises(TypeError, match="from the package ml_dtypes"):
        dlpack.imported("x", Tensor(some(BFLOAT16)))


def test_pytorch(torch: Any) -> None:
    """Tensors themselves, those with gradients and of other devices too."""
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for kind in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        tensor: Any = x.to(kind)
        y = fastbn.batch_norm(tensor).y
        expected = fastbn.batch_norm(tensor.double().numpy()).y
        assert y.dtype.name == str(kind).removeprefix("torch.")
        np.testing.assert_allclose(y.astype(float), expected, atol=0.02)
        assert arrays.array("x", tensor, arrays.ANY).ctypes.data == tensor.data_ptr()
    with pytest.raises(TypeError, match=r"pass x\.detach\(\)"):
        fastbn.batch_norm(x.requires_grad_())
    for other in (x.detach().to("meta"), x.detach().to_sparse()):
        with pytest.raises(TypeError, match="x is a torch Tensor"):
            fastbn.batch_norm(other)
