"""What users of whole models count on beyond plain calls, for all families: compilers, transforms, hooks, odd inputs,
threads, files and memory.
"""
import copy
import gc
import io
import multiprocessing
import os
import pickle
import re
import threading

import pytest
import timm
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap

from tests.models.test_families import COMPILED, SMALL, family, images, make
from visionattn.layers import auxiliary_losses
from visionattn.models import families
from visionattn.ops import held_bytes, kept, release_memory

# The least height and width of an image, of those that do not pad as far as it takes.
LEAST_SIZES = {
    "test_agent_pvt": 32, "test_agent_cswin": 3, "biformer_stl": 32, "biformer_stl_nchw": 32, "test_smt": 3,
    "test_datr": 29, "test_favit": 29, "test_tap_fan_hybrid": 16, "test_tap_rvt": 15}
QUICK = ("test_dinat", "dinat_iso_small")  # to compile
LEARNS_CENTROIDS = "test_routing_vit"
DROPS_TOKENS = ("test_dependency_vit_lite",)


@pytest.fixture(params=SMALL)
def name(request) -> str:
    return request.param


def double(name: str) -> nn.Module:
    return make(name, num_classes=7).double()


def doubles(batch: int = 2, size: int = 32, seed: int = 1) -> Tensor:
    return images(batch, size, size, seed).double()


def own_size(name: str) -> int:
    return timm.get_pretrained_cfg(name).input_size[-1]


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], **tolerance) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, msg=lambda text, key=key: f"{key}: {text}", **tolerance)


# Compilers, fake tensors


