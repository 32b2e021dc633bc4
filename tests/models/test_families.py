"""What timm and its users expect of every model, for all families of the zoo.

Covers every registered model on the meta device, and those that a family names as ``small`` for real.
"""
import copy
import json
import re
import subprocess
import sys

import pytest
import timm
import torch
from timm.models import save_for_hf
from timm.optim import param_groups_layer_decay
from torch import nn

import visionattn
from tests.models import SAFETENSORS
from visionattn.layers import auxiliary_losses
from visionattn.models import families, family_of

SMALL = {name: dict(args) for family in families().values() for name, args in family.small.items()}
LONG_TO_COMPILE = {"biformer_stl", "biformer_stl_nchw", "nat_small"}
COMPILED = [name for name in SMALL if name not in LONG_TO_COMPILE]

FAMILIES = list(families())
NAMES = [name for family in FAMILIES for name in timm.list_models(module=family)]
PIXELS = 64


def family(name: str) -> str:
    return timm.model_entrypoint(name).__module__.rsplit(".", 1)[-1]


def make(name: str, seed: int = 0, **kwargs) -> nn.Module:
    """A small model of the architecture ``name`` in eval mode, with fresh weights that no zero hides."""
    torch.manual_seed(seed)
    model = timm.create_model(name, **SMALL[name] | kwargs).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def images(batch: int = 1, height: int = PIXELS, width: int = PIXELS, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def as_nchw(model: nn.Module, x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Features in the model's own format as maps, without class tokens; parts before these may hand on maps."""
    if x.ndim == 3:
        return x[:, -size[0] * size[1]:].mT.unflatten(2, size)
    return x if getattr(model, "output_fmt", "NCHW") == "NCHW" else x.permute(0, 3, 1, 2)


def taught_by_its_result(name: str, model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters but those that learn by auxiliary losses alone."""
    pattern = family_of(name).auxiliary_parameters
    return {key: x for key, x in model.named_parameters() if not pattern or not re.search(pattern, key)}


def weight(layer: str | tuple[str, ...]) -> list[str]:
    return [f"{name}.weight" for name in ([layer] if isinstance(layer, str) else layer)]


@pytest.fixture(params=SMALL)
def name(request) -> str:
    return request.param


def test_every_module_has_a_family():
    assert {family(name) for name in SMALL} == set(FAMILIES) >= set(visionattn.models.__all__)


# Registration


def test_timm_keeps_all_its_models():
    script = """
import json, timm
lists = lambda: [timm.list_models(), timm.list_models(pretrained=True), timm.list_modules()]
before = lists()
import visionattn
print(json.dumps([before, lists()]))
"""
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True)
    (before, with_weights, modules), (after, with_weights_after, modules_after) = json.loads(run.stdout)
    assert not set(NAMES) & set(before)
    assert not set(FAMILIES) & set(modules)
    assert [name for name in after if name not in NAMES] == before
    assert [name for name in with_weights_after if name.split(".")[0] not in NAMES] == with_weights
    assert [name for name in modules_after if name not in FAMILIES] == modules


@pytest.mark.parametrize("name", NAMES)
def test_cfg_is_registered(name):
    cfg = timm.get_pretrained_cfg(name)
    assert cfg is not None
    assert cfg.architecture == name
    assert cfg.tag
    assert cfg.license
    assert cfg.origin_url.startswith("https://")
    assert cfg.paper_ids
    assert cfg.url.startswith("https://") or cfg.tag == "untrained"


@pytest.mark.parametrize("name", NAMES)
def test_feature_levels(name):
    """The reductions that dense heads (and segmentation_models_pytorch) count on."""
    model = timm.create_model(name, features_only=True, device="meta")
    reductions, channels = model.feature_info.reduction(), model.feature_info.channels()
    expected = family_of(name).strides(name)
    assert reductions == (expected * len(channels) if len(expected) == 1 else expected)
    assert len(channels) >= 3
    for x, c, r in zip(model(torch.empty(1, 3, 96, 640, device="meta")), channels, reductions, strict=True):
        assert x.shape == (1, c, -(-96 // r), 640 // r)  # rounded up


# Forward and backward


@torch.no_grad()
def test_samples_do_not_see_each_other(name):
    model = make(name)
    a, b = images(seed=1), images(seed=2)
    both = model(torch.cat([a, b]))
    torch.testing.assert_close(both, torch.cat([model(a), model(b)]), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(both[0], both[1])


@pytest.mark.parametrize("size", [(32, 32), (37, 61), (96, 128)], ids=str)
@torch.no_grad()
def test_any_size(name, size):
    model = make(name, features_only=True)
    for x, c, r in zip(
            model(images(2, *size)), model.feature_info.channels(), model.feature_info.reduction(), strict=True):
        assert x.shape[:2] == (2, c)
        assert abs(x.shape[2] - size[0] / r) < 1
        assert abs(x.shape[3] - size[1] / r) < 1
        assert x.isfinite().all()


def test_every_parameter_gets_a_gradient(name):
    model = make(name, num_classes=42).train()
    logits = model(images(2))
    assert logits.shape == (2, 42)
    (logits.square().sum() + sum(auxiliary_losses(model).values())).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), key


def test_gradient_checkpointing_changes_nothing(name):
    plain, checkpointed = make(name), make(name)
    checkpointed.set_grad_checkpointing()
    outputs = [model(images()) for model in (plain, checkpointed)]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    for out in outputs:
        out.square().sum().backward()
    for (key, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4, msg=key)
    maps, expected = (m.forward_intermediates(images(), intermediates_only=True) for m in (checkpointed, plain))
    for a, b in zip(maps, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    checkpointed.set_grad_checkpointing(False)
    assert torch.equal(checkpointed(images()), plain(images()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@torch.no_grad()
def test_dtypes(name, dtype):
    expected = make(name)(images())
    out = make(name).to(dtype)(images().to(dtype))
    assert out.dtype == dtype
    tolerance = 1e-4 if dtype == torch.float64 else 0.1
    assert (out.float() - expected).norm() < tolerance * expected.norm()
    born = timm.create_model(name, **SMALL[name], dtype=dtype)
    born.reset_classifier(3)
    assert {parameter.dtype for parameter in born.parameters()} == {dtype}


@torch.no_grad()
def test_autocast(name):
    model = make(name)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(images())
    expected = model(images())
    assert (out.float() - expected).norm() < 0.1 * expected.norm()


def test_deepcopy(name):
    model = make(name)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(images()), model(images()))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not torch.equal(twin(images()), model(images()))


# Features


@torch.no_grad()
def test_intermediates(name):
    """Their widths, that the last is the final features' source, one at a time, early stop and the norm option."""
    model, x = make(name), images(2)
    final, maps = model.forward_intermediates(x)
    assert torch.equal(final, model.forward_features(x))
    assert [m.shape[1] for m in maps] == [info["num_chs"] for info in model.feature_info]
    only = model.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)
    assert len(only) == 1
    assert torch.equal(only[0], maps[1])
    last, = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)
    assert torch.equal(last, as_nchw(model, final, last.shape[2:]))
    if getattr(model, "output_fmt", "NCHW") == "NHWC":
        for a, b in zip(model.forward_intermediates(x, output_fmt="NHWC", intermediates_only=True), maps, strict=True):
            assert torch.equal(a.permute(0, 3, 1, 2), b)


def test_pruned_features(name):
    """Of the first two levels: the same maps, and nothing is left that they do not need."""
    torch.manual_seed(0)
    model, x = make(name), images(2)
    expected = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
    pruned = timm.create_model(name, **SMALL[name], features_only=True, out_indices=(0, 1)).eval()
    weights = {key: value for key, value in model.state_dict().items() if key in pruned.model.state_dict()}
    pruned.model.load_state_dict(weights, strict=True)
    maps = pruned(x)
    for a, b in zip(maps, expected, strict=True):
        assert torch.equal(a, b)
    sum(m.square().sum() for m in maps).backward()
    for key, parameter in taught_by_its_result(name, pruned).items():
        assert parameter.grad is not None, key
    kept = copy.deepcopy(model)
    assert kept.prune_intermediate_layers([0, 1], prune_norm=True, prune_head=True) == [0, 1]
    assert kept.num_features == model.feature_info[1]["num_chs"]
    assert kept.num_classes == 0


@torch.no_grad()
def test_features_through_hooks(name):
    """timm's other way to features, by module name, gives the same maps."""
    model, x = make(name), images(2)
    expected = model.forward_intermediates(x, intermediates_only=True)
    taken = {}
    for info in model.feature_info:
        model.get_submodule(info["module"]).register_forward_hook(
            lambda module, args, out, key=info["module"]: taken.__setitem__(key, out))
    model(x)
    for info, b in zip(model.feature_info, expected, strict=True):
        a = taken[info["module"]]
        assert torch.equal(as_nchw(model, a, b.shape[2:]), b)


# Weights


@torch.no_grad()
def test_weights_for_another_task(name):
    """Three channels to one by summing, the classifier left out, everything else as it was; also for features."""
    source = make(name)
    overlay = dict(state_dict=source.state_dict())
    model = timm.create_model(
        name, **SMALL[name], pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1, num_classes=7)
    stem = weight(model.pretrained_cfg["first_conv"])
    fitted = family_of(name).checkpoint_filter_fn(source.state_dict(), model)  # what else depends on the channels
    for key, value in model.state_dict().items():
        expected = source.state_dict()[key]
        if key in stem:
            torch.testing.assert_close(value, expected.sum(1, keepdim=True))
        elif not key.startswith(model.pretrained_cfg["classifier"]):
            assert torch.equal(value, expected if value.shape == expected.shape else fitted[key]), key
    assert model(images(2)[:, :1]).shape == (2, 7)
    features = timm.create_model(
        name, **SMALL[name], pretrained=True, pretrained_cfg_overlay=overlay, features_only=True).eval()
    for a, b in zip(features(images()), source.forward_intermediates(
            images(), indices=list(features.out_indices), intermediates_only=True), strict=True):
        assert torch.equal(a, b)


@torch.no_grad()
def test_built_on_meta_then_loaded(name):
    source = make(name)
    model = timm.create_model(name, **SMALL[name], device="meta").eval()
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    model.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(model(images()), source(images()))


@torch.no_grad()
def test_under_a_meta_default_device(name):
    """A constructor that reads a value of a tensor on the default device fails here."""
    with torch.device("meta"):
        model = timm.create_model(name, **SMALL[name])
    assert all(parameter.is_meta for parameter in model.parameters())


@torch.no_grad()
def test_round_trip_through_a_folder(name, tmp_path):
    model = make(name)
    save_for_hf(model, str(tmp_path), model_args=SMALL[name], safe_serialization=SAFETENSORS)
    assert bool(list(tmp_path.glob("*.safetensors"))) == SAFETENSORS
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(images()), model(images()))


