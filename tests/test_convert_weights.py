"""Official files to safetensors: every family's layout, and the files that must be refused with nothing written."""
import hashlib
import json
import re

import pytest
import safetensors.torch
import timm
import torch

from tests import golden
from tools import convert_weights
from visionattn import models
from visionattn.listing import chosen
from visionattn.tasks.rebuild import create_model

OFFICIAL = {  # model: golden file with the layout of the authors' state dict
    "biformer_tiny": "biformer_tiny",
    "biformer_stl_nchw": "biformer_stl_nchw",
    "nat_mini": "nat_mini",
    "dinat_s_tiny": "dinat_s_tiny",
    "vitrpb_small": "vitrpb_small",
    "efficientvit_cga_m0": "efficientvit_m0",
    "agent_deit_t": "agent_deit_t",
    "agent_pvt_t": "agent_pvt_t",
    "agent_swin_t": "agent_swin_t",
    "agent_cswin_t": "agent_cswin_t",
    "fan_tiny_8_p4_hybrid": "fan_tiny_8_p4_hybrid",
    "smt_t": "smt_t",
    "vitaev2_vsa_s": "vitaev2_vsa_s",
    "transnext_micro": "transnext_micro",
    "moh_transnext_small_75": "moh_transnext_small_75",
}


def family(name):
    return timm.model_entrypoint(name).__module__.rsplit(".", 1)[-1]


@pytest.fixture(scope="module", params=OFFICIAL)
def official(request, tmp_path_factory):
    """A model's name, and a file as its authors publish them, indices that they keep among the weights included."""
    case = golden.load(OFFICIAL[request.param])
    weights = {key: torch.zeros(shape, dtype=torch.int64) for key, shape, _ in case["state_dict"]}
    weights |= {key: x.float() for key, x in golden.official_state_dict(case).items()}
    path = tmp_path_factory.mktemp("official") / "weights.pth"
    torch.save({"model": weights, "epoch": 300}, path)
    yield request.param, path
    path.unlink()


@pytest.fixture
def refused(tmp_path, capsys):
    """Runs a conversion that must fail: returns its one line, after a look at what it left behind."""
    folder = tmp_path / "out"
    folder.mkdir()

    def run(name, *arguments):
        assert convert_weights.main([name, *map(str, arguments), "--out", str(folder / "w.safetensors")]) == 1
        assert not list(folder.iterdir())
        line, = capsys.readouterr().err.splitlines()
        assert line.startswith("convert_weights: error: ")
        return line
    return run


def test_every_family_with_published_weights_is_covered():
    trained = {family(name) for name in chosen() if timm.get_pretrained_cfg(name).tag != "untrained"}
    assert {family(name) for name in OFFICIAL} == trained <= set(models.__all__)


