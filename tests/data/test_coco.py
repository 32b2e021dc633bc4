"""CocoData: what becomes of records and images, and what it says about those that cannot be used."""
import json

import numpy as np
import pytest
import torch
from pycocotools import mask as rle
from pycocotools.coco import COCO
from torchvision import tv_tensors

from visionattn.data import CocoData
from visionattn.data.dense_transforms import detection_transform

from .images import coco_content, truncate, write_image

SMALL = dict(
    train_images="images", train_annotations="train.json", val_images="images", val_annotations="val.json",
    batch_size=3, num_workers=0, masks=True)


@pytest.fixture
def content(tmp_path):
    return coco_content(tmp_path / "images")


def _make(root, content, stage="fit", train=None, **kwargs):
    (root / "val.json").write_text(json.dumps(content))
    (root / "train.json").write_text(json.dumps(train or content))
    data = CocoData(str(root), **SMALL | kwargs)
    data.setup(stage)
    return data


def _evaluated(data):
    return next(iter(data.val_dataloader()))


def test_categories_become_labels(tmp_path, content):
    data = CocoData(str(tmp_path), **SMALL) if _make(tmp_path, content) else None
    assert (data.num_classes, data.class_names, data.category_ids) == (2, ["cat", "dog"], [12, 30])


def test_evaluation_batch(tmp_path, content):
    images, targets = _evaluated(_make(tmp_path, content))
    assert [image.shape for image in images] == [(3, 36, 40)] * 3
    assert images[0].dtype == torch.float32
    assert type(images[0]) is type(targets[0]["boxes"]) is type(targets[0]["masks"]) is torch.Tensor
    assert [target["image_id"] for target in targets] == [5, 7, 9]
    assert [target["file_name"] for target in targets] == ["5.png", "7.png", "9.png"]
    assert [target["labels"].tolist() for target in targets] == [[2, 1], [1, 2], []]
    assert targets[0]["boxes"].tolist() == [[4, 6, 14, 14], [20, 10, 32, 30]]
    assert targets[0]["area"].tolist() == [77.5, 240]  # the file's, and the mask's where it has none
    assert targets[1]["iscrowd"].tolist() == [1, 0]
    assert targets[0]["orig_size"].tolist() == [36, 40]
    empty = targets[2]
    assert (empty["boxes"].shape, empty["boxes"].dtype) == ((0, 4), torch.float32)
    assert (empty["masks"].shape, empty["masks"].dtype) == ((0, 36, 40), torch.uint8)
    assert empty["labels"].dtype == empty["iscrowd"].dtype == torch.int64


def test_masks_are_those_of_pycocotools(tmp_path, content):
    rng = np.random.default_rng(0)
    blob = np.asfortranarray(rng.random((36, 40)) > 0.5).astype(np.uint8)
    code = rle.encode(blob)
    content["annotations"][1]["segmentation"] = {"size": code["size"], "counts": code["counts"].decode()}
    content["annotations"][0]["segmentation"] = [[4.3, 6.1, 13.7, 7, 9, 14.2], [20, 20, 30.5, 20, 30, 29]]
    _, targets = _evaluated(_make(tmp_path, content))
    theirs = COCO(str(tmp_path / "val.json"))
    for target in targets:
        for mask, number in zip(target["masks"], theirs.getAnnIds(target["image_id"]), strict=True):
            assert np.array_equal(mask.numpy(), theirs.annToMask(theirs.anns[number]))
    assert np.array_equal(targets[0]["masks"][1].numpy(), blob)
    assert targets[1]["masks"][0].sum() == 108


def test_without_masks_segmentations_are_not_read(tmp_path, content):
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    _, targets = _evaluated(_make(tmp_path, content, masks=False))
    assert "masks" not in targets[0]
    assert targets[0]["area"].tolist() == [77.5, 240]
    with pytest.raises(ValueError, match=r"val.json: annotation 1: it has no segmentation, but masks were asked for"):
        _make(tmp_path, content, stage="validate")


def test_training_leaves_crowds_out_and_keeps_empty_images(tmp_path, content):
    data = _make(tmp_path, content, hflip=0.0)
    images, targets = next(iter(data.train_dataloader()))
    by_id = {target["image_id"]: target for target in targets}
    assert set(by_id) == {5, 7, 9}
    assert by_id[7]["labels"].tolist() == [2]
    assert len(by_id[9]["boxes"]) == 0
    assert images[0].shape == (3, 36, 40)


