"""Images with their labels in a table (CSV, TSV): one class each, or any number of them."""
import csv
import io
import re
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from ..runtime.folders import EXTENSIONS, is_image, visible_files
from ..runtime.pixels import MAX_PIXELS
from ..runtime.say import say
from .classification import ClassificationData, Sample
from .detection import Finder
from .reading import Faults
from .report import DataReport, shortened
from .splits import hold_out, split_of

__all__ = ["CsvData", "find_tables"]

ENDINGS = (".csv", ".tsv")
PATHS = ("path", "filepath", "imagepath", "imgpath", "file", "filename", "imagefile", "imagefilename", "imgfile", "img",
         "image", "imagename", "imgname", "images", "files", "photo", "picture", "name", "imageid", "imgid", "id")
LABELS = ("label", "labels", "class", "classes", "tag", "tags", "category", "categories", "target", "targets",
          "classname", "labelname", "categoryname", "classid", "labelid", "classlabel", "choice", "y")
SPLITS = ("split", "subset", "set", "partition", "dataset", "datasplit", "phase", "usage", "isvalid", "isval", "istest")
SEPARATORS = ("|", ";")  # of labels in a cell, that are taken for such without being told
YES, NO = {"1", "1.0", "true", "yes"}, {"0", "0.0", "false", "no"}


