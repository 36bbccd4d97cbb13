"""What tasks on images make of rows, good and bad, and what decides the numbers a model sees."""

from __future__ import annotations

from base64 import b64decode
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset, DatasetDict
from pictures import encode, picture, scene
from PIL import Image

import finetune
import model_cards
from trainworks import Data, ImageClassification, ObjectDetection, SemanticSegmentation, evaluate, read_record
from trainworks.config import load
from trainworks.data.augmentation import Augment, View, generator
from trainworks.data.bad_rows import BadRowsError
from trainworks.data.loading import Samples
from trainworks.errors import ConfigError, DataError
from trainworks.metrics import MeanIoU, PixelAccuracy
from trainworks.samples import prepare_sources, read_rows
from trainworks.tasks import TASKS

SPOILT = picture("red", 1)[:-40]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINWORKS_CACHE", str(tmp_path / "cache"))


def processor() -> Any:
    return tiny.processor("image-classification")


def prepared(task: str, rows: list[dict[str, Any]], tmp_path: Path, policy: str, **options: Any) -> Any:
    """Prepare a source's rows as a run does."""
    data = Data(source=DatasetDict(train=Dataset.from_list(rows)), holdout=0.0, bad_rows=policy)
    config = tiny.config(task, tmp_path, data, tmp_path / "run").model_copy(
        update={"task": tiny.TASKS[task](**options)}
    )
    (part,) = prepare_sources(config, read_rows(config), tiny.processor(task))
    return part


def test_a_broken_image_is_named_or_left_out_as_the_policy_says(tmp_path: Path) -> None:
    rows = tiny.rows("image-classification", 12)
    rows[3]["image"], rows[7]["image"] = SPOILT, b"no image at all"
    with pytest.raises(DataError) as error:
        prepared("image-classification", rows, tmp_path, "error")
    assert "row 3 (from 0), column 'image': broken image" in str(error.value)
    assert "row 7 (from 0), column 'image': not an image" in str(error.value)
    part = prepared("image-classification", rows, tmp_path, "skip")
    assert len(part.splits["train"].samples) == 10
    assert part.left_out("train") == {"broken image": 1, "not an image": 1}


def test_a_mask_must_suit_its_image(tmp_path: Path) -> None:
    rows = tiny.rows("semantic-segmentation", 6)
    rows[1]["mask"] = encode(np.zeros((9, 9), np.uint8))
    rows[2]["mask"] = encode(np.full((32, 48), 9, np.uint8))
    rows[3]["mask"] = encode(np.full((32, 48), 255, np.uint8))
    part = prepared("semantic-segmentation", rows, tmp_path, "skip", labels=("none", "red", "green", "blue"))
    assert part.left_out("train") == {
        "mask unlike its image": 1,
        "unknown class in mask": 1,
        "nothing to learn": 1,
    }
    facts = part.source.task.facts(part.splits["train"].samples)
    assert facts["counted"] == 3 * 32 * 48


def test_classes_of_masks_are_found_and_things_are_one_class() -> None:
    rows = Dataset.from_list(tiny.rows("semantic-segmentation", 8))
    assert SemanticSegmentation().resolve(rows).labels == ("0", "1", "2", "3")
    things = SemanticSegmentation(holds="instances").resolve(rows)
    assert things.labels == ("background", "foreground")
    assert SemanticSegmentation(reduce_labels=True).resolve(rows).labels == ("0", "1", "2")


