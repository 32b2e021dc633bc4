"""What holds for every layer: transforms, traces, empty batches, odd values, and whose tensors are not written to."""
import copy
import threading

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, vmap

from visionattn.layers import (
    AgentAttention,
    AggregatedAttention,
    BiLevelRoutingAttention,
    CascadedGroupAttention,
    CombinerAttention,
    CosineAttention,
    EfficientLocalAttention,
    ExpertAttention,
    ExpertMlp,
    FactorizedAttention,
    FlowAttention,
    ForwardCrossAttention,
    FullAttention,
    GaussianAdaptiveAttention,
    GroupedQueryAttention,
    HeadGates,
    KMeansRoutingAttention,
    LittleBitAttention,
    LocalGlobalAttention,
    LongRangeAttention,
    MessageController,
    NeighborhoodAttention2d,
    ReversedAttention,
    SparsifiedAttention,
    SubspaceAttention,
    TokenAwarePooling,
    TokenMerging,
    UnionOfExpertsAttention,
    UnionOfPerceptrons,
    VariedSizeWindowAttention,
    auxiliary_losses,
)
from visionattn.layers.conv_norm import ConvNorm, NormLinear

D = dict(dtype=torch.float64)
CHANNELS_FIRST = ("cascaded", "conv", "gates")
LAYERS = {
    "agent": lambda: AgentAttention(12, 2, (6, 5), agents=(3, 3), **D),
    "agent, another grid": lambda: AgentAttention(12, 2, (4, 4), agents=(3, 3), agent_grid=(4, 5), **D),
    "aggregated": lambda: AggregatedAttention(12, 2, 7, 2, **D),
    "aggregated, fixed pool, interpolated": lambda: AggregatedAttention(
        12, 2, 7, 2, kernel_size=5, pool_size=3, bias_size=8, **D),
    "bilevel, input": lambda: BiLevelRoutingAttention(12, 2, n_win=2, topk=2, **D),
    "bilevel, qkv": lambda: BiLevelRoutingAttention(12, 2, n_win=2, topk=2, pad="qkv", **D),
    "aggregated, gates": lambda: AggregatedAttention(12, 2, 7, 2, gate=HeadGates(12, 2, 1, 1, **D), **D),
    "combiner": lambda: CombinerAttention(12, 2, **D),
    "combiner, axial": lambda: CombinerAttention(12, 2, "axial", **D),
    "cosine": lambda: CosineAttention(12, 2, 7, **D),
    "cosine, interpolated": lambda: CosineAttention(12, 2, 7, bias_size=8, **D),
    "experts": lambda: ExpertAttention(12, 4, 5, 2, noise=False, **D),
    "experts, perceptrons": lambda: ExpertMlp(12, 8, 4, 2, noise=False, **D),
    "factorized": lambda: FactorizedAttention(16, 1, 2, window=3, **D),
    "factorized, one group, mean": lambda: FactorizedAttention(16, 2, 1, window=4, merging="tiles", **D),
    "flow": lambda: FlowAttention(12, 2, **D),
    "forward cross": lambda: ForwardCrossAttention(12, 2, (6, 5), sources=0, **D),
    "forward cross, another size": lambda: ForwardCrossAttention(12, 2, (4, 4), sources=0, **D),
    "full": lambda: FullAttention(12, 2, **D),
    "full, value": lambda: FullAttention(12, 2, lepe_of="value", **D),
    "gaussian": lambda: GaussianAdaptiveAttention(12, 2, **D),
    "grouped": lambda: GroupedQueryAttention(12, 6, 2, **D),
    "kmeans": lambda: KMeansRoutingAttention(12, 2, 4, **D),
    "kmeans, capacity": lambda: KMeansRoutingAttention(12, 2, 4, assignment="capacity", **D),
    "local and global": lambda: LocalGlobalAttention(12, 2, (6, 5), 4, 3, **D),
    "local and global, linear, another size": lambda: LocalGlobalAttention(12, 2, (4, 4), 4, 3, "linear", **D),
    "long range": lambda: LongRangeAttention(12, 2, **D),
    "merging": lambda: TokenMerging(12, **D),
    "neighborhood": lambda: NeighborhoodAttention2d(12, 2, 3, **D),
    "neighborhood, padded": lambda: NeighborhoodAttention2d(12, 2, 3, dilation=3, **D),
    "token pooling": lambda: TokenAwarePooling(12, 3, **D),
    "union": lambda: UnionOfExpertsAttention(12, 3, topk=2, **D),
    "union, perceptrons": lambda: UnionOfPerceptrons(12, 12, 3, **D),
    "reversed": lambda: ReversedAttention(12, 2, **D),
    "sparsified": lambda: SparsifiedAttention(12, 2, (6, 5), rank=5, **D),
    "sparsified, shared lists, another size": lambda: SparsifiedAttention(12, 2, (4, 4), 0.4, 7, 9, **D),
    "message controller": lambda: MessageController(12, **D),
    "varied window": lambda: VariedSizeWindowAttention(12, 2, (3, 5), **D),
    "varied window, padded": lambda: VariedSizeWindowAttention(12, 2, 4, dim_out=8, rules="vitae_dense", **D),
    "cascaded": lambda: CascadedGroupAttention(12, 2, window_size=3, **D),
    "cascaded, one window": lambda: CascadedGroupAttention(12, 2, window_size=7, **D),
    "conv": lambda: ConvNorm(12, 12, 3, groups=12, shortcut=True, **D),
    "conv, pointwise": lambda: ConvNorm(12, 8, **D),
    "conv, fused": lambda: fill(ConvNorm(12, 8, **D)).fuse(),
    "gates, local": lambda: EfficientLocalAttention(12, "S", **D),
    "gates, local, separate": lambda: EfficientLocalAttention(12, "T", shared=False, **D),
    "gates, norms, subspaces": lambda: SubspaceAttention(12, 3, **D),
    "gates, little bit": lambda: LittleBitAttention(12, **D),
    "norm, linear": lambda: NormLinear(12, 5, **D),
}


