"""Images of other channels than three: what their files hold, in [0, 1], or one line with the file's name."""
import numpy as np
import pytest
import torch
from PIL import Image

from visionattn.data import CsvData, ImageFolderData, SegmentationFolderData, YoloData
from visionattn.runtime.pixels import Decoding, picture_of

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (12, 16, 5), dtype=np.uint8)


def _tensor(file, channels, **options):
    return torch.from_numpy(Decoding(channels=channels, **options).array(file))


@pytest.mark.parametrize(("dtype", "values"), [
    (np.uint8, PIXELS / 255), (np.uint16, PIXELS / 255), (np.float32, PIXELS / 255), (np.float64, PIXELS / 255),
    (bool, PIXELS > 127), (">u2", PIXELS / 255),
])
@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_arrays(tmp_path, dtype, values, channels):
    scale = {"u": np.iinfo(np.dtype(dtype)).max if np.dtype(dtype).kind == "u" else 1}.get(np.dtype(dtype).kind, 1)
    array = np.round(values * scale) if scale > 1 else values
    np.save(tmp_path / "a.npy", array[..., :channels].astype(dtype))
    found = _tensor(tmp_path / "a.npy", channels)
    assert found.dtype == (torch.uint8 if channels == 3 else torch.float32)
    expected = torch.tensor(values[..., :channels].astype(np.float64)).movedim(-1, 0)
    assert torch.allclose(found / (255 if channels == 3 else 1), expected.float(), atol=1e-2 if channels == 3 else 1e-4)
    assert Decoding(channels=channels).look(tmp_path / "a.npy", decode=True).size == (16, 12)


def test_arrays_of_other_ranges(tmp_path):
    np.save(tmp_path / "a.npy", PIXELS.astype(np.int32) * 10)
    with pytest.raises(ValueError, match=r"integers of an unknown range from .* set value_range"):
        _tensor(tmp_path / "a.npy", 5)
    assert torch.allclose(_tensor(tmp_path / "a.npy", 5, value_range=(0, 2550)),
                          torch.tensor(PIXELS).movedim(-1, 0) / 255, atol=1e-6)
    np.save(tmp_path / "flat.npy", PIXELS[..., 0])
    assert _tensor(tmp_path / "flat.npy", 1).shape == (1, 12, 16)


def test_bands_of_pictures(tmp_path):
    Image.fromarray(PIXELS[..., :4]).save(tmp_path / "a.png")
    expected = torch.tensor(PIXELS).movedim(-1, 0) / 255
    assert torch.allclose(_tensor(tmp_path / "a.png", 4), expected[:4])
    pages = [Image.fromarray(PIXELS[..., index]) for index in range(5)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    assert torch.allclose(_tensor(tmp_path / "a.tif", 5), expected)
    assert not Decoding(channels=5).look(tmp_path / "a.tif").animated
    Image.fromarray(PIXELS[..., :2], mode="LA").save(tmp_path / "la.png")
    assert torch.allclose(_tensor(tmp_path / "la.png", 2), expected[:2])
    deep = [Image.fromarray(PIXELS[..., index].astype(np.uint16) * 257) for index in range(2)]
    deep[0].save(tmp_path / "deep.tif", save_all=True, append_images=deep[1:])
    assert torch.allclose(_tensor(tmp_path / "deep.tif", 2), expected[:2], atol=1e-4)


def test_grey(tmp_path):
    Image.fromarray(PIXELS[..., 0]).save(tmp_path / "grey.png")
    assert torch.allclose(_tensor(tmp_path / "grey.png", 1)[0], torch.tensor(PIXELS[..., 0]) / 255)
    Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257).save(tmp_path / "deep.png")
    assert torch.allclose(_tensor(tmp_path / "deep.png", 1)[0], torch.tensor(PIXELS[..., 0]) / 255, atol=1e-4)
    Image.fromarray(PIXELS[..., :3]).save(tmp_path / "colour.png")
    luma = np.asarray(Image.fromarray(PIXELS[..., :3]).convert("L"))
    assert torch.allclose(_tensor(tmp_path / "colour.png", 1)[0], torch.tensor(luma) / 255)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PIXELS[..., 0]).save(tmp_path / "side.png", exif=exif)
    assert torch.allclose(_tensor(tmp_path / "side.png", 1)[0], torch.tensor(np.rot90(PIXELS[..., 0], -1).copy()) / 255)


