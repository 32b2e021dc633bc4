"""``visionattn list``: complete, counted right, and of timm's models too."""
import csv
import fnmatch
import functools
from pathlib import Path

import pytest
import timm
import torch

from visionattn import listing, models
from visionattn.cli import main

OURS = listing.chosen()
PUBLISHED = {name: figures for family in models.families().values() for name, figures in family.published.items()}
ZOO = Path(__file__).parent.parent / "results" / "zoo.csv"
COUNTED = {row["model"]: row for row in csv.DictReader(ZOO.read_text().splitlines())} if ZOO.exists() else {}
describe = functools.cache(listing.describe)  # counting takes a fraction of a second a model


@pytest.fixture
def listed(capsys, monkeypatch):
    """Runs the command: returns its rows as lists of words, without the heading."""
    monkeypatch.setattr(listing, "describe", describe)

    def run(*argv):
        assert main(["list", *argv]) == 0
        heading, *rows = capsys.readouterr().out.splitlines()
        assert heading.split() == ["model", "parameters", "GMACs", "image", "top-1", "licence", "family", "weights"]
        return [row.split() for row in rows]
    return run


def test_what_was_published_is_of_models_that_exist():
    assert PUBLISHED.keys() <= set(OURS)


@pytest.mark.parametrize("name", OURS)
def test_every_trained_model_has_its_published_figures(name):
    config = timm.get_pretrained_cfg(name)
    assert name in PUBLISHED or config.tag == "untrained" or config.num_classes != 1000
    if name in PUBLISHED:
        assert 60 < PUBLISHED[name].top1 < 90
        docstring = " ".join((timm.model_entrypoint(name).__doc__ or "").split())
        assert f"{PUBLISHED[name].top1} %" in docstring


@pytest.mark.parametrize("name", OURS)
def test_entry(name):
    entry = describe(name)
    config = timm.get_pretrained_cfg(name)
    assert entry.name == name
    assert entry.parameters == sum(p.numel() for p in timm.create_model(name, device="meta").parameters())
    assert entry.image_size == config.input_size[1:]
    assert entry.family in models.__all__
    assert entry.licence
    assert entry.weights.startswith("https://") != (config.tag == "untrained")
    assert entry.gmacs is not None
    if name in COUNTED:  # which test_zoo.py asks of all models of the project
        assert entry.parameters == int(COUNTED[name]["parameters"])
        same = COUNTED[name]["torch"] == torch.__version__.partition("+")[0]  # others may count attention otherwise
        assert entry.gmacs == pytest.approx(float(COUNTED[name]["gmacs"]), rel=1e-5 if same else 0.02)
    assert (entry.top1 is None) == (name not in PUBLISHED)
    if name in PUBLISHED and PUBLISHED[name].gmacs is not None:
        # The authors round to 0.1, or to three digits, and some count norms and activations too.
        published = PUBLISHED[name].gmacs
        rounding = 0.05 if published == round(published, 1) else 0
        if PUBLISHED[name].whole:
            assert entry.gmacs == pytest.approx(published, abs=0.02 * published + rounding)
        else:  # the products are a small part at these sizes
            assert 0.98 * published <= entry.gmacs <= 1.1 * published


@pytest.fixture
def uncounted(listed, monkeypatch):
    """Runs the command without counting each model, which test_entry does."""
    entry = describe("test_dinat")
    monkeypatch.setattr(listing, "describe", lambda name: entry._replace(name=name, family=listing._family(name)))
    return listed


def test_all_of_ours(uncounted):
    rows = uncounted()
    assert [row[0] for row in rows] == OURS
    assert len({row[-2] for row in rows}) == len(models.__all__)


@pytest.mark.parametrize("family", ["isotropic", "agent"])
def test_family(family, uncounted):
    """By its name, or by the part before an underscore."""
    rows = uncounted("--family", family)
    assert rows
    assert {row[0] for row in rows} == {
        name for name in OURS
        if timm.model_entrypoint(name).__module__.rsplit(".", 1)[-1].partition("_")[0] == family}


def test_row(listed):
    row, = listed("nat_mini")
    assert row == ["nat_mini", "19.98", "M", "2.69", "224", "x", "224", "81.8", "%", "mit", "nat",
                   "https://shi-labs.com/projects/nat/checkpoints/CLS/nat_mini.pth"]
    row, = listed("test_dinat")
    assert row[-1] == "none"


def test_pattern_within_a_family(listed):
    names = [row[0] for row in listed("nat*", "--family", "isotropic")]
    assert names == ["nat_iso_base", "nat_iso_small"]


def test_pattern_of_timms_models(listed):
    rows = listed("test_vit*")
    assert {row[0] for row in rows} == set(fnmatch.filter(timm.list_models(), "test_vit*"))
    row = next(row for row in rows if row[0] == "test_vit")
    assert row[-2:] == ["timm.vision_transformer", "https://huggingface.co/timm/test_vit.r160_in1k"]
    assert "apache-2.0" in row


def test_a_model_that_cannot_run_without_values_has_no_gmacs(monkeypatch):
    class Reads(torch.nn.Module):
        pretrained_cfg = dict(input_size=(3, 8, 8))  # noqa: RUF012

        def forward(self, x):
            return x.sum().item()

    monkeypatch.setattr(timm, "create_model", lambda name: Reads())
    assert listing.describe("test_vit").gmacs is None


@pytest.mark.parametrize(("argv", "message"), [
    (["--family", "yolo"], "there is no family 'yolo'; there are "),
    (["yolo"], "no model is called 'yolo'; * stands for anything, as in 'yolo*'"),
    (["resnet18", "--family", "nat"], "no model in the family nat is called 'resnet18'"),
])
def test_nothing_found(argv, message, capsys):
    assert main(["list", *argv]) == 1
    line, = capsys.readouterr().err.splitlines()
    assert message in line
