"""``visionattn check-data``: kinds of data are told, faults named, pictures drawn, and the exit code says which."""
import json

import numpy as np
import pytest
from PIL import Image

from visionattn.cli import main
from visionattn.data.guess import guess_data

from .images import coco_content, truncate, write_classes, write_image, write_mask

XML = ("<annotation><filename>{0}</filename><size><width>40</width><height>36</height></size><object><name>dog</name>"
       "<bndbox><xmin>3</xmin><ymin>4</ymin><xmax>30</xmax><ymax>25</ymax></bndbox></object></annotation>")


def _coco(root):
    for split in ("train", "val"):
        (root / f"{split}.json").parent.mkdir(parents=True, exist_ok=True)
        (root / f"{split}.json").write_text(json.dumps(coco_content(root / split)))


def _voc(root):
    for index in range(6):
        write_image(root / "JPEGImages" / f"{index}.jpg", seed=index)
        (root / "Annotations").mkdir(exist_ok=True)
        (root / "Annotations" / f"{index}.xml").write_text(XML.format(index))


def _yolo(root, line="0 0.5 0.5 0.2 0.2"):
    for split in ("train", "val"):
        for index in range(4):
            write_image(root / "images" / split / f"{split}{index}.jpg", seed=index + 10 * (split == "val"))
            (root / "labels" / split).mkdir(parents=True, exist_ok=True)
            (root / "labels" / split / f"{split}{index}.txt").write_text(line)


def _masks(root):
    for split in ("train", "val"):
        for index in range(4):
            write_image(root / "images" / split / f"{index}.jpg", seed=index + 10 * (split == "val"))
            write_mask(root / "masks" / split / f"{index}.png", seed=index)


def _suffixed_masks(root):
    for index in range(6):
        write_image(root / f"{index}.jpg", seed=index)
        write_mask(root / f"{index}_mask.png", seed=index)


def _classes(root):
    for number, split in enumerate(("train", "val")):
        for label, name in enumerate(("cat", "dog")):
            for index in range(3):
                write_image(root / split / name / f"{index}.jpg", seed=100 * number + 10 * label + index)


KINDS = {
    "CocoData": _coco, "VocData": _voc, "YoloData": _yolo, "SegmentationFolderData": _masks,
    "ImageFolderData": _classes,
}


@pytest.fixture
def said(capsys):
    """What a check of ``photos`` says, and its exit code."""
    def run(root, *options):
        code = main(["check-data", str(root / "photos"), "--out", str(root / "out"), *options])
        streams = capsys.readouterr()
        return code, streams.out + streams.err
    return run


@pytest.mark.parametrize("kind", KINDS)
def test_good_data(tmp_path, said, kind):
    KINDS[kind](tmp_path / "photos")
    code, text = said(tmp_path)
    assert code == 0
    assert f"read by {kind}" in text
    assert "\ntrain" in text
    assert not (tmp_path / "out" / "left_out.csv").exists()
    sheet = np.asarray(Image.open(tmp_path / "out" / "sheet.png"))
    assert sheet.shape[1] == 1600
    assert (sheet != 255).any(axis=2).mean() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_an_unreadable_image_is_listed(tmp_path, said, kind):
    KINDS[kind](tmp_path / "photos")
    image = min(file for file in (tmp_path / "photos").rglob("*.*") if file.suffix in (".jpg", ".png"))
    truncate(image)
    code, text = said(tmp_path)
    assert code == 1
    assert image.name in text
    assert image.name in (tmp_path / "out" / "left_out.csv").read_text()
    assert (tmp_path / "out" / "sheet.png").is_file()


def test_boxes_are_where_they_are_drawn(tmp_path, said):
    """The middle of the image is boxed; nothing else changes."""
    for index in range(5):
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.new("RGB", (200, 200 + index), "white").save(tmp_path / "photos" / f"{index}.png")
        (tmp_path / "photos" / f"{index}.txt").write_text("0 0.5 0.5 0.5 0.5")
    assert said(tmp_path)[0] == 0
    tile = np.asarray(Image.open(tmp_path / "out" / "sheet.png").convert("RGB"))[:320, :320]
    ys, xs = np.nonzero((tile != 255).any(axis=2))
    assert abs(np.array([xs.min(), ys.min(), xs.max(), ys.max()]) - [110, 110, 210, 210]).max() <= 3


