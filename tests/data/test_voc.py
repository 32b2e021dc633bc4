"""VOC's XML files become COCO files that CocoData reads."""
import json

import pytest

from visionattn.data import CocoData
from visionattn.data.voc import convert_voc, main

from .images import write_image


def _write(root, name, objects, size=(40, 36), filename=None):
    write_image(root / "JPEGImages" / f"{name}.jpg", size)
    things = "".join(
        f"<object><name>{label}</name><difficult>{difficult}</difficult><bndbox><xmin>{box[0]}</xmin>"
        f"<ymin>{box[1]}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox>"
        "<part><name>head</name></part></object>" for label, difficult, box in objects)
    file = root / "Annotations" / f"{name}.xml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(f"<annotation><filename>{filename or f'{name}.jpg'}</filename><size><width>{size[0]}</width>"
                    f"<height>{size[1]}</height><depth>3</depth></size>{things}</annotation>")
    return file


@pytest.fixture
def voc(tmp_path):
    _write(tmp_path, "a", [("dog", 0, (1, 1, 40, 36)), ("cat", 1, (5, 6, 5, 8))])
    _write(tmp_path, "b", [])
    _write(tmp_path, "c", [("emu", 0, (3.5, 4, 20, 30))])
    lists = tmp_path / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a\nb\n")
    (lists / "val.txt").write_text("c  1\n")  # lists of one class have a second column
    return tmp_path


def test_conversion(voc):
    counts = convert_voc(voc, "train", voc / "coco" / "train.json")
    assert counts == {"images": 2, "annotations": 2, "categories": 3, "difficult": 1}
    content = json.loads((voc / "coco" / "train.json").read_text())
    assert content["categories"] == [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 3, "name": "emu"}]
    assert content["images"][1] == {"id": 2, "file_name": "b.jpg", "width": 40, "height": 36}
    dog, cat = content["annotations"]
    # Corners count from 1 and belong to the box.
    assert (dog["bbox"], dog["area"], dog["category_id"], dog["iscrowd"]) == ([0, 0, 40, 36], 1440, 2, 0)
    assert (cat["bbox"], cat["area"], cat["category_id"], cat["iscrowd"]) == ([4, 5, 1, 3], 3, 1, 1)


def test_converted_files_are_read(voc):
    for split in ("train", "val"):
        convert_voc(voc, split, voc / f"{split}.json")
    files = dict(train_images="JPEGImages", train_annotations="train.json", val_images="JPEGImages",
                 val_annotations="val.json")
    data = CocoData(str(voc), **files, num_workers=0, hflip=0.0)
    data.setup("fit")
    assert data.class_names == ["cat", "dog", "emu"]
    _, targets = next(iter(data.train_dataloader()))
    assert sorted(target["labels"].tolist() for target in targets) == [[], [2]]  # what is difficult does not train
    _, targets = next(iter(data.val_dataloader()))
    assert targets[0]["boxes"].tolist() == [[2.5, 3, 20, 30]]


def test_without_lists_and_with_classes(voc):
    for file in (voc / "ImageSets" / "Main").iterdir():
        file.unlink()
    (voc / "ImageSets" / "Main").rmdir()
    counts = convert_voc(voc, "all", voc / "all.json", classes=["emu", "dog", "cat"])
    assert counts["images"] == 3
    content = json.loads((voc / "all.json").read_text())
    assert [annotation["category_id"] for annotation in content["annotations"]] == [2, 3, 1]


def test_command(voc, capsys):
    main([str(voc), "val", str(voc / "val.json")])
    assert "val.json: 1 images, 1 boxes (0 of them difficult), 3 classes" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([str(voc), "val", str(voc / "val.json"), "--classes", "dog"])
    assert "c.xml: object 1 is of the class 'emu'; the classes are dog" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "message"), [
    ("<annotation>", r"c.xml is not XML"),
    ("<annotation><filename>c.jpg</filename></annotation>", r"c.xml has no <size>"),
    ("<annotation><size><width>4</width><height>x</height></size></annotation>", r"c.xml: <height> is 'x', not a num"),
    ("<annotation><size><width>4</width><height>4</height></size></annotation>", r"<annotation> has no <filename>"),
    ("<annotation><size><width>4</width><height>4</height></size><filename>c.jpg</filename><object><name>emu</name>"
     "</object></annotation>", r"c.xml: object 1 \(emu\) has no <bndbox>"),
])
def test_bad_files_are_named(voc, text, message):
    (voc / "Annotations" / "c.xml").write_text(text)
    with pytest.raises(ValueError, match=message):
        convert_voc(voc, "val", voc / "val.json")
    assert not (voc / "val.json").exists()


def test_missing_files(voc, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Annotations does not exist"):
        convert_voc(tmp_path / "nowhere", "train", tmp_path / "x.json")
    with pytest.raises(FileNotFoundError, match=r"test.txt does not exist; there are train, val"):
        convert_voc(voc, "test", voc / "x.json")
    (voc / "Annotations" / "c.xml").unlink()
    with pytest.raises(FileNotFoundError, match=r"c.xml does not exist, but the list val has it"):
        convert_voc(voc, "val", voc / "x.json")
