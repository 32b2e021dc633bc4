"""MoSA: the authors' numbers, who owns what, and models that have such adapters."""
import copy
import zlib
from functools import partial

import numpy as np
import pytest
import timm
import torch
from lightning.pytorch import Trainer
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from timm.utils.model import reparameterize_model
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests import golden
from visionattn import adapters
from visionattn.adapters.mosa import ExpertLinear, MoSA, SparseAdapter, deal, deep_difference, symmetric_kl
from visionattn.export.graph import graph_of
from visionattn.export.source import plain
from visionattn.tasks import ClassificationTask

GOLDEN = golden.load("mosa_ops")


def cases(kind, group="authors"):
    return [case for case in GOLDEN[group] if case["kind"] == kind]


@pytest.mark.parametrize("case", cases("masks", "cases") + cases("divide"), ids=lambda case: str(case["seed"]))
def test_golden_owners(case):
    scores = golden.uniform(case["seed"], case["shape"])
    mode = case.get("mode", "all")
    if "error" in case:
        with pytest.raises(ValueError, match="3 entries cannot be divided among 4 experts"):
            deal(scores, case["experts"])
        return
    owners = deal(scores, case["experts"], mode).flatten()
    counts = owners.bincount()
    if isinstance(case["owner"][0], list):  # a bias that all own
        layer = ExpertLinear(1, case["shape"][0], case["experts"])
        assert layer.bias_owner is None
    elif case["experts"] == 49:  # there the authors' rounding loses an entry
        assert counts.tolist() == [2] * 49
    else:
        assert owners.tolist() == case["owner"]
        assert counts.max() - counts.min() <= (1 if mode == "all" else scores.ndim * max(case["shape"]))


def test_owners_of_equal_scores():
    """Every entry has one owner, whatever the scores and numbers."""
    for count, experts in [(7, 7), (10, 3), (98, 49), (13, 6)]:
        counts = deal(torch.zeros(count), experts).bincount(minlength=experts)
        assert counts.sum() == count
        assert counts.max() - counts.min() <= 1
    assert deal(torch.zeros(6), 3).tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("case", cases("merge", "cases"), ids=lambda case: str(case["seed"]))
def test_golden_merging(case):
    (rows, columns), seed, experts = case["shape"], case["seed"], case["experts"]
    layer = ExpertLinear(columns, rows, experts, bias=False, dtype=torch.float64)
    layer.owner.copy_(deal(golden.uniform(seed, case["shape"]), experts))
    layer.spread(golden.random(seed + 1, case["shape"]))
    with torch.no_grad():
        for i in range(experts):
            layer.weight[i] += golden.random(seed + 2 + i, case["shape"]) * (layer.owner == i)
    golden.assert_equals(layer.merged()[0].flatten(), case["merged"])
    layer.merging = "joint"
    golden.assert_equals(layer.merged()[0].flatten(), case["joint"])


@pytest.mark.parametrize(
    "case", cases("symmetric_kl", "cases") + cases("symmetric_kl_float32"), ids=lambda case: case["kind"])
def test_golden_symmetric_kl(case):
    dtype = torch.float32 if "float32" in case["kind"] else torch.float64
    first, second = (golden.random(case["seed"] + i, (case["batch"], case["classes"])).requires_grad_() for i in (0, 1))
    value = symmetric_kl(first.to(dtype), second.to(dtype))
    value.backward()
    tolerance = case.get("tolerance", 1e-14)
    assert value.item() == pytest.approx(case["value"], abs=tolerance)
    golden.assert_equals(first.grad.flatten(), case["grad_first"], tolerance)
    golden.assert_equals(second.grad.flatten(), case["grad_second"], tolerance)


@pytest.mark.parametrize("case", cases("deep_regulariser"), ids=lambda case: str(case["seed"]))
def test_golden_deep_difference(case):
    first, second = ([golden.random(case["seed"] + start + i, case["shape"]) for i in range(case["blocks"])]
                     for start in (0, 10))
    assert deep_difference(first, second).item() == pytest.approx(case["value"], abs=1e-15)


