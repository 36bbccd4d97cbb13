"""Images as rows hold them, encoded, and as they are decoded: every mode to upright RGB, masks to class numbers."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trainworks.data.bad_rows import excerpt
from trainworks.errors import DataError, LaunchError

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image

__all__ = [
    "IMAGE_ENDINGS",
    "ImageError",
    "decoded",
    "encoded",
    "mask_values",
    "processor_digest",
    "sealed",
    "size_of",
    "unsealed",
]

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
"""Endings of the files that are taken for images; what they hold decides how they are read."""
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""What Pillow may open: no format among them starts another program, as EPS does."""
_SEAL = b"."


class ImageError(DataError):
    """An image that cannot be used; `reason` is the kind of mistake, `mend` what to do about it."""

    def __init__(self, reason: str, mend: str, found: str = "") -> None:
        super().__init__(f"{reason}; {mend}")
        self.reason, self.mend, self.found = reason, mend, found


def sealed(content: bytes) -> bytes:
    """Return an image's bytes as a prepared row keeps them: numpy takes zeros off the end of bytes, so a sign is put
    there."""
    return content + _SEAL


def unsealed(cell: bytes) -> bytes:
    """Return the bytes that were sealed."""
    return bytes(cell)[: -len(_SEAL)]


def encoded(rows: Dataset, column: str) -> Iterator[bytes | ImageError]:
    """Yield the encoded bytes of a column of images, or what keeps one from being read.

    A cell is bytes, or an object with `bytes`, or a `path` to a file where those are null, as `datasets` has them.
    """
    for cell in rows.select_columns([column]).with_format("arrow")[:].column(column):
        yield _bytes_of(cell.as_py())


def _bytes_of(cell: bytes | Mapping[str, Any] | None) -> bytes | ImageError:
    content: bytes | None = cell["bytes"] if isinstance(cell, Mapping) else cell
    if content is None and isinstance(cell, Mapping) and cell["path"]:
        try:
            content = Path(cell["path"]).read_bytes()
        except OSError as error:
            return ImageError("image not found", "put the file there", excerpt(f"{cell['path']}: {error.strerror}"))
    return content or ImageError("no image", "give every row an image")


def decoded(content: bytes) -> Image:
    """Return an image upright (as its EXIF orientation says) and in RGB, as transformers' own `load_image` does.

    Transparency is dropped, grey repeated three times, a palette looked up; of 16 bits the upper eight are kept, and of
    several frames the first. ImageError for what is no whole image.
    """
    from PIL import Image

    image = _opened(content)
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min(initial=0) < 0 or values.max(initial=0) > 2**16 - 1:
            raise ImageError("image of unknown range", "save it with 8 or 16 bits a channel", "32-bit grey")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    if image.mode == "F":
        raise ImageError("image of unknown range", "save it with 8 or 16 bits a channel", "floating-point grey")
    return image.convert("RGB")


def mask_values(content: bytes) -> NDArray[np.int64]:
    """Return the numbers that a mask holds, [height, width]; of a palette, the places in it. ImageError for an image in
    colours, which names no classes."""
    image = _opened(content)
    if image.mode not in ("1", "L", "P") and not image.mode.startswith("I"):
        mend = "save it with one channel, whose values are the classes' numbers"
        raise ImageError("mask in colours", mend, f"mode {image.mode}")
    values: NDArray[np.int64] = np.asarray(image).astype(np.int64)
    return values


def size_of(content: bytes) -> tuple[int, int]:
    """Return an image's width and height once it is upright, from its head alone."""
    image = _opened(content, whole=False)
    sideways = image.getexif().get(0x0112, 1) >= 5  # the EXIF orientations that turn by 90 degrees
    return (image.height, image.width) if sideways else image.size


def _opened(content: bytes, *, whole: bool = True) -> Image:
    pillow = _pillow()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", pillow.Image.DecompressionBombWarning)
            image: Image = pillow.Image.open(io.BytesIO(content), formats=_FORMATS)
            if whole:
                image.load()
                pillow.ImageOps.exif_transpose(image, in_place=True)
            return image
    except (pillow.Image.DecompressionBombWarning, pillow.Image.DecompressionBombError) as error:
        raise ImageError("image too large", "make it smaller", excerpt(str(error))) from error
    except pillow.UnidentifiedImageError as error:
        raise ImageError("not an image", f"there may be: {', '.join(_FORMATS)}", excerpt(repr(content[:16]))) from error
    # What Pillow's decoders raise for files that are cut off or altered.
    except (OSError, SyntaxError, ValueError, TypeError, IndexError, EOFError, struct.error, zlib.error) as error:
        raise ImageError("broken image", "fetch or write it again", excerpt(str(error))) from error


def _pillow() -> Any:
    try:
        import PIL
        from PIL import Image, ImageOps  # noqa: F401
    except ImportError as error:
        raise LaunchError("reading images needs Pillow: pip install 'trainworks[vision]'") from error
    return PIL


def processor_digest(processor: Any) -> str:
    """Return a SHA-256 of all that decides what an image processor makes of an image."""
    from trainworks.data.cache import digest

    return digest(processor.to_json_string())
