"""The commands of docs/your-data.md about tables, unequal classes, channels and tools run, on the folders it draws."""
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from tests.data.images import coco_content, write_classes, write_image
from visionattn.cli import main
from visionattn.data import CsvData

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "your-data.md").read_text()
SMALLER = ["--trainer.max_epochs", "1", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
           "--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "1",
           "--data.init_args.batch_size", "2", "--data.init_args.num_workers", "0", "--data.init_args.min_batches", "1",
           "--model.init_args.backbone", "test_dinat", "--model.init_args.ema_decay", "null"]
SIZES = {"classification": ["--data.init_args.image_size", "32"],
         "detection": ["--model.init_args.fpn_channels", "64", "--model.init_args.min_size", "64",
                       "--model.init_args.max_size", "96"]}


def _section(heading):
    level = heading.partition(" ")[0]
    return re.split(rf"\n#{{1,{len(level)}}} ", TEXT.partition(f"\n{heading}\n")[2])[0]


def _blocks(heading):
    """Drawings and commands of a section, in their order."""
    found = re.findall(r"```(bash)?\n(.*?)```", _section(heading), flags=re.DOTALL)
    return [shlex.split(text.replace("\\\n", " ")) if bash else text.split() for bash, text in found]


def _commands(heading):
    return [block for block in _blocks(heading) if block[0] == "visionattn"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _run(command, folder):
    task = "classification" if re.search("imagefolder|csv", command[3]) else "detection"
    assert command[:3] == ["visionattn", "fit", "--config"]
    assert main([*command[1:], *SMALLER, *SIZES[task], "--trainer.default_root_dir", str(folder / "run")]) == 0
    return json.loads((folder / "run" / "test_metrics.json").read_text())


def _table(root, text, images="images", count=6):
    for index in range(count):
        write_image(root / images / f"{index}.jpg", seed=index)
    (root / "labels.csv").write_text(text)


def test_a_table(folder):
    command, = _commands("## Labels in a table")
    _table(folder / "photos", "path,label\n" + "".join(f"{index}.jpg,{'cat' if index % 2 else 'dog'}\n"
                                                       for index in range(6)))
    assert _run(command, folder)["num_classes"] == 2


@pytest.mark.parametrize("row", re.findall(r"^\| (.*?) \| (.*?) \| (.*?)\|$", _section("## Labels in a table"),
                                           flags=re.MULTILINE)[1:], ids=lambda row: row[0])
def test_forms_of_tables(tmp_path, row):
    """The rows that the page shows."""
    head, *rows = [text.replace("\\|", "|") for text in re.findall(r"`([^`]*)`", row[1])]
    names = head.split(",")[1:] if "cat" in head else ["cat", "dog"]
    more = ["1.jpg,0,1", "2.jpg,0,0"] if len(names) and "," in head.partition(",")[2] else ["1.jpg,dog", "2.jpg,cat"]
    options = {"multi_label": True} if "multi_label" in row[2] else {}
    for form in ([rows] if "multi_label" in row[2] else [[one] for one in rows]):
        _table(tmp_path, "\n".join([head, *form, *more, ""]))
        data = CsvData(str(tmp_path), num_workers=0, **options)
        assert data.class_names == ["cat", "dog"]
        assert data.multi_label == ("multi" in row[2])


@pytest.mark.slow
@pytest.mark.parametrize("command", _commands("## Unequal classes and few images"), ids=lambda command: command[-2])
def test_unequal_classes(folder, command):
    for split in ("train", "val"):
        write_classes(folder / "photos" / split, classes=("cat", "dog"), count=2)
    assert _run(command, folder)["num_classes"] == 2


def test_channels(folder):
    command, = _commands("## Other channels than three")
    for name in ("cat", "dog"):
        for index in range(4):
            (folder / "photos" / name).mkdir(parents=True, exist_ok=True)
            np.save(folder / "photos" / name / f"{index}.npy", np.full((40, 36, 5), index, np.uint8))
    _run(command, folder)
    inbox = folder / "inbox"
    (folder / "photos" / "cat").rename(inbox)
    assert main(["predict", str(folder / "run"), str(inbox)]) == 0
    assert len((folder / "run" / "predictions.csv").read_text().splitlines()) == 5


TOOLS = re.findall(r"^### (.*)$", _section("## By tool"), flags=re.MULTILINE)


def _exports():
    for tool in TOOLS:
        section = _section("## By tool").partition(f"### {tool}\n")[2].partition("\n### ")[0]
        found = re.findall(r"```(?:bash)?\n(.*?)```", section, flags=re.DOTALL)
        yield from ((tool, drawing.split(), shlex.split(command))
                    for drawing, command in zip(found[::2], found[1::2], strict=True))


def _make(root, drawn):
    """Makes what is drawn: images, and what a file of that name says of them."""
    for number, path in enumerate(drawn):
        for index in range(3) if "*" in path else [0]:
            file = root / path.replace("*", f"{number}{index}")
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix == ".jpg":
                write_image(file, seed=10 * number + index)
            elif file.suffix == ".txt":
                (file.parent / file.name.replace(str(number), str(number - 1), 1)).write_text("0 0.5 0.5 0.4 0.4\n")
            elif file.suffix == ".yaml":
                file.write_text("train: ../train/images\nval: ../valid/images\nnc: 1\nnames: ['dog']\n")
            elif file.suffix == ".csv":
                file.write_text("filename, cat, dog\n" + "".join(
                    f"{number + 1}{one}.jpg, 1, {one % 2}\n" for one in range(3)))
            else:
                content = coco_content(root / Path(drawn[number + 1]).parent)
                for image in content["images"]:
                    image["file_name"] = Path(drawn[number + 1]).parent.name + "/" + image["file_name"]
                file.write_text(json.dumps(content))


def test_every_tool_is_there():
    assert TOOLS == ["CVAT", "Label Studio", "LabelMe", "Roboflow", "Supervisely", "VIA"]
    assert len(list(_exports())) == 7


@pytest.mark.slow
@pytest.mark.parametrize(("tool", "drawn", "command"), list(_exports()), ids=lambda part: part if isinstance(
    part, str) else "")
def test_tools(folder, tool, drawn, command):
    _make(folder, drawn)
    metrics = _run(command, folder)
    assert metrics["num_images"] >= 1
    assert ("map" in metrics) == ("csv_finetune" in command)
