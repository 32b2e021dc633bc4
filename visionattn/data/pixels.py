"""Images as a viewer shows them: upright, in 8-bit RGB, whatever kind of file they come from."""
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import ExifTags, Image
from torchvision.datasets.folder import IMG_EXTENSIONS

__all__ = ["AS_SEEN", "ENDINGS", "Decoding", "Look", "orientation_of", "reason_of", "tag_of", "turned"]

# Pictures that cannot be decoded, unless a plug-in of Pillow is loaded: such files are named, not overlooked. Of a
# camera's raw file Pillow would read the tiny preview.
UNREAD = (".heic", ".heif", ".jxl", ".svg", ".cr2", ".cr3", ".nef", ".arw", ".dng", ".raf", ".rw2", ".orf")
ENDINGS = (  # of files that are taken for images
    *IMG_EXTENSIONS, ".jpe", ".jfif", ".gif", ".apng", ".jp2", ".avif", ".dib", ".pbm", ".pnm", ".psd", ".tga", *UNREAD)

MAX_PIXELS = 178_956_970  # where Pillow stops by itself
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
DEEP = ("I", "F")  # modes that begin so have more than 8 bits


class Look(NamedTuple):
    """What a file's header tells.

    Attributes:
        fault: Why the file cannot be used, or nothing.
        size: Width and height as a viewer shows it.
        animated: It has several frames or pages, of which the first is read.
    """

    fault: str
    size: tuple[int, int] = (0, 0)
    animated: bool = False


class Decoding(NamedTuple):
    """How image files are decoded, everywhere the same.

    The orientation tag of a photo (EXIF) is followed. What is transparent is seen on white. Of several frames or
    pages the first is taken. CMYK, palettes and grey become RGB.

    Attributes:
        value_range: What becomes black and white in images of more than 8 bits: ``type``: 0 and the largest value of
            16 bits, 0 and 1 of floating-point numbers (other values, and other integers, are refused); ``file``:
            the least and the largest value of each file; or two numbers, such as ``[0, 4095]`` of 12 bits.
        max_pixels: Largest image that is decoded.
    """

    value_range: Literal["type", "file"] | tuple[float, float] = "type"
    max_pixels: int = MAX_PIXELS

    def check(self) -> "Decoding":
        """Itself; raises a ValueError for options that no image can be decoded with."""
        pair = self.value_range
        if isinstance(pair, str):
            good = pair in ("type", "file")
        else:
            good = len(pair) == 2 and pair[0] < pair[1]
        if not good:
            raise ValueError(f"value_range must be type, file or two numbers such as [0, 4095], got {pair!r}")
        if self.max_pixels < 1:
            raise ValueError(f"max_pixels must be 1 or more, got {self.max_pixels}")
        return self

    def look(self, file: Path, decode: bool = False) -> Look:
        """Reads the header (the pixels too with ``decode``, or where the values decide whether they can be shown)."""
        try:
            with self.open(file) as image:
                tag, size = tag_of(image), image.size
                animated = image.format != "MPO" and getattr(image, "is_animated", False)
                if decode or image.mode.startswith(DEEP):
                    self._rgb(image)
        except Exception as error:  # whatever a damaged file makes a decoder raise
            return Look(reason_of(error, file))
        return Look("", size[::-1] if tag > 4 and image.format != "TIFF" else size, animated)

    def read(self, file: Path) -> Image.Image:
        """The image in RGB, upright.

        Raises:
            ValueError: It cannot be decoded; the message says why, without the file's name.
        """
        try:
            with self.open(file) as image:
                tag = tag_of(image)
                rgb = self._rgb(image)
        except Exception as error:
            raise ValueError(reason_of(error, file)) from error
        return rgb if image.format == "TIFF" else turned(rgb, tag)  # Pillow turns TIFF files

    def open(self, file: Path) -> Image.Image:
        """The image with its header read, the pixels not yet; raises what Pillow raises, or a ValueError."""
        if Image.MAX_IMAGE_PIXELS is not None:  # Pillow's own bound, for the process, never below ours
            Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, self.max_pixels)
        if file.suffix.lower() in UNREAD and file.suffix.lower() not in Image.registered_extensions():
            raise ValueError(f"{file.suffix[1:].upper()} files cannot be decoded: convert it to JPEG or PNG")
        if file.exists() and not file.is_file():  # a pipe would be waited for
            raise ValueError("it is no file")
        image = Image.open(file)
        width, height = image.size
        if width * height > self.max_pixels:
            image.close()
            raise ValueError(f"it has {width} x {height} pixels, more than max_pixels ({self.max_pixels}) allows")
        if image.format == "EPS":  # is a program that another program would run
            image.close()
            raise ValueError("it is PostScript, not an image")
        return image

    def _rgb(self, image: Image.Image) -> Image.Image:
        image.load()
        if image.mode.startswith(DEEP):
            return self._eight_bits(image).convert("RGB")
        if image.mode == "La":
            image = image.convert("LA")
        if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        return image.convert("RGB")

    def _eight_bits(self, image: Image.Image) -> Image.Image:
        values = np.asarray(image)
        if not np.isfinite(values).all():
            raise ValueError("it has pixels that are NaN or infinite")
        least, most = values.min().item(), values.max().item()
        advice = "set value_range to the two that are to be black and white, or to file"
        if self.value_range == "file":
            low, high = least, max(most, least + 1e-12)
        elif self.value_range != "type":
            low, high = self.value_range  # type: ignore[misc]
        elif image.mode.startswith("I;16") or (image.format in ("PNG", "PPM") and least >= 0 and most < 65536):
            low, high = 0, 65535
        elif image.mode == "F" and least >= 0 and most <= 1:
            low, high = 0, 1
        else:
            kind = "floating-point numbers" if image.mode == "F" else "integers of an unknown range"
            raise ValueError(f"its values are {kind} from {least:g} to {most:g}: {advice}")
        scaled = (values.astype(np.float64 if image.mode == "I" else np.float32) - low) * (255 / (high - low))
        return Image.fromarray(scaled.clip(0, 255).round().astype(np.uint8))