@pytest.mark.parametrize("case", cases("adapter", "cases"), ids=lambda case: case["shape"])
def test_golden_adapter(case):
    """The block's end, of what attention and perceptron gave."""
    seed, dim, width = case["seed"], case["dim"], case["bottleneck"]
    shape = {"adaptformer": nn.GELU, "pfeiffer": nn.ReLU, "houlsby": nn.SiLU}[case["shape"]]
    norm = None if case["shape"] == "houlsby" else 1e-6
    adapter = SparseAdapter(dim, width, shape, 1, norm=norm, scale=case["scale"], dtype=torch.float64)
    if norm:
        adapter.norm.weight.data = 1 + 0.1 * golden.random(seed + 2, (dim,))
        adapter.norm.bias.data = 0.1 * golden.random(seed + 3, (dim,))
    adapter.down.spread(0.3 * golden.random(seed + 4, (width, dim)), 0.1 * golden.random(seed + 5, (width,)))
    adapter.up.spread(0.3 * golden.random(seed + 6, (dim, width)), 0.1 * golden.random(seed + 7, (dim,)))
    h, m = (golden.random(seed + i, (case["tokens"], dim)) for i in (0, 1))
    seen = {"adaptformer": h, "pfeiffer": m, "houlsby": h + m}[case["shape"]]
    golden.assert_equals((h + m + adapter(seen)).flatten(), case["out"])


def attached(module, **options):
    """A model of this block alone with an adapter, in float64; its layers."""
    model = nn.ModuleDict({"block": module}).double()
    adapter = MoSA(**options)
    adapter.attach(model, "mosa")
    for part in adapter.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    return adapter


def load(layer, prefix, names, names_of):
    """Gives an adapter's layers the tensors that the authors' block has by these names; returns who owns what."""
    for part, name in names.items():
        matrix = getattr(layer, part)
        for leaf in ("weight", "bias"):
            stack, owner = getattr(matrix, leaf), matrix.owner if leaf == "weight" else matrix.bias_owner
            if stack is None:
                continue
            keys = [f"{prefix}{name}.{leaf}"] if matrix.experts == 1 else [
                f"{prefix}{name}.{i}.{leaf}" for i in range(matrix.experts)]
            with torch.no_grad():
                for i, key in enumerate(keys):
                    stack[i] = golden.fill(key, stack.shape[1:])
            names_of |= {key: (stack, i, owner) for i, key in enumerate(keys)}
            if owner is not None:
                group = f"{prefix}{name}.{leaf}"
                owner.copy_(deal(golden.uniform(zlib.crc32(f"score.{group}".encode()), owner.shape), matrix.experts))


def draw(monkeypatch, draws, share):
    """The numbers that are drawn next: the authors draw also where a matrix is shared."""
    kept = iter(draws[{"down": slice(1, None, 2), "up": slice(0, None, 2), None: slice(None)}[share]])
    monkeypatch.setattr(ExpertLinear, "draw", lambda self: torch.tensor(next(kept)))
    return kept


def check(case, adapter, module, names_of, x, monkeypatch):
    """Outputs in training and evaluation, gradients, owners and merged tensors."""
    kept = draw(monkeypatch, case["draws"], case["share"])
    out = module.train()(x)
    adapter.train()
    assert next(kept, None) is None
    golden.assert_equals(out.flatten(), case["out_train"], 1e-14)
    (out * golden.random(case["x"]["seed"] + 1, case["x"]["shape"]).reshape(out.shape)).sum().backward()
    for key, (stack, i, owner) in names_of.items():
        expected = case["grads"][key]
        expected = torch.tensor(0.0 if expected is None else expected, dtype=torch.float64)
        expected = expected.expand(stack[0].numel()).reshape(stack[0].shape)
        golden.assert_equals(stack.grad[i], (expected if owner is None else expected * (owner == i)).tolist(), 1e-14)
    for key, owner in case["owner"].items():
        name, leaf = key.rsplit(".", 1)
        found = names_of[f"{name}.0.{leaf}"][2]
        assert found is None if owner == "all" else found.flatten().tolist() == owner
    module.eval(), adapter.eval()
    for merging in ("add", "joint"):
        for layer in adapter._copies().values():
            layer.merging = merging
        merged = [x.flatten() for layer in adapter._copies().values() if layer.experts > 1 for x in layer.merged()
                  if x is not None]
        for found, expected in zip(merged, case[f"merged_{merging}"].values(), strict=True):
            golden.assert_equals(found, expected, 1e-15)
        golden.assert_equals(module(x).flatten(), case[f"out_eval_{merging}"], 1e-14)


