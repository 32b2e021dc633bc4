"""Images are decoded as a viewer shows them, or refused with a reason."""
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from visionattn.data.reading import decoding_fault, header_fault
from visionattn.runtime.pixels import Decoding, orientation_of

ORIENTATION = 0x0112
SEEN = np.zeros((24, 40, 3), np.uint8)  # what the eye sees: a red quarter at the top left, a green one at the top right
SEEN[:12, :20] = 220, 30, 30
SEEN[:12, 20:] = 30, 200, 30
STORED = {  # how each tag's camera lays it down
    1: SEEN, 2: SEEN[:, ::-1], 3: SEEN[::-1, ::-1], 4: SEEN[::-1], 5: SEEN.swapaxes(0, 1),
    6: np.rot90(SEEN), 7: np.rot90(SEEN.swapaxes(0, 1), 2), 8: np.rot90(SEEN, -1),
}


def _read(file, **options):
    return np.asarray(Decoding(**options).read(file)).astype(int)


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("tag", STORED)
def test_photos_are_upright(tmp_path, ending, tag):
    exif = Image.Exif()
    exif[ORIENTATION] = tag
    file = tmp_path / f"photo.{ending}"
    options = {"webp": {"lossless": True}, "jpg": {"quality": 95, "subsampling": 0}}.get(ending, {})
    Image.fromarray(np.ascontiguousarray(STORED[tag])).save(file, exif=exif, **options)
    assert np.abs(_read(file) - SEEN).mean() < 4
    assert header_fault(file, (40, 24)) == decoding_fault(file, (40, 24)) == ""
    assert Decoding().look(file).size == (40, 24)
    assert orientation_of(file) == tag
    with Image.open(file) as image:  # Pillow means the same by it
        assert np.abs(np.asarray(ImageOps.exif_transpose(image).convert("RGB")).astype(int) - SEEN).mean() < 4