def test_converts(official, tmp_path):
    """The result has our names and loads without the filter; the record says what it was made from."""
    name, source = official
    out = tmp_path / "converted.safetensors"
    assert convert_weights.main([name, str(source), "--url", "https://example.org/w.pth", "--out", str(out)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["converted.json", "converted.safetensors"]
    model = timm.create_model(name).eval()
    model.load_state_dict(safetensors.torch.load_file(out))
    direct = create_model(name, source)
    for key, value in direct.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
    images = torch.randn(1, *model.pretrained_cfg["input_size"])
    with torch.no_grad():
        assert torch.equal(model(images), direct.eval()(images))
    record = json.loads(out.with_suffix(".json").read_text())
    assert record["model"] == name
    assert record["source_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert record["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    assert record["source_url"] == "https://example.org/w.pth"
    assert record["licence"] == timm.get_pretrained_cfg(name).license
    assert record["origin"].startswith("https://github.com/")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", record["converted_on"])
    assert record["versions"]["visionattn"]
    assert record["parameters"] == sum(p.numel() for p in model.parameters())


def test_file_of_another_model_is_refused(official, refused):
    _, source = official
    for other in ("test_dinat", "test_biformer"):
        line = refused(other, source)
        assert "of another model: entries" in line or "of the nchw version of BiFormer, the model of the legacy" in line


def test_truncated_file_is_refused(official, refused, tmp_path):
    name, source = official
    (tmp_path / "cut.pth").write_bytes(source.read_bytes()[:-5000])
    assert "cut.pth is damaged or not a checkpoint" in refused(name, tmp_path / "cut.pth")


class _Code:
    def __reduce__(self):
        return (print, ("code ran",))


def test_file_that_carries_code_is_refused(official, refused, tmp_path, capsys):
    name, source = official
    content = torch.load(source, mmap=True, weights_only=True)
    content["model"] = dict(list(content["model"].items())[:3]) | {"head.weight": _Code()}
    torch.save(content, tmp_path / "tampered.pth")
    assert "pickles objects that are not weights; it was not opened" in refused(name, tmp_path / "tampered.pth")
    assert "code ran" not in capsys.readouterr().out


def test_missing_entry_and_extra_entry_are_refused(refused, tmp_path):
    weights = timm.create_model("test_dinat").state_dict()
    torch.save({key: x for key, x in weights.items() if key != "norm.bias"}, tmp_path / "less.pth")
    assert "1 missing (first: norm.bias)" in refused("test_dinat", tmp_path / "less.pth")
    torch.save(weights | {"extra": torch.zeros(1)}, tmp_path / "more.pth")
    assert "1 unexpected (first: extra)" in refused("test_dinat", tmp_path / "more.pth")


def test_name_of_another_models_file_is_refused(refused, tmp_path):
    """NAT and DiNAT have the same entries; the file's name is all that tells them apart."""
    torch.save({}, tmp_path / "nat_mini.pth")
    line = refused("dinat_mini", tmp_path / "nat_mini.pth")
    assert "is, by its name, the authors' file of nat_mini, not of dinat_mini" in line


def test_weights_that_are_not_finite_are_refused(refused, tmp_path):
    weights = timm.create_model("test_dinat").state_dict()
    weights["norm.bias"][0] = torch.nan
    torch.save(weights, tmp_path / "weights.pth")
    assert "the logits are not finite" in refused("test_dinat", tmp_path / "weights.pth")


def test_result_that_computes_something_else_is_not_kept(refused, tmp_path, monkeypatch):
    def other(name, path):
        return timm.create_model(name)

    monkeypatch.setattr(convert_weights, "create_model", other)
    torch.save(timm.create_model("test_dinat").state_dict(), tmp_path / "weights.pth")
    assert "other logits than the source" in refused("test_dinat", tmp_path / "weights.pth")


def test_downloads_what_is_not_given(refused, tmp_path, monkeypatch):
    weights = timm.create_model("test_dinat").state_dict()
    asked = []

    def download(url, target, progress):
        asked.append(url)
        torch.save(weights, target)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    record = convert_weights.convert("test_dinat", tmp_path / "w.safetensors", url="https://example.org/w.pth")
    assert asked == [record["source_url"]] == ["https://example.org/w.pth"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "w.json", "w.safetensors"]
    assert "nobody published a file of test_dinat" in refused("test_dinat")
    monkeypatch.undo()
    line = refused("nat_mini", "--url", "http://127.0.0.1:9/nat_mini.pth")
    assert "cannot download http://127.0.0.1:9/nat_mini.pth" in line
    assert "if you have the file, give its path" in line


def test_wrong_arguments(refused, tmp_path, capsys):
    assert "'resnet18' is no model of this zoo" in refused("resnet18", "w.pth")
    assert "nowhere.pth does not exist" in refused("nat_mini", "nowhere.pth")
    run = {"backbone": "nat_mini", "num_classes": 10}
    torch.save({"state_dict": {}, "hyper_parameters": run}, tmp_path / "best.ckpt")
    assert "the checkpoint of a training run" in refused("nat_mini", tmp_path / "best.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "empty.pth")
    assert "holds no weights" in refused("nat_mini", tmp_path / "empty.pth")
    for out, words in ((tmp_path / "w.pth", "must end in .safetensors"),
                       (tmp_path / "nowhere" / "w.safetensors", "there is no folder")):
        assert convert_weights.main(["nat_mini", "w.pth", "--out", str(out)]) == 1
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_earlier_results_are_kept(suffix, tmp_path, capsys):
    path = (tmp_path / "w").with_suffix(suffix)
    path.write_text("mine")
    assert convert_weights.main(["test_dinat", "w.pth", "--out", str(tmp_path / "w.safetensors")]) == 1
    assert f"w{suffix} exists" in capsys.readouterr().err
    assert path.read_text() == "mine"
