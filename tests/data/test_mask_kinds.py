"""SegmentationFolderData reads masks as tools save them, or says in one line what they hold and which option fits."""
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from visionattn.data import SegmentationFolderData
from visionattn.data.masks import color_table
from visionattn.runtime.pictures import voc_colors

from .images import truncate, write_image

SMALL = dict(crop_size=32, short_side=None, batch_size=2, num_workers=0)
ROAD = (128, 64, 128)


def _label(seed=0):
    """A label map ``[36, 40]`` with a rectangle of 1 on 0."""
    top, left = np.random.default_rng(seed).integers(0, 16, 2)
    label = np.zeros((36, 40), np.uint8)
    label[top:top + 16, left:left + 16] = 1
    return label


def _write(root, of=lambda label: label, ending="png", suffix="", splits=("train", "val"), count=4, **options):
    """Images and masks, those made of label maps by ``of``."""
    for number, split in enumerate(splits):
        for index in range(count):
            seed = 100 * number + index
            write_image(root / "images" / split / f"{index}.jpg", seed=seed)
            file = root / "masks" / split / f"{index}{suffix}.{ending}"
            file.parent.mkdir(parents=True, exist_ok=True)
            mask = of(_label(seed))
            (mask if isinstance(mask, Image.Image) else Image.fromarray(mask)).save(file, **options)


def _make(root, stage="fit", **kwargs):
    data = SegmentationFolderData(str(root), **SMALL | kwargs)
    data.setup(stage)
    return data


def _check(root, **kwargs):
    """The labels of the validation images are the label maps that were written."""
    data = _make(root, **kwargs)
    for index, (_, labels) in enumerate(data.val_dataloader()):
        assert torch.equal(labels[0], torch.from_numpy(_label(100 + index)).long())
    return data


def _refused(root, **kwargs):
    with pytest.raises(ValueError, match=str(root)) as raised:
        _make(root, **kwargs)
    assert "\n" not in str(raised.value)
    return str(raised.value).replace(str(root), "ROOT")


def test_black_and_white_masks_name_their_values_and_the_option(tmp_path):
    _write(tmp_path, lambda label: label * 255)
    message = _refused(tmp_path)
    assert "class 0 alone" in message
    assert "0 (82.2 %), 255 (17.8 %); set data.init_args.mask_values to [0, 255]" in message
    message = _refused(tmp_path, class_names=["ground", "box"])  # where 255 would be ignored
    assert "pixels of one class alone, ground" in message
    assert "set data.init_args.mask_values to [0, 255]" in message
    for values in ([0, 255], {0: 0, 255: 1}, {255: 1}):
        data = _check(tmp_path, mask_values=values)
        assert data.class_names == ["class_0", "class_1"]
    assert _check(tmp_path, mask_values=[0, 255], class_names=["ground", "box"]).num_classes == 2


def test_three_levels(tmp_path):
    def levels(label):
        label = label * np.uint8(255)
        label[:4] = 128
        return label

    _write(tmp_path, levels)
    message = _refused(tmp_path)
    assert "most of the classes 0 to 128" in message
    assert "128 (11.1 %)" in message
    assert "mask_values to [0, 128, 255]" in message
    assert _make(tmp_path, mask_values=[0, 128, 255]).num_classes == 3
    _, labels = next(iter(_make(tmp_path, mask_values={128: 255, 255: 1}).val_dataloader()))
    assert set(labels.unique().tolist()) == {0, 1, 255}
    assert (labels[0, :4] == 255).all()
    message = _refused(tmp_path, class_names=["ground", "box"])
    assert "a label without a class (128; labels are 0 to 1, and 255 is ignored)" in message
    assert "mask_values to what they mean, such as [0, 128, 255]" in message


@pytest.mark.parametrize("values", [(0, 100), (50, 200), (1, 2), (10, 11), (0, 40_000)])
def test_other_values(tmp_path, values):
    table = np.array(values, np.uint16 if max(values) > 255 else np.uint8)
    _write(tmp_path, lambda label: table[label])
    if values != (1, 2):  # which are classes, of which the first has no pixel
        assert f"mask_values to [{values[0]}, {values[1]}]" in _refused(tmp_path)
    _check(tmp_path, mask_values=list(values))


