"""From a folder of pictures to normalized batches: statistics of the set, then NCHW floats.

    python examples/images.py --output images.png

Without --folder the pictures are the two photographs that come with scikit-learn. They are cut into
squares of 224, as networks want them. Shown are the statistics of the set, what a batch has after
`Standardizer`, how long that takes beside the ways that are installed (NumPy always, cv2 and
albumentations perhaps), and a picture before and after.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_sample_images

import fastbn

Array = NDArray[Any]
SIDE, BATCH = 224, 32
SUFFIXES = {".jpg", ".jpeg", ".png"}


def pictures(folder: Path | None) -> Iterator[Array]:
    """(H, W, 3) arrays of bytes."""
    if folder is None:
        yield from load_sample_images().images
        return
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in SUFFIXES:
            picture = imread(path)
            if picture.dtype != np.uint8:  # matplotlib gives PNG as floats from 0 to 1
                picture = (picture * 255).round().astype(np.uint8)
            yield picture[..., :3] if picture.ndim == 3 else np.stack([picture] * 3, -1)


def squares(picture: Array) -> Array:
    """All whole squares of a picture, (N, SIDE, SIDE, 3)."""
    rows, columns = picture.shape[0] // SIDE, picture.shape[1] // SIDE
    cut = picture[: rows * SIDE, : columns * SIDE].reshape(rows, SIDE, columns, SIDE, 3)
    return cut.swapaxes(1, 2).reshape(-1, SIDE, SIDE, 3)


def ways(one: fastbn.Standardizer, images: Array) -> dict[str, Callable[[], Any]]:
    """Each way to a normalized NCHW batch that is installed."""
    mean, std = (a.astype(np.float32) for a in (one.mean, one.std))
    ready = one(images)

    def by_numpy() -> Array:
        y = (images.astype(np.float32) / 255 - mean) / std
        return np.ascontiguousarray(y.transpose(0, 3, 1, 2))

    found: dict[str, Callable[[], Any]] = {
        "fastbn.Standardizer": lambda: one(images),
        "fastbn.Standardizer, out=": lambda: one(images, out=ready),
        "NumPy expressions": by_numpy,
    }
    if cv2 := installed("cv2"):
        blob = {"scalefactor": 1 / 255, "mean": (mean * 255).tolist(), "swapRB": False}
        found["cv2.dnn.blobFromImages"] = lambda: (
            cv2.dnn.blobFromImages(list(images), **blob) / std[:, None, None]
        )
    if albumentations := installed("albumentations"):
        normalize = albumentations.Normalize(mean.tolist(), std.tolist())
        found["albumentations.Normalize"] = lambda: np.stack(
            [normalize(image=image)["image"].transpose(2, 0, 1) for image in images]
        )
    return found


def installed(name: str) -> Any:
    """A library, or None."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def milliseconds(call: Callable[[], Any], seconds: float) -> float:
    """The median of as many calls as fit."""
    call()
    taken, end = list[float](), perf_counter() + seconds
    while not taken or perf_counter() < end:
        start = perf_counter()
        call()
        taken.append(perf_counter() - start)
    return 1e3 * sorted(taken)[len(taken) // 2]


def draw(image: Array, standardized: Array, path: Path) -> None:
    """The picture as it came and as the network gets it, in gray by channel."""
    figure = Figure(figsize=(10, 3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 4)
    axes[0].imshow(image)
    axes[0].set_title("bytes, channels last")
    for axis, channel, name in zip(axes[1:], standardized, ("red", "green", "blue"), strict=True):
        axis.imshow(channel, cmap="gray", vmin=-2, vmax=2)
        axis.set_title(f"{name}: {channel.mean():+.2f} ± {channel.std():.2f}")
    for axis in axes:
        axis.set_axis_off()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="of .jpg or .png (default: two photographs)")
    parser.add_argument("--output", type=Path, default=Path("images.png"), help="the picture")
    parser.add_argument("--quick", action="store_true", help="measure for a moment only")
    arguments = parser.parse_args()
    console = Console()

    batches = [squares(picture) for picture in pictures(arguments.folder)]
    options: dict[str, Any] = {"divisor": 255, "layout": "NHWC", "out_layout": "NCHW"}
    one = fastbn.Standardizer.of(batches, **options)
    images = np.concatenate(batches)
    y = one(images)

    table = Table("", "red", "green", "blue", title=f"{len(images)} squares", box=box.SIMPLE)
    each: dict[str, Array] = {
        "mean of the set": one.mean,
        "deviation": one.std,
        "mean after": fastbn.moments(y).mean,
        "deviation after": np.sqrt(fastbn.moments(y).var),
    }
    for name, vector in each.items():
        table.add_row(name, *(f"{value:.4f}" for value in vector))
    console.print(table)

    some = np.resize(images, (BATCH, SIDE, SIDE, 3))
    table = Table("", "ms", title=f"{BATCH} squares to float32 by planes", box=box.SIMPLE)
    for name, call in ways(one, some).items():
        table.add_row(name, f"{milliseconds(call, 0.02 if arguments.quick else 1):.2f}")
    console.print(table)

    draw(images[0], y[0], arguments.output)
    console.print(f"Written: {arguments.output}", soft_wrap=True)


if __name__ == "__main__":
    main()
