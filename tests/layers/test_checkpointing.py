"""Attention that is computed a second time: training is what it is without, and less is kept for the backward pass."""
import copy
import io

import pytest
import timm
import torch
from torch import nn

from tests.layers.test_attention_maps import tiny
from tests.models.test_families import images, make
from visionattn.layers import attention_maps, auxiliary_losses, checkpoint_attention
from visionattn.models import families

ONE_EACH = [next(iter(family.small)) for family in families().values()]


def step(model, x):
    """Loss of a training step, and bytes that are kept for its backward pass."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(3)
    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(x).square().sum() + sum(auxiliary_losses(model).values())
    loss.backward()
    return loss, sum(kept.values())


def assert_same(plain, other):
    """The gradients and the state (the statistics of batch norms, the centroids of clusters) of two models."""
    for (name, a), b in zip(plain.named_parameters(), other.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        assert a.grad is None or torch.allclose(a.grad, b.grad, rtol=1e-12, atol=1e-12), name
    states = plain.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.allclose(value, states[1][name], rtol=1e-12, atol=1e-12), name


@pytest.mark.parametrize("name", ONE_EACH)
def test_every_family(name):
    plain = make(name, **({} if "cga" in name else {"drop_path_rate": 0.3})).double().train()
    other = copy.deepcopy(plain)
    checkpoint_attention(other)
    other = copy.deepcopy(other)
    x = images(2, 32, 32).double()
    (expected, all_kept), (loss, kept) = step(plain, x), step(other, x)
    assert torch.allclose(loss, expected, rtol=1e-12)
    assert kept < 0.95 * all_kept
    assert_same(plain, other)


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_timms_models_with_dropout(kind):
    plain = tiny(kind, attn_drop_rate=0.3, proj_drop_rate=0.2).double().train()
    other = copy.deepcopy(plain)
    checkpoint_attention(other)
    x = images(2, 32, 32).double()
    (expected, all_kept), (loss, kept) = step(plain, x), step(other, x)
    assert torch.equal(loss, expected)
    assert kept < all_kept
    assert_same(plain, other)
    checkpoint_attention(other)  # again, which changes nothing
    checkpoint_attention(other, False)
    assert step(other, x)[1] == all_kept
    torch.jit.script(other.eval())


def test_evaluation_keeps_everything_and_files_have_it():
    plain = tiny("vit")
    model = copy.deepcopy(plain)
    checkpoint_attention(model)
    x = images(2, 32, 32)
    assert step(model, x)[1] == step(plain, x)[1]
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False).train()
    assert loaded.blocks[0].attn.forward.args[0] is loaded.blocks[0].attn
    assert step(loaded, x)[1] < step(plain.train(), x)[1]
    program = torch.export.export(model.eval(), (x,))
    assert not any("checkpoint" in str(node.target) for node in program.graph.nodes)


def test_another_forward_is_kept():
    model = tiny("vit")
    attn = model.blocks[0].attn
    attn.forward = own = lambda x, **kwargs: 0 * x
    expected = model(images(2, 32, 32))
    checkpoint_attention(model)
    assert torch.equal(model.train()(images(2, 32, 32)), expected)
    checkpoint_attention(model, False)
    assert attn.forward is own


@pytest.mark.parametrize("blocks", [False, True])
def test_attention_maps(blocks):
    """Gradients of maps are right, and the second time gives no maps, whatever ran before the context."""
    found = []
    for enable in (False, True):
        model = make("test_agent_deit").double().train()
        if enable and blocks:
            model.set_grad_checkpointing()
        elif enable:
            checkpoint_attention(model)
        x = images(2, 32, 32).double()
        before = model(x).sum()
        with attention_maps(model) as maps:
            logits = model(x)
            before.backward()
        (logits.sum() + sum((one ** 2).sum() for one in maps)).backward()
        found.append((len(maps), model))
    assert found[0][0] == found[1][0] == 4
    assert_same(found[0][1], found[1][1])


def test_batch_norms_count_a_batch_once_where_blocks_are_computed_twice():
    plain = make("test_efficientvit_cga").double().train()
    other = copy.deepcopy(plain)
    other.set_grad_checkpointing()
    for model in (plain, other):
        step(model, images(2, 32, 32).double())
    assert_same(plain, other)


@pytest.mark.slow
def test_compiled():
    plain = make("test_agent_deit").double().train()
    other = copy.deepcopy(plain)
    checkpoint_attention(other)
    other.compile(backend="aot_eager", fullgraph=True)
    x = images(2, 32, 32).double()
    loss, expected = step(other, x)[0], step(plain, x)[0]
    assert torch.allclose(loss, expected, rtol=1e-12)
    assert_same(plain, other)


def test_a_model_without_attention_is_refused():
    with pytest.raises(ValueError, match="ResNet has no attention to compute a second time: none of its modules is"):
        checkpoint_attention(timm.create_model("resnet10t"))
    checkpoint_attention(nn.Linear(1, 1), False)
