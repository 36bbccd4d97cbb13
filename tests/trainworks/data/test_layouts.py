"""Folders of images are read as people lay them out, and what is wrong in them is named by its file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from pictures import encode, instances, picture, scene

from trainworks.data.sources import Rows, read
from trainworks.errors import DataError
from trainworks.reading import Data


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINWORKS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


def put(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def load(root: Path, layout: str, **said: object) -> Rows:
    return read(Data(source=str(root), layout=layout, **said), seed=0)


def classes(root: Path, split: str, number: int) -> None:
    for colour in ("red", "green"):
        for each in range(number):
            put(root / split / colour / f"{each}.png", picture(colour, each))


def test_class_folders_are_read_with_their_splits(root: Path) -> None:
    classes(root, "train", 3)
    classes(root, "val", 1)
    rows = load(root, "class-folders", validation=("val",))
    assert rows.train["label"][:] == ["green"] * 3 + ["red"] * 3
    assert rows.train[0]["image"] == {"bytes": picture("green", 0), "path": "train/green/0.png"}
    assert rows.origins["train"].at(4).file == str(root / "train/red/1.png")
    assert rows.validation is not None
    assert len(rows.validation) == 2


def test_a_folder_without_splits_is_one(root: Path) -> None:
    classes(root, ".", 3)
    rows = load(root, "class-folders", holdout=0.0)
    assert len(rows.train) == 6
    (root / "test").mkdir()
    with pytest.raises(DataError, match="test would be trained on"):
        load(root, "class-folders")


def test_the_same_images_have_the_same_fingerprint_wherever_they_lie(root: Path, tmp_path: Path) -> None:
    classes(root, "train", 2)
    classes(tmp_path / "other", "train", 2)
    first, second = (load(place, "class-folders", holdout=0.0) for place in (root, tmp_path / "other"))
    assert first.fingerprint == second.fingerprint
    put(tmp_path / "other/train/red/0.png", picture("red", 9))
    assert load(tmp_path / "other", "class-folders", holdout=0.0).fingerprint != first.fingerprint


def test_what_does_not_belong_in_class_folders_is_named(root: Path) -> None:
    classes(root, "train", 1)
    (root / "train/blue").mkdir()
    put(root / "train/red/notes.txt", "x")
    put(root / "train/.hidden.png", "x")
    put(root / "train/lost.png", picture("red", 1))
    with pytest.raises(DataError) as error:
        load(root, "class-folders")
    for said in ("blue: empty class folder", "notes.txt: not an image", "lost.png: image of no class"):
        assert said in str(error.value)
    assert "hidden" not in str(error.value)
    rows = load(root, "class-folders", bad_rows="skip", holdout=0.0)
    assert rows.dropped["train"] == {"empty class folder": 1, "not an image": 1, "image of no class": 1}


def voc(root: Path, name: str, seed: int, objects: str | None = None) -> None:
    image, boxes, colours = scene(seed)
    corners = [(left, top, left + width, top + height) for left, top, width, height in boxes]
    tags = ("xmin", "ymin", "xmax", "ymax")
    said = objects or "".join(
        f"<object><name>{colour}</name><bndbox>"
        + "".join(f"<{tag}>{value}</{tag}>" for tag, value in zip(tags, sides, strict=True))
        + "</bndbox></object>"
        for sides, colour in zip(corners, colours, strict=True)
    )
    put(root / f"Annotations/{name}.xml", f"<annotation><filename>{name}.png</filename>{said}</annotation>")
    put(root / f"JPEGImages/{name}.png", encode(image))


def test_pascal_voc_is_read_by_its_lists(root: Path) -> None:
    for number in range(4):
        voc(root, f"img{number}", number)
    put(root / "ImageSets/Main/train.txt", "img0 1\nimg2 1\n")
    put(root / "ImageSets/Main/val.txt", "img1\n")
    rows = load(root, "voc", validation=("val",))
    assert len(rows.train) == 2
    assert rows.train[1]["objects"]["bbox"] == scene(2)[1]
    assert rows.train[1]["objects"]["category"] == scene(2)[2]
    assert rows.origins["train"].at(1).file == str(root / "Annotations/img2.xml")


@pytest.mark.parametrize(
    ("objects", "said"),
    [
        ("<object><name>red</name></object>", "no bndbox/xmin"),
        ("<object>", "mismatched tag"),
        ("<!DOCTYPE x>", "a document type"),
    ],
)
def test_a_broken_annotation_is_named(root: Path, objects: str, said: str) -> None:
    voc(root, "a", 0)
    voc(root, "b", 1, objects)
    with pytest.raises(DataError, match=rf"b.xml: broken annotation, {said}"):
        load(root, "voc")
    assert len(load(root, "voc", bad_rows="skip", holdout=0.0).train) == 1


def test_an_image_that_is_missing_or_outside_is_named(root: Path) -> None:
    voc(root, "a", 0)
    voc(root, "b", 1)
    (root / "JPEGImages/b.png").unlink()
    with pytest.raises(DataError, match=r"b.xml: .*image missing"):
        load(root, "voc")
    put(root.parent / "secret.png", picture("red", 0))
    put(root / "Annotations/b.xml", "<annotation><filename>../../secret.png</filename></annotation>")
    with pytest.raises(DataError, match="leads out of"):
        load(root, "voc")


def coco(root: Path, name: str, seeds: list[int]) -> None:
    scenes = {seed: scene(seed) for seed in seeds}
    names = ["red", "green", "blue"]
    for seed, (image, _, _) in scenes.items():
        put(root / f"images/{seed}.png", encode(image))
    told = {
        "images": [{"id": seed, "file_name": f"{seed}.png", "width": 48, "height": 32} for seed in seeds],
        "categories": [{"id": 7 + number, "name": colour} for number, colour in enumerate(names)],
        "annotations": [
            {"id": 1, "image_id": seed, "bbox": box, "category_id": 7 + names.index(colour), "iscrowd": 0}
            for seed, (_, boxes, colours) in scenes.items()
            for box, colour in zip(boxes, colours, strict=True)
        ],
    }
    put(root / name, json.dumps(told))


def test_coco_is_read_by_the_names_of_its_files(root: Path) -> None:
    coco(root, "annotations/instances_train2017.json", [1, 2, 3])
    coco(root, "annotations/instances_val2017.json", [4])
    rows = load(root, "coco", validation=("val",))
    assert [row["objects"]["bbox"] for row in rows.train] == [scene(seed)[1] for seed in (1, 2, 3)]
    assert [row["objects"]["category"] for row in rows.train] == [scene(seed)[2] for seed in (1, 2, 3)]
    assert rows.origins["train"].at(2).row == 2
    with pytest.raises(DataError, match=r"no split 'dev'; there are: annotations/instances_train2017.json"):
        load(root, "coco", validation=("dev",))


def test_json_that_is_not_cocos_is_refused(root: Path) -> None:
    put(root / "a.json", '{"images": []}')
    with pytest.raises(DataError, match="not COCO's JSON"):
        load(root, "coco")


def test_yolo_is_read_in_pixels_and_a_missing_file_is_no_box(root: Path) -> None:
    names = ["red", "green", "blue"]
    for seed in (1, 2):
        image, boxes, colours = scene(seed)
        put(root / f"images/train/{seed}.png", encode(image))
        lines = [
            f"{names.index(colour)} {(left + width / 2) / 48} {(top + height / 2) / 32} {width / 48} {height / 32}"
            for (left, top, width, height), colour in zip(boxes, colours, strict=True)
        ]
        put(root / f"labels/train/{seed}.txt", "\n".join(lines))
    put(root / "images/train/3.png", picture("red", 1))
    put(root / "data.yaml", yaml.safe_dump({"names": names, "train": "images/train"}))
    rows = load(root, "yolo", holdout=0.0)
    for row, seed in zip(rows.train, (1, 2), strict=False):
        assert row["objects"]["bbox"] == [pytest.approx(box) for box in scene(seed)[1]]
        assert row["objects"]["category"] == scene(seed)[2]
    assert rows.train[2]["objects"]["bbox"] == []
    put(root / "labels/train/2.txt", "0 0.5 0.5 0.1 0.1\n9 0.5 0.5 0.1 0.1\nred 1\n")
    with pytest.raises(DataError) as error:
        load(root, "yolo")
    assert "2.txt:2: " in str(error.value)
    assert "2.txt:3: " in str(error.value)
    assert len(load(root, "yolo", holdout=0.0, bad_rows="skip").train) == 2


def test_masks_stand_beside_their_images(root: Path) -> None:
    for split, seeds in {"train": (1, 2), "test": (3,)}.items():
        for seed in seeds:
            image, mask = instances(seed)
            put(root / f"{split}/images/{seed}.png", image)
            put(root / f"{split}/instances/{seed}.png", mask)
    rows = load(root, "masks", validation=("test",))
    assert rows.train[1]["mask"] == {"bytes": instances(2)[1], "path": "train/instances/2.png"}
    (root / "train/instances/2.png").unlink()
    with pytest.raises(DataError, match=r"2.png: .*image without a mask"):
        load(root, "masks", validation=("test",))


def test_many_images_are_read_by_way_of_the_cache(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classes(root, "train", 4)
    whole = load(root, "class-folders", holdout=0.0)
    put(root / "train/red/again.png", picture("red", 0))
    (root / "train/red/again.png").unlink()
    monkeypatch.setattr("trainworks.data.files.IN_MEMORY", 5_000)
    monkeypatch.setattr("trainworks.data.layouts.reading._CHUNK_ROWS", 2)
    for _ in range(2):
        mapped = load(root, "class-folders", holdout=0.0)
        assert mapped.fingerprint == whole.fingerprint
        assert mapped.origins["train"].at(5).file == whole.origins["train"].at(5).file
    assert list((root.parent / "cache/files").glob("*/files.json"))


def test_images_without_a_layout_are_told_of_it(root: Path) -> None:
    classes(root, "train", 1)
    with pytest.raises(DataError, match=r"say how they are laid out: data\.layout"):
        load(root, "rows")
    with pytest.raises(DataError, match=r"data\.layout: voc is of one"):
        read(Data(source="some/thing", layout="voc"), seed=0)
