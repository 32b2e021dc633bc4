"""DenseBackbone: the authors' dense numbers, where weights may come from, what is frozen, and any model at any size."""
import pytest
import timm
import torch
from torch import nn

from tests import golden
from tests.models.test_families import NAMES, SMALL
from visionattn.dense import DenseBackbone
from visionattn.heads import FeaturePyramid
from visionattn.layers import auxiliary_losses
from visionattn.models import family_of

GOLDEN = {  # numbers of the authors' dense backbones
    "biformer_tiny_seg": ("biformer_tiny", "segmentation"),
    "dinat_mini_coco_backbone": ("dinat_mini", "detection"),
    "agent_swin_t_det": ("agent_swin_t", "detection"),
    "agent_pvt_t_det": ("agent_pvt_t", "detection"),
    "efficientvit_m4_det": ("efficientvit_cga_m4", "detection"),
    "smt_s_dense_det": ("smt_s", "detection"),
    "fcaformer_l1_dense": ("fcaformer_l1", "segmentation"),
}
AMPLIFIED = {"efficientvit_m4_det": 1e-7}  # rounding errors grow with these weights
DILATIONS = {"dinat_s_tiny": dict(dilations=((1, 4), (1, 2), (1, 2), (1, 1)))}  # for the few blocks of the small model
SWIN = "swin_tiny_patch4_window7_224"
TIMM = {SWIN: dict(embed_dim=24, depths=(2, 2, 2, 2)), "resnet10t": {}, "test_convnext": {}, "test_vit": {}}


def small(name, task="detection", **kwargs):
    torch.manual_seed(0)
    model_args = (SMALL | TIMM)[name] | DILATIONS.get(name, {}) | kwargs.pop("model_args", {})
    return DenseBackbone(name, task, model_args=model_args, **kwargs)


def save(state_dict, path):
    torch.save({"state_dict": state_dict, "meta": {"epoch": 12}}, path)
    return str(path)


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


# Runs that are left out: a size that the authors' code takes with its position table in the wrong geometry, and the
# largest images, which test_nat.py has.
LEFT_OUT = [("agent_pvt_t_det", [1, 3, 256, 196]), ("dinat_mini_coco_backbone", [1, 3, 800, 832])]


@pytest.mark.parametrize(("case", "whole"), [*((case, False) for case in GOLDEN), ("biformer_tiny_seg", True)])
@torch.no_grad()
def test_golden(case, whole, tmp_path):
    """With the authors' own files: of the backbone, or of the whole detector around it."""
    name, task = GOLDEN[case]
    weights = golden.official_state_dict(golden.load(case))
    if whole:
        weights = {f"backbone.{key}": x for key, x in weights.items()} | {"neck.lateral.weight": torch.zeros(1)}
    path = save(weights, tmp_path / "weights.pth")
    model = DenseBackbone(name, task, checkpoint_path=path, model_args={"dtype": torch.float64}).eval()
    for run in golden.load(case)["runs"][:1 if whole else None]:
        shape = run["input"]["shape"]
        if (case, shape) in LEFT_OUT:
            continue
        maps = model(golden.random(run["input"]["seed"], shape))
        if "forward_error" in run:  # sizes that the authors' code refuses
            assert all(x.isfinite().all() for x in maps)
            continue
        stages = [summary for tap, summary in run["features"].items() if tap.startswith("stage")]
        for x, summary in zip(maps, stages, strict=True):
            golden.assert_matches(x, summary, AMPLIFIED.get(case, 1e-9))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_every_registered_model(name, task):
    with torch.device("meta"):
        backbone = DenseBackbone(name, task)
    expected = sorted(set(family_of(name).strides(name)))
    if task == "detection" and expected == [4, 8, 16]:  # FAN gets a coarser map
        expected.append(32)
    assert backbone.reductions == expected
    assert len(backbone.channels) == len(expected)


@pytest.mark.parametrize("name", [*SMALL, *TIMM])
def test_trains_at_any_size(name):
    """Every parameter that is left takes part, so that distributed training needs no search for unused ones."""
    backbone = small(name)
    backbone.model.set_grad_checkpointing()
    maps = backbone(images(2, 3, 75, 109))
    for x, channels, reduction in zip(maps, backbone.channels, backbone.reductions, strict=True):
        assert x.shape[:2] == (2, channels)
        assert abs(x.shape[2] - 75 / reduction) < 1
        assert abs(x.shape[3] - 109 / reduction) < 1
    (sum(x.square().sum() for x in maps) + sum(auxiliary_losses(backbone).values())).backward()
    for key, parameter in backbone.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


