"""DATR against the authors' numbers, backbone and whole segmenter; Mix Transformers' files of all kinds; panoramas."""
import re

import pytest
import timm
import torch
from torch import nn

from tests import golden
from visionattn.dense import DenseBackbone
from visionattn.heads import Segmenter, segformer_head_weights
from visionattn.layers import NeighborhoodAttention2d
from visionattn.layers.full import attend
from visionattn.models import datr

PARAMETERS = {"datr_m": 3_329_392, "datr_t": 13_161_424, "datr_s": 24_211_288}  # of the authors' code
CLASSIFIER = {"datr_m": 257_000, "datr_t": 513_000, "datr_s": 513_000}


def images(*shape, seed=1):
    return golden.random(seed, shape)


def make(seed=0, **kwargs):
    """A small model in float64 with weights that no zero hides."""
    torch.manual_seed(seed)
    model = timm.create_model("test_datr", dtype=torch.float64, **kwargs).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", PARAMETERS)
def test_number_of_parameters(name):
    for classes, more in ((0, 0), (1000, CLASSIFIER[name])):
        model = timm.create_model(name, device="meta", num_classes=classes)
        assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name] + more


@pytest.mark.parametrize(("name", "counts"), [
    ("datr_m", (3_734_404, 4_653_181, 4_660_102)), ("datr_t", (13_702_628, 14_750_685, 14_759_910)),
    ("datr_s", (24_752_492, 25_800_549, 25_809_774))])
def test_number_of_parameters_of_segmenters(name, counts):
    """The authors' have besides a classifier that nothing uses, of the last map's channels without a bias."""
    for (classes, channels), count in zip(((20, 256), (13, 512), (22, 512)), counts, strict=True):
        with torch.device("meta"):
            segmenter = Segmenter(DenseBackbone(name, "segmentation"), classes, "segformer", channels)
        unused = classes * segmenter.backbone.channels[-1]
        assert sum(p.numel() for p in segmenter.parameters()) + unused == count


@pytest.fixture(scope="module")
def authors_model():
    """The backbone in float64 with the authors' weights, nothing missing and nothing left over."""
    model = timm.create_model("datr_m", num_classes=0, dtype=torch.float64, device="meta")
    weights = datr.checkpoint_filter_fn(golden.official_state_dict(golden.load("datr_m_dense")), model)
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval()


RUNS = [(0, "224, a padded last map"), (1, "256x512"), (2, "250x314, remainders"), (3, "448x480"), (4, "29x29")]


@pytest.mark.parametrize("run", [pytest.param(run, id=title, marks=[pytest.mark.slow] if run == 3 else [])
                                 for run, title in RUNS])
@torch.no_grad()
def test_maps(run, authors_model):
    run = golden.load("datr_m_dense")["runs"][run]
    maps = authors_model.forward_intermediates(
        images(*run["input"]["shape"], seed=run["input"]["seed"]), intermediates_only=True)
    for i, x in enumerate(maps, 1):
        golden.assert_matches(x, run["features"][f"stage{i}"])


@pytest.mark.parametrize("size", [(28, 64), (64, 28)])
def test_images_that_are_too_small(size):
    with pytest.raises(ValueError, match=f"at least 29 x 29 pixels for this model, got {size[0]} x {size[1]}"):
        make()(images(1, 3, *size))
    assert make().forward_intermediates(images(1, 3, 29, 29), intermediates_only=True)[-1].shape == (1, 32, 1, 1)


@pytest.mark.parametrize("run", [pytest.param(0, marks=pytest.mark.slow), 1, 2], ids=["256x512", "224", "201x333"])
@torch.no_grad()
def test_whole_segmenter(run, tmp_path):
    """The authors' file, backbone and head, gives their logits."""
    authors = golden.load("datr_m_seg")
    official = golden.official_state_dict(authors)
    torch.save(official, tmp_path / "datr.pth")
    backbone = DenseBackbone("datr_m", "segmentation", checkpoint_path=str(tmp_path / "datr.pth"),
                             model_args={"dtype": torch.float64})
    segmenter = Segmenter(backbone, 20, "segformer").double().eval()
    segmenter.head.load_state_dict(segformer_head_weights(official))
    run = authors["runs"][run]
    x = images(*run["input"]["shape"], seed=run["input"]["seed"])
    segmenter.mean, segmenter.std = torch.zeros(()).double(), torch.ones(()).double()  # these images are normalised
    golden.assert_matches(segmenter(x), run["logits_summary"])


