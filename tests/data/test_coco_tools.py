"""COCO files as labelling tools, converters and scripts write them: read right, or refused in one line."""
import json
import tracemalloc

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from pycocotools import mask as rle

from visionattn.data import CocoData
from visionattn.data.detection import Records
from visionattn.data.polygons import mask_of, segmentation_of
from visionattn.tasks import DetectionTask

from .images import coco_content, truncate, write_image


@pytest.fixture
def content(tmp_path):
    return coco_content(tmp_path / "val")


def _make(root, content, stage="validate", train=None, **kwargs):
    (root / "val.json").write_text(json.dumps(content))
    if train is not None:
        (root / "train.json").write_text(json.dumps(train))
    data = CocoData(str(root), **dict(batch_size=3, num_workers=0, masks=True) | kwargs)
    data.setup(stage)
    return data


def _targets(data):
    return next(iter(data.val_dataloader()))[1]


def _each(key, **changes):
    """Changes every record of a list; a function gets the old value."""
    def change(content):
        for record in content[key]:
            for name, new in changes.items():
                if new is DELETED:
                    record.pop(name, None)
                else:
                    record[name] = new(record.get(name)) if callable(new) else new
    return change


DELETED = object()
SAME = {
    "float sizes": _each("images", width=float, height=float),
    "text sizes": _each("images", width=str, height=str),
    "no sizes": _each("images", width=DELETED, height=DELETED),
    "null sizes": _each("images", width=None, height=None),
    "zero sizes": _each("images", width=0, height=0),
    "text ids of images": _each("images", id=str),
    "text ids in annotations": _each("annotations", image_id=str, category_id=str),
    "float ids": lambda content: (_each("images", id=float)(content), _each("categories", id=float)(content)),
    "text ids of categories": _each("categories", id=str),
    "no ids of annotations": _each("annotations", id=DELETED),
    "ids of annotations that are no numbers": _each("annotations", id="4f1c-22"),
    "text boxes": _each("annotations", bbox=lambda box: [str(side) for side in box]),
    "crowds as text": _each("annotations", iscrowd=str),
    "crowds as bools": _each("annotations", iscrowd=bool),
    "crowds as text of bools": _each("annotations", iscrowd=lambda crowd: str(bool(crowd))),
    "crowds as floats": _each("annotations", iscrowd=float),
    "more keys": lambda content: content.update(info=None, licenses=[], extra={"a": 1}),
    "dotted names": _each("images", file_name=lambda name: f"./{name}"),
    "a folder that is not there": _each("images", file_name=lambda name: f"upload/1/{name}"),
    "the folder of the images in the names": _each("images", file_name=lambda name: f"val/{name}"),
    "backslashes": _each("images", file_name=lambda name: f"C:\\data\\{name}"),
    "other case": _each("images", file_name=str.upper),
    "no ending": _each("images", file_name=lambda name: name.removesuffix(".png")),
    "compressed masks": _each("annotations", segmentation=lambda value: _compressed(value)),
    "masks of text sizes": lambda content: content["annotations"][2]["segmentation"].update(size=["36", 40.0]),
    "polygons of pairs": _each("annotations", segmentation=lambda value: _paired(value)),
    "a polygon in no list": _each(
        "annotations", segmentation=lambda value: value if isinstance(value, dict) else value[0]),
    "boxes of polygons": _each("annotations", bbox=DELETED),
    "empty boxes beside polygons": _each("annotations", bbox=list),
    "areas that are none": lambda content: content["annotations"][1].update(area="x"),
    "areas that no image has": lambda content: content["annotations"][1].update(area=1e300),
}


def _compressed(value):
    code = rle.frPyObjects(value, 36, 40)
    code = rle.merge(code) if isinstance(code, list) else code
    return {"size": code["size"], "counts": code["counts"].decode()}


def _paired(value):
    return value if isinstance(value, dict) else [np.reshape(polygon, (-1, 2)).tolist() for polygon in value]


@pytest.mark.parametrize("change", SAME)
def test_what_is_clear_is_read_alike(tmp_path, content, change):
    expected = _targets(_make(tmp_path, content))
    SAME[change](content)
    if change == "no sizes":
        del content["annotations"][0]["area"]
        expected[0]["area"][0] = 80
    for target, truth in zip(_targets(_make(tmp_path, content)), expected, strict=True):
        assert target["image_id"] == truth["image_id"]
        for key in ("boxes", "labels", "masks", "area", "iscrowd"):
            assert torch.equal(target[key], truth[key]), key


