"""DependencyViT: what its definition promises, pruned tokens and their parents, sizes (see also test_families.py)."""
import pytest
import timm
import torch

from tests.models.test_families import images, make
from visionattn.layers import ReversedAttention, attention_maps

SIZES = {  # parameters; the paper's are recalled, not confirmed, as 6.2 and 24.0 million
    "dependency_vit_tiny": 6_182_440, "dependency_vit_lite_tiny": 6_182_440, "dependency_vit_small": 23_865_448,
    "dependency_vit_lite_small": 23_865_448, "test_dependency_vit": 184_120}
BOTH = ("test_dependency_vit", "test_dependency_vit_lite")


def lively(name, **options):
    """In float64, with weights that make gates and selectors differ from token to token."""
    model = make(name, **options).double()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "controller" in key or "selector" in key:
                parameter.mul_(10)
    return model


def gates_of(model, x):
    """What each controller gives in a forward pass."""
    found = []
    hooks = [block.controller.register_forward_hook(lambda module, inputs, out: found.append(out))
             for block in model.blocks]
    model(x)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize(("name", "expected"), SIZES.items())
def test_sizes(name, expected):
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == expected
    assert [block.left for block in model.blocks if block.left < 1000] == ([840, 680, 520, 360] if "lite" in name else [])


@torch.no_grad()
def test_every_token_sends_as_much_as_its_gates_let_through():
    model, x = lively("test_dependency_vit"), images(2).double()
    with attention_maps(model) as maps:
        model(x)
    gates = torch.stack(gates_of(model, x)).cumprod(0)
    assert gates[-1].std() > 0.001
    for received, gate in zip(maps, gates, strict=True):  # [batch, heads, receivers, senders]
        torch.testing.assert_close(received.sum((1, 2)), gate)


@torch.no_grad()
def test_gates_need_not_be_cumulative():
    model, x = lively("test_dependency_vit", cumulative_gates=False), images(1).double()
    with attention_maps(model) as maps:
        model(x)
    for received, gate in zip(maps, gates_of(model, x), strict=True):
        torch.testing.assert_close(received.sum((1, 2)), gate)


@torch.no_grad()
def test_indifferent_selectors_leave_the_transpose_of_attention():
    torch.manual_seed(0)
    layer, x = ReversedAttention(12, 3).double(), torch.randn(2, 7, 12, dtype=torch.float64)
    layer.selector.weight.zero_()
    with attention_maps(layer) as maps:
        layer(x)
    q, k, _ = layer.qkv(x).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
    torch.testing.assert_close(maps[0], (q @ k.mT / 2).softmax(-1).mT / 3)


@pytest.mark.parametrize("name", BOTH)
@torch.no_grad()
def test_the_order_of_patches_does_not_matter(name):
    """With their positions they give the same features in the same other order."""
    model, x = lively(name), images(2).double()
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    patches = x.unfold(2, 8, 8).unfold(3, 8, 8).flatten(2, 3)[:, :, order].unflatten(2, (8, 8))
    expected, logits = model.forward_features(x), model(x)
    model.pos_embed.table.copy_(model.pos_embed.table[:, order])
    other = patches.transpose(3, 4).flatten(4, 5).flatten(2, 3)
    torch.testing.assert_close(model.forward_features(other), expected[:, order])
    torch.testing.assert_close(model(other), logits)


@torch.no_grad()
def test_lite_models_that_prune_nothing_are_the_full_ones():
    full, x = lively("test_dependency_vit"), images(2).double()
    lite = lively("test_dependency_vit_lite", prune_ratio=0.)
    lite.load_state_dict(full.state_dict())
    assert torch.equal(lite(x), full(x))


@pytest.mark.parametrize(("size", "counts"), [((64, 64), [64, 64, 48, 32]), ((40, 56), [35, 35, 26, 17]),
                                              ((8, 8), [1, 1, 1, 1])], ids=str)
@torch.no_grad()
def test_how_many_tokens_are_left(size, counts):
    model = lively("test_dependency_vit_lite")
    with attention_maps(model) as maps:
        model(images(1, *size).double())
    assert [found.shape[2] for found in maps] == counts


@torch.no_grad()
def test_those_that_send_least_are_pruned_and_become_their_parents():
    model, x = lively("test_dependency_vit_lite"), images(2).double()
    with attention_maps(model) as maps:
        taken = model.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)
    gates = torch.stack(gates_of(model, x)[:2]).prod(0)
    mass = maps[1].sum(1)  # [batch, receivers, senders]
    for image in range(2):
        order = gates[image].argsort(descending=True)
        stays, goes = order[:48], order[48:]
        after = taken[1][image]
        assert len(after.unique(dim=0)) == 48
        for token in goes:
            parent = stays[mass[image][stays, token].argmax()]
            assert torch.equal(after[token], after[parent])
        assert len(taken[2][image].unique(dim=0)) == len(taken[3][image].unique(dim=0)) == 32
        for token in goes:  # they stay together, whoever stands for them later
            parent = stays[mass[image][stays, token].argmax()]
            assert torch.equal(taken[3][image][token], taken[3][image][parent])


@torch.no_grad()
def test_another_size_of_the_table_changes_nothing():
    model, x = make("test_dependency_vit"), images(1, 48, 96)
    expected = model(x)
    model.set_input_size((48, 96))
    assert model.pos_embed.table.shape == (1, 72, 48)
    torch.testing.assert_close(model(x), expected)


def test_bad_arguments():
    for options, message in (
            (dict(prune_blocks=(1, 4)), r"different numbers from 0 to 3, got \(1, 4\)"),
            (dict(prune_blocks=(1, 1)), "different numbers"),
            (dict(prune_blocks=(1, 2), prune_ratio=0.5), r"number of prune_blocks \(2\), less than 1, got 0.5"),
            (dict(num_heads=5), r"num_heads \(5\) must divide dim \(48\)"),
            (dict(temperature=0.), "temperature must be positive, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            timm.create_model("test_dependency_vit", **options)


def test_first_weights():
    """Glorot's rule where tokens are mixed, large positions, and gates and selectors that begin nearly alike."""
    torch.manual_seed(0)
    model = timm.create_model("test_dependency_vit")
    block = model.blocks[0]
    for weight in (block.attn.qkv.weight, block.attn.proj.weight, block.ffn.mlp.fc2.weight):
        assert 0.98 < weight.abs().max() / (6 / sum(weight.shape)) ** 0.5 <= 1
    assert 0.4 < model.pos_embed.table.std() < 0.6
    assert block.attn.selector.weight.std() < 0.03
    assert block.controller.out.weight.std() < 0.03