class CsvData(ClassificationData):
    """Classification images that a table lists: a row an image, a column its file, others its labels.

    Labels are one of these:

    * a column with a class for each image: single-label;
    * a column with several classes in a cell, such as ``cat|dog`` or ``cat;dog``: multi-label;
    * a column of 0 and 1 for each class: multi-label, or single-label where each row has one 1;
    * with ``multi_label: true``, several rows for an image, a class each.

    The columns are found by usual names (``path``, ``file``, ``image``, ...; ``label``, ``class``, ``tags``, ...) or
    given. Labels are names, numbers too. The table's cells are parted by commas, semicolons or tabs. Files are looked
    for beside the table, also without the folders, in the capitals or with the ending that they have there.

    The splits are separate tables (``train.csv``, ``val.csv`` and ``test.csv`` in any usual spelling, also in folders
    of these names) or a column (``split``, ``is_valid``, ...). Where there is no validation split a fixed
    ``val_fraction`` of the training images is taken for it, of every class; where there is no test split, testing uses
    the validation images; both are said.

    Args:
        root: The table, or the folder with it.
        image_folder: Folder of the images, if that is not the table's (or below it); relative to that.
        path_column: Name of the column of the files; None looks for it.
        label_columns: Name of the column of the labels, or of those of 0 and 1; None looks for them.
        split_column: Name of the column of the splits; None looks for it.
        label_separator: Between several labels in a cell; none if empty. None takes ``|`` and ``;`` for such.
        multi_label: Whether images may have several labels or none; None tells by the table.
        image_size: Height and width of the images, in pixels.
        batch_size: Images per batch and device.
        num_workers: Loader processes.
        seed: Order of the training images and random numbers of the loader's processes.
        val_fraction: Share of the training images that validates where there is no validation split. The choice is
            fixed: it does not depend on ``seed``.
        verify: False leaves out the check before training, which reads every file's header.
        predict_root: Folder whose images, at any depth, ``predict`` runs over; the test images if None.
        scale: Smallest and largest share of a training image that its random crop covers.
        hflip: Probability of a mirrored training image.
        color_jitter: Strength of random brightness, contrast and saturation where there is no ``auto_augment``.
        auto_augment: timm's policy, such as ``rand-m9-mstd0.5-inc1``, or None.
        random_erasing: Probability that a training image has a random rectangle replaced by noise.
        interpolation: Of evaluation images: ``bilinear`` or ``bicubic``.
        train_interpolation: Of training images: ``bilinear``, ``bicubic`` or ``random``.
        crop_pct: Share of the resized evaluation image that its centre crop keeps.
        mean: Of the channels in [0, 1], for normalisation; None for ImageNet's, or 0.5 where ``in_chans`` is not 3.
        std: The same.
        on_error: What to do with a row or file that cannot be used. ``raise``: stop and name it. ``skip``: leave it out
            and say how many there were of each kind; every image is decoded once for this.
        value_range: Of images of more than 8 bits: ``type``, ``file`` or the two values that are black and white.
        max_pixels: Largest image that is decoded.
        min_batches: Least number of training batches of an epoch: where there are fewer, it goes through the images
            several times, each time changed at random anew.
        in_chans: Channels of the images: 3 as a viewer shows them, 1 in grey, or the bands of the files (4 of RGBA
            files; see ``visionattn.runtime.pixels``).
        balanced_sampling: Draw training images so that every class comes equally often (of several classes of an image
            the rarest counts).
        repeats: Times that an epoch shows an image, each time changed at random anew, and so many fewer images
            (repeated augmentation, arXiv 1902.05509). Copies go to different devices.
        cache_dir: Folder in which training images are kept decoded (their shorter side twice ``image_size`` at most),
            so that one run alone decodes them, before its first epoch. None decodes in every epoch.
        class_names: The classes in the order of their labels; None takes them from the data. Evaluation takes them from
            the checkpoint, so that the training data need not be there.

    Raises:
        FileNotFoundError: ``root``, ``image_folder`` or ``predict_root`` does not exist.
        ValueError: There is no table, or it is not clear which columns mean what; a row or file that cannot be used.
    """

    def __init__(
            self,
            root: str,
            image_folder: str | None = None,
            path_column: str | None = None,
            label_columns: str | list[str] | None = None,
            split_column: str | None = None,
            label_separator: str | None = None,
            multi_label: bool | None = None,
            image_size: int = 224,
            batch_size: int = 64,
            num_workers: int = 4,
            seed: int = 0,
            val_fraction: float = 0.2,
            verify: bool = True,
            predict_root: str | None = None,
            scale: tuple[float, float] = (0.08, 1.0),
            hflip: float = 0.5,
            color_jitter: float = 0.4,
            auto_augment: str | None = "rand-m9-mstd0.5-inc1",
            random_erasing: float = 0.25,
            interpolation: str = "bicubic",
            train_interpolation: str = "random",
            crop_pct: float = 0.875,
            mean: tuple[float, ...] | None = None,
            std: tuple[float, ...] | None = None,
            on_error: Literal["raise", "skip"] = "raise",
            value_range: Literal["type", "file"] | tuple[float, float] = "type",
            max_pixels: int = MAX_PIXELS,
            min_batches: int = 1,
            in_chans: int = 3,
            balanced_sampling: bool = False,
            repeats: int = 1,
            cache_dir: str | None = None,
            class_names: list[str] | None = None,
    ):
        super().__init__(
            root, image_size, batch_size, num_workers, seed, verify, predict_root, scale, hflip, color_jitter,
            auto_augment, random_erasing, interpolation, train_interpolation, crop_pct, mean, std, on_error,
            value_range, max_pixels, min_batches, in_chans, balanced_sampling, repeats, cache_dir)
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction must lie between 0 and 1, got {val_fraction}")
        self.root, self.val_fraction = Path(root), val_fraction
        columns = [label_columns] if isinstance(label_columns, str) else label_columns
        tables = [_Table(file, split, path_column, columns, split_column) for split, file in _by_split(
            self.root, bool(class_names))]
        for table in tables:
            if not table.labels:
                say(f"{table.file} has no labels: there is nothing to measure there.")
        tables = [table for table in tables if table.labels]
        self.folders = {table.file: table.file.parent / (image_folder or "") for table in tables}
        for folder in self.folders.values():
            if not folder.is_dir():
                raise FileNotFoundError(f"image_folder {folder} does not exist")
        rows = [row for table in tables for row in table.rows]
        if len({table.one_hot for table in tables}) > 1:
            raise ValueError(f"the tables of {root} differ in their columns: name them by label_columns")
        self.separator = "" if tables[0].one_hot else _separator(rows, label_separator, self.root)
        counts = [len(self._names(row)) for row in rows if not row.fault]
        several = any(count != 1 if tables[0].one_hot else count > 1 for count in counts)
        self.multi_label = several if multi_label is None else multi_label
        self.report = DataReport("labels" if self.multi_label else "images")
        if multi_label is None and self.multi_label:
            say(f"{root} gives images several labels: they are learned as independent of each other (multi-label).")
        names = {name for row in rows if row.split == "train" for name in self._names(row)}
        names |= set(tables[0].one_hot or ())
        self.class_names = class_names or sorted(names, key=_order)
        self.num_classes = len(self.class_names)
        if self.num_classes < 2:
            found = f"one class only, {self.class_names[0]}" if names else "no labels"
            raise ValueError(f"{root} has {found}: there is nothing to tell apart")
        if self.num_classes > 20 and 2 * self.num_classes > len(counts):
            raise ValueError(f"{root} has {self.num_classes} different labels in {len(counts)} rows, such as "
                             f"{self.class_names[0][:40]!r}: they are no classes; set label_columns to the column "
                             "of these")
        alike = [group for group in _alike(self.class_names) if len(group) > 1]
        if alike:
            self.report.notes.append(f"The classes {' and '.join(map(repr, alike[0]))} differ in their spelling alone.")
        self._rows = {split: [row for row in rows if row.split == split] for split in ("train", "val", "test")}
        self._unplaced = [row for row in rows if row.split not in self._rows]
        if not self._rows["train"] and not class_names:
            raise ValueError(f"{root} lists no training images")

    def _list_split(self, split: str) -> None:
        if split == "test" and not self._rows["test"]:
            say(f"{self.root} has no test split: the validation images are used.")
            self.setup("validate")
            self.samples["test"] = self.samples["val"]
            return
        held_out = split != "test" and not self._rows["val"]
        source = "train" if held_out else split
        faults = Faults(self.root, self.on_error)
        samples = self._find_samples(source, faults)
        faults.report()
        if not samples:
            raise ValueError(f"{self.root} lists no {source} images that can be used ({EXTENSIONS})")
        listed = {split: samples}
        if held_out:
            listed["train"], listed["val"] = self._hold_out(samples)
        self._keep(listed, source, faults)

    def _find_samples(self, split: str, faults: Faults) -> list[Sample]:
        """The images of a split that can be used, in the order of the table."""
        known = {name: label for label, name in enumerate(self.class_names)}
        found: dict[Path, set[int]] = {}
        bad: set[Path] = set()
        finders = {table: Finder(folder) for table, folder in self.folders.items()}
        for row in self._rows[split] + (self._unplaced if split == "train" else []):
            names = [] if row.fault else self._names(row)
            unknown = [name for name in names if name not in known]
            fault, detail = row.fault, row.detail
            if not fault and not names and not self.multi_label:
                fault = "its label is empty"
            elif not fault and len(names) > 1 and not self.multi_label:
                fault, detail = "it has several labels, and multi_label is false", ", ".join(names)
            elif not fault and unknown:
                fault, detail = "training has no image of its class", unknown[0]
            if fault:
                faults.add(row.where, fault, detail)
                continue
            file, _ = finders[row.file].find(row.path)
            labels = {known[name] for name in names}
            if not file.is_file():
                faults.add(row.where, "there is no such file", str(file))
            elif file not in found:
                found[file] = labels
            elif found[file] == labels:
                faults.note(row.where, "the image is listed before, with the same label", row.path)
            elif self.multi_label:
                found[file] |= labels
            else:
                bad.add(file)
                faults.add(row.where, "the image is listed before, with another label", (
                    f"{row.path}: {self.class_names[min(found[file])]} and {names[0]}; set multi_label to true if "
                    "images have several"), remedy="left out, with the other")
        files = [file for file in found if file not in bad]
        good = set(self._check_files(files, faults))
        samples = [(file, tuple(sorted(found[file]))) for file in files if file in good]
        if not self.multi_label:
            return [(file, labels[0]) for file, labels in samples]
        without = sum(not labels for _, labels in samples)
        if without:
            self.report.notes.append(
                f"{without} of the {len(samples)} {split} images that are listed have no label: they are of no class.")
        return list(samples)

    def _hold_out(self, samples: list[Sample]) -> tuple[list[Sample], list[Sample]]:
        """A fixed share of the training images for validation, of every class its part."""
        if self.multi_label:
            counts = Counter(label for _, labels in samples for label in labels)
            rarest = [min(((counts[label], label) for label in labels), default=(0, -1)) for _, labels in samples]
            order = np.random.default_rng(0).permutation(len(samples)).tolist()
            order.sort(key=rarest.__getitem__)  # by the rarest class, so that every class has its share
            places = (np.arange(max(1, round(self.val_fraction * len(samples)))) + 0.5) / self.val_fraction
            chosen = {order[min(int(place), len(order) - 1)] for place in places}
            train = [sample for index, sample in enumerate(samples) if index not in chosen]
            val = [samples[index] for index in sorted(chosen)]
        else:
            images = Counter(label for _, label in samples)
            for label, name in enumerate(self.class_names):
                if images[label] == 1:
                    raise ValueError(f"the class {name!r} of {self.root} has a single image: too few to hold some out "
                                     "for validation; add images or a validation split")
            train, val = hold_out(samples, self.val_fraction)
        if not train:
            raise ValueError(f"{self.root} has a single image: too few to hold some out for validation")
        say(f"{self.root} has no validation split: of its {len(samples)} training images, {len(train)} train and "
            f"{len(val)} validate, always the same.")
        return train, val

    def _names(self, row: "_Row") -> list[str]:
        """The classes of a row."""
        parts = [name for label in row.labels for name in (label.split(self.separator) if self.separator else [label])]
        return list(dict.fromkeys(name.strip() for name in parts if name.strip()))