def test_names_with_backslashes_and_folders(tmp_path, content):
    expected = _targets(_make(tmp_path, content))
    (tmp_path / "val" / "sub").mkdir()
    for image in content["images"]:
        (tmp_path / "val" / image["file_name"]).rename(tmp_path / "val" / "sub" / image["file_name"])
        image["file_name"] = f"sub\\{image['file_name']}"
    assert torch.equal(_targets(_make(tmp_path, content))[0]["boxes"], expected[0]["boxes"])


def test_ids_that_are_no_numbers(tmp_path, content):
    for image in content["images"]:
        image["id"] = f"image-{image['id']}"
    for annotation in content["annotations"]:
        annotation["image_id"] = f"image-{annotation['image_id']}"
    data = _make(tmp_path, content, predict_root=None)
    assert [target["image_id"] for target in _targets(data)] == ["image-5", "image-7", "image-9"]
    task = DetectionTask("test_dinat", num_classes=2, detector="fcos", fpn_channels=64, min_size=64, max_size=96)
    pl.Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path / "run", enable_progress_bar=False,
               enable_model_summary=False).predict(task, data, return_predictions=False)
    predictions = json.loads((tmp_path / "run" / "predictions.json").read_text())
    assert {record["image_id"] for record in predictions} == {"image-5", "image-7", "image-9"}


@pytest.mark.parametrize("root", [
    {"id": 0, "name": "animals", "supercategory": "none"}, {"id": 0, "name": "root"},
    {"id": 99, "name": "animals", "supercategory": ""},
])
def test_a_category_without_objects_is_no_class(tmp_path, content, said, root):
    content["categories"].append(root)
    data = _make(tmp_path, content, stage="fit", train=content, train_images="val")
    assert (data.class_names, data.category_ids, data.num_classes) == (["cat", "dog"], [12, 30], 2)
    assert f"no object in any split: {root['name']}" in said.text
    assert _targets(data)[0]["labels"].tolist() == [2, 1]


def test_a_category_with_objects_in_training_only_is_a_class(tmp_path, content):
    train = json.loads(json.dumps(content))
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] == 30]
    data = _make(tmp_path, content, stage="fit", train=train, train_images="val")
    assert data.class_names == ["cat", "dog"]
    assert "val has no objects of 'cat'" in data.report.text()


def test_two_categories_of_one_name_are_one_class(tmp_path, content, said):
    content["categories"].append({"id": 31, "name": "dog"})
    content["annotations"][0]["category_id"] = 31
    data = _make(tmp_path, content)
    assert data.class_names == ["cat", "dog"]
    assert _targets(data)[0]["labels"].tolist() == [2, 1]
    assert "two categories are called 'dog'" in said.text
    content["categories"][2]["supercategory"] = "hot"
    with pytest.raises(ValueError, match=r"two categories are called 'dog', one of .* and one of 'hot'"):
        _make(tmp_path, content)


def test_categories_are_matched_by_name(tmp_path, content):
    train = json.loads(json.dumps(content))
    train["categories"] = [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}]
    for annotation in train["annotations"]:
        annotation["category_id"] = {30: 1, 12: 2}[annotation["category_id"]]
    data = _make(tmp_path, content, stage="fit", train=train, train_images="val", hflip=0.0)
    _, targets = next(iter(data.train_dataloader()))
    assert next(target for target in targets if target["image_id"] == 5)["labels"].tolist() == [2, 1]


def test_two_entries_for_one_file_are_joined(tmp_path, content, said):
    content["images"].append(content["images"][0] | {"id": 55})
    content["annotations"] += [content["annotations"][0] | {"id": 90, "image_id": 55},
                               {"id": 91, "image_id": 55, "category_id": 12, "bbox": [1, 2, 3, 4],
                                "segmentation": [[1, 2, 4, 2, 4, 6, 1, 6]]}]
    data = _make(tmp_path, content)
    targets = _targets(data)
    assert [target["image_id"] for target in targets] == [5, 7, 9]
    assert targets[0]["boxes"].tolist() == [[4, 6, 14, 14], [20, 10, 32, 30], [1, 2, 4, 6]]
    assert "1 joined with it: another image has the same file" in said.text


