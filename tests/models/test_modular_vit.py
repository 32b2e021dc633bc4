"""Modular ViT: sizes, tasks, models cut to one, files (what every family must do is in test_families.py)."""
import pytest
import timm
import torch

from visionattn import export
from visionattn.dense import DenseBackbone
from visionattn.layers import auxiliary_losses, cut_to_task


def make(**options):
    """A small model of two tasks that routes unlike from task to task."""
    torch.manual_seed(0)
    model = timm.create_model("test_modular_vit", num_classes=5, tasks=("count", "read"), **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def images(batch=2, height=40, width=56):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("name", "parameters"), [("modular_vit_tiny", 36_385_384), ("modular_vit_small", 129_900_520)])
def test_sizes(name, parameters):
    model = timm.create_model(name, device="meta", router_noise=False)
    assert sum(x.numel() for x in model.parameters()) == parameters
    block = model.blocks[0]
    assert block.attn.query.shape == (24, 64, model.num_features)
    assert block.mlp.fc1.shape == (16, 2 * model.num_features, model.num_features)


@torch.no_grad()
def test_tasks():
    model, x = make(), images()
    counted = model(x)
    model.set_task("read")
    read = model(x)
    assert not torch.allclose(counted, read)
    other = make(task="read")
    assert torch.equal(other(x), read)
    other.set_task("count")
    assert torch.equal(other(x), counted)
    numbered = timm.create_model("test_modular_vit", tasks=3)
    assert numbered.blocks[2].mlp.router.tasks == ["0", "1", "2"]
    timm.create_model("test_modular_vit").set_task("anything")
    for options, message in (({"tasks": "read"}, "list of their names, got 'read'"), ({"tasks": 0}, "1 at least"),
                             ({"tasks": ["a"], "task": "b"}, "know the tasks a, got 'b'"),
                             ({"attn_experts": [4, 4]}, "attn_experts must be one number or one for each of the 3 blocks"),
                             ({"mlp_experts": 1}, "a token needs 1 to 1 of 1 experts, got 2"),
                             ({"patch_size": 12}, "patch_size must be a power of two, 2 at least, got 12")):
        with pytest.raises(ValueError, match=message):
            timm.create_model("test_modular_vit", **options)


def test_a_step_trains_the_task_that_is_set():
    model = make().train()
    model.set_task("read")
    (model(images()).square().sum() + sum(auxiliary_losses(model).values())).backward()
    untrained = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert untrained == {f"blocks.{i}.{layer}.router.{kind}_0" for i in range(3) for layer in ("attn", "mlp")
                         for kind in ("weight", "noise")}
    assert all(parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)


@torch.no_grad()
def test_a_cut_model_is_a_plain_one():
    """Built anew from its arguments, saved and loaded, of any image size, further pruned, and trained."""
    model, x = make(), images()
    for number, layer in enumerate(module for block in model.blocks for module in (block.attn, block.mlp)):
        layer.router.frequency[1, number % layer.router.num_experts] = 0
    cut = cut_to_task(model, "read", 0.01)
    args = cut.expert_args()
    assert args == {"attn_experts": [5, 5, 5], "mlp_experts": [3, 3, 3], "tasks": ["read"]}
    assert model.expert_args() == {"attn_experts": [6, 6, 6], "mlp_experts": [4, 4, 4], "tasks": ["count", "read"]}
    twin = timm.create_model("test_modular_vit", num_classes=5, **args).eval()
    twin.load_state_dict(cut.state_dict())
    assert torch.equal(twin(x), cut(x))
    model.set_task("read")
    assert not torch.allclose(cut(x), model(x), rtol=1e-4)
    torch.testing.assert_close(cut_to_task(model, "read", 0.)(x), model(x), rtol=1e-4, atol=1e-5)
    with torch.enable_grad():
        cut.train()(x).sum().backward()
    with pytest.raises(ValueError, match="know the tasks read, got 'count'"):
        cut.set_task("count")


@torch.no_grad()
def test_other_image_sizes():
    model, x = make(), images(2, 96, 70)
    expected = model(x)
    model.set_input_size((96, 70))
    assert model.pos_embed.table.shape == (1, 12 * 9, 48)
    torch.testing.assert_close(model(x), expected)
    assert not torch.allclose(model(x.flip(3)), expected)  # positions count


def test_maps_for_dense_tasks():
    backbone = DenseBackbone("test_modular_vit", "segmentation", model_args={"tasks": ["read", "count"]})
    backbone.model.set_task("count")
    assert [tuple(x.shape) for x in backbone(images())] == [(2, 48, 5, 7)]
    assert backbone.reductions == [8]


@pytest.mark.slow
@torch.no_grad()
def test_exported_files_of_a_task(tmp_path):
    """The file of a model that has a task set, and that of one cut to it, which holds its experts alone."""
    model = make(task="read")
    for layer in (module for block in model.blocks for module in (block.attn, block.mlp)):
        layer.router.frequency[1, 1:3] = 0
    sizes = []
    for variant in (model, cut_to_task(model, "read", 0.01)):
        report = export.export_onnx(variant, tmp_path / "model.onnx", (40, 56))
        assert report.difference <= 1e-4
        sizes.append((tmp_path / "model.onnx").stat().st_size)
    assert sizes[1] < 0.7 * sizes[0]