AS_SEEN = Decoding()


def orientation_of(file: Path) -> int:
    """The orientation tag of a photo: 1 (as it lies in the file, also without a tag) to 8.

    Raises:
        ValueError: It cannot be read.
    """
    try:
        with Image.open(file) as image:
            return tag_of(image)
    except Exception as error:  # whatever a damaged file makes a decoder raise
        raise ValueError(reason_of(error, file)) from error


def turned(image: Image.Image, tag: int) -> Image.Image:
    """An image as a viewer shows it, from that in the file and the file's orientation tag."""
    return image.transpose(TURNS[tag]) if tag in TURNS else image


def tag_of(image: Image.Image) -> int:
    """The orientation tag of an image that is open; its pixels are not read for it."""
    try:
        # A PNG file's own method would decode it, to see whether there is a tag behind its pixels.
        exif: Any = Image.Image.getexif(image) if image.format == "PNG" else image.getexif()
        tag = exif.get(ExifTags.Base.Orientation, 1)
    except Exception:  # as odd as metadata can be: a viewer shows the image as it lies
        return 1
    return tag if tag in TURNS else 1


def reason_of(error: Exception, file: Path) -> str:
    """What a decoder's error about a file says, in a user's words."""
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, Image.DecompressionBombError):
        return "it has more pixels than max_pixels allows: " + str(error).partition(",")[0]
    if isinstance(error, OSError) and "cannot identify image file" in str(error):
        return _content(file)
    return " ".join(str(error).split()) or type(error).__name__


def _content(file: Path) -> str:
    """What a file is that is no image, by its first bytes."""
    try:
        with file.open("rb") as opened:
            head = opened.read(512).lstrip().lower()
    except OSError:
        head = b"?"
    if not head:
        return "it is empty"
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"hevc", b"mif1", b"msf1"):
        return "it is a HEIC file, which cannot be decoded: convert it to JPEG or PNG"
    kinds = {b"<!doctype html": "a web page", b"<html": "a web page", b"%pdf": "a PDF file", b"<svg": "an SVG file",
             b"<?xml": "an XML file", b"version https://git-lfs": "a pointer of Git LFS, not the file itself"}
    found = next((kind for start, kind in kinds.items() if head.startswith(start)), "no image or damaged")
    return f"it is {found}"
