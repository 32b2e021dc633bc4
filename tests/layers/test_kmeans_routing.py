"""K-means routing: how centroids learn, what training machinery does to them, and that every token is served."""
import copy
import io

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from visionattn.layers import KMeansRoutingAttention, auxiliary_losses

DIM, HEADS, CLUSTERS = 16, 2, 4


def layer(seed=0, **options) -> KMeansRoutingAttention:
    torch.manual_seed(seed)
    module = KMeansRoutingAttention(DIM, HEADS, CLUSTERS, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return module


def maps(batch=3, height=5, width=7, seed=1) -> torch.Tensor:
    return torch.randn(batch, height, width, DIM, generator=torch.Generator().manual_seed(seed))


def units(module, x) -> torch.Tensor:
    """Unit queries and keys, ``[heads, all tokens, dim]``."""
    q, k, _ = module.qkv(x).detach().flatten(0, 2).chunk(3, dim=-1)
    return F.normalize(torch.cat([q, k]).unflatten(-1, (HEADS, -1)), dim=-1).transpose(0, 1)


def settled(**options) -> KMeansRoutingAttention:
    """A layer in training whose clusters are all alive."""
    module = layer(**options).train()
    with torch.no_grad():
        module.centroids.copy_(F.normalize(module.centroids, dim=-1))
        module.cluster_sizes.fill_(1)
    return module


def buffers(module) -> dict[str, torch.Tensor]:
    return {name: x.clone() for name, x in module.named_buffers()}


def assert_same(a, b, **tolerance):
    for name in a:
        torch.testing.assert_close(a[name], b[name], **tolerance, msg=name)


# How centroids learn


def test_first_batch_decides():
    """After one forward, a centroid is the mean direction of its tokens, or a token if it had none."""
    module, x = layer(), maps()
    tokens = units(module, x)
    owners = (tokens @ F.normalize(module.centroids, dim=-1).mT).argmax(dim=-1)
    module.train()(x)
    alone = 0
    for h in range(HEADS):
        for c in range(CLUSTERS):
            direction = F.normalize(module.centroids[h, c], dim=0)
            members = tokens[h][owners[h] == c]
            if len(members):
                assert direction @ F.normalize(members.sum(dim=0), dim=0) > 0.999
            else:
                alone += 1
                assert (tokens[h] @ direction).max() > 0.9999
    assert alone < HEADS * CLUSTERS


def test_running_means():
    module = settled(decay=0.75)
    x, before = maps(), buffers(module)
    tokens = units(module, x)
    members = F.one_hot((tokens @ before["centroids"].mT).argmax(dim=-1), CLUSTERS).float()
    unit = tokens.shape[1] / CLUSTERS
    module(x)
    torch.testing.assert_close(
        module.cluster_sizes, 0.75 * before["cluster_sizes"] + 0.25 * members.sum(dim=1) / unit)
    torch.testing.assert_close(module.centroids, 0.75 * before["centroids"] + 0.25 * members.mT @ tokens / unit)


def test_dead_cluster_starts_anew():
    module, x = settled(), maps()
    tokens = units(module, x)
    with torch.no_grad():
        module.centroids[1, 2] = module.centroids[1, 0]  # on a tie, the first gets the token
        module.cluster_sizes[1, 2] = 1e-3
    before = buffers(module)
    module(x)
    direction = F.normalize(module.centroids[1, 2], dim=0)
    assert (tokens[1] @ direction).max() > 0.9999
    assert module.cluster_sizes[1, 2] > 0.1
    alive = torch.ones(HEADS, CLUSTERS, dtype=torch.bool)
    alive[1, 2] = False
    moved = F.cosine_similarity(module.centroids, before["centroids"], dim=-1)
    assert (moved[alive] > 0.99).all()


def test_clusters_are_found():
    """Tokens of four directions end up in four clusters, although random centroids hardly tell them apart."""
    torch.manual_seed(0)
    module = layer(decay=0.5).train()
    with torch.no_grad():
        module.qkv.bias.zero_()
        module.qkv.weight.zero_()
        module.qkv.weight[:2 * DIM] = torch.eye(DIM).repeat(2, 1)  # queries and keys are the input
    kinds = F.normalize(torch.randn(4, HEADS, DIM // HEADS) + 1, dim=-1)
    for _ in range(40):
        kind = torch.randint(4, (8, 6, 6))
        module(kinds[kind].flatten(-2) + 0.03 * torch.randn(8, 6, 6, DIM))
    nearest = F.normalize(module.centroids, dim=-1) @ kinds.transpose(0, 1).mT  # [heads, clusters, kinds]
    assert (nearest.amax(dim=1) > 0.98).all()


def test_eval_does_not_learn():
    module = layer().train()
    module(maps())
    auxiliary_losses(module)
    before = buffers(module)
    module.eval()(maps(seed=2))
    assert_same(buffers(module), before, rtol=0, atol=0)
    assert auxiliary_losses(module) == {}


def test_state_dict_holds_what_was_learnt():
    module = layer().train()
    for seed in range(3):
        module(maps(seed=seed))
    twin = layer(seed=5)
    twin.load_state_dict(module.state_dict())
    assert {"centroids", "cluster_sizes"} <= set(module.state_dict())
    assert torch.equal(twin.eval()(maps()), module.eval()(maps()))
    module.train()(maps(seed=9))
    twin.train()(maps(seed=9))
    assert_same(buffers(twin), buffers(module), rtol=0, atol=0)


# Loss


def test_loss_is_collected_once():
    model = nn.Sequential(layer(), layer(seed=1))
    x = maps()
    expected = 0
    for module in model:
        tokens = units(module, x)
        nearest = (tokens @ F.normalize(module.centroids, dim=-1).mT).max(dim=-1)
        centroids = F.normalize(module.centroids, dim=-1)[torch.arange(HEADS)[:, None], nearest.indices]
        expected += 1e-4 * F.mse_loss(tokens, centroids).item()
        x = module.eval()(x)
    model.train()(maps())
    losses = auxiliary_losses(model)
    assert list(losses) == ["commitment"]
    assert losses["commitment"].item() == pytest.approx(expected, rel=1e-5)
    assert auxiliary_losses(model) == {}
    losses["commitment"].backward()
    assert all(module.qkv.weight.grad.any() for module in model)


def test_loss_does_not_hinder_copies():
    module = layer().train()
    module(maps())
    twin = copy.deepcopy(module)
    torch.save(module, io.BytesIO())
    assert auxiliary_losses(twin) == {}
    assert set(auxiliary_losses(module)) == {"commitment"}


# Training machinery


def run_twice(module, forward):
    """Outputs, loss, gradients and buffers after two steps."""
    results = []
    for seed in (1, 2):
        x = maps(seed=seed).requires_grad_()
        out = forward(module, x)
        loss, = auxiliary_losses(module).values()
        grads = torch.autograd.grad(out.square().sum() + 1e4 * loss, [x, *module.parameters()])
        results += [out, loss, *grads]
    return results, buffers(module)


@pytest.mark.parametrize("assignment", ["topk", "capacity"])
def test_gradient_checkpointing(assignment):
    """Neither learns twice nor routes differently when it computes again, and the loss keeps its gradient."""
    plain, expected = run_twice(layer(assignment=assignment, decay=0.3).train(), lambda m, x: m(x))
    again, actual = run_twice(
        layer(assignment=assignment, decay=0.3).train(), lambda m, x: checkpoint(m, x, use_reentrant=False))
    assert_same(actual, expected, rtol=0, atol=0)
    for a, b in zip(again, plain, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("assignment", ["topk", "capacity"])
def test_compiles_in_training(assignment):
    torch.compiler.reset()
    plain, expected = run_twice(layer(assignment=assignment).train(), lambda m, x: m(x))
    module = layer(assignment=assignment).train()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    outputs, actual = run_twice(module, lambda m, x: compiled(x))
    assert_same(actual, expected)
    for a, b in zip(outputs, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_autocast():
    """Products are rounded, what is learnt from them is not."""
    module, twin = layer().train(), layer().train()
    with torch.autocast("cpu", torch.bfloat16):
        out = module(maps())
    expected = twin(maps())
    assert out.dtype == torch.bfloat16
    assert (out.float() - expected).norm() < 0.1 * expected.norm()
    assert {x.dtype for x in module.buffers()} == {torch.float32}
    loss, = auxiliary_losses(module).values()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(next(iter(auxiliary_losses(twin).values())).item(), rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(dtype):
    module, twin = layer().to(dtype).train(), layer().train()
    for seed in range(3):
        out, expected = module(maps(seed=seed).to(dtype)), twin(maps(seed=seed))
        out.sum().backward()
    assert out.dtype == dtype
    assert {x.dtype for x in module.buffers()} == {dtype}
    similar = F.cosine_similarity(module.centroids.float(), twin.centroids, dim=-1)
    assert (similar > 0.9).float().mean() > 0.8  # of near ties one may fall the other way
    assert (out.float() - expected).norm() < 0.2 * expected.norm()


@pytest.mark.parametrize("assignment", ["topk", "capacity"])
def test_deterministic(assignment):
    torch.use_deterministic_algorithms(True)
    try:
        (first, a), (second, b) = (run_twice(layer(assignment=assignment).train(), lambda m, x: m(x)) for _ in "12")
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(a, b, rtol=0, atol=0)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def _learn(module, part: slice) -> dict[str, torch.Tensor]:
    for seed in range(3):
        module(maps(4, seed=seed)[part])
    return buffers(module)


def _rank(_, rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    part = slice(2 * rank, 2 * rank + 2)
    torch.save([_learn(settled(), part), _learn(layer(seed=3).train(), part)], f"{folder}/{rank}")
    dist.destroy_process_group()


def test_processes_learn_together(tmp_path):
    """Two processes with half a batch each have the same centroids, those that one would have with all of it.

    Also where clusters start anew, but then one process draws from other tokens.
    """
    other = mp.spawn(_rank, (1, str(tmp_path)), join=False)
    _rank(None, 0, str(tmp_path))
    other.join()
    first, second = (torch.load(tmp_path / rank, weights_only=True) for rank in "01")
    for a, b in zip(first, second, strict=True):
        assert_same(a, b, rtol=0, atol=0)
    assert_same(first[0], _learn(settled(), slice(None)), rtol=1e-4, atol=1e-5)
    with pytest.raises(AssertionError):
        assert_same(first[0], _learn(settled(), slice(0, 2)), rtol=1e-4, atol=1e-5)


# Every token is served


@pytest.mark.parametrize("assignment", ["topk", "capacity"])
@pytest.mark.parametrize("size", [(1, 1), (1, 3), (2, 2), (13, 29), (40, 31)], ids=str)
def test_any_size(assignment, size):
    x = maps(2, *size).requires_grad_()
    module = layer(assignment=assignment).train()
    out = module(x)
    assert out.shape == x.shape
    out.sum().backward()
    assert x.grad.isfinite().all()
    assert torch.isfinite(module.centroids).all()


def test_tokens_that_no_cluster_takes_are_convolved():
    """With top-k some queries are left out; their output is the local branch, not nothing."""
    module, x = layer().eval(), maps(1, 16, 16)
    q, k, v = module.qkv(x).chunk(3, dim=-1)
    attention = module._attend(q, k, v)
    left_out = (attention.unflatten(-1, (HEADS, -1)) == 0).all(dim=-1)  # [1, 16, 16, heads]
    assert left_out.any()
    local = module.lepe(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(module(x), module.proj(attention + local))
    assert (local.unflatten(-1, (HEADS, -1))[left_out] != 0).all()
    served = layer(assignment="capacity").eval()._attend(q, k, v)
    assert (served != 0).all()


def test_samples_do_not_see_each_other():
    module = layer().eval()
    x = maps(4)
    torch.testing.assert_close(module(x), torch.cat([module(sample[None]) for sample in x]))


@pytest.mark.parametrize(("options", "message"), [
    (dict(num_heads=3), "num_heads 3 must divide dim 16"),
    (dict(num_clusters=0), "num_clusters must be at least 1"),
    (dict(assignment="soft"), "assignment must be 'topk' or 'capacity', got 'soft'"),
    (dict(decay=1.0), "decay must be at least 0 and less than 1"),
])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        KMeansRoutingAttention(**dict(dim=16, num_heads=2, num_clusters=4) | options)
