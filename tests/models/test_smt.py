"""SMT: the authors' weights give the authors' numbers (what every family is asked for is in test_families.py)."""
import pytest
import timm
import torch
from torch import nn

from tests import golden
from visionattn.layers import FullAttention
from visionattn.models import smt

VARIANTS = {
    "smt_t": 11_506_536,
    "smt_s": 22_550_952,
    "smt_b": 32_037_352,
    "smt_l": 80_620_264,
    "smt_l_384": 80_620_264,
    "smt_l_22k": 80_620_264 + (21841 - 1000) * 769,
}


def official(name: str, state_dict: dict, **options) -> nn.Module:
    """A model with the authors' weights, loaded as a user loads them."""
    overlay = dict(state_dict={"model": state_dict})
    return timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, dtype=torch.float64, **options).eval()


@torch.no_grad()
def test_golden():
    case = golden.load("smt_t")
    model = official("smt_t", golden.official_state_dict(case))
    assert sum(p.numel() for p in model.parameters()) == case["num_params"]
    for run in case["runs"]:
        last, features = model.forward_intermediates(golden.random(run["input"]["seed"], run["input"]["shape"]))
        for feature, summary in zip(features, run["features"].values(), strict=True):
            golden.assert_matches(feature, summary)
        logits = model.forward_head(last)
        golden.assert_matches(logits, run["logits_summary"])
        for row, expected in zip(logits, run.get("logits", ()), strict=False):
            torch.testing.assert_close(row, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)


MODULES = {
    "sam": lambda config: smt.ScaleAwareModulation(config["dim"], config["expand_ratio"]),
    "msa": lambda config: FullAttention(
        config["dim"], config["sa_num_heads"], lepe_of="value", lepe_kernel=3, qkv_bias=True),
    "mlp": lambda config: smt.ConvMlp(config["dim"], config["hidden"]),
}


@pytest.mark.parametrize("case", golden.load("smt_ops")["cases"], ids=lambda case: case["name"])
@torch.no_grad()
def test_golden_modules(case):
    """Each part of a block alone, with weights under the authors' names."""
    kind, config = case["name"].partition("_")[0], case["config"]
    part = "mlp" if kind == "mlp" else "attn"
    host = timm.create_model("test_smt", device="meta")  # for the filter, which is that of whole models
    weights = {f"block3.0.{part}.{key}": golden.fill(key, shape) for key, shape in case["params"]}
    module = MODULES[kind](config).double().eval()
    renamed = {key.removeprefix(f"stages.2.blocks.0.{part}."): x
               for key, x in smt.checkpoint_filter_fn(weights, host).items()}
    assert not module.load_state_dict(renamed, strict=False).unexpected_keys
    assert set(module.state_dict()) - set(renamed) <= {"bn.num_batches_tracked"}
    batch, tokens, dim = case["x"]["shape"]
    x = golden.random(case["x"]["seed"], (batch, tokens, dim)).unflatten(1, (config["H"], config["W"]))
    expected = torch.tensor(case["out"], dtype=torch.float64)
    torch.testing.assert_close(module(x).flatten(1, 2), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "params"), VARIANTS.items())
def test_parameter_count(name, params):
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == params


def test_evolutionary_hybrid():
    """Modulation, then modulation and attention in turn, then attention of all tokens."""
    for name, heads in (("smt_s", (8, 16)), ("smt_l", (8, 16)), ("test_smt", (2, 4))):
        stages = timm.create_model(name, device="meta").stages
        kinds = [[getattr(block.attn, "num_heads", None) for block in stage.blocks] for stage in stages]
        assert set(kinds[0] + kinds[1]) == {None}
        assert kinds[2] == [heads[0] if j % 2 else None for j in range(len(kinds[2]))]
        assert set(kinds[3]) == {heads[1]}


def test_epsilons():
    """1e-6 in blocks and after stages, 1e-5 after convolutions (not to be seen in goldens of small weights)."""
    for name, module in timm.create_model("smt_l", device="meta").named_modules():
        if isinstance(module, nn.LayerNorm):
            assert module.eps == (1e-5 if "patch_embed" in name or "downsample" in name else 1e-6), name
        if isinstance(module, nn.BatchNorm2d):
            assert module.eps == 1e-5