def test_flip(tmp_path, content):
    plain = {target["image_id"]: (image, target) for image, target in zip(*_evaluated(_make(tmp_path, content)),
                                                                          strict=True)}
    images, targets = next(iter(_make(tmp_path, content, hflip=1.0).train_dataloader()))
    for image, target in zip(images, targets, strict=True):
        before, truth = plain[target["image_id"]]
        assert torch.equal(image.flip(-1), before)
        keep = truth["iscrowd"] == 0
        assert torch.equal(target["masks"].flip(-1), truth["masks"][keep])
        left, top, right, bottom = truth["boxes"][keep].unbind(1)
        assert torch.equal(target["boxes"], torch.stack([40 - right, top, 40 - left, bottom], 1))


def test_multi_scale(tmp_path, content):
    torch.manual_seed(0)
    data = _make(tmp_path, content, train_sizes=[72, 90], max_size=95, hflip=0.0)
    seen = set()
    for _ in range(6):
        for image, target in zip(*next(iter(data.train_dataloader())), strict=True):
            seen.add(tuple(image.shape[1:]))
            assert target["masks"].shape[1:] == image.shape[1:]
            if target["image_id"] == 5:
                zoom = image.shape[1] / 36
                torch.testing.assert_close(target["boxes"][0], zoom * torch.tensor([4., 6, 14, 14]), atol=0.5, rtol=0)
                assert target["area"].tolist() == [77.5, 240]
    assert seen == {(72, 80), (85, 95)}  # 90 x 100 pixels are more than max_size


def test_large_scale_jitter(tmp_path, content):
    torch.manual_seed(0)
    for index, (left, top) in ((0, (4, 6)), (3, (5, 5))):  # small enough to vanish
        content["annotations"][index] |= {
            "bbox": [left, top, 2, 2],
            "segmentation": [[left, top, left + 2, top, left + 2, top + 2, left, top + 2]],
        }
    loader = _make(tmp_path, content, large_scale_jitter=64).train_dataloader()
    counts = set()
    for epoch in range(20):
        loader.sampler.set_epoch(epoch)
        for image, target in zip(*next(iter(loader)), strict=True):
            assert image.shape == (3, 64, 64)
            count = len(target["boxes"])
            assert {len(target[key]) for key in ("labels", "masks", "area", "iscrowd")} == {count}
            assert target["masks"].shape == (count, 64, 64)
            assert (target["boxes"] >= 0).all()
            assert (target["boxes"] <= 64).all()
            assert (target["boxes"][:, 2:] - target["boxes"][:, :2] >= 1).all()
            for box, mask in zip(target["boxes"], target["masks"], strict=True):
                ys, xs = torch.nonzero(mask, as_tuple=True)
                if len(xs):  # the mask of a small object may be lost where its box is not
                    pixels = torch.stack([xs.min(), ys.min(), -1 - xs.max(), -1 - ys.max()])
                    assert (pixels >= torch.tensor([1, 1, -1, -1]) * box - 1.5).all()
            counts.add((target["image_id"], count))
    assert {(5, 2), (5, 1), (7, 1), (7, 0), (9, 0)} <= counts  # an image that lost its objects stays


def test_training_draws_depend_on_the_epoch(tmp_path, content):
    def batch(epoch):
        loader = _make(tmp_path, content, train_sizes=list(range(30, 60)), num_workers=1).train_dataloader()
        loader.sampler.set_epoch(epoch)
        return next(iter(loader))

    first, again, other = batch(0), batch(0), batch(1)
    assert all(map(torch.equal, first[0], again[0]))
    assert [image.shape for image in first[0]] != [image.shape for image in other[0]]


def test_testing_uses_the_validation_images_and_says_so(tmp_path, content, said):
    data = _make(tmp_path, content, stage="test")
    assert data.records["test"] == data.records["val"]
    assert "the validation images are used" in said.text
    assert len(next(iter(data.test_dataloader()))[0]) == 3


def test_test_annotations(tmp_path, content):
    (tmp_path / "test.json").write_text(json.dumps(content | {"images": content["images"][:1],
                                                              "annotations": content["annotations"][:2]}))
    data = _make(tmp_path, content, stage="test", test_annotations="test.json")
    assert [target["image_id"] for _, targets in data.test_dataloader() for target in targets] == [5]


