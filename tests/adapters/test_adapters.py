"""What all adapters have in common: places, freezing, copies, files, several on one backbone."""
import copy

import pytest
import safetensors.torch
import timm
import torch
from safetensors import safe_open

from visionattn import adapters
from visionattn.adapters._places import find_attention, find_blocks
from visionattn.layers import GroupedQueryAttention


def vit(seed=0, classes=5, **args):
    torch.manual_seed(seed)
    return timm.create_model("test_vit", img_size=32, num_classes=classes, **args).eval()


def answers(model, side=32):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return model(torch.randn(2, 3, side, side, generator=generator))


def stir(model):
    """Moves an adapter and head away from where they start."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)


@pytest.mark.parametrize(("name", "args"), [
    ("test_vit", {"img_size": 32}), ("swin_tiny_patch4_window7_224", {"img_size": 64, "depths": (1, 1, 1, 1)}),
    ("swinv2_tiny_window8_256", {"img_size": 64, "depths": (1, 1, 1, 1)}), ("cait_xxs24_224", {"img_size": 32}),
    ("test_agent_deit", {"img_size": 64}), ("test_biformer", {}), ("test_fan", {}), ("test_vitaev2_vsa", {})])
def test_every_layer_of_an_adapter_works(name, args):
    shapes = ["adaptformer"] if name.startswith(("cait", "swinv2")) else ["adaptformer", "lora"]
    for shape in shapes:
        model = timm.create_model(name, num_classes=3, **args)
        adapter = adapters.attach(model, "onebit", dim=8, shape=shape)
        model.train()(torch.randn(2, 3, args.get("img_size", 64), args.get("img_size", 64))).sum().backward()
        assert len(adapter.layers) == len((find_blocks if shape == "adaptformer" else find_attention)(model))
        trained = {key for key, parameter in model.named_parameters() if parameter.grad is not None}
        assert trained == {key for key, parameter in model.named_parameters() if parameter.requires_grad}
        assert {key for key, _ in adapter.named_parameters(prefix="adapters.onebit")} < trained
        assert all(key.startswith(("adapters.onebit", "head")) for key in trained)


def test_models_without_places_are_refused():
    model = timm.create_model("resnet18")
    for shape in ("adaptformer", "lora"):
        with pytest.raises(ValueError, match=r"ResNet has no (blocks|attention) that an adapter could go into"):
            adapters.attach(model, "onebit", shape=shape)
    assert not adapters.adapters_of(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    for name in ("beit_base_patch16_224", "swinv2_tiny_window8_256", "tiny_vit_5m_224", "efficientformer_l1"):
        with torch.device("meta"):  # whose qkv is not called, or has its rows in another order
            model = timm.create_model(name)
        with pytest.raises(ValueError, match="has no attention that an adapter could go into"):
            adapters.attach(model, "onebit", shape="lora")


def test_attention_with_fewer_keys_than_queries_is_refused():
    attention = GroupedQueryAttention(48, num_heads=4, kv_heads=1)
    assert attention.qkv.out_features % 3 == 0
    with pytest.raises(ValueError, match="has no attention"):
        find_attention(attention)
    assert find_attention(GroupedQueryAttention(48, num_heads=4, kv_heads=4))


@pytest.mark.slow
def test_adapters_compile_into_one_graph():
    for shape in ("adaptformer", "lora"):
        model, images = vit(), torch.randn(2, 3, 32, 32)
        adapters.attach(model, "onebit", dim=8, shape=shape)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(images), model(images))


def test_wrong_arguments_are_refused():
    model = vit()
    with pytest.raises(ValueError, match=r"there is no adapter 'twobit'; there are .*onebit"):
        adapters.attach(model, "twobit")
    with pytest.raises(ValueError, match="onebit has no option width; it has bits, dim"):
        adapters.attach(model, "onebit", width=3)
    for label in ("a.b", "", "head", "keys"):
        with pytest.raises(ValueError, match=f"an adapter cannot be called '{label}' here"):
            adapters.adapter_class("onebit")().attach(model, label)
    adapters.attach(model, "onebit")
    with pytest.raises(ValueError, match="has an adapter 'onebit' already"):
        adapters.attach(model, "onebit")
    with pytest.raises(ValueError, match="no adapter 'other'; it has onebit"):
        adapters.switch(model, "other")


def test_batch_norms_of_the_backbone_keep_their_statistics():
    model = timm.create_model("test_biformer", num_classes=3)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    adapters.attach(model, "onebit", dim=8)
    before = copy.deepcopy(model.state_dict())
    model.train()(torch.randn(2, 3, 64, 64))
    assert norms
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())


def test_copies_have_an_adapter_of_their_own():
    model = vit()
    adapters.attach(model, "onebit", dim=8)
    clone = copy.deepcopy(model)
    before = answers(model)
    stir(clone)
    assert torch.equal(answers(model), before)
    assert not torch.equal(answers(clone), before)
    clone.load_state_dict(model.state_dict())
    assert torch.equal(answers(clone), before)


def test_inner_values_are_computed_twice_alike():
    model = vit()
    adapters.attach(model, "onebit", dim=8)
    images, gradients = torch.randn(2, 3, 32, 32), []
    model.eval()
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(images).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for once, twice in zip(*gradients, strict=True):
        torch.testing.assert_close(once, twice)


def test_adapters_are_switched_with_their_heads(tmp_path):
    model = vit()
    plain = answers(model)
    found = {}
    for label, classes, options in (("few", 3, {"shape": "lora", "dim": 8}), ("many", 7, {"dim": 4, "bihead": True})):
        single = vit(classes=classes)
        single.load_state_dict({key: x for key, x in vit().state_dict().items() if "head" not in key}, strict=False)
        adapters.attach(single, "onebit", scale=10., **options)
        stir(single)
        found[label] = answers(single)
        size = adapters.save(single, tmp_path / f"{label}.safetensors")
        assert size == (tmp_path / f"{label}.safetensors").stat().st_size < 8000
        adapters.load(model, tmp_path / f"{label}.safetensors")
        torch.testing.assert_close(answers(model), found[label])
    for label in ("few", "many", "few"):
        adapters.switch(model, label)
        torch.testing.assert_close(answers(model), found[label])
        assert model.num_classes == found[label].shape[1]
    adapters.switch(model, None)
    assert torch.equal(answers(model), plain)
    with pytest.raises(ValueError, match="works with no adapter"):
        adapters.save(model, tmp_path / "none.safetensors")
    adapters.switch(model, "many")
    with pytest.raises(ValueError, match="has the adapters few, many"):
        adapters.merge(model)


def test_files_of_others_and_damaged_ones_are_refused(tmp_path):
    model = vit()
    adapters.attach(model, "onebit", dim=8)
    path = tmp_path / "a.safetensors"
    adapters.save(model, path)
    assert adapters.info(path)["options"]["dim"] == 8

    with pytest.raises(ValueError, match="adapter of test_vit, whose weights have other names or shapes"):
        adapters.load(vit(embed_dim=32, num_heads=2), path)
    with pytest.raises(ValueError, match="trained on other weights of test_vit"):
        adapters.load(vit(seed=1), path)
    fresh = vit()
    before = answers(fresh)
    content = path.read_bytes()
    for broken in (content[:-3], content[:40], b"", content[:-3] + bytes([content[-3] ^ 1]) + content[-2:],
                   content.replace(b'\\"dim\\":8', b'\\"dim\\":9').replace(b'\\"dim\\": 8', b'\\"dim\\": 4')):
        assert broken != content
        (tmp_path / "b.safetensors").write_bytes(broken)
        with pytest.raises(ValueError, match="damaged") as caught:
            adapters.load(fresh, tmp_path / "b.safetensors")
        assert "\n" not in str(caught.value)
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match="not an adapter file"):
        adapters.info(tmp_path / "c.safetensors")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        adapters.info(tmp_path / "d.safetensors")
    assert not adapters.adapters_of(fresh)
    assert torch.equal(answers(fresh), before)
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == {"adapter.packed", "head.head.weight", "head.head.bias"}
