"""PASCAL VOC's XML files converted to COCO's JSON; ``VocData`` reads them as they are.

``python -m visionattn.data.voc ROOT SPLIT OUTPUT`` converts from the shell.
"""
import argparse
import json
import os
from pathlib import Path
from typing import Any

from sklearn.model_selection import train_test_split

from .detection import Finder
from .splits import split_of
from .voc_folder import Annotated, Annotation, image_of, listed_names, read_annotation

__all__ = ["convert_voc"]


def convert_voc(root: str | Path, split: str, output: str | Path, classes: list[str] | None = None) -> dict[str, int]:
    """Writes the boxes of a VOC folder as a COCO file.

    Reads ``ImageSets/Main/<split>.txt`` (the first word of a line names an image) and ``Annotations/<name>.xml``. Where
    there are no lists, ``val`` is a fifth of the files, always the same, ``train`` the rest, and any other name all of
    them; this is said. The images are in ``JPEGImages``, under the name that the XML file has for them or, if there is
    none such, under that of the XML file. Corners count pixels from 1 and belong to the box, as VOC has it. Objects
    marked difficult become crowds: they neither train nor count in evaluation.

    Args:
        root: Folder with ``Annotations`` and ``JPEGImages``.
        split: Name of a list, such as ``train``.
        output: The JSON file.
        classes: Class names in their order; None takes all names that occur in ``Annotations``, of any split, sorted.

    Returns:
        Number of ``images``, ``annotations`` and ``difficult`` ones among them, and of ``categories``.

    Raises:
        FileNotFoundError: The folder, the list or a listed annotation does not exist.
        ValueError: A file cannot be read as VOC's XML or has an object of another class; the message names it.
    """
    root = Path(root)
    folder = root / "Annotations"
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist; expected a folder with Annotations and JPEGImages")
    files = {file.stem: file for file in sorted(folder.glob("*.xml")) if not file.name.startswith(".")}
    parsed: dict[str, Annotation] = {}
    if classes is None:
        parsed = {name: read_annotation(file) for name, file in files.items()}
        classes = sorted({_name_of(thing, place, files[name]) for name, found in parsed.items()
                          for place, thing in enumerate(found.things, start=1)})
    if not classes:
        raise ValueError(f"{folder} has no object whose class could be taken")
    content: dict[str, list[Any]] = {
        "images": [], "annotations": [],
        "categories": [{"id": number, "name": name} for number, name in enumerate(classes, start=1)],
    }
    finder = Finder(root / "JPEGImages")
    for place, name in enumerate(_names(root, split, files), start=1):
        if name not in files:
            raise FileNotFoundError(f"{folder / f'{name}.xml'} does not exist, but the list {split} has it")
        found = parsed.get(name) or read_annotation(files[name])
        _add_image(content, place, found, files[name], classes, finder)
    if not content["images"]:
        raise ValueError(f"the list {split} of {root} names no image")
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(content))
    return {key: len(value) for key, value in content.items()} | {
        "difficult": sum(annotation["iscrowd"] for annotation in content["annotations"])}


def main(argv: list[str] | None = None) -> None:
    """``python -m visionattn.data.voc``."""
    parser = argparse.ArgumentParser(prog="python -m visionattn.data.voc", description=__doc__.splitlines()[0])
    parser.add_argument("root", help="folder with Annotations, JPEGImages and ImageSets/Main")
    parser.add_argument("split", help="name of a list in ImageSets/Main, such as train")
    parser.add_argument("output", help="the JSON file to write")
    parser.add_argument("--classes", nargs="+", help="class names in their order (default: all that occur, sorted)")
    args = parser.parse_args(argv)
    try:
        counts = convert_voc(args.root, args.split, args.output, args.classes)
    except (ValueError, OSError) as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    print(f"{args.output}: {counts['images']} images, {counts['annotations']} boxes ({counts['difficult']} of them "
          f"difficult), {counts['categories']} classes")


def _names(root: Path, split: str, files: dict[str, Path]) -> list[str]:
    lists = root / "ImageSets" / "Main"
    if lists.is_dir():
        listing = lists / f"{split}.txt"
        if not listing.is_file():
            there = sorted(file.stem for file in lists.glob("*.txt"))[:10]
            raise FileNotFoundError(f"{listing} does not exist; there are {', '.join(there) or 'no lists'}")
        return listed_names(listing)
    names, part = list(files), split_of(split, alone=True)
    if part not in ("train", "val") or len(names) < 2:
        return names
    train, val = train_test_split(names, test_size=max(1, round(0.2 * len(names))), random_state=0)
    print(f"There are no lists in {lists}: of the {len(names)} files, {len(train)} train and {len(val)} validate, "
          "always the same.")
    return sorted(train if part == "train" else val)


def _add_image(
        content: dict[str, list[Any]], image_id: int, found: Annotation, file: Path, classes: list[str],
        finder: Finder) -> None:
    if found.size is None:
        raise ValueError(f"{file} has no <size>")
    if not found.filename:
        raise ValueError(f"{file}: <annotation> has no <filename>")
    name = found.filename
    if not os.path.isfile(finder.folder / name):
        image = image_of(file, name, finder)
        name = image.relative_to(finder.folder).as_posix() if image.is_file() else name
    content["images"].append({"id": image_id, "file_name": name, "width": found.size[0], "height": found.size[1]})
    for place, thing in enumerate(found.things, start=1):
        name = _name_of(thing, place, file)
        if name not in classes:
            raise ValueError(f"{file}: object {place} is of the class {name!r}; the classes are {', '.join(classes)}")
        if thing.fault:
            raise ValueError(f"{file}: object {place} ({name}) {thing.fault.removeprefix('it ')}")
        content["annotations"].append({
            "id": len(content["annotations"]) + 1, "image_id": image_id, "category_id": classes.index(name) + 1,
            "bbox": thing.box, "area": thing.box[2] * thing.box[3], "iscrowd": int(thing.difficult),
        })


def _name_of(thing: Annotated, place: int, file: Path) -> str:
    if not thing.name:
        raise ValueError(f"{file}: object {place} has no <name>")
    return thing.name


if __name__ == "__main__":
    main()