def test_values_beyond_the_classes(tmp_path, said):
    _write(tmp_path)
    Image.fromarray(_label(0) * np.uint8(7)).save(tmp_path / "masks" / "train" / "0.png")
    message = _refused(tmp_path, class_names=["ground", "box"])
    assert "0.png: the mask has a label without a class (7; labels are 0 to 1, and 255 is ignored)" in message
    assert "0 (82.2 %), 7 (17.8 %)" in message
    data = _make(tmp_path, class_names=["ground", "box"], on_error="skip")
    assert len(data.pairs["train"]) == 3
    assert "train masks with unknown labels have 0 (82.2 %), 7 (17.8 %)" in said.text


@pytest.mark.parametrize("value", [0, 1, 255])
def test_one_value_everywhere(tmp_path, value):
    _write(tmp_path, lambda label: np.full_like(label, value))
    expected = "all pixels" if value == 255 else "one class alone" if value else "class 0 alone"
    assert expected in _refused(tmp_path)
    expected = "are ignored as a whole" if value == 255 else "pixels of one class alone"
    message = _refused(tmp_path, class_names=["ground", "box"])
    assert expected in message
    assert f"{value} (100.0 %)" in message


def test_validation_masks_that_are_ignored(tmp_path):
    _write(tmp_path)
    for file in (tmp_path / "masks" / "val").iterdir():
        Image.new("L", (40, 36), 255).save(file)
    assert "the val masks of ROOT are ignored as a whole" in _refused(tmp_path)


def test_jpeg_masks(tmp_path):
    _write(tmp_path, lambda label: label * np.uint8(200), ending="jpg", quality=80)
    message = _refused(tmp_path)
    assert "are JPEG files, which do not keep values" in message
    assert "probably [0, 200]" in message
    assert "the mask is a JPEG" in _refused(tmp_path, class_names=["ground", "box"])
    data = _make(tmp_path, mask_values=[0, 200])
    for index, (_, labels) in enumerate(data.val_dataloader()):
        assert (labels[0] == torch.from_numpy(_label(100 + index))).float().mean() > 0.98
        assert set(labels.unique().tolist()) == {0, 1}


def test_smoothed_edges(tmp_path):
    def of(label):
        return Image.fromarray(label * np.uint8(255)).resize((23, 21), Image.Resampling.BILINEAR).resize(
            (40, 36), Image.Resampling.BICUBIC)

    _write(tmp_path, of)
    message = _refused(tmp_path)
    assert "edges that were smoothed" in message
    assert "mask_values to [0, 255] and mask_nearest to true" in message
    message = _refused(tmp_path, class_names=["ground", "box"])
    assert "a label without a class" in message
    assert "mask_values to those meant, probably [0, 255], and mask_nearest to true" in message
    assert "a label without a class" in _refused(tmp_path, mask_values=[0, 255])
    data = _make(tmp_path, mask_values=[0, 255], mask_nearest=True)
    for index, (_, labels) in enumerate(data.val_dataloader()):
        assert (labels[0] == torch.from_numpy(_label(100 + index))).float().mean() > 0.95


def _in_colors(label):
    return np.array([(0, 0, 0), ROAD], np.uint8)[label]


TABLES = {
    "table.yaml": "ground: [0, 0, 0]\nroad: [128, 64, 128]\n",
    "hex.yml": "ground: '#000000'\nroad: '804080'\n",
    "list.yaml": "- {name: ground, color: [0, 0, 0]}\n- {name: road, color: '#804080'}\n",
    "class_dict.csv": "name, r, g, b\nground, 0, 0, 0\nroad, 128, 64, 128\n",
    "bare.csv": "ground;0;0;0\nroad;128;64;128\n",
    "numbered.csv": "id,name,r,g,b\n0,ground,0,0,0\n1,road,128,64,128\n",
    "hex.csv": "name,color\nground,#000000\nroad,#804080\n",
    "labelmap.txt": "# label:color_rgb:parts:actions\nground:0,0,0::\nroad:128,64,128::\n",
}


@pytest.mark.parametrize("name", TABLES)
def test_masks_in_colours_with_a_table(tmp_path, name):
    _write(tmp_path, _in_colors)
    file = tmp_path / name
    file.write_text(TABLES[name], encoding="utf-8-sig")
    assert _check(tmp_path, mask_colors=str(file)).class_names == ["ground", "road"]


