"""The Agent Attention families: the authors' weights give the authors' numbers, at any size and in dense tasks.

What every family is asked for is in test_families.py.
"""
import importlib

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests import golden
from visionattn.layers import AgentAttention
from visionattn.models import agent_deit, agent_pvt, agent_swin

# Parameters, and 10^9 multiplications with additions counted as one at the model's own image size.
VARIANTS = {
    "agent_deit_t": (6_015_640, 1.168), "agent_deit_s": (22_647_112, 4.427), "agent_deit_s_448": (23_070_472, 17.642),
    "agent_deit_b": (87_204_904, 17.527),
    "agent_pvt_t": (11_570_352, 1.986), "agent_pvt_s": (20_635_066, 3.955), "agent_pvt_m": (35_921_746, 6.999),
    "agent_pvt_m_256": (36_083_682, 9.142), "agent_pvt_l": (48_738_180, 10.339),
    "agent_swin_t": (28_902_964, 4.499), "agent_swin_s": (49_666_684, 8.701), "agent_swin_s_288": (49_707_964, 14.535),
    "agent_swin_b": (88_095_096, 15.400), "agent_swin_b_384": (88_305_016, 46.207),
    "agent_cswin_t": (20_458_672, 4.292), "agent_cswin_s": (32_814_100, 6.744), "agent_cswin_b": (73_249_696, 14.870),
    "agent_cswin_b_384": (73_328_416, 46.177),
}
HIERARCHICAL = ["test_agent_pvt", "test_agent_swin", "test_agent_cswin"]
SMALL = ["test_agent_deit", *HIERARCHICAL]


def official(name, **options):
    """A model with the weights of a golden file, loaded as a user loads them."""
    overlay = dict(state_dict={"model": golden.official_state_dict(golden.load(name))})
    return timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, dtype=torch.float64, **options).eval()


def random(name, **options):
    torch.manual_seed(0)
    model = timm.create_model(name, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", ["agent_deit_t", "agent_pvt_t", "agent_swin_t", "agent_cswin_t"])
@torch.no_grad()
def test_golden(name):
    model = official(name)
    taken = {}
    if name != "agent_deit_t":
        model.patch_embed.register_forward_hook(lambda module, args, out: taken.__setitem__("stem", out))
        model.stages[0].blocks[0].register_forward_hook(lambda module, args, out: taken.__setitem__("block1_0", out))
    for run in golden.load(name)["runs"]:
        last, maps = model.forward_intermediates(golden.random(run["input"]["seed"], run["input"]["shape"]))
        logits = model.forward_head(last)
        golden.assert_matches(logits, run["logits_summary"])
        torch.testing.assert_close(logits, torch.tensor(run["logits"], dtype=torch.float64), rtol=1e-9, atol=1e-9)
        features = {f"stage{i + 1}": x for i, x in enumerate(maps)} | {"norm": last.permute(0, 3, 1, 2)} | {
            key: x.permute(0, 3, 1, 2) for key, x in taken.items()} if taken else {"norm": last}
        features["patch_embed"] = features.get("stem")
        checked = [key for key, summary in run["features"].items() if not key.startswith("block") or taken]
        assert len(checked) >= (1 if name == "agent_deit_t" else 5)
        for key in checked:
            golden.assert_matches(features[key], run["features"][key])


@torch.no_grad()
def test_golden_blocks_of_deit():
    model, taken = official("agent_deit_t"), {}
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda module, args, out, i=i: taken.__setitem__(f"block{i}", out))
    run, = golden.load("agent_deit_t")["runs"]
    model(golden.random(run["input"]["seed"], run["input"]["shape"]))
    for key in ("block0", "block3", "block4", "block11"):
        golden.assert_matches(taken[key], run["features"][key])


