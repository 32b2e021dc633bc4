"""Every command and every example of the README runs, shortened: one epoch, a few small images, made-up weights."""
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests import golden

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
COMMANDS = [shlex.split(line) for kind, block in BLOCKS if kind == "bash" for line in block.splitlines()]
EXAMPLES = [block for kind, block in BLOCKS if kind == "python"]
SHORTER = {
    "train": ["--model", "test_vit", "--trainer.max_epochs", "1", "--data.batch_size", "4", "--data.num_workers", "0",
              "--data.min_batches", "1"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A user's folder: the configs, photos of two classes, and an official checkpoint fetched by hand."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "configs").symlink_to(ROOT / "configs")
    random = np.random.RandomState(0)
    for split in ("train", "val"):
        for shade, name in enumerate(("dark", "light")):
            (folder / "photos" / split / name).mkdir(parents=True)
            for number in range(4):
                pixels = random.randint(100 * shade, 100 * shade + 100, (240, 240, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "photos" / split / name / f"{number}.jpg")
    (folder / "inbox").symlink_to(folder / "photos" / "val" / "dark")
    weights = golden.official_state_dict(golden.load("dinat_tiny"))
    torch.save({key: value.float() for key, value in weights.items()}, folder / "dinat_tiny_in1k_224.pth")
    return folder


def _run(command, folder):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True, check=False)
    assert done.returncode == 0, f"{command}:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.parametrize("code", EXAMPLES, ids=lambda code: code.strip().splitlines()[-1][:40])
def test_example(code, folder, tmp_path):
    for entry in folder.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    _run([sys.executable, "-W", "ignore", "-c", code], tmp_path)


@pytest.mark.slow
def test_commands(folder):
    """The commands in their order, as later ones use what earlier ones wrote."""
    project = (ROOT / "pyproject.toml").read_text()
    ran = set()
    for program, *arguments in COMMANDS:
        if program == "make":
            subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, check=True, capture_output=True)
        elif program == "pip":
            assert arguments[:2] == ["install", "-e"]
            assert f"\n{arguments[2].strip('.[]')} = [" in project  # such an extra exists
        elif program == "visionattn" and arguments[0] != "demo":  # test_demo.py runs it
            _run([sys.executable, "-m", "visionattn", *arguments, *SHORTER.get(arguments[0], [])], folder)
            ran.add(arguments[0])
        else:
            assert [program, *arguments] in (["visionattn", "demo"], ["pytest", "-n", "2"],
                                             shlex.split("python -m venv .venv && . .venv/bin/activate"))
    assert ran == {"train", "predict", "export"}
    assert (folder / "runs" / "photos" / "model.onnx").is_file()
    assert len((folder / "runs" / "photos" / "predictions.csv").read_text().splitlines()) == 5
