"""timm's push_to_hf_hub with a model of ours: what would be uploaded is whole, and loads back to the same logits."""
import json
import shutil

import pytest
import timm
import torch
from timm.models import _hub, push_to_hf_hub

from tests.models import SAFETENSORS


@pytest.fixture
def uploaded(tmp_path, monkeypatch):
    """The folder that takes what timm uploads; nothing reaches the network."""
    target = tmp_path / "hub"

    class Api:
        def __init__(self, **_):
            pass

        def create_repo(self, repo_id, **_):
            return type("Url", (), {"repo_id": repo_id})()

        def file_exists(self, **_):
            return False

        def upload_folder(self, *, folder_path, **_):
            shutil.copytree(folder_path, target)

    def no_readme(*_, **__):
        raise _hub.EntryNotFoundError("none", response=None)

    monkeypatch.setattr(_hub, "HfApi", Api, raising=False)
    monkeypatch.setattr(_hub, "create_repo", Api().create_repo, raising=False)  # timm 1.0.24 calls functions
    monkeypatch.setattr(_hub, "upload_folder", Api().upload_folder, raising=False)
    monkeypatch.setattr(_hub, "get_hf_file_metadata", no_readme, raising=False)
    return target


@pytest.mark.parametrize("name", ["test_dinat", "test_biformer", "test_efficientvit_cga", "test_agent_swin"])
@torch.no_grad()
def test_what_is_pushed_loads_back(name, uploaded):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7).eval()
    cfg = timm.get_pretrained_cfg(name)
    card = dict(license=cfg.license, description=f"{cfg.paper_name}, from {cfg.origin_url}")
    push_to_hf_hub(model, f"someone/{name}", model_card=card, safe_serialization=SAFETENSORS)
    files = {path.name for path in uploaded.iterdir()}
    assert files == {"config.json", "README.md", "model.safetensors" if SAFETENSORS else "pytorch_model.bin"}
    text = (uploaded / "README.md").read_text()
    assert f"# Model card for {name}" in text
    assert f"license: {cfg.license}\n" in text
    assert cfg.origin_url in text
    config = json.loads((uploaded / "config.json").read_text())
    assert config["architecture"] == name
    assert config["num_classes"] == 7
    again = timm.create_model(f"local-dir:{uploaded}", pretrained=True).eval()
    images = torch.randn(1, *cfg.input_size)
    assert torch.equal(again(images), model(images))
