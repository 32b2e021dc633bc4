"""VocData: XML files and images as tools and people put them."""
import json
from pathlib import Path

import pytest

import visionattn
from visionattn.cli import main
from visionattn.data import VocData
from visionattn.data.voc import convert_voc

from .images import write_image

OBJECT = ("<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>{}"
          "</object>")


BOX = OBJECT.format("box", 3, 4, 20, 30, "")


def _xml(filename, objects=BOX, size="<width>40</width><height>36</height>"):
    return f"<annotation><filename>{filename}</filename><size>{size}</size>{objects}</annotation>"


def _write(root, images="JPEGImages", files="Annotations", count=5, start=0, ending=".jpg", **kwargs):
    for index in range(start, start + count):
        write_image(root / images / f"{index:03d}.jpg", seed=index)
        file = root / files / f"{index:03d}.xml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(_xml(f"{index:03d}{ending}", **kwargs))
    return root


def _make(root, stage="fit", **kwargs):
    data = VocData(str(root), **dict(batch_size=8, num_workers=0, hflip=0.0) | kwargs)
    data.setup(stage)
    return data


def _targets(data, split="val"):
    return next(iter(getattr(data, f"{split}_dataloader")()))[1]


@pytest.mark.parametrize("ending", ["", ".jpg", ".JPG", ".png"])
def test_without_lists_a_fifth_validates(tmp_path, said, ending):
    """Also where ``filename`` lacks its ending or has another."""
    data = _make(_write(tmp_path, ending=ending))
    assert (len(data.records["train"]), len(data.records["val"])) == (4, 1)
    assert "4 train and 1 validate" in said.text
    assert not {record.file for record in data.records["train"]} & {record.file for record in data.records["val"]}
    assert _targets(data)[0]["boxes"].tolist() == [[2, 3, 20, 30]]
    assert (data.class_names, data.category_ids) == (["box"], [1])