@pytest.mark.parametrize("exif", [b"Exif\0\0broken", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"])
def test_damaged_tags_leave_a_photo_as_it_lies(tmp_path, exif):
    Image.fromarray(SEEN).save(tmp_path / "a.jpg", exif=exif, quality=95, subsampling=0)
    assert np.abs(_read(tmp_path / "a.jpg") - SEEN).mean() < 4


@pytest.mark.parametrize("ending", ["png", "tiff", "pgm"])
def test_sixteen_bits_are_scaled_by_their_type(tmp_path, ending):
    values = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / f"a.{ending}")
    assert (_read(tmp_path / f"a.{ending}") == np.arange(256).reshape(16, 16, 1)).all()


def test_sixteen_bits_in_big_endian_order(tmp_path):
    values = np.linspace(0, 65535, 256).round().astype(">u2").reshape(16, 16)
    Image.frombytes("I;16B", (16, 16), values.tobytes()).save(tmp_path / "a.tiff")
    assert (_read(tmp_path / "a.tiff") == np.arange(256).reshape(16, 16, 1)).all()


def test_range_of_values_can_be_chosen(tmp_path):
    file = tmp_path / "a.png"
    Image.fromarray(np.array([[1000, 2000], [3000, 4095]], np.uint16)).save(file)
    assert _read(file).max() == 16  # twelve bits are dark in sixteen
    assert _read(file, value_range=(0, 4095))[..., 0].tolist() == [[62, 125], [187, 255]]
    assert _read(file, value_range=(1500, 3000))[..., 0].tolist() == [[0, 85], [255, 255]]
    assert _read(file, value_range="file")[..., 0].tolist() == [[0, 82], [165, 255]]
    Image.fromarray(np.full((2, 2), 7, np.uint16)).save(file)
    assert (_read(file, value_range="file") == 0).all()


def test_floating_point_numbers(tmp_path):
    file = tmp_path / "a.tiff"
    Image.fromarray(np.array([[0, 0.2], [0.8, 1]], np.float32)).save(file)
    assert _read(file)[..., 0].tolist() == [[0, 51], [204, 255]]
    Image.fromarray(np.array([[-3, 0], [250, 1000]], np.float32)).save(file)
    message = "floating-point numbers from -3 to 1000: set value_range"
    assert message in header_fault(file)
    with pytest.raises(ValueError, match=message):
        Decoding().read(file)
    assert _read(file, value_range=(0, 1000))[..., 0].tolist() == [[0, 0], [64, 255]]
    assert header_fault(file, decoding=Decoding(value_range="file")) == ""
    Image.fromarray(np.array([[np.nan, 0]], np.float32)).save(file)
    assert "NaN" in header_fault(file, decoding=Decoding(value_range="file"))


def test_integers_of_32_bits_are_refused_without_a_range(tmp_path):
    file = tmp_path / "a.tiff"
    Image.fromarray(np.array([[0, 5000]], np.int32)).save(file)
    assert "integers of an unknown range from 0 to 5000: set value_range" in header_fault(file)
    assert _read(file, value_range=(0, 5000))[..., 0].tolist() == [[0, 255]]


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr"])
def test_other_kinds_of_colour(tmp_path, mode):
    file = tmp_path / ("a.jpg" if mode in ("CMYK", "YCbCr") else "a.png")
    image = Image.fromarray(SEEN).convert(mode)
    image.save(file, **(dict(quality=95) if file.suffix == ".jpg" else {}))
    expected = np.asarray(image.convert("RGB")).astype(int)
    assert _read(file).shape == (24, 40, 3)
    assert np.abs(_read(file) - expected).mean() < 5


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB"])
def test_what_is_transparent_is_seen_on_white(tmp_path, mode):
    file, black = tmp_path / "a.png", Image.new("RGB", (4, 4))
    if mode in ("RGBA", "LA"):  # half of it black, half of it nothing (which is black underneath, too)
        image = black.convert(mode)
        image.putalpha(Image.fromarray(np.repeat([[255, 255, 0, 0]], 4, axis=0).astype(np.uint8)))
        image.save(file)
        assert _read(file)[0, :, 0].tolist() == [0, 0, 255, 255]
    else:
        image = black.convert(mode)
        image.save(file, transparency=(0, 0, 0) if mode == "RGB" else 0)
        assert (_read(file) == 255).all()


@pytest.mark.parametrize("ending", ["gif", "png", "webp", "tiff"])
def test_the_first_frame_is_read_and_that_is_known(tmp_path, ending):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    file = tmp_path / f"a.{ending}"
    frames[0].save(file, save_all=True, append_images=frames[1:], **({"lossless": True} if ending == "webp" else {}))
    assert _read(file)[0, 0].tolist() == [255, 0, 0]
    assert Decoding().look(file).animated
    frames[0].save(file)
    assert not Decoding().look(file).animated


def test_large_images_are_a_matter_of_an_option(tmp_path):
    Image.new("L", (300, 200)).save(tmp_path / "a.png")
    assert "300 x 200 pixels, more than max_pixels (59999) allows" in header_fault(
        tmp_path / "a.png", decoding=Decoding(max_pixels=59_999))
    assert header_fault(tmp_path / "a.png", decoding=Decoding(max_pixels=60_000)) == ""


def test_two_hundred_megapixels(tmp_path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "a.png")  # small as a file
    assert "more pixels than max_pixels allows: Image size (400000000 pixels)" in header_fault(tmp_path / "a.png")
    assert header_fault(tmp_path / "a.png", decoding=Decoding(max_pixels=400_000_000)) == ""


@pytest.mark.parametrize("ending", ["heic", "CR2", "dng", "svg"])
def test_pictures_that_cannot_be_decoded_are_refused_by_their_kind(tmp_path, ending):
    Image.new("RGB", (4, 4)).save(tmp_path / "preview.tiff")
    file = (tmp_path / "preview.tiff").rename(tmp_path / f"a.{ending}")
    assert f"{ending.upper()} files cannot be decoded: convert it to JPEG or PNG" in header_fault(file)


def test_pipes_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    assert "it is no file" in header_fault(tmp_path / "a.jpg")


def _png(path, pixels, color_type):
    """Writes 16-bit samples ``[H, W, C]`` of a colour type that Pillow does not write."""
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks))