def plain_names(key):
    """Of the authors' block, timm's."""
    for ours, theirs in {"norm1": "attention_norm", "norm2": "ffn_norm", "mlp": "ffn", "proj": "out"}.items():
        key = key.replace(f"{theirs}.", f"{ours}.")
    return key


def joined(state):
    """timm's attention has one matrix for queries, keys and values."""
    for prefix in {key.split("query")[0] for key in state if "query" in key}:
        for leaf in ("weight", "bias"):
            state[f"{prefix}qkv.{leaf}"] = torch.cat(
                [state.pop(f"{prefix}{name}.{leaf}") for name in ("query", "key", "value")])
    return state


@pytest.mark.parametrize(
    "case", cases("vit_block"), ids=lambda case: f"{case['style']}-{case['share']}")
def test_golden_block(case, monkeypatch):
    block = Block(case["dim"], case["heads"], mlp_ratio=case["mlp"] / case["dim"], qkv_bias=True,
                  norm_layer=partial(nn.LayerNorm, eps=1e-6))
    shape = case["style"].lower()
    adapter = attached(
        block, shape=shape, bottleneck=case["bottleneck"], experts=case["experts"], share=case["share"] or "none",
        scale=case["scale"] if shape == "adaptformer" else None, divide_biases=not case["biases_owned_by_all"])
    block.load_state_dict(joined({plain_names(key): golden.fill(key, size) for key, size in case["state_dict"]
                                  if not key.startswith("adapter")}))
    names_of = {}
    for name, layer in adapter.layers.items():
        suffix = {"houlsby": {"block-attn": "_attn", "block-mlp": "_ffn"}[name]}.get(shape, "")
        load(layer, "", {part: f"adapter_{part}{suffix}" for part in ("down", "up")}, names_of)
        if isinstance(layer.norm, nn.LayerNorm):
            layer.norm.load_state_dict({leaf: golden.fill(f"adapter_norm.{leaf}", (case["dim"],))
                                        for leaf in ("weight", "bias")})
    x = golden.random(case["x"]["seed"], case["x"]["shape"])
    check(case, adapter, block, names_of, x, monkeypatch)
    if shape != "houlsby":
        for leaf in ("weight", "bias"):
            golden.assert_equals(getattr(layer.norm, leaf).grad, case["grads"][f"adapter_norm.{leaf}"], 1e-14)


@pytest.mark.parametrize("case", cases("swin_block"), ids=lambda case: str(case["share"]))
def test_golden_swin_block(case, monkeypatch):
    size = case["resolution"]
    block = SwinTransformerBlock(case["dim"], (size, size), case["heads"], window_size=case["window"],
                                 shift_size=case["shift"], mlp_ratio=case["mlp_ratio"])
    adapter = attached(block, shape="swin", bottleneck=case["bottleneck"], experts=case["experts"],
                       share=case["share"] or "none", scale=case["scale"])
    block.load_state_dict({key: golden.fill(key, size) for key, size in case["state_dict"]
                           if "adapter" not in key}, strict=False)
    names_of = {}
    load(adapter.layers["block-mlp"], "mlp.", {part: f"adapter_{part}" for part in ("down", "up")}, names_of)
    x = golden.random(case["x"]["seed"], case["x"]["shape"]).unflatten(1, (size, size))
    check(case, adapter, block, names_of, x, monkeypatch)