def test_a_broken_box_is_left_out_and_its_image_stays(tmp_path: Path) -> None:
    rows = tiny.rows("object-detection", 5)
    rows[2]["objects"] = {
        "bbox": [[1.0, 1.0, 0.0, 5.0], [100.0, 1.0, 5.0, 5.0], [40.0, 20.0, 30.0, 30.0], [1.0, 1.0, float("nan"), 1.0]],
        "category": ["red", "red", "green", "red"],
    }
    with pytest.raises(
        DataError, match=r"row 2 .*box of no size, thing 0 \(from 0\); found red at \[1.0, 1.0, 0.0, 5.0\]"
    ):
        prepared("object-detection", rows, tmp_path, "error")
    part = prepared("object-detection", rows, tmp_path, "skip")
    samples = part.splits["train"].samples
    assert len(samples) == 5
    assert samples[2]["boxes"] == [[40.0, 20.0, 48.0, 32.0]], "what reaches over the edge is cut there"
    assert part.left_out("train") == {"box of no size": 1, "box outside the image": 1, "box of no four numbers": 1}


def test_things_are_read_from_lists_of_objects_and_other_names() -> None:
    image, boxes, colours = scene(3)
    things = [
        {"where": [left, top, left + width, top + height], "what": colour}
        for (left, top, width, height), colour in zip(boxes, colours, strict=True)
    ]
    rows = Dataset.from_list([{"image": encode(image), "objects": things}])
    task = ObjectDetection(box="where", category="what", boxes="xyxy").resolve(rows)
    assert task.labels == tuple(sorted(set(colours)))
    samples = task.prepare(rows, processor()).samples
    assert samples[0]["boxes"] == [thing["where"] for thing in things]
    with pytest.raises(DataError, match=r"task\.box, task\.category"):
        ObjectDetection(box="bbox", category="what").resolve(rows)


def test_an_image_and_its_boxes_are_viewed_alike() -> None:
    image, boxes, _ = scene(5)
    corners = np.array([[left, top, left + width, top + height] for left, top, width, height in boxes], np.float32)
    from PIL import Image

    drawn = np.zeros(image.shape[:2], np.uint8)
    for left, top, right, bottom in corners.astype(int):
        drawn[top:bottom, left:right] = 255
    view = View(4, 2, 40, 28, mirrored=True)
    seen = np.asarray(view.of(Image.fromarray(drawn)))
    again = np.zeros_like(seen)
    for left, top, right, bottom in view.boxes(corners)[0].astype(int):
        again[top:bottom, left:right] = 255
    assert seen.shape == (28, 40)
    assert (seen == again).all()


def test_what_is_drawn_depends_on_the_seed_alone() -> None:
    varied = Augment(crop=0.3, flip=True, colour=0.3)
    views = [varied.view((300, 200), generator(seed)) for seed in range(200)]
    assert views == [varied.view((300, 200), generator(seed)) for seed in range(200)]
    shares = [view.width * view.height / 60_000 for view in views]
    assert 0.28 < min(shares) < 0.4
    assert 80 < sum(view.mirrored for view in views) < 120
    assert all(0 <= view.left <= 300 - view.width and 0 <= view.top <= 200 - view.height for view in views)


def test_evaluation_sees_the_whole_image() -> None:
    task = ImageClassification(labels=("blue", "green", "red"), augment=tiny.OPTIONS["image-classification"]["augment"])
    rows = Dataset.from_list([{"image": picture("red", 1), "label": "red"}])
    samples = task.prepare(rows, processor()).samples.with_format("numpy")[:]
    row = {name: values[0] for name, values in samples.items()} | {"seed": 7}
    row["partner"] = dict(row)
    plain = task.collate([row], processor(), train=False)["pixel_values"]
    assert torch.equal(plain, task.collate([row | {"seed": 8}], processor(), train=False)["pixel_values"])
    assert not torch.equal(plain, task.collate([row], processor(), train=True)["pixel_values"])


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_a_mixed_image_is_taught_both_classes_by_their_shares(kind: str) -> None:
    task = ImageClassification(labels=("blue", "green", "red"), augment={kind: 1.0})
    rows = Dataset.from_list(
        [
            {"image": encode(np.full((24, 24, 3), tone, np.uint8)), "label": label}
            for tone, label in ((0, "blue"), (255, "red"))
        ]
    )
    columns = task.prepare(rows, processor()).samples.with_format("numpy")[:]
    black, white = ({name: values[place] for name, values in columns.items()} for place in (0, 1))
    given = [black | {"seed": seed, "partner": white} for seed in range(6)]
    batch = task.collate(given, processor(), train=True)
    assert batch["labels"].tolist() == [0] * 6
    assert batch["other_labels"].tolist() == [2] * 6
    share_of_white = (batch["pixel_values"].mean((1, 2, 3)) + 1) / 2
    torch.testing.assert_close(share_of_white, 1 - batch["share"], atol=1e-5, rtol=0)
    assert batch["share"].std() > 0.05


