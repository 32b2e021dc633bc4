"""SegmentationFolderData: the layouts, the transforms, and what it says about files that cannot be used."""

import numpy as np
import pytest
import torch
from PIL import Image

from visionattn.data import SegmentationFolderData
from visionattn.data.dense_transforms import SegmentationTransform

from .images import truncate, write_image, write_mask

SMALL = dict(crop_size=32, short_side=None, batch_size=2, num_workers=0)
NAMES = ["ground", "cat", "dog"]


@pytest.fixture
def plain(tmp_path):
    for split, count in (("train", 5), ("val", 3)):
        for index in range(count):
            write_image(tmp_path / "images" / split / f"{index}.jpg", seed=index)
            write_mask(tmp_path / "masks" / split / f"{index}.png", values=(0, 1, 2, 255), seed=index)
    return tmp_path


def _make(root, stage="fit", **kwargs):
    data = SegmentationFolderData(str(root), **SMALL | kwargs)
    data.setup(stage)
    return data


def _values(path):
    return torch.from_numpy(np.array(Image.open(path))).long()


def test_batches(plain):
    data = _make(plain, class_names=NAMES)
    assert (data.num_classes, data.class_names) == (3, NAMES)
    images, labels = next(iter(data.train_dataloader()))
    assert (images.shape, images.dtype) == ((2, 3, 32, 32), torch.float32)
    assert (labels.shape, labels.dtype) == ((2, 32, 32), torch.int64)
    assert type(images) is type(labels) is torch.Tensor
    assert 0 <= images.min() < images.max() <= 1
    assert set(labels.unique().tolist()) <= {0, 1, 2, 255}
    assert len(data.train_dataloader()) == 2
    evaluated = list(data.val_dataloader())
    assert len(evaluated) == 3
    for index, (image, truth) in enumerate(evaluated):
        assert image.shape == (1, 3, 36, 40)
        assert torch.equal(truth[0], _values(plain / "masks" / "val" / f"{index}.png"))


def test_evaluation_resizes_the_image_alone(plain):
    image, labels = next(iter(_make(plain, class_names=NAMES, short_side=72).val_dataloader()))
    assert (image.shape, labels.shape) == ((1, 3, 72, 80), (1, 36, 40))
    image, labels = next(iter(_make(plain, class_names=NAMES, short_side=72, max_size=60).val_dataloader()))
    assert (image.shape, labels.shape) == ((1, 3, 54, 60), (1, 36, 40))


def test_batches_of_evaluation_need_one_size(plain):
    data = _make(plain, class_names=NAMES, eval_batch_size=3)
    assert next(iter(data.val_dataloader()))[0].shape == (3, 3, 36, 40)
    write_image(plain / "images" / "val" / "1.jpg", (48, 36))
    write_mask(plain / "masks" / "val" / "1.png", (48, 36))
    with pytest.raises(ValueError, match="different sizes cannot be in one batch: set the data's eval_batch_size to 1"):
        next(iter(_make(plain, class_names=NAMES, eval_batch_size=3).val_dataloader()))


def test_classes_are_counted(plain, said):
    data = _make(plain)
    assert data.class_names == ["class_0", "class_1", "class_2"]
    assert "values up to 2, so there are 3 classes" in said.text


def test_masks_in_black_and_white_are_explained(plain):
    for index in range(5):
        write_mask(plain / "masks" / "train" / f"{index}.png", values=(0, 255))
    with pytest.raises(ValueError, match=r"have the class 0 alone; classes are the values 0, 1, 2, .*255 is ignored"):
        _make(plain)
    Image.open(plain / "masks" / "train" / "0.png").convert("1").save(plain / "masks" / "train" / "0.png")
    assert _make(plain, verify=False).num_classes == 2  # one bit: 0 and 1


def test_testing_uses_the_validation_images_unless_there_are_others(plain, said):
    data = _make(plain, stage="test", class_names=NAMES)
    assert data.pairs["test"] == data.pairs["val"]
    assert "the validation images are used" in said.text
    write_image(plain / "images" / "test" / "park" / "z.png")
    write_mask(plain / "masks" / "test" / "park" / "z.png")
    data = _make(plain, stage="test", class_names=NAMES)
    assert [pair.name for pair in data.pairs["test"]] == ["park/z"]


