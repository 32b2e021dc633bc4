"""Pictures that a prediction leaves in the run folder: each below it, one an image, none of an earlier prediction."""
import re
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

__all__ = ["ResultFolder"]

_MARK = ("Software", "visionattn predict")  # in the files that are written here, so that no others are removed


class ResultFolder:
    """A folder of PNG files that are named after the images that they are made of.

    The names come from data files and may say anything: a file is always written below the folder. In place of ``..``
    is ``_``, and neither a leading slash nor a drive letter is followed; backslashes part folders as slashes do.

    Args:
        folder: The folder; it is made when there is something to write.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.sources: dict[str, str] = {}  # of each file

    def clear(self) -> None:
        """Removes what earlier predictions wrote here, and nothing else."""
        emptied = set()
        for file in sorted(self.folder.rglob("*.png")):
            if file.is_file() and not file.is_symlink() and _is_ours(file):
                file.unlink()
                emptied.add(file.parent)
        for folder in sorted(emptied, reverse=True):
            while folder != self.folder and not any(folder.iterdir()):
                folder.rmdir()
                folder = folder.parent

    def save(self, picture: Image.Image, name: str) -> Path:
        """Writes ``<name>.png`` and returns its path.

        Raises:
            ValueError: An image of another name has its result there already.
        """
        parts = [part for part in re.split(r"[/\\]", name.replace(":", "_")) if part not in ("", ".")]
        *folders, last = ["_" if part == ".." else part for part in parts] or ["_"]
        path = self.folder.joinpath(*folders, f"{last}.png")
        other = self.sources.setdefault(str(path), name)
        if other != name:
            raise ValueError(f"the images {other!r} and {name!r} would both have {path} as their result: rename one")
        path.parent.mkdir(parents=True, exist_ok=True)
        mark = PngInfo()
        mark.add_text(*_MARK)
        picture.save(path, pnginfo=mark)
        return path


def _is_ours(file: Path) -> bool:
    try:
        with Image.open(file, formats=["PNG"]) as picture:
            return picture.info.get(_MARK[0]) == _MARK[1]
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False