@pytest.mark.parametrize("case", cases("lora_attention"), ids=lambda case: case["targets"])
def test_golden_attention(case, monkeypatch):
    attention = Attention(case["dim"], case["heads"], qkv_bias=True)
    adapter = attached(attention, shape="lora", bottleneck=case["rank"], experts=case["experts"],
                       share=case["share"] or "none", scale=case["scale"], targets=case["targets"])
    attention.load_state_dict(joined({plain_names(key): golden.fill(key, size) for key, size in case["state_dict"]
                                      if not key.startswith("lora")}))
    names_of = {}
    for target, layer in adapter.layers["block"].items():
        load(layer, "", {"down": f"lora_A_{target}", "up": f"lora_B_{target}"}, names_of)
    x = golden.random(case["x"]["seed"], case["x"]["shape"])
    check(case, adapter, attention, names_of, x, monkeypatch)
    # Folded into the matrix, but for o, it is the same.
    for layer in adapter._copies().values():
        layer.merging = "add"
    assert adapter.merge(nn.ModuleDict({"block": attention})) == (case["targets"] == "qv")
    assert list(adapter.layers["block"]) == ["o"] * (case["targets"] != "qv")
    golden.assert_equals(attention(x).flatten(), case["out_eval_add"], 1e-14)


class Adam:
    """The authors' optimiser: epsilon outside the bias correction, and decay of what was updated already.

    A copy of a matrix steps from its first draw on; ``none``: only in steps in which it is drawn.
    """

    def __init__(self, named, lr, decay, mode):
        self.named, self.lr, self.decay, self.mode, self.moments = named, lr, decay, mode, {}

    @torch.no_grad()
    def step(self, drawn):
        for key, (stack, i, _) in self.named.items():
            grad = stack.grad if i is None else stack.grad[i]
            x = stack.data if i is None else stack.data[i]
            if (id(stack), i) not in drawn and i is not None and (self.mode == "none" or key not in self.moments):
                continue
            first, second, count = self.moments.get(key, (torch.zeros_like(x), torch.zeros_like(x), 0))
            first, second, count = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad ** 2, count + 1
            self.moments[key] = first, second, count
            x -= self.lr * (1 - 0.999 ** count) ** 0.5 / (1 - 0.9 ** count) * first / (second.sqrt() + 1e-6)
            if "bias" not in key:
                x -= self.lr * self.decay * x