LAYOUTS = {
    "lists": ("JPEGImages", "Annotations"), "flat": ("", ""), "Kaggle": ("images", "annotations"),
    "deep": ("a/b/pictures", "a/xml files"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_anywhere(tmp_path, layout):
    _write(tmp_path, *LAYOUTS[layout])
    assert len(_make(tmp_path, stage="validate").records["val"]) == 1


@pytest.mark.parametrize("inner", [("", ""), ("JPEGImages", "Annotations"), ("images", "labels")])
@pytest.mark.parametrize("spelling", ["train valid test", "Training Validation Testing"])
def test_folders_of_splits(tmp_path, spelling, inner):
    """Images of the same name in several of them are told apart."""
    for number, split in enumerate(spelling.split()):
        _write(tmp_path / split, *inner, count=3, objects=OBJECT.format("box", 1, 1, 10 + number, 10, ""))
    data = _make(tmp_path)
    data.setup("test")
    for number, split in enumerate(("train", "val", "test")):
        assert len(data.records[split]) == 3
        assert all(spelling.split()[number] in record.file for record in data.records[split])
        assert _targets(data, split)[0]["boxes"].tolist() == [[0, 0, 10 + number, 10]]


@pytest.mark.parametrize("names", ["train val", "trainval test", "Train Valid"])
@pytest.mark.parametrize("folder", ["ImageSets/Main", "ImageSets", "."])
def test_lists(tmp_path, folder, names):
    _write(tmp_path)
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    first, second = names.split()
    (tmp_path / folder / f"{first}.txt").write_text("000\n001.jpg\n002  1\n")
    (tmp_path / folder / f"{second}.txt").write_text("003\n")
    (tmp_path / folder / "box_train.txt").write_text("004\n")
    data = _make(tmp_path)
    if second == "test":
        data.setup("test")
        assert [record.name for record in data.records["test"]] == ["JPEGImages/003.jpg"]
        assert len(data.records["train"]) + len(data.records["val"]) == 3
    else:
        assert (len(data.records["train"]), len(data.records["val"])) == (3, 1)
    (tmp_path / folder / f"{first}.txt").write_text("000\n001\nlost\n")
    with pytest.raises(ValueError, match=r"annotation file lost.xml: it cannot be read .*but a list has it"):
        _make(tmp_path)


ENCODINGS = ["utf-8", "utf-16", "iso-8859-1", "windows-1252", "gbk", "gb2312", "big5", "shift_jis", "euc-kr", "koi8-r"]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_any_encoding_that_is_named(tmp_path, encoding):
    name = {"gbk": "猫", "gb2312": "猫", "big5": "貓", "shift_jis": "猫", "euc-kr": "고양이", "koi8-r": "кот"}.get(
        encoding, "chât")
    _write(tmp_path)
    for file in (tmp_path / "Annotations").iterdir():
        text = f'<?xml version="1.0" encoding="{encoding}"?>\n' + _xml(
            f"{file.stem}.jpg", OBJECT.format(name, 3, 4, 20, 30, ""))
        file.write_bytes(text.encode(encoding))
    assert _make(tmp_path).class_names == [name]
    convert_voc(tmp_path, "all", tmp_path / "all.json")
    assert json.loads((tmp_path / "all.json").read_text())["categories"][0]["name"] == name


def test_the_image_of_the_name_of_the_file_is_taken(tmp_path):
    """Though all ``filename`` are that of a single image, as after a renaming."""
    _write(tmp_path)
    for file in (tmp_path / "Annotations").iterdir():
        file.write_text(_xml("000.jpg"))
    data = _make(tmp_path)
    assert len({record.file for split in ("train", "val") for record in data.records[split]}) == 5


def test_sizes_may_be_missing(tmp_path):
    data = _make(_write(tmp_path, size="<width>0</width><height>0</height>"))
    assert _targets(data)[0]["boxes"].tolist() == [[2, 3, 20, 30]]


def test_float_and_difficult_boxes(tmp_path):
    objects = OBJECT.format("box", "3.5", "4.0", "20.25", "30", "") + OBJECT.format(
        "ring", 1, 1, 5, 5, "<difficult>1</difficult>")
    data = _make(_write(tmp_path, objects=objects))
    target = _targets(data)[0]
    assert target["boxes"].tolist() == [[2.5, 3, 20.25, 30], [0, 0, 5, 5]]
    assert target["iscrowd"].tolist() == [0, 1]
    assert _targets(data, "train")[0]["labels"].tolist() == [1]


BAD = {
    OBJECT.format("box", 0.1, 0.1, 0.5, 0.5, ""): "its box looks like shares of the image",
    OBJECT.format("box", "x", 4, 20, 30, ""): "it has <xmin> 'x', which is not a number",
    OBJECT.format("box", "nan", 4, 20, 30, ""): "it has <xmin> 'nan', which is not a number",
    OBJECT.format("box", "", 4, 20, 30, ""): "it has <xmin> '', which is not a number",
    OBJECT.format("", 1, 4, 20, 30, ""): "it has no <name>",
    "<object><name>box</name></object>": "it has no <bndbox>",
    OBJECT.format("box", 100, 4, 120, 30, ""): "its box lies outside the image",
    OBJECT.format("box", 3, 4, 60, 30, ""): "its box reaches out of the image",
}


@pytest.mark.parametrize("thing", BAD)
def test_bad_objects_are_named_or_left_out(tmp_path, thing):
    _write(tmp_path)
    for file in (tmp_path / "Annotations").iterdir():
        file.write_text(_xml(file.stem, OBJECT.format("box", 1, 1, 5, 5, "") + thing))
    with pytest.raises(ValueError, match=rf"00\d.xml, object 2: .*{BAD[thing]}") as raised:
        _make(tmp_path)
    assert "\n" not in str(raised.value)
    data = _make(tmp_path, on_error="skip")
    assert len(data.report.splits["train"].left_out) == 5
    assert len(_targets(data)[0]["boxes"]) == (2 if "reaches" in BAD[thing] else 1)


@pytest.mark.parametrize("corners", [(20, 4, 3, 30), (3, 30, 20, 4), (20, 4, 19, 30)])
def test_inverted_boxes_are_counted(tmp_path, said, corners):
    objects = OBJECT.format("box", 1, 1, 5, 5, "") + OBJECT.format("box", *corners, "")
    data = _make(_write(tmp_path, objects=objects))
    assert len(_targets(data)[0]["boxes"]) == 1
    assert "5 boxes without width or height are left out; the first is" in said.text


@pytest.mark.parametrize(("text", "message"), [
    ("<annotation>", "is not XML"), ("", "is not XML"), ("\xff\xfe\x00", "is not XML"),
    ('<?xml version="1.0" encoding="klingon"?><annotation/>', "is not XML"),
    ("<annotations><image/></annotations>", "not in VOC's format: .*export from CVAT as"),
    ("<project/>", "is not in VOC's format: it has <project>"),
    ("<annotation><size><width>4</width><height>x</height></size></annotation>", "<height> is 'x', not a number"),
    ("<annotation><size><width>41</width><height>36</height></size></annotation>", "it is 40 x 36 pixels, not 41 x 36"),
])
def test_bad_files_are_named_or_left_out(tmp_path, text, message):
    _write(tmp_path)
    (tmp_path / "Annotations" / "002.xml").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message) as raised:
        _make(tmp_path)
    assert "002" in str(raised.value)
    assert "\n" not in str(raised.value)
    data = _make(tmp_path, on_error="skip")
    assert len(data.records["train"]) + len(data.records["val"]) == 4


def test_entities_do_not_fill_the_memory(tmp_path):
    """A few lines that would expand to gigabytes."""
    _write(tmp_path)
    lines = ['<!ENTITY a0 "aaaaaaaaaa">'] + [f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 12)]
    (tmp_path / "Annotations" / "002.xml").write_text(f"<!DOCTYPE x [{''.join(lines)}]><annotation>&a11;</annotation>")
    with pytest.raises(ValueError, match=r"002.xml is not XML"):
        _make(tmp_path)


