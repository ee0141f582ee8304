"""fastbn: batch normalization on the CPU, as fast as memory allows and right on any data."""

from fastbn import config
from fastbn._pool import clear_pool
from fastbn.columns import ColumnMoments
from fastbn.config import (
    get_backend,
    get_config,
    get_num_threads,
    set_backend,
    set_num_threads,
    show_config,
    use_backend,
    use_num_threads,
)
from fastbn.double_backward import batch_norm_double_backward, normalize_double_backward
from fastbn.errors import BackendError
from fastbn.folding import fold_into_conv, fold_into_linear
from fastbn.functional import (
    batch_norm,
    batch_norm_backward,
    gradient_sums,
    moments,
    normalize,
    normalize_backward,
)
from fastbn.group_norms import (
    group_norm,
    group_norm_backward,
    instance_norm,
    instance_norm_backward,
    layer_norm,
    layer_norm_backward,
)
from fastbn.layers.batch_norm import BatchNorm
from fastbn.layers.frozen import FrozenBatchNorm
from fastbn.layers.group_norms import GroupNorm, InstanceNorm, LayerNorm
from fastbn.layers.renormalization import Renormalization
from fastbn.layers.row_norms import RMSNorm
from fastbn.layers.saved import Saved
from fastbn.reestimation import reestimate
from fastbn.results import (
    BatchNormResult,
    Folded,
    Gradients,
    GradientSums,
    PopulationStatistics,
    ResidualGradients,
    RMSGradients,
    RMSNormResult,
    RunningStatistics,
    SecondGradients,
    SkipResult,
    SkipRMSNormResult,
    Statistics,
)
from fastbn.row_norms import rms_norm, rms_norm_backward
from fastbn.standardizer import Standardizer
from fastbn.statistics import Moments, population_statistics

__all__ = [
    "BackendError",
    "BatchNorm",
    "BatchNormResult",
    "ColumnMoments",
    "Folded",
    "FrozenBatchNorm",
    "GradientSums",
    "Gradients",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "Moments",
    "PopulationStatistics",
    "RMSGradients",
    "RMSNorm",
    "RMSNormResult",
    "Renormalization",
    "ResidualGradients",
    "RunningStatistics",
    "Saved",
    "SecondGradients",
    "SkipRMSNormResult",
    "SkipResult",
    "Standardizer",
    "Statistics",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_double_backward",
    "clear_pool",
    "fold_into_conv",
    "fold_into_linear",
    "get_backend",
    "get_config",
    "get_num_threads",
    "gradient_sums",
    "group_norm",
    "group_norm_backward",
    "instance_norm",
    "instance_norm_backward",
    "layer_norm",
    "layer_norm_backward",
    "moments",
    "normalize",
    "normalize_backward",
    "normalize_double_backward",
    "population_statistics",
    "reestimate",
    "rms_norm",
    "rms_norm_backward",
    "set_backend",
    "set_num_threads",
    "show_config",
    "use_backend",
    "use_num_threads",
]

config.read_environment()


def __getattr__(name: str) -> str:
    """`__version__`, looked up when asked for: that costs milliseconds that no import should."""
    if name == "__version__":
        from importlib import metadata

        try:
            return metadata.version("fastbn") or "unknown"
        except Exception:  # no metadata, as in frozen copies, or broken
            return "unknown"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