class _Row(NamedTuple):
    """An image as a table has it."""

    file: Path  # of the table
    where: str
    split: str
    path: str
    labels: list[str]  # cells, or the names of the columns that hold a 1
    fault: str = ""
    detail: str = ""


class _Table:
    """A table that was read, with its columns told apart.

    Args:
        file: The table.
        split: Which split it is, where it has no column that says so.
        path_column: Name of the column of the files, or None.
        label_columns: Names of those of the labels, or None.
        split_column: Name of that of the splits, or None.
    """

    def __init__(self, file: Path, split: str, path_column: str | None, label_columns: list[str] | None,
                 split_column: str | None):
        self.file, lines = file, _read(file)
        if not lines:
            raise ValueError(f"{file} is empty")
        header = [cell.strip() for cell in lines[0][1]]
        if path_column is None and not _one_of(header, PATHS) and is_image(Path(header[0])):  # there is no header
            header = ["path", "label", *(f"column {number}" for number in range(3, len(header) + 1))][:len(header)]
            say(f"{file} has no line of column names: the first column is taken for files, the second for labels.")
        else:
            lines = lines[1:]
        self.header = header
        twice = next((name for name, count in Counter(header).items() if name and count > 1), None)
        if twice is not None:
            raise ValueError(f"{file} has two columns called {twice!r}: rename one")
        path = self._column(path_column, "path_column") or _one_of(header, PATHS)
        if path is None:
            raise ValueError(f"{file}: none of the columns {shortened(header)} has a usual name of the files (path, "
                             "file, image, ...): set path_column to it")
        splits = self._column(split_column, "split_column") or _one_of(header, SPLITS)
        rest = [name for name in header if name not in (path, splits) and name
                and not name.lower().startswith("unnamed:")]  # pandas' numbers of the rows
        if {"xmin", "xmax"} <= set(map(_plain, header)) or "bbox" in map(_plain, header):
            raise ValueError(f"{file} lists boxes ({shortened(header)}): export them in COCO's, YOLO's or VOC's format")
        marks = {name: {cells[header.index(name)].strip().lower() for _, cells in lines if len(cells) == len(header)}
                 for name in rest}
        self.labels = self._label_columns(label_columns, rest, marks) if rest or split != "test" else []
        self.one_hot = tuple(self.labels) if len(self.labels) > 1 else None
        others = [name for name in rest if name not in self.labels]
        if others and self.labels:
            say(f"{file}: {path} are the files, {shortened(self.labels)} the labels; {shortened(others)} "
                f"{'is' if len(others) == 1 else 'are'} not read.")
        self.rows = [self._row(number, cells, path, splits, split) for number, cells in lines if self.labels]

    def _column(self, name: str | None, option: str) -> str | None:
        if name is not None and name not in self.header:
            raise ValueError(f"{self.file} has no column {name!r} ({option}); it has {shortened(self.header)}")
        return name

    def _label_columns(self, given: list[str] | None, rest: list[str], marks: dict[str, set[str]]) -> list[str]:
        if given:
            return [str(self._column(name, "label_columns")) for name in given]
        named = [name for name in rest if _plain(name) in LABELS]
        if len(named) == 1:
            return named
        if len(named) > 1:
            best = _one_of(named, LABELS)
            return [str(best)]
        binary = [name for name in rest if marks[name] and marks[name] <= YES | NO]
        if len(rest) == 1:
            return rest
        if len(binary) > 1 and len(binary) == len(rest):
            return rest
        raise ValueError(f"{self.file}: it is not clear which of the columns {shortened(rest) or 'none'} hold the "
                         "labels: set label_columns to the one with the classes, or to those of 0 and 1")

    def _row(self, number: int, cells: list[str], path: str, splits: str | None, split: str) -> _Row:
        where = f"{self.file.name}, line {number}"
        if len(cells) != len(self.header):
            return _Row(self.file, where, split, "", [], "it has another number of cells than the head",
                        f"{len(cells)}, not {len(self.header)}")
        content = {name: cell.strip() for name, cell in zip(self.header, cells, strict=True)}
        if splits is not None:
            said = content[splits]
            flag = {"isvalid": "val", "isval": "val", "istest": "test"}.get(_plain(splits))
            if flag:
                found = flag if said.lower() in YES else "train" if said.lower() in NO else None
            else:
                found = split_of(said, alone=True)
            if found is None:
                return _Row(self.file, where, "", content[path], [], "its split is none of train, val and test", said)
            split = found
        if not content[path]:
            return _Row(self.file, where, split, "", [], "it names no file")
        if not self.one_hot:
            return _Row(self.file, where, split, content[path], [content[self.labels[0]]])
        odd = next((name for name in self.one_hot if content[name].lower() not in YES | NO), None)
        if odd is not None:
            return _Row(self.file, where, split, content[path], [], "a label is neither 0 nor 1",
                        f"{odd}: {content[odd] or 'empty'}")
        return _Row(self.file, where, split, content[path], [
            name for name in self.one_hot if content[name].lower() in YES])