def test_mean_iou_is_a_direct_computation_over_all_pixels() -> None:
    task = SemanticSegmentation(labels=("none", "red", "green", "blue"), ignore=3)
    rows = Dataset.from_list(tiny.rows("semantic-segmentation", 5))
    samples = task.prepare(rows, processor()).samples.with_format("numpy")[:]
    given = [{name: values[place] for name, values in samples.items()} | {"seed": 0} for place in range(5)]
    batch = task.collate(given, processor(), train=False) | {"index": torch.arange(5)}
    logits = torch.randn(5, 4, 6, 6)
    model = lambda pixel_values: type("Output", (), {"logits": logits})  # noqa: E731
    predictions = [*task.predict(model, batch, processor()).values()]  # type: ignore[arg-type]

    said = torch.nn.functional.interpolate(logits, size=(32, 48), mode="bilinear").argmax(1).flatten().numpy()
    truth = batch["masks"].flatten().numpy()
    said, truth = said[truth >= 0], truth[truth >= 0]
    ious = [((said == kind) & (truth == kind)).sum() / ((said == kind) | (truth == kind)).sum() for kind in range(4)]
    metric = MeanIoU()
    assert metric.value(metric.statistics(predictions)) == pytest.approx(np.mean(ious), abs=1e-12)
    accuracy = PixelAccuracy()
    assert accuracy.value(accuracy.statistics(predictions)) == pytest.approx((said == truth).mean(), abs=1e-12)


def test_frozen_batch_norm_stays_as_it_is_in_training() -> None:
    from transformers import ResNetConfig, ResNetForImageClassification

    from trainworks.run import Step

    model = ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], num_labels=2))
    images = torch.randn(4, 3, 32, 32)
    step = Step(model, ImageClassification(labels=("a", "b")), None).train()
    given = {"pixel_values": images, "labels": torch.tensor([0, 1, 0, 1])}
    whole = step(given)["loss"]
    apart = torch.cat(
        [step({name: values[place : place + 1] for name, values in given.items()})["loss"] for place in range(4)]
    )
    torch.testing.assert_close(whole, apart)
    live = Step(model, ImageClassification(labels=("a", "b"), batch_norm="live"), None).train()
    assert not torch.allclose(live(given)["loss"], whole)


def test_an_image_processor_of_another_size_is_refused() -> None:
    from transformers import ViTConfig, ViTForImageClassification

    model = ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=1))
    with pytest.raises(ConfigError, match="images of 24 x 24 pixels, and the model takes 32"):
        ImageClassification(labels=("a", "b")).suits(model, processor())


def test_a_detector_whose_loss_is_not_known_is_refused_by_name() -> None:
    from transformers import DFineConfig, DFineForObjectDetection

    with torch.device("meta"):
        model = DFineForObjectDetection(DFineConfig())
    with pytest.raises(ConfigError, match=r"DFineForObjectDetection has a loss .* not known here; known are ForObject"):
        ObjectDetection(labels=("a", "b")).suits(model, processor())


