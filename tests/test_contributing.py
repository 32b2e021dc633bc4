"""CONTRIBUTING.md's example: a family in one file, with which all that the project does works at once."""
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the project with the example in it, in which no other file is touched."""
    folder = tmp_path_factory.mktemp("checkout")
    source, = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    for name in ("visionattn", "tests", "tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "visionattn" / "models" / "toy.py").write_text(source)
    return folder


def run(folder, *argv):
    done = subprocess.run(
        [sys.executable, *argv], cwd=folder, capture_output=True, text=True, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)})
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def test_it_is_registered_and_listed(checkout):
    said = run(checkout, "-m", "visionattn", "list", "--family", "toy")
    assert [line.split()[0] for line in said.splitlines()[1:]] == ["test_toy", "toy_s12"]
    said = run(checkout, "-c", "import timm, visionattn; print(timm.is_model('toy_s12'), visionattn.__file__)")
    assert said.split() == ["True", str(checkout / "visionattn" / "__init__.py")]


FITS = {
    "classification": ["ClassificationTask", "DigitsData", "--data.init_args.image_size", "32"],
    "detection": ["DetectionTask", "DigitScenesData", "--model.init_args.detector", "fcos",
                  "--model.init_args.min_size", "64"],
    "segmentation": ["SegmentationTask", "DigitScenesData", "--data.init_args.task", "segmentation"],
}


@pytest.mark.slow
@pytest.mark.parametrize("task", list(FITS))
def test_it_is_trained_and_exported(task, checkout, tmp_path):
    model, data, *options = FITS[task]
    scenes = data == "DigitScenesData"
    options += ["--data.init_args.train_scenes", "4", "--data.init_args.val_scenes", "2",
                "--data.init_args.test_scenes", "2"] if scenes else []
    run(checkout, "-m", "visionattn", "fit", "--model", model, "--model.init_args.backbone", "test_toy", "--data", data,
        "--data.init_args.batch_size", "2", "--data.init_args.num_workers", "0", *options,
        "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1",
        "--trainer.limit_test_batches", "1", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
        "--trainer.default_root_dir", str(tmp_path))
    said = run(checkout, "-m", "visionattn", "export", "--checkpoint", str(tmp_path / "checkpoints" / "last.ckpt"),
               "--img-size", "64", "--out", str(tmp_path / "toy.onnx"))
    assert "largest difference" in said
    assert (tmp_path / "toy.onnx").is_file()


@pytest.mark.slow
def test_it_is_benchmarked(checkout, tmp_path):
    said = run(checkout, "tools/benchmark_models.py", "--models", "toy*", "--batch", "1", "--repeats", "2", "--output",
               str(tmp_path / "models.csv"))
    assert "toy_s12" in said
    assert "poolformer_s12" in (tmp_path / "models.csv").read_text()


@pytest.mark.slow
def test_the_tests_of_all_families_cover_it(checkout):
    said = run(checkout, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "toy", "tests/models",
               "tests/test_dense.py", "tests/test_list.py")
    passed = int(re.search(r"(\d+) passed", said)[1])
    assert passed > 80
    assert "failed" not in said