def test_hold_out(tmp_path, said):
    for index in range(10):
        write_image(tmp_path / "images" / f"{index}.jpg", seed=index)
        write_mask(tmp_path / "masks" / f"{index}.png", seed=index)

    def split(seed):
        data = _make(tmp_path, seed=seed, val_fraction=0.3)
        return [[pair.name for pair in data.pairs[name]] for name in ("train", "val")]

    train, val = split(seed=0)
    assert (len(train), len(val)) == (7, 3)
    assert sorted(train + val) == [str(index) for index in range(10)]
    assert split(seed=1) == [train, val]
    assert "7 of its images train and 3 validate" in said.text


def test_hold_out_leaves_the_test_images_alone(plain):
    (plain / "images" / "val").rename(plain / "images" / "test")
    (plain / "masks" / "val").rename(plain / "masks" / "test")
    data = _make(plain, class_names=NAMES)
    data.setup("test")
    assert {split: len(pairs) for split, pairs in data.pairs.items()} == {"train": 4, "val": 1, "test": 3}
    assert data.pairs["test"][0].image.parts[-2] == "test"


def test_predict(plain):
    images, names, sizes = next(iter(_make(plain, stage="predict", class_names=NAMES).predict_dataloader()))
    assert (images.shape, list(names), sizes.tolist()) == ((1, 3, 36, 40), ["0"], [[36, 40]])
    write_image(plain / "inbox" / "deep" / "b.c.jpg", (30, 20))
    data = _make(plain, stage="predict", class_names=NAMES, predict_root=str(plain / "inbox"), short_side=40)
    images, names, sizes = next(iter(data.predict_dataloader()))
    assert (images.shape, list(names), sizes.tolist()) == ((1, 3, 40, 60), ["deep/b.c"], [[20, 30]])


def test_ade20k(tmp_path):
    for split in ("training", "validation"):
        write_image(tmp_path / "images" / split / "ADE_1.jpg")
        write_mask(tmp_path / "annotations" / split / "ADE_1.png", values=(0, 1, 150))
    data = _make(tmp_path, layout="ade20k")
    assert (data.num_classes, data.class_names[0]) == (150, "class_1")
    _, labels = next(iter(data.val_dataloader()))
    values = _values(tmp_path / "annotations" / "validation" / "ADE_1.png")
    assert torch.equal(labels[0], torch.where(values == 0, 255, values - 1))
    rows = [f"{number}\t0.1\t1\t1\tthing {number}, other name" for number in range(1, 151)]
    (tmp_path / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *rows]) + "\n")
    assert _make(tmp_path, layout="ade20k").class_names[149] == "thing 150"
    (tmp_path / "objectInfo150.txt").write_text("\n".join(rows[:20]))
    with pytest.raises(ValueError, match=r"objectInfo150.txt names 19 classes where 150 are expected"):
        _make(tmp_path, layout="ade20k")


def test_cityscapes(tmp_path):
    for split in ("train", "val"):
        for city in ("bonn", "ulm"):
            stem = f"{city}/{city}_000000_000019"
            write_image(tmp_path / "leftImg8bit" / split / f"{stem}_leftImg8bit.png")
            write_mask(tmp_path / "gtFine" / split / f"{stem}_gtFine_labelIds.png", values=(0, 7, 11, 12, 30, 33))
            write_mask(tmp_path / "gtFine" / split / f"{stem}_gtFine_instanceIds.png")
    data = _make(tmp_path, layout="cityscapes")
    assert data.num_classes == 19
    assert [data.class_names[index] for index in (0, 10, 18)] == ["road", "sky", "bicycle"]
    _, labels = next(iter(data.val_dataloader()))
    values = _values(tmp_path / "gtFine" / "val" / "bonn" / "bonn_000000_000019_gtFine_labelIds.png")
    expected = {0: 255, 7: 0, 11: 2, 12: 3, 30: 255, 33: 18}
    assert torch.equal(labels[0], values.apply_(expected.get))
    assert [pair.name for pair in data.pairs["val"]] == [f"{city}/{city}_000000_000019" for city in ("bonn", "ulm")]


