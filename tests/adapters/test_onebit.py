"""Low-bit adapters against their authors' numbers, and their files."""
import hashlib

import onnx
import pytest
import timm
import torch
from torch.nn import functional as F

from tests import golden
from visionattn import adapters
from visionattn.adapters._lowbit import LowBitLinear, codebook
from visionattn.adapters.onebit import Bottleneck, load_headerless, save_headerless
from visionattn.export import export_onnx

NUMBERS = golden.load("onebit_ops")
TOLERANCE = {1: 1e-12, 2: 1e-12, 4: 1e-8, 8: 1e-8, 32: 1e-12}  # the authors sum half steps in float32


@pytest.mark.parametrize("case", NUMBERS["codebooks"], ids=lambda case: str(case["bits"]))
def test_codebooks(case):
    levels, boundaries = codebook(case["bits"])
    torch.testing.assert_close(levels, torch.tensor(case["levels"]), atol=3e-7, rtol=0)
    torch.testing.assert_close(boundaries, torch.tensor(case["boundaries"]), atol=3e-7, rtol=0)


@pytest.mark.parametrize("case", NUMBERS["layers"], ids=lambda case: str(case["bits"]))
def test_layers(case):
    bits, width, out, rows = case["bits"], case["in_features"], case["out_features"], case["rows"]
    layer = LowBitLinear(width, out, bits).double()
    with torch.no_grad():
        layer.weight.copy_(0.02 * golden.random(case["seed"], (out, width)) + 0.003)
    x = golden.random(case["seed"] + 1, (rows, width)).requires_grad_()
    y = layer(x)
    (y * golden.random(case["seed"] + 2, (rows, out))).sum().backward()
    golden.assert_equals(y.flatten(), case["out"], TOLERANCE[bits])
    golden.assert_equals(x.grad, case["grad_x"], TOLERANCE[bits])
    golden.assert_equals(layer.weight.grad, case["grad_weight"], TOLERANCE[bits])
    packed = layer.pack()
    mean, deviation = packed[-8:].clone().view(torch.float32).tolist()
    assert mean == pytest.approx(case["mean"], abs=1e-9)
    assert deviation == pytest.approx(case["std"], abs=1e-9)
    expected = torch.tensor(list(bytes.fromhex(case["packed_hex"])), dtype=torch.uint8)
    if bits == 8:  # levels on top of each other have several indices
        torch.testing.assert_close(codebook(8)[0][packed[:-8].long()], codebook(8)[0][expected.long()],
                                   atol=1e-6, rtol=0)
    else:
        assert packed[:-8].tolist() == expected.tolist()
    layer.unpack(packed)
    golden.assert_equals(layer.rounded(), case["loaded_weight"], 1e-8)
    assert torch.equal(layer.pack(), packed)


@pytest.mark.parametrize("bits", [1, 4])
def test_half_precision_rounds_to_the_same_levels(bits):
    layer = LowBitLinear(16, 8, bits)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.rounded().dtype == torch.float32
        assert layer(torch.randn(2, 16)).dtype == torch.bfloat16
    layer.bfloat16()
    packed, rounded = layer.pack(), layer.rounded()
    assert rounded.dtype == torch.bfloat16
    fresh = LowBitLinear(16, 8, bits)
    fresh.unpack(packed)
    assert torch.equal(fresh.rounded().bfloat16(), rounded)
    layer.unpack(packed)
    assert torch.equal(layer.pack(), packed)