@pytest.mark.parametrize(("color_type", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_sixteen_bits_with_colours_or_transparency(tmp_path, color_type, channels):
    pixels = np.full((4, 4, channels), 65535, np.uint16)
    pixels[:, :2, :3 if channels > 2 else 1] = 25700  # 100 of 255
    _png(tmp_path / "a.png", pixels, color_type)
    assert np.abs(_read(tmp_path / "a.png")[0, :, 0] - [100, 100, 255, 255]).max() <= 1


@pytest.mark.parametrize("kind", [1, 2])
def test_sixteen_bit_tiff_in_colours_and_signed(tmp_path, kind):
    """``kind`` is the sample format: unsigned RGB, or signed grey."""
    channels = 3 if kind == 1 else 1
    data = np.full((4, 4, channels), 25700, "<i2").tobytes()
    tags = [(256, 3, 1, 4), (257, 3, 1, 4), (258, 3, 1, 16), (259, 3, 1, 1), (262, 3, 1, 2 if channels == 3 else 1),
            (273, 4, 1, 200), (277, 3, 1, channels), (278, 3, 1, 4), (279, 4, 1, len(data)), (339, 3, 1, kind)]
    if channels == 3:
        tags[2], tags[-1] = (258, 3, 3, 180), (339, 3, 3, 186)
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    file = tmp_path / "a.tiff"
    file.write_bytes(head.ljust(180, b"\0") + struct.pack("<6H", 16, 16, 16, kind, kind, kind).ljust(20, b"\0") + data)
    if kind == 1:
        assert np.abs(_read(file) - 100).max() <= 1
    else:
        assert "integers of an unknown range from 25700 to 25700" in header_fault(file)


@pytest.mark.parametrize(("content", "message"), [
    (b"", "it is empty"), (b"  <!DOCTYPE html><html>", "it is a web page"), (b"%PDF-1.7", "it is a PDF file"),
    (b"\0\0\0\x18ftypheic\0\0\0\0", "it is a HEIC file"), (b"text", "it is no image or damaged"),
    (b"version https://git-lfs.github.com/spec/v1", "it is a pointer of Git LFS"),
])
def test_files_with_the_name_of_an_image_are_told_by_their_content(tmp_path, content, message):
    (tmp_path / "a.jpg").write_bytes(content)
    assert message in header_fault(tmp_path / "a.jpg")


def test_postscript_is_not_run(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.eps")
    file = (tmp_path / "a.eps").rename(tmp_path / "a.jpg")
    assert "PostScript" in decoding_fault(file)


@pytest.mark.parametrize(("ending", "mode"), [
    ("jpg", "RGB"), ("png", "RGB"), ("png", "P"), ("tiff", "RGB"), ("tiff", "F"), ("webp", "RGB"), ("gif", "P")])
def test_damaged_files_are_refused_or_read(tmp_path, ending, mode):
    random = np.random.default_rng(0)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    file = tmp_path / f"a.{ending}"
    Image.fromarray(SEEN).convert(mode).save(file, **({"exif": exif} if mode == "RGB" else {}))
    whole = np.frombuffer(file.read_bytes(), np.uint8)
    for _ in range(60):
        damaged = whole.copy()
        damaged[random.integers(0, min(len(whole), 300), 4)] = random.integers(0, 256, 4)
        file.write_bytes(damaged[:random.integers(1, len(whole))].tobytes())
        assert Decoding().look(file, decode=True).fault or _read(file).ndim == 3
        try:
            assert orientation_of(file) in range(1, 9)
        except ValueError as error:
            assert str(error)  # noqa: PT017


@pytest.mark.parametrize("options", [
    dict(value_range="auto"), dict(value_range=(1, 0)), dict(value_range=(0, 1, 2)), dict(max_pixels=0)])
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Decoding(**options).check()