def test_no_head_in_the_weights():
    with pytest.raises(ValueError, match="no head of SegFormer's"):
        segformer_head_weights({"decode_head.conv_seg.weight": torch.zeros(2, 3, 1, 1)})


# Mix Transformers


class FullAttention(nn.Module):
    """The last stage's of a Mix Transformer."""

    def __init__(self, attn):
        super().__init__()
        dim, self.num_heads, self.proj = attn.proj.in_features, attn.num_heads, attn.proj
        self.q = nn.Linear(dim, dim, dtype=torch.float64)
        self.kv = nn.Linear(dim, 2 * dim, dtype=torch.float64)

    def forward(self, x):
        B, H, W, C = x.shape
        q, k, v = (y.reshape(B, H * W, self.num_heads, -1).transpose(1, 2)
                   for y in (self.q(x), *self.kv(x).chunk(2, dim=-1)))
        return self.proj(attend(q, k, v).transpose(1, 2).reshape(B, H, W, C))


@pytest.fixture(scope="module")
def mit():
    """A small Mix Transformer, of DATR's parts, and its weights by the names of NVlabs' files."""
    model = make(seed=1, kernel_size=13)
    for block in model.stages[3].blocks:
        block.attn = FullAttention(block.attn)
    with torch.no_grad():
        for key, x in model.state_dict().items():
            x.copy_(golden.fill(key, x.shape))
    weights = {}
    for key, x in model.state_dict().items():
        key = key.replace("patch_embed.", "patch_embed1.").replace("head.fc.", "head.")
        key = re.sub(r"^stages\.(\d)\.(downsample|blocks|norm)\.", lambda m: {
            "downsample": "patch_embed", "blocks": "block", "norm": "norm"}[m[2]] + f"{int(m[1]) + 1}.", key)
        weights[key.replace(".mlp.conv.", ".mlp.dwconv.dwconv.")] = x.clone()
    return model, weights


def as_transformers(weights):
    renamed = {}
    for key, x in weights.items():
        for pattern, name in ((r"^patch_embed(\d)\.proj", "patch_embeddings.{}.proj"),
                              (r"^patch_embed(\d)\.norm", "patch_embeddings.{}.layer_norm"),
                              (r"^norm(\d)", "layer_norm.{}"), (r"^block(\d)", "block.{}")):
            key = re.sub(pattern, lambda m, name=name: "segformer.encoder." + name.format(int(m[1]) - 1), key)
        key = re.sub(r"\.norm([12])\.", r".layer_norm_\1.", key).replace(".attn.norm.", ".attn.layer_norm.")
        key = key.replace(".attn.proj.", ".attention.output.dense.").replace(".attn.q.", ".attn.query.")
        key = re.sub(r"\.fc(\d)\.", r".dense\1.", key.replace(".attn.", ".attention.self."))
        key = re.sub("^head", "classifier", key)
        if ".kv." in key:
            renamed[key.replace(".kv.", ".key.")], renamed[key.replace(".kv.", ".value.")] = x.chunk(2)
        else:
            renamed[key] = x
    return renamed


def as_mmsegmentation(weights):
    renamed = {}
    for key, x in weights.items():
        if key.startswith("head.") or ".kv." in key:
            continue
        stage, rest = re.fullmatch(r"[a-z_]+(\d)\.(.*)", key).groups()
        part = {"p": "0.", "b": "1.", "n": "2."}[key[0]]
        if ".attn.q." in key:
            x, rest = torch.cat([x, weights[key.replace(".q.", ".kv.")]]), rest.replace(".q.", ".attn.in_proj_")
        rest = rest.replace(".attn.proj.", ".attn.attn.out_proj.")
        rest = re.sub(r"^proj\.", "projection.", rest)
        for name, number in (("fc1", 0), ("dwconv.dwconv", 1), ("fc2", 4)):
            rest = rest.replace(f".mlp.{name}.", f".ffn.layers.{number}.")
        if ".ffn.layers." in rest and x.ndim == 2:
            x = x[:, :, None, None]
        renamed[f"layers.{int(stage) - 1}.{part}{rest}"] = x
    return renamed