def test_gradients_are_those_of_the_formula():
    layer = LowBitLinear(6, 4, 2).double()
    weight, g = layer.weight.detach(), golden.random(3, (4, 6))
    (layer.rounded() * g).sum().backward()
    mean, s = weight.mean(), weight.std()
    a, w = s / (s + 1e-5), (weight - mean) / (s + 1e-5)
    q = (layer.rounded().detach() - mean) / s
    expected = (a * (g - g.mean()) + g.mean()
                + ((g * q).sum() - a * (g * w).sum()) * (weight - mean) / ((weight.numel() - 1) * s))
    torch.testing.assert_close(layer.weight.grad, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("case", NUMBERS["train"], ids=lambda case: str(case["bits"]))
def test_short_trainings(case):
    seed, bits, width, dim = case["seed"], case["bits"], case["width"], case["dim"]
    layer = Bottleneck(width, dim, width, bits, case["scale"], torch.nn.ReLU()).double().eval()
    with torch.no_grad():
        layer.down.weight.copy_(0.2 * golden.random(seed, (dim, width)))
        layer.up.weight.copy_(0.01 * golden.random(seed + 1, (width, dim)))
    optimizer = torch.optim.AdamW(layer.parameters(), lr=case["lr"], weight_decay=1e-4)
    for step, expected in enumerate(case["losses"]):
        x = golden.random(seed + 10 + step, (case["rows"], width))
        loss = F.mse_loss(x + layer(x), golden.random(seed + 50 + step, (case["rows"], width)))
        assert loss.item() == pytest.approx(expected, abs=1e-8)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for matrix, name, packed_hex in zip((layer.down, layer.up), ("down", "up"), case["packed_hex"], strict=True):
        golden.assert_equals(matrix.weight.flatten(), case[name], 1e-8)
        assert matrix.pack()[:-8].numpy().tobytes() == bytes.fromhex(packed_hex)[:-8]
    x = golden.random(seed + 99, (case["rows"], width))
    golden.assert_equals((x + layer(x)).flatten(), case["out_fake"], 1e-8)
    layer.down.settle()
    layer.up.settle()
    golden.assert_equals((x + layer(x)).flatten(), case["out_loaded"], 1e-7)


def authors_names(adapter, bihead):
    """Our matrices by the authors' names."""
    found = {}
    for i, layer in enumerate(adapter.layers):
        parts = {"adapter_mlp": layer} if hasattr(layer, "down") else {"attn.lora_q": layer.q, "attn.lora_v": layer.v}
        for part, bottleneck in parts.items():
            for name in ("down", "up"):
                found[f"blocks.{i}.{part}.adapter_{name}.weight"] = getattr(bottleneck, name)
    return found | ({"head.weight": adapter.classifier} if bihead else {})


def whole(case):
    """A model of a case with its adapter, and the adapter's matrices by the authors' names."""
    bihead = case.get("bihead", False)
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", img_size=32, depth=case["depth"],
                                  num_classes=case.get("classes", 7))
    model = model.double().to_empty(device="cpu")
    model.load_state_dict({key: golden.fill(key, x.shape) for key, x in model.state_dict().items()})
    adapter = adapters.attach(model.eval(), "onebit", shape=case["kind"], bihead=bihead,
                              **{key: case[key] for key in ("bits", "dim", "scale")})
    matrices = authors_names(adapter, bihead)
    with torch.no_grad():
        for key, matrix in matrices.items():
            matrix.weight.copy_(golden.fill(key, matrix.weight.shape) * (0.05 if "adapter_up" in key else 1))
    return model, matrices


@pytest.mark.parametrize("case", NUMBERS["models"] + NUMBERS["whole_models"],
                         ids=lambda case: f"{case['kind']}-{case['bits']}-{case['seed']}")
def test_models(case, tmp_path):
    model, matrices = whole(case)
    tolerance = max(1e-10, TOLERANCE[case["bits"]])
    images = golden.random(case["seed"], (case["batch"], 3, 32, 32))
    logits = model(images)
    golden.assert_equals(logits.flatten(), case["logits"], tolerance)
    (logits * golden.random(case["seed"] + 1, logits.shape)).sum().backward()
    gradients = case.get("grads") or {case["grad_of"]: case["grad"]}
    known = {key: matrix.weight for key, matrix in matrices.items()} | {
        f"head.{key}": x for key, x in model.head.named_parameters() if "head.weight" not in matrices}
    for key, expected in gradients.items():
        golden.assert_equals(known[key].grad, expected, tolerance)
    packed = adapters.adapters_of(model)["onebit"].tensors().get("packed")
    if "logits_loaded" not in case:
        if packed is not None:
            content = packed.numpy().tobytes()
            assert (len(content), hashlib.sha256(content).hexdigest()) == (case["file_bytes"], case["file_sha256"])
        return
    path = tmp_path / "adapter.bin"
    assert save_headerless(model, path) == case["file_bytes"]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == case["file_sha256"]
    adapters.merge(model)
    golden.assert_equals(model(images).flatten(), case["logits_loaded"], 1e-7)