def test_a_guessed_name_never_stands_for_another_image(tmp_path, content):
    """Of a/5.png and b/5.png none is there, but 5.png is."""
    content["images"][0]["file_name"] = "a/5.png"
    content["images"][1]["file_name"] = "b/5.png"
    with pytest.raises(ValueError, match=r"image 7: the image file cannot be used \(.*b/5.png: there is no such file"):
        _make(tmp_path, content)


NORMALISED = lambda box: [box[0] / 40, box[1] / 36, box[2] / 40, box[3] / 36]  # noqa: E731
BAD = {
    "shares": (0, dict(bbox=NORMALISED([4, 6, 10, 8])), "its box looks like shares of the image"),
    "shares of all the image": (0, dict(bbox=[0.0, 0.0, 1.0, 0.999]), "its box looks like shares of the image"),
    "null in a box": (1, dict(bbox=[20, None, 12, 20]), "its bbox is not four numbers"),
    "NaN in a box": (1, dict(bbox=[20, float("nan"), 12, 20]), "its bbox is not four numbers"),
    "text in a box": (1, dict(bbox=[20, "x", 12, 20]), "its bbox is not four numbers"),
    "a huge box": (1, dict(bbox=[20, 1, 10 ** 400, 20]), "its bbox is not four numbers"),
    "a box of boxes": (1, dict(bbox=[[20, 10], [12, 20]]), "its bbox is not four numbers"),
    "corners": (1, dict(bbox=[20, 10, 32, 30]),
                "its box reaches out of the image .* may hold right and bottom in place of width and height"),
    "null in a polygon": (1, dict(segmentation=[[None, 0, 20, 0, 20, 20]]), "holds something else than numbers"),
    "NaN in a polygon": (1, dict(segmentation=[[float("nan"), 0, 20, 0, 20, 20]]), "something else than numbers"),
    "infinity in a polygon": (1, dict(segmentation=[[float("inf"), 0, 20, 0, 20, 20]]), "something else than numbers"),
    "text in a polygon": (1, dict(segmentation=[["a", 0, 20, 0, 20, 20]]), "something else than numbers"),
    "a polygon beyond all numbers": (1, dict(segmentation=[[0, 0, 1e300, 0, 1e300, 20]]), "that no image has"),
    "a null polygon": (1, dict(segmentation=[None]), "something else than numbers"),
    "a polygon elsewhere": (1, dict(segmentation=[[0, 0, 5, 0, 5, 5, 0, 5]]), "box and its segmentation lie apart"),
    "a mask elsewhere": (1, dict(segmentation={"size": [36, 40], "counts": [0, 3, 1437]}), "segmentation lie apart"),
    "an empty mask": (1, dict(segmentation={"size": [36, 40], "counts": [1440]}), "its mask is empty"),
    "an odd polygon": (1, dict(segmentation=[[1, 2, 3, 4, 5, 6, 7]]), "an odd number of coordinates"),
    "a polygon outside": (1, dict(segmentation=[[100, 100, 120, 100, 120, 120]]), "lies outside the image"),
    "a polygon of shares": (1, dict(segmentation=[[0.1, 0.1, 0.5, 0.1, 0.5, 0.5]]), "looks like shares of the image"),
    "an empty segmentation": (1, dict(segmentation=[]), "it has no segmentation, but masks were asked for"),
    "negative runs": (1, dict(segmentation={"size": [36, 40], "counts": [-5, 1445]}), "runs of its mask do not add up"),
    "broken runs": (1, dict(segmentation={"size": [36, 40], "counts": [1.5, 1438.5]}), "its mask do not add up"),
    "huge runs": (1, dict(segmentation={"size": [36, 40], "counts": [2 ** 40, 1]}), "runs of its mask do not add up"),
    "runs of text": (1, dict(segmentation={"size": [36, 40], "counts": ["a"]}), "runs of its mask cannot be read"),
    "no runs": (1, dict(segmentation={"size": [36, 40]}), "runs of its mask cannot be read"),
    "compressed runs that go on": (1, dict(segmentation={"size": [36, 40], "counts": "ooo"}), "cannot be read"),
    "compressed runs of another size": (1, dict(segmentation={"size": [36, 40], "counts": "P1"}), "do not add up"),
    "compressed runs that are not ASCII": (1, dict(segmentation={"size": [36, 40], "counts": "ä"}), "cannot be read"),
    "a mask of an absurd size": (1, dict(segmentation={"size": [10 ** 9, 10 ** 9], "counts": [10 ** 18]}),
                                 "its mask has another size than its image"),
    "a mask without size": (1, dict(segmentation={"size": None, "counts": [1440]}), "another size than its image"),
    "a mask of one side": (1, dict(segmentation={"size": 36, "counts": [1440]}), "another size than its image"),
    "a crowd that is none": (1, dict(iscrowd="maybe"), "its iscrowd is neither 0 nor 1"),
    "a crowd of crowds": (1, dict(iscrowd=[0]), "its iscrowd is neither 0 nor 1"),
    "a list as image": (1, dict(image_id=[5]), "its image is not in the list of images"),
    "a null category": (1, dict(category_id=None), "its category is not in the list of categories"),
    "a list as category": (1, dict(category_id=[12]), "its category is not in the list of categories"),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_annotations_are_named_or_left_out(tmp_path, content, said, fault):
    index, change, message = BAD[fault]
    content["annotations"][index] |= change
    with pytest.raises(ValueError, match=rf"val.json: annotation {index + 1}: .*{message}") as raised:
        _make(tmp_path, content)
    assert "\n" not in str(raised.value)
    data = _make(tmp_path, content, on_error="skip")
    assert len(data.report.splits["val"].left_out) == 1
    assert f"annotation {index + 1} (" in data.report.splits["val"].left_out[0][0]
    assert [len(target["boxes"]) for target in _targets(data)] == ([2, 2, 0] if fault == "corners" else [1, 2, 0])


@pytest.mark.parametrize("image", [
    dict(width="wide"), dict(width=-3), dict(width=float("nan")), dict(height=True), dict(width=10 ** 12),
    dict(id=None), dict(id=[3]), dict(file_name=7), dict(file_name=""), dict(file_name="a\0b"),
    dict(file_name="x" * 5000), dict(width=40.5), dict(width=[40]), dict(height={"a": 36}),
])
def test_bad_images_are_named_or_left_out(tmp_path, content, image):
    content["images"][1] |= image
    with pytest.raises(ValueError, match=r"val.json: image (7|number 2|None|\[3\]): ") as raised:
        _make(tmp_path, content)
    assert "\n" not in str(raised.value)
    data = _make(tmp_path, content, on_error="skip", masks=False)
    assert [len(target["boxes"]) for target in _targets(data)] == [2, 0]


@pytest.mark.parametrize(("text", "message"), [
    ('{"images": ' + "[" * 100_000, "is not JSON"), ('{"images": ' + "9" * 5000 + "}", "is not JSON"),
    ("\xff", "is not JSON"),
    ("", "is not JSON"), ("[]", "has no list 'images'"), ('{"images": {}}', "has no list 'images'"),
    ('{"shapes": [], "imagePath": "a.jpg"}', "in LabelMe's own format: export"),
    ('[{"id": 1, "data": {}, "annotations": []}]', "in Label Studio's own format: export"),
    ('{"_via_img_metadata": {}}', "in VIA's own format: export"),
])
def test_other_files_are_refused_by_name(tmp_path, text, message):
    (tmp_path / "val.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"val.json {message}|val.json is {message}|val.json.* {message}"):
        CocoData(str(tmp_path), val_annotations="val.json")


@pytest.mark.parametrize("part", [[0, 0, 1e9, 0, 1e9, 1e9, 0, 1e9], [-9e8, -9e8, 9e8, -9e8, 9e8, 9e8, -9e8, 1e9]])
def test_polygons_far_outside_are_cut_at_the_image(tmp_path, content, part):
    content["annotations"][1]["segmentation"] = [part]
    tracemalloc.start()
    data = _make(tmp_path, content)
    masks = _targets(data)[0]["masks"]
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()
    assert masks[1].all()
    assert data.report.splits["val"].left_out[0][1:] == ("its segmentation reaches far out of the image", "mended")


def test_cut_polygons_cover_what_they_covered():
    triangle = [[-3000.0, 10.0, 20.0, -500.0, 35.0, 4000.0]]
    polygons, _, fault, mended = segmentation_of(triangle, (40, 36))
    assert (fault, mended) == ("", "its segmentation reaches far out of the image")
    whole = rle.decode(rle.merge(rle.frPyObjects(triangle, 36, 40)))
    assert (mask_of(polygons, (36, 40)) != whole).sum() <= 2
    assert whole.any()
    assert not whole.all()


def test_endless_outlines_are_refused():
    zigzag = [[x for index in range(50_000) for x in ((index % 2) * 40.0, index / 2000)]]
    assert segmentation_of(zigzag, (40, 36))[2] == "the outline of its segmentation is longer than any in its image"


def test_a_part_of_two_points_is_mended(tmp_path, content):
    expected = _targets(_make(tmp_path, content))
    content["annotations"][0]["segmentation"].append([1, 2, 3, 4])
    data = _make(tmp_path, content)
    assert torch.equal(_targets(data)[0]["masks"], expected[0]["masks"])
    assert data.report.splits["val"].left_out[0][2] == "mended"


@pytest.mark.parametrize("seed", range(4))
def test_compressed_runs_are_those_of_pycocotools(seed):
    rng = np.random.default_rng(seed)
    shape = [int(side) for side in rng.integers(1, 90, 2)]
    mask = np.asfortranarray(rng.random(shape) > rng.random(), dtype=np.uint8)
    code = rle.encode(mask)
    found, extent, fault, _ = segmentation_of(
        {"size": code["size"], "counts": code["counts"].decode()}, (mask.shape[1], mask.shape[0]))
    assert (fault, found) == ("", code)
    assert extent == rle.toBbox(code).tolist()
    assert np.array_equal(mask_of(found, mask.shape), mask)


LAYOUTS = {
    "train.json and train": ("{split}.json", "{split}"),
    "COCO 2017": ("annotations/instances_{split}2017.json", "{split}2017"),
    "Roboflow": ("{split}/_annotations.coco.json", "{split}"),
    "FiftyOne": ("{split}/labels.json", "{split}/data"),
    "Capitals": ("Annotations/{Split}.json", "Images/{Split}"),
    "images by split": ("annotations/{split}.json", "images/{split}"),
    "all images together": ("annotations/{split}.json", "images"),
    "images within the split": ("{split}/annotations.json", "{split}/images"),
    "wrapped": ("my set v3/annotations/{split}.json", "my set v3/images/{split}"),
}


@pytest.mark.parametrize("spelling", [
    "train val test", "training validation testing", "train valid test", "train dev test"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_splits_are_found_in_any_usual_spelling(tmp_path, layout, spelling):
    file, folder = LAYOUTS[layout]
    for number, name in enumerate(spelling.split()):
        spelled = dict(split=name, Split=name.capitalize())
        content = coco_content(tmp_path / folder.format(**spelled))
        content["images"] = content["images"][:3 - number]
        content["annotations"] = content["annotations"][:2]
        path = tmp_path / file.format(**spelled)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
        for other in ("captions_", "person_keypoints_"):
            if layout == "COCO 2017":
                path.with_name(path.name.replace("instances_", other)).write_text("{}")
    data = CocoData(str(tmp_path), num_workers=0)
    for stage in ("fit", "test"):
        data.setup(stage)
    assert {split: len(records) for split, records in data.records.items()} == {"train": 3, "val": 2, "test": 1}
    assert all(len(loader) for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()))
    if layout != "all images together":
        for place, split in enumerate(("train", "val", "test")):
            assert all(spelling.split()[place].lower() in record.file.lower() for record in data.records[split])


@pytest.mark.parametrize("change", [str.upper, lambda name: name.removesuffix(".png"), lambda name: f"C:\\x\\{name}"])
def test_images_of_one_name_in_two_splits_are_told_apart(tmp_path, change):
    """Also where their names in the files are not quite right."""
    for split in ("train", "val"):
        content = coco_content(tmp_path / "images" / split)
        for image in content["images"]:
            image["file_name"] = change(image["file_name"])
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
    data = CocoData(str(tmp_path), num_workers=0)
    data.setup("fit")
    for split in ("train", "val"):
        assert all(f"images/{split}/" in record.file for record in data.records[split])


@pytest.mark.parametrize("file", [
    "instances_default.json", "annotations/instances_default.json", "result.json", "train.json"])
def test_without_validation_a_fifth_of_the_training_images_validates(tmp_path, said, file):
    content = coco_content(tmp_path / "images")
    content["images"] += [write_image(tmp_path / "images" / f"{n}.png", seed=n) and {"id": n, "file_name": f"{n}.png"}
                          for n in range(20, 27)]
    content["annotations"] += [{"id": n, "image_id": n, "category_id": 12, "bbox": [1, 2, 9, 9]} for n in range(20, 27)]
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(json.dumps(content))
    halves = []
    for _ in range(2):
        data = CocoData(str(tmp_path), num_workers=0)
        data.setup("fit")
        halves.append([[record.image_id for record in data.records[split]] for split in ("train", "val")])
    assert halves[0] == halves[1]
    train, val = halves[0]
    assert (len(train), len(val)) == (8, 2)
    assert not set(train) & set(val)
    assert "of the 10 images of" in said.text
    assert "8 train and 2 validate" in said.text


def test_several_files_for_a_split_are_asked_about(tmp_path, content):
    for name in ("train_a.json", "train_b.json"):
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"several files .* of train: train_a.json, train_b.json; name one by"):
        CocoData(str(tmp_path))


def test_nothing_to_read(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no annotations in COCO's format; data.init_args.root must be"):
        CocoData(str(tmp_path))


def test_shared_images_of_training_and_validation_are_counted(tmp_path, content, said):
    for image in content["images"][:2]:  # copies, under other names
        (tmp_path / "train").mkdir(exist_ok=True)
        copied = (tmp_path / "val" / image["file_name"]).read_bytes()
        (tmp_path / "train" / f"copy{image['id']}.png").write_bytes(copied)
    train = json.loads(json.dumps(content))
    train["images"] = [image | {"file_name": f"copy{image['id']}.png"} for image in train["images"][:2]]
    _make(tmp_path, content, stage="fit", train=train)
    assert "2 of 3 val images are training images too" in said.text


def test_unreadable_images_are_skipped_and_listed(tmp_path, content):
    truncate(tmp_path / "val" / "7.png")
    (tmp_path / "val" / "9.png").unlink()
    data = _make(tmp_path, content, on_error="skip")
    assert [what.split(" (")[0] for what, why, became in data.report.splits["val"].left_out] == ["image 7", "image 9"]
    assert [target["image_id"] for target in _targets(data)] == [5]


def test_records_are_one_block_of_memory(tmp_path, content):
    data = _make(tmp_path, content)
    records = data.records["val"]
    assert isinstance(records, Records)
    assert [record.image_id for record in records] == [5, 7, 9]
    assert records[-1] == records[2]
    with pytest.raises(IndexError):
        records[3]


def test_evaluation_needs_no_training_file(tmp_path, content):
    (tmp_path / "val.json").write_text(json.dumps(content))
    for annotations in (content["annotations"], content["annotations"][:1]):
        (tmp_path / "val.json").write_text(json.dumps(content | {"annotations": annotations}))
        data = CocoData(str(tmp_path), train_annotations="lost.json", val_annotations="val.json", num_workers=0)
        for stage in ("validate", "test", "predict"):
            data.setup(stage)
        assert len(data.records["val"]) == 3
        with pytest.raises(FileNotFoundError, match=r"annotation file .*lost.json does not exist"):
            data.setup("fit")


def test_test_images_without_annotations_are_not_tested(tmp_path, content):
    """As in COCO's image_info_test2017.json."""
    (tmp_path / "val.json").write_text(json.dumps(content))
    (tmp_path / "image_info_test2017.json").write_text(json.dumps({"images": [], "categories": []}))
    data = CocoData(str(tmp_path), num_workers=0)
    data.setup("test")
    assert data.records["test"] is data.records["val"]


def test_a_missing_image_is_not_taken_from_another_split(tmp_path, content):
    (tmp_path / "train").mkdir()
    for image in content["images"][:2]:
        (tmp_path / "val" / image["file_name"]).rename(tmp_path / "train" / image["file_name"])
    with pytest.raises(ValueError, match=r"train.json: image 9: .*9.png: there is no such file"):
        _make(tmp_path, content | {"images": content["images"][2:], "annotations": []}, stage="fit", train=content)