def find_tables(root: Path) -> list[Path]:
    """The tables in a folder, or in its folders of splits, whose columns have usual names of files and labels."""
    return [file for file in _tables_in(root) if _is_table(file)]


def _by_split(root: Path, known: bool) -> list[tuple[str, Path]]:
    """The tables with their splits; one that is alone is of the training images where no column says otherwise.

    Where the classes are ``known`` there need be no training images, and a table is what its name says.
    """
    if root.is_file():
        return [((split_of(root.stem, alone=True) if known else None) or "train", root)]
    if not root.is_dir():
        raise FileNotFoundError(f"{root} does not exist; data.init_args.root must be a table of images and labels, or "
                                "the folder with it")
    files = _tables_in(root)
    if len(files) > 1:
        files = [file for file in files if _is_table(file)] or files
    if not files:
        raise ValueError(f"{root} holds no table ({', '.join(ENDINGS)}) of images and labels")
    if len(files) == 1:
        return [((split_of(files[0].stem, alone=True) if known else None) or "train", files[0])]
    found: dict[str, Path] = {}
    for file in files:
        split = split_of(file.stem) or (split_of(file.parent.name, alone=True) if file.parent != root else None)
        if split in found:
            raise ValueError(f"{root} holds two tables of the split {split}, {found[split].name} and {file.name}: set "
                             "data.init_args.root to the one that is meant, or move one of them away")
        if split is not None:
            found[split] = file
    if "train" not in found and not (known and found):
        raise ValueError(f"{root} holds several tables, {shortened([file.name for file in files])}: call them "
                         "train.csv, val.csv and test.csv, or set data.init_args.root to the one that is meant")
    others = [file.name for file in files if file not in found.values()]
    if others:
        say(f"{root} has the tables {shortened(others)} beside those of its splits: they are not read.")
    return list(found.items())