def test_masks_in_colours_without_a_table(tmp_path):
    _write(tmp_path, _in_colors)
    message = _refused(tmp_path)
    assert "are in colours: (0, 0, 0) (82.2 %), (128, 64, 128) (17.8 %)" in message
    assert "mask_colors to a YAML or CSV file of names and colours" in message
    assert "colours where classes are expected ((0, 0, 0) (" in _refused(tmp_path, class_names=["ground", "road"])
    assert _check(tmp_path, mask_colors={"ground": [0, 0, 0], "road": list(ROAD)}).class_names == ["ground", "road"]
    message = _refused(tmp_path, mask_colors={"ground": [0, 0, 0], "sky": [1, 2, 3]})
    assert "(128, 64, 128); mask_colors has 2 others" in message
    assert "train masks with unknown colours have (0, 0, 0) (82.2 %), (128, 64, 128) (17.8 %)" in message


def test_tables_of_data_sets(tmp_path):
    assert (len(color_table("cityscapes")[0]), len(color_table("voc")[0])) == (19, 21)
    assert voc_colors()[:4] == [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0)]
    colors = np.array([voc_colors()[0], voc_colors()[15]], np.uint8)
    _write(tmp_path, lambda label: colors[label])
    assert "mask_colors to voc, which has these" in _refused(tmp_path)
    data = _make(tmp_path, mask_colors="voc")
    _, labels = next(iter(data.val_dataloader()))
    assert data.class_names[15] == "person"
    assert torch.equal(labels[0], 15 * torch.from_numpy(_label(100)).long())


def test_ignored_colours(tmp_path):
    def of(label):
        label[:2] = 2
        return np.array([(0, 0, 0), (9, 9, 9), (5, 0, 5)], np.uint8)[label]

    _write(tmp_path, of)
    data = _make(tmp_path, mask_colors={"Void": [5, 0, 5], "ground": [0, 0, 0], "box": [9, 9, 9]})
    assert data.class_names == ["ground", "box"]
    for _, labels in data.val_dataloader():
        assert (labels[0, :2] == 255).all()
        assert set(labels[0, 2:].unique().tolist()) == {0, 1}


@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_colours_that_are_not_exact(tmp_path, ending):
    def shaded(label):
        noise = np.random.default_rng(0).integers(-6, 7, (*label.shape, 3))
        return np.clip(_in_colors(label).astype(int) + noise, 0, 255).astype(np.uint8)

    _write(tmp_path, shaded, ending=ending, **(dict(quality=95, subsampling=0) if ending == "jpg" else {}))
    colors = {"ground": [0, 0, 0], "road": list(ROAD)}
    if ending == "png":
        assert "mask_nearest to true" in _refused(tmp_path, mask_colors=colors)
    data = _make(tmp_path, mask_colors=colors, mask_nearest=ending == "png")
    for index, (_, labels) in enumerate(data.val_dataloader()):
        assert (labels[0] == torch.from_numpy(_label(100 + index))).float().mean() > 0.97


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P", "1", "I", "F", "I;16"])
@pytest.mark.parametrize("ending", ["png", "tiff"])
def test_grey_masks_in_other_forms(tmp_path, mode, ending):
    if ending == "png" and mode in "IF":
        pytest.skip("PNG has neither fractions nor 32 bits")

    def of(label):
        if mode == "1":
            return Image.fromarray(label.astype(bool))
        if mode == "P":
            image = Image.fromarray(label)
            image.putpalette([0, 0, 0, 250, 10, 20])
            return image
        if mode == "I;16":
            return Image.fromarray(label.astype(np.uint16))
        return Image.fromarray(label).convert(mode)

    _write(tmp_path, of, ending=ending)
    _check(tmp_path)


def test_palettes_that_differ_are_said(tmp_path, said):
    flips = iter([False, True] * 4)

    def of(label):
        flip = next(flips)
        image = Image.fromarray(1 - label if flip else label)
        image.putpalette([*ROAD, 0, 0, 0] if flip else [0, 0, 0, *ROAD])
        return image

    _write(tmp_path, of)
    _make(tmp_path)
    assert "palettes of masks differ: the value 0 has the colour (0, 0, 0) in" in said.text
    said.clear()
    _check(tmp_path, mask_colors={"ground": [0, 0, 0], "road": list(ROAD)})
    assert "palettes" not in said.text


@pytest.mark.parametrize(("table", "message"), [
    ("nowhere.csv", "there is no file nowhere.csv"), ({"a": [0, 0]}, "the colour of 'a'"), ({"a": [0, 0, 256]}, "'a'"),
    ({"a": [1, 2, 3], "b": [1, 2, 3]}, "'a' and 'b' have the same colour"), ({"void": [0, 0, 0]}, "names no class"),
])
def test_bad_tables(table, message):
    with pytest.raises(ValueError, match=message):
        color_table(table)


