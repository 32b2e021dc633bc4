"""Images as a viewer shows them, upright and in 8-bit RGB, whatever file they come from; or channel by channel."""
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageSequence

__all__ = ["ARRAY", "AS_SEEN", "ENDINGS", "Decoding", "Look", "orientation_of", "picture_of", "reason_of", "tag_of",
           "turned"]

# Pictures that cannot be decoded, unless a plug-in of Pillow is loaded: such files are named, not overlooked. Of a
# camera's raw file Pillow would read the tiny preview.
UNREAD = (".heic", ".heif", ".jxl", ".svg", ".cr2", ".cr3", ".nef", ".arw", ".dng", ".raf", ".rw2", ".orf")
ARRAY = ".npy"
ENDINGS = (  # of files that are taken for images
    ".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".jpe", ".jfif", ".gif", ".apng", ".jp2",
    ".avif", ".dib", ".pbm", ".pnm", ".psd", ".tga", ARRAY, *UNREAD)

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

    With another number of ``channels`` than 3 images are what their files hold, not what a viewer shows: 1 is grey
    (colours become grey); 2, 4 or more are the bands of a file such as RGBA, of which transparency is one, the pages
    of a TIFF file, a band each, or the last axis of a ``.npy`` array. Arrays are ``[height, width, channels]``.

    Attributes:
        value_range: What becomes black and white in images of more than 8 bits: ``type``: 0 and the largest value of
            16 bits, 0 and 1 of floating-point numbers (other values, and other integers, are refused); ``file``:
            the least and the largest value of each file; or two numbers, such as ``[0, 4095]`` of 12 bits.
        max_pixels: Largest image that is decoded.
        channels: Of the images.
    """

    value_range: Literal["type", "file"] | tuple[float, float] = "type"
    max_pixels: int = MAX_PIXELS
    channels: int = 3

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
        if self.channels < 1:
            raise ValueError(f"in_chans must be 1 or more, got {self.channels}")
        return self

    def look(self, file: Path, decode: bool = False) -> Look:
        """Reads the header (the pixels too with ``decode``, or where the values decide whether they can be shown)."""
        try:
            if file.suffix.lower() == ARRAY:
                array = self._array(file)
                if decode or array.dtype != np.uint8:
                    self._shares(array)
                return Look("", array.shape[1::-1])
            with self.open(file) as image:
                tag, size = tag_of(image), image.size
                pages = self.channels not in (1, 3) and len(_bands(image)) != self.channels
                animated = not pages and image.format != "MPO" and getattr(image, "is_animated", False)
                if decode or image.mode.startswith(DEEP):
                    self._rgb(image) if self.channels == 3 else self._shares(self._values(image))
                elif pages:
                    self._check_pages(image)
        except Exception as error:  # whatever a damaged file makes a decoder raise
            return Look(reason_of(error, file))
        return Look("", size[::-1] if tag > 4 and image.format != "TIFF" else size, animated)

    def read(self, file: Path) -> Image.Image:
        """The image in RGB, upright; the first three channels, or the first, where it has others.

        Raises:
            ValueError: It cannot be decoded; the message says why, without the file's name.
        """
        if self.channels != 3 or file.suffix.lower() == ARRAY:
            return picture_of(self.array(file))
        try:
            with self.open(file) as image:
                tag = tag_of(image)
                rgb = self._rgb(image)
        except Exception as error:
            raise ValueError(reason_of(error, file)) from error
        return rgb if image.format == "TIFF" else turned(rgb, tag)  # Pillow turns TIFF files

    def array(self, file: Path) -> np.ndarray:
        """The image ``[channels, H, W]``, upright: uint8 of three channels, float32 in [0, 1] of other numbers.

        Raises:
            ValueError: It cannot be decoded; the message says why, without the file's name.
        """
        if self.channels == 3 and file.suffix.lower() != ARRAY:
            return np.array(self.read(file)).transpose(2, 0, 1)
        try:
            if file.suffix.lower() == ARRAY:
                shares = self._shares(self._array(file))
            else:
                with self.open(file) as image:
                    shares = self._shares(self._values(image))
        except Exception as error:
            raise ValueError(reason_of(error, file)) from error
        planes = np.ascontiguousarray(shares.transpose(2, 0, 1))
        return _bytes(planes) if self.channels == 3 else planes

    def picture(self, image: Image.Image) -> Image.Image | np.ndarray:
        """A picture in memory as the image of a model, as if it were read: in RGB, or ``[channels, H, W]`` in [0, 1].

        Raises:
            ValueError: It has no pixels, too many, or other channels.
        """
        width, height = image.size
        if not width * height:
            raise ValueError(f"it has {width} x {height} pixels")
        if width * height > self.max_pixels:
            raise ValueError(f"it has {width} x {height} pixels, more than max_pixels ({self.max_pixels}) allows")
        if image.format == "EPS":  # is a program that another program would run
            raise ValueError("it is PostScript, not an image")
        try:
            if self.channels == 3:
                tag = tag_of(image)
                return turned(self._rgb(image), tag)
            shares = self._shares(self._values(image))
        except Exception as error:  # whatever a damaged file makes a decoder raise
            raise ValueError(reason_of(error, Path())) from error
        return np.ascontiguousarray(shares.transpose(2, 0, 1))

    def values(self, array: np.ndarray) -> Image.Image | np.ndarray:
        """The same of an array ``[height, width, channels]`` or, of one channel or in grey, ``[height, width]``.

        uint8 is 0 to 255, other numbers are what ``value_range`` says: floating-point ones 0 to 1.

        Raises:
            ValueError: It is no such array; the message says what would be.
        """
        given = f"{' x '.join(map(str, array.shape)) or 'no axis'} {array.dtype}"
        values = array[..., None] if array.ndim == 2 else array
        channels = values.shape[-1] if values.ndim == 3 else 0
        if self.channels == 3 and channels == 1:
            values = values.repeat(3, -1)
        elif channels != self.channels:
            hint = ""
            if values.ndim == 3 and values.shape[0] == self.channels:
                hint = "; channels come last"
            raise ValueError(f"it is an array of {given}, not of height x width x {self.channels}{hint}")
        if not values.size:
            raise ValueError(f"it is an array of {given}, which has no pixels")
        if values.shape[0] * values.shape[1] > self.max_pixels:
            raise ValueError(f"it is an array of {given}, more pixels than max_pixels ({self.max_pixels}) allows")
        if values.dtype.kind not in "buif":
            raise ValueError(f"it is an array of {given}; uint8, or floating-point numbers from 0 to 1, were expected")
        if self.channels == 3 and values.dtype == np.uint8:
            return Image.fromarray(np.ascontiguousarray(values))
        if values.dtype == np.float16:
            values = values.astype(np.float32)
        shares = self._shares(values)
        if self.channels == 3:
            return Image.fromarray((shares * 255).round().astype(np.uint8))
        return np.ascontiguousarray(shares.transpose(2, 0, 1))

    def open(self, file: Path) -> Image.Image:
        """The image with its header read, the pixels not yet; raises what Pillow raises, or a ValueError."""
        if Image.MAX_IMAGE_PIXELS is not None:  # Pillow's own bound, for the process, never below ours
            Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, self.max_pixels)
        if file.suffix.lower() in UNREAD and file.suffix.lower() not in Image.registered_extensions():
            raise ValueError(f"{file.suffix[1:].upper()} files cannot be decoded: convert it to JPEG or PNG")
        if file.exists() and not file.is_file():  # a pipe would be waited for
            raise ValueError("it is no file")
        image = Image.open(file if isinstance(file, Path) else file.open("rb"))  # or in another file, or in a table
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
        values: Any = np.asarray(image)
        low, high = self._bounds(values, image.mode.startswith("I;16") or image.format in ("PNG", "PPM"))
        scaled = (values.astype(np.float64 if image.mode == "I" else np.float32) - low) * (255 / (high - low))
        return Image.fromarray(scaled.clip(0, 255).round().astype(np.uint8))

    def _bounds(self, values: np.ndarray, sixteen: bool) -> tuple[float, float]:
        """The values that become black and white; ``sixteen``: integers are of 16 bits, in whatever type they are."""
        if not np.isfinite(values).all():
            raise ValueError("it has pixels that are NaN or infinite")
        least, most = values.min().item(), values.max().item()
        if self.value_range == "file":
            return least, max(most, least + 1e-12)
        if not isinstance(self.value_range, str):
            return self.value_range
        if sixteen and least >= 0 and most < 65536:
            return 0, 65535
        floats = values.dtype.kind == "f"
        if floats and least >= 0 and most <= 1:
            return 0, 1
        kind = "floating-point numbers" if floats else "integers of an unknown range"
        raise ValueError(f"its values are {kind} from {least:g} to {most:g}: set value_range to the two that are to be "
                         "black and white, or to file")

    def _shares(self, values: np.ndarray) -> np.ndarray:
        """float32 in [0, 1] of values of any type."""
        low, high = (0.0, 1.0) if values.dtype == bool else (0.0, 255.0)
        if values.dtype not in (bool, np.uint8):
            low, high = self._bounds(values, values.dtype.kind == "u" and values.dtype.itemsize == 2)
        exact: Any = values.astype(np.float32 if values.dtype.itemsize < 4 else np.float64)
        return ((exact - low) / (high - low)).clip(0, 1).astype(np.float32)

    def _values(self, image: Image.Image) -> np.ndarray:
        """What an open image holds, upright: ``[H, W, channels]``."""
        tag = 1 if image.format == "TIFF" else tag_of(image)  # Pillow turns TIFF files
        deep = image.mode.startswith(DEEP)
        if self.channels == 1:
            image.load()
            return _array_of(turned(image if deep else self._rgb(image).convert("L"), tag), image)[..., None]
        if len(_bands(image)) == self.channels:
            if image.mode in ("P", "PA"):
                image = image.convert("RGBA" if self.channels == 4 else "RGB")
            image = turned(image, tag)
            return np.asarray(image).reshape(image.height, image.width, -1)
        self._check_pages(image)
        return np.stack([_array_of(turned(page, tag), page) for page in ImageSequence.Iterator(image)], axis=-1)

    def _check_pages(self, image: Image.Image) -> None:
        bands, pages = len(_bands(image)), getattr(image, "n_frames", 1)
        if bands > 1 or pages != self.channels:
            has = f"{pages} pages" if pages > 1 and bands == 1 else f"{bands} channel{'s' * (bands > 1)}"
            raise ValueError(f"it has {has}, not the {self.channels} of in_chans")

    def _array(self, file: Path) -> np.ndarray:
        """The array of a ``.npy`` file; its values are not read yet."""
        try:
            array = np.load(file, mmap_mode="r", allow_pickle=False)
        except ValueError:  # which speaks of pickles
            raise ValueError("it is no array of numbers, or damaged") from None
        shape = " x ".join(map(str, array.shape))
        if array.ndim == 2:
            array = array[..., None]
        if array.ndim != 3 or array.shape[-1] != self.channels or array.dtype.kind not in "buif" or not array.size:
            raise ValueError(f"it is an array of {shape} {array.dtype}, not of height x width x {self.channels} "
                             "numbers: set in_chans to the number of channels")
        if array.shape[0] * array.shape[1] > self.max_pixels:
            raise ValueError(f"it has {shape} values, more pixels than max_pixels ({self.max_pixels}) allows")
        return array


AS_SEEN = Decoding()


def orientation_of(file: Path) -> int:
    """The orientation tag of a photo: 1 (as it lies in the file, also without a tag) to 8.

    Raises:
        ValueError: It cannot be read.
    """
    if file.suffix.lower() == ARRAY:
        return 1
    try:
        with Image.open(file) as image:
            return tag_of(image)
    except Exception as error:  # whatever a damaged file makes a decoder raise
        raise ValueError(reason_of(error, file)) from error


def picture_of(image: np.ndarray) -> Image.Image:
    """A picture of an image ``[C, H, W]``, uint8 or in [0, 1]: of its first three channels, or in grey of its first."""
    shown: Any = (image[:3] if len(image) > 2 else image[:1].repeat(3, 0)).transpose(1, 2, 0)
    if shown.dtype != np.uint8:
        shown = (shown.astype(np.float32).clip(0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(shown))


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


def _bytes(shares: np.ndarray) -> np.ndarray:
    """uint8 of values in [0, 1], in equal steps."""
    return (shares * np.float32(256 - 1e-3)).astype(np.uint8)


def _bands(image: Image.Image) -> tuple[str, ...]:
    """Names of the channels of an open image; those of its colours where it has a palette."""
    if image.mode in ("P", "PA"):
        return tuple("RGBA" if image.mode == "PA" or "transparency" in image.info else "RGB")
    return image.getbands()


def _array_of(image: Image.Image, source: Image.Image) -> np.ndarray:
    """The values of an image of one band: of a PNG or PPM file of more than 8 bits as 16 bits."""
    values = np.asarray(image)
    if source.format in ("PNG", "PPM") and image.mode == "I" and values.min() >= 0 and values.max() < 65536:
        return values.astype(np.uint16)
    return values


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
    if head[:4] in (b"ii*\0", b"mm\0*"):
        return ("it is a TIFF file of a kind that cannot be decoded: save its bands as an array of height x width x "
                "channels in a .npy file")
    kinds = {b"<!doctype html": "a web page", b"<html": "a web page", b"%pdf": "a PDF file", b"<svg": "an SVG file",
             b"<?xml": "an XML file", b"version https://git-lfs": "a pointer of Git LFS, not the file itself"}
    found = next((kind for start, kind in kinds.items() if head.startswith(start)), "no image or damaged")
    return f"it is {found}"