def test_layer_decay(name):
    model = make(name)
    groups = param_groups_layer_decay(
        model, weight_decay=0.05, layer_decay=0.5, no_weight_decay_list=model.no_weight_decay())
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(scale) == len(list(model.parameters())) == sum(len(group["params"]) for group in groups)
    stem, *_ = weight(model.pretrained_cfg["first_conv"])
    scales = {key: scale[id(p)] for key, p in model.named_parameters()}
    assert scales[stem] == min(scales.values())
    assert scales[model.pretrained_cfg["classifier"] + ".weight"] == max(scales.values()) == 1
    assert len(set(scales.values())) >= 4
    last_blocks = [scales[key] for key in scales if key.startswith(model.feature_info[-1]["module"])]
    assert min(last_blocks) > scales[stem]
    for key, p in model.named_parameters():
        assert (decay[id(p)] == 0) == (
            p.ndim <= 1 or key in model.no_weight_decay()), key


# Compiling, exporting


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_without_graph_breaks(name):
    torch.compiler.reset()
    model = make(name)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
    out = compiled(images(2))
    torch.testing.assert_close(out, model(images(2)), rtol=1e-4, atol=1e-5)
    out.square().sum().backward()
    assert all(parameter.grad is not None for parameter in taught_by_its_result(name, compiled).values())


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[] if name in ("test_agent_pvt", "test_dinat", "test_fan") else pytest.mark.slow)
    for name in COMPILED])
@torch.no_grad()
def test_exports_with_a_free_batch_size(name):
    model = make(name)
    program = torch.export.export(model, (images(2),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for batch in (1, 3):
        torch.testing.assert_close(program.module()(images(batch)), model(images(batch)), rtol=1e-4, atol=1e-5)
