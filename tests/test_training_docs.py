"""The commands of docs/training.md run in their order, shortened: from a user's own files to an exported model."""
import json
import re
import shlex
from pathlib import Path

import pytest

from tests.data.images import coco_content, write_classes, write_image, write_mask
from visionattn.cli import main
from visionattn.data import voc

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "training.md").read_text(), flags=re.DOTALL)
COMMANDS = [shlex.split(line) for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
SHORTER = ["--trainer.max_epochs", "1", "--trainer.accelerator", "cpu", "--data.init_args.batch_size", "2",
           "--data.init_args.num_workers", "0", "--data.init_args.min_batches", "1",
           "--model.init_args.backbone", "test_dinat"]
SMALLER = {
    "imagefolder_finetune": ["--data.init_args.image_size", "32"],
    "coco_finetune": ["--model.init_args.fpn_channels", "64", "--model.init_args.min_size", "64",
                      "--model.init_args.max_size", "96"],
    "folder_finetune": ["--model.init_args.head_channels", "8", "--data.init_args.crop_size", "64",
                        "--data.init_args.short_side", "64"],
}


def _commands(name):
    """Those about a recipe, or about VOC's files (``VOC2012``)."""
    lines = [" ".join(command) for command in COMMANDS]
    return [command for command, line in zip(COMMANDS, lines, strict=True)
            if (name in line if name == "VOC2012" else re.search(rf"\b{name}", line) and "VOC2012" not in line)]


def _run(commands, recipe):
    for program, *arguments in commands:
        if program == "python":
            assert arguments[:2] == ["-m", "visionattn.data.voc"]
            voc.main(arguments[2:])
            continue
        assert program == "visionattn"
        if arguments[0] not in ("export", "predict"):
            arguments += ["--trainer.enable_progress_bar", "false"]
        if arguments[0] == "fit":
            arguments += [*SHORTER, *SMALLER[recipe]]
        assert main(arguments) == 0, arguments


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A user's folder, with images to predict."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for index in range(2):
        write_image(tmp_path / "inbox" / f"{index}.jpg", seed=index)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_is_of_a_walk_or_of_a_large_data_set():
    walks = [*_commands("imagefolder_finetune"), *_commands("coco_finetune"), *_commands("VOC2012"),
             *_commands("folder_finetune")]
    assert [command[1] for command in walks].count("export") == 3
    elsewhere = [["visionattn", "train", "photos"], ["visionattn", "bench", "train"],  # run by test_readme, test_bench
                 ["visionattn", "probe", "--model"]]  # and by test_probe
    for command in COMMANDS:
        if command not in walks and command[:3] not in elsewhere:
            assert command[:3] == ["visionattn", "fit", "--config"]
            assert "data/" in (ROOT / command[3]).read_text()


@pytest.mark.slow
def test_folder_of_images(folder):
    for split in ("train", "val"):
        write_classes(folder / "photos" / split)
    _run(_commands("imagefolder_finetune"), "imagefolder_finetune")
    run = folder / "runs" / "imagefolder_finetune"
    assert json.loads((run / "test_metrics.json").read_text())["num_images"] == 12
    assert len((run / "predictions.csv").read_text().splitlines()) == 3
    assert (folder / "photos.onnx").is_file()


@pytest.mark.slow
def test_coco_file(folder):
    for split in ("train", "val"):
        content = coco_content(folder / "photos" / split)
        (folder / "photos" / f"{split}.json").write_text(json.dumps(content))
    _run(_commands("coco_finetune"), "coco_finetune")
    run = folder / "runs" / "coco_finetune"
    assert json.loads((run / "test_metrics.json").read_text())["num_images"] == 3
    assert isinstance(json.loads((run / "predictions.json").read_text()), list)
    assert len(list((run / "pictures").iterdir())) == 2
    assert (folder / "photos.onnx").is_file()


@pytest.mark.slow
def test_voc_files(folder):
    root = folder / "VOC2012"
    for name in ("a", "b", "c"):
        write_image(root / "JPEGImages" / f"{name}.jpg")
        (root / "Annotations").mkdir(exist_ok=True)
        (root / "Annotations" / f"{name}.xml").write_text(
            f"<annotation><filename>{name}.jpg</filename><size><width>40</width><height>36</height></size><object><name>"
            "dog</name><bndbox><xmin>3</xmin><ymin>4</ymin><xmax>30</xmax><ymax>25</ymax></bndbox></object></annotation>")
    lists = root / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a\nb\n")
    (lists / "val.txt").write_text("c\n")
    _run(_commands("VOC2012"), "coco_finetune")
    metrics = json.loads((folder / "runs" / "coco_finetune" / "test_metrics.json").read_text())
    assert (metrics["num_images"], metrics["num_classes"]) == (1, 1)


@pytest.mark.slow
def test_folder_of_masks(folder):
    for split, count in (("train", 4), ("val", 2)):
        for index in range(count):
            write_image(folder / "photos" / "images" / split / f"{index}.jpg", seed=index)
            write_mask(folder / "photos" / "masks" / split / f"{index}.png", seed=index)
    _run(_commands("folder_finetune"), "folder_finetune")
    run = folder / "runs" / "folder_finetune"
    metrics = json.loads((run / "test_metrics.json").read_text())
    assert (metrics["num_images"], metrics["num_classes"]) == (2, 3)
    assert sorted(path.name for path in (run / "predictions").iterdir()) == ["0.png", "1.png"]
    assert (folder / "photos.onnx").is_file()