def training_step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Everything that a training step gives: output, gradients, buffers."""
    leaf = x.clone().requires_grad_()
    out = model(leaf)
    sum(auxiliary_losses(model).values(), out.square().sum()).backward()
    return {
        "output": out.detach(), "input": leaf.grad,
        **{key: parameter.grad for key, parameter in model.named_parameters()},
        **{f"buffer {key}": buffer for key, buffer in model.named_buffers()},
    }


def assert_compiled_is_eager(name: str, backend: str) -> None:
    torch.compiler.reset()
    model, x = double(name).train(), doubles(2, own_size(name))
    compiled = torch.compile(copy.deepcopy(model), backend=backend, fullgraph=True)
    actual = {key.replace("_orig_mod.", ""): value for key, value in training_step(compiled, x).items()}
    assert_same(actual, training_step(model, x), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in COMPILED])
def test_compiled_training_step(name):
    assert_compiled_is_eager(name, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nat_small", *(next(iter(record.small)) for record in families().values())])
def test_inductors_training_step(name):
    """One of each family: half a minute a model."""
    assert_compiled_is_eager(name, "inductor")


@pytest.mark.parametrize("gradients", [False, True])
def test_tensors_without_values_leave_nothing(name, gradients):
    """Shapes are found without values, and calls with real tensors do not see what was found before."""
    model, x = double(name), doubles()
    with torch.set_grad_enabled(gradients):
        expected = copy.deepcopy(model)(x)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = model(mode.from_tensor(x))
        assert fake.shape == expected.shape
        copy.deepcopy(model).to("meta")(x.to("meta"))
        for _ in range(2):
            out = model(x)
            assert type(out) is Tensor
            assert torch.equal(out, expected)


# Derivatives and transforms


def test_forward_mode(name):
    """Tangents are those of finite differences, and nothing that is kept between calls hides them."""
    model, x, tangent, step = double(name), doubles(1), doubles(1, seed=2), 1e-6
    with torch.no_grad():
        expected = (model(x + step * tangent) - model(x - step * tangent)) / (2 * step)
        model(x)
    torch.testing.assert_close(jvp(model, (x,), (tangent,))[1], expected, rtol=1e-4, atol=1e-7)
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients), forward_ad.dual_level():
            actual = forward_ad.unpack_dual(model(forward_ad.make_dual(x, tangent))).tangent
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-7)


def test_forward_mode_along_parameters(name):
    model, x, step = double(name), doubles(1), 1e-6
    with torch.no_grad():
        model(x)
    parameters = {key: parameter.detach() for key, parameter in model.named_parameters()}
    generator = torch.Generator().manual_seed(3)
    tangents = {key: torch.randn(p.shape, generator=generator, dtype=p.dtype) for key, p in parameters.items()}

    def run(parameters):
        return functional_call(model, parameters, (x,))

    with torch.no_grad():
        ahead, behind = (
            run({key: p + sign * step * tangents[key] for key, p in parameters.items()}) for sign in (1, -1))
    actual = jvp(run, (parameters,), (tangents,))[1]
    torch.testing.assert_close(actual, (ahead - behind) / (2 * step), rtol=1e-4, atol=1e-6)


def test_gradient_penalty(name):
    """The gradient of the squared length of the gradient is that of finite differences, of images and parameters."""
    model, x, direction, step = double(name), doubles(1), doubles(1, seed=2), 1e-7  # too small to meet a ReLU's kink
    parameters = list(model.parameters())
    along = [torch.randn(p.shape, generator=torch.Generator().manual_seed(i), dtype=p.dtype)
             for i, p in enumerate(parameters)]

    def penalty(x: Tensor, create_graph: bool = False) -> Tensor:
        x = x if x.requires_grad else x.detach().requires_grad_()
        gradient, = torch.autograd.grad(model(x).sin().sum(), x, create_graph=create_graph)
        return gradient.square().sum()

    leaf = x.clone().requires_grad_()
    first, *others = torch.autograd.grad(penalty(leaf, create_graph=True), [leaf, *parameters], allow_unused=True)
    expected = (penalty(x + step * direction) - penalty(x - step * direction)) / (2 * step)
    torch.testing.assert_close((first * direction).sum(), expected, rtol=1e-4, atol=1e-6)
    shifted = []
    for sign in (1, -2):
        with torch.no_grad():
            for parameter, tangent in zip(parameters, along, strict=True):
                parameter.add_(sign * step * tangent)
        shifted.append(penalty(x))
    actual = sum((g * t).sum() for g, t in zip(others, along, strict=True) if g is not None)
    torch.testing.assert_close(actual, (shifted[0] - shifted[1]) / (2 * step), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("gradients", [False, True])
def test_vmap_over_images(name, gradients):
    model, x = double(name), doubles(3)
    with torch.set_grad_enabled(gradients):
        expected = torch.cat([model(image[None]) for image in x])
        torch.testing.assert_close(vmap(lambda image: model(image[None])[0])(x), expected)
        torch.testing.assert_close(vmap(model)(x[:, None])[:, 0], expected)


def test_gradients_per_sample(name):
    # PyTorch 2.14 has no such gradient of a convolution of a single pixel in float64, as stride 32 makes of 32 pixels.
    model, x = double(name), doubles(2, 64)
    parameters = {key: parameter.detach() for key, parameter in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def loss(parameters, image):
        return functional_call(model, (parameters, buffers), (image[None],)).sin().sum()

    actual = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i, image in enumerate(x):
        model.zero_grad()
        model(image[None]).sin().sum().backward()
        assert_same({key: value[i] for key, value in actual.items()},
                    {key: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                     for key, parameter in model.named_parameters()})


# What others hold


@pytest.mark.parametrize("gradients", [False, True])
def test_what_hooks_were_given_stays(name, gradients):
    model, x = make(name), images()
    before, seen = x.clone(), []

    def hook(module, inputs, output):
        seen.extend((module, t, t.detach().clone()) for t in (*inputs, output) if isinstance(t, Tensor))

    for module in model.modules():
        module.register_forward_hook(hook)
    with torch.set_grad_enabled(gradients):
        first = model(x)
        kept = first.detach().clone()
        model(x + 1)
    assert seen
    assert not [module for module, t, clone in seen if not torch.equal(t, clone)]
    assert torch.equal(x, before)
    assert torch.equal(first, kept)


@pytest.mark.parametrize("kind", ["output", "input", "global output", "global input"])
@pytest.mark.parametrize("where", ["", "leaves", "middle"])
@torch.no_grad()
def test_what_single_hooks_were_given_stays(name, kind, where):
    """Also where few modules have a hook, and where a hook sees inputs only."""
    model, seen = make(name), []
    leaves = [module for module in model.modules() if not list(module.children())]
    chosen = {"": [model], "leaves": leaves, "middle": set(model.modules()) - set(leaves)}[where]

    def keep(*tensors):
        seen.extend((t, t.clone()) for t in tensors if isinstance(t, Tensor))

    def before(module, inputs):
        if module in chosen:
            keep(*inputs)

    def after(module, inputs, output):
        if module in chosen:
            keep(output)

    if kind.startswith("global"):
        register = (nn.modules.module.register_module_forward_pre_hook if kind == "global input"
                    else nn.modules.module.register_module_forward_hook)
        handles = [register(before if kind == "global input" else after)]
    else:
        handles = [module.register_forward_pre_hook(before) if kind == "input" else module.register_forward_hook(after)
                   for module in chosen]
    try:
        model(images())
    finally:
        for handle in handles:
            handle.remove()
    assert seen
    assert all(torch.equal(t, clone) for t, clone in seen)


@pytest.mark.parametrize("wrapped", ["fc1", "conv1"])
@torch.no_grad()
def test_a_layer_that_keeps_what_it_returns(name, wrapped):
    """A module that was put in the place of one of ours may keep its result: nobody writes over it."""
    model, kept = make(name), []

    class Keeper(nn.Module):
        def __init__(self, inner: nn.Module):
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            out = self.inner(x)
            kept.append((out, out.clone()))
            return out

    expected = model(images())
    for key, module in list(model.named_modules()):
        if key.rpartition(".")[2] == wrapped:
            model.set_submodule(key, Keeper(module))
    torch.testing.assert_close(model(images()), expected)
    assert all(torch.equal(out, clone) for out, clone in kept)


# Odd inputs


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (100, 120)], ids=str)
def test_no_images(name, size):
    model, x = make(name, num_classes=7), images(0, *size)
    with torch.no_grad():
        assert model(x).shape == (0, 7)
    for training in (False, True):
        model.train(training)
        model.zero_grad()
        buffers = copy.deepcopy(dict(model.named_buffers()))
        leaf = x.clone().requires_grad_()
        out = model(leaf)
        assert out.shape == (0, 7)
        (out.sum() + sum(auxiliary_losses(model).values())).backward()
        assert leaf.grad.shape == x.shape
        assert not any(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
        for key, buffer in model.named_buffers():
            if not key.endswith("num_batches_tracked"):
                assert torch.equal(buffer, buffers[key]), key


@torch.no_grad()
def test_smallest_images(name):
    """The least size works, along each axis; below it one line says what it is."""
    model, least = make(name), LEAST_SIZES.get(name, 1)
    assert model.min_size == least
    for size in ((least, least), (least, 70), (70, least)):
        assert model(images(2, *size)).isfinite().all()
    for size in ((least - 1, 64), (64, least - 1)):
        for run in (model, model.forward_features, model.forward_intermediates):
            with pytest.raises(ValueError, match=re.escape(f"at least {least} x {least} pixels")) as caught:
                run(torch.empty(1, 3, *size))
            assert "\n" not in str(caught.value)
            assert f"{size[0]} x {size[1]}" in str(caught.value)


def test_smallest_images_of_features():
    """A model without its last stages takes smaller images."""
    model = timm.create_model("test_agent_pvt", features_only=True, out_indices=(0, 1))
    assert [x.shape[2:] for x in model(images(1, 8, 8))] == [(2, 2), (1, 1)]
    with pytest.raises(ValueError, match="at least 8 x 8 pixels"):
        model(images(1, 7, 8))


@pytest.mark.parametrize("size", [1, 2, 5])
def test_training_on_tiny_maps(name, size):
    model = make(name, num_classes=7).train()
    size = max(size, LEAST_SIZES.get(name, 1))
    model(images(3, size, size)).square().sum().backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@torch.no_grad()
def test_values_that_are_no_numbers_stay_in_their_image(name, value):
    model, x = make(name), images(3)
    expected = model(x)
    x[1, 0, 10, 20] = value
    out = model(x)
    torch.testing.assert_close(out[::2], expected[::2])
    if "mobilenet" not in name or value != torch.inf:  # of which its ReLU6 makes 6
        assert not out[1].isfinite().all()


@torch.no_grad()
def test_strides_do_not_matter(name):
    model, x = make(name), images(2, 37, 61)
    expected = model(x)
    padded = torch.randn(2, 5, 50, 80)
    padded[:, 1:4, 3:40, 7:68] = x
    views = [
        x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3),
        x.transpose(0, 1).contiguous().transpose(0, 1), padded[:, 1:4, 3:40, 7:68], torch.stack([x, x], -1)[..., 0],
    ]
    for view in views:
        torch.testing.assert_close(model(view), expected, rtol=1e-4, atol=1e-5)
    one = x[:1].expand(3, -1, -1, -1)
    torch.testing.assert_close(model(one), expected[:1].expand(3, -1), rtol=1e-4, atol=1e-5)
    twin = copy.deepcopy(model).to(memory_format=torch.channels_last)
    torch.testing.assert_close(twin(views[0]), expected, rtol=1e-4, atol=1e-5)


# Precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(32, 32), (37, 61)], ids=str)
def test_training_in_half_precision(name, dtype, size):
    """Under autocast: answers near float32's, finite gradients of the parameters' dtype."""
    errors, x = [], images(2, *size)
    for seed in range(3 if name in DROPS_TOKENS else 1):  # of nearly equal ones another may go
        model = make(name, seed, num_classes=7)
        with torch.no_grad():
            with torch.autocast("cpu", dtype):
                out = model(x)
            expected = model(x)
        errors.append((out.float() - expected).norm() / expected.norm())
    assert min(errors) < 0.1
    with torch.autocast("cpu", dtype):
        out = model.train()(x)  # batch norms of two images enlarge what is rounded
    out.float().square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is None or (parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all()), key


# Memory


@torch.no_grad()
def test_what_is_kept_goes_with_the_model(name):
    """A second model finds what does not depend on weights, and leaves nothing more behind."""
    release_memory()
    left = []
    gc.freeze()  # what was there before, through which each collection would go
    try:
        for seed in range(3):
            model = make(name, seed)
            for size in (64, 96):
                model(images(1, size, size))
            held = held_bytes()
            del model
            gc.collect()
            left.append(held_bytes())
            assert left[-1] <= held
    finally:
        gc.unfreeze()
    assert left == left[:1] * 3
    release_memory()
    assert held_bytes() == 0


@torch.no_grad()
def test_memory_is_bounded_whatever_the_sizes(name, monkeypatch):
    """One bound for all that is kept, by all blocks, for all sizes."""
    release_memory()
    model = make(name)
    monkeypatch.setattr(kept, "_LIMIT", 1 << 18)
    for i in range(10):
        model(images(1, 64 + 16 * i, 80 + 8 * i))
        assert kept._state.size <= 1 << 18
    release_memory()


# Threads


def in_threads(count: int, work) -> None:
    errors = []

    def run(i: int) -> None:
        try:
            work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_threads_build_models():
    """At once, and without an edit of the process's environment, which other threads read."""
    names, before, seen = list(SMALL), dict(os.environ), []

    def work(i: int) -> None:
        for _ in range(5):
            timm.create_model(names[i], **SMALL[names[i]])
            seen.append(dict(os.environ) == before)

    in_threads(len(names), work)
    assert len(seen) == 5 * len(names)
    assert all(seen)


