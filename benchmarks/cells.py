"""The cells: every combination of work, layout, element type, shape, output and threads measured.

1. Every shape, in every layout it has, with every work: float32, a ready output, all threads.
2. Each of float64, a fresh output and one thread by itself, on a core of those shapes.
3. One thread also where a library might leave cores idle: few or odd channels, one image.
4. The series: one family of shapes from 1 KB to 400 MB, for the plot of time against size.
5. Fused works, half types, masked works, virtual batches, group norms, training steps, outputs in
   another order of memory, images, tables, rows along the last axis, curves, and the smallest call.
6. Awkward shapes on one thread: many tiny samples, few samples of many channels, tiny calls.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from oracle import arrays

MB = 1e6

WORKS = ("forward", "inference", "backward", "normalize_backward")
FUSED = ("fused-forward", "fused-inference", "fused-backward")
STEPS = ("step", "fused-step")
IMAGES = "images"
TABLES = ("table-fit", "table-transform", "table-fit_transform")
MASKED = (
    "masked-forward",
    "masked-inference",
    "masked-backward",
    "weighed-forward",
    "weighed-backward",
)
GROUPED = tuple(
    f"{kind}-{work}"
    for kind in ("ghost", "group", "instance", "layer")
    for work in ("forward", "backward")
)
OF_ROWS = tuple(
    f"rows-{norm}-{work}"
    for norm in ("layer", "rms", "skip-layer", "skip-rms")
    for work in ("forward", "backward")
)
CURVES = ("silu", "hard_swish")
CURVED = tuple(f"{curve}-inference" for curve in CURVES)
FAMILIES = {"images": (IMAGES,), "tables": TABLES, "rows": OF_ROWS, "curves": CURVED}
"""Works that --only takes together."""
GROUPS = 32
"""Of group norm, or as many of them as divide the channels."""
GHOST = 8
"""Samples of a virtual batch, or as many of them as divide all samples."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Cell:
    """One thing to time."""

    work: str
    """What is computed.

    forward: y and the batch's statistics, with gamma and beta. inference: y by given statistics,
    with gamma and beta. backward: dx, dgamma, dbeta of forward. normalize_backward: dx alone of
    inference.
    fused-forward, fused-inference: relu(y + residual). fused-backward: of the former, with the
    residual's gradient. step, fused-step: a forward, then its backward. images: bytes, channels
    last, to normalized float32 by planes. table-...: standardize columns by their own statistics,
    which fit takes. masked-...: of the places
    that a mask selects. weighed-...: of those, with a weight for each sample. ghost-...: of
    virtual batches. group-..., instance-..., layer-...: group, instance and layer norm.
    rows-layer-..., rows-rms-...: layer and RMS norm of each row along the last axis.
    rows-skip-...: of x + skip, which is a result too; backward adds dsum, the sum's other gradient.
    silu-inference, hard_swish-inference: inference, and that activation.
    """
    layout: str
    """NCHW or NHWC; NC for an array of rank 2, which has one layout only."""
    dtype: str
    shape: Shape
    """(N, C, H, W), (N, C, L) or (N, C), whatever the layout."""
    output: str
    """ready: written into an array made before. reordered: so, with the other layout's order of
    memory. fresh: the call makes the array."""
    threads: int

    @property
    def is_fused(self) -> bool:
        return self.work.startswith("fused-")

    @property
    def is_step(self) -> bool:
        return self.work in STEPS

    @property
    def forward_and_backward(self) -> tuple[Cell, Cell]:
        """Of a step."""
        forward, backward = (self.work.replace("step", work) for work in ("forward", "backward"))
        return replace(self, work=forward), replace(self, work=backward)

    @property
    def is_images(self) -> bool:
        return self.work == IMAGES

    @property
    def is_table(self) -> bool:
        return self.work in TABLES

    @property
    def is_of_rows(self) -> bool:
        return self.work in OF_ROWS

    @property
    def has_skip(self) -> bool:
        return self.work.startswith("rows-skip-")

    @property
    def is_centred(self) -> bool:
        """Whether a mean is subtracted: RMS norm has none."""
        return "-rms-" not in self.work

    @property
    def curve(self) -> str | None:
        """The activation of inference, if there is one."""
        return self.work.partition("-")[0] if self.work in CURVED else None

    @property
    def family(self) -> str:
        return next((name for name, works in FAMILIES.items() if self.work in works), "others")

    @property
    def is_masked(self) -> bool:
        return self.work in MASKED

    @property
    def is_weighed(self) -> bool:
        return self.work.startswith("weighed-")

    @property
    def is_grouped(self) -> bool:
        return self.work in GROUPED

    @property
    def groups(self) -> int:
        """Of channels, which share the statistics of a sample or a virtual batch."""
        some, each = math.gcd(GROUPS, self.channels), self.channels
        of_kind = {"ghost": each, "group": some, "instance": each, "layer": 1}
        return of_kind[self.work.partition("-")[0]]

    @property
    def run(self) -> int:
        """Samples that share statistics: those of a virtual batch, or one."""
        return math.gcd(GHOST, self.shape[0]) if self.work.startswith("ghost") else 1

    @property
    def plain_work(self) -> str:
        """The work without what is fused with it, without masks and weights."""
        return self.work.rpartition("-")[2]

    @property
    def channels(self) -> int:
        return self.shape[1]

    @property
    def itemsize(self) -> int:
        return 2 if self.dtype in HALVES else np.dtype(self.dtype).itemsize

    @property
    def is_half(self) -> bool:
        return self.itemsize == 2

    @property
    def bytes(self) -> int:
        """Of one array, x say."""
        return math.prod(self.shape) * self.itemsize

    @property
    def array_shape(self) -> Shape:
        """The shape of x in memory."""
        if self.layout != "NHWC":
            return self.shape
        n, c, *places = self.shape
        return (n, *places, c)

    @property
    def is_reordered(self) -> bool:
        return self.output == "reordered"

    @property
    def other_layout(self) -> str:
        return {"NCHW": "NHWC", "NHWC": "NCHW"}[self.layout]

    @property
    def size_name(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def threads_name(self) -> str:
        return f"{self.threads} thread{'s' if self.threads > 1 else ''}"

    @property
    def name(self) -> str:
        words = (self.work, self.layout, self.dtype, self.size_name, self.output)
        return " ".join((*words, self.threads_name))

    @property
    def in_series(self) -> bool:
        return self.shape in SERIES

    @property
    def is_awkward(self) -> bool:
        return any(self.shape in shapes for shapes in AWKWARD.values())

    @classmethod
    def from_name(cls, name: str) -> Cell:
        work, layout, dtype, size, output, threads, _ = name.split()
        return cls(work, layout, dtype, tuple(map(int, size.split("x"))), output, int(threads))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Cell:
        return cls(**(fields | {"shape": tuple(fields["shape"])}))


RESNET: tuple[Shape, ...] = (
    (32, 64, 112, 112),
    (32, 256, 56, 56),
    (32, 512, 28, 28),
    (32, 1024, 14, 14),
    (32, 2048, 7, 7),
)
BETWEEN: Shape = (16, 128, 112, 112)
"""One channel fits in an L2 of 1 MiB, two in 2 MiB; of ResNet's large ones one or two, or none."""
ONE_IMAGE: tuple[Shape, ...] = ((1, 2048, 7, 7), (1, 64, 112, 112), (1, 64, 224, 224))
FEW_CHANNELS: tuple[Shape, ...] = (
    (32, 3, 224, 224),
    (7, 3, 224, 224),
    (32, 1, 224, 224),
    (20, 1, 224, 224),
)
UNEVEN_CHANNELS: tuple[Shape, ...] = ((32, 100, 28, 28), (32, 67, 28, 28))
ODD_PLANES: tuple[Shape, ...] = ((32, 128, 13, 17), (64, 512, 13, 17), (256, 2048, 1, 1))
CACHED: tuple[Shape, ...] = ((4, 16, 28, 28), (8, 64, 56, 56))
"""Well inside L2, and well inside L3, on a machine of its time."""
HUGE: Shape = (32, 256, 112, 112)
ROWS: tuple[Shape, ...] = (
    *((n, 256) for n in (1, 16, 256, 4096, 65536)),
    (60, 100),
    (128, 1024),
    (4096, 1024),
)
SHAPES: tuple[Shape, ...] = (
    *RESNET,
    BETWEEN,
    *ONE_IMAGE,
    *FEW_CHANNELS,
    *UNEVEN_CHANNELS,
    *ODD_PLANES,
    *CACHED,
    HUGE,
    *ROWS,
)

CORE: tuple[Shape, ...] = (
    (32, 64, 112, 112),
    (32, 1024, 14, 14),
    (32, 2048, 7, 7),
    (1, 64, 112, 112),
    (128, 1024),
    (60, 100),
)
TEAMWORK: tuple[Shape, ...] = tuple(
    shape
    for shape in (*ONE_IMAGE, *FEW_CHANNELS, *UNEVEN_CHANNELS)
    if 4 * math.prod(shape) >= 4 * MB
)

SERIES: tuple[Shape, ...] = (
    *((1, 64, side, side) for side in (2, 4, 8, 16, 32)),
    *((n, 64, 32, 32) for n in (4, 16, 32, 64, 128, 256, 512, 1024, 1600)),
)
"""From 1 KB to 400 MB in float32."""
IN_SERIES = ("forward", "inference")

FUSED_SHAPES: tuple[Shape, ...] = (*RESNET[:4], *CACHED)
STEP_SHAPES: tuple[Shape, ...] = (
    RESNET[0],
    *RESNET[3:],
    ONE_IMAGE[1],
    *CACHED,
    (128, 1024),
    (4096, 1024),
)
FUSED_STEP_SHAPES: tuple[Shape, ...] = (RESNET[0], CACHED[1])
REORDERED_SHAPES: tuple[Shape, ...] = ((16, 3, 416, 416), (16, 64, 56, 56), RESNET[0])
"""Images as they are loaded, channels last, and what layers of a network hand to each other."""
IMAGE_SHAPES: tuple[Shape, ...] = ((1, 3, 224, 224), (32, 3, 224, 224), (8, 3, 1080, 1920))
TABLE_SHAPES: tuple[Shape, ...] = ((1000, 20), (20000, 1000), (400000, 64))
HALVES = ("float16", "bfloat16")
HALF_SHAPES: tuple[Shape, ...] = (*RESNET[:2], RESNET[3], CACHED[1])
MASKED_SHAPES: tuple[Shape, ...] = (*RESNET[:4], CACHED[1], (65536, 256))
GROUPED_SHAPES: tuple[Shape, ...] = RESNET[:4]
LAYER_ROWS: tuple[Shape, ...] = ((4096, 1024), (16384, 1024), (65536, 256), (8192, 4096))
TOKENS: Shape = (32, 768, 128)
"""32 texts of 128 tokens, in NHWC as of a transformer: (32, 128, 768) in memory."""
HALF_ROWS: Shape = LAYER_ROWS[1]
CURVED_SHAPES: tuple[Shape, ...] = (RESNET[0], CACHED[1])
CALL: Shape = (1, 16)
"""The kernel takes some nanoseconds: the time of a call is what the call costs."""

AWKWARD: dict[str, tuple[Shape, ...]] = {
    "many samples of few values": (
        (50000, 5, 3),
        (100000, 3, 2),
        (10000, 8, 3, 3),
        (20000, 4, 1, 1),
        (5000, 64, 2),
        (2000, 100, 4),
        (100000, 1, 4),
        (200000, 2),
        (100002, 4),
        (100001, 7),
        (30000, 64),
    ),
    "few samples of many channels": (
        (1, 1000000),
        (1, 300000, 2),
        (1, 100000, 3, 3),
        (4, 50000, 2),
        (2, 500000),
        (3, 33333),
        (8, 100000),
        (1, 30000),
    ),
    "tiny calls": ((1, 1, 1), (2, 3), (4, 8, 2, 2), (16, 4, 3), (16, 1, 28, 28), (255, 33)),
}
"""Where what is done for each sample, channel or call outweighs the values, by what is so."""

QUICK: tuple[Shape, ...] = ((32, 512, 28, 28), (8, 64, 56, 56), (60, 100))
QUICK_SERIES: tuple[Shape, ...] = SERIES[::4]


def layouts_of(shape: Shape) -> tuple[str, ...]:
    return ("NCHW", "NHWC") if len(shape) > 2 else ("NC",)


def cells_of(
    shapes: Iterable[Shape],
    *,
    threads: int,
    works: Iterable[str] = WORKS,
    dtype: str = "float32",
    output: str = "ready",
) -> Iterator[Cell]:
    """The cells of some shapes; those that share their arrays follow one another."""
    for shape in shapes:
        for layout in layouts_of(shape):
            for work in works:
                yield Cell(work, layout, dtype, shape, output, threads)


def all_cells(threads: int) -> list[Cell]:
    """The full run on a machine of so many threads; with one, that is all of them."""
    alone = (*CORE, *(shape for shape in TEAMWORK if shape not in CORE))
    listed = (
        *cells_of(SHAPES, threads=threads),
        *cells_of(CORE, threads=threads, dtype="float64"),
        *cells_of(CORE, threads=threads, output="fresh"),
        *cells_of(SERIES, threads=threads, works=IN_SERIES),
        *cells_of(alone, threads=1),
        *cells_of(FUSED_SHAPES, threads=threads, works=FUSED),
        *half_cells(HALF_SHAPES, threads, HALVES),
        *cells_of(MASKED_SHAPES, threads=threads, works=MASKED),
        *grouped_cells(GROUPED_SHAPES, LAYER_ROWS, threads),
        *step_cells(threads),
        *cells_of(REORDERED_SHAPES, threads=threads, works=WORKS[:3], output="reordered"),
        *data_cells(threads),
        *row_cells(threads),
        *cells_of(CURVED_SHAPES, threads=threads, works=CURVED),
        *cells_of([CALL], threads=threads, works=["inference"]),
        *awkward_cells(),
    )
    return list(dict.fromkeys(listed))


def half_cells(
    shapes: Iterable[Shape], threads: int, dtypes: Iterable[str], works: Iterable[str] = WORKS[:3]
) -> Iterator[Cell]:
    """Cells of half types, as far as they are here: bfloat16 needs ml_dtypes."""
    here = [np.dtype(half).name for half in arrays.HALVES]
    for dtype in dtypes:
        if dtype in here:
            yield from cells_of(shapes, threads=threads, works=works, dtype=dtype)


def grouped_cells(shapes: Iterable[Shape], rows: Iterable[Shape], threads: int) -> Iterator[Cell]:
    """Virtual batches and group norms; of rows those whose statistics are of several columns."""
    yield from cells_of(shapes, threads=threads, works=GROUPED)
    works = [work for work in GROUPED if work.startswith(("group", "layer"))]
    yield from cells_of(rows, threads=threads, works=works)


def step_cells(threads: int) -> Iterator[Cell]:
    """Training steps, into ready outputs and fresh ones."""
    for work, shapes in zip(STEPS, (STEP_SHAPES, FUSED_STEP_SHAPES), strict=True):
        for output in ("ready", "fresh"):
            yield from cells_of(shapes, threads=threads, works=[work], output=output)


def data_cells(threads: int) -> Iterator[Cell]:
    """Images and tables as they come."""
    for shape in IMAGE_SHAPES:
        for output in ("ready", "fresh"):
            yield Cell(IMAGES, "NHWC", "uint8", shape, output, threads)
    yield from cells_of(TABLE_SHAPES, threads=threads, works=TABLES, output="fresh")


def row_cells(threads: int) -> Iterator[Cell]:
    """Rows along the last axis; one shape in bfloat16 too, if that is here."""
    yield from cells_of(LAYER_ROWS, threads=threads, works=OF_ROWS)
    for work in OF_ROWS:
        yield Cell(work, "NHWC", "float32", TOKENS, "ready", threads)
    yield from half_cells([HALF_ROWS], threads, HALVES[1:], OF_ROWS)


def awkward_cells() -> Iterator[Cell]:
    """All of one thread."""
    for shapes in AWKWARD.values():
        yield from cells_of(shapes, threads=1, works=(*WORKS, *GROUPED))


def quick_cells(threads: int) -> list[Cell]:
    """A look: a large, a cached and a small array, some variants, a few points of the series."""
    return [
        *cells_of(QUICK, threads=threads),
        *cells_of(QUICK_SERIES, threads=threads, works=IN_SERIES),
        *cells_of(QUICK[:1], threads=threads, works=FUSED),
        *half_cells(QUICK[:1], threads, HALVES[1:]),
        *cells_of(QUICK[:1], threads=threads, works=MASKED[:1]),
        *grouped_cells(QUICK[:1], LAYER_ROWS[:1], threads),
    ]