LAYOUTS = {
    "NVlabs": lambda weights: weights,
    "NVlabs' segmenter": lambda weights: {"state_dict": {f"backbone.{key}": x for key, x in weights.items()} | {
        "decode_head.linear_pred.weight": torch.zeros(2, 8, 1, 1), "decode_head.conv_seg.bias": torch.zeros(2)}},
    "transformers": as_transformers,
    "mmsegmentation": as_mmsegmentation,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_mix_transformers_start_it(layout, mit, tmp_path):
    """On a last map of 13 x 13 it is the Mix Transformer itself; on another it is not."""
    source, weights = mit
    weights = {key: x for key, x in weights.items() if "segmenter" not in layout or not key.startswith("head.")}
    torch.save(LAYOUTS[layout](weights), tmp_path / "mit.pth")
    classes = 1000 if layout in ("NVlabs", "transformers") else 0
    model = timm.create_model(
        "test_datr", kernel_size=13, dtype=torch.float64, num_classes=classes, pretrained=True,
        pretrained_cfg_overlay=dict(file=str(tmp_path / "mit.pth"))).eval()
    for size in ((385, 416), (224, 224)):
        x = images(1, 3, *size)
        maps, expected = (net.forward_intermediates(x, intermediates_only=True) for net in (model, source))
        for x, y in zip(maps[:3], expected[:3], strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-12)
        assert torch.allclose(maps[3], expected[3], rtol=0, atol=1e-10) == (size == (385, 416))
    if classes:
        torch.testing.assert_close(model.head.fc.weight, weights["head.weight"])
    assert not any(model.state_dict()[key].any() for key in model.state_dict() if key.endswith(".rpb"))


def test_weights_of_pvt_are_refused(tmp_path):
    """A network of the same kind, whose entries have the same names in part."""
    torch.save(timm.create_model("pvt_v2_b0").state_dict(), tmp_path / "pvt.pth")
    with pytest.raises(RuntimeError, match=r"pvt\.pth is a checkpoint of another model"):
        timm.create_model("datr_m", pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / "pvt.pth")))


# Panoramas


def assert_rolls(function, x, by, expected=True):
    """Whether a map that goes around by some columns gives a result that does."""
    actual, wanted = function(x.roll(by, dims=2)), function(x).roll(by, dims=2)
    assert torch.allclose(actual, wanted, rtol=0, atol=1e-10) == expected


@pytest.mark.parametrize("by", [1, 5, 12])
@pytest.mark.parametrize("size", [(5, 16), (2, 7), (9, 3), (1, 1)])
@pytest.mark.parametrize("dilation", [1, 2])
@torch.no_grad()
def test_the_last_stage_goes_around(size, by, dilation):
    """Exactly, for maps narrower than a window too; without the option it does not."""
    torch.manual_seed(0)
    layer = NeighborhoodAttention2d(8, 2, 5, dilation, wrap=True, dtype=torch.float64)
    layer.rpb.normal_()
    x = images(1, *size, 8)
    assert layer(x).shape == x.shape
    assert_rolls(layer, x, by)
    plain = NeighborhoodAttention2d(8, 2, 5, dilation, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    assert_rolls(plain, x, by, expected=by % size[1] == 0)
    if size == (5, 16) and dilation == 1:  # windows that do not reach an edge are the same
        torch.testing.assert_close(layer(x)[:, :, 2:-2], plain(x)[:, :, 2:-2], rtol=0, atol=1e-12)


@torch.no_grad()
def test_wrap_of_a_model():
    """The windows of the last stage alone: its maps change near the edges, and no weights do."""
    model, plain = make(wrap=True), make()
    assert [m.margin for m in model.modules() if isinstance(m, NeighborhoodAttention2d)] == [1]
    model.load_state_dict(plain.state_dict())
    maps, others = (m.forward_intermediates(images(1, 3, 64, 320), intermediates_only=True) for m in (model, plain))
    for x, y in zip(maps[:3], others[:3], strict=True):
        assert torch.equal(x, y)
    changed = (maps[3] - others[3]).abs().amax(dim=(0, 1, 2))
    assert changed[[0, -1]].min() > 1e-3
    assert changed[2:-2].max() < 1e-12
    assert_rolls(model.stages[3].blocks[0].attn, images(1, 2, 10, 32), 3)