@pytest.mark.parametrize(("name", "channels", "message"), [
    ("a.png", 4, "it has 3 channels, not the 4 of in_chans"), ("a.tif", 4, "it has 3 pages, not the 4 of in_chans"),
    ("a.npy", 4, "array of 12 x 16 x 5 uint8, not of height x width x 4"),
    ("b.npy", 4, "no array of numbers, or damaged"),
    ("c.tif", 5, "TIFF file of a kind that cannot be decoded: save its bands"),
])
def test_other_channels_are_refused(tmp_path, name, channels, message):
    Image.fromarray(PIXELS[..., :3]).save(tmp_path / "a.png")
    Image.fromarray(PIXELS[..., 0]).save(tmp_path / "a.tif", save_all=True, append_images=[
        Image.fromarray(PIXELS[..., index]) for index in (1, 2)])
    np.save(tmp_path / "a.npy", PIXELS)
    (tmp_path / "b.npy").write_bytes(b"array")
    (tmp_path / "c.tif").write_bytes(b"II*\0\x08\0\0\0" + bytes(40))
    decoding = Decoding(channels=channels)
    assert not decoding.look(tmp_path / "a.png").fault or channels != 3
    with pytest.raises(ValueError, match=message):
        decoding.array(tmp_path / name)
    assert decoding.look(tmp_path / name).fault


def test_pictures_show_the_first_channels(tmp_path):
    image = PIXELS.transpose(2, 0, 1) / 255
    assert np.array_equal(np.asarray(picture_of(image)), PIXELS[..., :3])
    assert np.array_equal(np.asarray(picture_of(image[:2])), PIXELS[..., :1].repeat(3, axis=-1))
    np.save(tmp_path / "a.npy", PIXELS)
    assert np.array_equal(np.asarray(Decoding(channels=5).read(tmp_path / "a.npy")), PIXELS[..., :3])


def test_class_folders(tmp_path, said):
    for name in ("cat", "dog"):
        for index in range(4):
            (tmp_path / name).mkdir(exist_ok=True)
            np.save(tmp_path / name / f"{index}.npy", RNG.integers(0, 256, (40, 36, 5), dtype=np.uint8))
    data = ImageFolderData(str(tmp_path), image_size=32, batch_size=4, num_workers=0, in_chans=5)
    data.setup("fit")
    assert "auto_augment and color_jitter are of colours and left out" in said.text
    assert data.normalisation == ([0.5] * 5, [0.5] * 5)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        images, _ = next(iter(loader))
        assert images.shape[1:] == (5, 32, 32)
        assert images.dtype == torch.float32
    with pytest.raises(ValueError, match=r"0.npy cannot be read as an image: it is an array of 40 x 36 x 5 uint8"):
        ImageFolderData(str(tmp_path), num_workers=0, in_chans=4).setup("fit")
    with pytest.raises(ValueError, match="mean has 3 values, and in_chans is 4"):
        ImageFolderData(str(tmp_path), in_chans=4, mean=(0.1, 0.2, 0.3))
    (tmp_path / "labels.csv").write_text("path,label\n" + "".join(
        f"{name}/{index}.npy,{name}\n" for name in ("cat", "dog") for index in range(4)))
    table = CsvData(str(tmp_path), image_size=32, batch_size=4, num_workers=0, in_chans=5)
    table.setup("fit")
    assert next(iter(table.train_dataloader()))[0].shape == (4, 5, 32, 32)


def test_masks_beside_arrays(tmp_path, said):
    for index in range(4):
        (tmp_path / "images").mkdir(exist_ok=True), (tmp_path / "masks").mkdir(exist_ok=True)
        np.save(tmp_path / "images" / f"{index}.npy", RNG.random((40, 36, 2)).astype(np.float32))
        Image.fromarray(RNG.integers(0, 2, (40, 36), dtype=np.uint8)).save(tmp_path / "masks" / f"{index}.png")
    data = SegmentationFolderData(str(tmp_path), num_workers=0, crop_size=64, short_side=48, in_chans=2)
    data.setup("fit")
    assert "color_jitter is left out" in said.text
    images, labels = next(iter(data.train_dataloader()))
    assert (images.shape[1:], labels.shape[1:]) == ((2, 64, 64), (64, 64))
    assert 0 <= images.min() <= images.max() <= 1
    images, labels = next(iter(data.val_dataloader()))
    assert (images.shape[1], labels.shape[1:]) == (2, (40, 36))


def test_arrays_beside_pictures_are_their_copies(tmp_path, said):
    for name in ("cat", "dog"):
        for index in range(4):
            (tmp_path / name).mkdir(exist_ok=True)
            image = RNG.integers(0, 256, (40, 36, 3), dtype=np.uint8)
            Image.fromarray(image).save(tmp_path / name / f"{index}.jpg")
            np.save(tmp_path / name / f"{index}.npy", image[..., ::-1])
    data = ImageFolderData(str(tmp_path), num_workers=0)
    data.setup("fit")
    assert len(data.samples["train"]) + len(data.samples["val"]) == 8
    assert "8 arrays, such as " in said.text
    (tmp_path / "classes.txt").write_text("thing\n")
    assert len(YoloData(str(tmp_path), num_workers=0)._splits["train"]) == 8