def test_bad_options(tmp_path):
    _write(tmp_path)
    for options, message in [
        (dict(mask_values=[0, 0]), "a value twice"), (dict(mask_values={0: 300}), "labels from 0 to 254"),
        (dict(mask_values=[0, 1], mask_colors="voc"), "have either"), (dict(orientation="up"), "seen or stored"),
        (dict(mask_values=[0, 1], class_names=["a", "b", "c"]), "3 class names were given; mask_values has 2"),
        (dict(mask_values=[0, 1], layout="ade20k"), "the layout ade20k says what values mean"),
        (dict(mask_name="mask"), r"mask_name must have one \*"),
    ]:
        with pytest.raises(ValueError, match=message):
            _make(tmp_path, **options)


@pytest.mark.parametrize("splits", [("Train", "Val"), ("training", "validation"), ("train", "valid"), ("TRAIN", "dev")])
def test_splits_in_usual_spellings(tmp_path, splits):
    _write(tmp_path, splits=splits)
    assert {split: len(pairs) for split, pairs in _check(tmp_path).pairs.items()} == {"train": 4, "val": 4}


def _move(root, moves):
    """Renames folders below ``root``; a name may be used again by a later one."""
    for old, new in moves.items():
        (root / new).parent.mkdir(parents=True, exist_ok=True)
        (root / old).rename(root / new)


@pytest.mark.parametrize("moves", [
    {"images": "imgs", "masks": "labels"}, {"images": "JPEGImages", "masks": "SegmentationClass"},
    {"images": "Image", "masks": "ground_truth"}, {"images": "a/images", "masks": "a/masks"},
    {"images/train": "train/images", "masks/train": "train/masks", "images/val": "dev/imgs", "masks/val": "dev/gt"},
    {"images/train": "train", "masks/train": "train_masks", "images/val": "val", "masks/val": "val_masks"},
    {"images/train": "train", "masks/train": "trainannot", "images/val": "val", "masks/val": "valannot"},
])
def test_folders_in_usual_places(tmp_path, moves):
    _write(tmp_path / "from")
    for old, new in moves.items():
        (tmp_path / "to" / new).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "from" / old).rename(tmp_path / "to" / new)
    data = _check(tmp_path / "to")
    assert {split: len(pairs) for split, pairs in data.pairs.items()} == {"train": 4, "val": 4}


def test_folders_by_name(tmp_path):
    _write(tmp_path)
    (tmp_path / "images").rename(tmp_path / "photographs")
    (tmp_path / "masks").rename(tmp_path / "painted")
    with pytest.raises(FileNotFoundError, match="image_folder and mask_folder name other folders"):
        _make(tmp_path)
    _check(tmp_path, image_folder="photographs", mask_folder="painted")


def test_folders_of_other_files_are_no_masks(tmp_path):
    _write(tmp_path, splits=("",))
    (tmp_path / "ann").mkdir()
    (tmp_path / "ann" / "0.jpg.json").write_text("{}")
    assert len(_make(tmp_path).pairs["train"]) == 3
    (tmp_path / "masks").rename(tmp_path / "painted")
    (tmp_path / "images").rename(tmp_path / "img")
    assert len(_make(tmp_path, mask_folder="painted").pairs["train"]) == 3


@pytest.mark.parametrize("suffix", [
    "_mask", "_seg", "_label", "-mask", ".mask", "_GT", "_segmentation", " Mask", "_L", ".jpg", ".jpg_mask"])
def test_masks_with_a_suffix(tmp_path, suffix, said):
    _write(tmp_path, suffix=suffix)
    data = _check(tmp_path)
    assert [pair.name for pair in data.pairs["val"]] == ["0", "1", "2", "3"]
    assert "Masks are matched to images by their names, such as 0.jpg and 0" in said.text


def test_names_of_cityscapes_in_plain_folders(tmp_path):
    _write(tmp_path)
    for split in ("train", "val"):
        for index in range(4):
            image, mask = tmp_path / "images" / split / f"{index}.jpg", tmp_path / "masks" / split / f"{index}.png"
            image.rename(image.with_name(f"ulm_{index}_leftImg8bit.jpg"))
            mask.rename(mask.with_name(f"ulm_{index}_gtFine_labelTrainIds.png"))
    _check(tmp_path)


