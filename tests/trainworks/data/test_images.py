"""Images of every mode come out upright and in RGB, and what is no whole image is told."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from pictures import encode, picture
from PIL import Image

from trainworks.data.cache import table
from trainworks.data.images import ImageError, decoded, encoded, mask_values, sealed, size_of, unsealed

CORNER = np.zeros((6, 4, 3), np.uint8)
CORNER[:2, :2] = (250, 30, 10)


def rgb(content: bytes) -> np.ndarray:
    return np.asarray(decoded(content))


def test_an_image_in_rgb_comes_out_as_it_is() -> None:
    assert (rgb(encode(CORNER)) == CORNER).all()


def test_transparency_is_dropped_and_a_palette_looked_up() -> None:
    clear = Image.fromarray(CORNER).convert("RGBA")
    clear.putalpha(7)
    assert (rgb(encode(clear)) == CORNER).all()
    assert (rgb(encode(Image.fromarray(CORNER).quantize(4))) == CORNER).all()


def test_grey_is_repeated_and_of_sixteen_bits_the_upper_eight_are_kept() -> None:
    grey = np.array([[0, 300, 65_535]], np.uint16)
    assert rgb(encode(grey)).tolist() == [[[0] * 3, [1] * 3, [255] * 3]]
    assert rgb(encode((grey >> 8).astype(np.uint8))).tolist() == [[[0] * 3, [1] * 3, [255] * 3]]


def test_an_image_is_turned_upright_as_its_exif_says() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encode(CORNER, exif=exif)
    assert (rgb(turned) == np.rot90(CORNER, -1)).all()
    assert size_of(turned) == decoded(turned).size == (6, 4)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            encode(np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8), "jpeg")[:-900],
            "broken image",
        ),
        (b"<html>404</html>", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (encode(np.ones((2, 2), np.float32), "tiff"), "image of unknown range"),
    ],
)
def test_what_is_no_whole_image_is_told(content: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        decoded(content)


def test_an_image_that_would_fill_the_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ImageError, match="too large"):
        decoded(encode(CORNER))


def test_a_mask_holds_class_numbers_and_none_in_colours() -> None:
    numbers = np.array([[0, 1], [2, 300]], np.uint16)
    assert mask_values(encode(numbers)).tolist() == numbers.tolist()
    palette = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), mode="L").convert("P")
    palette.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0])
    assert mask_values(encode(palette)).tolist() == [[0, 1], [2, 1]]
    with pytest.raises(ImageError, match="mask in colours"):
        mask_values(encode(CORNER))


def test_cells_are_bytes_or_objects_or_paths(tmp_path) -> None:
    (tmp_path / "a.png").write_bytes(picture("red", 1))
    cells = [{"bytes": b"x", "path": None}, {"bytes": None, "path": str(tmp_path / "a.png")}, None]
    rows = Dataset.from_dict({"image": [*cells, {"bytes": None, "path": str(tmp_path / "b.png")}]})
    first, second, *others = encoded(rows, "image")
    assert (first, second) == (b"x", picture("red", 1))
    assert [other.reason for other in others] == ["no image", "image not found"]
    assert list(encoded(table({"image": pa.array([b"xy"])}), "image")) == [b"xy"]


def test_a_sealed_image_keeps_its_last_zeros_through_numpy() -> None:
    rows = table({"image": pa.array([sealed(b"a\0\0"), sealed(b"abcdef")], pa.binary())}).with_format("numpy")
    assert [unsealed(cell) for cell in rows[[0, 1]]["image"]] == [b"a\0\0", b"abcdef"]
