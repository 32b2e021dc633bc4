"""Boxes and masks of photos that a viewer turns by their EXIF orientation."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

from visionattn.data import CocoData


def _make(root, content, stage="validate", train=None, **kwargs):
    (root / "val.json").write_text(json.dumps(content))
    if train is not None:
        (root / "train.json").write_text(json.dumps(train))
    data = CocoData(str(root), **dict(batch_size=3, num_workers=0, masks=True) | kwargs)
    data.setup(stage)
    return data


def _targets(data):
    return next(iter(data.val_dataloader()))[1]


TRANSPOSED = {
    1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _write_turned(path, tag, size=(40, 24), box=(4, 6, 10, 8)):
    """An image whose white rectangle is ``box`` as stored; returns its box as seen and the size as seen."""
    left, top, width, height = box
    pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    pixels[top:top + height, left:left + width] = 255
    exif = Image.Exif()
    exif[0x0112] = tag
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    image.save(path, exif=exif)
    seen = np.asarray(image if TRANSPOSED[tag] is None else image.transpose(TRANSPOSED[tag]))
    ys, xs = np.nonzero(seen[..., 0])
    return [int(xs.min()), int(ys.min()), int(xs.max() - xs.min()) + 1, int(ys.max() - ys.min()) + 1], seen.shape[1::-1]


@pytest.mark.parametrize("orientation", ["seen", "stored"])
@pytest.mark.parametrize("sizes", [True, False])
@pytest.mark.parametrize("tag", TRANSPOSED)
def test_boxes_and_masks_follow_the_picture_as_it_is_seen(tmp_path, tag, sizes, orientation):
    seen_box, seen_size = _write_turned(tmp_path / "val" / "a.png", tag)
    box, size = (seen_box, seen_size) if orientation == "seen" else ([4, 6, 10, 8], (40, 24))
    x, y, w, h = box
    image = {"id": 1, "file_name": "a.png"} | (dict(width=size[0], height=size[1]) if sizes else {})
    content = {"images": [image], "categories": [{"id": 1, "name": "a"}], "annotations": [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": box,
         "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]}]}
    images, targets = next(iter(_make(tmp_path, content, orientation=orientation).val_dataloader()))
    assert tuple(images[0].shape[1:]) == seen_size[::-1]
    assert targets[0]["orig_size"].tolist() == list(seen_size[::-1])
    x, y, w, h = seen_box
    assert targets[0]["boxes"].tolist() == [[x, y, x + w, y + h]]
    assert torch.equal(targets[0]["masks"][0].bool(), images[0][0] > 0.5)


@pytest.mark.parametrize("tag", [5, 6, 7, 8])
def test_the_sizes_of_the_file_tell_what_boxes_refer_to(tmp_path, tag):
    """Boxes of the stored pixels, though ``orientation`` is ``seen``: width and height are theirs."""
    (x, y, w, h), _ = _write_turned(tmp_path / "val" / "a.png", tag)
    content = {"images": [{"id": 1, "file_name": "a.png", "width": 40, "height": 24}],
               "categories": [{"id": 1, "name": "a"}],
               "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [4, 6, 10, 8]}]}
    data = _make(tmp_path, content, masks=False)
    assert _targets(data)[0]["boxes"].tolist() == [[x, y, x + w, y + h]]