def _tables_in(root: Path) -> list[Path]:
    files = [file for file in visible_files(root) if file.suffix.lower() in ENDINGS]
    own = sorted(file for file in files if file.parent == root)
    return own or sorted(file for file in files if split_of(file.parent.name, alone=True))


def _is_table(file: Path) -> bool:
    """Whether a table has a column of files; the other columns are looked at when it is read."""
    try:
        lines = _read(file, 3)
    except (ValueError, OSError):
        return False
    if not lines:
        return False
    header = [cell.strip() for cell in lines[0][1]]
    path = _one_of(header, PATHS)
    if path is None:
        return is_image(Path(header[0]))
    sample = [cells[header.index(path)] for _, cells in lines[1:] if len(cells) == len(header)]
    return any(_one_of(header, LABELS) or is_image(Path(cell.strip())) for cell in sample)


def _read(file: Path, most: int | None = None) -> list[tuple[int, list[str]]]:
    """The rows of a table with their line numbers, without empty ones."""
    with file.open("rb") as opened:
        content = opened.read() if most is None else opened.read(1 << 16)
    for encoding in (("utf-16",) if content[:2] in (b"\xff\xfe", b"\xfe\xff") else ("utf-8-sig", "cp1252")):
        try:
            text = content.decode(encoding, errors="strict" if most is None else "replace")
            break
        except UnicodeDecodeError:
            continue
    else:
        raise ValueError(f"{file} is no text: save the table as CSV in UTF-8")
    if "\0" in text:
        raise ValueError(f"{file} is no text: save the table as CSV in UTF-8")
    told = re.match(r"sep=(.)\s*?(?:\r\n|\n|\r)", text)  # Excel's
    skipped, text = (1, text[told.end():]) if told else (0, text)
    separator = told[1] if told else _cell_separator(list(islice(io.StringIO(text, newline=""), 50)))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
    try:
        return [(reader.line_num + skipped, cells) for cells in islice(reader, most)
                if any(cell.strip() for cell in cells)]
    except csv.Error as error:
        raise ValueError(f"{file}, line {reader.line_num + skipped}: {error}") from error