def test_settings_of_the_task():
    def n_win(task, **kwargs):
        return DenseBackbone("test_biformer", task, **kwargs).model.stages[0].blocks[0].attn.n_win

    def dilations(name, task):
        with torch.device("meta"):
            model = DenseBackbone(name, task).model
        return [tuple(block.attn.dilation for block in stage.blocks) for stage in model.stages]

    assert [n_win("detection"), n_win("segmentation"), n_win("detection", model_args={"n_win": 5})] == [16, 8, 5]
    third = (1, 3, 1, 5, 1, 7)
    assert dilations("dinat_mini", "detection") == [(1, 28, 1), (1, 7, 1, 14), third, (1, 3, 1, 3, 1)]
    assert dilations("dinat_large", "detection")[2] == third * 3
    assert dilations("dinat_tiny", "segmentation") == [
        (1, 16, 1), (1, 4, 1, 8), (1, 2, 1, 3, 1, 4) * 3, (1, 2, 1, 2, 1)]
    assert dilations("dinat_large", "segmentation") == [
        (1, 20, 1), (1, 5, 1, 10), (1, 2, 1, 3, 1, 4, 1, 5, 1, 2, 1, 3, 1, 4, 1, 5, 1, 5), (1, 2, 1, 2, 1)]
    assert dilations("dinat_large_384_11x11", "segmentation") == [
        (1, 14, 1), (1, 4, 1, 7), (1, 2, 1, 3, 1, 2, 1, 3, 1, 2, 1, 3, 1, 2, 1, 3, 1, 3), (1,) * 5]
    assert dilations("dinat_s_small", "detection") == [(1, 28), (1, 14), third * 3, (1, 3)]
    assert dilations("dinat_s_large", "segmentation")[0] == (1, 20)
    assert dilations("nat_mini", "detection") == [(1,) * 3, (1,) * 4, (1,) * 6, (1,) * 5]


@torch.no_grad()
def test_classification_weights(tmp_path):
    """They give the classifier's maps, normed by level norms that have learnt nothing yet."""
    source = timm.create_model("test_biformer", num_classes=7, n_win=16).eval()
    path = save(source.state_dict(), tmp_path / "weights.pth")
    backbone = small("test_biformer", checkpoint_path=path).eval()
    for x, y in zip(backbone(images(1, 3, 70, 90)), source.forward_intermediates(
            images(1, 3, 70, 90), intermediates_only=True), strict=True):
        torch.testing.assert_close(x, nn.functional.layer_norm(y.movedim(1, -1), y.shape[1:2], eps=1e-6).movedim(-1, 1))


@torch.no_grad()
def test_own_weights_on_other_levels(tmp_path):
    path = save(small("test_dinat").state_dict(), tmp_path / "weights.pth")
    source = small("test_dinat", checkpoint_path=path).eval()
    for indices in ([1, 3], [0, 1]):
        backbone = small("test_dinat", checkpoint_path=path, out_indices=indices).eval()
        for level, x in zip(indices, backbone(images(1, 3, 64, 64)), strict=True):
            torch.testing.assert_close(x, source(images(1, 3, 64, 64))[level])


@pytest.mark.parametrize(("name", "source"), [("test_biformer", "test_dinat"), ("resnet10t", "test_biformer")])
def test_weights_of_another_model(name, source, tmp_path):
    path = save(timm.create_model(source).state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"weights\.pth is not a checkpoint of .* missing .* unexpected") as caught:
        DenseBackbone(name, "detection", checkpoint_path=path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["test_biformer", *TIMM])
def test_frozen_stages(name):
    model_args = {"drop_path_rate": 0.5}
    backbone = small(name, frozen_stages=1, model_args=model_args).train()
    free = small(name, model_args=model_args)
    parameters = dict(free.named_parameters())
    gradients = torch.autograd.grad(free(images(1, 3, 64, 64))[0].sum(), parameters.values(), allow_unused=True)
    first = {key for key, gradient in zip(parameters, gradients, strict=True) if gradient is not None}
    trained = {key for key, p in backbone.named_parameters() if p.requires_grad}
    own_norm = {key for key in first if key.startswith("norms.")}
    assert trained == set(parameters) - (first - own_norm)
    if len(backbone.channels) > 1:
        torch.testing.assert_close(backbone(images(1, 3, 64, 64))[0], backbone(images(1, 3, 64, 64))[0])
        assert any(module.training for module in backbone.model.modules() if not list(module.children()))
    assert not any(module.training for module in backbone.eval().modules())