def test_predict(tmp_path, content):
    data = _make(tmp_path, content, stage="predict")
    _, targets = next(iter(data.predict_dataloader()))
    assert [set(target) for target in targets] == [{"image_id", "file_name", "orig_size"}] * 3
    write_image(tmp_path / "inbox" / "deep" / "b.jpg", (30, 20))
    write_image(tmp_path / "inbox" / "a.png", (10, 12))
    data = _make(tmp_path, content, stage="predict", predict_root=str(tmp_path / "inbox"))
    images, targets = next(iter(data.predict_dataloader()))
    assert [target["file_name"] for target in targets] == ["a.png", "deep/b.jpg"]
    assert [target["orig_size"].tolist() for target in targets] == [[12, 10], [20, 30]]
    assert [image.shape for image in images] == [(3, 12, 10), (3, 20, 30)]


def test_degenerate_boxes_are_counted(tmp_path, content, said):
    content["annotations"][0]["bbox"] = [4, 6, 0, 8]
    content["annotations"][1]["bbox"] = [4, 6, 5, -1]
    _, targets = _evaluated(_make(tmp_path, content, stage="validate"))
    assert len(targets[0]["boxes"]) == 0
    assert "val.json: 2 boxes without width or height are left out" in said.text


def test_boxes_are_cut_by_a_pixel_without_a_word(tmp_path, content, said):
    content["annotations"][0]["bbox"] = [-0.5, 6, 41, 30.4]
    _, targets = _evaluated(_make(tmp_path, content, stage="validate"))
    assert targets[0]["boxes"][0].tolist() == [0, 6, 40, 36]
    assert "left out" not in said.text


def _annotation(**changes):
    return lambda content: content["annotations"][1].update(changes)


def _image(**changes):
    return lambda content: content["images"][1].update(changes)