def _cell_separator(lines: list[str]) -> str:
    """Of comma, semicolon and tab the one that gives the most columns in as many lines as possible."""
    def fits(separator: str) -> tuple[int, int]:
        rows = [row for row in csv.reader(lines, delimiter=separator) if row]
        columns = len(rows[0]) if rows else 0
        alike = sum(len(row) == columns for row in rows) if columns > 1 else 0
        return alike, columns

    return max(",;\t", key=fits)


def _separator(rows: Iterable[_Row], given: str | None, root: Path) -> str:
    """What parts the labels in a cell; empty: nothing does."""
    if given is not None:
        return given
    cells = {label for row in rows for label in row.labels}
    found = [separator for separator in SEPARATORS if any(separator in cell for cell in cells)]
    if len(found) > 1:
        raise ValueError(f"labels of {root} hold | and ;: set label_separator to the one that is between labels")
    commas = sorted(cell for cell in cells if "," in cell)
    if commas and not found:
        raise ValueError(f"labels of {root} hold commas, such as {commas[0]!r}: set label_separator to ',' if those "
                         "are several labels, or to '' if they are one")
    return found[0] if found else ""


def _one_of(header: list[str], known: tuple[str, ...]) -> str | None:
    """The column that has the first of the known names."""
    plain = {_plain(name): name for name in reversed(header)}
    return next((plain[name] for name in known if name in plain), None)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _order(name: str) -> tuple[float, str]:
    return (float(name) if name.isdecimal() else float("inf")), name


def _alike(names: list[str]) -> list[list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"[\s_-]+", " ", name.casefold()), []).append(name)
    return list(groups.values())
