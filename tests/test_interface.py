"""The backends have one interface, and the package the public names that are promised."""

from __future__ import annotations

import inspect

import pytest

import fastbn
from fastbn import backends
from fastbn.backends.base import Backend
from support.variants import CYTHON, EIGHT, VARIANTS, activate

PLAIN = (
    "plain_moments",
    "plain_batch_norm",
    "plain_normalize",
    "plain_backward",
    "plain_samples",
    "plain_samples_backward",
    "plain_rows",
    "plain_rows_backward",
)
BESIDE = (
    "copy",
    "channel_bytes",
    "integer_sums",
    "normalize_into",
    "plain_frozen",
    "walks",
)
EXTRAS = {"cython": {"isa", "calls"}}
"""What a backend may have beyond the interface: how Cython tells its instruction sets apart."""

SECOND = "ddx ddgamma ddbeta dy x mean var gamma=None * eps=1e-05 layout='NCHW' activation=None"

OF_SAMPLES = "eps=1e-05 layout='NCHW' activation=None residual=None where=None out=None"
OF_SAMPLES_BACKWARD = (
    "eps=1e-05 layout='NCHW' params=True activation=None y=None dresidual=False where=None out=None"
)
LAYER_OF_SAMPLES = (
    "channels * eps=1e-05 scale=True shift=True one_value='skip' frozen_affine=False "
    "layout='NCHW' activation=None dtype='float32'"
)

SIGNATURES = {
    "batch_norm": (
        "x gamma=None beta=None * eps=1e-05 layout='NCHW' activation=None residual=None "
        "where=None weights=None virtual_batch=None out=None"
    ),
    "normalize": (
        "x mean var gamma=None beta=None * eps=1e-05 layout='NCHW' activation=None residual=None "
        "where=None dtype=None out_layout=None out=None"
    ),
    "batch_norm_backward": (
        "dy x mean var gamma=None * eps=1e-05 layout='NCHW' params=True activation=None y=None "
        "dresidual=False where=None weights=None sums=None virtual_batch=None out=None"
    ),
    "normalize_backward": (
        "dy x mean var gamma=None * eps=1e-05 layout='NCHW' params=True activation=None y=None "
        "dresidual=False where=None out=None"
    ),
    "batch_norm_double_backward": SECOND,
    "normalize_double_backward": SECOND,
    "FrozenBatchNorm": (
        "mean var gamma=None beta=None * eps=1e-05 layout='NCHW' activation=None dtype=None "
        "out_layout=None"
    ),
    "Standardizer": "mean std * divisor=1 layout='NCHW' out_layout=None dtype=None",
    "ColumnMoments": "count mean var",
    "moments": "x * layout='NCHW' where=None weights=None virtual_batch=None",
    "gradient_sums": (
        "dy x mean var * eps=1e-05 layout='NCHW' activation=None y=None where=None weights=None"
    ),
    "BatchNorm": (
        "channels * eps=1e-05 momentum=0.1 decay=None unbiased=True scale=True shift=True "
        "track_running_stats=True domains=None one_value='raise' nonfinite='update' "
        "virtual_batch=None renormalization=None frozen_statistics=False frozen_affine=False "
        "layout='NCHW' activation=None dtype='float32'"
    ),
    "group_norm": f"x groups gamma=None beta=None * {OF_SAMPLES}",
    "instance_norm": f"x gamma=None beta=None * {OF_SAMPLES}",
    "layer_norm": (
        "x gamma=None beta=None * eps=1e-05 layout='NCHW' axes='sample' activation=None "
        "residual=None skip=None where=None out=None"
    ),
    "group_norm_backward": f"dy x mean var groups gamma=None * {OF_SAMPLES_BACKWARD}",
    "instance_norm_backward": f"dy x mean var gamma=None * {OF_SAMPLES_BACKWARD}",
    "layer_norm_backward": (
        "dy x mean var gamma=None * eps=1e-05 layout='NCHW' axes='sample' params=True "
        "activation=None y=None dresidual=False dsum=None where=None out=None"
    ),
    "rms_norm": "x gamma=None * eps=1e-05 skip=None where=None out=None",
    "rms_norm_backward": (
        "dy x mean_square gamma=None * eps=1e-05 dsum=None where=None params=True out=None"
    ),
    "GroupNorm": f"groups {LAYER_OF_SAMPLES}",
    "InstanceNorm": LAYER_OF_SAMPLES,
    "LayerNorm": LAYER_OF_SAMPLES.replace("'NCHW' ", "'NCHW' axes='sample' "),
    "RMSNorm": "channels * eps=1e-05 scale=True frozen_affine=False dtype='float32'",
    "Renormalization": "* r_max=3.0 d_max=5.0 start=5000 r_end=40000 d_end=25000",
    "Moments": "count mean var * effective_count=None",
    "population_statistics": "batches * layout='NCHW' method='exact'",
    "reestimate": "layers forward batches * method='exact' sequential=True domain=None",
    "fold_into_conv": (
        "weight bias mean var gamma=None beta=None * eps=1e-05 transposed=False groups=1"
    ),
    "fold_into_linear": "weight bias mean var gamma=None beta=None * eps=1e-05 before=False",
    "get_backend": "",
    "set_backend": "name",
    "use_backend": "name",
    "get_num_threads": "",
    "set_num_threads": "n",
    "use_num_threads": "n",
    "clear_pool": "",
    "show_config": "",
    "get_config": "",
}