@pytest.mark.parametrize("case", cases("train"), ids=lambda case: f"{case['seed']}-{case['zero_grads']}")
def test_golden_training(case, monkeypatch):
    """Whole steps: two draws, both losses, masked gradients, and what is evaluated after them."""
    encoder, dim = "enc.transformer.encoder.", case["dim"]
    model = VisionTransformer(
        img_size=8, patch_size=4, embed_dim=dim, depth=case["blocks"], num_heads=case["heads"],
        mlp_ratio=case["mlp"] / dim, num_classes=case["classes"]).double()
    adapter = MoSA(bottleneck=case["bottleneck"], experts=case["experts"], share=case["share"] or "none",
                   scale=case["scale"], regulariser=case["reg_weight"], second=case["add_weight"])
    adapter.attach(model, "mosa")
    official = {"cls_token": "enc.transformer.embeddings.cls_token", "head.weight": "head.last_layer.weight",
                "pos_embed": "enc.transformer.embeddings.position_embeddings", "head.bias": "head.last_layer.bias"}
    official |= {f"patch_embed.proj.{leaf}": f"enc.transformer.embeddings.patch_embeddings.{leaf}"
                 for leaf in ("weight", "bias")} | {f"norm.{leaf}": f"{encoder}encoder_norm.{leaf}"
                                                    for leaf in ("weight", "bias")}
    named = {}
    with torch.no_grad():
        for key, x in model.state_dict().items():
            if key.startswith("adapters."):
                continue
            if ".qkv." in key:
                stem = key.replace("blocks.", f"{encoder}layer.").split("qkv")[0]
                x.copy_(torch.cat([golden.fill(f"{stem}{name}.{key.rsplit('.')[-1]}", (dim, *x.shape[1:]))
                                   for name in ("query", "key", "value")]))
                continue
            name = key.replace("blocks.", f"{encoder}layer.").replace("norm1", "attention_norm").replace(
                "norm2", "ffn_norm").replace("mlp.", "ffn.").replace("attn.proj", "attn.out")
            x.copy_(golden.fill(official.get(key, name), x.shape))
        for i, layer in enumerate(adapter.layers.values()):
            layer.drop.p = 0.0
            stem = f"{encoder}layer.{i}.adapter_"
            load(layer, stem, {"down": "down", "up": "up"}, named)
            for leaf in ("weight", "bias"):
                getattr(layer.norm, leaf).copy_(golden.fill(f"{stem}norm.{leaf}", (dim,)))
                named[f"{stem}norm.{leaf}"] = getattr(layer.norm, leaf), None, None
                if layer.down.experts > 1:
                    getattr(layer.down, leaf).copy_(
                        golden.fill(f"{stem}down.{leaf}", getattr(layer.down, leaf).shape[1:]))
                getattr(layer.up, leaf).zero_()
    named |= {f"head.last_layer.{leaf}": (getattr(model.head, leaf), None, None) for leaf in ("weight", "bias")}
    named = {key: (stack, None if len(stack) == 1 and i == 0 else i, owner) for key, (stack, i, owner) in named.items()}
    optimizer = Adam(named, case["lr"], case["weight_decay"], case["zero_grads"])
    kept, drawn = draw(monkeypatch, case["draws"], case["share"]), set()
    numbers = ExpertLinear.draw

    def recorded(layer):
        number = numbers(layer)
        drawn.update((id(stack), number.item()) for stack in (layer.weight, layer.bias))
        return number

    monkeypatch.setattr(ExpertLinear, "draw", recorded)
    model.train()
    losses = []
    for step in range(case["steps"]):
        images = golden.random(case["seed"] + 100 + step, (case["batch"], 3, 8, 8))
        labels = torch.from_numpy(np.random.RandomState(case["seed"] + 200 + step).randint(
            0, case["classes"], case["batch"]))
        model.zero_grad()
        drawn.clear()
        loss = adapter.loss(model, images, lambda logits, labels=labels: nn.functional.cross_entropy(logits, labels))
        loss.backward()
        losses.append(loss.item())
        optimizer.step(drawn)
    assert next(kept, None) is None
    assert losses == pytest.approx(case["losses"], abs=case["tolerance"])
    with torch.no_grad():
        logits = model.eval()(golden.random(case["seed"], (2, 3, 8, 8)))
    golden.assert_equals(logits.flatten(), case["logits_eval"], case["tolerance"])
    for key, (stack, i, _) in named.items():
        expected = case["tensors"][key]
        whole = i is None and stack.ndim == len(expected["shape"])
        golden.assert_matches(stack if whole else stack[i or 0], expected, case["tolerance"])


def images(side=32):
    return torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(1))