def test_threads_share_a_model(name):
    model = make(name)
    pictures = [images(1, 32 + 16 * i, 48, seed=i) for i in range(4)]
    with torch.no_grad():
        expected = [copy.deepcopy(model)(x) for x in pictures]

    def work(i: int) -> None:
        for _ in range(3):
            with torch.set_grad_enabled(i % 2 == 1):
                torch.testing.assert_close(model(pictures[i]).detach(), expected[i], rtol=1e-4, atol=1e-5)

    in_threads(4, work)


# Files, copies, processes


@torch.no_grad()
def test_a_saved_model_is_the_model(name):
    """Whole, as a copy and as a pickle; what inference keeps is not in the file."""
    model, x = make(name), images()
    fresh = io.BytesIO()
    torch.save(model, fresh)
    expected = model(x)
    used = io.BytesIO()
    torch.save(model, used)
    assert used.tell() <= fresh.tell() * 1.02 + 1000
    for file in (fresh, used):
        file.seek(0)
    for again in (*(torch.load(file, weights_only=False) for file in (fresh, used)), copy.deepcopy(model),
                  pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(x), expected)
        with torch.enable_grad():
            again.train()(images(2)).sum().backward()


def test_a_trained_model_is_saved():
    """A model that has just trained, with its gradients and losses."""
    for name in SMALL:
        model = make(name).train()
        model(images(2)).sum().backward()
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        again = torch.load(file, weights_only=False).eval()
        with torch.no_grad():
            assert torch.equal(again(images()), model.eval()(images()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_state_dict_in_half_precision(name, dtype):
    model, x = make(name).to(dtype), images().to(dtype)
    expected = model(x)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    again = timm.create_model(name, **SMALL[name]).to(dtype).eval()
    again(x)  # keeps tables of its first weights
    again.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(again(x), expected)


def _answers(models: list[nn.Module]) -> list[Tensor]:
    with torch.no_grad():
        return [model(images()) for model in models]


def test_models_go_to_other_processes():
    models = [make(name) for name in SMALL]
    expected = _answers(models)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for a, b in zip(pool.apply(_answers, (models,)), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