FORWARDS = {
    "BatchNorm": "x * residual=None where=None weights=None out=None domain=None update=True",
    **dict.fromkeys(("GroupNorm", "InstanceNorm"), "x * residual=None where=None out=None"),
    "LayerNorm": "x * residual=None skip=None where=None out=None",
    "RMSNorm": "x * skip=None where=None out=None",
}
BACKWARDS = {
    **dict.fromkeys(
        ("BatchNorm", "GroupNorm", "InstanceNorm"),
        "dy saved=None * dresidual=False accumulate=False out=None",
    ),
    "LayerNorm": "dy saved=None * dresidual=False dsum=None accumulate=False out=None",
    "RMSNorm": "dy saved=None * dsum=None accumulate=False out=None",
}
CALLS = {
    **{name: f"{forward} keep=True" for name, forward in FORWARDS.items()},
    "FrozenBatchNorm": "x * residual=None where=None out=None",
    "Standardizer": "x * out=None",
}


def parameters(function: object) -> list[tuple[str, object]]:
    """Names and kinds of a function's parameters."""
    found = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
    return [(p.name, p.kind) for p in found if p.name != "self"]


@pytest.mark.parametrize("name", VARIANTS)
def test_a_backend_is_eight_functions(name: str) -> None:
    """Each backend has the eight functions, the plain entries and what it says of memory, and
    nothing more."""
    backend = backends.get(name) if name not in CYTHON else _cython(name)
    assert isinstance(backend, Backend)
    assert backend.name == name.partition("-")[0]
    assert all(callable(getattr(backend, entry)) for entry in PLAIN)
    for function in (*EIGHT, *BESIDE):
        assert parameters(getattr(type(backend), function)) == parameters(
            getattr(Backend, function)
        ), function
    public = {attribute for attribute in dir(backend) if not attribute.startswith("_")}
    assert public - EXTRAS.get(backend.name, set()) == {"name", *EIGHT, *PLAIN, *BESIDE}


def _cython(name: str) -> Backend:
    with activate(name) as active:
        return active.backend


def test_the_base_cannot_be_made() -> None:
    """A backend that lacks a pass is refused when it is made."""
    with pytest.raises(TypeError, match="abstract"):
        Backend()  # type: ignore[abstract]


def signature(function: object) -> str:
    """A function's parameters in words."""
    words, keyword_only = [], False
    for p in inspect.signature(function).parameters.values():  # type: ignore[arg-type]
        if p.kind is p.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            words.append("*")
        words.append(p.name if p.default is p.empty else f"{p.name}={p.default!r}")
    return " ".join(words)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name: str) -> None:
    """The public functions have the parameters, defaults and keyword-only marks promised."""
    assert signature(getattr(fastbn, name)) == SIGNATURES[name]


@pytest.mark.parametrize("name", CALLS)
def test_call(name: str) -> None:
    """In every class all after x is by keyword: an array in the second place, where NumPy has its
    outputs, would be added as a residual."""
    assert signature(getattr(fastbn, name).__call__).removeprefix("self ") == CALLS[name]


@pytest.mark.parametrize("name", FORWARDS)
def test_layers(name: str) -> None:
    """Of every layer: forward is a call that keeps nothing; and backward."""
    kind = getattr(fastbn, name)
    assert signature(kind.forward).removeprefix("self ") == FORWARDS[name]
    assert signature(kind.backward).removeprefix("self ") == BACKWARDS[name]


def test_public_names() -> None:
    """The package exports these functions, the results' types and the error, and nothing else."""
    types = {"BackendError", "BatchNormResult", "Folded", "Gradients", "Saved", "Statistics"}
    types |= {"GradientSums", "PopulationStatistics", "ResidualGradients", "SecondGradients"}
    types |= {"RMSGradients", "RMSNormResult", "SkipRMSNormResult", "SkipResult"}
    types |= {"RunningStatistics"}
    assert set(fastbn.__all__) == set(SIGNATURES) | types
    assert issubclass(fastbn.BackendError, RuntimeError)
    assert fastbn.BatchNormResult._fields == ("y", "mean", "var")
    assert fastbn.Folded._fields == ("weight", "bias")
    assert fastbn.Gradients._fields == ("dx", "dgamma", "dbeta")
    assert fastbn.ResidualGradients._fields == ("dx", "dgamma", "dbeta", "dresidual")
    assert fastbn.SecondGradients._fields == ("ddy", "dx", "dgamma")
    assert fastbn.GradientSums._fields == ("dgamma", "dbeta", "count")
    assert fastbn.PopulationStatistics._fields == ("mean", "var", "count")
    assert fastbn.RunningStatistics._fields == ("mean", "var", "num_batches_tracked")
    assert fastbn.Statistics._fields == ("mean", "var")