def stir(adapter):
    """Moves an adapter from where it starts, its copies apart."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.1 * torch.randn_like(parameter)


MODELS = [
    ("test_vit", dict(img_size=32, qk_norm=True, init_values=0.5, drop_path_rate=0.1)),
    ("swin_tiny_patch4_window7_224", dict(img_size=32, window_size=4, depths=(1, 2), embed_dim=32, num_heads=(2, 4))),
    ("test_swin_vsa", {})]


@pytest.mark.parametrize("shape", ["adaptformer", "pfeiffer", "houlsby", "swin", "lora"])
@pytest.mark.parametrize(("name", "args"), MODELS, ids=[name for name, _ in MODELS])
def test_models(name, args, shape, tmp_path):
    """It starts as the backbone, learns in every tensor, and its file and what is left of merging are what it was."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4, **args).eval()
    backbone, x = copy.deepcopy(model), images(64 if name == "test_swin_vsa" else 32)
    before = model(x)
    adapter = adapters.attach(model, "mosa", shape=shape, bottleneck=6, targets="qkvo", share="none")
    torch.testing.assert_close(model(x), before)
    stir(adapter)
    loss = adapter.loss(model.train(), x, lambda logits: nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2])))
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in adapter.parameters())
    for layer in adapter._copies().values():
        owned = torch.stack([layer.owner == i for i in range(layer.experts)])
        assert not layer.weight.grad[~owned].any()
    model.eval()
    with torch.no_grad():
        after = model(x)
        assert not torch.allclose(after, before, atol=1e-3)
        torch.testing.assert_close(model(x[:1]), after[:1])
        adapters.save(model, tmp_path / "a.safetensors")
        other = copy.deepcopy(backbone)
        adapters.load(other, tmp_path / "a.safetensors")
        torch.testing.assert_close(other(x), after)
        assert {len(layer.weight) for layer in adapters.adapters_of(other)["a"]._copies().values()} == {4}
        assert not adapters.merge(other)
        torch.testing.assert_close(other(x), after)
        torch.testing.assert_close(reparameterize_model(model)(x), after)


@pytest.mark.parametrize("merging", ["add", "joint"])
def test_files_hold_what_copies_make(merging, tmp_path):
    """A file is as large as that of one copy; merged queries and values are in the backbone's weights."""
    model = timm.create_model("test_vit", img_size=32, num_classes=4).eval()
    backbone = copy.deepcopy(model)
    adapter = adapters.attach(model, "mosa", shape="lora", experts=3, merging=merging)
    stir(adapter)
    with torch.no_grad():
        after = model(images())
        adapters.save(model, tmp_path / "a.safetensors")
        shapes = adapters.info(tmp_path / "a.safetensors")["tensors"]
        assert {len(shape) for shape in shapes.values()} <= {1, 2}
        assert len(shapes) == len(model.blocks) * 4 + 2
        adapters.load(backbone, tmp_path / "a.safetensors")
        torch.testing.assert_close(backbone(images()), after)
        assert adapters.merge(backbone)
        torch.testing.assert_close(backbone(images()), after)
        assert not adapters.adapters_of(backbone)
        with pytest.raises(RuntimeError, match="not of this adapter"):
            adapter.load_tensors({key: x for key, x in list(adapter.tensors().items())[1:]})


@pytest.mark.parametrize(("name", "args"), [("test_vit", {"img_size": 64}), ("test_fan", {})])
def test_inner_values_computed_twice_are_of_one_draw(name, args):
    gradients = []
    for enable in (False, True):
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=4, **args)
        adapter = adapters.attach(model, "mosa", shape="houlsby", bottleneck=4, share="none")
        stir(adapter)
        model.set_grad_checkpointing(enable)
        torch.manual_seed(3)
        adapter.loss(model.train(), images(64), lambda logits: logits.square().mean()).backward()
        gradients.append([parameter.grad for parameter in adapter.parameters()])
    for once, twice in zip(*gradients, strict=True):
        torch.testing.assert_close(once, twice)


def test_dealing_is_by_seed_and_name():
    def owners(seed):
        model = timm.create_model("test_vit", img_size=32)
        adapter = adapters.attach(model, "mosa", bottleneck=4, seed=seed)
        torch.rand(1)
        return [layer.up.owner for layer in adapter.layers.values()]

    first, again, other = owners(0), owners(0), owners(1)
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