@pytest.mark.parametrize("case", NUMBERS["decode"], ids=lambda case: f"{case['file']}-{case['layer']}")
def test_published_layers(case):
    packed = torch.tensor(list(bytes.fromhex(case["bytes_hex"])), dtype=torch.uint8)
    layer = LowBitLinear(case["weights"], 1, case["bits"])
    layer.unpack(packed)
    golden.assert_equals(layer.rounded().double().reshape(case["decoded"]["shape"]), case["decoded"], 3e-9)
    assert torch.equal(layer.pack(), packed)


def test_published_files_have_the_size_that_ours_would_have():
    sizes = {case["file"].partition("models_bin/")[2]: case["bytes"] for case in NUMBERS["published"]}
    for name, shape, bihead in (("adaptformer-bihead/cifar-bit1-dim1.bin", "adaptformer", True),
                                ("lora/cifar-bit1-dim1.bin", "lora", False)):
        with torch.device("meta"):
            model = timm.create_model("vit_base_patch16_224", num_classes=100)
            adapter = adapters.attach(model, "onebit", dim=1, shape=shape, bihead=bihead)
        size = sum(matrix.num_bytes for matrix in adapter.matrices())
        assert size + (0 if bihead else 4 * 100 * 769) == sizes[name]
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=100)
        adapter = adapters.attach(model, "onebit", dim=32)
    assert sum(matrix.num_bytes for matrix in adapter.matrices()) == 73_920


@pytest.mark.parametrize(("options", "classes"), [
    ({"dim": 8}, 5), ({"dim": 2, "bits": 4, "shape": "lora"}, 5), ({"dim": 1, "bits": 8, "bihead": True}, 3)])
def test_the_authors_layout_round_trips_bitwise(options, classes, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=32, num_classes=classes).eval()
    fresh = timm.create_model("test_vit", img_size=32, num_classes=9).eval()
    fresh.load_state_dict({key: x for key, x in model.state_dict().items() if "head" not in key}, strict=False)
    adapters.attach(model, "onebit", scale=10., **options)
    paths = [tmp_path / name for name in ("a.bin", "b.bin")]
    size = save_headerless(model, paths[0])
    load_headerless(fresh, paths[0], scale=10., **options)
    assert save_headerless(fresh, paths[1]) == size
    assert paths[0].read_bytes() == paths[1].read_bytes()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(fresh(images), model(images))
    paths[1].write_bytes(paths[0].read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"bytes: not .* of an adapter with these options"):
        load_headerless(fresh, paths[1], label="cut", **options)


def test_sizes_that_do_not_fill_bytes_and_plain_weights_are_refused(tmp_path):
    with pytest.raises(ValueError, match="3 x 6 weights of 2 bits do not fill whole bytes"):
        LowBitLinear(6, 3, 2)
    model = timm.create_model("test_vit", img_size=32, num_classes=3)
    for options in ({"bits": 3}, {"dim": 0}, {"shape": "prefix"}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
            adapters.attach(model, "onebit", **options)
    adapters.attach(model, "onebit", bits=32)
    with pytest.raises(ValueError, match="no adapters of 32 bits"):
        save_headerless(model, tmp_path / "a.bin")
    adapters.save(model, tmp_path / "a.safetensors")
    model.reset_classifier(0)
    with pytest.raises(ValueError, match="bihead takes the place of a linear classifier, and VisionTransformer"):
        adapters.attach(model, "onebit", label="second", bihead=True)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"shape": "lora", "bihead": True}])
def test_exported_merged_or_not_there_is_no_rounding_in_the_graph(options, tmp_path):
    model = timm.create_model("test_vit", img_size=32, num_classes=8).eval()
    adapters.attach(model, "onebit", dim=8, scale=10., **options)
    for merged in (False, True):
        if merged:
            adapters.merge(model)
        report = export_onnx(model, tmp_path / "model.onnx")  # which compares the file with PyTorch
        operators = {node.op_type for node in onnx.load(report.path).graph.node}
        assert not operators & {"ReduceMean", "Greater", "Sqrt", "Erf", "GatherND", "Div"}
    assert ("Relu" in operators) == (not options)