@pytest.mark.parametrize(("family", "name"), [(agent_pvt, "agent_pvt_t"), (agent_swin, "agent_swin_t")])
@torch.no_grad()
def test_golden_dense_backbone(family, name):
    """The dense backbones are the trunk with other grids of agents; Swin's have a norm on each map."""
    case = golden.load(f"{name}_det")
    weights = golden.official_state_dict(case)
    model = timm.create_model(
        name, features_only=True, **family.dense_args(name, "detection"), dtype=torch.float64).eval()
    result = model.model.load_state_dict(family.checkpoint_filter_fn(weights, model.model), strict=False)
    assert not result.missing_keys
    assert not result.unexpected_keys
    for run in case["runs"]:
        shape = run["input"]["shape"]
        x = golden.random(run["input"]["seed"], shape)
        if shape[2:] == [256, 196]:  # the authors take the 56 x 56 position table for 64 x 49, as many but elsewhere
            maps = model(x)
            assert (maps[0].flatten()[run["features"]["stage1"]["index"]] - torch.tensor(
                run["features"]["stage1"]["value"], dtype=torch.float64)).abs().max() > 0.1
            model.model.patch_embed.pos_embed.size = (64, 49)
        maps = model(x)
        if "features_error" in run:  # sizes that the authors' code refuses
            assert all(m.isfinite().all() for m in maps)
            continue
        for i, (m, summary) in enumerate(zip(maps, run["features"].values(), strict=True)):
            if name == "agent_swin_t":
                norm = [weights[f"norm{i}.{leaf}"] for leaf in ("weight", "bias")]
                m = F.layer_norm(m.permute(0, 2, 3, 1), m.shape[1:2], *norm).permute(0, 3, 1, 2)
            golden.assert_matches(m, summary)
        if shape[2:] == [256, 196]:
            model.model.patch_embed.pos_embed.size = (56, 56)


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_parameters_and_flops(name):
    parameters, gmacs = VARIANTS[name]
    model = timm.create_model(name, device="meta").eval()
    assert sum(p.numel() for p in model.parameters()) == parameters
    # PyTorch also counts the products by which we pool unequal cells and interpolate biases, the authors' tool not.
    ours = 0

    def add(module, args, out):
        nonlocal ours
        height, width = args[1] if len(args) > 1 else out.shape[1:3]
        rows, columns = module.agent_grid
        unequal = height % rows or width % columns  # cells, which two products pool
        pooling = (height * columns * width + rows * height * columns) * out.shape[-1] if unequal else 0
        composing = 2 * module.num_heads * rows * columns * (7 * 7 * width + 7 * height * width)
        ours += pooling + composing

    for module in model.modules():
        if isinstance(module, AgentAttention):
            module.register_forward_hook(add)
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, *model.pretrained_cfg["input_size"], device="meta"))
    assert (counter.get_total_flops() / 2 - ours) / 1e9 == pytest.approx(gmacs, abs=0.0006)
    assert ours / 1e9 < 0.03 * gmacs