FAULTS = {
    "outside": (_annotation(bbox=[50, 3, 10, 10]),
                r"annotation 2: its box lies outside the image \(bbox \[50, 3, 10, 10\], image 5.png of 40 x 36 pixel"),
    "across the edge": (_annotation(bbox=[20, 10, 30, 10]), "annotation 2: its box reaches out of the image"),
    "no box": (_annotation(bbox=[1, 2, 3]), "annotation 2: its bbox is not four numbers"),
    "infinite box": (_annotation(bbox=[1, 2, 3, float("inf")]), "annotation 2: its bbox is not four numbers"),
    "category": (_annotation(category_id=13), "annotation 2: its category is not in the list of categories "
                                              r"\(category_id 13, image 5.png"),
    "image": (_annotation(image_id=4), r"annotation 2: its image is not in the list of images \(image_id 4\)"),
    "mask size": (_annotation(segmentation={"size": [40, 36], "counts": [1440]}),
                  "annotation 2: its mask has another size than its image"),
    "mask runs": (_annotation(segmentation={"size": [36, 40], "counts": [1441]}),
                  "annotation 2: the runs of its mask do not add up"),
    "polygon": (_annotation(segmentation=[[1, 2, 3, 4]]), "annotation 2: .* polygon of less than three points"),
    "file": (_image(file_name="lost.png"), "image 7: the image file cannot be used .*lost.png: there is no such file"),
    "image size": (_image(width=39, height=35), "image 7: .*7.png: it is 40 x 36 pixels, not 39 x 35"),
    "no size": (_image(width=None), "image 7: an image needs a width and a height"),
    "no name": (_image(file_name=None), "image 7: an image needs an integer id and a file_name"),
    "two ids": (_image(id=5), "image 5: two images have this id"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_records_stop_or_are_counted(tmp_path, content, said, fault):
    change, message = FAULTS[fault]
    change(content)
    masks = fault != "image size"  # an RLE would be at fault first
    with pytest.raises(ValueError, match=rf"val.json: .*{message}") as raised:
        _make(tmp_path, content, stage="validate", masks=masks)
    assert "\n" not in str(raised.value)
    assert "on_error to skip" in str(raised.value)
    data = _make(tmp_path, content, stage="validate", on_error="skip", masks=masks)
    assert ("1 cut to it: its box" if fault == "across the edge" else "1 left out: ") in said.text
    _, targets = _evaluated(data)
    objects = {target["image_id"]: len(target["labels"]) for target in targets}
    if fault == "across the edge":
        assert objects == {5: 2, 7: 2, 9: 0}
        assert targets[0]["boxes"][1].tolist() == [20, 10, 40, 20]
    elif "annotation 2" in message:
        assert objects == {5: 1, 7: 2, 9: 0}
    else:
        assert objects == {5: 2, 9: 0}


def test_truncated_image(tmp_path, content, said):
    truncate(tmp_path / "images" / "7.png")
    data = _make(tmp_path, content)  # its header is whole
    with pytest.raises(ValueError, match=r"7.png cannot be read as an image: .*on_error to skip"):
        _evaluated(data)
    data = _make(tmp_path, content, on_error="skip")
    assert "1 left out: the image file cannot be used" in said.text
    assert [target["image_id"] for target in _evaluated(data)[1]] == [5, 9]


def test_unverified_images_are_named_when_loaded(tmp_path, content):
    content["images"][0]["width"] = 44
    data = _make(tmp_path, content, verify=False)
    with pytest.raises(ValueError, match=r"5.png is 40 x 36 pixels, but its record 5 says 44 x 36"):
        _evaluated(data)


def test_undecodable_mask_is_named(tmp_path, content):
    content["annotations"][1]["segmentation"] = {"size": [36, 40], "counts": "RP"}
    with pytest.raises(ValueError, match=r"annotation 2|5.png: the mask of object 2"):
        _evaluated(_make(tmp_path, content))


@pytest.mark.parametrize(("change", "message"), [
    (dict(images=[], annotations=[]), "lists no image that can be used"),
    (dict(annotations=[]), "has no object to train on"),
    (dict(categories=[{"id": 12, "name": "cat"}, {"id": 30, "name": "dog"}, {"id": 31, "name": "emu"}]),
     "different categories: 'emu' with id 31"),
    (dict(images=None), "has no list 'images'"),
])
def test_unusable_training_files(tmp_path, content, change, message):
    with pytest.raises(ValueError, match=rf"train.json.* {message}"):
        _make(tmp_path, content, train=content | change)


@pytest.mark.parametrize(("categories", "message"), [
    ([], "has no categories"), ([{"id": "x", "name": "cat"}], "a category needs an integer id and a name"),
    ([{"id": 1, "name": "cat"}, {"id": 1, "name": "dog"}], "two categories have the id 1: 'cat' and 'dog'"),
])
def test_unusable_categories(tmp_path, content, categories, message):
    with pytest.raises(ValueError, match=f"val.json.* {message}"):
        _make(tmp_path, content | {"categories": categories})


def test_missing_files(tmp_path, content):
    with pytest.raises(FileNotFoundError, match=r"annotation file .*val.json does not exist"):
        CocoData(str(tmp_path), **SMALL)
    with pytest.raises(FileNotFoundError, match=r"image folder .*nowhere does not exist"):
        _make(tmp_path, content, train_images="nowhere")
    (tmp_path / "val.json").write_text("{")
    with pytest.raises(ValueError, match=r"val.json is not JSON"):
        CocoData(str(tmp_path), **SMALL)


@pytest.mark.parametrize(("kwargs", "message"), [
    (dict(train_sizes=[]), "train_sizes"), (dict(on_error="ignore"), "on_error must be raise or skip"),
    (dict(batch_size=0), "batch_size"),
])
def test_bad_arguments(tmp_path, content, kwargs, message):
    with pytest.raises(ValueError, match=message):
        _make(tmp_path, content, **kwargs)


def test_detr_crops_take_a_part_of_every_second_image(tmp_path, content):
    torch.manual_seed(0)
    transform = detection_transform(None, None, 0.0, None, detr_crops=True)
    picture = torch.arange(320 * 640).reshape(1, 320, 640).expand(3, -1, -1).float() / (320 * 640)
    mask = torch.zeros(1, 320, 640, dtype=torch.uint8)
    mask[0, 100:200, 200:400] = 1
    sizes = set()
    for _ in range(24):
        image, target = transform(tv_tensors.Image(picture), {
            "boxes": tv_tensors.BoundingBoxes([[200., 100, 400, 200]], format="XYXY", canvas_size=(320, 640)),
            "masks": tv_tensors.Mask(mask), "labels": torch.ones(1, dtype=torch.int64), "area": torch.ones(1),
            "iscrowd": torch.zeros(1, dtype=torch.int64)})
        height, width = image.shape[-2:]
        sizes.add((height, width))
        assert (height, width) == (320, 640) or (384 <= height <= 600 and 384 <= width <= 600)
        for box, object_ in zip(target["boxes"], target["masks"], strict=True):  # both were cut alike
            ys, xs = torch.nonzero(object_, as_tuple=True)
            edges = torch.stack([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]).float()
            torch.testing.assert_close(box.as_subclass(torch.Tensor), edges, atol=1.5, rtol=0)
    assert (320, 640) in sizes
    assert len(sizes) > 6
    with pytest.raises(ValueError, match="choose one"):
        _make(tmp_path, content, large_scale_jitter=64, detr_crops=True)