def test_an_image_without_file_is_named(tmp_path):
    _write(tmp_path)
    (tmp_path / "JPEGImages" / "002.jpg").unlink()
    with pytest.raises(ValueError, match=r"002.jpg: there is no such file"):
        _make(tmp_path)


def test_conversion_without_lists_parts_the_files(tmp_path, capsys):
    _write(tmp_path, ending="")
    for split in ("train", "val"):
        convert_voc(tmp_path, split, tmp_path / f"{split}.json")
    names = {split: [image["file_name"] for image in json.loads((tmp_path / f"{split}.json").read_text())["images"]]
             for split in ("train", "val")}
    assert (len(names["train"]), len(names["val"])) == (4, 1)
    assert sorted(names["train"] + names["val"]) == [f"00{index}.jpg" for index in range(5)]
    assert "4 train and 1 validate" in capsys.readouterr().out


def test_nothing_to_read(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"does not exist; data.init_args.root must be a folder with VOC's"):
        VocData(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="holds no XML files of VOC's format"):
        VocData(str(tmp_path))
    with pytest.raises(ValueError, match="has no object whose class could be taken"):
        VocData(str(_write(tmp_path, objects="")))


def test_trains_through_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _write(tmp_path / "photos")
    config = Path(visionattn.__file__).parent / "configs" / "detection" / "voc_finetune.yaml"
    assert main(["fit", "--config", str(config), "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu",
                 "--model.init_args.backbone", "test_dinat", "--model.init_args.fpn_channels", "64",
                 "--model.init_args.min_size", "64", "--model.init_args.max_size", "96",
                 "--data.init_args.num_workers", "0", "--data.init_args.min_batches", "1",
                 "--trainer.enable_progress_bar", "false"]) == 0
    metrics = json.loads((tmp_path / "runs" / "voc_finetune" / "test_metrics.json").read_text())
    assert (metrics["num_images"], metrics["num_classes"]) == (1, 1)


def test_a_missing_image_is_not_taken_from_another_split(tmp_path):
    for split in ("train", "valid"):
        _write(tmp_path / split, "", "")
    (tmp_path / "train" / "002.jpg").unlink()
    with pytest.raises(ValueError, match=r"002.jpg: there is no such file"):
        _make(tmp_path)