def test_the_loss_of_a_step():
    """Of one draw alone where nothing compares two; of two with the outputs of blocks between."""
    model = timm.create_model("test_vit", img_size=32, num_classes=4)
    adapter = adapters.attach(model, "mosa", deep=True, second=0.5, regulariser=2.)
    stir(adapter)
    calls, x = [], images()

    def answer(x):
        calls.append(model(x))
        return calls[-1]

    loss = adapter.loss(answer, x, lambda logits: logits.square().mean())
    outputs = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, output: outputs.append(output))
    torch.manual_seed(3)
    again = [model(x), model(x)]
    torch.manual_seed(3)
    loss = adapter.loss(model, x, lambda logits: logits.square().mean())
    depth = len(model.blocks)
    expected = (again[0].square().mean() + 0.5 * again[1].square().mean()
                + 2 * (symmetric_kl(*again) + deep_difference(outputs[:depth], outputs[depth:2 * depth])))
    torch.testing.assert_close(loss, expected)
    assert len(calls) == 2
    assert not torch.equal(*again)
    alone = adapters.attach(timm.create_model("test_vit", img_size=32), "mosa", regulariser=0.)
    calls.clear()
    alone.loss(answer, x, lambda logits: logits.sum())
    assert not alone.steps_itself
    assert len(calls) == 1


def fit(task, tmp_path, labels):
    loader = DataLoader(TensorDataset(images(), labels), batch_size=3)
    trainer = Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path)
    trainer.fit(task, loader)


def test_a_training_step_is_of_two_passes(tmp_path):
    options = dict(num_classes=4, model_args={"img_size": 32}, schedule="cosine")
    task, calls = ClassificationTask("test_vit", **options), []
    adapter = adapters.attach(task.model, "mosa")
    before = copy.deepcopy(task.model.state_dict())
    task.model.register_forward_hook(lambda *_: calls.append(task.model.training))
    fit(task, tmp_path, torch.tensor([0, 1, 2]))
    assert calls == [True, True]
    changed = {key for key, x in task.model.state_dict().items() if not torch.equal(x, before[key])}
    assert changed
    assert all(key.startswith(("head.", "adapters.mosa.")) for key in changed)
    assert not adapter.layers["blocks-0-mlp"].up.bias.eq(0).all()
    task = ClassificationTask("test_vit", multi_label=True, **options)
    adapters.attach(task.model, "mosa")
    with pytest.raises(ValueError, match="two passes in a step, which multi_label does not go with"):
        fit(task, tmp_path, torch.eye(4)[:3].long())


@pytest.mark.slow
def test_exported(tmp_path):
    """As products, norms and activations; copies are merged before."""
    import onnxruntime

    model = timm.create_model("test_vit", img_size=32, num_classes=4, depth=2).eval()
    stir(adapters.attach(model, "mosa", shape="houlsby", bottleneck=6))
    lengths = ({0: torch.export.Dim("batch")},)
    proto = graph_of(plain(model, True), images(), 18, input_names=["images"], output_names=["logits"],
                     dynamic_shapes=lengths)
    assert not {"ReduceMean", "RandomUniform", "Where"} & {node.op_type for node in proto.graph.node}
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    for x in (images(), images()[:1]):
        with torch.no_grad():
            np.testing.assert_allclose(session.run(None, {"images": x.numpy()})[0], model(x), atol=1e-5)


@pytest.mark.parametrize(("options", "message"), [
    ({"shape": "series"}, "mosa's shape must be one of adaptformer, pfeiffer, houlsby, swin, lora, got 'series'"),
    ({"experts": 0}, "mosa's experts must be at least 1, got 0"),
    ({"targets": "qx"}, "targets must be some of the letters q, k, v, o, got 'qx'"),
    ({"shape": "houlsby", "scale": 2.}, "mosa's shape houlsby has no scale"),
    ({"shape": "swin", "scale": "learnt"}, "learnt in the shape adaptformer alone"),
    ({"regulariser": -1.}, "must not be negative"),
    ({"bottleneck": 2, "share": "up", "divide_biases": True}, "2 entries cannot be divided among 4 experts")])
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        adapters.attach(timm.create_model("test_vit", img_size=32), "mosa", **options)