def test_voc(tmp_path):
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for split, stems in (("train", ["a", "b"]), ("val", ["c"])):
        (lists / f"{split}.txt").write_text("\n".join(stems) + "\n")
        for stem in stems:
            write_image(tmp_path / "JPEGImages" / f"{stem}.jpg")
            write_mask(tmp_path / "SegmentationClass" / f"{stem}.png", values=(0, 15, 20, 255), mode="P")
    data = _make(tmp_path, layout="voc")
    assert (data.num_classes, data.class_names[0], data.class_names[15]) == (21, "background", "person")
    assert [pair.name for pair in data.pairs["train"]] == ["a", "b"]
    _, labels = next(iter(data.val_dataloader()))
    assert torch.equal(labels[0], _values(tmp_path / "SegmentationClass" / "c.png"))  # the palette's indices
    assert set(labels.unique().tolist()) == {0, 15, 20, 255}
    (lists / "train.txt").write_text("a\nlost\n")
    with pytest.raises(ValueError, match=r"lost.jpg: a listed file does not exist \(train.txt lists lost\)"):
        _make(tmp_path, layout="voc")
    with pytest.raises(FileNotFoundError, match=r"trainaug.txt does not exist"):
        _make(tmp_path, layout="voc", train_split="trainaug")


def test_training_crops_keep_image_and_labels_together():
    torch.manual_seed(0)
    labels = torch.arange(48).div(8, rounding_mode="floor").to(torch.uint8).repeat(40, 1)
    labels[:20] += 6
    image = (20 * labels + 10).repeat(3, 1, 1)
    transform = SegmentationTransform(24, None, None, (0.5, 2.0), 0.75, 0.5, 0.0)
    mirrored = padded = 0
    for _ in range(30):
        crop, truth = transform(image, labels)
        assert crop.shape == (3, 24, 24)
        inside = truth != 255
        # Resizing blends images at the edges between classes, where labels cannot.
        agree = (crop[0].int() - (20 * truth.int() + 10)).abs()[inside] <= 10
        assert agree.float().mean() > 0.85
        padded += (~inside).any().item()
        assert (crop[:, ~inside] == torch.tensor([[124], [116], [104]])).all()
        row = truth[0][truth[0] != 255].int()
        mirrored += row[0] > row[-1]
    assert 5 < mirrored < 25
    assert padded > 0


def test_short_side_of_training_images():
    torch.manual_seed(0)
    labels = torch.zeros(20, 40, dtype=torch.uint8)
    transform = SegmentationTransform(100, 40, 60, (1.0, 1.0), 0.75, 0.0, 0.0)
    _, truth = transform(torch.zeros(3, 20, 40, dtype=torch.uint8), labels)
    assert (truth == 0).sum() == 30 * 60  # the longer side's bound binds first
    assert (truth[:30, :60] == 0).all()


def test_crops_avoid_one_prevailing_class():
    labels = torch.zeros(40, 200, dtype=torch.uint8)
    labels[:, 60:] = 1
    image = torch.zeros(3, 40, 200, dtype=torch.uint8)

    def mixed(ratio):
        torch.manual_seed(0)
        transform = SegmentationTransform(40, None, None, (1.0, 1.0), ratio, 0.0, 0.0)
        shares = [(transform(image, labels)[1] == 1).float().mean() for _ in range(50)]
        return sum(0.25 < share < 0.75 for share in shares)

    assert mixed(1.1) < 15
    assert mixed(0.75) > 30


def test_colour_jitter_leaves_the_labels():
    torch.manual_seed(0)
    image = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8)
    labels = torch.randint(0, 3, (8, 8), dtype=torch.uint8)
    transform = SegmentationTransform(8, None, None, (1.0, 1.0), 0.75, 0.0, 0.5)
    changed, truth = transform(image, labels)
    assert not torch.equal(changed, image)
    assert torch.equal(truth, labels)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_training_draws_depend_on_seed_and_epoch(plain, num_workers):
    def batch(epoch):
        loader = _make(plain, class_names=NAMES, num_workers=num_workers).train_dataloader()
        loader.sampler.set_epoch(epoch)
        torch.manual_seed(epoch)  # the task does so at the start of an epoch
        return next(iter(loader))

    assert all(map(torch.equal, batch(2), batch(2)))
    assert not torch.equal(batch(2)[1], batch(1)[1])


