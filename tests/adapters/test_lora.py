"""LoRA and DoRA: peft's layers in our frame do what peft does by itself."""
import copy
import sys

import peft
import pytest
import timm
import torch

from visionattn import adapters


def vit():
    torch.manual_seed(0)
    return timm.create_model("test_vit", img_size=32, num_classes=5).eval()


def stirred(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for key, parameter in sorted(model.named_parameters(), key=lambda item: item[0].rpartition("qkv")[2]):
            if "lora_" in key:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_peft_by_itself_agrees(name, tmp_path):
    images = torch.randn(2, 3, 32, 32)
    model = vit()
    names = set(model.state_dict())
    before = model(images)
    adapter = adapters.attach(model, name, rank=4, alpha=8.)
    torch.testing.assert_close(model(images), before)
    stirred(model)
    theirs = vit()
    peft.inject_adapter_in_model(
        peft.LoraConfig(r=4, lora_alpha=8, target_modules=["qkv"], use_dora=name == "dora"), theirs)
    ours = {key.partition("qkv")[2]: x for key, x in adapter.state_dict().items()}
    for i, block in enumerate(theirs.blocks):
        for key, x in block.attn.qkv.state_dict().items():
            if "lora_" in key:
                x.copy_(ours[f"{i}.{key}"])
    expected = theirs.eval()(images)
    torch.testing.assert_close(model(images), expected)
    assert {key for key in model.state_dict() if not key.startswith("adapters.")} == names
    assert all("lora_" in key for key in adapter.state_dict())

    model.train()(images).sum().backward()
    theirs.train()(images).sum().backward()
    for i, block in enumerate(theirs.blocks):
        torch.testing.assert_close(adapter.layers[f"qkv{i}"].lora_A["default"].weight.grad,
                                   block.attn.qkv.lora_A["default"].weight.grad)
    assert model.blocks[0].attn.qkv.weight.grad is None

    model.eval()
    clone = copy.deepcopy(model)
    stirred(clone)
    torch.testing.assert_close(model(images), expected)
    assert not torch.allclose(clone(images), expected, atol=1e-3)

    adapters.save(model, tmp_path / "a.safetensors")
    fresh = vit()
    adapters.load(fresh, tmp_path / "a.safetensors")
    torch.testing.assert_close(fresh(images), expected)
    adapters.switch(fresh, None)
    torch.testing.assert_close(fresh(images), before)
    assert adapters.merge(model)
    assert set(model.state_dict()) == names
    torch.testing.assert_close(model(images), expected)
    program = torch.export.export(clone, (images,)).module()
    torch.testing.assert_close(program(images), clone(images))


def test_bad_options_and_a_missing_package(monkeypatch):
    for options in ({"rank": 0}, {"dropout": 1.}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be at least"):
            adapters.attach(vit(), "lora", **options)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"need the package peft: pip install 'visionattn\[peft\]'"):
        adapters.attach(vit(), "dora")
