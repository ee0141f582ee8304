"""From a request's body to checked images. What is wrong with it is told, with a 4xx."""

from __future__ import annotations

import asyncio
import io
from math import prod
from threading import Lock
from typing import Any

import msgspec
import numpy as np
from network import BRIGHTEST, SIDE, Array
from numpy.lib import format as npy
from starlette.exceptions import HTTPException
from starlette.requests import Request

MAX_BYTES = 1 << 20
MAX_IMAGES = 256
MAX_SECONDS = 10.0  # until a body is here

SHAPES = f"({SIDE}, {SIDE}) or ({SIDE * SIDE},)"
JSON_EXPECTED = '{"images": [...]}, each image 64 numbers or 8 rows of 8, from 0 to 16'
NPY_EXPECTED = "what numpy.save writes for an array of numbers, of shape (n, 8, 8) or (n, 64)"


class Images(msgspec.Struct, forbid_unknown_fields=True):
    """A JSON body."""

    images: list[list[float | list[float]]]


# numpy reads headers with Python's parser, which up to 3.12 counts its depth for all threads
# together, and fails where they take turns (gh-106905).
PARSING = Lock()
DECODER = msgspec.json.Decoder(Images)


async def read(request: Request) -> bytes:
    """The body. Its bytes are counted as they come, whatever their number was said to be."""
    body = bytearray()
    try:
        async with asyncio.timeout(MAX_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BYTES:
                    raise HTTPException(
                        413,
                        f"the body has more than {MAX_BYTES} bytes, the most that is read; "
                        "send fewer images at a time",
                    )
    except TimeoutError:
        raise HTTPException(
            408,
            f"{len(body)} bytes of the body came in {MAX_SECONDS:g} seconds, expected all of it; "
            "send it again",
        ) from None
    return bytes(body)


def from_json(body: bytes) -> Array:
    """The images of a JSON body."""
    try:
        nested = DECODER.decode(body).images
    except msgspec.ValidationError as error:
        raise HTTPException(422, f"the JSON does not fit: {error}; send {JSON_EXPECTED}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise HTTPException(400, f"the body is no JSON: {error}; send {JSON_EXPECTED}") from None
    try:
        return checked(np.array(nested, np.float64))
    except ValueError:
        raise HTTPException(
            422, f"the images differ in shape, expected all {SHAPES}; send {JSON_EXPECTED}"
        ) from None


def from_npy(body: bytes) -> Array:
    """The images of an .npy file. What its header claims is checked before data are touched."""
    file = io.BytesIO(body)
    shape, fortran, dtype = _header(file)
    if dtype.kind not in "iuf":
        raise HTTPException(
            422, f"the array is of dtype {dtype}, expected integers or floats; convert it"
        )
    check_shape(shape)
    data, needed = len(body) - file.tell(), prod(shape) * dtype.itemsize
    if data != needed:
        raise HTTPException(
            400,
            f"the file has {data} bytes of data, expected {needed} for shape {shape} and dtype "
            f"{dtype}; send all of it and nothing else",
        )
    values: Array = np.frombuffer(body, dtype, offset=file.tell())
    return checked(values.reshape(shape, order="F" if fortran else "C"))


def _header(file: io.BytesIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, Fortran order and dtype."""
    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    try:
        version = npy.read_magic(file)
        if version not in readers:
            raise ValueError(f"its version is {version}, which is for structured dtypes")
        with PARSING:
            shape, fortran, dtype = readers[version](file)
    except Exception as error:  # a made-up header may fail anywhere in Python's own parser
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise HTTPException(400, f"the body is no .npy file: {told}; send {NPY_EXPECTED}") from None
    return tuple(int(n) for n in shape), fortran, dtype


def check_shape(shape: tuple[int, ...]) -> None:
    """Refuse what is no stack of images, or too high a one."""
    if len(shape) not in (2, 3) or shape[1:] not in ((SIDE, SIDE), (SIDE * SIDE,)):
        raise HTTPException(
            422, f"images has shape {shape}, expected images of shape {SHAPES}; reshape it"
        )
    if not 0 < shape[0] <= MAX_IMAGES:
        status = 413 if shape[0] else 422
        raise HTTPException(
            status, f"{shape[0]} images came, expected 1 to {MAX_IMAGES}; send as many at a time"
        )


def checked(images: Array) -> Array:
    """The images as (n, 8, 8), all pixels in range."""
    check_shape(images.shape)
    inside = (images >= 0) & (images <= BRIGHTEST)  # NaN is not
    if not inside.all():
        where = tuple(int(i) for i in np.argwhere(~inside)[0])
        raise HTTPException(
            422,
            f"images{list(where)} is {images[where]}, expected numbers from 0 to {BRIGHTEST}; "
            "scale the pixels",
        )
    return images.reshape(-1, SIDE, SIDE)
