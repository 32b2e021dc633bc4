"""Detection data in PASCAL VOC's XML format, converted to COCO's JSON for ``CocoData``.

``python -m visionattn.data.voc ROOT SPLIT OUTPUT`` converts from the shell.
"""
import argparse
import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

__all__ = ["convert_voc"]


def convert_voc(root: str | Path, split: str, output: str | Path, classes: list[str] | None = None) -> dict[str, int]:
    """Writes the boxes of a VOC folder as a COCO file.

    Reads ``ImageSets/Main/<split>.txt`` (the first word of a line names an image; without such a list, every file of
    ``Annotations``) and ``Annotations/<name>.xml``. The images, whose names come from the XML files, are in
    ``JPEGImages``. Corners count pixels from 1 and belong to the box, as VOC has it. Objects marked difficult become
    crowds: they neither train nor count in evaluation.

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
    files = {file.stem: file for file in sorted(folder.glob("*.xml"))}
    parsed: dict[str, ET.Element] = {}
    if classes is None:
        parsed = {name: _parse(file) for name, file in files.items()}
        classes = sorted({_text(thing, "name", files[name]) for name, tree in parsed.items()
                          for thing in tree.findall("object")})
    if not classes:
        raise ValueError(f"{folder} has no object whose class could be taken")
    content: dict[str, list[Any]] = {
        "images": [], "annotations": [],
        "categories": [{"id": number, "name": name} for number, name in enumerate(classes, start=1)],
    }
    for number, name in enumerate(_names(root, split, files), start=1):
        if name not in files:
            raise FileNotFoundError(f"{folder / f'{name}.xml'} does not exist, but the list {split} has it")
        tree = parsed.get(name)
        _add_image(content, number, _parse(files[name]) if tree is None else tree, files[name], classes)
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
    if not lists.is_dir():
        return list(files)
    listing = lists / f"{split}.txt"
    if not listing.is_file():
        raise FileNotFoundError(f"{listing} does not exist; there are "
                                f"{', '.join(sorted(file.stem for file in lists.glob('*.txt'))[:10]) or 'no lists'}")
    return [line.split()[0] for line in listing.read_text().splitlines() if line.strip()]


def _add_image(content: dict[str, list[Any]], number: int, tree: ET.Element, file: Path, classes: list[str]) -> None:
    size = tree.find("size")
    if size is None:
        raise ValueError(f"{file} has no <size>")
    width, height = (int(_number(size, side, file)) for side in ("width", "height"))
    content["images"].append(
        {"id": number, "file_name": _text(tree, "filename", file), "width": width, "height": height})
    for place, thing in enumerate(tree.findall("object"), start=1):
        name, box = _text(thing, "name", file), thing.find("bndbox")
        if name not in classes:
            raise ValueError(f"{file}: object {place} is of the class {name!r}; the classes are {', '.join(classes)}")
        if box is None:
            raise ValueError(f"{file}: object {place} ({name}) has no <bndbox>")
        left, top, right, bottom = (_number(box, edge, file) for edge in ("xmin", "ymin", "xmax", "ymax"))
        edges = [left - 1, top - 1, right - left + 1, bottom - top + 1]
        content["annotations"].append({
            "id": len(content["annotations"]) + 1, "image_id": number, "category_id": classes.index(name) + 1,
            "bbox": edges, "area": edges[2] * edges[3], "iscrowd": int(thing.findtext("difficult", "0").strip() == "1"),
        })


def _parse(file: Path) -> ET.Element:
    try:
        return ET.parse(file).getroot()
    except (ET.ParseError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not XML: {error}") from error


def _text(element: ET.Element, tag: str, file: Path) -> str:
    text = (element.findtext(tag) or "").strip()
    if not text:
        raise ValueError(f"{file}: <{element.tag}> has no <{tag}>")
    return text


def _number(element: ET.Element, tag: str, file: Path) -> float:
    text = _text(element, tag, file)
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{file}: <{tag}> is {text!r}, not a number") from None


if __name__ == "__main__":
    main()