def test_the_blood_cells_boxes_of_no_size_are_named_by_file(shared_data: Path, tmp_path: Path) -> None:
    data = Data(source=str(shared_data / "det_bccd"), layout="voc", validation=("val",))
    config = tiny.config("object-detection", tmp_path, data, tmp_path / "run")
    with pytest.raises(BadRowsError, match=r"BloodImage_\d+\.xml: row 0 .*box of no size") as error:
        prepare_sources(config, read_rows(config), tiny.processor("object-detection"))
    assert len(error.value.problems) == 1
    lenient = config.model_copy(update={"data": data.model_copy(update={"bad_rows": "skip"})})
    (part,) = prepare_sources(lenient, read_rows(lenient), tiny.processor("object-detection"))
    assert [len(part.splits[name].samples) for name in ("train", "validation")] == [60, 30]
    assert [part.left_out(name) for name in ("train", "validation")] == [{"box of no size": 1}] * 2


def test_rows_are_paired_by_their_seeds() -> None:
    from trainworks.data.loading import _Fetched
    from trainworks.data.order import Key
    from trainworks.data.packing import alone

    rows = Dataset.from_dict({"labels": list(range(50))}).with_format("numpy")
    fetched = _Fetched(Samples(rows, alone(50), paired=True), seed=3)
    together = [row["partner"]["labels"] for row in fetched.__getitems__([Key(number, 0, 1.0) for number in range(50)])]
    apart = [fetched[Key(number, 0, 1.0)][0]["partner"]["labels"] for number in range(50)]
    assert together == apart
    assert len(set(together)) > 20


def test_a_task_on_images_from_scratch_wants_an_image_processor(tmp_path: Path) -> None:
    import pretrain

    file = tmp_path / "run.yaml"
    file.write_text(
        "output: run\ntask: {type: masked-image}\nmodel: {architecture: vit_mae, sizes: {}, tokenizer: x}\n"
        "data: {source: x}\nbatch: {per_step: 4}\nbudget: {steps: 1}\noptim: {lr: 1e-3}\n"
    )
    with pytest.raises(ConfigError, match=r"needs model\.image_processor"):
        load(file, model=pretrain.Config)


@pytest.mark.parametrize("name", sorted(name for name, task in TASKS.items() if task.reads == "image_processor"))
def test_held_out_images_are_drawn_with_what_is_there_and_what_the_model_says(name: str, tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "model", name)
    data = tiny.save_rows(tmp_path / "rows.parquet", name, 30)
    run = finetune.prepare(tiny.config(name, tmp_path / "model", data, tmp_path / "run"))
    older, report = evaluate(run, "step 1"), evaluate(run)
    assert len(report.samples) == 4
    assert all(bool(sample.reference) == bool(sample.output) == (name != "masked-image") for sample in report.samples)
    for sample in report.samples:
        image = Image.open(BytesIO(b64decode(sample.picture)))
        left, right = np.asarray(image)[:256, :200], np.asarray(image)[:256, -220:-20]
        assert image.width > 400
        assert left.std() > 5, "the image is there"
        assert right.std() > 5
    kept = {each.name: [bool(sample.picture) for sample in each.samples] for each in run.record.reports}
    assert kept == {older.name: [False] * 4, report.name: [True] * 4}
    run.record.model_copy(update={"status": "complete"}).write(tmp_path)
    card = model_cards.build(read_record(tmp_path))
    card.save(tmp_path / "card")
    assert {path.name for path in (tmp_path / "card").glob("*.jpg")} == {f"example-{n}.jpg" for n in range(1, 5)}
    assert "![Left: what is wanted. Right: what the model said](example-1.jpg)" in str(card)
    assert card._repr_markdown_().count("](data:image/jpeg;base64,") == 4
    assert not model_cards.lint(card)


def test_what_is_said_is_worded_as_what_is_there() -> None:
    found = ObjectDetection(labels=("cell", "plate")).worded({"kinds": torch.tensor([[1, 0, -1, 0]])}, 0)
    assert found == "2 cell, 1 plate"
    assert ObjectDetection(labels=("cell",)).worded({"kinds": torch.tensor([[-1]])}, 0) == "nothing"
    mask = torch.tensor([[[0, 0, 0], [2, 2, -100]]])
    assert SemanticSegmentation(labels=("a", "b", "c")).worded({"labels": mask}, 0) == "a 50.0%, c 33.3%"
