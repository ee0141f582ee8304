"""The compiled kernels: stores past the caches, and only what the machine can run."""

from __future__ import annotations

import importlib
import platform
import shutil
import subprocess
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastbn
from fastbn import backends
from oracle.arrays import DTYPES, HALVES, LAYOUTS, to_layout
from oracle.formulas import ACTIVATIONS
from support.bits import Results, assert_same_bits
from support.machines import ALWAYS_STREAM, pretend
from support.pairs import paired
from support.processes import output
from support.sample_norms import Norm, made
from support.variants import CYTHON, activate, environment

if "cython" not in backends.usable():
    pytest.skip("the compiled kernels are not built", allow_module_level=True)

from fastbn._ext import cpu, entry

LINE = 64
BASELINE = [
    f"kernels_{isa}_{element}"
    for isa in backends.native_facts().isas
    if isa in ("sse2", "portable")
    for element in entry.ELEMENTS
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CYTHON)
def test_streams_to_any_address(name: str, dtype: Any, layout: str) -> None:
    """Streaming stores reach every value, wherever in a line an output begins, and no other."""
    for shape in [(5, 64, 30), (3, 2, 300), (40, 300), (9, 16, 4, 4), (9, 2050)]:
        x = to_layout(np.random.default_rng(0).normal(size=shape), layout).astype(dtype)
        with activate(name), pretend(**ALWAYS_STREAM):
            expected, mean, var = fastbn.batch_norm(x, layout=layout)
            expected_dx = fastbn.batch_norm_backward(x, x, mean, var, layout=layout).dx
            for offset in range(0, LINE // x.itemsize, 3):
                memory = np.full(x.size + 2 * LINE, 7, dtype)
                out = memory[offset : offset + x.size].reshape(x.shape)
                fastbn.batch_norm(x, layout=layout, out=out)
                np.testing.assert_array_equal(out, expected)
                fastbn.batch_norm_backward(x, x, mean, var, layout=layout, out=out)
                np.testing.assert_array_equal(out, expected_dx)
                assert (memory[:offset] == 7).all()
                assert (memory[offset + x.size :] == 7).all()


def test_a_y_that_nothing_needs_stays_plain() -> None:
    """Without an activation, a call with the forward's y takes the short way as well."""
    x, table = np.ones((6, 4, 5), np.float32), np.ones(4)
    plain, vectors = backends.get("cython").plain_backward, (table, table, None, 1e-5, "NCHW")
    for y in (None, x.copy()):
        assert plain(x, x, *vectors, True, None, y, False, False, None, 1) is not None


def sample_calls(dtype: Any, layout: str, fused: bool) -> Results:
    """What group, instance and layer norm give for plain arguments."""
    found: Results = {}
    shapes = (2, 6, 5), (3, 12, 4, 5), (1, 32, 17, 1), (5, 6), (40, 48), (3, 1, 5), (2, 4, 40, 420)
    kinds: tuple[str | int, ...] = ("instance", "layer", 2)
    for shape, kind, activation in product(shapes, kinds, ACTIVATIONS):
        if kind == 2 and shape[1] == 1:
            continue
        x, dy, z, gamma, beta = made(shape, layout, dtype)
        g, b = (None, beta) if activation is None else (gamma.astype("f4"), beta)
        options: dict[str, Any] = {"layout": layout, "activation": activation}
        result = Norm(kind).forward(x, gamma=g, beta=b, residual=z if fused else None, **options)
        gate = {} if activation is None else {"y": result.y, "dresidual": fused}
        got = Norm(kind).backward(dy, x, *result[1:], gamma=g, **gate, **options)
        named = result._asdict() | got._asdict()
        found |= {f"{shape} {kind} {activation} {n}": np.asarray(a) for n, a in named.items()}
    return found


@paired(name=CYTHON, dtype=[*DTYPES, *HALVES], layout=LAYOUTS)
def test_plain_calls_on_samples_have_the_bits_of_others(
    name: str, layout: str, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls that compiled code does whole, and the same calls by way of the checks; both happen."""
    with activate(name) as active:
        plain: list[bool] = []
        for entry_name in ("plain_samples", "plain_samples_backward"):
            whole = getattr(active.backend, entry_name)

            def counted(*arguments: Any, whole: Any = whole) -> Any:
                result = whole(*arguments)
                plain.append(result is not None)
                return result

            monkeypatch.setattr(active.backend, entry_name, counted)
        found = [sample_calls(dtype, layout, fused) for fused in (False, True)]
        assert all(plain)
        for entry_name in ("plain_samples", "plain_samples_backward"):
            monkeypatch.setattr(active.backend, entry_name, lambda *arguments: None)
        for fused, results in enumerate(found):
            assert_same_bits(results, sample_calls(dtype, layout, bool(fused)))


@pytest.mark.parametrize("name", CYTHON)
@pytest.mark.parametrize(
    ("shape", "parts"), [((90, 200, 72), 1), ((100, 200, 72), 2), ((30000, 1, 24), 2)]
)
def test_sums_over_samples_in_parts_or_not(name: str, shape: tuple[int, ...], parts: int) -> None:
    """A call that compiled code does whole has the bits of one by way of the checks, in parts."""
    x, dy, _, gamma, _ = made(shape, "NCHW", np.float64)
    apart = np.repeat(dy, 2, -1)[..., ::2]
    with activate(name) as active, fastbn.use_num_threads(1):  # threads have parts of their own
        _, mean, var = fastbn.instance_norm(x)
        given = x, mean, var, gamma
        calls = [active.calls()]
        plain = fastbn.instance_norm_backward(dy, *given)
        calls.append(active.calls())
        walked = fastbn.instance_norm_backward(apart, *given)
        calls.append(active.calls())
    assert np.diff(calls).tolist() == [1, parts]
    assert_same_bits(plain._asdict(), walked._asdict())


@pytest.mark.parametrize("shape", [(6, 4, 10), (6, 10)])
def test_arrays_that_are_not_plain_beside_one_that_is(shape: tuple[int, ...]) -> None:
    """Each argument of group norm and its backward may lie in memory as it likes."""
    x, dy, z, gamma, beta = made(shape, "NCHW", np.float32)
    y, mean, var = fastbn.group_norm(x, 2, gamma, beta, residual=z, activation="relu")
    given: dict[str, Any] = {"dy": dy, "x": x, "mean": mean, "var": var, "groups": 2}
    given |= {"gamma": gamma, "y": y, "activation": "relu", "dresidual": True}
    expected = fastbn.group_norm_backward(**given)._asdict()
    for name in ("dy", "x", "mean", "var", "gamma", "y"):
        a = given[name]
        apart = np.repeat(a, 2, -1)[..., ::2]
        swapped = a.astype(a.dtype.newbyteorder("S"))
        for other in (apart, swapped):
            assert_same_bits(
                fastbn.group_norm_backward(**given | {name: other})._asdict(), expected
            )
        with pytest.raises(TypeError, match=rf"^{name} is a list"):
            fastbn.group_norm_backward(**given | {name: a.tolist()})


def test_thresholds_are_named() -> None:
    """A threshold that does not exist is refused, with those that do."""
    with pytest.raises(ValueError, match=r"l2.*serial_below.*stream_planes"):
        entry.tune(l3=1)


def test_instruction_sets_are_what_numpy_finds() -> None:
    """Detection agrees with NumPy's own, best first; the portable kernels run everywhere."""
    features = np._core._multiarray_umath.__cpu_features__  # type: ignore[attr-defined]
    wanted = {
        "avx512": all(features[f] for f in ("AVX512F", "AVX512BW", "AVX512DQ", "AVX512VL")),
        "avx2": features["AVX2"] and features["FMA3"],
        "sse2": features["SSE2"],
        "portable": True,
    }
    if platform.machine() != "x86_64":
        wanted = {"portable": True}
    assert cpu.instruction_sets() == wanted
    assert [*cpu.instruction_sets()] == [*wanted]


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump to read machine code")
@pytest.mark.parametrize("name", ["cpu", "pool", "entry", *BASELINE])
def test_nothing_beyond_the_baseline_is_imported_first(name: str) -> None:
    """Modules that any processor imports hold no instruction of AVX or later."""
    path = Path(str(importlib.import_module(f"fastbn._ext.{name}").__file__))
    code = subprocess.run(["objdump", "-d", str(path)], check=True, capture_output=True, text=True)
    assert "ret" in code.stdout
    assert "%ymm" not in code.stdout
    assert "%zmm" not in code.stdout


@pytest.mark.skipif(not cpu.has_openmp(), reason="the kernels were built without OpenMP")
@pytest.mark.parametrize("name", CYTHON)
def test_a_forked_child_works_in_parallel(name: str) -> None:
    """After use in the parent a child has threads of its own, and the parent goes on."""
    code = """
import os, numpy as np, fastbn
x = np.random.default_rng(0).normal(size=(16, 24, 60, 61)).astype(np.float32)
expected = fastbn.batch_norm(x).y.tobytes()
child = os.fork()
if child == 0:
    same = fastbn.batch_norm(x).y.tobytes() == expected
    os._exit(len(os.listdir("/proc/self/task")) if same else 99)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
assert fastbn.batch_norm(x).y.tobytes() == expected
"""
    assert int(output(code, **environment(name), FASTBN_NUM_THREADS="3")) == 3
