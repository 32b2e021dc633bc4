"""Sparsifiner: beside the definition written out, DeiT and its weights, both phases of training, sizes (see also
test_families.py).
"""
import copy
import math

import pytest
import timm
import torch

from tests.models.test_families import images, make
from visionattn.layers import SparsifiedAttention, attention_maps, auxiliary_losses
from visionattn.layers.sparsified import guess_attention, resize_factors, score_keys
from visionattn.models.sparsifiner import family

SIZES = {"sparsifiner_deit_tiny": 5_918_632, "sparsifiner_deit_small": 22_251_880, "test_sparsifiner": 180_904}
DEIT = dict(img_size=64, patch_size=8, embed_dim=48, depth=4, num_heads=3)  # what test_sparsifiner is
D = dict(dtype=torch.float64)


def lively(**options):
    """Class token and a map of 4 x 5 tokens, with weights that make the guess differ from token to token."""
    torch.manual_seed(0)
    layer = SparsifiedAttention(12, 2, (4, 5), num_prefix_tokens=1, **dict(rank=9) | options, **D)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return layer, torch.randn(2, 21, 12, **D)


def by_definition(layer, x, size):
    """Its maps and its result, a query at a time."""
    batch, tokens, dim = x.shape
    q, k, v = layer.qkv(x).unflatten(-1, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
    predictor, count = layer.predictor, math.ceil(layer.budget * tokens)
    weights = torch.zeros(batch, layer.num_heads, tokens, tokens, **D)
    for image in range(batch):
        for head in range(layer.num_heads):
            queries, keys = q[image, head], k[image, head]
            reduced = predictor.k(keys).T @ predictor.down
            shares = (predictor.q(queries) @ reduced / math.sqrt(layer.num_heads)).softmax(-1)
            for query in range(tokens):
                seen = torch.arange(tokens)
                if query:
                    first = 1 + (query - 1) // layer.queries_per_list * layer.queries_per_list
                    together = shares[first:first + layer.queries_per_list].sum(0)
                    scores = torch.zeros(tokens, **D)
                    for column in together.argsort(descending=True)[:8]:
                        basis = predictor.up[:, column].abs()
                        scores += together[column] * torch.where(basis > 0.02, basis, 0.)
                    seen = scores.argsort(descending=True)[:count]
                logits = queries[query] @ keys[seen].T / math.sqrt(dim // layer.num_heads)
                weights[image, head, query, seen] = logits.softmax(0)
    return weights, layer.proj((weights @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("options", [dict(), dict(budget=0.4, rank=3), dict(queries_per_list=6)], ids=str)
@torch.no_grad()
def test_it_is_its_definition(options):
    layer, x = lively(**options)
    with attention_maps(layer.eval()) as maps:
        out = layer(x, (4, 5))
    weights, expected = by_definition(layer, x, (4, 5))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(maps, [weights])


@torch.no_grad()
def test_entries_of_the_basis_below_the_threshold_settle_ties():
    layer, x = lively()
    layer.predictor.up.mul_(0.01 / layer.predictor.up.abs().max())
    q, k, _ = layer.qkv(x).unflatten(-1, (3, 2, -1)).unbind(2)
    scores = score_keys(layer.predictor, q[:, 1:], k, (4, 5))
    assert (0 < scores).all()
    assert (scores < 1e-7).all()
    assert all(len(row.unique()) == 21 for row in scores.flatten(0, 2))


@pytest.mark.parametrize(("name", "expected"), SIZES.items())
def test_sizes(name, expected):
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == expected


# Weights


@pytest.fixture(scope="module")
def deit():
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_patch16_224", **DEIT).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def from_deit(deit, **options):
    torch.manual_seed(1)
    return timm.create_model(
        "test_sparsifiner", pretrained=True, pretrained_cfg_overlay=dict(state_dict=deit.state_dict()),
        **family.small["test_sparsifiner"], **options, **D)


@torch.no_grad()
def test_with_all_keys_it_is_deit(deit):
    x = images(2).double()
    torch.testing.assert_close(from_deit(deit, budget=1.).eval()(x), deit(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(from_deit(deit).train()(x), deit(x), rtol=1e-12, atol=1e-12)  # the first phase
    sparse = from_deit(deit).eval()(x)
    assert not torch.allclose(sparse, deit(x), rtol=1e-3)


@torch.no_grad()
def test_weights_of_deit_leave_predictors_as_they_were_drawn(deit):
    torch.manual_seed(1)
    fresh, loaded = timm.create_model("test_sparsifiner", **D), from_deit(deit)
    for key, x in fresh.state_dict().items():
        if ".predictor." in key:
            assert torch.equal(loaded.state_dict()[key], x)
    assert any(".predictor." in key for key in fresh.state_dict())


@torch.no_grad()
def test_weights_go_into_models_for_other_image_sizes(deit):
    other = from_deit(deit, img_size=(48, 80), budget=1.).eval()
    assert other.pos_embed.table.shape == (1, 61, 48)
    source, x = make("test_sparsifiner").double(), images(1, 48, 80).double()
    overlay = dict(state_dict=source.state_dict())
    model = timm.create_model(
        "test_sparsifiner", pretrained=True, pretrained_cfg_overlay=overlay, img_size=(48, 80),
        **family.small["test_sparsifiner"], **D).eval()
    torch.testing.assert_close(model(x), source(x))
    state_dict = source.state_dict()
    del state_dict["blocks.1.attn.predictor.up"]
    with pytest.raises(RuntimeError, match=r"1 missing \(first: blocks.1.attn.predictor.up\)"):
        timm.create_model("test_sparsifiner", pretrained=True, pretrained_cfg_overlay=dict(state_dict=state_dict))


# Training


def test_what_the_predictor_learns_from():
    layer, x = lively()
    layer.train()
    out = layer(x, (4, 5))
    loss = auxiliary_losses(layer)["reconstruction"]
    q, k, v = layer.qkv(x).unflatten(-1, (3, 2, -1)).unbind(2)
    attention = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1) / math.sqrt(6)).softmax(-1)
    torch.testing.assert_close(out, layer.proj((attention @ v.transpose(1, 2)).transpose(1, 2).flatten(2)))
    guess = guess_attention(layer.predictor, q[:, 1:], k, (4, 5))
    expected = 0.01 * (guess - attention[:, :, 1:].detach()).square().sum() / 2
    torch.testing.assert_close(loss, expected)
    for actual, right in zip(torch.autograd.grad(loss, list(layer.parameters())[:2]),
                             torch.autograd.grad(expected, list(layer.parameters())[:2]), strict=True):
        torch.testing.assert_close(actual, right)


def test_a_predictor_that_learnt_finds_keys_that_matter():
    layer, x = lively(rank=12, loss_weight=1.)
    x = 2 * x

    def share():
        """Of the attention to all keys, what the chosen ones have."""
        with torch.no_grad(), attention_maps(layer.eval()) as maps:
            layer(x, (4, 5))
        layer.budget = 1.
        with torch.no_grad(), attention_maps(layer) as full:
            layer(x, (4, 5))
        layer.budget = 0.25
        return (full[0] * (maps[0] > 0))[:, :, 1:].sum(-1).mean().item()

    before = share()
    optimizer = torch.optim.Adam(layer.predictor.parameters(), lr=0.02)
    for _ in range(150):
        layer.train()(x, (4, 5))
        optimizer.zero_grad()
        auxiliary_losses(layer)["reconstruction"].backward()
        optimizer.step()
    assert before < 0.5 < 0.65 < share()


def test_the_second_phase_trains_what_is_evaluated():
    model, x = make("test_sparsifiner", reconstruct=False), images(2)
    with torch.no_grad():
        expected = model(x)
    out = model.train()(x)
    torch.testing.assert_close(out, expected)
    assert auxiliary_losses(model) == {}
    out.square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.requires_grad == (".predictor." not in key)
        assert (parameter.grad is None) == (".predictor." in key)


def test_blocks_that_are_computed_twice_have_the_loss_once():
    model, x = make("test_sparsifiner").train(), images(2)
    twice = copy.deepcopy(model)
    twice.set_grad_checkpointing()
    grads = []
    for one in (model, twice):
        loss = one(x).square().mean() + auxiliary_losses(one)["reconstruction"]
        loss.backward()
        assert auxiliary_losses(one) == {}
        grads.append([parameter.grad for parameter in one.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# Sizes


@pytest.mark.parametrize("options", [dict(), dict(queries_per_list=16)], ids=str)
@torch.no_grad()
def test_another_size_of_the_factors_changes_nothing(options):
    model, x = make("test_sparsifiner", **options), images(1, 48, 100)
    expected = model(x)
    model.set_input_size((48, 100))
    assert model.blocks[0].attn.predictor.up.shape == (1 + 6 * 13, 10)
    assert model.pos_embed.table.shape == (1, 1 + 6 * 13, 48)
    torch.testing.assert_close(model(x), expected)


@torch.no_grad()
def test_sums_over_even_maps_do_not_depend_on_their_size():
    down, up = torch.rand(21, 3, **D), torch.ones(21, 3, **D)
    small, even = resize_factors(down, up, (4, 5), (7, 11), 1)
    assert torch.equal(small[0], down[0])
    torch.testing.assert_close(even, torch.ones(78, 3, **D))
    flat, _ = resize_factors(torch.ones(21, 3, **D), up, (4, 5), (7, 11), 1)
    torch.testing.assert_close(flat.sum(0), torch.full((3,), 21., **D))


def test_bad_arguments():
    for options, message in (
            (dict(budget=0.), "budget must be at least 0.0001 and at most 1, a share of the keys, got 0"),
            (dict(budget=50), "got 50"),
            (dict(queries_per_list=0), "queries_per_list and rank must be at least 1, got 0 and 10"),
            (dict(num_heads=5), r"num_heads \(5\) must divide dim \(48\)"),
    ):
        with pytest.raises(ValueError, match=message):
            timm.create_model("test_sparsifiner", **options)