def fill(module: nn.Module) -> nn.Module:
    """Random parameters and statistics of norms, so that nothing is zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, x in [*module.named_parameters(), *module.named_buffers()]:
            if x.is_floating_point():
                x.copy_(torch.randn(x.shape, generator=generator, dtype=torch.float64) * 0.3 + 0.1)
            if name.endswith(("running_var", "cluster_sizes")):
                x.abs_().add_(0.5)
    return module


def images(name: str, batch: int = 3, seed: int = 1) -> Tensor:
    channels = 16 if name.startswith("factorized") else 12
    x = torch.randn(batch, 6, 5, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if name.startswith("norm"):
        return x[:, 0, 0]
    return x.permute(0, 3, 1, 2).contiguous() if name.startswith(CHANNELS_FIRST) else x


@pytest.fixture(params=LAYERS)
def name(request) -> str:
    return request.param


@pytest.fixture
def layer(name) -> nn.Module:
    return fill(LAYERS[name]()).eval()


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_what_others_hold_is_not_written_to(name, layer, training, gradients):
    """The input, the parameters, what hooks were given, and what was returned before."""
    layer.train(training)
    x = images(name)
    before = x.clone()
    parameters = [parameter.clone() for parameter in layer.parameters()]
    seen: list[tuple[Tensor, Tensor]] = []

    def hook(module, inputs, output):
        seen.extend((tensor, tensor.detach().clone()) for tensor in (*inputs, output) if isinstance(tensor, Tensor))

    for module in layer.modules():
        module.register_forward_hook(hook)
    with torch.set_grad_enabled(gradients):
        first = layer(x)
        copied = first.detach().clone()
        layer(x + 1)
    assert torch.equal(x, before)
    assert torch.equal(first, copied)
    assert all(map(torch.equal, layer.parameters(), parameters))
    assert seen
    assert all(torch.equal(tensor, clone) for tensor, clone in seen)


@pytest.mark.parametrize("gradients", [False, True])
def test_vmap_is_a_loop(name, layer, gradients):
    x = images(name)
    with torch.set_grad_enabled(gradients):
        expected = torch.cat([layer(image[None]) for image in x])
        torch.testing.assert_close(vmap(lambda image: layer(image[None])[0])(x), expected)


def test_gradients_per_sample(name, layer):
    x = images(name)
    parameters = {key: value.detach() for key, value in layer.named_parameters()}
    buffers = dict(layer.named_buffers())

    def loss(parameters, image):
        return functional_call(layer, (parameters, buffers), (image[None],)).sin().sum()

    actual = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i, image in enumerate(x):
        layer.zero_grad()
        layer(image[None]).sin().sum().backward()
        for key, parameter in layer.named_parameters():
            expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad  # of no influence
            torch.testing.assert_close(actual[key][i], expected)


def test_ensemble(name, layer):
    """vmap over parameters, all of them or any one, with and without gradients."""
    others = [layer, copy.deepcopy(layer)]
    with torch.no_grad():
        for parameter in others[1].parameters():
            parameter.mul_(1.1)
    x = images(name)
    buffers = dict(layer.named_buffers())
    names = [key for key, _ in layer.named_parameters()]
    for chosen in (names, *([key] for key in names)):
        stacked = {key: torch.stack([dict(o.named_parameters())[key].detach() for o in others]) for key in chosen}
        fixed = {key: p.detach() for key, p in layer.named_parameters() if key not in chosen}

        def run(some, fixed=fixed):
            return functional_call(layer, ({**fixed, **some}, buffers), (x,))

        expected = torch.stack([run({key: value[i] for key, value in stacked.items()}) for i in range(2)])
        for gradients in (False, True):
            with torch.set_grad_enabled(gradients):
                torch.testing.assert_close(vmap(run)(stacked), expected)


@pytest.mark.parametrize("assignment", ["topk", "capacity"])
def test_transforms_do_not_learn_centroids(assignment):
    layer = KMeansRoutingAttention(12, 2, 4, assignment=assignment, **D).train()
    with pytest.raises(RuntimeError, match=r"call eval\(\) before"):
        vmap(lambda image: layer(image[None]))(images("kmeans"))
    assert not layer.cluster_sizes.any()


def test_centroids_learn_nothing_from_what_is_no_number():
    layer = KMeansRoutingAttention(12, 2, 4, **D).train()
    layer(images("kmeans"))
    before = copy.deepcopy(dict(layer.named_buffers()))
    x = images("kmeans")
    x[1, 2, 3] = torch.inf
    layer(x)
    for key, buffer in layer.named_buffers():
        assert torch.equal(buffer, before[key])
    layer(images("kmeans"))
    assert all(buffer.isfinite().all() for buffer in layer.buffers())
    assert not torch.equal(layer.centroids, before["centroids"])


def test_forward_mode(name, layer):
    x, tangent = images(name), images(name, seed=2)
    parameters = {key: value.detach() for key, value in layer.named_parameters()}
    step = 1e-6
    with torch.no_grad():
        expected = (layer(x + step * tangent) - layer(x - step * tangent)) / (2 * step)
    _, actual = torch.func.jvp(layer, (x,), (tangent,))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients), forward_ad.dual_level():
            actual = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, tangent))).tangent
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)
    # Along the parameters.
    along = {key: torch.randn(value.shape, generator=torch.Generator().manual_seed(3), dtype=value.dtype)
             for key, value in parameters.items()}
    with torch.no_grad():
        ahead, behind = (functional_call(layer, {
            key: value + sign * step * along[key] for key, value in parameters.items()}, (x,)) for sign in (1, -1))
    _, actual = torch.func.jvp(lambda p: functional_call(layer, p, (x,)), (parameters,), (along,))
    torch.testing.assert_close(actual, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-7)


def test_second_derivatives(name, layer):
    x = images(name, batch=2).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: layer(x).sin(), (x,), fast_mode=True)


@pytest.mark.parametrize("training", [False, True])
def test_empty_batch(name, layer, training):
    if training and name.startswith(("conv", "norm", "cascaded", "token", "gates, norms")):
        pytest.skip("PyTorch's batch norm refuses to learn from nothing")
    layer.train(training)
    shape = layer(images(name)).shape[1:]
    auxiliary_losses(layer)
    buffers = copy.deepcopy(dict(layer.named_buffers()))
    x = images(name)[:0].requires_grad_()
    out = layer(x)
    assert out.shape == (0, *shape)
    (out.sum() + sum(auxiliary_losses(layer).values())).backward()
    assert x.grad.shape == x.shape
    for parameter in layer.parameters():
        assert parameter.grad is None or not parameter.grad.any()
    for key, buffer in layer.named_buffers():
        torch.testing.assert_close(buffer, buffers[key])
    with torch.no_grad():
        assert layer(x).shape == (0, *shape)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_no_numbers_stay_in_their_image(name, layer, value):
    x = images(name)
    with torch.no_grad():
        expected = layer(x)
        x[1] = value
        out = layer(x)
    torch.testing.assert_close(out[::2], expected[::2])
    assert not out[1].isfinite().all()


def test_strides_do_not_matter(name, layer):
    x = images(name)
    with torch.no_grad():
        expected = layer(x)
        views = [x.transpose(0, 1).contiguous().transpose(0, 1), torch.stack([x, x], dim=-1)[..., 0]]
        if x.ndim == 4:
            views.append(x.contiguous(memory_format=torch.channels_last))
        for view in views:
            torch.testing.assert_close(layer(view), expected)


@pytest.mark.parametrize("gradients", [False, True])
def test_tensors_without_values_leave_nothing(name, layer, gradients):
    x = images(name)
    with torch.set_grad_enabled(gradients):
        expected = copy.deepcopy(layer)(x)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = layer(mode.from_tensor(x))
            assert fake.shape == expected.shape
            assert fake.dtype == expected.dtype
            assert fake.stride() == expected.stride()
        for _ in range(2):
            out = layer(x)
            assert type(out) is Tensor
            assert torch.equal(out, expected)


def test_meta_device(name):
    module = LAYERS[name]().to("meta").eval()
    assert module(images(name).to("meta")).shape == LAYERS[name]().eval()(images(name)).shape


@pytest.mark.filterwarnings("error::torch.jit.TracerWarning", "ignore:.*torch.jit.*is deprecated")
@pytest.mark.parametrize("gradients", [False, True])
def test_jit_trace(name, layer, gradients):
    """To standard operators, without a warning, passing PyTorch's own check; for a batch of any size."""
    x, more = images(name), images(name, batch=4, seed=5)
    with torch.set_grad_enabled(gradients):
        layer(x)  # what is kept does not get into the trace
        traced = torch.jit.trace(layer, x)
        assert "visionattn::" not in str(traced.inlined_graph)
        assert "aten::mT" not in str(traced.inlined_graph)
        torch.testing.assert_close(traced(x), layer(x))
        torch.testing.assert_close(traced(more), layer(more))


@pytest.mark.parametrize("strict", [False, True])
def test_export_holds_standard_operators(name, layer, strict):
    x = images(name)
    program = torch.export.export(layer, (x,), strict=strict)
    assert "visionattn" not in str(program.graph)
    torch.testing.assert_close(program.module()(x), layer(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")
def test_compiled_training_step(name, layer):
    torch.compiler.reset()
    x = images(name)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    results = []
    for module in (layer, compiled):
        leaf = x.clone().requires_grad_()
        out = module(leaf)
        results.append([out, *torch.autograd.grad(out.sin().sum(), [leaf, *layer.parameters()], allow_unused=True)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_threads_share_a_layer(name, layer):
    pictures = [images(name, seed=seed) for seed in range(4)]
    with torch.no_grad():
        expected = [copy.deepcopy(layer)(x) for x in pictures]
    errors = []

    def work(i):
        try:
            with torch.no_grad():
                for _ in range(20):
                    torch.testing.assert_close(layer(pictures[i]), expected[i])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