def test_windows_and_stripes_of_each_variant():
    """What no weight tells: sizes, shifts and grids."""
    for name, window in (("agent_swin_t", 7), ("agent_swin_s_288", 9), ("agent_swin_b_384", 12)):
        blocks = [block.attn for stage in timm.create_model(name, device="meta").stages for block in stage.blocks]
        windows = [attn for attn in blocks if isinstance(attn, agent_swin.WindowAttention)]
        assert {attn.window_size for attn in windows} == {window}
        assert [attn.shift for attn in windows] == [i % 2 * (window // 2) for i in range(len(windows))]
    for name, width in (("agent_cswin_t", 7), ("agent_cswin_b_384", 12)):
        model = timm.create_model(name, device="meta")
        assert {block.attn.stripe_width for block in model.stages[2].blocks} == {width}
        assert {block.attn.stripe_width for block in model.stages[3].blocks} == {None}
    kinds = [type(block.attn) for block in timm.create_model("agent_deit_b", device="meta").blocks]
    assert kinds == [kinds[0]] * 4 + [agent_deit.FullAttention] * 8
    for name in ("agent_pvt_t", "agent_pvt_l"):
        model = timm.create_model(name, device="meta")
        assert [stage.blocks[-1].attn.agent_grid for stage in model.stages] == [(3, 3), (4, 4), (7, 7), (7, 7)]


@pytest.mark.parametrize("name", HIERARCHICAL)
@pytest.mark.parametrize("size", [(96, 96), (512, 640), (130, 97)], ids=str)
@torch.no_grad()
def test_any_size(name, size):
    model = random(name, features_only=True)
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    for x, c, r in zip(model(torch.randn(1, 3, *size)), model.feature_info.channels(), (4, 8, 16, 32), strict=True):
        assert x.shape[1] == c
        assert abs(x.shape[2] - size[0] / r) < 1
        assert abs(x.shape[3] - size[1] / r) < 1
        assert x.isfinite().all()


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_set_input_size(name):
    """It makes the tables those of a new size, as the constructor makes them, and changes nothing computed there."""
    double, exactly = dict(dtype=torch.float64), dict(rtol=0, atol=1e-10)
    model, x = random(name, **double), torch.randn(1, 3, 96, 128, dtype=torch.float64)
    expected, weights = model(x), model.state_dict()
    model.set_input_size((96, 128))
    torch.testing.assert_close(model(x), expected, **exactly)
    born = timm.create_model(name, img_size=(96, 128)).eval()
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    assert shapes == {key: value.shape for key, value in born.state_dict().items()}
    assert shapes != {key: value.shape for key, value in weights.items()}
    loaded = dict(pretrained=True, pretrained_cfg_overlay=dict(state_dict=weights), **double)
    torch.testing.assert_close(timm.create_model(name, img_size=(96, 128), **loaded).eval()(x), expected, **exactly)

    grids = {"agent_grid": (5, 4)} if name == "test_agent_deit" else {"agent_grids": [(5, 4), (3, 6), (2, 2), (3, 1)]}
    model.set_input_size(**grids)
    out = model(x)
    assert (out - expected).abs().max() > 1e-6
    torch.testing.assert_close(timm.create_model(name, **grids, **loaded).eval()(x), out, **exactly)


def test_wrong_number_of_stages():
    with pytest.raises(ValueError, match="agent_grids must have one entry per stage, 4, got"):
        timm.create_model("test_agent_pvt", agent_grids=((3, 3),))


def official_names(model, family):
    """The weights of a small model under the authors' names, the inverse of the family's filter."""
    state = {}
    for key, x in model.state_dict().items():
        for tables, names in (("agent_bias", "an ah aw ac"), ("query_bias", "na ha wa ca")):
            for leaf, name in zip(("map", "rows", "columns", "prefix"), names.split(), strict=True):
                if key.endswith(f".{tables}.{leaf}"):
                    key = key.replace(f".{tables}.{leaf}", f".{name}_bias")
                    if leaf != "map":
                        x = (x.movedim(1, -1) if tables == "query_bias" else x)[None]
        key = key.replace("head.fc.", "head.").replace("pos_embed.table", "pos_embed")
        state[key] = x
    return state


@torch.no_grad()
def test_file_of_the_authors_for_another_size(tmp_path):
    """Tables of a file for 64 pixels are fitted to a model for 96, by the rule that the model follows at run time."""
    model, x = random("test_agent_deit"), torch.randn(1, 3, 96, 96)
    path = tmp_path / "max_acc.pth"
    torch.save({"model": official_names(model, agent_deit), "epoch": 299, "max_accuracy": 74.9}, path)
    overlay = dict(file=str(path))
    same = timm.create_model("test_agent_deit", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    assert all(torch.equal(a, b) for a, b in zip(same.parameters(), model.parameters(), strict=True))
    larger = timm.create_model("test_agent_deit", img_size=96, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    torch.testing.assert_close(larger(x), model(x), rtol=1e-4, atol=1e-5)


def test_dense_args_of_every_family():
    for name in ("agent_deit", "agent_pvt", "agent_swin", "agent_cswin"):
        family = importlib.import_module(f"visionattn.models.{name}")
        for task in ("detection", "segmentation"):
            timm.create_model(f"{name}_t", device="meta", **family.dense_args(f"{name}_t", task))


@pytest.mark.slow
@torch.no_grad()
def test_onnx(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, path = random("test_agent_deit", num_classes=10), tmp_path / "model.onnx"
    x = torch.randn(2, 3, 96, 64)
    torch.onnx.export(
        model, (x,), dynamo=True, opset_version=20, verbose=False,
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=16)},)).save(path)
    session = onnxruntime.InferenceSession(path)
    for batch in (2, 3):
        x = torch.randn(batch, 3, 96, 64)
        actual = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
        torch.testing.assert_close(actual, model(x), rtol=1e-4, atol=1e-4)