def test_masks_are_checked_where_all_objects_have_some(tmp_path, said):
    _coco(tmp_path / "photos")
    content = json.loads((tmp_path / "photos" / "train.json").read_text())
    content["annotations"][0]["segmentation"] = [[None, 1, 2, 3, 4, 5]]
    (tmp_path / "photos" / "train.json").write_text(json.dumps(content))
    code, text = said(tmp_path)
    assert code == 1
    assert "annotation 1" in text
    assert "something else than numbers" in text
    for annotation in content["annotations"][1:]:
        del annotation["segmentation"]
    (tmp_path / "photos" / "train.json").write_text(json.dumps(content))
    code, text = said(tmp_path)
    assert code == 0
    assert "boxes alone are checked" in text


def test_what_cannot_be_trained_on_is_listed_too(tmp_path, said):
    _yolo(tmp_path / "photos", "0 50 50 20 20")
    code, text = said(tmp_path)
    assert code == 1
    assert "visionattn: error:" in text
    assert "has no object to train on" in text
    assert (tmp_path / "out" / "left_out.csv").read_text().count("look like pixels") == 8


def test_options_of_the_data_module(tmp_path, said):
    for index in range(5):
        write_image(tmp_path / "photos" / "images" / f"{index}.jpg", seed=index)
        write_mask(tmp_path / "photos" / "masks" / f"{index}.png", values=(0, 255), seed=index)
    code, text = said(tmp_path)
    assert code == 1
    assert "mask_values" in text
    assert said(tmp_path, "--options", '{"mask_values": [0, 255]}')[0] == 0


def test_the_output_is_not_put_into_the_data(tmp_path, capsys):
    _classes(tmp_path / "photos")
    assert main(["check-data", str(tmp_path / "photos"), "--out", str(tmp_path / "photos" / "check")]) == 1
    assert "its picture would be taken for data" in capsys.readouterr().err


GUESSES = {
    "a COCO file": (_coco, "train.json", "CocoData"), "a YAML file": (_yolo, "data.yaml", "YoloData"),
    "masks beside images": (_suffixed_masks, "", "SegmentationFolderData"),
    "classes with a list of files": (
        lambda root: (_classes(root), (root / "files.json").write_text('{"files": []}')), "", "ImageFolderData"),
    "classes called labels": (lambda root: write_classes(root, ("labels", "other")), "", "ImageFolderData"),
}


@pytest.mark.parametrize("guess", GUESSES)
def test_guesses(tmp_path, guess):
    make, name, expected = GUESSES[guess]
    make(tmp_path)
    (tmp_path / "data.yaml").write_text("names: [a]\n") if name == "data.yaml" else None
    assert guess_data(tmp_path / name).module == expected


def test_the_task_chooses_between_annotations(tmp_path):
    _voc(tmp_path)
    for index in range(6):
        write_mask(tmp_path / "SegmentationClass" / f"{index}.png")
    (tmp_path / "ImageSets" / "Segmentation").mkdir(parents=True)
    (tmp_path / "ImageSets" / "Segmentation" / "train.txt").write_text("0\n1\n")
    assert guess_data(tmp_path).module == "VocData"
    kind = guess_data(tmp_path, "segmentation")
    assert (kind.module, kind.arguments["layout"]) == ("SegmentationFolderData", "voc")


def test_nothing_known(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        guess_data(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds nothing that is known"):
        guess_data(tmp_path)
    (tmp_path / "a.doc").write_text("a")
    with pytest.raises(ValueError, match=r"a.doc is neither a folder, nor COCO's JSON file"):
        guess_data(tmp_path / "a.doc")
    write_classes(tmp_path)
    with pytest.raises(ValueError, match="holds nothing for detection that is known"):
        guess_data(tmp_path, "detection")


@pytest.mark.parametrize("kind", ["ImageFolderData", "YoloData"])
def test_names_that_are_no_text(tmp_path, said, kind):
    KINDS[kind](tmp_path / "photos")
    good = min((tmp_path / "photos").rglob("*.jpg"))
    (good.parent / "\udcff\udce4.jpg").write_bytes(good.read_bytes())
    (good.parent / "\udcfe.jpg").write_bytes(b"no image")
    code, text = said(tmp_path)
    assert code == 1
    assert "\\udcfe.jpg" in text
    assert "\\udcfe.jpg" in (tmp_path / "out" / "left_out.csv").read_text()