def test_initial_weights():
    """Convolutions by the number of their outputs, factors of the branches where the authors have them."""
    torch.manual_seed(0)
    model = timm.create_model("smt_t")
    conv = model.stages[0].blocks[0].attn.convs[3].weight
    assert conv.std().item() == pytest.approx((2 / 81) ** 0.5, rel=0.1)
    assert model.stages[1].downsample.proj.weight.std().item() == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.1)
    assert model.stages[1].blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.02 * 0.88, rel=0.15)
    assert not any("gamma" in name for name, _ in model.named_parameters())
    large = dict(timm.create_model("smt_l", depths=(1, 1, 2, 1)).named_parameters())
    assert sum(name.endswith(".gamma") and bool((x == 1e-4).all()) for name, x in large.items()) == 10


def _authors(model: nn.Module, dense: bool = False) -> dict[str, torch.Tensor]:
    """The weights of a model of ours under the authors' names, the inverse of the filter."""
    names = {"patch_embed.conv.conv1": "patch_embed1.conv.0", "patch_embed.conv.bn": "patch_embed1.conv.1",
             "patch_embed.conv.conv2": "patch_embed1.conv.3", "patch_embed.norm": "patch_embed1.norm"}
    found = {}
    for key, x in model.state_dict().items():
        parts = key.split(".")
        prefix, leaf = key.rpartition(".")[::2]
        if prefix in names:
            key = f"{names[prefix]}.{leaf}"
        elif parts[0] == "stages":
            stage, rest = int(parts[1]) + 1, parts[2:]
            if rest[0] == "blocks":
                part = ".".join(rest[2:])
                part = part.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2")
                part = part.replace("mlp.conv.", "mlp.dwconv.dwconv.")
                part = part.replace("attn.lepe.", "attn.dw_conv." if dense else "attn.local_conv.")
                for i in range(4):
                    part = part.replace(f"attn.convs.{i}.", f"attn.local_conv_{i + 1}.")
                key = f"block{stage}.{rest[1]}.{part}"
            else:
                key = f"{'patch_embed' if rest[0] == 'downsample' else 'norm'}{stage}." + ".".join(rest[rest[0] in (
                    "downsample", "norm"):])
        else:
            key = key.replace("head.fc.", "head.")
        if ".attn.qkv." in key:
            dim = x.shape[0] // 3
            found |= {key.replace("qkv", "q"): x[:dim], key.replace("qkv", "kv"): x[dim:]}
        else:
            found[key] = x
    return found


@pytest.mark.parametrize("dense", [False, True])
@torch.no_grad()
def test_names_of_the_classifier_and_of_the_dense_backbones(dense):
    source = timm.create_model("test_smt", dtype=torch.float64).eval()
    for x in source.parameters():
        x.add_(0.1 * torch.randn_like(x))
    weights = _authors(source, dense)
    assert any(".dw_conv." in key for key in weights) == dense
    x = torch.randn(1, 3, 50, 70, dtype=torch.float64)
    assert torch.equal(official("test_smt", weights)(x), source(x))
    assert torch.equal(official("test_smt", source.state_dict())(x), source(x))  # our own names stay


@torch.no_grad()
def test_checkpoint_without_factors_of_the_branches():
    """That of a dense backbone of SMT-L, which has none: the model that has them computes the same."""
    plain = timm.create_model("test_smt", layer_scale=0, dtype=torch.float64).eval()
    weights = _authors(plain, dense=True)
    assert not any("gamma" in key for key in weights)
    x = torch.randn(1, 3, 32, 48, dtype=torch.float64)
    assert torch.equal(official("test_smt", weights, layer_scale=1e-4)(x), plain(x))


def test_checkpoint_of_other_depths():
    """What was published about SMT-S contradicts itself; should the file have other depths, one line says what to do."""
    weights = _authors(timm.create_model("test_smt", depths=(1, 1, 4, 1)))
    with pytest.raises(ValueError, match=r"has \(1, 1, 4, 1\) blocks, the model \(1, 1, 2, 1\): .* depths=\(1, 1, 4, 1\)$"):
        official("test_smt", weights)
    official("test_smt", weights, depths=(1, 1, 4, 1))


def test_bad_options():
    with pytest.raises(ValueError, match="dim must be a multiple of 4, got 10"):
        timm.create_model("test_smt", embed_dims=(10, 16, 24, 32))
    with pytest.raises(ValueError, match="num_heads 5 must divide dim 24"):
        timm.create_model("test_smt", num_heads=(5, 4))
    with pytest.raises(ValueError, match="num_heads must have one entry for each of the last two stages, got"):
        timm.create_model("test_smt", num_heads=(2, 4, 8, 16))
    with pytest.raises(ValueError, match="mlp_ratios must have one entry per stage, 4, got"):
        timm.create_model("test_smt", mlp_ratios=(2., 2.))