def _masks(plain):
    return plain / "masks" / "train"


FAULTS = {
    "no mask": (lambda root: (_masks(root) / "1.png").unlink(), "images.train.1.jpg: the image has no mask"),
    "no image": (lambda root: (root / "images" / "train" / "1.jpg").unlink(), "1.png: the mask has no image"),
    "size": (lambda root: write_mask(_masks(root) / "1.png", (36, 40)),
             r"1.png: the mask has another size than its image \(36 x 40 pixels, the image 40 x 36\)"),
    "label": (lambda root: write_mask(_masks(root) / "1.png", values=(0, 3)),
              r"1.png: the mask has a label without a class \(3; labels are 0 to 2, and 255 is ignored\)"),
    "colours": (lambda root: write_image(_masks(root) / "1.png"), "1.png: the mask has colours where classes are"),
    "truncated mask": (lambda root: truncate(write_image(_masks(root) / "1.png")), "1.png: the mask cannot be read"),
    "no image by its content": (lambda root: (root / "images" / "train" / "1.jpg").write_bytes(b"text"),
                                "1.jpg: the file cannot be read as an image"),
    "same name": (lambda root: write_image(root / "images" / "train" / "1.png"),
                  "1.png: two files have the same name but for the extension"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_files_stop_or_are_counted(plain, said, fault):
    change, message = FAULTS[fault]
    change(plain)
    with pytest.raises(ValueError, match=message) as raised:
        _make(plain, class_names=NAMES)
    assert "\n" not in str(raised.value)
    assert "on_error to skip" in str(raised.value)
    data = _make(plain, class_names=NAMES, on_error="skip")
    assert "1 left out" in said.text
    assert len(data.pairs["train"]) == (5 if fault == "same name" else 4)
    assert len(list(data.train_dataloader())) == 2


def test_truncated_image_is_named_when_loaded_or_skipped(plain, said):
    truncate(plain / "images" / "val" / "1.jpg")
    data = _make(plain, class_names=NAMES)  # its header is whole
    with pytest.raises(ValueError, match=r"1.jpg cannot be read as an image: .*on_error to skip"):
        list(data.val_dataloader())
    assert len(_make(plain, class_names=NAMES, on_error="skip").pairs["val"]) == 2
    assert "1 left out: the file cannot be read as an image" in said.text


def test_unverified_masks_are_named_when_loaded(plain):
    write_mask(plain / "masks" / "val" / "1.png", values=(9,))
    data = _make(plain, class_names=NAMES, verify=False)
    with pytest.raises(ValueError, match=r"1.png: the mask has a label without a class \(9;"):
        list(data.val_dataloader())


def test_missing_folders(tmp_path, plain):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        _make(plain / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"JPEGImages|train.txt does not exist"):
        _make(plain, layout="voc")
    with pytest.raises(FileNotFoundError, match=r"annotations.training does not exist|images.training does not exist"):
        _make(plain, layout="ade20k")
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        _make(plain, "predict", class_names=NAMES, predict_root=str(plain / "lost")).predict_dataloader()


def test_empty_folders(tmp_path):
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match="holds no train images that can be used"):
        _make(tmp_path, class_names=NAMES)
    with pytest.raises(ValueError, match="holds no mask to count classes in; give class_names"):
        _make(tmp_path)


@pytest.mark.parametrize(("kwargs", "message"), [
    (dict(layout="coco"), "layout must be one of"), (dict(val_fraction=1.0), "val_fraction"),
    (dict(eval_batch_size=0), "eval_batch_size"), (dict(scale=(2.0, 0.5)), "scale"), (dict(on_error="no"), "on_error"),
    (dict(layout="voc", class_names=NAMES), "3 class names were given; the layout voc has 21 classes"),
    (dict(class_names=["x"] * 256), "255 classes at most"),
])
def test_bad_arguments(plain, kwargs, message):
    with pytest.raises(ValueError, match=message):
        SegmentationFolderData(str(plain), **SMALL | dict(class_names=NAMES) | kwargs)