def test_frozen_norms():
    plain, frozen = small("test_biformer").train(), small("test_biformer", frozen_norms=True).train()
    for backbone, kept in ((plain, False), (frozen, True)):
        before = backbone.model.stem.norm1.running_mean.clone()
        backbone(images(2, 3, 64, 64))
        assert torch.equal(backbone.model.stem.norm1.running_mean, before) == kept
        assert all(parameter.requires_grad for parameter in backbone.parameters())


def test_kept_levels():
    backbone = small("test_dinat")
    expected = backbone(images(1, 3, 64, 64))
    backbone.keep([8, 16, 128])
    assert (backbone.channels, backbone.reductions, list(backbone.norms)) == ([32, 64], [8, 16], ["1", "2"])
    maps = backbone(images(1, 3, 64, 64))
    for x, y in zip(maps, expected[1:3], strict=True):
        assert torch.equal(x, y)
    sum(x.sum() for x in maps).backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())


@pytest.mark.parametrize(("kwargs", "message"), [
    (dict(name="test_biforme"), "no model 'test_biforme'; similar names: .*test_biformer"),
    (dict(task="classification"), "task must be detection or segmentation"),
    (dict(out_indices=[0, 4]), "has levels 0 to 3"),
    (dict(frozen_stages=5), "has 4 stages"),
    (dict(model_args={"depth": 1}), "test_biformer does not take these model_args: .*depth"),
    (dict(checkpoint_path="nowhere.pth"), "nowhere.pth does not exist"),
    (dict(checkpoint_path="x", pretrained=True), "choose one"),
])
def test_bad_arguments(kwargs, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        DenseBackbone(**dict(name="test_biformer", task="detection") | kwargs)


def test_a_model_of_one_size_says_so():
    backbone = DenseBackbone("maxvit_rmlp_pico_rw_256", "detection").eval()
    with pytest.raises(ValueError, match=r"cannot take images of 100 x 140 .*: it is built for one size"):
        backbone(images(1, 3, 100, 140))


@pytest.mark.parametrize(("reductions", "strides"), [
    ([4, 8, 16, 32], [4, 8, 16, 32, 64]), ([8, 16, 32], [8, 16, 32, 64, 128]), ([16, 32, 64], [8, 16, 32, 64, 128]),
    ([16, 32, 64], [4, 8, 16, 32, 64]), ([16], [8, 16, 32])], ids=str)
def test_pyramid(reductions, strides):
    channels = [8 * (i + 1) for i in range(len(reductions))]
    pyramid = FeaturePyramid(channels, reductions, strides, 32)
    maps = [images(2, c, 256 // r, 384 // r).requires_grad_() for c, r in zip(channels, reductions, strict=True)]
    levels = pyramid(maps)
    assert list(levels) == [str(i) for i in range(len(strides))]
    for x, stride in zip(levels.values(), strides, strict=True):
        assert x.shape == (2, 32, 256 // stride, 384 // stride)
    sum(x.square().sum() for x in levels.values()).backward()
    assert all(parameter.grad.any() for parameter in pyramid.parameters())
    assert all(x.grad.any() for x in maps)


def test_pyramid_of_torchvision():
    """Without finer levels it is torchvision's, entry by entry."""
    from torchvision.ops import FeaturePyramidNetwork
    ours, theirs = FeaturePyramid([4, 8], [8, 16], [8, 16], 32), FeaturePyramidNetwork([4, 8], 32)
    theirs.load_state_dict(ours.state_dict())
    maps = [images(1, 4, 9, 13), images(1, 8, 5, 7)]
    for x, y in zip(ours(maps).values(), theirs(dict(enumerate(maps))).values(), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("strides", [[4, 8, 32], [8, 16, 32], [4, 8, 16, 32, 64, 128, 256]], ids=str)
def test_impossible_pyramids(strides):
    with pytest.raises(ValueError, match="cannot have levels of stride"):
        FeaturePyramid([8, 8, 8, 8], [4, 8, 16, 32], strides, 32)