def test_pairs_by_other_names(tmp_path):
    _write(tmp_path)
    for split in ("train", "val"):
        for index in range(4):
            (tmp_path / "images" / split / f"{index}.jpg").rename(tmp_path / "images" / split / f"x{index}_in.jpg")
            (tmp_path / "masks" / split / f"{index}.png").rename(tmp_path / "masks" / split / f"y{index}_out.png")
    message = _refused(tmp_path)
    assert "no mask in ROOT/masks/train has the name of an image in ROOT/images/train" in message
    assert "x0_in.jpg and y0_out.png; set image_name and mask_name" in message
    _check(tmp_path, image_name="x*_in", mask_name="y*_out")


def test_images_and_masks_in_one_folder(tmp_path):
    _write(tmp_path)
    for split in ("train", "val"):
        for index in range(4):
            (tmp_path / "masks" / split / f"{index}.png").rename(tmp_path / "images" / split / f"{index}_mask.png")
    (tmp_path / "images").rename(tmp_path / "set")
    data = _check(tmp_path / "set")
    assert len(data.pairs["train"]) == 4
    for split in ("train", "val"):
        (tmp_path / "set" / split / "_classes.csv").write_text("Pixel Value, Class\n0, ground\n1, box\n")
    assert _check(tmp_path / "set").class_names == ["ground", "box"]


def test_test_images_without_masks(tmp_path, said):
    _write(tmp_path)
    write_image(tmp_path / "images" / "test" / "0.jpg")
    data = _make(tmp_path, "test")
    assert data.pairs["test"] == data.pairs["val"]
    assert "The test images have no masks" in said.text


def test_one_damaged_mask(tmp_path, said):
    _write(tmp_path)
    truncate(tmp_path / "masks" / "train" / "3.png")
    assert "3.png: the mask cannot be read" in _refused(tmp_path)
    data = _make(tmp_path, on_error="skip")
    assert len(data.pairs["train"]) == 3
    assert "1 left out: the mask cannot be read" in data.report.text()
    (tmp_path / "masks" / "train" / "3.png").write_bytes(b"")
    assert len(_make(tmp_path, on_error="skip").pairs["train"]) == 3


@pytest.mark.parametrize("tag", range(1, 9))
@pytest.mark.parametrize("kind", ["seen", "stored"])
def test_masks_turn_with_their_photos(tmp_path, tag, kind):
    """The bright half of a photo is class 1, whichever way the camera was held and the tool drew it."""
    to_stored = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transposition that a viewer takes back
    for split in ("train", "val"):
        seen = np.zeros((36, 40), np.uint8)
        seen[:18, :20] = 1
        stored = Image.fromarray(seen)
        if tag > 1:
            stored = stored.transpose(Image.Transpose(to_stored[tag]))
        exif = Image.Exif()
        exif[0x0112] = tag
        photo = Image.fromarray(np.asarray(stored) * np.uint8(200)).convert("RGB")
        for folder in ("images", "masks"):
            (tmp_path / folder / split).mkdir(parents=True)
        photo.save(tmp_path / "images" / split / "0.jpg", exif=exif, quality=95)
        (Image.fromarray(seen) if kind == "seen" else stored).save(tmp_path / "masks" / split / "0.png")
    data = _make(tmp_path, orientation=kind)
    image, labels = next(iter(data.val_dataloader()))
    assert torch.equal(labels[0], torch.from_numpy(seen).long())
    assert ((image[0].mean(0) > 0.4) == labels[0].bool()).float().mean() > 0.95
    if tag > 4:  # the size tells, without the option
        assert torch.equal(next(iter(_make(tmp_path).val_dataloader()))[1], labels)


def test_table_of_pixels(tmp_path):
    _write(tmp_path)
    report = _make(tmp_path, class_names=["ground", "box"]).report
    assert report.unit == "pixels"
    assert report.splits["train"].counts == {"ground": 4 * (36 * 40 - 256), "box": 4 * 256}
    Image.fromarray(np.full((36, 40), 255, np.uint8)).save(tmp_path / "masks" / "train" / "0.png")
    assert "1 kept: all of the mask is ignored" in _make(tmp_path, class_names=["ground", "box"]).report.text()


def test_shared_images_are_counted(tmp_path, said):
    _write(tmp_path)
    Path(tmp_path / "images" / "val" / "0.jpg").write_bytes((tmp_path / "images" / "train" / "2.jpg").read_bytes())
    _make(tmp_path)
    assert "Warning: 1 of 4 val images are training images too" in said.text
